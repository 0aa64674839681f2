"""The prepared step of acting is the step of `observe`: in its bits, after any change, or not."""

import copy
import pickle
import threading
from dataclasses import replace

import pytest
import torch
from torch import nn

import fastrssm
from fastrssm.models.rssm import (
    AIME_RSSM,
    AIME_RSSMO,
    AIME_V2_DISCRETE,
    AIME_V2_RSSMO,
    DREAMER_V3_1M,
    RSSM,
    State,
)
from tests.checks import assert_matches

CONFIGS = {
    "rssm": replace(AIME_RSSM, deter=40, stoch=12, hidden=17),
    "rssmo": replace(AIME_RSSMO, deter=40, stoch=12, hidden=17),
    "rssmo_v2": replace(AIME_V2_RSSMO, deter=40, stoch=12, hidden=17),
    "discrete": replace(AIME_V2_DISCRETE, deter=40, stoch=12, groups=3, hidden=17, unimix=0.1),
    "dreamer_v3": replace(DREAMER_V3_1M, deter=40, stoch=12, groups=3, hidden=17),
}
E, A = 5, 2


def build(name="rssm"):
    torch.manual_seed(0)
    return RSSM(CONFIGS[name], E, A)


def inputs(rssm, B, seed=1):
    """Arguments of `step`: embed, action, state, noise, is_first."""
    g = torch.Generator().manual_seed(seed)
    config = rssm.config
    sizes = E, A, config.deter, config.stoch
    embed, action, deter, stoch = (torch.randn(B, size, generator=g) for size in sizes)
    noise = rssm.draw_noise(B, generator=g)
    return embed, action, State(deter, stoch), noise, torch.rand(B, generator=g) < 0.3


def stepped(rssm, embed, action, state, noise, is_first=None):
    return rssm.step(embed, action, state, noise=noise, is_first=is_first)


def observed(rssm, embed, action, state, noise, is_first=None):
    """The same through the op."""
    first = None if is_first is None else is_first[None]
    found = rssm.observe(embed[None], action[None], noise=noise[None], is_first=first, state=state)
    return State(found.deter[0], found.stoch[0])


def same(one, other):
    return all(map(torch.equal, one, other))


@pytest.fixture
def prepared_only(monkeypatch):
    """Without the way through the op."""
    monkeypatch.delattr(RSSM, "observe")


@pytest.fixture
def ways(monkeypatch):
    """Count the steps that go through the op."""
    seen, observe = [], RSSM.observe
    monkeypatch.setattr(RSSM, "observe", lambda *a, **k: seen.append(1) or observe(*a, **k))
    return seen


@pytest.fixture(params=["highest", "high", "medium", "autocast"])
def precision(request):
    before = torch.get_float32_matmul_precision()
    mixed = request.param == "autocast"
    torch.set_float32_matmul_precision("highest" if mixed else request.param)
    with torch.autocast("cpu", torch.bfloat16, enabled=mixed):
        yield
    torch.set_float32_matmul_precision(before)


@torch.no_grad()
@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("B", [1, 3, 64, 131])
def test_same_bits_as_the_op(name, B, precision, ways):
    """Where the projection is exact in any order and precision: small multiples of 1/8."""
    rssm = build(name)
    for head in rssm._nets("posterior"):
        first = head.net[0]
        first.weight[:, rssm.config.deter :].mul_(8).round_().div_(8)
        first.bias.mul_(8).round_().div_(8)
    embed, *others = inputs(rssm, B)
    embed = embed.mul(4).round().div(4)
    for is_first in (others.pop(), None):
        expected = observed(rssm, embed, *others, is_first)
        assert len(ways) == 1
        assert same(stepped(rssm, embed, *others, is_first), expected)
        assert len(ways) == 1
        ways.clear()


@torch.no_grad()
@pytest.mark.parametrize("name", ["rssm", "rssmo", "rssmo_v2"])
def test_error_is_that_of_the_reference(name):
    rssm = build(name)
    args = inputs(rssm, 7)
    got = stepped(rssm, *args)
    with fastrssm.use_backend("reference"):
        plain = stepped(rssm, *args)
        wide = [x.double() if torch.is_tensor(x) else State(*(y.double() for y in x)) for x in args]
        wide[-1] = args[-1]
        exact = stepped(copy.deepcopy(rssm).double(), *wide)
    for part, x, reference, other in zip(State._fields, got, exact, plain, strict=True):
        assert_matches(part, x, reference, other)


