"""The recurrent state-space model: its state, and the module that owns parameters."""

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastrssm import ops
from fastrssm.models.batch import check_shape
from fastrssm.models.cells import any_parameter, build_cell, cell_layers
from fastrssm.models.config import AIME_RSSM as AIME_RSSM
from fastrssm.models.config import AIME_RSSMO as AIME_RSSMO
from fastrssm.models.config import AIME_V2_DISCRETE as AIME_V2_DISCRETE
from fastrssm.models.config import AIME_V2_RSSMO as AIME_V2_RSSMO
from fastrssm.models.config import DREAMER_V3_1M as DREAMER_V3_1M
from fastrssm.models.config import RSSMConfig as RSSMConfig
from fastrssm.models.config import dreamer_v3 as dreamer_v3
from fastrssm.models.kept import Kept
from fastrssm.models.nets import MLP, Merged, paired_layers, project, split_input, together
from fastrssm.models.policy import TanhGaussianPolicy
from fastrssm.ops import (
    Layer,
    PolicyTrajectory,
    PolicyWeights,
    RSSMWeights,
    Trajectory,
)
from fastrssm.ops.acting import Step, prepare_step


class State(NamedTuple):
    """State of the model after a step."""

    deter: Tensor  # [..., D]
    stoch: Tensor  # [..., S]

    @property
    def feature(self) -> Tensor:
        """[..., F] deterministic part first."""
        return torch.cat((self.deter, self.stoch), -1)


