"""What acts on the CPU without gradient: one step of an RSSM, and the network of a policy.

The same weights meet a few new rows again and again, so all that stays is found once.
"""

import math
from typing import TYPE_CHECKING, TypeGuard

import torch
from torch import Tensor
from torch.nn import Parameter

from fastrssm._dispatch import backends, preferred
from fastrssm._library import precision_of_products
from fastrssm.ops.rssm_cpu import packs_of
from fastrssm.ops.rssm_plan import SIZES, Plan, flatten, make_plan
from fastrssm.reference.gru_cell import Cell
from fastrssm.reference.rssm_weights import Heads, Latent, Layer, RSSMWeights

if TYPE_CHECKING:
    from fastrssm._native import PackedNet, RssmStep


class Step:
    """One step of an RSSM in float32, without gradient, with weights that stay as they are.

    The numbers are those of `rssm_observe`; the embedding is projected here, by the same products.
    """

    def __init__(
        self,
        weights: RSSMWeights,
        outside: Layer,
        plan: Plan,
        constants: tuple[float, float, float],
    ) -> None:
        """Take what `prepare_step` has checked."""
        self._weights = [x for x in flatten(weights, None) if x is not None]
        self._outside, self._plan, self._constants = outside, plan, constants
        self._packs = packs_of(self._weights, plan.structure)
        _, A, noise, _, _, D, S, _ = plan.sizes
        self._sizes = outside.weight.shape[1], A, noise, D, S
        self._native: dict[str, RssmStep] = {}

    def __call__(
        self,
        embed: Tensor,
        action: Tensor,
        noise: Tensor | None,
        is_first: Tensor | None,
        deter: Tensor,
        stoch: Tensor,
    ) -> tuple[Tensor, Tensor] | None:
        """Return deter [B, D] and stoch [B, S] after the step.

        None where an argument is not as expected, or another backend was asked for: the op itself
        then finds an answer or the error.

        Args:
            embed: [B, E] encoded observation.
            action: [B, A] action that led to it.
            noise: [B, S] standard normal; categorical: [B, G] uniform in [0, 1).
            is_first: [B] bool, the state is zeroed before; None: never.
            deter: [B, D] state before.
            stoch: [B, S] the same.
        """
        if type(noise) is not Tensor or not noise.ndim:
            return None
        B = noise.shape[0]
        for x, size in zip((embed, action, noise, deter, stoch), self._sizes, strict=True):
            if not _is_dense(x, torch.float32) or x.shape != (B, size):
                return None
        if is_first is not None and (not _is_dense(is_first, torch.bool) or is_first.shape != (B,)):
            return None
        if not B or not _is_plain_call():
            return None
        precision = _precision()
        native = self._native.get(precision) or self._prepare(precision)
        next_deter, next_stoch = torch.empty_like(deter), torch.empty_like(stoch)
        native.run(
            torch.get_num_threads(), B, embed.data_ptr(), action.data_ptr(), noise.data_ptr(),
            0 if is_first is None else is_first.data_ptr(), deter.data_ptr(), stoch.data_ptr(),
            next_deter.data_ptr(), next_stoch.data_ptr(),
        )  # fmt: skip
        return next_deter, next_stoch

    def _prepare(self, precision: str) -> "RssmStep":
        from fastrssm import _native

        layout = [1, 1, *self._plan.structure[:SIZES]]
        pack = self._packs.address(
            self._weights, layout, precision, transposed=False, learning=False
        )
        weight, bias = self._outside.weight, self._outside.bias
        assert bias is not None
        native = self._native[precision] = _native.RssmStep(
            precision, layout, self._constants, self._packs.addresses, pack,
            weight.data_ptr(), weight.stride(0), weight.shape[1], bias.data_ptr(),
        )  # fmt: skip
        return native


def prepare_step(
    weights: RSSMWeights,
    outside: Layer,
    *,
    cell: Cell,
    heads: Heads,
    latent: Latent,
    min_std: float,
    groups: int,
    unimix: float,
) -> Step | None:
    """Prepare the step of these weights, or return None where the CPU cannot run it.

    Args:
        weights: as in `rssm_observe`, like all that follows.
        outside: projects the embedding.
        cell: variant.
        heads: variant.
        latent: variant.
        min_std: added to the standard deviation.
        groups: of a categorical latent.
        unimix: share of the uniform distribution in it.
    """
    plan = make_plan(weights, None, cell, heads, latent, groups, True, False, False)
    able = plan.dense and "cpu" not in plan.refused and _is_built()
    able = able and _is_dense(outside.bias, torch.float32) and outside.weight.stride(1) == 1
    return Step(weights, outside, plan, (min_std, unimix, 0.0)) if able else None


class Net:
    """A network of ELU layers and an affine head in float32, with weights that stay."""

    def __init__(self, layers: list[tuple[Tensor, Tensor]]) -> None:
        """Take weights and biases that `prepare_net` has checked."""
        self._layers = layers
        self._in_size, self._out_size = layers[0][0].shape[1], len(layers[-1][0])
        self._native: dict[str, PackedNet] = {}

    def __call__(self, x: Tensor) -> Tensor | None:
        """Return [..., O] for x [..., I]; None as in `Step`."""
        if not _is_dense(x, torch.float32) or not x.ndim or x.shape[-1] != self._in_size:
            return None
        lead = x.shape[:-1]
        rows = math.prod(lead)
        if not rows or not _is_plain_call():
            return None
        precision = _precision()
        native = self._native.get(precision) or self._prepare(precision)
        y = torch.empty((*lead, self._out_size), dtype=torch.float32)
        native.run(torch.get_num_threads(), rows, x.data_ptr(), y.data_ptr())
        return y

    def _prepare(self, precision: str) -> "PackedNet":
        from fastrssm import _native

        weights, biases = ([x[i].data_ptr() for x in self._layers] for i in range(2))
        sizes = [len(weight) for weight, _ in self._layers]
        native = _native.PackedNet(precision, self._in_size, sizes, weights, biases)
        self._native[precision] = native
        return native


def prepare_net(layers: tuple[Layer, ...]) -> Net | None:
    """Prepare a network, or return None where the CPU cannot run it.

    Args:
        layers: hidden ones, then the head; each reads what the one before computes.
    """
    parts = [
        (weight, bias)
        for weight, bias, scale, _ in layers
        if scale is None and _is_dense(weight, torch.float32) and _is_dense(bias, torch.float32)
    ]
    return Net(parts) if len(parts) == len(layers) and _is_built() else None


def _is_built() -> bool:
    return backends()["rssm_observe"]["cpu"] is None


def _is_dense(x: Tensor | None, dtype: torch.dtype) -> TypeGuard[Tensor]:
    if type(x) is not Tensor and type(x) is not Parameter:
        return False
    return x.dtype is dtype and x.is_cpu and x.is_contiguous()


def _is_plain_call() -> bool:
    """Whether nothing looks on, and no other backend is asked for."""
    return (
        preferred() in (None, "cpu")
        and not torch._C._are_functorch_transforms_active()
        and torch._C._len_torch_dispatch_stack() == 0
    )


def _precision() -> str:
    return precision_of_products(torch.float32, mixed=torch.is_autocast_enabled("cpu"))
