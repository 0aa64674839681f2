"""One step of an optimiser: its length, and what is clipped."""

import math
from copy import deepcopy as copy_of

import pytest
import torch
from torch import nn

from fastrssm.run.step import build_optimizer, set_learning_rate, take_step


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


def network():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(32, 40), nn.ELU(), nn.Linear(40, 3))


def test_muon_makes_the_steps_of_matrices_orthogonal_and_leaves_the_rest_to_adam():
    net, plain = network(), network()
    x = torch.randn(64, 32)
    for model, optimizer in (
        (net, build_optimizer("muon", net.parameters(), 0.01)),
        (plain, build_optimizer("adam", plain.parameters(), 0.01)),
    ):
        set_learning_rate(optimizer, 0.01, decay=1.0, step=3, updates=4)
        take_step(optimizer, model(x).square().sum(), 1e9)
    before = network()
    (wide, bias, *head), (_, *plain_rest) = net.parameters(), plain.parameters()
    for ours, adams in zip((bias, *head), plain_rest, strict=True):
        assert torch.equal(ours, adams)
    # all singular values of a step are alike: lr x 0.2 x sqrt(the longer side)
    _, sizes, _ = torch.linalg.svd((wide - before[0].weight).detach())
    expected = 0.005 * 0.2 * math.sqrt(40)
    assert 0.6 * expected < sizes.min()
    assert sizes.max() < 1.3 * expected


@pytest.mark.parametrize("rule", ["adam", "muon"])
def test_all_parameters_shrink_apart_from_the_gradient(rule):
    net, plain = network(), network()
    x = torch.randn(64, 32)
    for model, weight_decay in ((net, 0.5), (plain, 0.0)):
        optimizer = build_optimizer(rule, model.parameters(), 1.0, weight_decay)
        set_learning_rate(optimizer, 0.02, decay=0.0, step=1, updates=1)
        take_step(optimizer, model(x).square().sum(), 1e9)
    for ours, other, before in zip(
        net.parameters(), plain.parameters(), network().parameters(), strict=True
    ):
        assert torch.allclose(ours, other - 0.01 * before, rtol=0, atol=1e-6)


@pytest.mark.parametrize("rule", ["adam", "muon"])
def test_an_optimiser_goes_on_where_it_stopped(rule):
    x = torch.randn(8, 32)

    def steps(net, optimizer, count):
        for _ in range(count):
            take_step(optimizer, net(x).square().sum(), 1.0)

    net, copy = network(), network()
    optimizer = build_optimizer(rule, net.parameters(), 0.01)
    steps(net, optimizer, 2)
    copy.load_state_dict(net.state_dict())
    resumed = build_optimizer(rule, copy.parameters(), 0.01)
    resumed.load_state_dict(copy_of(optimizer.state_dict()))
    steps(net, optimizer, 2)
    steps(copy, resumed, 2)
    for ours, theirs in zip(net.parameters(), copy.parameters(), strict=True):
        assert torch.equal(ours, theirs)


def test_without_a_pytorch_that_has_muon(monkeypatch):
    monkeypatch.delattr(torch.optim, "Muon")
    with pytest.raises(RuntimeError, match=r"has no Muon, expected 2\.9 or newer"):
        build_optimizer("muon", network().parameters(), 0.01)
