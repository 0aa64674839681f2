"""What follows a backward scan on clusters: gradients of weights, products over all steps."""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from fastrssm.ops.rssm_plan import CELLS, PARTS, SIZES

Layers = list[list[Tensor | None]]
Optional = Sequence[Tensor | None]


class Arrays:
    """Arrays [T * B, width] one after the other, in the order of csrc/cuda.

    What was kept: rssm_builder.h; gradients: rssm_program_backward.cpp.
    """

    def __init__(self, memory: Tensor, rows: int, structure: Sequence[int]) -> None:
        self._memory, self._rows, self._used = memory, rows, 0
        self.D, self.S, self.A, *_ = structure
        self.norm_gates = CELLS[structure[4]].startswith("ln")
        self.split, self.gaussian = structure[5] == 0, structure[6] == 0
        self.pre_width, self.blocks, self.branch_width = structure[7], *structure[14:16]
        self.head_layers, self.head_width, self.policy_layers, self.policy_width = structure[8:12]
        self.head: list[Tensor] = []
        self.affine: list[Tensor] = []
        self.policy: list[Tensor] = []
        self.pre = self.pre_affine = self.gates = self.gates_affine = memory
        self.mix = self.mix_affine = self.branches = self.branches_affine = memory

    def _take(self, width: int) -> Tensor:
        begin = self._used * self._rows
        self._used += width
        return self._memory[begin : self._used * self._rows].view(self._rows, width)

    def take_kept(self) -> None:
        """Name what the forward scan kept: hidden layers, or what norms made of them."""
        if self.pre_width:
            self.pre = self._take(self.pre_width)
            self._take(1)
        if self.blocks:
            self.branches = self._take(3 * self.branch_width)
            self._take(3)
            self.mix = self._take(self.D)
            self._take(1)
        self.gates = self._take((3 if self.norm_gates else 4) * self.D)
        if self.norm_gates:
            self._take(1)
        for _ in range(self.head_layers - 1):
            self.head.append(self._take((1 + self.split) * self.head_width))
            if not self.split:
                self._take(1)
        if self.gaussian:
            self._take(self.S)
        self.policy = [self._take(2 * self.policy_width) for _ in range(self.policy_layers - 1)]

    def take_gradients(self) -> None:
        """Name the gradients of pre-activations, which the backward scan finds last layer first."""
        self.head = [self._take((1 + self.gaussian) * self.S)]
        for _ in range(self.head_layers - 1):
            self.head.insert(0, self._take((1 + self.split) * self.head_width))
            if not self.split:
                self.affine.insert(0, self._take(self.head_width))
        self.gates = self._take((3 if self.blocks or self.norm_gates else 4) * self.D)
        if self.norm_gates:
            self.gates_affine = self._take(3 * self.D)
        if self.blocks:
            self.mix, self.mix_affine = self._take(self.D), self._take(self.D)
            self.branches = self._take(3 * self.branch_width)
            self.branches_affine = self._take(3 * self.branch_width)
        if self.pre_width:
            self.pre, self.pre_affine = self._take(self.pre_width), self._take(self.pre_width)
        if self.policy_layers:
            self.policy = [self._take(2 * self.A)]
        for _ in range(self.policy_layers - 1):
            self.policy.insert(0, self._take(2 * self.policy_width))


def _outer(to: Tensor | None, d: Tensor, x: Tensor) -> None:
    """Fill [.., out, in] with sums of products of d [.., rows, out] and x [.., rows, in]."""
    if to is None:
        return
    d, x = d.bfloat16(), x.bfloat16()
    if d.is_cuda:
        product = torch.bmm if d.ndim == 3 else torch.mm
        to.copy_(product(d.mT, x, out_dtype=torch.float32))
    else:
        # only the emulation comes here
        to.copy_(d.mT.float() @ x.float())


def _vectors(
    layer: Sequence[Tensor | None], d: Tensor, affine: Tensor | None = None,
    hat: Tensor | None = None,
) -> None:  # fmt: skip
    """Fill the gradients of a bias and of a norm."""
    _, bias, scale, shift = layer
    if bias is not None:
        bias.view(-1).copy_(d.sum(0))
    if scale is not None and affine is not None and hat is not None:
        scale.view(-1).copy_((affine * hat).sum(0))
    if shift is not None and affine is not None:
        shift.copy_(affine.sum(0))


def _activated(hat: Tensor, layer: Sequence[Tensor | None]) -> Tensor:
    _, _, scale, shift = layer
    assert scale is not None
    y = hat * scale.view(-1)
    return F.silu(y if shift is None else y + shift)


