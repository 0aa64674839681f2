"""Small RSSMs as plain modules, and their textbook steps: what the four scans are compared with.

Nothing is hoisted or merged here: every network is applied to its full input at every step.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastrssm.models.cells import BlockGRUCell, cell_layers
from fastrssm.models.nets import MLP, paired_layers, project, split_input
from fastrssm.ops import Layer, PolicyWeights, RSSMWeights

D, S, A, E, M = 6, 4, 2, 3, 5
# options of the scans, per published variant
VARIANTS = {
    "rssm": {"cell": "torch_gru", "heads": "split", "latent": "gaussian", "min_std": 1e-6},
    "rssmo": {"cell": "torch_gru", "heads": "joint", "latent": "gaussian", "min_std": 0.1},
    "rssmo_v2": {"cell": "ln_gru_a", "heads": "joint", "latent": "gaussian", "min_std": 0.1},
    "discrete": {
        "cell": "ln_gru_a", "heads": "joint", "latent": "categorical", "min_std": 0.1, "groups": 2
    },
    "unimix": {
        "cell": "ln_gru_a", "heads": "joint", "latent": "categorical", "min_std": 0.1, "groups": 2,
        "unimix": 0.3,
    },
    "dreamer_v3": {
        "cell": "block_gru", "heads": "joint", "latent": "categorical", "min_std": 0.1, "groups": 2,
        "unimix": 0.01,
    },
}  # fmt: skip
BLOCKS = 3


class Run(NamedTuple):
    """What every scan can return, stacked over time."""

    deter: Tensor
    stoch: Tensor
    stats: tuple[Tensor, ...]
    action: Tensor


class Textbook(nn.Module):
    """One variant as unmerged modules in float64."""

    def __init__(self, variant: str, seed: int = 0) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.options = VARIANTS[variant]
        out = S if self.options["latent"] == "categorical" else 2 * S
        in_blocks = self.options["cell"] == "block_gru"
        norm = "rms" if in_blocks else "layer"
        joint = {"width": M, "depth": 1, "norm": norm, "activation": "swish"}
        if self.options["heads"] == "split":
            self.pre = None
            self.prior = nn.ModuleList([MLP(D, S, width=M, depth=2) for _ in range(2)])
            self.post = nn.ModuleList([MLP(D + E, S, width=M, depth=2) for _ in range(2)])
        else:
            self.pre = None if in_blocks else MLP(S + A, None, **joint)
            self.prior = nn.ModuleList([MLP(D, out, **joint)])
            self.post = nn.ModuleList([MLP(D + E, out, **joint)])
        in_size = S + A if self.pre is None else M
        if self.options["cell"] == "torch_gru":
            self.cell = nn.GRUCell(in_size, D)
        elif in_blocks:
            self.cell = BlockGRUCell(D, S, A, width=M, blocks=BLOCKS)
        else:
            self.cell = nn.Sequential(nn.Linear(in_size + D, 3 * D), nn.LayerNorm(3 * D))
        self.policy = nn.ModuleList([MLP(D + S, A, width=M, depth=2) for _ in range(2)])
        self.idm = nn.ModuleList([MLP(D + S + E, A, width=M, depth=2) for _ in range(2)])
        self.double()
        # away from the ones and zeros of a fresh LayerNorm, which would hide a missing factor
        with torch.no_grad():
            for parameter in self.parameters():
                parameter.add_(0.2 * torch.randn_like(parameter))

    def recur_in_blocks(self, deter: Tensor, stoch: Tensor, action: Tensor) -> Tensor:
        cell, own = self.cell, D // BLOCKS

        def rms(x: Tensor, norm: nn.RMSNorm) -> Tensor:
            return F.silu(x / (x.square().mean(-1, keepdim=True) + 1e-4).sqrt() * norm.weight)

        action = torch.where(action.abs() > 1, action / action.abs().detach(), action)
        x = (
            rms(cell.dynin0(deter), cell.dynin0norm),
            rms(cell.dynin1(stoch), cell.dynin1norm),
            rms(cell.dynin2(action), cell.dynin2norm),
        )
        blocks = [slice(g * own, (g + 1) * own) for g in range(BLOCKS)]
        mixed = [
            torch.cat((deter[..., at], *x), -1) @ cell.dynhid.weight[g].T + cell.dynhid.bias[g]
            for g, at in enumerate(blocks)
        ]
        y = rms(torch.cat(mixed, -1), cell.dynhidnorm)
        new = []
        for g, at in enumerate(blocks):
            r, c, u = (y[..., at] @ cell.dyngru.weight[g].T + cell.dyngru.bias[g]).chunk(3, -1)
            c, u = torch.tanh(torch.sigmoid(r) * c), torch.sigmoid(u - 1)
            new.append(u * c + (1 - u) * deter[..., at])
        return torch.cat(new, -1)

    def recur(self, deter: Tensor, stoch: Tensor, action: Tensor) -> Tensor:
        if isinstance(self.cell, BlockGRUCell):
            return self.recur_in_blocks(deter, stoch, action)
        x = torch.cat((stoch, action), -1)
        x = x if self.pre is None else self.pre(x)
        if isinstance(self.cell, nn.GRUCell):
            xr, xz, xn = (x @ self.cell.weight_ih.T + self.cell.bias_ih).chunk(3, -1)
            hr, hz, hn = (deter @ self.cell.weight_hh.T + self.cell.bias_hh).chunk(3, -1)
            r, z = torch.sigmoid(xr + hr), torch.sigmoid(xz + hz)
            return (1 - z) * torch.tanh(xn + r * hn) + z * deter
        z, r, o = self.cell(torch.cat((x, deter), -1)).chunk(3, -1)
        z, o = torch.sigmoid(z), torch.tanh(torch.sigmoid(r) * o)
        return (1 - z) * o + z * deter

    def stats(self, nets: nn.ModuleList, x: Tensor) -> tuple[Tensor, ...]:
        if len(nets) == 2:
            return nets[0](x), F.softplus(nets[1](x)) + self.options["min_std"]
        out = nets[0](x)
        if self.options["latent"] == "categorical":
            return (out.reshape(*out.shape[:-1], self.options["groups"], -1),)
        return out[..., :S], 2 * torch.sigmoid(out[..., S:] / 2) + self.options["min_std"]

    def draw(self, stats: tuple[Tensor, ...], noise: Tensor) -> Tensor:
        if len(stats) == 2:
            return stats[0] + stats[1] * noise
        unimix, classes = self.options.get("unimix", 0.0), stats[0].shape[-1]
        probs = (1 - unimix) * stats[0].softmax(-1) + unimix / classes
        bounds = probs.detach().cumsum(-1)
        index = torch.searchsorted(bounds, noise.unsqueeze(-1), right=True).clamp_max(classes - 1)
        one_hot = F.one_hot(index.squeeze(-1), classes).double()
        return (one_hot + probs - probs.detach()).flatten(-2)

    def run(
        self, noise, deter, stoch, *,
        embed=None, action=None, action_noise=None, is_first=None, idm=False, detach=False,
    ) -> Run:  # fmt: skip
        """Step through a sequence: posterior if there is an embedding, policy if no action."""
        steps = []
        for t in range(noise.shape[0]):
            if is_first is not None:
                keep = (~is_first[t]).double().unsqueeze(-1)
                deter, stoch = deter * keep, stoch * keep
            if action is None:
                feature = torch.cat((deter, stoch), -1)
                feature = feature.detach() if detach else feature
                if idm:
                    feature = torch.cat((feature, embed[t]), -1)
                mean, raw = (net(feature) for net in (self.idm if idm else self.policy))
                a = torch.tanh(mean + (F.softplus(raw) + 1e-6) * action_noise[t])
            else:
                a = action[t]
            deter = self.recur(deter, stoch, a)
            if embed is None:
                stats = self.stats(self.prior, deter)
            else:
                stats = self.stats(self.post, torch.cat((deter, embed[t]), -1))
            stoch = self.draw(stats, noise[t])
            steps.append((deter, stoch, a, *stats))
        deters, stochs, actions, *stacked = (torch.stack(x) for x in zip(*steps, strict=True))
        return Run(deters, stochs, tuple(stacked), actions)

    def weights(self, nets: nn.ModuleList, embed: Tensor | None = None):
        """Return RSSMWeights with this head, and the projection of an embedding if given."""
        head = paired_layers(*nets) if len(nets) == 2 else nets[0].layers()
        projection = None
        if embed is not None:
            head, outside = split_input(head, D)
            projection = project(embed, outside)
        pre = None if self.pre is None else self.pre.layers()[0]
        if isinstance(self.cell, nn.Sequential):
            linear, norm = self.cell
            cell = Layer(linear.weight, linear.bias, norm.weight, norm.bias), None, ()
        else:
            cell = cell_layers(self.cell)
        cell_input, cell_state, branches = cell
        return RSSMWeights(pre, cell_input, cell_state, head, branches), projection

    def policy_weights(self, embed: Tensor | None = None):
        """Return PolicyWeights; with an embedding those of the IDM, and its projection."""
        if embed is None:
            return PolicyWeights(paired_layers(*self.policy)), None
        layers, beside = split_input(paired_layers(*self.idm), D + S)
        return PolicyWeights(layers), project(embed, beside)


def inputs(variant: str, T: int = 4, B: int = 3, seed: int = 1) -> dict[str, Tensor]:
    """Random sequences, all of them requiring gradients but the noise."""
    g = torch.Generator().manual_seed(seed)

    def normal(*shape, grad=True):
        return torch.randn(*shape, generator=g, dtype=torch.float64).requires_grad_(grad)

    groups = VARIANTS[variant].get("groups")
    if groups is None:
        noise = normal(T, B, S, grad=False)
    else:
        noise = torch.rand(T, B, groups, generator=g, dtype=torch.float64)
    return {
        "noise": noise,
        "deter": normal(B, D),
        "stoch": normal(B, S),
        "embed": normal(T, B, E),
        "action": normal(T, B, A),
        "action_noise": normal(T, B, A, grad=False),
    }


def some_first(T: int, B: int) -> Tensor:
    """Resets in the middle, at the start and at the end."""
    is_first = torch.zeros(T, B, dtype=torch.bool)
    is_first[0, 0] = is_first[T // 2, min(1, B - 1)] = is_first[-1, -1] = True
    return is_first


def assert_same_run(got, expected: Run, sources: list[Tensor]) -> None:
    """Same values, and same gradients to all sources for one random upstream gradient."""
    names = [name for name in ("deter", "stoch", "action") if hasattr(got, name)]
    pairs = [(getattr(got, name), getattr(expected, name)) for name in names]
    pairs += list(zip(got.stats, expected.stats, strict=True))
    g = torch.Generator().manual_seed(2)
    totals = [0.0, 0.0]
    for ours, theirs in pairs:
        torch.testing.assert_close(ours, theirs, rtol=1e-11, atol=1e-12)
        upstream = torch.randn(ours.shape, generator=g, dtype=torch.float64)
        totals[0] += (ours * upstream).sum()
        totals[1] += (theirs * upstream).sum()
    ours, theirs = (
        torch.autograd.grad(total, sources, allow_unused=True, retain_graph=True)
        for total in totals
    )
    used = 0
    for a, b in zip(ours, theirs, strict=True):
        assert (a is None) == (b is None)
        if a is not None:
            used += 1
            torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-11)
    assert used > 0
