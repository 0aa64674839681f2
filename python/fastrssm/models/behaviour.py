"""Learning behaviour in imagination: rollouts of a policy, and the losses of actor and critic."""

from collections.abc import Callable, Generator
from contextlib import contextmanager
from typing import NamedTuple

import torch
from torch import Tensor, nn

from fastrssm import ops
from fastrssm.models.distributions import TanhNormal
from fastrssm.models.nets import MLP
from fastrssm.models.policy import TanhGaussianPolicy
from fastrssm.models.rssm import RSSM, State

# standard deviation, below the tanh, of the nearly uniform policy that the penalty pulls towards
_BROAD_STD = 0.88


class Imagined(NamedTuple):
    """What a policy does in imagination."""

    feature: Tensor  # [H + 1, N, F] states, the one in which it starts first
    action: Tensor  # [H, N, A] action that leads from each state to the next


# the reward [H, N] of every state but the first
Reward = Callable[[Imagined], Tensor]


@contextmanager
def frozen(*modules: nn.Module) -> Generator[None]:
    """Build graphs in which these modules are constants: gradients flow through, not into them."""
    parameters = [p for module in modules for p in module.parameters() if p.requires_grad]
    for parameter in parameters:
        parameter.requires_grad_(False)
    try:
        yield
    finally:
        for parameter in parameters:
            parameter.requires_grad_(True)


def build_value(feature_size: int) -> MLP:
    """Build the network of the value, [..., F] -> [..., 1]."""
    return MLP(feature_size, 1, width=128, depth=2)


def choose_starts(state: State, count: int, generator: torch.Generator) -> State:
    """Choose states in which imagination starts, at random and without repetition.

    Args:
        state: [T, B, D], [T, B, S].
        count: N, how many; 0: all.
        generator: of the choice.

    Returns:
        [N, D], [N, S], detached.
    """
    deter, stoch = (part.detach().flatten(0, 1) for part in state)
    if 0 < count < len(deter):
        order = torch.randperm(len(deter), generator=generator, device=deter.device)[:count]
        deter, stoch = deter[order], stoch[order]
    return State(deter, stoch)


def imagine(
    rssm: RSSM,
    policy: TanhGaussianPolicy,
    start: State,
    horizon: int,
    generator: torch.Generator,
) -> Imagined:
    """Act with a policy in imagination; no gradient runs through what the policy sees."""
    steps = rssm.imagine_with_policy(
        policy, start, horizon, generator=generator, detach_policy_input=True
    )
    first = start.feature.unsqueeze(0)
    feature = torch.cat((first, State(steps.deter, steps.stoch).feature))
    return Imagined(feature, steps.action)


def behaviour_losses(
    imagined: Imagined,
    rewards: Tensor,
    policy: TanhGaussianPolicy,
    value: MLP,
    *,
    gamma: float,
    lambda_: float,
    entropy_scale: float,
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Compute the losses of actor and critic from what was imagined.

    The states x_1 ... x_H after the start count; the last one only bootstraps. V estimates
    (1 - gamma) times the return.

    Args:
        imagined: with gradient to the policy through the dynamics.
        rewards: [H, N] of x_1 ... x_H, with the same gradient; H at least 2.
        policy: pi, for the penalty of its KL to a broad policy.
        value: V; the actor's gradient flows through, not into it.
        gamma: discount.
        lambda_: mixing weight of the returns.
        entropy_scale: weight of the penalty.

    Returns:
        Losses "actor" and "value", and detached metrics.

    Raises:
        ValueError: rewards are not [H, N] with H at least 2.

    Source:
        Eq. 6 to 8 of Dreamer (1912.01603) with AIME's weighting (OpenReview WjlCQxpuxU).
    """
    feature = imagined.feature
    shape = tuple(feature.shape[:2])
    if tuple(rewards.shape) != (shape[0] - 1, shape[1]) or shape[0] < 3:
        raise ValueError(
            f"rewards has shape {list(rewards.shape)}, expected {[shape[0] - 1, shape[1]]} "
            "with at least 2 steps"
        )
    with frozen(value):
        values = value(feature[1:]).squeeze(-1) / (1.0 - gamma)
    returns = ops.lambda_return(rewards[:-1], values[1:], gamma, lambda_=lambda_)
    steps = torch.arange(1, len(returns) + 1, device=feature.device, dtype=feature.dtype)
    weight = (gamma**steps).unsqueeze(-1)
    acting = policy(feature[:-1].detach())
    broad = TanhNormal(
        torch.zeros_like(acting.mean), torch.full_like(acting.std, _BROAD_STD)
    )  # fmt: skip
    penalty = acting.kl(broad).mean()
    predicted = value(feature[1:-1].detach()).squeeze(-1)
    target = (1.0 - gamma) * returns.detach()
    losses = {
        "actor": entropy_scale * penalty - (weight * returns).mean(),
        "value": 0.5 * (predicted - target).square().mean(),
    }
    metrics = {
        "imagined_reward": rewards.mean(),
        "imagined_return": returns.mean(),
        "imagined_value": values.mean(),
        "policy_kl": penalty,
        "policy_std": acting.std.mean(),
        "actor_loss": losses["actor"],
        "value_loss": losses["value"],
    }
    return losses, {name: metric.detach() for name, metric in metrics.items()}