def _cell_gradients(
    d: Arrays, kept: Arrays, h: Tensor, x: Tensor, layers: Layers, grads: Layers
) -> None:
    """Fill those of a cell without blocks, and of the layer before it."""
    D = d.D
    place = 0
    if d.pre_width:
        _outer(grads[0][0], d.pre, x)
        _vectors(grads[0], d.pre, d.pre_affine, kept.pre)
        x, place = _activated(kept.pre, layers[0]), 1
    if d.norm_gates:
        _outer(grads[place][0], d.gates, torch.cat((x, h), -1))
        _vectors(grads[place], d.gates, d.gates_affine, kept.gates)
        return
    cell, state = grads[place], grads[place + 1]
    _outer(cell[0], d.gates[:, : 3 * D], x)
    _vectors(cell, d.gates[:, : 3 * D])
    for part, gates in (
        (slice(2 * D), d.gates[:, : 2 * D]),
        (slice(2 * D, None), d.gates[:, 3 * D :]),
    ):
        weight, bias = (None if y is None else y[part] for y in state[:2])
        _outer(weight, gates, h)
        _vectors([None, bias, None, None], gates)


def _gradients_in_blocks(
    d: Arrays, kept: Arrays, inputs: tuple[Tensor, Tensor, Tensor], layers: Layers, grads: Layers
) -> None:
    """Fill those of block_gru; `inputs`: deter, stoch and action before the step."""
    blocks, own, width = d.blocks, d.D // d.blocks, d.branch_width
    begin = 1 + d.head_layers
    branches, of_branches = layers[begin : begin + 4], grads[begin : begin + 4]
    h, s, a = inputs
    # [rows, 3D] has the gates one after the other, the layer has them inside each block
    gates = d.gates.unflatten(-1, (3, blocks, own)).permute(2, 0, 1, 3).flatten(-2)
    y = _in_blocks(_activated(kept.mix, branches[3]), blocks)
    _outer(grads[0][0], gates, y)
    if grads[0][1] is not None:
        grads[0][1].copy_(gates.sum(1))
    mix = of_branches[3][0]
    _vectors(of_branches[3], d.mix, d.mix_affine, kept.mix)
    hats, ds, affines = (x.split(width, -1) for x in (kept.branches, d.branches, d.branches_affine))
    if mix is not None:
        x = [_activated(hat, layer) for hat, layer in zip(hats, branches, strict=False)]
        _outer(mix[..., :own], _in_blocks(d.mix, blocks), _in_blocks(h, blocks))
        shared = mix.new_empty(d.D, 3 * width)
        _outer(shared, d.mix, torch.cat(x, -1))
        mix[..., own:].copy_(shared.view(blocks, own, -1))
    for i, x in enumerate((h, s, a / a.abs().clamp_min(1.0))):
        _outer(of_branches[i][0], ds[i], x)
        _vectors(of_branches[i], ds[i], affines[i], hats[i])


def _in_blocks(x: Tensor, blocks: int) -> Tensor:
    """[rows, D] -> [blocks, rows, D / blocks]."""
    return x.unflatten(-1, (blocks, -1)).transpose(0, 1)


def weight_gradients(
    d: Arrays, kept: Arrays, inputs: Optional, results: Sequence[Tensor], layers: Layers,
    grads: Layers,
) -> None:  # fmt: skip
    """Fill the gradients of all layers: products over all steps and sequences."""
    _, action, _, _, is_first, deter0, stoch0, _ = inputs
    deter, stoch, _, _, drawn, _ = results
    assert deter0 is not None
    assert stoch0 is not None
    before = [torch.cat((x0[None], x[:-1])) for x0, x in ((deter0, deter), (stoch0, stoch))]
    if is_first is not None:
        before = [x.masked_fill(is_first.unsqueeze(-1), 0.0) for x in before]
    h = before[0].flatten(0, 1)
    s, a = before[1].flatten(0, 1), (drawn if action is None else action).flatten(0, 1)
    if d.blocks:
        head = 1
        _gradients_in_blocks(d, kept, (h, s, a), layers, grads)
    else:
        head = (1 if d.norm_gates else 2) + (1 if d.pre_width else 0)
        _cell_gradients(d, kept, h, torch.cat((s, a), -1), layers, grads)
    end = head + d.head_layers
    y = kept.head
    if not d.split:
        y = [_activated(hat, layer) for hat, layer in zip(y, layers[head:end], strict=False)]
    _net_gradients(grads[head:end], d.head, [deter.flatten(0, 1), *y], d.split, d.affine, kept.head)
    if d.policy_layers:
        policy = end + (4 if d.blocks else 0)
        feature = torch.cat((h, s), -1)
        _net_gradients(grads[policy:], d.policy, [feature, *kept.policy], True, [], [])


def _net_gradients(
    grads: Layers, d: list[Tensor], x: list[Tensor], split: bool, affine: list[Tensor],
    hat: list[Tensor],
) -> None:  # fmt: skip
    for i, layer in enumerate(grads):
        normed = i < len(affine)
        _vectors(layer, d[i], affine[i] if normed else None, hat[i] if normed else None)
        weight = layer[0]
        if weight is None:
            continue
        if not split or i == 0:
            _outer(weight, d[i], x[i])
            continue
        for to, part, y in zip(weight, d[i].chunk(2, 1), x[i].chunk(2, 1), strict=True):
            _outer(to, part, y)


def spread(structure: Sequence[int], tensors: Optional) -> Layers:
    """Four tensors a layer, None where it lacks a part."""
    found = iter(tensors)
    return [
        [next(found) if parts >> i & 1 else None for i in range(len(PARTS))]
        for parts in structure[SIZES:]
    ]
