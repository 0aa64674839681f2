"""The library `torch.ops.fastrssm`; the checks and the autograd wiring that its ops share."""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd import Function
from torch.nn import Parameter

LIBRARY = torch.library.Library("fastrssm", "DEF")
_DTYPES = (torch.float32, torch.bfloat16, torch.float64)


def check_same(**tensors: Tensor) -> tuple[Tensor, ...]:
    """Return the tensors, contiguous; raise unless they agree in shape, dtype and device.

    Under autocast they are cast to float32, as torch does for its own losses.
    """
    first_name, first = next(iter(tensors.items()))
    for name, tensor in tensors.items():
        if not isinstance(tensor, Tensor):  # pyright: ignore[reportUnnecessaryIsInstance]
            raise TypeError(f"{name} is a {type(tensor).__name__}, expected a Tensor")
    if torch.is_autocast_enabled(first.device.type):
        tensors = {name: tensor.float() for name, tensor in tensors.items()}
        first = tensors[first_name]
    shape, dtype, device = first.shape, first.dtype, first.device
    if not shape:
        raise ValueError(f"{first_name} has shape [], expected [..., S]")
    if dtype not in _DTYPES:
        raise TypeError(f"{first_name} is {dtype}, expected one of {_DTYPES}")
    for name, tensor in tensors.items():
        if tensor.shape != shape:
            shapes = f"{list(tensor.shape)}, expected {list(shape)}"
            raise ValueError(f"{name} has shape {shapes} like {first_name}")
        if tensor.dtype != dtype:
            raise TypeError(f"{name} is {tensor.dtype}, expected {dtype} like {first_name}")
        if tensor.device != device:
            raise ValueError(f"{name} is on {tensor.device}, expected {device} like {first_name}")
    return tuple(tensor.contiguous() for tensor in tensors.values())


def call_cpu(
    kernel: Callable[..., None],
    dtype: torch.dtype,
    sizes: tuple[int, ...],
    tensors: Sequence[Tensor],
    *options: float,
) -> None:
    """Call a native CPU kernel on as many threads as torch uses."""
    addresses = [x.data_ptr() for x in tensors]
    kernel(torch.get_num_threads(), str(dtype), *sizes, *addresses, *options)


def call_cuda(
    kernel: Callable[..., None],
    dtype: torch.dtype,
    sizes: tuple[int, ...],
    tensors: Sequence[Tensor],
    *options: float,
) -> None:
    """Call a native CUDA kernel on the tensors' device and its current stream."""
    addresses = [x.data_ptr() for x in tensors]
    with torch.cuda.device_of(tensors[0]):
        stream = torch.cuda.current_stream().cuda_stream
        kernel(stream, str(dtype), *sizes, *addresses, *options)


class Op(NamedTuple):
    """An op as torch.compile, vmap and modes see it, and the function behind it."""

    traced: Any
    kernel: Callable[..., Any]


def define(schema: str, kernel: Callable[..., Any], fake: Callable[..., Any]) -> Op:
    """Define an op whose rows are independent.

    Args:
        schema: the op's signature; tensors come first, all with the same leading dimensions.
        kernel: computes it from contiguous tensors.
        fake: returns empty tensors like the result, for tracing.
    """
    name = schema[: schema.index("(")]

    def from_anywhere(*args: Any) -> Any:
        # a compiler may choose other strides than the public function did
        return kernel(*(x.contiguous() if isinstance(x, Tensor) else x for x in args))

    LIBRARY.define(schema)
    LIBRARY.impl(name, from_anywhere, "CompositeExplicitAutograd")
    traced = getattr(torch.ops.fastrssm, name).default

    def vmap(info: Any, in_dims: tuple[int | None, ...], *args: Any) -> tuple[Any, Any]:
        # the mapped dimension becomes one more leading dimension
        def batched(x: Any, dim: int | None) -> Any:
            if not isinstance(x, Tensor):
                return x
            x = x.expand(info.batch_size, *x.shape) if dim is None else x.movedim(dim, 0)
            return x.contiguous()

        result = traced(*map(batched, args, in_dims))
        return result, (0,) * len(result) if isinstance(result, tuple) else 0

    torch.library.register_fake(traced, fake, lib=LIBRARY)
    torch.library.register_vmap(traced, vmap, lib=LIBRARY)
    return Op(traced, kernel)


def differentiable(forward: Op, backward: Op, tensors: int) -> Callable[..., Tensor]:
    """Join two ops by autograd and return the function to call instead of the first.

    The forward op takes `tensors` tensors, then options, and returns one tensor. The backward op
    takes the gradient of the result, the result, the tensors and the options, and returns one
    gradient per tensor. A second backward raises: a wrong one would be silent.
    """

    def save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        ctx.save_for_backward(output, *inputs[:tensors])
        ctx.options = inputs[tensors:]

    def gradients(run: Callable[..., Any], ctx: Any, grad: Tensor) -> tuple[Any, ...]:
        found = run(grad.contiguous(), *ctx.saved_tensors, *ctx.options)
        return *found, *(None for _ in ctx.options)

    def refuse(ctx: Any, *grads: Any) -> None:
        raise RuntimeError(
            f"{forward.traced} has no second derivative, expected backend='reference', which has"
        )

    torch.library.register_autograd(
        forward.traced, partial(gradients, backward.traced), setup_context=save, lib=LIBRARY
    )
    torch.library.register_autograd(backward.traced, refuse, lib=LIBRARY)

    # eager: a third of the cost of the registered formulas
    class Eager(Function):
        @staticmethod
        def forward(ctx: Any, *args: Any) -> Tensor:
            output = forward.kernel(*args)
            save(ctx, args, output)
            return output

        @staticmethod
        def backward(ctx: Any, *grads: Any) -> tuple[Any, ...]:
            # with create_graph the op that refuses a second backward
            run = backward.traced if torch.is_grad_enabled() else backward.kernel
            return gradients(run, ctx, *grads)

    # torch.func sees neither registered formulas nor a forward that takes ctx
    class TransformedBackward(Function):
        generate_vmap_rule = True

        @staticmethod
        def forward(*args: Any) -> Any:
            return backward.traced(*args)

        @staticmethod
        def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
            pass

        backward = staticmethod(refuse)

    class Transformed(Function):
        generate_vmap_rule = True

        @staticmethod
        def forward(*args: Any) -> Tensor:
            return forward.traced(*args)

        setup_context = staticmethod(save)

        @staticmethod
        def backward(ctx: Any, *grads: Any) -> tuple[Any, ...]:
            return gradients(TransformedBackward.apply, ctx, *grads)

    def call(*args: Any) -> Tensor:
        if torch.compiler.is_compiling():
            return forward.traced(*args)
        if torch._C._are_functorch_transforms_active():
            return Transformed.apply(*args)
        inputs = args[:tensors]
        plain = all(type(x) in (Tensor, Parameter) for x in inputs)
        if not plain or torch._C._len_torch_dispatch_stack() > 0:
            return forward.traced(*args)
        if torch.is_grad_enabled() and any(x.requires_grad for x in inputs):
            return Eager.apply(*args)
        return forward.kernel(*args)

    return call
