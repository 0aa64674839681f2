"""rssm_imagine against its textbook form."""

import pytest
import torch
from scan_cases import VARIANTS, Textbook, assert_same_run, inputs
from scan_runs import BACKENDS

from fastrssm._dispatch import use_backend
from fastrssm.ops import rssm_imagine


@pytest.fixture(autouse=True, params=["reference", *BACKENDS])
def every_backend(request):
    with use_backend(request.param):
        yield


def imagine(book: Textbook, x: dict[str, torch.Tensor]):
    weights, _ = book.weights(book.prior)
    return rssm_imagine(x["action"], x["noise"], x["deter"], x["stoch"], weights, **book.options)


@pytest.mark.parametrize(("T", "B"), [(4, 3), (1, 3), (4, 1), (1, 1)])
@pytest.mark.parametrize("variant", VARIANTS)
def test_equals_the_textbook(variant, T, B):
    book, x = Textbook(variant), inputs(variant, T, B)
    expected = book.run(x["noise"], x["deter"], x["stoch"], action=x["action"])
    sources = [x["deter"], x["stoch"], x["action"], *book.parameters()]
    assert_same_run(imagine(book, x), expected, sources)


@pytest.mark.parametrize("variant", ["rssm", "rssmo", "rssmo_v2"])
def test_gradcheck(variant):
    book, x = Textbook(variant), inputs(variant, 2, 2)

    def run(action, deter, stoch):
        states = imagine(book, x | {"action": action, "deter": deter, "stoch": stoch})
        return states.deter, states.stoch, *states.stats

    assert torch.autograd.gradcheck(run, (x["action"], x["deter"], x["stoch"]))


def test_extreme_states_stay_finite():
    for variant in VARIANTS:
        book, x = Textbook(variant), inputs(variant)
        states = imagine(book, x | {"stoch": x["stoch"] * 1e6})
        assert all(v.isfinite().all() for v in (states.deter, states.stoch, *states.stats))
