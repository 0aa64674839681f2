"""A scan as products of the vendor's library, step by step, with kernels between them.

For weights that one multiprocessor would take too long to stream. Nothing here waits for the
device or depends on what is in a tensor, so a CUDA graph can capture a whole scan.
"""

from collections.abc import Sequence
from typing import Any

import torch
import triton
from torch import Tensor

from fastrssm.kernels.rssm_layout import Array, Layout, Net
from fastrssm.kernels.rssm_step import (
    act_step_kernel,
    cell_step_kernel,
    draw_step_kernel,
    hidden_step_kernel,
    mix_step_kernel,
)
from fastrssm.kernels.rssm_step_backward import (
    act_back_kernel,
    cell_back_kernel,
    draw_back_kernel,
    hidden_back_kernel,
    mix_back_kernel,
)


def _multiply(out: Tensor, x: Tensor, weight: Tensor) -> Tensor:
    """Fill out, in float32, with x @ weight."""
    product = torch.bmm if x.ndim == 3 else torch.mm
    if x.is_cuda and x.dtype != torch.float32:
        return product(x, weight, out_dtype=torch.float32, out=out)
    # not float32 here: only the interpreter
    return product(x.float(), weight.float(), out=out)


def _rows(buffer: Tensor, array: Array, rows: int, first: int, B: int) -> Tensor:
    """Rows from `first` of an array of a buffer, [B, width]."""
    at = array.at * rows + first * array.ld + array.column
    return buffer.as_strided((B, array.width), (array.ld, 1), at)


def _kept(x: Tensor, is_first: Tensor | None) -> Tensor:
    """X [B, ...], zero in rows in which an episode begins at the first step."""
    return x if is_first is None else x.masked_fill(is_first[0].unsqueeze(1), 0.0)


def _blocks(x: Tensor, count: int = 2) -> Tensor:
    """[B, count n] as [count, B, n]."""
    return x.unflatten(1, (count, -1)).transpose(0, 1)


