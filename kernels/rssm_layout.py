"""Where everything lies that the scans pack, keep and walk through: constants of their kernels."""

import functools
from typing import Any, NamedTuple

import triton.language as tl

# elements to which rows and arrays are aligned: 32 bytes of the narrowest dtype
_ALIGN = 16


class Constant(tl.constexpr):
    """A part of a layout that kernels hand to functions; Triton 3.6 takes no bare tuples there."""

    def __getattr__(self, name: str) -> Any:
        """Read a field, on the host and in the interpreter."""
        return getattr(self.__dict__["value"], name)


class Tiles(NamedTuple):
    """Sizes of the tiles of a product: rows of the batch, columns, and numbers summed at a time."""

    rows: int
    columns: int
    depth: int
    warps: int
    stages: int


class Matrix(NamedTuple):
    """A packed weight [blocks, depth, columns], padded with zeros to whole tiles."""

    at: int  # its first element in the packed buffer
    K: int  # numbers that are summed
    N: int  # columns of a block
    ld: int  # distance between rows
    block: int  # distance between blocks
    BN: int
    BK: int


class Array(NamedTuple):
    """Columns of a matrix [rows, ld] that begins `at * rows` elements behind a buffer's start."""

    at: int
    width: int
    ld: int
    column: int


class Source(NamedTuple):
    """The part of a weight that becomes a block of a packed matrix, transposed or as it is."""

    layer: int
    row: int
    column: int
    rows: int
    columns: int
    at: int
    ld: int
    transposed: bool


class Net(NamedTuple):
    """A network: one, or a mean and a std network side by side; matrices of one direction."""

    split: bool
    hidden: int  # numbers of a hidden layer, of both networks
    width: int  # of one network
    out: int  # numbers of a mean, or of logits
    stats: int  # numbers of the last layer
    later: tuple[Matrix, ...]  # of all layers but the first
    first: Matrix
    second: Matrix  # of the first layer's second input, or the first one again
    bias: tuple[int, ...]  # places of vectors, -1: none
    scale: tuple[int, ...]
    shift: tuple[int, ...]
    y: tuple[Array, ...]  # kept operands, of hidden layers
    hat: tuple[Array, ...]
    rstd: tuple[Array, ...]
    d: tuple[Array, ...]  # gradients of pre-activations, of all layers
    affine: tuple[Array, ...]  # gradients between norm and activation, of hidden layers


class Layout(NamedTuple):
    """Everything that the kernels of one direction know when they are compiled."""

    D: int
    S: int
    A: int
    IN: int  # numbers that the cell reads besides its state
    groups: int
    cell: int
    categorical: bool
    detach: bool
    eps: float  # of the norm of the gates
    pre: Matrix | None
    x: Matrix  # of the cell's input
    h: Matrix  # of its state
    head: Net
    policy: Net | None
    vectors: tuple[int, ...]  # pre: bias, scale, shift; gates: the same; bias of the state's gates
    # operands: [pre_y | deter_in | stoch | action], the state being reset, so that the inputs of
    # the layer before the cell, of the cell and of the policy lie beside each other
    feature: Array
    pre_y: Array
    deter_in: Array
    cell_in: Array  # [stoch | action]
    deter_out: Array  # deter after a step; float32: the result itself
    pre_hat: Array
    pre_rstd: Array
    gates: Array  # torch_gru: r, z, n, hn; else the normalised pre-activations
    gates_rstd: Array
    raw: Array  # std before its transform
    action_raw: Array
    d_pre: Array
    d_pre_affine: Array
    d_gates: Array  # torch_gru: xn, r, z, hn; else in the cell's order
    d_gates_affine: Array
    operands: int  # numbers a row of the kept operands
    reals: int  # and of what is kept in float32
    gradients: int  # and of the gradients of pre-activations
    scratch: int  # float32 numbers a row that live within a stage
    BP: int  # columns of a tile without a product


class Packing(NamedTuple):
    """How the weights of a scan become two buffers."""

    matrices: int  # numbers
    vectors: int
    sources: tuple[Source, ...]
    # layer, part (1: bias, 2: scale, 3: shift), numbers, place
    places: tuple[tuple[int, int, int, int], ...]


