import json

import numpy as np
import pytest
from scipy.stats import bootstrap

from fastrssm.envs import TASKS, make_vec
from fastrssm.run.agents import RandomAgent
from fastrssm.run.evaluate import bootstrap_interval, evaluate, summarise

RETURNS = np.random.default_rng(3).gamma(4.0, 100.0, 60)


def test_statistics():
    result = summarise(RETURNS.tolist(), env_id="walker-walk", seed=1, expert_return=500.0)
    assert result.mean == pytest.approx(sum(RETURNS) / 60, rel=1e-12)
    variance = sum((r - result.mean) ** 2 for r in RETURNS) / 60
    assert result.std == pytest.approx(variance**0.5, rel=1e-12)
    ordered = sorted(RETURNS)
    assert result.median == pytest.approx((ordered[29] + ordered[30]) / 2, rel=1e-12)
    assert result.score == pytest.approx(result.mean / 5, rel=1e-12)
    low, high = result.score_interval
    assert low < result.score < high


def test_interval_equals_that_of_scipy():
    # the same stream resamples the same values, so all but the rounding of sums is equal
    theirs = bootstrap(
        (RETURNS,),
        np.mean,
        n_resamples=10_000,
        method="percentile",
        rng=np.random.default_rng(0),
    ).confidence_interval
    assert bootstrap_interval(RETURNS) == pytest.approx((theirs.low, theirs.high), rel=1e-12)


def test_interval_covers_the_mean_as_often_as_it_says():
    rng = np.random.default_rng(0)
    intervals = [bootstrap_interval(rng.standard_normal(30)) for _ in range(100)]
    covered = sum(low < 0 < high for low, high in intervals)
    # 95 of 100, less about two for 30 samples; four deviations of a binomial
    assert abs(covered - 93) <= 4 * (100 * 0.93 * 0.07) ** 0.5


def test_result_is_plain_json():
    result = summarise([1.0, 3.0], env_id="walker-walk", seed=1, expert_return=None)
    fields = json.loads(json.dumps(result.to_dict()))
    assert (fields["episodes"], fields["returns"], fields["mean"]) == (2, [1.0, 3.0], 2.0)
    assert (fields["score"], fields["score_interval"]) == (None, None)
    scored = summarise([5.0], env_id="walker-walk", seed=1, expert_return=10.0)
    fields = json.loads(json.dumps(scored.to_dict()))
    assert (fields["score"], fields["score_interval"]) == (50.0, [50.0, 50.0])


def test_bad_values_are_refused():
    with pytest.raises(ValueError, match="returns is empty"):
        summarise([], env_id="walker-walk", seed=0, expert_return=None)
    with pytest.raises(ValueError, match=r"expert_return must be positive, got 0\.0"):
        summarise([1.0], env_id="walker-walk", seed=0, expert_return=0.0)
    with pytest.raises(ValueError, match="must be at least 1, got 0 and 20"):
        evaluate(RandomAgent(6), "walker-walk", 0)
    with pytest.raises(ValueError, match="walker-fly"):
        evaluate(RandomAgent(6), "walker-fly", 1)


def test_returns_are_those_of_the_environment():
    result = evaluate(RandomAgent(6, seed=4), "cheetah-run", 3, seed=7, num_envs=3)
    env = make_vec("cheetah-run", 3, num_threads=1)
    agent = RandomAgent(6, seed=4)
    agent.reset(3)
    obs, _ = env.reset(seed=7)
    total, first = np.zeros(3), np.ones(3, bool)
    for _ in range(env.episode_steps):
        obs, reward, _, truncated, _ = env.step(agent.act(obs, first, None))
        total += reward
        first[:] = False
    assert truncated.all()
    # the order of 500 sums differs
    np.testing.assert_allclose(result.returns, total, rtol=500 * np.finfo(np.float64).eps)
    assert result.expert_return == TASKS["cheetah-run"].expert_return
    own = summarise(list(result.returns), env_id="cheetah-run", seed=7, expert_return=10.0)
    given = evaluate(
        RandomAgent(6, seed=4), "cheetah-run", 3, seed=7, num_envs=3, expert_return=10.0
    )
    assert given == own
