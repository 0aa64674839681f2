"""gru_cell against nn.GRUCell and the equations of the papers, one unit at a time."""

import math

import pytest
import torch
from torch import nn

from fastrssm.ops import gru_cell

D, B, BLOCKS = 6, 3, 2


def sample(cell: str, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor, dict[str, torch.Tensor]]:
    """Gates, state and the further tensors of a cell, in float64."""
    g = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return torch.randn(*shape, generator=g, dtype=torch.float64).requires_grad_()

    gates, deter = normal(B, 3 * D), normal(B, D)
    if cell == "torch_gru":
        return gates, deter, {"state_gates": normal(B, 3 * D)}
    if cell == "block_gru":
        return gates, deter, {}
    return gates, deter, {"scale": normal(3 * D), "shift": normal(3 * D)}


def sigmoid(x: float) -> float:
    return 1.0 / (1.0 + math.exp(-x))


def test_torch_gru_is_nn_gru_cell():
    torch.manual_seed(0)
    module = nn.GRUCell(4, D).double()
    x, h = torch.randn(B, 4, dtype=torch.float64), torch.randn(B, D, dtype=torch.float64)
    gates = x @ module.weight_ih.T + module.bias_ih
    state_gates = h @ module.weight_hh.T + module.bias_hh
    got = gru_cell(gates, h, cell="torch_gru", state_gates=state_gates)
    torch.testing.assert_close(got, module(x, h), rtol=1e-14, atol=1e-15)


@pytest.mark.parametrize(("cell", "eps"), [("ln_gru_a", 1e-5), ("ln_gru_d", 1e-3)])
def test_normalised_cells_by_their_equations(cell, eps):
    gates, deter, more = sample(cell)
    got = gru_cell(gates, deter, cell=cell, **more)
    for b in range(B):
        y = gates[b].tolist()
        mean = sum(y) / len(y)
        variance = sum((v - mean) ** 2 for v in y) / len(y)
        y = [
            (v - mean) / math.sqrt(variance + eps) * s + t
            for v, s, t in zip(y, more["scale"].tolist(), more["shift"].tolist(), strict=True)
        ]
        for d in range(D):
            first, second, third, h = y[d], y[D + d], y[2 * D + d], deter[b, d].item()
            if cell == "ln_gru_a":  # z, r, o
                z, o = sigmoid(first), math.tanh(sigmoid(second) * third)
                expected = (1 - z) * o + z * h
            else:  # r, c, u
                u, c = sigmoid(third - 1), math.tanh(sigmoid(first) * second)
                expected = u * c + (1 - u) * h
            assert got[b, d].item() == pytest.approx(expected, rel=1e-12)


def test_block_gru_by_its_equations():
    gates, deter, _ = sample("block_gru")
    got = gru_cell(gates, deter, cell="block_gru", blocks=BLOCKS)
    size = D // BLOCKS
    for b in range(B):
        for d in range(D):
            block, unit = divmod(d, size)
            at = 3 * size * block + unit
            r, c, u = (gates[b, at + k * size].item() for k in range(3))
            u, c = sigmoid(u - 1), math.tanh(sigmoid(r) * c)
            expected = u * c + (1 - u) * deter[b, d].item()
            assert got[b, d].item() == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("cell", ["torch_gru", "ln_gru_a", "ln_gru_d", "block_gru"])
def test_gradcheck(cell):
    gates, deter, more = sample(cell)
    names = tuple(more)

    def run(gates, deter, *tensors):
        given = dict(zip(names, tensors, strict=True))
        return gru_cell(gates, deter, cell=cell, blocks=BLOCKS, **given)

    assert torch.autograd.gradcheck(run, (gates, deter, *more.values()))


@pytest.mark.parametrize("cell", ["torch_gru", "ln_gru_a", "ln_gru_d", "block_gru"])
def test_extreme_gates_stay_finite_and_bounded(cell):
    gates, deter, more = sample(cell)
    got = gru_cell(gates * 1e6, deter.clamp(-1, 1), cell=cell, blocks=BLOCKS, **more)
    assert (got.abs() <= 1.0).all()


def test_leading_dimensions_do_not_matter():
    gates, deter, more = sample("ln_gru_a")
    folded = gru_cell(gates.unsqueeze(0), deter.unsqueeze(0), cell="ln_gru_a", **more)
    assert torch.equal(folded[0], gru_cell(gates, deter, cell="ln_gru_a", **more))