class RSSM(nn.Module):
    """Parameters of the transition model, and its sequences through the ops."""

    def __init__(self, config: RSSMConfig, embed_size: int, action_size: int) -> None:
        """Build the modules for embeddings [.., E] and actions [.., A]."""
        super().__init__()
        self.config = config
        self.embed_size = embed_size
        self.action_size = action_size
        D, S, width = config.deter, config.stoch, config.hidden
        in_size = S + action_size
        self._prior: Merged[RSSMWeights] = Merged()
        self._posterior: Merged[tuple[RSSMWeights, Layer]] = Merged()
        self._step: Kept[Step] = Kept()
        if config.input_layer:
            self.pre_memory = MLP(
                in_size, None, width=width, depth=1, norm="layer", activation="swish"
            )
            in_size = width
        depth = config.posterior_layers or config.layers
        # the order of registration is the order of AIME's files
        if config.heads == "joint":
            self.memory_cell = build_cell(config, in_size, action_size)
            out = 2 * S if config.latent == "gaussian" else S
            self.prior_net = _joint(config, D, out, config.layers)
            self.posterior_net = _joint(config, D + embed_size, out, depth)
        else:
            self.prior_mean = MLP(D, S, width=width, depth=config.layers)
            self.prior_std = MLP(D, S, width=width, depth=config.layers)
            self.posterior_mean = MLP(D + embed_size, S, width=width, depth=depth)
            self.posterior_std = MLP(D + embed_size, S, width=width, depth=depth)
            self.memory_cell = build_cell(config, in_size, action_size)

    @property
    def dtype(self) -> torch.dtype:
        """Of the parameters; found faster than by `next(self.parameters())`."""
        return self._like().dtype

    def initial(self, batch_size: int) -> State:
        """Return the zero state [B, D], [B, S] in which every sequence starts."""
        like = self._like()
        return State(
            like.new_zeros(batch_size, self.config.deter),
            like.new_zeros(batch_size, self.config.stoch),
        )

    def draw_noise(self, *lead: int, generator: torch.Generator | None = None) -> Tensor:
        """Draw the noise [*lead, S] (normal) or [*lead, G] (uniform) that a scan needs."""
        like = self._like()
        sample = torch.randn if self.config.latent == "gaussian" else torch.rand
        return sample(
            *lead, self.config.noise_size, generator=generator, device=like.device, dtype=like.dtype
        )

    def prior(self, deter: Tensor) -> tuple[Tensor, ...]:
        """Return the statistics of p(stoch | deter): mean, std [..., S] or logits [..., G, K]."""
        config = self.config
        if config.heads == "split":
            mean, raw = together(deter, (self.prior_mean, self.prior_std))
            return mean, F.softplus(raw) + config.min_std
        out = self.prior_net(deter)
        if config.latent == "categorical":
            return (out.unflatten(-1, (config.groups, -1)),)
        mean, raw = out.chunk(2, -1)
        return mean, 2.0 * torch.sigmoid(0.5 * raw) + config.min_std

    def observe(
        self,
        embed: Tensor,
        action: Tensor,
        *,
        noise: Tensor | None = None,
        generator: torch.Generator | None = None,
        is_first: Tensor | None = None,
        state: State | None = None,
    ) -> Trajectory:
        """Filter a sequence.

        Args:
            embed: [T, B, E] encoded observations.
            action: [T, B, A] action that led to each of them.
            noise: [T, B, S] standard normal (categorical: [T, B, G] uniform); None: drawn here.
            generator: where the noise is drawn from if it is not given.
            is_first: [T, B] bool, the state is zeroed before this step.
            state: [B, D], [B, S] before the first step; None: zero.

        Returns:
            States [T, B, ...] and the statistics of the posterior.

        Raises:
            ValueError: a tensor has the wrong shape; the message names it.
        """
        T, B = embed.shape[:2]
        check_shape("embed", embed, (T, B, self.embed_size))
        check_shape("action", action, (T, B, self.action_size))
        noise, state = self._inputs(T, B, noise, generator, state)
        weights, outside = self._posterior_weights()
        return ops.rssm_observe(
            project(embed, outside), action, noise, _check_first(is_first, T, B), *state, weights,
            **self._options(),
        )  # fmt: skip

    def observe_with_policy(
        self,
        embed: Tensor,
        policy: TanhGaussianPolicy,
        *,
        noise: Tensor | None = None,
        action_noise: Tensor | None = None,
        generator: torch.Generator | None = None,
        is_first: Tensor | None = None,
        policy_sees_embed: bool = False,
    ) -> PolicyTrajectory:
        """Filter a sequence from the zero state with actions drawn from a policy.

        Args:
            embed: [T, B, E] encoded observations.
            policy: acts on the state before each frame.
            noise: [T, B, S] as in `observe`; None: drawn here.
            action_noise: [T, B, A] standard normal; None: drawn here, after `noise`.
            generator: where they are drawn from if not given.
            is_first: [T, B] bool, the state is zeroed before this step.
            policy_sees_embed: the policy's input is [state before the frame, embedding of the
                frame]: an inverse dynamics model.

        Returns:
            States [T, B, ...], the statistics of the posterior, and the actions.

        Raises:
            ValueError: a tensor has the wrong shape; the message names it.
        """
        T, B = embed.shape[:2]
        check_shape("embed", embed, (T, B, self.embed_size))
        noise, state = self._inputs(T, B, noise, generator, None)
        action_noise = self._action_noise(T, B, action_noise, generator)
        weights, outside = self._posterior_weights()
        policy_weights, policy_proj = policy.weights(), None
        if policy_sees_embed:
            inner, beside = split_input(policy_weights.layers, self.config.feature_size)
            policy_weights, policy_proj = PolicyWeights(inner), project(embed, beside)
        return ops.rssm_observe_policy(
            project(embed, outside), noise, action_noise, _check_first(is_first, T, B), *state,
            weights, policy_weights,
            action_min_std=policy.min_std, policy_proj=policy_proj, **self._options(),
        )  # fmt: skip

    def imagine(
        self,
        action: Tensor,
        state: State,
        *,
        noise: Tensor | None = None,
        generator: torch.Generator | None = None,
    ) -> Trajectory:
        """Roll the prior forward along actions.

        Args:
            action: [T, B, A] action that leads to each state.
            state: [B, D], [B, S] before the first of them.
            noise: as in `observe`.
            generator: as in `observe`.

        Returns:
            States [T, B, ...] and the statistics of the prior.

        Raises:
            ValueError: a tensor has the wrong shape; the message names it.
        """
        T, B = action.shape[:2]
        check_shape("action", action, (T, B, self.action_size))
        noise, state = self._inputs(T, B, noise, generator, state)
        return ops.rssm_imagine(action, noise, *state, self._prior_weights(), **self._options())

    def imagine_with_policy(
        self,
        policy: TanhGaussianPolicy,
        state: State,
        horizon: int,
        *,
        noise: Tensor | None = None,
        action_noise: Tensor | None = None,
        generator: torch.Generator | None = None,
        detach_policy_input: bool = False,
    ) -> PolicyTrajectory:
        """Roll the prior forward under a policy.

        Args:
            policy: acts on each state before it is left.
            state: [B, D], [B, S] in which imagination starts.
            horizon: T, number of steps.
            noise: as in `observe`.
            action_noise: [T, B, A] standard normal; None: drawn here, after `noise`.
            generator: where they are drawn from if not given.
            detach_policy_input: no gradient through what the policy sees (Dreamer).

        Returns:
            States after each step [T, B, ...], the statistics of the prior, and the actions.

        Raises:
            ValueError: a tensor has the wrong shape, or horizon is below 1.
        """
        if horizon < 1:
            raise ValueError(f"horizon is {horizon}, expected at least 1")
        B = state.deter.shape[0]
        noise, state = self._inputs(horizon, B, noise, generator, state)
        action_noise = self._action_noise(horizon, B, action_noise, generator)
        return ops.rssm_imagine_policy(
            noise, action_noise, *state, self._prior_weights(), policy.weights(),
            action_min_std=policy.min_std, detach_policy_input=detach_policy_input,
            **self._options(),
        )  # fmt: skip

    def step(
        self,
        embed: Tensor,
        action: Tensor,
        state: State,
        *,
        noise: Tensor | None = None,
        is_first: Tensor | None = None,
    ) -> State:
        """Filter one step: embed [B, E], action [B, A], noise [B, S] or [B, G], is_first [B].

        Without gradient, in float32 on the CPU, it costs hardly more than reading the weights.
        """
        if noise is None and embed.ndim == 2:
            noise = self.draw_noise(len(embed))
        prepared = self._step.get(self, self._step_parts, self._prepare_step)
        found = None if prepared is None else prepared(embed, action, noise, is_first, *state)
        if found is not None:
            return State(*found)
        trajectory = self.observe(
            embed.unsqueeze(0),
            action.unsqueeze(0),
            noise=None if noise is None else noise.unsqueeze(0),
            is_first=None if is_first is None else is_first.unsqueeze(0),
            state=state,
        )
        return State(trajectory.deter[0], trajectory.stoch[0])

    def _like(self) -> Tensor:
        return any_parameter(self.memory_cell)

    def _prior_weights(self) -> RSSMWeights:
        return self._prior.get(self._parts("prior"), lambda: self._weights(self._head("prior")))

    def _step_parts(self) -> list[nn.Module]:
        return self._parts("posterior")

    def _prepare_step(self) -> Step | None:
        return prepare_step(*self._posterior_weights(), **self._options())

    def _posterior_weights(self) -> tuple[RSSMWeights, Layer]:
        """Return the weights, and what projects the embedding."""
        self._step.forget_while_learning()

        def make() -> tuple[RSSMWeights, Layer]:
            layers, outside = split_input(self._head("posterior"), self.config.deter)
            return self._weights(layers), outside

        return self._posterior.get(self._parts("posterior"), make)

    def _head(self, name: str) -> tuple[Layer, ...]:
        nets = self._nets(name)
        return paired_layers(*nets) if len(nets) == 2 else nets[0].layers()

    def _nets(self, head: str) -> list[MLP]:
        names = ("net",) if self.config.heads == "joint" else ("mean", "std")
        return [getattr(self, f"{head}_{name}") for name in names]

    def _parts(self, head: str) -> list[nn.Module]:
        pre = [self.pre_memory] if self.config.input_layer else []
        return [*pre, self.memory_cell, *self._nets(head)]

    def _weights(self, head: tuple[Layer, ...]) -> RSSMWeights:
        pre = self.pre_memory.layers()[0] if self.config.input_layer else None
        cell_input, cell_state, branches = cell_layers(self.memory_cell)
        return RSSMWeights(pre, cell_input, cell_state, head, branches)

    def _options(self) -> dict[str, Any]:
        config = self.config
        return {
            "cell": config.cell,
            "heads": config.heads,
            "latent": config.latent,
            "min_std": config.min_std,
            "groups": config.groups,
            "unimix": config.unimix,
        }

    def _inputs(
        self, T: int, B: int, noise: Tensor | None, generator: torch.Generator | None,
        state: State | None,
    ) -> tuple[Tensor, State]:  # fmt: skip
        if noise is None:
            noise = self.draw_noise(T, B, generator=generator)
        check_shape("noise", noise, (T, B, self.config.noise_size))
        if state is None:
            return noise, self.initial(B)
        check_shape("state.deter", state.deter, (B, self.config.deter))
        check_shape("state.stoch", state.stoch, (B, self.config.stoch))
        return noise, state

    def _action_noise(
        self, T: int, B: int, noise: Tensor | None, generator: torch.Generator | None
    ) -> Tensor:
        if noise is None:
            like = self._like()
            return torch.randn(
                T, B, self.action_size, generator=generator, device=like.device, dtype=like.dtype
            )
        check_shape("action_noise", noise, (T, B, self.action_size))
        return noise


def _check_first(is_first: Tensor | None, T: int, B: int) -> Tensor | None:
    if is_first is not None:
        check_shape("is_first", is_first, (T, B))
        if is_first.dtype != torch.bool:
            raise TypeError(f"is_first has dtype {is_first.dtype}, expected torch.bool")
    return is_first


def _joint(config: RSSMConfig, in_size: int, out_size: int, depth: int) -> MLP:
    return MLP(
        in_size, out_size, width=config.hidden, depth=depth,
        norm="rms" if config.cell == "block_gru" else "layer", activation="swish",
    )  # fmt: skip
