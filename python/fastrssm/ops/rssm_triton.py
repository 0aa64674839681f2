"""The scans in Triton: packed weights, memory, launches, and the gradients of weights."""

import functools
import threading
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from fastrssm.ops.rssm_plan import PARTS, SIZES, TensorTable

if TYPE_CHECKING:
    from fastrssm.kernels.rssm_layout import Array, Layout, Net
    from fastrssm.kernels.rssm_scan import Packed, Scan

_PACKING = threading.Lock()
Layers = list[list[Tensor | None]]


class _Packs:
    """The weights of a scan as its kernels read them, kept while the weights stay as they are.

    As on the CPU, weights that are learnt are packed at every call with gradient.
    """

    def __init__(self, weights: Sequence[Tensor]) -> None:
        # so that nothing else gets these addresses while they tell whose packs these are
        self._storages = [x.untyped_storage() for x in weights]
        self._forms: dict[object, tuple[Packed, list[int]]] = {}

    def get(self, scan: "Scan", weights: Sequence[Tensor], layers: Layers) -> "Packed":
        from fastrssm.kernels import rssm_scan as kernel

        versions = [x._version for x in weights]
        form = scan.packing, scan.dtype, scan.hoisted
        with _PACKING:
            packed, of = self._forms.get(form, (None, None))
            if packed is None or of != versions:
                packed = kernel.pack(scan, layers)
                self._forms[form] = packed, versions
        return packed


_PACKS: TensorTable[_Packs] = TensorTable(8)


def _packed(
    scan: "Scan", weights: Sequence[Tensor], structure: Sequence[int], *, learning: bool
) -> "Packed":
    from fastrssm.kernels import rssm_scan as kernel

    layers = _spread(structure, weights)
    # a graph owns the memory that it captures; tensors of inference mode have no version
    captured = weights[0].is_cuda and torch.cuda.is_current_stream_capturing()
    if learning or captured or any(x.is_inference() for x in weights):
        return kernel.pack(scan, layers)
    key = *map(id, weights), *(x.data_ptr() for x in weights), *structure
    packs = _PACKS.get(key)
    if packs is None:
        packs = _Packs(weights)
        _PACKS.put(key, weights, packs)
    return packs.get(scan, weights, layers)


@functools.cache
def kept_width(structure: tuple[int, ...], precision: str) -> int:
    """Return how many float32 numbers the forward scan keeps for each step and sequence."""
    from fastrssm.kernels import rssm_scan as kernel

    scan = kernel.make_scan(structure, precision, 1, forward=True)
    operands, reals = kernel.widths(scan)
    return operands * scan.dtype.itemsize // 4 + reals


def _kept(scan: "Scan", memory: Tensor, rows: int) -> tuple[Tensor, Tensor]:
    """Split memory into operands and float32 values."""
    from fastrssm.kernels import rssm_scan as kernel

    operands, _ = kernel.widths(scan)
    end = rows * operands * scan.dtype.itemsize // 4
    return memory[:end].view(scan.dtype), memory[end:]


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
    from fastrssm.kernels import rssm_scan as kernel

    T, B, _ = results[0].shape
    scan = kernel.make_scan(structure, precision, B, forward=True)
    learning = keep and any(x.requires_grad for x in weights)
    packed = _packed(scan, weights, structure, learning=learning)
    *results, memory = results
    rows = T * B if keep else B
    if not keep:
        numel = rows * kept_width(tuple(structure), precision)
        memory = torch.empty(numel, device=memory.device)
    with torch.cuda.device_of(memory):
        kept = _kept(scan, memory, rows)
        kernel.forward(scan, packed, inputs, results, *kept, constants, keep=keep)


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
    from fastrssm.kernels import rssm_scan as kernel

    T, B, D = results[0].shape
    scan = kernel.make_scan(structure, precision, B, forward=False)
    layout = scan.layout
    learning = any(x is not None for x in weight_grads)
    packed = _packed(scan, weights, structure, learning=learning)
    *results, memory = results
    deter = results[0]
    # what a projection outside the loop wants is the gradient of a first layer's pre-activations
    learn = learning or input_grads[0] is not None or input_grads[7] is not None
    numel = (T * B if learn else B) * layout.gradients
    gradients = torch.empty(numel, dtype=scan.dtype, device=deter.device)
    state_grads = [
        torch.empty(B, size, device=deter.device) if given is None else given
        for given, size in zip(input_grads[5:7], (D, layout.S), strict=True)
    ]
    with torch.cuda.device_of(deter):
        operands, reals = _kept(scan, memory, T * B)
        kernel.backward(
            scan, packed, grads, inputs, results, operands, reals, gradients, state_grads,
            input_grads[1], constants[1], learn=learn,
        )  # fmt: skip
        sums = _Sums(T * B, operands, gradients)
        if input_grads[0] is not None:
            input_grads[0].copy_(sums.rows(gradients, layout.head.d[0]).view_as(input_grads[0]))
        if input_grads[7] is not None:
            assert layout.policy is not None
            input_grads[7].copy_(sums.rows(gradients, layout.policy.d[0]).view_as(input_grads[7]))
        if learning:
            _weight_gradients(sums, scan, structure, deter, _spread(structure, weight_grads))