def changes(rssm):
    """Ways to change parameters, and modules, without gradient."""
    half, third = ({k: f * x for k, x in rssm.state_dict().items()} for f in (1 / 2, 1 / 3))

    def replace_data():
        # twice: the second may lie where the first was
        for _ in range(2):
            for x in rssm.parameters():
                x.data = 0.9 * x.data

    def replace_bias():
        rssm.memory_cell.bias_hh = nn.Parameter(torch.ones_like(rssm.memory_cell.bias_hh))

    def replace_layer():
        layer = rssm.posterior_mean.net[2]
        rssm.posterior_mean.net[2] = nn.Linear(layer.in_features, layer.out_features)

    def replace_net():
        rssm.posterior_std = copy.deepcopy(rssm.prior_std)
        rssm.posterior_std.net[0] = nn.Linear(rssm.config.deter + E, rssm.config.hidden)

    def fused_step():
        optimizer = torch.optim.Adam(rssm.parameters(), lr=0.1, fused=True)
        for x in rssm.parameters():
            x.grad = torch.ones_like(x)
        optimizer.step()

    return (
        lambda: [x.mul_(1.1) for x in rssm.parameters()],
        lambda: rssm.load_state_dict(half),
        lambda: rssm.load_state_dict(third, assign=True),
        replace_data, replace_bias, replace_layer, replace_net, fused_step,
    )  # fmt: skip


@torch.no_grad()
def test_every_change_is_seen(ways):
    rssm = build()
    args = inputs(rssm, 3)
    before = stepped(rssm, *args)
    for change in changes(rssm):
        change()
        ways.clear()
        now = stepped(rssm, *args)
        assert not ways
        assert not same(now, before)
        torch.testing.assert_close(now, observed(rssm, *args))
        before = now


def test_a_training_step_may_change_parameters_behind_their_versions():
    rssm = build()
    args = inputs(rssm, 3)
    with torch.no_grad():
        stepped(rssm, *args)
    observed(rssm, *args).deter.sum().backward()
    for x in rssm.parameters():
        x.data.add_(0.1)
    with torch.no_grad():
        torch.testing.assert_close(stepped(rssm, *args), observed(rssm, *args))


@torch.no_grad()
def test_prepared_once_while_nothing_changes(prepared_only):
    rssm = build()
    args = inputs(rssm, 3)
    first = stepped(rssm, *args)
    prepared = rssm._step.get(rssm, None, None)
    assert same(stepped(rssm, *args), first)
    with torch.inference_mode():
        assert same(stepped(rssm, *args), first)
    assert rssm._step.get(rssm, None, None) is prepared


def test_gradients_flow_through_the_op(ways):
    rssm = build()
    stepped(rssm, *inputs(rssm, 4)).deter.sum().backward()
    assert all(x.grad is not None for x in rssm.memory_cell.parameters())
    assert len(ways) == 1


@torch.no_grad()
def test_what_is_not_prepared_goes_through_the_op(ways):
    rssm = build()
    embed, action, state, noise, is_first = args = inputs(rssm, 4)
    expected = stepped(rssm, *args)
    assert not ways
    wide = torch.randn(4, 2 * E)
    wide[:, ::2] = embed
    torch.testing.assert_close(stepped(rssm, wide[:, ::2], *args[1:]), expected)
    assert len(ways) == 1
    with fastrssm.use_backend("reference"):
        torch.testing.assert_close(stepped(rssm, *args), expected)
    assert len(ways) == 2
    twice = [torch.stack((x, x)) for x in (embed, action, *state, noise, is_first)]
    mapped = torch.vmap(lambda *x: stepped(rssm, *x[:2], State(*x[2:4]), *x[4:]))(*twice)
    torch.testing.assert_close(State(*(x[1] for x in mapped)), expected)
    assert len(ways) == 3
    double = State(*(x.double() for x in state))
    found = stepped(
        rssm.double(), embed.double(), action.double(), double, noise.double(), is_first
    )
    torch.testing.assert_close(State(*(x.float() for x in found)), expected)
    assert len(ways) == 4


