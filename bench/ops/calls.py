"""One call of a provider, and all providers of one function, as bench/ops measures them."""

from functools import partial

import torch

import fastrssm
from bench.cuda import captured

MODES = ("fwd", "fwdbwd")


def is_tensor(x):
    return isinstance(x, torch.Tensor)


def call_of(function, mode, inputs):
    """`inputs`: tensors, of which some ask for a gradient, and numbers or None."""
    if mode == "fwd":
        fixed = [x.detach() if is_tensor(x) else x for x in inputs]
        return lambda: function(*fixed)
    asked = [x for x in inputs if is_tensor(x) and x.requires_grad]
    weight = torch.ones_like(function(*inputs).detach())
    return lambda: torch.autograd.grad(function(*inputs), asked, weight)


def with_graphs(calls, device):
    """Beside what is compiled and what is ours, on a GPU, the same in CUDA graphs."""
    ends = ("compiled", "-cuda", "-triton")
    names = [name for name in calls if device == "cuda" and name.endswith(ends)]
    return calls | {f"{name}-graph": captured(calls[name]) for name in names}


def providers(op, peers, mode, inputs, **options):
    """Every peer, eager and compiled, and the op on every backend that their device has."""
    able, device = fastrssm.backends()[op.__name__], inputs[0].device.type
    torch.compiler.reset()
    functions = {}
    for name, peer in peers.items():
        functions[name] = peer
        functions[f"{name}-compiled"] = torch.compile(peer, dynamic=False)
    for backend in ("cpu", "reference") if device == "cpu" else ("cuda", "triton", "reference"):
        if able[backend] is None:
            functions[f"fastrssm-{backend}"] = partial(op, backend=backend, **options)
    found = {name: call_of(function, mode, inputs) for name, function in functions.items()}
    return with_graphs(found, device)
