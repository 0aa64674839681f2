"""Weights merged for the scans are made once while parameters stay, and never stale."""

import copy
import pickle
from dataclasses import replace

import pytest
import torch

import fastrssm
from fastrssm.models.policy import TanhGaussianPolicy
from fastrssm.models.rssm import AIME_RSSM, AIME_V2_RSSMO, RSSM

CONFIGS = {
    "rssm": replace(AIME_RSSM, deter=8, stoch=6, hidden=7),
    "rssmo_v2": replace(AIME_V2_RSSMO, deter=8, stoch=6, hidden=7),
}
T, B, E, A = 3, 2, 5, 2


@pytest.fixture(params=CONFIGS)
def rssm(request):
    torch.manual_seed(0)
    return RSSM(CONFIGS[request.param], E, A)


def stoch(rssm: RSSM) -> torch.Tensor:
    g = torch.Generator().manual_seed(1)
    embed, action = torch.randn(T, B, E, generator=g), torch.randn(T, B, A, generator=g)
    return rssm.observe(embed, action, generator=g).stoch


def merged(rssm: RSSM) -> torch.Tensor:
    """A tensor that is made of parameters."""
    return rssm._posterior_weights()[0].head[0].weight


def fresh(rssm: RSSM) -> torch.Tensor:
    """What a model without a past returns for these parameters."""
    other = RSSM(rssm.config, E, A)
    other.load_state_dict(rssm.state_dict())
    with torch.no_grad(), fastrssm.use_backend("reference"):
        return stoch(other)


@torch.no_grad()
def test_made_once_without_gradient_and_again_after_every_change(rssm):
    assert merged(rssm) is merged(rssm)
    changed = {name: 0.5 * x for name, x in rssm.state_dict().items()}

    def replace_data():
        # twice: the second may lie where the first was
        for _ in range(2):
            for x in rssm.parameters():
                x.data = 0.9 * x.data

    for change in (
        lambda: [x.mul_(1.1) for x in rssm.parameters()],
        lambda: rssm.load_state_dict(changed),
        lambda: rssm.load_state_dict(changed, assign=True),
        replace_data,
    ):
        before = merged(rssm)
        stoch(rssm)
        change()
        assert merged(rssm) is not before
        torch.testing.assert_close(stoch(rssm), fresh(rssm))


def test_a_training_step_may_change_parameters_behind_their_versions(rssm):
    with torch.no_grad():
        stoch(rssm)
    stoch(rssm).sum().backward()
    for x in rssm.parameters():
        x.data.add_(0.1)
    with torch.no_grad():
        torch.testing.assert_close(stoch(rssm), fresh(rssm))


@pytest.mark.parametrize("kind", [{"fused": True}, {"foreach": True}, {}], ids=str)
def test_every_step_of_an_optimizer_is_seen(rssm, kind):
    """Fused ones, which leave versions as they are, as well."""
    optimizer = torch.optim.Adam(rssm.parameters(), **kind)
    for _ in range(2):
        with torch.no_grad():
            before = rssm._prior_weights()
            stoch(rssm)
        for x in rssm.parameters():
            x.grad = torch.ones_like(x)
        optimizer.step()
        with torch.no_grad():
            torch.testing.assert_close(stoch(rssm), fresh(rssm))
            # training does not call this one, so that nothing else makes it anew
            assert rssm._prior_weights() is not before


def test_gradients_arrive_after_a_call_without(rssm):
    with torch.no_grad():
        stoch(rssm)
    stoch(rssm).sum().backward()
    head = [p for name, p in rssm.named_parameters() if "posterior" in name]
    assert all(p.grad is not None for p in head)


def test_frozen_model_makes_them_once(rssm):
    rssm.requires_grad_(False)
    assert merged(rssm) is merged(rssm)
    with torch.inference_mode():
        inside = merged(rssm)
    assert not inside.is_inference()
    assert rssm._prior_weights().head[0].weight is rssm._prior_weights().head[0].weight


def test_copies_and_files_contain_none_of_it(rssm):
    names = list(rssm.state_dict())
    with torch.no_grad():
        before = merged(rssm)
        twin = copy.deepcopy(rssm)
        assert list(twin.state_dict()) == names
        next(twin.memory_cell.parameters()).mul_(2.0)
        for other in (twin, pickle.loads(pickle.dumps(twin))):
            assert merged(other) is not before
            torch.testing.assert_close(stoch(other), fresh(twin))
        assert merged(rssm) is before


def test_policies_do_the_same():
    policy = TanhGaussianPolicy(14, A, hidden=4)
    assert policy.weights().layers[0].weight.requires_grad
    with torch.no_grad():
        once = policy.weights()
        assert policy.weights() is once
        policy.mean_net.net[0].weight.add_(1.0)
        assert not torch.equal(policy.weights().layers[0].weight, once.layers[0].weight)
