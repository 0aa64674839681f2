"""The scans on Hopper's thread-block clusters: packed weights, launches, gradients of weights.

Kernels multiply bfloat16 operands and add in float32. Weights stay in the multiprocessors for the
whole sequence; csrc/cuda/NOTES.md says how.
"""

import functools
import threading
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from fastrssm.ops.rssm_plan import PARTS, SIZES, TensorTable

# every this many rows of the batch share a cluster, widest first
_ROWS = (16, 8)
_RANKS = (16, 8)
_PACKING = threading.Lock()
Layers = list[list[Tensor | None]]
Optional = Sequence[Tensor | None]


def _native() -> Any:
    from fastrssm import _native

    return _native


class _Cluster(NamedTuple):
    """How a scan in one direction is spread over the device."""

    ranks: int  # blocks of a cluster
    rows: int  # of the batch, in a cluster
    clusters: int


def _layout(T: int, B: int, structure: Sequence[int]) -> list[int]:
    return [T, B, *structure[:SIZES]]


@functools.cache
def _fitting(structure: tuple[int, ...], backward: bool, device: int) -> list[_Cluster] | str:
    """All clusters of the largest size that fits the device, or why none does."""
    native, layout, why = _native(), _layout(1, 1, structure), ""
    for ranks in _RANKS:
        found: list[_Cluster] = []
        for rows in _ROWS:
            refused = native.rssm_cluster_refusal(layout, backward, ranks, rows)
            count = 0
            if not refused:
                count = native.rssm_cluster_count(device, layout, backward, ranks, rows)
                refused = "" if count else f"the device holds no cluster of {ranks} such blocks"
            if count:
                found.append(_Cluster(ranks, rows, count))
            why = why or refused
        if found:
            return found
    return why


