"""The library `torch.ops.fastrssm`; the checks and the autograd wiring that its ops share."""

import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd import Function
from torch.nn import Parameter
from torch.utils import _pytree

LIBRARY = torch.library.Library("fastrssm", "DEF")
_LARGE = 1 << 22  # bytes
_DTYPES = (torch.float32, torch.bfloat16, torch.float64)
_PRECISIONS = {"highest": "float32", "high": "split3", "medium": "bfloat16"}


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


def empty_again(shape: Sequence[int], *, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Like torch.empty; on the CPU large tensors lie in memory that is used again.

    Fresh pages would cost a large forward and backward up to a fifth of its time.
    """
    numel = math.prod(shape)
    size = numel * dtype.itemsize
    traced = torch.compiler.is_compiling() or torch._C._len_torch_dispatch_stack() > 0
    if device.type != "cpu" or size < _LARGE or traced:
        return torch.empty(shape, dtype=dtype, device=device)
    from fastrssm import _native

    return torch.frombuffer(_native.Memory(size), dtype=dtype, count=numel).view(shape)


def precision_of_products(dtype: torch.dtype, *, mixed: bool) -> str:
    """Return how CPU kernels multiply operands of `dtype`; `mixed`: under autocast."""
    if dtype == torch.float64:
        return "float32"
    return "bfloat16" if mixed else _chosen_precision()


def _chosen_precision() -> str:
    return _PRECISIONS[torch.get_float32_matmul_precision()]


# torch.compile takes the precision of the moment at which it compiles, as for products of its own
_chosen_precision._dynamo_marked_constant = True  # type: ignore[attr-defined]


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


def one_by_one(op: Any, info: Any, in_dims: Any, args: Any) -> tuple[Any, Any]:
    """Apply an op to each entry of the mapped dimensions: the rule of vmap for anything."""

    def entry(x: Any, dim: int | None, i: int) -> Any:
        return x if dim is None else x.select(dim, i)

    runs = [
        op(*_pytree.tree_map(lambda x, dim, i=i: entry(x, dim, i), args, in_dims))
        for i in range(info.batch_size)
    ]
    stacked = [torch.stack(results) for results in zip(*runs, strict=True)]
    return type(runs[0])(stacked), type(runs[0])([0] * len(stacked))


class Op(NamedTuple):
    """An op as torch.compile, vmap and modes see it, and the function behind it."""

    traced: Any
    kernel: Callable[..., Any]


def define(
    schema: str,
    kernel: Callable[..., Any],
    fake: Callable[..., Any],
    vmap: Callable[..., tuple[Any, Any]] | None = None,
) -> Op:
    """Define an op.

    Args:
        schema: the op's signature.
        kernel: computes it from contiguous tensors.
        fake: returns empty tensors like the result, for tracing.
        vmap: its rule for a mapped dimension. None: its rows are independent, all tensors come
            first and have the same leading dimensions.
    """
    name = schema[: schema.index("(")]

    def dense(x: Any) -> Any:
        if isinstance(x, list):
            return [dense(entry) for entry in x]  # pyright: ignore[reportUnknownVariableType]
        return x.contiguous() if isinstance(x, Tensor) else x

    def from_anywhere(*args: Any) -> Any:
        # a compiler may choose other strides than the public function did
        return kernel(*map(dense, args))

    LIBRARY.define(schema)
    LIBRARY.impl(name, from_anywhere, "CompositeExplicitAutograd")
    traced = getattr(torch.ops.fastrssm, name).default

    def independent(info: Any, in_dims: tuple[int | None, ...], *args: Any) -> tuple[Any, Any]:
        # the mapped dimension becomes one more leading dimension
        def batched(x: Any, dim: int | None) -> Any:
            if not isinstance(x, Tensor):
                return x
            x = x.expand(info.batch_size, *x.shape) if dim is None else x.movedim(dim, 0)
            return x.contiguous()

        result = traced(*map(batched, args, in_dims))
        return result, (0,) * len(result) if isinstance(result, tuple) else 0

    torch.library.register_fake(traced, fake, lib=LIBRARY)
    torch.library.register_vmap(traced, vmap or independent, lib=LIBRARY)
    return Op(traced, kernel)


def differentiable(forward: Op, backward: Op, tensors: int) -> Callable[..., Tensor]:
    """Join two ops by autograd and return the function to call instead of the first.

    The forward op takes `tensors` tensors, then options, and returns the result, or a tuple of it
    and of what only its backward needs. The backward op takes the gradient of the result, all that
    the forward op returned, the tensors and the options, and returns one gradient per tensor. A
    second backward raises: a wrong one would be silent.
    """

    def save(ctx: Any, inputs: tuple[Any, ...], output: Tensor | tuple[Tensor, ...]) -> None:
        results = output if isinstance(output, tuple) else (output,)
        ctx.save_for_backward(*results, *inputs[:tensors])
        ctx.options = inputs[tensors:]

    # the other results are not handed out, so nothing depends on them
    def gradients(run: Callable[..., Any], ctx: Any, grad: Tensor, *_: Any) -> tuple[Any, ...]:
        found = run(grad.contiguous(), *ctx.saved_tensors, *ctx.options)
        return *found, *(None for _ in ctx.options)

    refuse = _refusal_of(forward)
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
            return output[0] if isinstance(output, tuple) else output

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
        def forward(*args: Any) -> Any:
            return forward.traced(*args)

        setup_context = staticmethod(save)

        @staticmethod
        def backward(ctx: Any, *grads: Any) -> tuple[Any, ...]:
            return gradients(TransformedBackward.apply, ctx, *grads)

    def results(*args: Any) -> Any:
        if torch.compiler.is_compiling():
            return forward.traced(*args)
        if torch._C._are_functorch_transforms_active():
            return Transformed.apply(*args)
        inputs = args[:tensors]
        if not _PLAIN.issuperset(map(type, inputs)) or torch._C._len_torch_dispatch_stack() > 0:
            return forward.traced(*args)
        if torch.is_grad_enabled() and any(x.requires_grad for x in inputs):
            return Eager.apply(*args)
        return forward.kernel(*args)

    def call(*args: Any) -> Tensor:
        found = results(*args)
        return found[0] if isinstance(found, tuple) else found

    return call


def differentiable_with_weights(
    forward: Op, backward: Op, tensors: int
) -> Callable[..., tuple[Tensor, ...]]:
    """Join two ops with absent inputs, a list of weights and several results by autograd.

    The forward op takes `tensors` tensors or None, a list of weights, options, and whether to keep
    what its backward needs; it returns tensors, the last of which is that. The backward op takes
    the gradients of the other results (None: zero), all that the forward op took, the list of its
    results, and whether the gradient of each input and weight is wanted; it returns the list of
    those. A second backward raises. The returned function takes what the forward op takes, except
    for the last argument.
    """

    def save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        weights = inputs[tensors]
        ctx.save_for_backward(*inputs[:tensors], *weights, *output)
        ctx.end, ctx.options = tensors + len(weights), inputs[tensors + 1 :]
        ctx.set_materialize_grads(False)

    def gradients(
        run: Callable[..., Any], ctx: Any, wanted: Sequence[bool], *grads: Tensor | None
    ) -> list[Tensor | None]:
        given = (None if g is None else g.contiguous() for g in grads[:-1])
        saved, end = ctx.saved_tensors, ctx.end
        args = *saved[:tensors], list(saved[tensors:end]), *ctx.options
        found = iter(run(*given, *args, list(saved[end:]), list(wanted)))
        return [next(found) if want else None for want in wanted]

    def traced_gradients(ctx: Any, *grads: Tensor | None) -> tuple[Any, ...]:
        wanted = *ctx.needs_input_grad[:tensors], *ctx.needs_input_grad[tensors]
        found = gradients(backward.traced, ctx, wanted, *grads)
        return *found[:tensors], found[tensors:], *(None for _ in ctx.options)

    refuse = _refusal_of(forward)
    torch.library.register_autograd(
        forward.traced, traced_gradients, setup_context=save, lib=LIBRARY
    )
    torch.library.register_autograd(backward.traced, refuse, lib=LIBRARY)

    # arguments of a Function are flat: the number of weights first
    class Eager(Function):
        @staticmethod
        def forward(ctx: Any, weights: int, *flat: Any) -> tuple[Tensor, ...]:
            end = tensors + weights
            args = *flat[:tensors], flat[tensors:end], *flat[end:]
            results = forward.kernel(*args)
            save(ctx, args, results)
            ctx.mark_non_differentiable(results[-1])
            return results

        @staticmethod
        def backward(ctx: Any, *grads: Any) -> tuple[Any, ...]:
            # with create_graph the op that refuses a second backward
            run = backward.traced if torch.is_grad_enabled() else backward.kernel
            found = gradients(run, ctx, ctx.needs_input_grad[1 : 1 + ctx.end], *grads)
            return None, *found, *(None for _ in ctx.options)

    # torch.func: the structure of the arguments first
    class TransformedBackward(Function):
        generate_vmap_rule = True

        @staticmethod
        def forward(spec: Any, *leaves: Any) -> Any:
            return tuple(backward.traced(*_pytree.tree_unflatten(leaves, spec)))

        @staticmethod
        def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
            pass

        backward = staticmethod(refuse)

    class Transformed(Function):
        generate_vmap_rule = True

        @staticmethod
        def forward(spec: Any, *leaves: Any) -> tuple[Tensor, ...]:
            return forward.traced(*_pytree.tree_unflatten(leaves, spec))

        @staticmethod
        def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
            spec, *leaves = inputs
            save(ctx, _pytree.tree_unflatten(leaves, spec), output)
            ctx.leaves = len(leaves)

        @staticmethod
        def backward(ctx: Any, *grads: Any) -> tuple[Any, ...]:
            found = gradients(
                partial(_apply_flat, TransformedBackward),
                ctx,
                ctx.needs_input_grad[1 : 1 + ctx.end],
                *grads,
            )
            return None, *found, *(None for _ in range(ctx.leaves - ctx.end))

    def call(*args: Any) -> tuple[Tensor, ...]:
        given = *args[:tensors], *args[tensors]
        keep = torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in given)
        if torch.compiler.is_compiling():
            return forward.traced(*args, keep)
        if torch._C._are_functorch_transforms_active():
            return _apply_flat(Transformed, *args, keep)
        if not _PLAIN.issuperset(map(type, given)) or torch._C._len_torch_dispatch_stack() > 0:
            # modes look into lists, not into subclasses of them
            return forward.traced(*args[:tensors], [*args[tensors]], *args[tensors + 1 :], keep)
        if keep:
            return Eager.apply(len(args[tensors]), *given, *args[tensors + 1 :], keep)
        return forward.kernel(*args, keep)

    return call


_PLAIN = frozenset((Tensor, Parameter, type(None)))


def _apply_flat(function: type[Function], *args: Any) -> Any:
    leaves, spec = _pytree.tree_flatten(args)
    return function.apply(spec, *leaves)


def _refusal_of(forward: Op) -> Callable[..., None]:
    def refuse(ctx: Any, *grads: Any) -> None:
        raise RuntimeError(
            f"{forward.traced} has no second derivative, expected backend='reference', which has"
        )

    return refuse
