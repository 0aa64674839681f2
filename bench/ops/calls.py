"""One call of a provider, and all providers of one function, as bench/ops measures them."""

from functools import partial

import torch

import fastrssm

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


def providers(op, peers, mode, inputs, **options):
    """Every peer, eager and compiled, and the op on every backend that a CPU has."""
    able = fastrssm.backends()[op.__name__]
    torch.compiler.reset()
    functions = {}
    for name, peer in peers.items():
        functions[name] = peer
        functions[f"{name}-compiled"] = torch.compile(peer, dynamic=False)
    for backend in ("cpu", "reference"):
        if able[backend] is None:
            functions[f"fastrssm-{backend}"] = partial(op, backend=backend, **options)
    return {name: call_of(function, mode, inputs) for name, function in functions.items()}
