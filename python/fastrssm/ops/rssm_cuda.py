"""The scans on Hopper's thread-block clusters: packed weights, launches, gradients of weights.

Kernels multiply bfloat16 operands and add in float32. Weights stay in the multiprocessors for the
whole sequence; csrc/cuda/NOTES.md says how.
"""

import functools
import threading
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastrssm.ops.rssm_cuda_weights import Arrays, Optional, spread, weight_gradients
from fastrssm.ops.rssm_plan import CELLS, SIZES, TensorTable

# every this many rows of the batch share a cluster, widest first
_ROWS = (16, 8)
_RANKS = (16, 8)
# rows of the batch from which Triton is predicted to be faster, to be measured
_MANY_ROWS, _MANY_ROWS_WITH_INPUT_LAYER, _MANY_ROWS_IN_BLOCKS = 2000, 1500, 1000
_PACKING = threading.Lock()


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
    few_blocks = 0 < structure[14] <= min(_RANKS)
    # a block of block_gru is whole in its rank: more ranks would have none
    for ranks in (min(_RANKS),) if few_blocks else _RANKS:
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


def disadvantage(structure: Sequence[int], B: int) -> str | None:
    """Return why a scan of B rows is left to Triton unless it is asked for here, None if not."""
    many = _MANY_ROWS_WITH_INPUT_LAYER if structure[7] else _MANY_ROWS
    if CELLS[structure[4]] == "block_gru":
        many = _MANY_ROWS_IN_BLOCKS
    return f"triton is expected to be faster from {many} rows on" if many <= B else None


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
        self.layers = spread(structure, weights)
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
        _native().rssm_cluster_run(
            _stream(self.device), self.layout, self.backward, *self.cluster,
            [*constants], learns, _addresses([*tensors, packed, *parts]),
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
        places = spread(structure, weight_grads)
        world = places[: len(places) - structure[10]]
        learns = input_grads[0] is not None or any(x is not None for y in world for x in y)
        launch.run([*inputs, *results, *grads, memory, *given], packed, constants, learns=learns)
        gradients = Arrays(memory, T * B, structure)
        gradients.take_gradients()
        # what a projection outside the loop wants is the gradient of a first layer
        for i, net in ((0, gradients.head), (7, gradients.policy)):
            to = input_grads[i]
            if to is not None:
                to.copy_(net[0].view_as(to))
        if learning:
            kept = Arrays(results[-1], T * B, structure)
            kept.take_kept()
            weight_gradients(gradients, kept, inputs, results, launch.layers, places)
