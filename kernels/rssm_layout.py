"""Where everything lies that the scans pack, keep and walk through: constants of their kernels."""

import functools
from collections.abc import Sequence
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
    """Parts of a weight that become blocks of a packed matrix, transposed or as they are."""

    layer: int
    row: int  # of the first part
    column: int
    count: int
    rows: int  # of a part
    columns: int
    across: bool  # the parts lie side by side in the weight, else one below the other
    at: int
    ld: int
    block: int
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


class Blocks(NamedTuple):
    """What block_gru has besides: layers of deter, stoch and action that all its blocks read.

    Their arrays and vectors lie side by side, in this order. The layer behind them, which mixes
    them into the state's blocks, is the one before the cell, `Layout.pre`.
    """

    count: int
    own: int  # units of a block
    width: int  # of one of the three layers
    layers: tuple[Matrix, ...]
    shared: Matrix  # the mixing layer's part for them: a block for each block, or for each layer
    bias: int  # places of vectors
    scale: int
    y: Array  # kept operands
    hat: Array
    rstd: Array
    d: Array  # gradients of pre-activations
    affine: Array  # and those between norm and activation


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
    pre: Matrix | None  # block_gru: of the state's own block
    blocks: Blocks | None
    x: Matrix  # of the cell's input
    h: Matrix  # of its state; block_gru: pre
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
    # torch_gru: r, z, n, hn; else pre-activations in the cell's order, behind a norm if it has one
    gates: Array
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

    def matrix(self, layer: int, out: int, column: int, size: int, count: int = 1,
               *, across: bool = False, beside: bool = False) -> Matrix:  # fmt: skip
        """Pack parts [out, size] of a weight from a column on, as blocks.

        across: the parts lie side by side in the weight; beside: the blocks do.
        """
        K, N = (size, out) if self.forward else (out, size)
        BK, BN = _tile(K, self.tiles.depth), _tile(N, self.tiles.columns)
        padded = -(-N // BN) * BN
        ld = padded * count if beside else padded
        block = padded if beside else -(-K // BK) * BK * ld
        at = self.matrices
        self.sources.append(
            Source(layer, 0, column, count, out, size, across, at, ld, block, self.forward)
        )
        self.matrices += -(-K // BK) * BK * padded * count
        return Constant(Matrix(at, K, N, ld, block, BN, BK))

    def vector(self, layers: Sequence[int], part: int, n: int) -> int:
        """Place a part of some layers side by side; -1: none of them has it."""
        have = [self.parts[layer] >> part & 1 for layer in layers]
        if not any(have):
            return -1
        at = self.vectors
        # the others' is zero
        self.places += [
            (layer, part, n, at + i * n)
            for i, (layer, has) in enumerate(zip(layers, have, strict=True))
            if has
        ]
        self.vectors += aligned(n * len(layers))
        return at


class _Rows:
    """Lays arrays out one after the other."""

    def __init__(self) -> None:
        self.used = 0

    def take(self, width: int) -> Array:
        array = Array(self.used, width, aligned(width), 0)
        self.used += array.ld
        return Constant(array)


def _blocks(
    pack: _Packer,
    layers: range,
    sizes: tuple[int, int, int],
    count: int,
    width: int,
    operands: _Rows,
    reals: _Rows,
    gradients: _Rows,
) -> Blocks:
    """Lay out three layers, of inputs of these sizes, and what the fourth reads of them."""
    own, mixing = sizes[0] // count, layers[3]
    if pack.forward:
        shared = pack.matrix(mixing, own, own, 3 * width, count)
        matrices = [pack.matrix(layers[i], width, 0, size) for i, size in enumerate(sizes)]
    else:
        shared = pack.matrix(mixing, sizes[0], own, width, 3, across=True)
        # what the first one adds to the state is found block by block
        matrices = [pack.matrix(layers[0], width, 0, own, count, across=True)]
        matrices += [pack.matrix(layers[i], width, 0, sizes[i]) for i in (1, 2)]
    bias, scale = (pack.vector(layers[:3], part, width) for part in (1, 2))
    blocks = Blocks(
        count, own, width, tuple(matrices), shared, bias, scale,
        operands.take(3 * width), operands.take(3 * width), reals.take(3),
        gradients.take(3 * width), gradients.take(3 * width),
    )  # fmt: skip
    return Constant(blocks)


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
    policy_layers, policy_width, _, detach, count, branch = structure[10:16]
    pack = _Packer(structure[16:], tiles, forward)
    operands, reals, gradients = _Rows(), _Rows(), _Rows()
    torch_gru, categorical = cell == 0, latent == 1
    cell_layer = 1 if pre_width else 0
    head_layer = cell_layer + (2 if torch_gru else 1)
    branch_layer, mixing_layer = head_layer + head_layers, head_layer + head_layers + 3
    policy_layer = branch_layer + (4 if count else 0)
    # of block_gru the mixing layer is the one before the cell
    pre_layer, pre_width = (mixing_layer, D) if count else (0, pre_width)
    reads = pre_width or S + A

    def net(layer: int, layers: int, width: int, out: int, split: bool, inputs: list[int]) -> Net:
        hidden = 2 * width if split else width
        stats = 2 * out if split or not categorical else out
        first = [pack.matrix(layer, hidden, sum(inputs[:i]), size) for i, size in enumerate(inputs)]
        later: list[Matrix] = []
        for i in range(1, layers):
            last = i == layers - 1
            to = out if last else width
            # forward, mean and std are found together, also those of a joint network
            paired = split or (last and forward and not categorical)
            if not (split or paired) and last:
                to = stats
            later.append(pack.matrix(layer + i, to, 0, width, 2 if paired else 1))
        vectors = [
            tuple(
                pack.vector([layer + i], part, stats if i == layers - 1 else hidden)
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

    pre = blocks = None
    if pre_width and not count:
        pre = pack.matrix(0, reads, 0, S + A)
    if count:
        own, gates = D // count, 1 if forward else 3
        pre = h = pack.matrix(mixing_layer, own, 0, own, count)
        x = pack.matrix(cell_layer, gates * own, 0, own, 3 * count // gates)
        layers = range(branch_layer, mixing_layer + 1)
        blocks = _blocks(pack, layers, (D, S, A), count, branch, operands, reals, gradients)
    elif torch_gru and forward:
        x = pack.matrix(cell_layer, D, 0, reads, 3, beside=True)
        h = pack.matrix(cell_layer + 1, D, 0, D, 3, beside=True)
    elif torch_gru:
        x = pack.matrix(cell_layer, 3 * D, 0, reads)
        # in the order xn, r, z the gates lie beside r, z, hn, which the state needs
        whole = pack.sources.pop()
        pack.sources.append(whole._replace(row=2 * D, rows=D))
        pack.sources.append(whole._replace(rows=2 * D, at=whole.at + D * whole.ld))
        h = pack.matrix(cell_layer + 1, 3 * D, 0, D)
    else:
        x = pack.matrix(cell_layer, 3 * D, 0, reads)
        h = pack.matrix(cell_layer, 3 * D, reads, D)
    head = net(head_layer, head_layers, head_width, S, heads == 0, [D])
    policy = None
    if policy_layers:
        policy = net(policy_layer, policy_layers, policy_width, A, True, [D, S])
    vectors = [pack.vector([pre_layer], part, reads) if pre_width else -1 for part in (1, 2, 3)]
    vectors += [pack.vector([cell_layer], part, 3 * D) for part in (1, 2, 3)]
    vectors += [pack.vector([cell_layer + 1], 1, 3 * D) if torch_gru else -1]
    none = Constant(Array(0, 0, 0, 0))
    normed = cell in (1, 2)
    widest = 3 * D if normed else D
    feature = operands.take(pre_width + D + S + A)
    pre_y, deter_in, cell_in = (
        Constant(feature._replace(width=width, column=column))
        for width, column in ((pre_width, 0), (D, pre_width), (S + A, pre_width + D))
    )
    layout = Layout(
        D, S, A, reads, groups, cell, categorical, bool(detach), 1e-3 if cell == 2 else 1e-5,
        pre, blocks, x, h, head, policy, tuple(vectors),
        feature, pre_y, deter_in, cell_in, operands.take(D) if narrow else none,
        operands.take(reads) if pre_width else none,
        reals.take(1) if pre_width else none,
        operands.take(4 * D if torch_gru else 3 * D),
        reals.take(1) if normed else none,
        reals.take(S), reals.take(A),
        gradients.take(reads) if pre_width else none,
        gradients.take(reads) if pre_width else none,
        gradients.take(4 * D if torch_gru else 3 * D),
        gradients.take(3 * D) if normed else none,
        operands.used, reals.used, gradients.used, aligned(max(widest, reads, branch, head.hidden)),
        _tile(D, tiles.columns),
    )  # fmt: skip
    return layout, Packing(pack.matrices, pack.vectors, tuple(pack.sources), tuple(pack.places))