def aligned(n: int) -> int:
    """Round up to whole aligned units."""
    return -(-n // _ALIGN) * _ALIGN


def _tile(n: int, most: int) -> int:
    return min(most, max(16, 1 << (n - 1).bit_length()))


class _Packer:
    """Lays matrices and vectors out one after the other."""

    def __init__(self, parts: tuple[int, ...], tiles: Tiles, forward: bool) -> None:
        self.parts, self.tiles, self.forward = parts, tiles, forward
        self.sources: list[Source] = []
        self.places: list[tuple[int, int, int, int]] = []
        self.matrices = self.vectors = 0

    def matrix(self, layer: int, rows: tuple[int, ...], out: int, column: int, size: int,
               *, beside: bool = False) -> Matrix:  # fmt: skip
        """Pack blocks [out, size] of a weight that begin in `rows`; beside: in one row each."""
        K, N = (size, out) if self.forward else (out, size)
        BK, BN = _tile(K, self.tiles.depth), _tile(N, self.tiles.columns)
        padded = -(-N // BN) * BN
        ld = padded * len(rows) if beside else padded
        block = padded if beside else -(-K // BK) * BK * ld
        at = self.matrices
        for i, row in enumerate(rows):
            self.sources.append(
                Source(layer, row, column, out, size, at + i * block, ld, self.forward)
            )
        self.matrices += -(-K // BK) * BK * ld * (1 if beside else len(rows))
        return Constant(Matrix(at, K, N, ld, block, BN, BK))

    def vector(self, layer: int, part: int, n: int) -> int:
        if not self.parts[layer] >> part & 1:
            return -1
        at = self.vectors
        self.places.append((layer, part, n, at))
        self.vectors += aligned(n)
        return at


class _Rows:
    """Lays arrays out one after the other."""

    def __init__(self) -> None:
        self.used = 0

    def take(self, width: int) -> Array:
        array = Array(self.used, width, aligned(width), 0)
        self.used += array.ld
        return Constant(array)


@functools.cache
def make_layout(
    structure: tuple[int, ...], narrow: bool, tiles: Tiles, forward: bool
) -> tuple[Layout, Packing]:
    """Lay out one direction of a scan.

    Args:
        structure: as in ops.rssm_plan.Plan.
        narrow: operands are not float32.
        tiles: sizes of its tiles.
        forward: else for the backward scan, whose matrices are those of transposed products.
    """
    D, S, A, groups, cell, heads, latent, pre_width, head_layers, head_width = structure[:10]
    policy_layers, policy_width, _, detach = structure[10:14]
    pack = _Packer(structure[16:], tiles, forward)
    operands, reals, gradients = _Rows(), _Rows(), _Rows()
    torch_gru, categorical = cell == 0, latent == 1
    reads = pre_width or S + A
    cell_layer = 1 if pre_width else 0
    head_layer = cell_layer + (2 if torch_gru else 1)

    def net(layer: int, layers: int, width: int, out: int, split: bool, inputs: list[int]) -> Net:
        hidden = 2 * width if split else width
        stats = 2 * out if split or not categorical else out
        first = [
            pack.matrix(layer, (0,), hidden, sum(inputs[:i]), size) for i, size in enumerate(inputs)
        ]
        later: list[Matrix] = []
        for i in range(1, layers):
            last = i == layers - 1
            to = out if last else width
            # forward, mean and std are found together, also those of a joint network
            paired = split or (last and forward and not categorical)
            if not (split or paired) and last:
                to = stats
            later.append(pack.matrix(layer + i, (0, to) if paired else (0,), to, 0, width))
        vectors = [
            tuple(
                pack.vector(layer + i, part, stats if i == layers - 1 else hidden)
                for i in range(layers)
            )
            for part in (1, 2, 3)
        ]
        some = range(layers - 1)
        normed = () if split else some
        net = Net(
            split, hidden, width, out, stats, tuple(later), first[0],
            first[-1], *vectors,
            tuple(operands.take(hidden) for _ in some),
            tuple(operands.take(hidden) for _ in normed),
            tuple(reals.take(1) for _ in normed),
            tuple(gradients.take(stats if i == layers - 1 else hidden) for i in range(layers)),
            tuple(gradients.take(hidden) for _ in normed),
        )  # fmt: skip
        return Constant(net)

    rows = tuple(g * D for g in range(3))
    pre = pack.matrix(0, (0,), reads, 0, S + A) if pre_width else None
    if torch_gru and forward:
        x = pack.matrix(cell_layer, rows, D, 0, reads, beside=True)
        h = pack.matrix(cell_layer + 1, rows, D, 0, D, beside=True)
    elif torch_gru:
        x = pack.matrix(cell_layer, (0,), 3 * D, 0, reads)
        # in the order xn, r, z the gates lie beside r, z, hn, which the state needs
        whole = pack.sources.pop()
        pack.sources.append(whole._replace(row=2 * D, rows=D))
        pack.sources.append(whole._replace(rows=2 * D, at=whole.at + D * whole.ld))
        h = pack.matrix(cell_layer + 1, (0,), 3 * D, 0, D)
    else:
        x = pack.matrix(cell_layer, (0,), 3 * D, 0, reads)
        h = pack.matrix(cell_layer, (0,), 3 * D, reads, D)
    head = net(head_layer, head_layers, head_width, S, heads == 0, [D])
    policy = None
    if policy_layers:
        at = head_layer + head_layers
        policy = net(at, policy_layers, policy_width, A, True, [D, S])
    vectors = [pack.vector(0, part, reads) if pre_width else -1 for part in (1, 2, 3)]
    vectors += [pack.vector(cell_layer, part, 3 * D) for part in (1, 2, 3)]
    vectors += [pack.vector(cell_layer + 1, 1, 3 * D) if torch_gru else -1]
    none = Constant(Array(0, 0, 0, 0))
    widest = 3 * D if not torch_gru else D
    feature = operands.take(pre_width + D + S + A)
    pre_y, deter_in, cell_in = (
        Constant(feature._replace(width=width, column=column))
        for width, column in ((pre_width, 0), (D, pre_width), (S + A, pre_width + D))
    )
    layout = Layout(
        D, S, A, reads, groups, cell, categorical, bool(detach), 1e-3 if cell == 2 else 1e-5,
        pre, x, h, head, policy, tuple(vectors),
        feature, pre_y, deter_in, cell_in, operands.take(D) if narrow else none,
        operands.take(reads) if pre_width else none,
        reals.take(1) if pre_width else none,
        operands.take(4 * D if torch_gru else 3 * D),
        none if torch_gru else reals.take(1),
        reals.take(S), reals.take(A),
        gradients.take(reads) if pre_width else none,
        gradients.take(reads) if pre_width else none,
        gradients.take(4 * D if torch_gru else 3 * D),
        none if torch_gru else gradients.take(3 * D),
        operands.used, reals.used, gradients.used, aligned(max(widest, reads, head.hidden)),
        _tile(D, tiles.columns),
    )  # fmt: skip
    return layout, Packing(pack.matrices, pack.vectors, tuple(pack.sources), tuple(pack.places))
