"""rssm_observe_policy against its textbook form."""

import pytest
import torch
from scan_cases import VARIANTS, Textbook, assert_same_run, inputs, some_first
from scan_runs import BACKENDS

from fastrssm._dispatch import use_backend
from fastrssm.ops import rssm_observe, rssm_observe_policy


@pytest.fixture(autouse=True, params=["reference", *BACKENDS])
def every_backend(request):
    with use_backend(request.param):
        yield


def observe(book: Textbook, x: dict[str, torch.Tensor], is_first=None, idm=False):
    weights, projection = book.weights(book.post, x["embed"])
    policy, policy_projection = book.policy_weights(x["embed"] if idm else None)
    return rssm_observe_policy(
        projection, x["noise"], x["action_noise"], is_first, x["deter"], x["stoch"],
        weights, policy, policy_proj=policy_projection, **book.options,
    )  # fmt: skip


@pytest.mark.parametrize("idm", [False, True])
@pytest.mark.parametrize(("T", "B"), [(4, 3), (1, 3), (4, 1), (1, 1)])
@pytest.mark.parametrize("variant", VARIANTS)
def test_equals_the_textbook(variant, T, B, idm):
    book, x = Textbook(variant), inputs(variant, T, B)
    is_first = some_first(T, B)
    expected = book.run(
        x["noise"], x["deter"], x["stoch"],
        embed=x["embed"], action_noise=x["action_noise"], is_first=is_first, idm=idm,
    )  # fmt: skip
    sources = [x["deter"], x["stoch"], x["embed"], *book.parameters()]
    assert_same_run(observe(book, x, is_first, idm), expected, sources)


@pytest.mark.parametrize("variant", ["rssm", "rssmo", "rssmo_v2"])
def test_gradcheck(variant):
    book, x = Textbook(variant), inputs(variant, 2, 2)
    policy = list(book.policy.parameters())

    def run(embed, deter, stoch, *_):
        states = observe(book, x | {"embed": embed, "deter": deter, "stoch": stoch})
        return states.deter, states.stoch, states.action, *states.stats

    assert torch.autograd.gradcheck(run, (x["embed"], x["deter"], x["stoch"], *policy))


def test_policy_sees_the_state_before_the_frame():
    """Feeding the returned actions to the plain scan gives the same states."""
    book, x = Textbook("rssm"), inputs("rssm")
    states = observe(book, x)
    weights, projection = book.weights(book.post, x["embed"])
    replayed = rssm_observe(
        projection, states.action, x["noise"], None, x["deter"], x["stoch"],
        weights, **book.options,
    )  # fmt: skip
    torch.testing.assert_close(states.deter, replayed.deter, rtol=0.0, atol=0.0)
    changed = observe(book, x | {"embed": torch.cat((x["embed"][:1] + 1.0, x["embed"][1:]))})
    assert torch.equal(changed.action[0], states.action[0])
    assert not torch.equal(changed.action[1], states.action[1])


def test_frozen_world_model_gets_no_gradient():
    book, x = Textbook("rssmo"), inputs("rssmo")
    book.requires_grad_(False)
    book.policy.requires_grad_(True)
    observe(book, {k: v.detach() for k, v in x.items()}).deter.sum().backward()
    with_gradient = {name for name, p in book.named_parameters() if p.grad is not None}
    assert with_gradient == {name for name, _ in book.named_parameters() if "policy" in name}