class _Sums:
    """Sums over all steps and sequences, each into a gradient unless that is None."""

    def __init__(self, count: int, operands: Tensor, gradients: Tensor) -> None:
        self.count, self.operands, self.gradients = count, operands, gradients

    def rows(self, buffer: Tensor, array: "Array") -> Tensor:
        """Return an array of a buffer, [T * B, width]."""
        at = array.at * self.count + array.column
        return buffer.as_strided((self.count, array.width), (array.ld, 1), at)

    def outer(self, to: Tensor | None, d: Tensor, x: Tensor) -> None:
        """Fill [out, in] with sums of products of d [T * B, out] and x [T * B, in]."""
        if to is None:
            return
        if d.is_cuda and d.dtype != torch.float32:
            torch.mm(d.mT, x, out_dtype=torch.float32, out=to)
        else:
            # not float32 here: only the interpreter
            torch.mm(d.mT.float(), x.float(), out=to)

    def blocks(self, to: Tensor | None, d: Tensor, x: Tensor) -> None:
        """Fill [blocks, out, in] with the same sums of the blocks of d and x."""
        if to is None:
            return
        d, x = (y.unflatten(1, (len(to), -1)).transpose(0, 1) for y in (d, x))
        if d.is_cuda and d.dtype != torch.float32:
            to.copy_(torch.bmm(d.mT, x, out_dtype=torch.float32))
        else:
            to.copy_(torch.bmm(d.mT.float(), x.float()))

    def vectors(self, layer: list[Tensor | None], d: Tensor, affine: Any, hat: Any) -> None:
        """Fill the gradients of a bias and, from the arrays `affine` and `hat`, of a norm."""
        _, bias, scale, shift = layer
        if bias is not None:
            bias.view(-1).copy_(d.sum(0, dtype=torch.float32))
        if scale is None and shift is None:
            return
        a = self.rows(self.gradients, affine).float()
        if scale is not None:
            scale.view(-1).copy_((a * self.rows(self.operands, hat)).sum(0))
        if shift is not None:
            shift.copy_(a.sum(0))


