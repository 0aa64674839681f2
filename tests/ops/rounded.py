"""Products of plain PyTorch with operands in bfloat16, forward and backward: what the scans' low
precisions are measured against."""

import torch
import torch.nn.functional as F
from torch.overrides import TorchFunctionMode

from fastrssm.reference.gru_cell import gru_cell


def _product(a, b, precision):
    """A @ b; bfloat16: of rounded operands; split3: of three pairs of their halves."""
    a_hi, b_hi = a.bfloat16().to(a.dtype), b.bfloat16().to(b.dtype)
    if precision == "bfloat16":
        return a_hi @ b_hi
    a_lo, b_lo = (a - a_hi).bfloat16().to(a.dtype), (b - b_hi).bfloat16().to(b.dtype)
    return a_hi @ b_hi + (a_hi @ b_lo + a_lo @ b_hi)


class _Product(torch.autograd.Function):
    @staticmethod
    def forward(ctx, a, b, precision):
        ctx.save_for_backward(a, b)
        ctx.precision = precision
        return _product(a, b, precision)

    @staticmethod
    def backward(ctx, grad):
        a, b = ctx.saved_tensors
        return _product(grad, b.mT, ctx.precision), _product(a.mT, grad, ctx.precision), None


class RoundedProducts(TorchFunctionMode):
    """Inside, the products of the reference have low precision."""

    def __init__(self, precision):
        super().__init__()
        self.precision = precision

    def __torch_function__(self, func, types, args=(), kwargs=None):
        def linear(x, weight, bias=None):
            y = _Product.apply(x, weight.mT, self.precision)
            return y if bias is None else y + bias

        if func is F.linear:
            return linear(*args)
        if func in (torch.addmm, torch.baddbmm):
            offset, x, weight = args
            return offset + _Product.apply(x, weight, self.precision)
        if func is torch.gru_cell:
            x, h, weight, state_weight, bias, state_bias = args
            gates, state = linear(x, weight, bias), linear(h, state_weight, state_bias)
            return gru_cell(gates, h, cell="torch_gru", state_gates=state)
        return func(*args, **(kwargs or {}))
