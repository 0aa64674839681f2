"""The scans on the CPU: packed weights and calls of the native kernel."""

import functools
import threading
from collections.abc import Sequence

import torch
from torch import Tensor

from fastrssm.ops.rssm_plan import PARTS, SIZES, TensorTable

# inputs that have a gradient
_LEARNT = (0, 1, 5, 6, 7)
_PACKING = threading.Lock()


class Packs:
    """The weights of a scan in the forms of the kernel, kept while the weights stay as they are.

    A change through `.data` shows in no version. Such changes belong to training, so weights that
    are learnt are packed at every call with gradient; calls without then find the new ones.
    """

    def __init__(self, weights: Sequence[Tensor], structure: Sequence[int]) -> None:
        """Keep the addresses of the weights, four a layer, not the weights."""
        self.addresses = _spread(structure, [x.data_ptr() for x in weights])
        # so that nothing else gets these addresses while they tell whose packs these are
        self._storages = [x.untyped_storage() for x in weights]
        self._forms: dict[tuple[str, bool], tuple[Tensor, list[int] | None]] = {}

    def address(
        self,
        weights: Sequence[Tensor],
        layout: list[int],
        precision: str,
        *,
        transposed: bool,
        learning: bool,
    ) -> int:
        """Return the address of one form, up to date."""
        try:
            versions = [x._version for x in weights]
        except RuntimeError:
            # tensors of inference mode have none: packed at every call
            versions = None
        form = precision, transposed
        with _PACKING:
            buffer, packed = self._forms.get(form, (None, None))
            if buffer is None or learning or packed != versions or versions is None:
                buffer = self._pack(buffer, weights[0].dtype, layout, form)
                self._forms[form] = buffer, versions
        return buffer.data_ptr()

    def _pack(
        self, buffer: Tensor | None, dtype: torch.dtype, layout: list[int], form: tuple[str, bool]
    ) -> Tensor:
        from fastrssm import _native

        precision, transposed = form
        if buffer is None:
            # as many for all T and B
            size = _native.rssm_scan_packed_bytes(str(dtype), precision, layout, transposed)
            buffer = torch.empty(size, dtype=torch.uint8)
        # while it is written it holds nothing, whatever happens
        self._forms[form] = buffer, None
        _native.rssm_scan_pack(
            torch.get_num_threads(), str(dtype), precision, layout, self.addresses, transposed,
            buffer.data_ptr(),
        )  # fmt: skip
        return buffer


_PACKS: TensorTable[Packs] = TensorTable(8)


class Weights(list[Tensor]):
    """All parts of all layers, with their packs: what `packs_of` would find."""

    def __init__(self, tensors: Sequence[Tensor], packs: Packs) -> None:
        """Join them."""
        super().__init__(tensors)
        self.packs = packs


def packs_of(weights: Sequence[Tensor], structure: Sequence[int]) -> Packs:
    """Return the packs of these tensors: the same ones while they live and stay where they are."""
    if isinstance(weights, Weights):
        return weights.packs
    key = *map(id, weights), *(x.data_ptr() for x in weights), *structure
    packs = _PACKS.get(key)
    if packs is None:
        packs = Packs(weights, structure)
        _PACKS.put(key, weights, packs)
    return packs


def forward(
    inputs: Sequence[Tensor | None],
    weights: Sequence[Tensor],
    structure: Sequence[int],
    constants: Sequence[float],
    precision: str,
    results: Sequence[Tensor],
    keep: bool,
) -> None:
    """Fill the results of a scan; arguments as in the op `rssm_scan`."""
    from fastrssm import _native

    layout, packs = _layout(inputs, structure), packs_of(weights, structure)
    learning = keep and any(x.requires_grad for x in weights)
    pack = packs.address(weights, layout, precision, transposed=False, learning=learning)
    _native.rssm_scan_forward(
        torch.get_num_threads(), str(results[0].dtype), precision, layout, constants,
        [0 if x is None else x.data_ptr() for x in inputs],
        packs.addresses, pack, [x.data_ptr() for x in results],
    )  # fmt: skip


def backward(
    grads: Sequence[Tensor | None],
    inputs: Sequence[Tensor | None],
    weights: Sequence[Tensor],
    structure: Sequence[int],
    constants: Sequence[float],
    precision: str,
    results: Sequence[Tensor],
    input_grads: Sequence[Tensor | None],
    weight_grads: Sequence[Tensor | None],
) -> None:
    """Fill the gradients of inputs and weights; None: not wanted."""
    from fastrssm import _native

    def addresses(tensors: Sequence[Tensor | None]) -> list[int]:
        return [0 if x is None else x.data_ptr() for x in tensors]

    layout, packs = _layout(inputs, structure), packs_of(weights, structure)
    learning = any(x is not None for x in weight_grads)
    pack = packs.address(weights, layout, precision, transposed=True, learning=learning)
    _native.rssm_scan_backward(
        torch.get_num_threads(), str(results[0].dtype), precision, layout, constants,
        addresses(inputs), packs.addresses, pack,
        addresses(results), addresses(grads), addresses([input_grads[i] for i in _LEARNT]),
        _spread(structure, addresses(weight_grads)),
    )  # fmt: skip


@functools.cache
def kept_width(structure: tuple[int, ...]) -> int:
    """Return how many numbers the forward scan keeps for each step and sequence."""
    from fastrssm import _native

    return _native.rssm_scan_saved_numel([1, 1, *structure[:SIZES]])


def _layout(inputs: Sequence[Tensor | None], structure: Sequence[int]) -> list[int]:
    noise = inputs[2]
    assert noise is not None
    return [*noise.shape[:2], *structure[:SIZES]]


def _spread(structure: Sequence[int], addresses: Sequence[int]) -> list[int]:
    """Four addresses a layer, 0 where it lacks a part."""
    found = iter(addresses)
    return [
        next(found) if parts >> i & 1 else 0
        for parts in structure[SIZES:]
        for i in range(len(PARTS))
    ]