def _weight_gradients(
    sums: _Sums, scan: "Scan", structure: Sequence[int], deter: Tensor, layers: Layers
) -> None:
    L = scan.layout
    D, pre_width = L.D, structure[7]
    cell_in, deter_in = (sums.rows(sums.operands, x) for x in (L.cell_in, L.deter_in))
    x, place = cell_in, 0
    if pre_width:
        d = sums.rows(sums.gradients, L.d_pre)
        sums.outer(layers[0][0], d, x)
        sums.vectors(layers[0], d, L.d_pre_affine, L.pre_hat)
        x, place = sums.rows(sums.operands, L.pre_y), 1
    d = sums.rows(sums.gradients, L.d_gates)
    cell = layers[place]
    if L.blocks is not None:
        _block_gradients(sums, L, cell, layers[1 + len(L.head.d) :])
    elif L.cell == 0:
        # gates lie in the order xn, r, z, hn
        for part, rows in ((d[:, D : 3 * D], slice(2 * D)), (d[:, :D], slice(2 * D, None))):
            weight, bias, _, _ = (None if y is None else y[rows] for y in cell)
            sums.outer(weight, part, x)
            sums.vectors([None, bias, None, None], part, None, None)
        place += 1
        sums.outer(layers[place][0], d[:, D:], deter_in)
        sums.vectors(layers[place], d[:, D:], None, None)
    else:
        weight = cell[0]
        sums.outer(None if weight is None else weight[:, : L.IN], d, x)
        sums.outer(None if weight is None else weight[:, L.IN :], d, deter_in)
        sums.vectors(cell, d, L.d_gates_affine, L.gates)
    place += 1
    narrow = scan.dtype != torch.float32
    x = sums.rows(sums.operands, L.deter_out) if narrow else deter.flatten(0, 1)
    sums.outer(layers[place][0], sums.rows(sums.gradients, L.head.d[0]), x)
    _network_gradients(sums, L.head, layers[place:])
    if L.policy is None:
        return
    place += len(L.head.d) + (0 if L.blocks is None else 4)
    whole = L.deter_in._replace(width=D + L.S)
    d = sums.rows(sums.gradients, L.policy.d[0])
    sums.outer(layers[place][0], d, sums.rows(sums.operands, whole))
    _network_gradients(sums, L.policy, layers[place:])


def _block_gradients(sums: _Sums, L: "Layout", gates: list[Tensor | None], layers: Layers) -> None:
    """All gradients of block_gru: of its gates, of three layers, and of the one that mixes them."""
    blocks = L.blocks
    assert blocks is not None
    shared, mixing = layers[:3], layers[3]
    d = sums.rows(sums.gradients, L.d_gates)
    sums.blocks(gates[0], d, sums.rows(sums.operands, L.pre_y))
    sums.vectors(gates, d, None, None)
    d = sums.rows(sums.gradients, L.d_pre)
    sums.vectors(mixing, d, L.d_pre_affine, L.pre_hat)
    weight, own, M = mixing[0], blocks.own, blocks.width
    if weight is not None:
        sums.blocks(weight[:, :, :own], d, sums.rows(sums.operands, L.deter_in))
        of_shared = weight.new_empty(L.D, 3 * M)
        sums.outer(of_shared, d, sums.rows(sums.operands, blocks.y))
        weight[:, :, own:].copy_(of_shared.view(blocks.count, own, 3 * M))
    action = L.cell_in._replace(width=L.A, column=L.cell_in.column + L.S)
    for i, x in enumerate((L.deter_in, L.cell_in._replace(width=L.S), action)):
        d, affine, hat = (
            array._replace(width=M, column=i * M) for array in (blocks.d, blocks.affine, blocks.hat)
        )
        d = sums.rows(sums.gradients, d)
        sums.outer(shared[i][0], d, sums.rows(sums.operands, x))
        sums.vectors(shared[i], d, affine, hat)


def _network_gradients(sums: _Sums, net: "Net", layers: Layers) -> None:
    """All gradients of a network but the weight of its first layer."""
    for i, array in enumerate(net.d):
        d = sums.rows(sums.gradients, array)
        normed = bool(net.affine) and i < len(net.affine)
        norm = (net.affine[i], net.hat[i]) if normed else (None, None)
        sums.vectors(layers[i], d, *norm)
        weight = layers[i][0]
        if i == 0 or weight is None:
            continue
        x = sums.rows(sums.operands, net.y[i - 1])
        if not net.split:
            sums.outer(weight, d, x)
            continue
        for to, part, y in zip(weight, d.chunk(2, 1), x.chunk(2, 1), strict=True):
            sums.outer(to, part, y)


def _spread(structure: Sequence[int], tensors: Sequence[Tensor | None]) -> Layers:
    """Four tensors a layer, None where it lacks a part."""
    found = iter(tensors)
    return [
        [next(found) if parts >> i & 1 else None for i in range(len(PARTS))]
        for parts in structure[SIZES:]
    ]
