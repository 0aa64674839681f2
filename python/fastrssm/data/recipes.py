"""The paper's datasets as recipes: a name says the environment, who acts, and how long."""

from dataclasses import dataclass
from typing import Literal

Kind = Literal["random", "buffer", "expert", "tape", "mix"]

# a buffer starts with a few random episodes, as the replay of a learner does
PREFILL_EPISODES = 5


@dataclass(frozen=True)
class Recipe:
    """How to make one dataset.

    Attributes:
        env_id: the environment.
        kind: "random": uniform actions. "buffer": a replay of learning, episode i of N by the
            policy as it was at i/N of its learning, actions sampled. "expert": the final policy
            without noise. "tape": the recorded actions of a run of Plan2Explore, played again.
            "mix": datasets one after the other.
        episodes: how many there are: of a tape as many as it holds, of others as many as the paper
            has, of a mix the sum of its parts.
        parts: names of the recipes of a mix.
    """

    env_id: str
    kind: Kind
    episodes: int
    parts: tuple[str, ...] = ()


_TASKS = (
    "walker-stand",
    "walker-walk",
    "walker-run",
    "cheetah-run",
    "cheetah-runbackward-aime1",
    "cheetah-flip-aime1",
    "cheetah-flipbackward-aime1",
)
_MIX = ("walker-random", "walker-plan2explore", "walker-stand-buffer", "walker-walk-buffer")

# the reward of random data and of exploration is never used, so any task of the body serves
RECIPES: dict[str, Recipe] = {
    "walker-random": Recipe("walker-walk", "random", 1000),
    "cheetah-random": Recipe("cheetah-run", "random", 1000),
    "walker-plan2explore": Recipe("walker-walk", "tape", 505),
    "cheetah-plan2explore": Recipe("cheetah-run", "tape", 505),
    "walker-mix": Recipe("walker-walk", "mix", 3505, _MIX),
    **{f"{env_id}-buffer": Recipe(env_id, "buffer", 1000) for env_id in _TASKS},
    **{f"{env_id}-expert": Recipe(env_id, "expert", 100) for env_id in _TASKS},
}


def parse(name: str) -> Recipe:
    """Find a recipe by its name, for example "walker-stand-buffer".

    Raises:
        ValueError: there is no such recipe.
    """
    if name not in RECIPES:
        raise ValueError(
            f"no dataset recipe is called {name!r}, expected one of {', '.join(RECIPES)}."
        )
    return RECIPES[name]
