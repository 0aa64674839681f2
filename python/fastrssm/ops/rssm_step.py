"""The step of acting: `rssm_observe` of one frame on the CPU, with all that stays found once."""

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from fastrssm._dispatch import preferred
from fastrssm._library import precision_of_products
from fastrssm.ops.rssm_cpu import packs_of
from fastrssm.ops.rssm_plan import SIZES, Plan, flatten, make_plan
from fastrssm.reference.gru_cell import Cell
from fastrssm.reference.rssm_weights import Heads, Latent, Layer, RSSMWeights

if TYPE_CHECKING:
    from fastrssm._native import RssmStep


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
        B = len(noise)
        for x, size in zip((embed, action, noise, deter, stoch), self._sizes, strict=True):
            if type(x) is not Tensor or x.shape != (B, size) or not _is_dense(x, torch.float32):
                return None
        if is_first is not None and (
            type(is_first) is not Tensor
            or is_first.shape != (B,)
            or not _is_dense(is_first, torch.bool)
        ):
            return None
        if B == 0 or _is_transformed() or preferred() not in (None, "cpu"):
            return None
        mixed = torch.is_autocast_enabled("cpu")
        precision = precision_of_products(torch.float32, mixed=mixed)
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
    bias = outside.bias
    able = plan.dense and bias is not None and bias.is_contiguous() and "cpu" not in plan.refused
    able = able and outside.weight.stride(1) == 1
    if plan.device.type != "cpu" or plan.dtype != torch.float32 or not able:
        return None
    return Step(weights, outside, plan, (min_std, unimix, 0.0))


def _is_dense(x: Tensor, dtype: torch.dtype) -> bool:
    return x.dtype is dtype and x.is_cpu and x.is_contiguous()


def _is_transformed() -> bool:
    return torch._C._are_functorch_transforms_active() or torch._C._len_torch_dispatch_stack() > 0
