"""rssm_imagine_policy against its textbook form."""

import pytest
import torch
from scan_cases import VARIANTS, Textbook, assert_same_run, inputs
from scan_runs import BACKENDS

from fastrssm._dispatch import use_backend
from fastrssm.ops import rssm_imagine_policy


@pytest.fixture(autouse=True, params=["reference", *BACKENDS])
def every_backend(request):
    with use_backend(request.param):
        yield


def imagine(book: Textbook, x: dict[str, torch.Tensor], *, detach: bool):
    weights, _ = book.weights(book.prior)
    policy, _ = book.policy_weights()
    return rssm_imagine_policy(
        x["noise"], x["action_noise"], x["deter"], x["stoch"], weights, policy,
        detach_policy_input=detach, **book.options,
    )  # fmt: skip


@pytest.mark.parametrize("detach", [False, True])
@pytest.mark.parametrize(("T", "B"), [(4, 3), (1, 3), (4, 1), (1, 1)])
@pytest.mark.parametrize("variant", VARIANTS)
def test_equals_the_textbook(variant, T, B, detach):
    book, x = Textbook(variant), inputs(variant, T, B)
    expected = book.run(
        x["noise"], x["deter"], x["stoch"], action_noise=x["action_noise"], detach=detach
    )
    sources = [x["deter"], x["stoch"], *book.parameters()]
    assert_same_run(imagine(book, x, detach=detach), expected, sources)


@pytest.mark.parametrize("variant", ["rssm", "rssmo", "rssmo_v2"])
def test_gradcheck(variant):
    book, x = Textbook(variant), inputs(variant, 2, 2)

    def run(deter, stoch, *_):
        states = imagine(book, x | {"deter": deter, "stoch": stoch}, detach=False)
        return states.deter, states.stoch, states.action, *states.stats

    policy = list(book.policy.parameters())
    assert torch.autograd.gradcheck(run, (x["deter"], x["stoch"], *policy))


def test_detaching_changes_gradients_only():
    book, x = Textbook("rssm"), inputs("rssm")
    plain, detached = (imagine(book, x, detach=d) for d in (False, True))
    torch.testing.assert_close(plain.stoch, detached.stoch, rtol=0.0, atol=0.0)
    # the first action depends on the first state only through what the policy sees
    assert torch.autograd.grad(plain.action[0].sum(), x["deter"], retain_graph=True)[0].any()
    cut = torch.autograd.grad(detached.action[0].sum(), x["deter"], allow_unused=True)[0]
    assert cut is None or not cut.any()
