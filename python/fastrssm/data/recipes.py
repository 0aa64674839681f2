"""The paper's datasets as recipes: a name says the environment, who acts, and how long."""

from dataclasses import dataclass
from typing import Literal

Kind = Literal["random", "expert", "tape", "mix"]


@dataclass(frozen=True)
class Recipe:
    """How to make one dataset.

    Attributes:
        env_id: the environment.
        kind: "random": uniform actions. "expert": the policy of an expert, without noise. "tape":
            the recorded actions of a learner, from its first episode to its last, played again.
            "mix": datasets one after the other.
        episodes: how many there are: of a tape as many as it holds, of others as many as the paper
            has, of a mix the sum of its parts.
        parts: names of the recipes of a mix.
        recorded: the command that made a tape.
    """

    env_id: str
    kind: Kind
    episodes: int
    parts: tuple[str, ...] = ()
    recorded: str = ""


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


def _exploration(env_id: str) -> Recipe:
    command = f"fastrssm plan2explore --env {env_id} --scale cpu --episodes 1005 --out RUN"
    return Recipe(env_id, "tape", 1005, recorded=f"{command}; fastrssm data tape RUN")


def _buffer(env_id: str) -> Recipe:
    # the whole replay of a learner slow enough to show every stage, and varied to its end; one that
    # varies more does not run well enough to show it
    entropy = "0" if env_id == "walker-run" else "0.3"
    options = f"--steps 250000 --num-envs 10 --updates 1 --entropy {entropy} --tape"
    command = f"fastrssm expert --env {env_id} {options} --out RUN"
    return Recipe(env_id, "tape", 500, recorded=command)


# the reward of random data and of exploration is never used, so any task of the body serves
RECIPES: dict[str, Recipe] = {
    "walker-random": Recipe("walker-walk", "random", 1000),
    "cheetah-random": Recipe("cheetah-run", "random", 1000),
    "walker-plan2explore": _exploration("walker-walk"),
    "cheetah-plan2explore": _exploration("cheetah-run"),
    "walker-mix": Recipe("walker-walk", "mix", 3005, _MIX),
    **{f"{env_id}-buffer": _buffer(env_id) for env_id in _TASKS},
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