def _choose(structure: Sequence[int], backward: bool, B: int, device: int) -> _Cluster:
    """Take the fewest rows a cluster that all run at once, or else the most that fit."""
    fitting = _fitting(tuple(structure), backward, device)
    if isinstance(fitting, str):
        raise RuntimeError(f"rssm_scan: backend 'cuda' cannot run this scan: {fitting}")
    at_once = [c for c in fitting if -(-B // c.rows) <= c.clusters]
    chosen = min(at_once, key=lambda c: c.rows) if at_once else max(fitting, key=lambda c: c.rows)
    return chosen._replace(clusters=min(chosen.clusters, -(-B // chosen.rows)))


def refusal(structure: tuple[int, ...], precision: str, device: int) -> str | None:
    """Return why the cluster kernels cannot run a scan with such products, None if they can."""
    if precision != "bfloat16":
        return f"its products are bfloat16, and {precision} is asked for"
    if structure[4] != 0 or structure[6] != 0:
        return "it has the cell torch_gru and gaussian latents only"
    if _native().cuda_status():
        # the dispatcher says why
        return None
    for backward in (False, True):
        fitting = _fitting(structure, backward, device)
        if isinstance(fitting, str):
            return fitting
    return None


# what torch.compiler.assume_constant_result does
refusal._dynamo_marked_constant = True  # type: ignore[attr-defined]


@functools.cache
def kept_width(structure: tuple[int, ...]) -> int:
    """Return how many numbers the forward scan keeps for each step and sequence."""
    return _native().rssm_cluster_sizes(_layout(1, 1, structure), False, 16, 8)[1]


class _Packs:
    """The packed weights of a scan by direction and cluster, kept while the weights stay.

    As on the CPU, weights that are learnt are packed at every call with gradient.
    """

    def __init__(self, weights: Sequence[Tensor]) -> None:
        # so that nothing else gets these addresses while they tell whose packs these are
        self._storages = [x.untyped_storage() for x in weights]
        self._forms: dict[object, tuple[Tensor, list[int]]] = {}

    def get(self, form: object, weights: Sequence[Tensor], pack: Any) -> Tensor:
        versions = [x._version for x in weights]
        with _PACKING:
            packed, of = self._forms.get(form, (None, None))
            if packed is None or of != versions:
                packed = pack()
                self._forms[form] = packed, versions
        return packed


_PACKS: TensorTable[_Packs] = TensorTable(8)


class _Launch:
    """One direction of a scan on given weights."""

    def __init__(
        self, noise: Tensor, weights: Sequence[Tensor], structure: Sequence[int], *, backward: bool
    ) -> None:
        T, B, _ = noise.shape
        self.device, self.backward = noise.device, backward
        self.layout = _layout(T, B, structure)
        self.weights, self.structure = weights, structure
        self.layers = _spread(structure, weights)
        self.cluster = _choose(structure, backward, B, noise.device.index or 0)
        self.sizes: list[int] = _native().rssm_cluster_sizes(
            self.layout, backward, self.cluster.ranks, self.cluster.rows
        )

    def packed(self, *, learning: bool) -> Tensor:
        """Return the weights as the kernel reads them."""
        weights = self.weights
        # a graph owns the memory that it captures; tensors of inference mode have no version
        captured = self.device.type == "cuda" and torch.cuda.is_current_stream_capturing()
        if learning or captured or any(x.is_inference() for x in weights):
            return self._pack()
        key = *map(id, weights), *(x.data_ptr() for x in weights), *self.structure
        packs = _PACKS.get(key)
        if packs is None:
            packs = _Packs(weights)
            _PACKS.put(key, weights, packs)
        return packs.get((self.backward, self.cluster.ranks), weights, self._pack)

    def _pack(self) -> Tensor:
        packed = torch.empty(self.sizes[0], dtype=torch.uint8, device=self.device)
        _native().rssm_cluster_pack(
            _stream(self.device), self.layout, self.backward, self.cluster.ranks,
            self.cluster.rows, _addresses([x for layer in self.layers for x in layer]),
            packed.data_ptr(),
        )  # fmt: skip
        return packed

    def run(
        self, tensors: Optional, packed: Tensor, constants: Sequence[float], *, learns: bool
    ) -> None:
        """Launch; the order of `tensors` is that of csrc/cuda/rssm_launch.h.

        learns: the gradients of the world model's pre-activations are stored.
        """
        parts = [x for layer in self.layers for x in layer]
        min_std, _, action_min_std = constants
        _native().rssm_cluster_run(
            _stream(self.device), self.layout, self.backward, *self.cluster, min_std,
            action_min_std, learns, _addresses([*tensors, packed, *parts]),
        )  # fmt: skip


def _stream(device: torch.device) -> int:
    return torch.cuda.current_stream(device).cuda_stream if device.type == "cuda" else 0


def _addresses(tensors: Optional) -> list[int]:
    return [0 if x is None or x.numel() == 0 else x.data_ptr() for x in tensors]


def forward(
    inputs: Optional,
    weights: Sequence[Tensor],
    structure: Sequence[int],
    constants: Sequence[float],
    precision: str,
    results: Sequence[Tensor],
    keep: bool,
) -> None:
    """Fill the results of a scan; arguments as in the op `rssm_scan`."""
    noise = inputs[2]
    assert noise is not None
    with torch.cuda.device_of(noise):
        launch = _Launch(noise, weights, structure, backward=False)
        learning = keep and any(x.requires_grad for x in weights)
        packed = launch.packed(learning=learning)
        launch.run([*inputs, *results, *[None] * 9], packed, constants, learns=False)


def backward(
    grads: Optional,
    inputs: Optional,
    weights: Sequence[Tensor],
    structure: Sequence[int],
    constants: Sequence[float],
    precision: str,
    results: Sequence[Tensor],
    input_grads: Optional,
    weight_grads: Optional,
) -> None:
    """Fill the gradients of inputs and weights; None: not wanted."""
    noise = inputs[2]
    assert noise is not None
    learning = any(x is not None for x in weight_grads)
    with torch.cuda.device_of(noise):
        launch = _Launch(noise, weights, structure, backward=True)
        T, B, _ = noise.shape
        numel = T * B * launch.sizes[2]
        memory = torch.empty(numel, dtype=torch.float32, device=noise.device)
        given = input_grads[5], input_grads[6], input_grads[1]
        packed = launch.packed(learning=learning)
        places = _spread(structure, weight_grads)
        world = places[: len(places) - structure[10]]
        learns = input_grads[0] is not None or any(x is not None for y in world for x in y)
        launch.run([*inputs, *results, *grads, memory, *given], packed, constants, learns=learns)
        gradients = _Arrays(memory, T * B, structure)
        gradients.take_gradients()
        # what a projection outside the loop wants is the gradient of a first layer
        for i, net in ((0, gradients.head), (7, gradients.policy)):
            to = input_grads[i]
            if to is not None:
                to.copy_(net[0].view_as(to))
        if learning:
            kept = _Arrays(results[-1], T * B, structure)
            kept.take_kept()
            _weight_gradients(gradients, kept, inputs, results, launch.layers, places)


class _Arrays:
    """Arrays [T * B, width] one after the other, in the order of csrc/cuda/rssm_program.cpp."""

    def __init__(self, memory: Tensor, rows: int, structure: Sequence[int]) -> None:
        self._memory, self._rows, self._used = memory, rows, 0
        self.D, self.S, self.A, *_ = structure
        self.split, self.pre_width = structure[5] == 0, structure[7]
        self.head_layers, self.head_width, self.policy_layers, self.policy_width = structure[8:12]
        self.head: list[Tensor] = []
        self.affine: list[Tensor] = []
        self.policy: list[Tensor] = []
        self.pre = self.pre_affine = self.gates = memory

    def _take(self, width: int) -> Tensor:
        begin = self._used * self._rows
        self._used += width
        return self._memory[begin : self._used * self._rows].view(self._rows, width)

    def take_kept(self) -> None:
        """Name what the forward scan kept: hidden layers, or what norms made of them."""
        if self.pre_width:
            self.pre = self._take(self.pre_width)
            self._take(1)
        self.gates = self._take(4 * self.D)
        for _ in range(self.head_layers - 1):
            self.head.append(self._take((1 + self.split) * self.head_width))
            if not self.split:
                self._take(1)
        self._take(self.S)
        self.policy = [self._take(2 * self.policy_width) for _ in range(self.policy_layers - 1)]

    def take_gradients(self) -> None:
        """Name the gradients of pre-activations, which the backward scan finds last layer first."""
        self.head = [self._take(2 * self.S)]
        for _ in range(self.head_layers - 1):
            self.head.insert(0, self._take((1 + self.split) * self.head_width))
            if not self.split:
                self.affine.insert(0, self._take(self.head_width))
        self.gates = self._take(4 * self.D)
        if self.pre_width:
            self.pre, self.pre_affine = self._take(self.pre_width), self._take(self.pre_width)
        if self.policy_layers:
            self.policy = [self._take(2 * self.A)]
        for _ in range(self.policy_layers - 1):
            self.policy.insert(0, self._take(2 * self.policy_width))


def _outer(to: Tensor | None, d: Tensor, x: Tensor) -> None:
    """Fill [out, in] with sums of products of d [rows, out] and x [rows, in]."""
    if to is None:
        return
    d, x = d.bfloat16(), x.bfloat16()
    if d.is_cuda:
        to.copy_(torch.mm(d.mT, x, out_dtype=torch.float32))
    else:
        # only the emulation comes here
        to.copy_(torch.mm(d.mT.float(), x.float()))


def _vectors(
    layer: Sequence[Tensor | None], d: Tensor, affine: Tensor | None = None,
    hat: Tensor | None = None,
) -> None:  # fmt: skip
    """Fill the gradients of a bias and of a norm."""
    _, bias, scale, shift = layer
    if bias is not None:
        bias.view(-1).copy_(d.sum(0))
    if scale is not None and affine is not None and hat is not None:
        scale.copy_((affine * hat).sum(0))
    if shift is not None and affine is not None:
        shift.copy_(affine.sum(0))


def _activated(hat: Tensor, layer: Sequence[Tensor | None]) -> Tensor:
    _, _, scale, shift = layer
    assert scale is not None
    assert shift is not None
    return F.silu(hat * scale + shift)


def _weight_gradients(
    d: _Arrays, kept: _Arrays, inputs: Optional, results: Sequence[Tensor], layers: Layers,
    grads: Layers,
) -> None:  # fmt: skip
    """Fill the gradients of all layers: products over all steps and sequences."""
    _, action, _, _, is_first, deter0, stoch0, _ = inputs
    deter, stoch, _, _, drawn, _ = results
    assert deter0 is not None
    assert stoch0 is not None
    D = d.D
    before = [torch.cat((x0[None], x[:-1])) for x0, x in ((deter0, deter), (stoch0, stoch))]
    if is_first is not None:
        before = [x.masked_fill(is_first.unsqueeze(-1), 0.0) for x in before]
    h = before[0].flatten(0, 1)
    x = torch.cat((before[1], drawn if action is None else action), -1).flatten(0, 1)
    place = 0
    if d.pre_width:
        _outer(grads[0][0], d.pre, x)
        _vectors(grads[0], d.pre, d.pre_affine, kept.pre)
        x, place = _activated(kept.pre, layers[0]), 1
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
    place += 2
    end = place + d.head_layers
    y = kept.head
    if not d.split:
        y = [_activated(hat, layer) for hat, layer in zip(y, layers[place:end], strict=False)]
    _net_gradients(
        grads[place:end], d.head, [deter.flatten(0, 1), *y], d.split, d.affine, kept.head
    )
    if d.policy_layers:
        feature = torch.cat((h, before[1].flatten(0, 1)), -1)
        _net_gradients(grads[end:], d.policy, [feature, *kept.policy], True, [], [])


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


def _spread(structure: Sequence[int], tensors: Optional) -> Layers:
    """Four tensors a layer, None where it lacks a part."""
    found = iter(tensors)
    return [
        [next(found) if parts >> i & 1 else None for i in range(len(PARTS))]
        for parts in structure[SIZES:]
    ]
