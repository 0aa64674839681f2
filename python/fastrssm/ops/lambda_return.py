"""Lambda-returns of imagined sequences.

Saved for backward: the inputs, which live anyway, and the returns: 4 bytes a step and sequence, 8
in float64.
"""

import math
from typing import Any

import torch
from torch import Tensor

from fastrssm import reference
from fastrssm._dispatch import Backend, resolve
from fastrssm._library import call_cpu, check_same, define, differentiable


def lambda_return(
    rewards: Tensor,
    next_values: Tensor,
    discount: Tensor | float,
    *,
    lambda_: float,
    backend: Backend | None = None,
) -> Tensor:
    """Mix n-step returns of all lengths, in one reverse scan.

    G_k = r_k + d_k [(1 - lambda) v_{k+1} + lambda G_{k+1}], bootstrapped with the last value. All
    tensors share shape, device and dtype (float32, bfloat16; float64 on CPU); the result is
    float32, or float64 for float64. Under autocast inputs are cast to float32. The result can be
    differentiated once; twice with backend="reference".

    Args:
        rewards: [T, B] reward of each state.
        next_values: [T, B] value of the state after it; the last row is the bootstrap.
        discount: gamma, or [T, B] gamma times the probability of going on (AIME-v2).
        lambda_: mixing weight in [0, 1].
        backend: None picks the fastest one for this device.

    Returns:
        [T, B] returns.

    Raises:
        ValueError: shapes or devices differ, rewards are not [T, B] or have no step, lambda_ is
            outside [0, 1], or a number given as discount is not finite.
        TypeError: dtypes differ or are not supported.
        RuntimeError: the requested backend is not available; the message says why.

    Source:
        Eq. 6 of Dreamer (1912.01603); a discount per state as in DreamerV2 (2010.02193).
    """
    if isinstance(discount, Tensor):
        rewards, next_values, discount = check_same(
            rewards=rewards, next_values=next_values, discount=discount
        )
    else:
        rewards, next_values = check_same(rewards=rewards, next_values=next_values)
        if not math.isfinite(discount):
            raise ValueError(f"discount is {discount}, expected a finite number or a Tensor")
    if rewards.ndim != 2 or rewards.shape[0] == 0:
        shape = list(rewards.shape)
        raise ValueError(f"rewards has shape {shape}, expected [T, B] with T > 0")
    if not 0.0 <= lambda_ <= 1.0:
        raise ValueError(f"lambda_ is {lambda_}, expected a number in [0, 1]")
    chosen = resolve("lambda_return", rewards, backend)
    if chosen == "reference":
        if rewards.dtype == torch.bfloat16:
            rewards, next_values = rewards.float(), next_values.float()
            discount = discount.float() if isinstance(discount, Tensor) else discount
        return reference.lambda_return(rewards, next_values, discount, lambda_=lambda_)
    if isinstance(discount, Tensor):
        return _lambda_return(rewards, next_values, discount, 1.0, lambda_, chosen)
    absent = rewards.new_zeros((rewards.shape[0], 0))
    return _lambda_return(rewards, next_values, absent, discount, lambda_, chosen)


def _empty_returns(rewards: Tensor, *_: Any) -> Tensor:
    dtype = torch.float32 if rewards.dtype == torch.bfloat16 else rewards.dtype
    return torch.empty(rewards.shape, dtype=dtype, device=rewards.device)


def _empty_gradients(grad: Tensor, returns: Tensor, *args: Any) -> tuple[Tensor, ...]:
    return tuple(torch.empty_like(x, memory_format=torch.contiguous_format) for x in args[:3])


def _sizes(rewards: Tensor) -> tuple[int, int, int]:
    *batches, T, B = rewards.shape
    return math.prod(batches), T, B


def _forward(*args: Any) -> Tensor:
    *inputs, discount, lambda_, backend = args
    returns = _empty_returns(*inputs)
    tensors: Any = (*inputs, returns)
    options: Any = (discount, lambda_)
    match backend:
        case "cpu":
            from fastrssm import _native

            kernel = _native.lambda_return_forward
            call_cpu(kernel, inputs[0].dtype, _sizes(returns), tensors, *options)
        case _:
            from fastrssm.kernels import lambda_return as triton

            with torch.cuda.device_of(returns):
                triton.forward(*tensors, *options)
    return returns


def _backward(*args: Any) -> tuple[Tensor, ...]:
    grad, returns, rewards, next_values, discounts, discount, lambda_, backend = args
    gradients = _empty_gradients(*args)
    tensors: Any = (grad, returns, next_values, discounts, *gradients)
    options: Any = (discount, lambda_)
    match backend:
        case "cpu":
            from fastrssm import _native

            kernel = _native.lambda_return_backward
            call_cpu(kernel, rewards.dtype, _sizes(rewards), tensors, *options)
        case _:
            from fastrssm.kernels import lambda_return as triton

            with torch.cuda.device_of(returns):
                triton.backward(*tensors, *options)
    return gradients


# [..., T, B]; discounts are absent, and `discount` then, when their last dimension is empty
_INPUTS = "Tensor rewards, Tensor next_values, Tensor discounts"
_OPTIONS = "float discount, float lambda_, str backend"
_lambda_return = differentiable(
    define(f"lambda_return({_INPUTS}, {_OPTIONS}) -> Tensor", _forward, _empty_returns),
    define(
        f"lambda_return_backward(Tensor grad, Tensor returns, {_INPUTS}, {_OPTIONS})"
        " -> (Tensor, Tensor, Tensor)",
        _backward,
        _empty_gradients,
    ),
    tensors=3,
)
