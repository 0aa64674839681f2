"""One step of an optimiser: by which rule, how long, and how the gradient is clipped before."""

import itertools
from collections.abc import Callable, Iterable
from typing import Any, Literal, get_args

import torch
from torch import Tensor
from torch.nn import Parameter

Rule = Literal["adam", "muon"]
# matrices with fewer rows or columns, as those of the last layers, are left to Adam
_NARROW = 32


def check_rule(rule: Rule) -> None:
    """Refuse an optimiser that is not there.

    Raises:
        ValueError: it has another name.
        RuntimeError: this version of PyTorch has no Muon.
    """
    if rule not in get_args(Rule):
        raise ValueError(f"--optimizer is {rule!r}, expected one of {', '.join(get_args(Rule))}")
    if rule == "muon" and not hasattr(torch.optim, "Muon"):
        raise RuntimeError(f"PyTorch {torch.__version__} has no Muon, expected 2.9 or newer")


def build_optimizer(
    rule: Rule, parameters: Iterable[Parameter], lr: float, weight_decay: float = 0.0
) -> torch.optim.Optimizer:
    """Build what takes the steps of a network.

    Args:
        rule: "adam", or "muon" for matrices and Adam for the rest.
        parameters: of the network.
        lr: learning rate; the same numbers suit both.
        weight_decay: share by which a step of rate 1 would shrink the parameters, apart from the
            gradient.

    Raises:
        ValueError: the rule has another name.
        RuntimeError: this version of PyTorch has no Muon.
    """
    check_rule(rule)
    if rule == "muon":
        return Muon(parameters, lr, weight_decay)
    return torch.optim.AdamW(parameters, lr, weight_decay=weight_decay, fused=True)


class Muon(torch.optim.Optimizer):
    """Muon for matrices, whose momentum is made orthogonal before it is a step; Adam for the rest.

    Steps are scaled as long as Adam's, so both share a learning rate and a weight decay.

    Source:
        Jordan et al. 2024, kellerjordan.github.io/posts/muon; scale and weight decay of Liu et al.
        2025 (2502.16982), section 2.2.
    """

    def __init__(
        self, parameters: Iterable[Parameter], lr: float, weight_decay: float = 0.0
    ) -> None:
        """Divide the parameters between PyTorch's own two."""
        both: tuple[list[Parameter], list[Parameter]] = [], []
        for parameter in parameters:
            wide = parameter.ndim == 2 and min(parameter.shape) >= _NARROW
            both[not wide].append(parameter)
        matrices, rest = both
        self._parts: list[torch.optim.Optimizer] = []
        if matrices:
            scale = "match_rms_adamw"
            self._parts.append(
                torch.optim.Muon(matrices, lr, weight_decay=weight_decay, adjust_lr_fn=scale)
            )
        if rest:
            self._parts.append(torch.optim.AdamW(rest, lr, weight_decay=weight_decay, fused=True))
        super().__init__([{"params": group} for group in both if group], {"lr": lr})

    def step(self, closure: Callable[[], float] | None = None) -> None:  # pyright: ignore[reportIncompatibleMethodOverride]
        """Take a step of each with the learning rate of its group."""
        assert closure is None
        for group, part in zip(self.param_groups, self._parts, strict=True):
            part.param_groups[0]["lr"] = group["lr"]
            part.step()

    def state_dict(self) -> dict[str, Any]:
        """Return the states of both."""
        return {"parts": [part.state_dict() for part in self._parts]}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take the states of both."""
        for part, state in zip(self._parts, state_dict["parts"], strict=True):
            part.load_state_dict(state)


def set_learning_rate(
    optimizer: torch.optim.Optimizer, lr: float, *, decay: float, step: int, updates: int
) -> None:
    """Set the rate of update `step` of `updates`: lr, at the end falling linearly to 0.

    Args:
        optimizer: changed in place.
        lr: the rate before it falls.
        decay: share of the updates over which it falls; 0: never.
        step: counted from 1.
        updates: in all.
    """
    left = (updates - step + 1) / updates
    for group in optimizer.param_groups:
        group["lr"] = lr * min(1.0, left / decay) if decay else lr


def take_step(
    optimizer: torch.optim.Optimizer,
    loss: Tensor,
    grad_clip: float,
    apart: Iterable[Parameter] = (),
) -> Tensor:
    """Take one step down the gradient of a loss.

    Args:
        optimizer: of all parameters that learn.
        loss: scalar.
        grad_clip: largest norm of the gradient.
        apart: those of the parameters whose gradient is clipped by itself, as it says nothing about
            the others.

    Returns:
        The norm of the gradient of the others before clipping.
    """
    apart = list(apart)
    left_out = {id(parameter) for parameter in apart}
    all_of_them = itertools.chain(*(group["params"] for group in optimizer.param_groups))
    rest = [parameter for parameter in all_of_them if id(parameter) not in left_out]
    optimizer.zero_grad(set_to_none=True)
    loss.backward()
    norm = torch.nn.utils.clip_grad_norm_(rest, grad_clip)
    if apart:
        torch.nn.utils.clip_grad_norm_(apart, grad_clip)
    optimizer.step()
    return norm
