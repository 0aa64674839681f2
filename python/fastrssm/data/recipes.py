"""The paper's datasets as recipes: a name says the environment, who acts, and how long."""

from dataclasses import dataclass
from typing import Literal

Kind = Literal["random", "buffer", "expert"]

# a buffer starts with a few random episodes, as the replay of a learner does
PREFILL_EPISODES = 5


@dataclass(frozen=True)
class Recipe:
    """How to make one dataset.

    Attributes:
        env_id: the environment.
        kind: "random": uniform actions. "buffer": a replay of learning, episode i of N by the
            policy as it was at i/N of its learning, actions sampled. "expert": the final policy
            without noise.
        episodes: how many the paper has.
    """

    env_id: str
    kind: Kind
    episodes: int


_TASKS = (
    "walker-stand",
    "walker-walk",
    "walker-run",
    "cheetah-run",
    "cheetah-runbackward-aime1",
    "cheetah-flip-aime1",
    "cheetah-flipbackward-aime1",
)

# the reward of random data is never used, so any task of the body serves
RECIPES: dict[str, Recipe] = {
    "walker-random": Recipe("walker-walk", "random", 1000),
    "cheetah-random": Recipe("cheetah-run", "random", 1000),
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