@torch.no_grad()
def test_parameters_that_are_not_plain_go_through_the_op(ways):
    with torch.inference_mode():
        rssm = build()
        args = inputs(rssm, 4)
        expected = stepped(rssm, *args)
        rssm.memory_cell.bias_hh.add_(1.0)
        assert not same(stepped(rssm, *args), expected)
    assert len(ways) == 2

    class Stepping(nn.Module):
        def __init__(self):
            super().__init__()
            self.rssm = build()

        def forward(self):
            return stepped(self.rssm, *args)

    stepping = Stepping()
    plain = stepping()
    assert len(ways) == 2
    doubled = {key: torch.stack((x, 2 * x)) for key, x in stepping.named_parameters()}
    both = torch.vmap(lambda x: torch.func.functional_call(stepping, x))(doubled)
    assert len(ways) == 3
    torch.testing.assert_close(State(*(x[0] for x in both)), plain)
    for x in stepping.parameters():
        x.mul_(2)
    torch.testing.assert_close(State(*(x[1] for x in both)), stepping())
    assert len(ways) == 3


@torch.no_grad()
def test_errors_are_those_of_the_op():
    rssm = build()
    embed, action, state, noise, is_first = inputs(rssm, 4)
    with pytest.raises(ValueError, match=r"embed has shape \[1, 4, 3\], expected \[1, 4, 5\]"):
        rssm.step(embed[:, :3], action, state)
    with pytest.raises(ValueError, match=r"action has shape \[1, 3, 2\], expected \[1, 4, 2\]"):
        rssm.step(embed, action[:3], state)
    with pytest.raises(ValueError, match=r"state\.deter has shape \[2, 40\], expected \[4, 40\]"):
        rssm.step(embed, action, rssm.initial(2))
    with pytest.raises(ValueError, match=r"noise has shape \[1, 4, 11\], expected \[1, 4, 12\]"):
        rssm.step(embed, action, state, noise=noise[:, :11])
    with pytest.raises(TypeError, match=r"is_first has dtype torch.float32, expected torch.bool"):
        rssm.step(embed, action, state, is_first=is_first.float())
    with pytest.raises(TypeError, match="stoch0 is torch.float64, expected torch.float32"):
        rssm.step(embed, action, State(state.deter, state.stoch.double()))
    with pytest.raises(ValueError, match="noise has shape"):
        rssm.step(embed, action, state, noise=noise[0, 0])
    with pytest.raises(RuntimeError, match="not available"), fastrssm.use_backend("cuda"):
        rssm.step(embed, action, state)


@torch.no_grad()
def test_noise_is_drawn_where_it_is_not_given(prepared_only):
    rssm = build("discrete")
    embed, action, state, *_ = inputs(rssm, 4)
    torch.manual_seed(3)
    drawn = rssm.step(embed, action, state)
    torch.manual_seed(3)
    assert same(drawn, rssm.step(embed, action, state, noise=rssm.draw_noise(4)))


@torch.no_grad()
def test_copies_and_files_contain_none_of_it(prepared_only):
    rssm = build()
    args = inputs(rssm, 3)
    first = stepped(rssm, *args)
    twin = copy.deepcopy(rssm)
    assert list(twin.state_dict()) == list(rssm.state_dict())
    twin.memory_cell.bias_hh.add_(1.0)
    changed = stepped(twin, *args)
    assert not same(changed, first)
    assert same(stepped(pickle.loads(pickle.dumps(twin)), *args), changed)
    assert same(stepped(rssm, *args), first)


@torch.no_grad()
def test_threads_change_nothing(prepared_only):
    rssm = build()
    args = inputs(rssm, 70)
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        one = stepped(rssm, *args)
        torch.set_num_threads(3)
        assert same(stepped(rssm, *args), one)
    finally:
        torch.set_num_threads(before)
    wrong = []

    @torch.no_grad()
    def act():
        wrong.extend(1 for _ in range(20) if not same(stepped(rssm, *args), one))

    actors = [threading.Thread(target=act) for _ in range(3)]
    for actor in actors:
        actor.start()
    for actor in actors:
        actor.join()
    assert not wrong


@torch.no_grad()
def test_compiled_callers_trace_the_op():
    rssm = build()
    args = inputs(rssm, 3)
    expected = stepped(rssm, *args)
    compiled = torch.compile(stepped, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(rssm, *args), expected)
