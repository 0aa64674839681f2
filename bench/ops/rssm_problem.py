"""What the scans of the benchmarks compute: modules, inputs, and what the results should be.

A sequence is filtered and its posterior compared with the prior, as an update does, or imagined.
The gradient is that of given upstream gradients to all parameters and the embedding, or to the
policy alone where there is one: its world model is frozen.
"""

import copy
from contextlib import nullcontext
from dataclasses import dataclass, replace
from functools import partial
from typing import NamedTuple

import torch

from fastrssm import ops, use_backend
from fastrssm.models.config import RSSMConfig
from fastrssm.models.nets import paired_layers
from fastrssm.models.policy import TanhGaussianPolicy
from fastrssm.models.rssm import RSSM, State
from fastrssm.ops import Layer, PolicyWeights, RSSMWeights

ACTION = 6
# more sequences are not computed in float64
_EXACT_BATCH = 512


@dataclass(frozen=True)
class Case:
    """Sizes of one sequence batch; without an embedding it is imagined."""

    name: str
    config: RSSMConfig
    embed: int
    batch: int
    length: int
    policy: bool = False


class Nets(NamedTuple):
    """All layers of a problem in the form of the ops; the head's first layer is whole."""

    rssm: RSSMWeights
    prior: tuple[Layer, ...]  # empty where the head is the prior's
    policy: PolicyWeights | None


class Problem:
    """Modules and inputs of a case."""

    def __init__(self, case, device="cpu"):
        generator = torch.Generator(device).manual_seed(0)
        torch.manual_seed(0)

        def normal(*shape):
            return torch.randn(*shape, generator=generator, device=device)

        config, lead = case.config, (case.length, case.batch)
        draw = torch.rand if config.latent == "categorical" else torch.randn
        draw = partial(draw, generator=generator, device=device)
        self.case = case
        self.rssm = RSSM(config, max(case.embed, 1), ACTION).to(device)
        policy = TanhGaussianPolicy(config.feature_size, ACTION) if case.policy else None
        self.policy = None if policy is None else policy.to(device)
        self.embed = normal(*lead, case.embed) if case.embed else None
        action = normal(*lead, ACTION)
        self.action, self.action_noise = (None, action) if case.policy else (action.tanh(), None)
        self.noise = draw(*lead, config.noise_size)
        self.state = self.rssm.initial(case.batch)
        if not case.embed:
            deter = normal(case.batch, config.deter).tanh()
            self.state = State(deter, self.state.stoch)
        if self.policy is not None:
            self.rssm.requires_grad_(False)
        elif self.embed is not None:
            self.embed.requires_grad_()
        sizes = config.deter, config.stoch
        last = lead if case.embed else (*lead, ACTION)
        shapes = *((*lead, size) for size in sizes), last
        self.upstream = tuple(normal(*shape) for shape in shapes)

    def learnt(self):
        """What has a gradient, in the order in which it is returned."""
        if self.policy is not None:
            return list(self.policy.parameters())
        return [self.embed, *self.rssm.parameters()]

    def nets(self):
        """All layers, from the parameters."""
        post, prior = (_head(self.rssm, name) for name in ("posterior", "prior"))
        if self.embed is None:
            post, prior = prior, ()
        policy = None if self.policy is None else self.policy.weights()
        return Nets(self.rssm._weights(post), prior, policy)

    def double(self):
        """The same in float64, of at most so many sequences that it is quick."""
        other = copy.copy(self)
        batch = min(self.case.batch, _EXACT_BATCH)
        other.case = replace(self.case, batch=batch)

        def rows(x):
            return None if x is None else x.detach()[:, :batch].double()

        for name in ("embed", "action", "noise", "action_noise"):
            setattr(other, name, rows(getattr(self, name)))
        other.upstream = tuple(map(rows, self.upstream))
        other.state = State(*(x[:batch].double() for x in self.state))
        other.rssm = copy.deepcopy(self.rssm).double()
        other.policy = None if self.policy is None else copy.deepcopy(self.policy).double()
        if other.embed is not None and other.policy is None:
            other.embed.requires_grad_()
        return other


def _head(rssm, name):
    if rssm.config.heads == "joint":
        return getattr(rssm, f"{name}_net").layers()
    return paired_layers(getattr(rssm, f"{name}_mean"), getattr(rssm, f"{name}_std"))


def outputs(problem, backend=None):
    """States and KL of a sequence, or states and actions of an imagined one, through the models.

    `backend` runs the scan, or raises; the KL has another where that has none.
    """
    p, rssm = problem, problem.rssm
    with nullcontext() if backend is None else use_backend(backend):
        seen = _states(p)
    if p.embed is None:
        return seen.deter, seen.stoch, seen.action
    prior = rssm.prior(seen.deter)
    if rssm.config.latent == "gaussian":
        return seen.deter, seen.stoch, ops.gaussian_kl(*seen.stats, *prior)
    kl = ops.categorical_kl(*seen.stats, *prior, unimix=rssm.config.unimix)
    return seen.deter, seen.stoch, kl


def _states(p):
    if p.embed is None:
        return p.rssm.imagine_with_policy(
            p.policy, p.state, p.case.length, noise=p.noise, action_noise=p.action_noise
        )
    if p.policy is None:
        return p.rssm.observe(p.embed, p.action, noise=p.noise, state=p.state)
    return p.rssm.observe_with_policy(p.embed, p.policy, noise=p.noise, action_noise=p.action_noise)


class Exact:
    """The results in float64, and how far from them others are."""

    def __init__(self, problem):
        p = problem.double()
        self.batch = p.case.batch
        self.whole = self.batch == problem.case.batch
        found = outputs(p)
        self.outputs = [x.detach() for x in found]
        if not self.whole:
            return
        self.gradients = torch.autograd.grad(found, p.learnt(), p.upstream)
        for parameter, gradient in zip(p.learnt(), self.gradients, strict=True):
            parameter.data = gradient
        with torch.no_grad():
            # the same gradients in the form of the ops
            self.merged = leaves(p)

    def states_error(self, found, steps):
        """Largest relative error of deter, stoch and what follows, of the middle sequence."""
        errors = []
        for got, exact in zip(found, self.outputs, strict=False):
            got, exact = (x[:steps, : self.batch].double() for x in (got, exact))
            off, size = (x.movedim(1, 0).flatten(1).norm(dim=1) for x in (got - exact, exact))
            errors.append((off / size).median())
        return max(errors).item()

    def gradients_error(self, found, merged):
        """Relative error of all gradients together."""
        exact = self.merged if merged else self.gradients
        off = sum((g.double() - e).square().sum() for g, e in zip(found, exact, strict=True))
        return (off / sum(e.square().sum() for e in exact)).sqrt().item()


def leaves(problem):
    """What has a gradient in the form of the ops: the embedding and all layers, or the policy."""
    nets = problem.nets()
    if nets.policy is not None:
        return [x for layer in nets.policy.layers for x in layer if x is not None]
    layers = [nets.rssm.pre, nets.rssm.cell_input, nets.rssm.cell_state]
    layers += [*nets.rssm.head, *nets.rssm.branches, *nets.prior]
    return [problem.embed, *(x for layer in layers if layer for x in layer if x is not None)]
