"""The RSSM module: imagination, the prior outside of the loop, noise, errors."""

import dataclasses

import pytest
import torch

from fastrssm.models.policy import TanhGaussianPolicy
from fastrssm.models.rssm import (
    AIME_RSSM,
    AIME_RSSMO,
    AIME_V2_DISCRETE,
    AIME_V2_RSSMO,
    DREAMER_V3_1M,
    RSSM,
    State,
)

PRESETS = {
    "rssm": AIME_RSSM,
    "rssmo": AIME_RSSMO,
    "rssmo_v2": AIME_V2_RSSMO,
    "discrete": AIME_V2_DISCRETE,
    "dreamer_v3": DREAMER_V3_1M,
}
T, B, E, A = 4, 3, 5, 2


def build(preset: str) -> RSSM:
    torch.manual_seed(0)
    config = PRESETS[preset]
    groups = 2 if config.latent == "categorical" else 1
    config = dataclasses.replace(config, deter=8, stoch=6, hidden=7, groups=groups)
    return RSSM(config, E, A).double()


def normal(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("preset", PRESETS)
def test_prior_outside_of_the_loop_is_the_one_inside(preset):
    rssm = build(preset)
    states = rssm.imagine(normal(T, B, A), rssm.initial(B))
    for inside, outside in zip(states.stats, rssm.prior(states.deter), strict=True):
        torch.testing.assert_close(inside, outside, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("preset", PRESETS)
def test_imagination_under_a_policy_replays_its_actions(preset):
    rssm = build(preset)
    policy = TanhGaussianPolicy(rssm.config.feature_size, A, hidden=7).double()
    state = State(normal(B, 8), normal(B, 6))
    noise, action_noise = rssm.draw_noise(T, B), normal(T, B, A)
    free = rssm.imagine_with_policy(policy, state, T, noise=noise, action_noise=action_noise)
    replayed = rssm.imagine(free.action, state, noise=noise)
    torch.testing.assert_close(free.stoch, replayed.stoch, rtol=1e-12, atol=1e-14)
    mean, std = policy(state.feature)
    first = torch.tanh(mean + std * action_noise[0])
    torch.testing.assert_close(free.action[0], first, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("preset", PRESETS)
def test_generators_make_noise_repeatable(preset):
    rssm = build(preset)
    policy = TanhGaussianPolicy(rssm.config.feature_size, A, hidden=7).double()
    runs = [
        rssm.observe_with_policy(
            normal(T, B, E), policy, generator=torch.Generator().manual_seed(seed)
        ).stoch
        for seed in (0, 0, 1)
    ]
    assert torch.equal(runs[0], runs[1])
    assert not torch.equal(runs[0], runs[2])


def test_noise_has_the_kind_of_the_latent():
    uniform = build("discrete").draw_noise(50, 20, generator=torch.Generator().manual_seed(0))
    assert uniform.shape == (50, 20, 2)
    assert uniform.min() >= 0.0
    assert uniform.max() < 1.0
    gaussian = build("rssm").draw_noise(50, 20, generator=torch.Generator().manual_seed(0))
    assert gaussian.shape == (50, 20, 6)
    assert gaussian.min() < -2.0


def test_errors_name_what_is_wrong():
    rssm = build("rssm")
    embed, action, state = normal(T, B, E), normal(T, B, A), rssm.initial(B)
    with pytest.raises(ValueError, match=r"embed has shape \[4, 3, 4\], expected \[4, 3, 5\]"):
        rssm.observe(embed[..., :4], action)
    with pytest.raises(ValueError, match=r"action has shape \[3, 3, 2\], expected \[4, 3, 2\]"):
        rssm.observe(embed, action[:3])
    with pytest.raises(ValueError, match=r"state\.deter has shape \[2, 8\], expected \[3, 8\]"):
        rssm.observe(embed, action, state=rssm.initial(2))
    with pytest.raises(TypeError, match="is_first has dtype torch.float32, expected torch.bool"):
        rssm.observe(embed, action, is_first=torch.zeros(T, B))
    policy = TanhGaussianPolicy(rssm.config.feature_size, A, hidden=7).double()
    with pytest.raises(ValueError, match=r"action_noise has shape \[4, 3, 1\]"):
        rssm.observe_with_policy(embed, policy, action_noise=normal(T, B, 1))
    with pytest.raises(ValueError, match="horizon is 0, expected at least 1"):
        rssm.imagine_with_policy(policy, state, 0)
