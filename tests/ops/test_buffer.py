"""Memory that large results share over time, and never at one time."""

import torch

from fastrssm import _native

BYTES = 5 << 20


def tensor(size=BYTES):
    return torch.frombuffer(_native.Buffer(size), dtype=torch.float32)


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


def test_only_two_wait():
    many = [tensor(BYTES + k * (2 << 20)) for k in range(6)]
    sizes = [x.numel() * 4 for x in many]
    addresses = [x.data_ptr() for x in many]
    while many:
        many.pop(0)
    # the last two given back are there for who asks for their sizes
    assert [tensor(size).data_ptr() for size in sizes[-2:]] == addresses[-2:]
