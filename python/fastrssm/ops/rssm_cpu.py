"""The scans on the CPU: packed weights and calls of the native kernel."""

import threading
from collections.abc import Sequence

import torch
from torch import Tensor

from fastrssm.ops.rssm_plan import PARTS, TensorTable

# inputs that have a gradient
_LEARNT = (0, 1, 5, 6, 7)
# numbers that describe a scan; the parts of the layers follow
_SIZES = 14
_PACKS: TensorTable["_Pack"] = TensorTable(8)
_PACKING = threading.Lock()


def forward(
    inputs: Sequence[Tensor | None],
    weights: Sequence[Tensor],
    structure: Sequence[int],
    constants: Sequence[float],
    precision: str,
    results: Sequence[Tensor],
) -> None:
    """Fill the results of a scan; arguments as in the op `rssm_scan`."""
    from fastrssm import _native

    layout = _layout(inputs, structure)
    addresses = _spread(structure, weights)
    pack = _packed(weights, layout, addresses, precision, transposed=False)
    _native.rssm_scan_forward(
        torch.get_num_threads(), str(results[0].dtype), precision, layout, list(constants),
        [_address(x) for x in inputs], addresses, pack.data_ptr(), [x.data_ptr() for x in results],
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

    layout = _layout(inputs, structure)
    addresses = _spread(structure, weights)
    pack = _packed(weights, layout, addresses, precision, transposed=True)
    _native.rssm_scan_backward(
        torch.get_num_threads(), str(results[0].dtype), precision, layout, list(constants),
        [_address(x) for x in inputs], addresses, pack.data_ptr(), [x.data_ptr() for x in results],
        [_address(x) for x in grads], [_address(input_grads[i]) for i in _LEARNT],
        _spread(structure, weight_grads),
    )  # fmt: skip


def kept_width(structure: Sequence[int]) -> int:
    """Return how many numbers the forward scan keeps for each step and sequence."""
    from fastrssm import _native

    return _native.rssm_scan_saved_numel([1, 1, *structure[:_SIZES]])


def _layout(inputs: Sequence[Tensor | None], structure: Sequence[int]) -> list[int]:
    noise = inputs[2]
    assert noise is not None
    return [*noise.shape[:2], *structure[:_SIZES]]


def _address(x: Tensor | None) -> int:
    # that of an empty tensor is 0 too
    return 0 if x is None else x.data_ptr()


def _spread(structure: Sequence[int], present: Sequence[Tensor | None]) -> list[int]:
    """Four addresses per layer, 0 where it lacks a part."""
    found = iter(present)
    return [
        _address(next(found)) if parts >> i & 1 else 0
        for parts in structure[_SIZES:]
        for i in range(len(PARTS))
    ]


class _Pack:
    """Weights in the form of a kernel, and the addresses and versions of those in it."""

    def __init__(self, size: int) -> None:
        self.buffer = torch.empty(size, dtype=torch.uint8)
        self.state: object = None


def _packed(
    weights: Sequence[Tensor], layout: list[int], addresses: list[int], precision: str,
    transposed: bool,
) -> Tensor:  # fmt: skip
    """Return the weights packed for the CPU, from the table unless they have changed.

    A change through `.data` shows in neither address nor version, so it is not seen.
    """
    from fastrssm import _native

    threads, dtype = torch.get_num_threads(), str(weights[0].dtype)
    # packs are the same for all T and B
    key = *map(id, weights), *layout[2:], precision, transposed
    # tensors of inference mode have no version: packed at every call
    inference = any(x.is_inference() for x in weights)
    state = None if inference else (addresses, [x._version for x in weights])
    with _PACKING:
        pack = _PACKS.get(key)
        if pack is None:
            pack = _Pack(_native.rssm_scan_packed_bytes(dtype, precision, layout, transposed))
            _PACKS.put(key, weights, pack)
        if state is None or pack.state != state:
            pack.state = None
            _native.rssm_scan_pack(
                threads, dtype, precision, layout, addresses, transposed, pack.buffer.data_ptr()
            )
            pack.state = state
        return pack.buffer