def _whole(n: int) -> dict[str, int]:
    """A tile of a whole row, and warps for it."""
    tile = max(16, triton.next_power_of_2(n))
    return {"BN": tile, "num_warps": max(1, min(8, tile // 256))}


class _Walk:
    """Sizes, buffers and places that all steps share."""

    def __init__(self, L: Layout, T: int, B: int, like: Tensor) -> None:
        self.L, self.T, self.B, self.device = L, T, B, like.device
        self.cell = 1 if L.pre is not None and L.blocks is None else 0
        self.head = self.cell + (2 if L.cell == 0 else 1)
        self.shared = self.head + len(L.head.d)
        self.policy = self.shared + (0 if L.blocks is None else 4)
        self._buffers: dict[str, Tensor] = {}

    def buffer(self, name: str, *shape: int) -> Tensor:
        """Memory of the scan's own: the same for the same name."""
        if name not in self._buffers:
            self._buffers[name] = torch.empty(shape, device=self.device)
        return self._buffers[name]


def forward(
    L: Layout,
    weights: Sequence[Tensor],
    vectors: Tensor,
    inputs: Sequence[Tensor | None],
    results: Sequence[Tensor],
    operands: Tensor,
    reals: Tensor,
    constants: Sequence[float],
    *,
    keep: bool,
) -> None:
    """Fill the results of a scan: as rssm_scan.forward, with a weight for each layer."""
    embed_proj, given, noise, action_noise, is_first, deter0, stoch0, policy_proj = inputs
    deter, stoch, stats0, stats1, action = results
    min_std, unimix, action_min_std = constants
    assert deter0 is not None
    assert stoch0 is not None
    T, B, _ = deter.shape
    rows = T * B if keep else B
    walk = _Walk(L, T, B, deter)
    sizes = {"T": T, "B": B, "KEEP": keep}

    def at(array: Array, t: int) -> Tensor:
        return _rows(operands, array, rows, t * B if keep else 0, B)

    def network(name: str, net: Net, first: int, x: Tensor, proj: Tensor | None, t: int) -> Tensor:
        for i, w in enumerate(weights[first : first + len(net.d)]):
            blocks = 2 if net.split and i else 1
            out = w.shape[-2]
            raw = walk.buffer(f"{name}{i}", blocks, B, out)
            if blocks == 2:
                _multiply(raw, _blocks(x), w.mT)
            else:
                _multiply(raw[0], x, w.mT)
            if i + 1 == len(net.d):
                return raw
            normed = not net.split
            hidden_step_kernel[(B, blocks)](
                raw, proj if i == 0 else None, vectors, operands, reals, t, N=out, BLOCKS=blocks,
                SPLIT=net.split, BIAS=net.bias[i], SCALE=net.scale[i], SHIFT=net.shift[i],
                Y=net.y[i], HAT=net.hat[i] if normed else None,
                RSTD=net.rstd[i] if normed else None, **sizes, **_whole(out),
            )  # fmt: skip
            x = at(net.y[i], t)
        raise AssertionError("a network has a last layer")

    def mix(t: int) -> None:
        """What the gates of block_gru read."""
        assert L.blocks is not None
        count, own, M = L.blocks.count, L.blocks.own, L.blocks.width
        *shared, mixing = weights[walk.shared : walk.shared + 4]
        raw = walk.buffer("shared", 3, B, M)
        for to, array, w in zip(raw, (L.deter_in, drawn, acted), shared, strict=True):
            _multiply(to, at(array, t), w.mT)
        hidden_step_kernel[(B, 3)](
            raw, None, vectors, operands, reals, t, N=M, BLOCKS=3, SPLIT=False,
            BIAS=L.blocks.bias, SCALE=L.blocks.scale, SHIFT=-1, Y=L.blocks.y, HAT=L.blocks.hat,
            RSTD=L.blocks.rstd, **sizes, **_whole(M),
        )  # fmt: skip
        from_state, from_shared = walk.buffer("own", count, B, own), walk.buffer("mixed", B, L.D)
        of_state = _cell_weights(walk, weights)[1]
        _multiply(from_state, _blocks(at(L.deter_in, t), count), of_state.mT)
        _multiply(from_shared, at(L.blocks.y, t), mixing[:, :, own:].flatten(0, 1).mT)
        mix_step_kernel[(B,)](
            from_state, from_shared, vectors, operands, reals, t, L=L, **sizes, **tile
        )

    # the state before the first step
    drawn = L.cell_in._replace(width=L.S)
    for x, array in ((deter0, L.deter_in), (stoch0, drawn)):
        at(array, 0).copy_(_kept(x, is_first))
    seen = L.deter_in._replace(width=L.D + L.S)
    acted = L.cell_in._replace(width=L.A, column=L.cell_in.column + L.S)
    classes = {
        "BG": triton.next_power_of_2(L.groups),
        "K_TILE": triton.next_power_of_2(L.S // L.groups),
    }
    tile = {"BD": _whole(L.D)["BN"], "num_warps": _whole(L.D)["num_warps"]}
    if given is not None and L.blocks is not None:
        given = given / given.abs().clamp_min(1.0)
    if given is not None and keep:
        _rows(operands, acted, rows, 0, rows).copy_(given.flatten(0, 1))
    for t in range(T):
        if L.policy is not None:
            raw = network("policy", L.policy, walk.policy, at(seen, t), policy_proj, t)
            act_step_kernel[(B,)](
                raw, vectors, action_noise, action, operands, reals, t, min_std=action_min_std,
                L=L, **sizes, **_whole(L.A),
            )  # fmt: skip
        elif not keep:
            assert given is not None
            at(acted, t).copy_(given[t])
        x = at(L.cell_in, t)
        if L.blocks is not None:
            mix(t)
            x = at(L.pre_y, t)
        elif L.pre is not None:
            raw = _multiply(walk.buffer("pre", B, L.IN), x, weights[0].mT)
            hidden_step_kernel[(B, 1)](
                raw, None, vectors, operands, reals, t, N=L.IN, BLOCKS=1, SPLIT=False,
                BIAS=L.vectors[0], SCALE=L.vectors[1], SHIFT=L.vectors[2],
                Y=L.pre_y, HAT=L.pre_hat, RSTD=L.pre_rstd, **sizes, **_whole(L.IN),
            )  # fmt: skip
            x = at(L.pre_y, t)
        of_input, of_state = _cell_weights(walk, weights)
        if L.blocks is not None:
            from_state = None
            from_input = walk.buffer("input", L.blocks.count, B, 3 * L.blocks.own)
            _multiply(from_input, _blocks(x, L.blocks.count), of_input.mT)
        else:
            from_input = _multiply(walk.buffer("input", B, 3 * L.D), x, of_input.mT)
            from_state = walk.buffer("state", B, 3 * L.D)
            _multiply(from_state, at(L.deter_in, t), of_state.mT)
        cell_step_kernel[(B,)](
            from_input, from_state, vectors, is_first, deter0, deter, operands, reals, t, L=L,
            **sizes, **tile,
        )  # fmt: skip
        x = at(L.deter_out, t) if operands.dtype != torch.float32 else deter[t]
        raw = network("head", L.head, walk.head, x, embed_proj, t)
        draw_step_kernel[(B,)](
            raw, vectors, noise, is_first, stoch, stats0, stats1, operands, reals, t,
            min_std=min_std, unimix=unimix, L=L, BS=_whole(L.S)["BN"], **classes, **sizes,
        )  # fmt: skip


def _cell_weights(walk: _Walk, weights: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """Of the cell's input and of its state; of block_gru the state's is in the mixing layer."""
    weight = weights[walk.cell]
    if walk.L.blocks is not None:
        return weight, weights[walk.shared + 3][:, :, : walk.L.blocks.own]
    if walk.L.cell == 0:
        return weight, weights[walk.cell + 1]
    return weight[:, : walk.L.IN], weight[:, walk.L.IN :]


def backward(
    L: Layout,
    weights: Sequence[Tensor],
    vectors: Tensor,
    grads: Sequence[Tensor | None],
    inputs: Sequence[Tensor | None],
    results: Sequence[Tensor],
    operands: Tensor,
    reals: Tensor,
    gradients: Tensor,
    state_grads: Sequence[Tensor],
    action_grad: Tensor | None,
    unimix: float,
    *,
    learn: bool,
) -> None:
    """Fill gradients: as rssm_scan.backward, with a weight for each layer."""
    deter_grad, stoch_grad, stats0_grad, stats1_grad, drawn_grad = grads
    _, given, noise, action_noise, is_first, deter0, _, _ = inputs
    deter, _, stats0, _, action = results
    T, B, D = deter.shape
    rows = T * B if learn else B
    walk = _Walk(L, T, B, deter)
    sizes: dict[str, Any] = {"T": T, "B": B, "LEARN": learn}
    through = L.policy is not None and not L.detach
    feature = walk.buffer("feature", B, D + L.S) if through else None
    W = L.S + L.A
    # all steps of it where gradients of given actions are wanted
    from_input = walk.buffer("x", T if action_grad is not None else 1, B, W)
    from_state, pasts = walk.buffer("h", B, D), walk.buffer("past", 2, B, D)
    from_blocks = None
    if L.blocks is not None:
        from_blocks = walk.buffer("own", L.blocks.count, B, L.blocks.own)
    of_input, of_state = _cell_weights(walk, weights)
    if L.cell == 0:
        # gates lie in the order xn, r, z, hn
        of_input = torch.cat((of_input[2 * D :], of_input[: 2 * D]))
    groups, classes = triton.next_power_of_2(L.groups), triton.next_power_of_2(L.S // L.groups)

    def at(array: Array, t: int) -> Tensor:
        return _rows(gradients, array, rows, t * B if learn else 0, B)

    def hidden(raw: Tensor, blocks: int, n: int, t: int, **places: Any) -> None:
        """Through an activation and a norm; raw: [blocks, B, n], or [B, blocks * n]."""
        hidden_back_kernel[(B, blocks)](
            raw, vectors, operands, reals, gradients, t, N=n, LD=raw.stride(-2), **places, **sizes,
            **_whole(n),
        )  # fmt: skip

    def enter(t: int, x_grad: Tensor) -> None:
        """From the gates to what the cell reads."""
        d = at(L.d_gates, t)
        _multiply(from_state, d[:, D:] if L.cell == 0 else d, of_state)
        if L.pre is None:
            _multiply(x_grad, d[:, : 3 * D], of_input)
            return
        raw = _multiply(walk.buffer("pre", B, L.IN), d[:, : 3 * D], of_input)
        hidden(
            raw, 1, L.IN, t, SPLIT=False, SCALE=L.vectors[1], SHIFT=L.vectors[2], Y=None,
            HAT=L.pre_hat, RSTD=L.pre_rstd, D=L.d_pre, AFFINE=L.d_pre_affine,
        )  # fmt: skip
        _multiply(x_grad, at(L.d_pre, t), weights[0])

    def mix(t: int, x_grad: Tensor) -> None:
        """The same of block_gru; that of the state is found in two parts."""
        assert L.blocks is not None
        assert from_blocks is not None
        count, own, M = L.blocks.count, L.blocks.own, L.blocks.width
        *shared, mixing = weights[walk.shared : walk.shared + 4]
        raw = walk.buffer("mixed", count, B, own)
        _multiply(raw, _blocks(at(L.d_gates, t), count), of_input)
        mix_back_kernel[(B,)](raw, vectors, operands, reals, gradients, t, L=L, **sizes, **tile)
        d = at(L.d_pre, t)
        _multiply(from_blocks, _blocks(d, count), of_state)
        raw = _multiply(walk.buffer("shared", B, 3 * M), d, mixing[:, :, own:].flatten(0, 1))
        hidden(
            raw, 3, M, t, SPLIT=False, SCALE=L.blocks.scale, SHIFT=-1, Y=None, HAT=L.blocks.hat,
            RSTD=L.blocks.rstd, D=L.blocks.d, AFFINE=L.blocks.affine,
        )  # fmt: skip
        of_deter, of_stoch, of_action = at(L.blocks.d, t).split(M, 1)
        _multiply(from_state, of_deter, shared[0])
        _multiply(x_grad[:, : L.S], of_stoch, shared[1])
        _multiply(x_grad[:, L.S :], of_action, shared[2])

    def network(name: str, net: Net, first: int, t: int) -> None:
        for i in range(len(net.y), 0, -1):
            w, d = weights[first + i], at(net.d[i], t)
            blocks = 2 if net.split else 1
            raw = walk.buffer(f"{name}{i}", blocks, B, net.width)
            if net.split:
                _multiply(raw, _blocks(d), w)
            else:
                _multiply(raw[0], d, w)
            hidden(
                raw, blocks, net.width, t, SPLIT=net.split, SCALE=net.scale[i - 1],
                SHIFT=net.shift[i - 1], Y=net.y[i - 1],
                HAT=None if net.split else net.hat[i - 1],
                RSTD=None if net.split else net.rstd[i - 1], D=net.d[i - 1],
                AFFINE=None if net.split else net.affine[i - 1],
            )  # fmt: skip

    def into(name: str, net: Net, first: int, t: int) -> Tensor:
        out = walk.buffer(name, B, weights[first].shape[-1])
        return _multiply(out, at(net.d[0], t), weights[first])

    tile = {"BD": _whole(D)["BN"], "num_warps": _whole(D)["num_warps"]}
    for t in range(T - 1, -1, -1):
        step = t if action_grad is not None else 0
        draw_back_kernel[(B,)](
            stoch_grad, stats0_grad, stats1_grad, noise, is_first, stats0,
            from_input[min(step + 1, len(from_input) - 1)], feature, reals, gradients, t,
            unimix=unimix, LD=W, L=L, BG=groups, K_TILE=classes, **sizes,
        )  # fmt: skip
        network("head", L.head, walk.head, t)
        from_head = into("from_head", L.head, walk.head, t)
        past = pasts[t % 2]
        cell_back_kernel[(B,)](
            deter_grad, is_first, deter0, deter, vectors, operands, reals, gradients, from_head,
            from_state, from_blocks, feature, pasts[1 - t % 2], past, t, L=L, **sizes, **tile,
        )  # fmt: skip
        x_grad = from_input[step]
        (enter if L.blocks is None else mix)(t, x_grad)
        if L.policy is not None:
            act_back_kernel[(B,)](
                drawn_grad, x_grad, action, action_noise, reals, gradients, t, LD=W, L=L, **sizes
            )
            network("policy", L.policy, walk.policy, t)
            if through:
                into("feature", L.policy, walk.policy, t)
    parts = pasts[0] + from_state, from_input[0][:, : L.S]
    if from_blocks is not None:
        parts = parts[0] + from_blocks.transpose(0, 1).flatten(1), parts[1]
    for i, (to, x) in enumerate(zip(state_grads, parts, strict=True)):
        if feature is not None:
            x = x + (feature[:, D:] if i else feature[:, :D])
        to.copy_(_kept(x, is_first))
    if action_grad is not None:
        action_grad.copy_(from_input[:, :, L.S :])
        if L.blocks is not None:
            assert given is not None
            action_grad.div_(given.abs().clamp_min(1.0))
