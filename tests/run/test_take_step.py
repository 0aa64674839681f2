"""One step of an optimiser: its length, and what is clipped."""

import math

import pytest
import torch

from fastrssm.run.step import set_learning_rate, take_step


@pytest.mark.parametrize(
    ("decay", "rates"),
    [(0.0, [8.0] * 4), (0.5, [8.0, 8.0, 8.0, 4.0]), (1.0, [8.0, 6.0, 4.0, 2.0])],
)
def test_the_learning_rate_falls_at_the_end(decay, rates):
    optimizer = torch.optim.Adam([torch.zeros(1, requires_grad=True)], lr=1.0)
    seen = []
    for step in range(1, 5):
        set_learning_rate(optimizer, 8.0, decay=decay, step=step, updates=4)
        seen.append(optimizer.param_groups[0]["lr"])
    assert seen == rates


def test_a_gradient_is_clipped_as_a_whole_and_what_stands_apart_by_itself():
    # gradients (3, 4) and 12; of both together 13
    a, b, c = (torch.zeros(1, requires_grad=True) for _ in range(3))
    optimizer = torch.optim.SGD([a, b, c], lr=1.0)

    def step(grad_clip, apart=()):
        with torch.no_grad():
            for parameter in (a, b, c):
                parameter.zero_()
        loss = (3 * a + 4 * b + 12 * c).sum()
        norm = take_step(optimizer, loss, grad_clip, apart)
        return [norm.item(), *(-parameter.item() for parameter in (a, b, c))]

    assert step(100.0) == [13, 3, 4, 12]
    assert step(1.3) == pytest.approx([13, 0.3, 0.4, 1.2], rel=1e-5)
    assert step(5.0, apart=(x for x in [c])) == pytest.approx([5, 3, 4, 5], rel=1e-5)
    assert step(1.0, apart=[c]) == pytest.approx([5, 0.6, 0.8, 1], rel=1e-5)


def test_what_stands_apart_does_not_touch_the_rest():
    a, b = (torch.zeros(1, requires_grad=True) for _ in range(2))
    optimizer = torch.optim.SGD([a, b], lr=1.0)
    norm = take_step(optimizer, (a + math.inf * b).sum(), 0.5, [b])
    assert (norm.item(), a.item()) == pytest.approx((1.0, -0.5))
