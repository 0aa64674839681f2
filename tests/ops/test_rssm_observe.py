"""rssm_observe against its textbook form."""

import pytest
import torch
from scan_cases import VARIANTS, Textbook, assert_same_run, inputs, some_first
from scan_runs import BACKENDS

from fastrssm._dispatch import use_backend
from fastrssm.ops import rssm_observe


@pytest.fixture(autouse=True, params=["reference", *BACKENDS])
def every_backend(request):
    with use_backend(request.param):
        yield


def observe(book: Textbook, x: dict[str, torch.Tensor], is_first=None):
    weights, projection = book.weights(book.post, x["embed"])
    state = (x["deter"], x["stoch"])
    return rssm_observe(
        projection, x["action"], x["noise"], is_first, *state, weights, **book.options
    )


@pytest.mark.parametrize("resets", [False, True])
@pytest.mark.parametrize(("T", "B"), [(4, 3), (1, 3), (4, 1), (1, 1)])
@pytest.mark.parametrize("variant", VARIANTS)
def test_equals_the_textbook(variant, T, B, resets):
    book, x = Textbook(variant), inputs(variant, T, B)
    is_first = some_first(T, B) if resets else None
    got = observe(book, x, is_first)
    expected = book.run(
        x["noise"], x["deter"], x["stoch"],
        embed=x["embed"], action=x["action"], is_first=is_first,
    )  # fmt: skip
    sources = [x["deter"], x["stoch"], x["embed"], x["action"], *book.parameters()]
    assert_same_run(got, expected, sources)


@pytest.mark.parametrize("variant", ["rssm", "rssmo", "rssmo_v2"])
def test_gradcheck(variant):
    book, x = Textbook(variant), inputs(variant, 2, 2)
    is_first = some_first(2, 2)

    def run(embed, action, deter, stoch):
        changed = x | {"embed": embed, "action": action, "deter": deter, "stoch": stoch}
        states = observe(book, changed, is_first)
        return states.deter, states.stoch, *states.stats

    assert torch.autograd.gradcheck(run, (x["embed"], x["action"], x["deter"], x["stoch"]))


def test_reset_forgets_everything_before_it():
    book, x = Textbook("rssmo"), inputs("rssmo", 5, 2)
    is_first = torch.zeros(5, 2, dtype=torch.bool)
    is_first[3] = True
    whole = observe(book, x, is_first)
    tail = {name: v[3:] if v.ndim == 3 else torch.zeros_like(v) for name, v in x.items()}
    torch.testing.assert_close(whole.deter[3:], observe(book, tail).deter, rtol=0.0, atol=0.0)


def test_splits_into_two_calls():
    book, x = Textbook("rssm"), inputs("rssm", 4, 2)
    whole = observe(book, x)
    early = observe(book, {k: v[:2] if v.ndim == 3 else v for k, v in x.items()})
    last = {"deter": early.deter[-1], "stoch": early.stoch[-1]}
    late = observe(book, {k: v[2:] if v.ndim == 3 else v for k, v in x.items()} | last)
    torch.testing.assert_close(late.stoch, whole.stoch[2:], rtol=0.0, atol=0.0)


@pytest.mark.parametrize("variant", ["discrete", "unimix"])
def test_categorical_latents_are_exactly_one_hot(variant):
    book, x = Textbook(variant), inputs(variant, 8, 16)
    stoch = observe(book, x).stoch.unflatten(-1, (2, 2))
    assert ((stoch == 0.0) | (stoch == 1.0)).all()
    assert (stoch.sum(-1) == 1.0).all()


@pytest.mark.parametrize("noise", [0.0, 1.0 - 2.0**-53])
def test_categorical_draw_at_the_ends_of_the_interval(noise):
    book, x = Textbook("discrete"), inputs("discrete", 2, 3)
    stoch = observe(book, x | {"noise": torch.full_like(x["noise"], noise)}).stoch
    expected = torch.tensor([1.0, 0.0] if noise == 0.0 else [0.0, 1.0], dtype=torch.float64)
    torch.testing.assert_close(stoch.unflatten(-1, (2, 2)), expected.expand(2, 3, 2, 2))


def test_extreme_embeddings_stay_finite():
    for variant in VARIANTS:
        book, x = Textbook(variant), inputs(variant)
        states = observe(book, x | {"embed": x["embed"] * 1e4})
        assert all(v.isfinite().all() for v in (states.deter, states.stoch, *states.stats))
