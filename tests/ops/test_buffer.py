"""Memory that large results share over time, and never at one time."""

import torch

from fastrssm import _native
from fastrssm.ops import categorical_kl

BYTES = 5 << 20


def tensor(size=BYTES):
    return torch.frombuffer(_native.Memory(size), dtype=torch.float32)


def test_memory_is_used_again_when_the_last_view_is_gone():
    one = tensor()
    view = one[3:]
    address = one.data_ptr()
    del one
    other = tensor()
    assert other.data_ptr() != address
    view.fill_(1.0)
    other.fill_(2.0)
    assert (view == 1.0).all()
    del view
    assert tensor().data_ptr() == address


def test_a_little_waits_and_much_does_not():
    half = 1 << 30  # never touched: no memory stands behind it
    many = [tensor(half), tensor(half), tensor(half)]
    kept = [x.data_ptr() for x in many[1:]]
    while many:
        many.pop(0)
    again = [tensor(half), tensor(half), tensor(half)]
    assert {x.data_ptr() for x in again[:2]} == set(kept)
    assert again[2].data_ptr() not in kept


def test_large_tensors_of_the_ops_lie_there():
    def gradient():
        logits = torch.zeros(256, 32, 256, requires_grad=True)
        return torch.autograd.grad(categorical_kl(logits, logits.detach()).sum(), logits)[0]

    seen = {gradient().data_ptr() for _ in range(8)}
    # two gradients and what is kept for them
    assert len(seen) <= 4
