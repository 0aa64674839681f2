"""Returns and normalised scores of an agent, with what is needed to judge them."""

from dataclasses import dataclass
from typing import Any

import numpy as np

from fastrssm.envs import find_task, make_vec
from fastrssm.run.collect import Agent, rollout

# the seed of a run's evaluation is the run's plus this, as in the original AIME
EVAL_SEED_OFFSET = 100
_RESAMPLES = 10_000


@dataclass(frozen=True)
class EvalResult:
    """Returns of some episodes and their statistics.

    Attributes:
        env_id: the environment.
        seed: of the environments.
        returns: of every episode, in the order of their starts.
        mean: of the returns.
        std: their population standard deviation.
        median: of the returns.
        expert_return: the return that scores 100. None: unknown.
        score: 100 * mean / expert_return. None where that is unknown.
        score_interval: 95 % bootstrap interval of the score. None where that is unknown.
    """

    env_id: str
    seed: int
    returns: tuple[float, ...]
    mean: float
    std: float
    median: float
    expert_return: float | None
    score: float | None
    score_interval: tuple[float, float] | None

    def to_dict(self) -> dict[str, Any]:
        """Give all fields and the number of episodes as plain values for JSON."""
        interval = None if self.score_interval is None else list(self.score_interval)
        episodes = len(self.returns)
        fields = {**vars(self), "returns": list(self.returns), "score_interval": interval}
        return {**fields, "episodes": episodes}


def evaluate(
    agent: Agent,
    env_id: str,
    episodes: int = 100,
    *,
    seed: int = 0,
    num_envs: int = 20,
    expert_return: float | None = None,
) -> EvalResult:
    """Run whole episodes and summarise their returns.

    Args:
        agent: what acts.
        env_id: where.
        episodes: how many; in lockstep, so a multiple of num_envs wastes nothing.
        seed: of the environments; the agent has its own.
        num_envs: environments stepped together.
        expert_return: the return that scores 100. None: the task's own.

    Raises:
        ValueError: an unknown env_id, or a number below 1.

    Source:
        AIME (OpenReview WjlCQxpuxU); bootstrap as in Agarwal et al. 2021 (arXiv 2108.13264).
    """
    if episodes < 1 or num_envs < 1:
        got = f"{episodes} and {num_envs}"
        raise ValueError(f"episodes and num_envs must be at least 1, got {got}.")
    env = make_vec(env_id, min(num_envs, episodes))
    try:
        played = list(rollout(env, agent, episodes, seed=seed))
    finally:
        env.close()
    returns = [float(episode["reward"].sum()) for episode in played]
    expert = find_task(env_id).expert_return if expert_return is None else expert_return
    return summarise(returns, env_id=env_id, seed=seed, expert_return=expert)


def summarise(
    returns: list[float], *, env_id: str, seed: int, expert_return: float | None
) -> EvalResult:
    """Compute the statistics of some returns.

    Args:
        returns: at least one.
        env_id: the environment they are from.
        seed: of the evaluation.
        expert_return: the return that scores 100. None: no score.

    Raises:
        ValueError: there are no returns, or expert_return is not positive.
    """
    if not returns:
        raise ValueError("returns is empty, expected at least one.")
    if expert_return is not None and not expert_return > 0:
        raise ValueError(f"expert_return must be positive, got {expert_return}.")
    values = np.array(returns, np.float64)
    score, interval = None, None
    if expert_return is not None:
        score = float(100.0 * values.mean() / expert_return)
        low, high = bootstrap_interval(100.0 * values / expert_return)
        interval = (low, high)
    return EvalResult(
        env_id=env_id,
        seed=seed,
        returns=tuple(values.tolist()),
        mean=float(values.mean()),
        std=float(values.std()),
        median=float(np.median(values)),
        expert_return=expert_return,
        score=score,
        score_interval=interval,
    )


def bootstrap_interval(values: np.ndarray[Any, np.dtype[np.float64]]) -> tuple[float, float]:
    """Give the 95 % percentile bootstrap interval of the mean, with resamples that are fixed."""
    draws = np.random.default_rng(0).integers(0, len(values), (_RESAMPLES, len(values)))
    low, high = np.percentile(values[draws].mean(axis=1), (2.5, 97.5))
    return float(low), float(high)
