"""Make the paper's datasets anew from the experts and tapes that come with the package."""

from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np

import fastrssm.data
from fastrssm.data.episode import Episode
from fastrssm.data.recipes import Recipe, parse
from fastrssm.envs import find_task, make_vec
from fastrssm.run.agents import Expert, RandomAgent
from fastrssm.run.collect import Agent, check_target, rollout, write_dataset
from fastrssm.run.tapes import load_tape, play

# episodes done, episodes in all
Progress = Callable[[int, int], None]
# a file per recipe
TAPES = Path(fastrssm.data.__file__).parent / "tapes"


def make_dataset(
    name: str,
    folder: str | Path,
    episodes: int | None = None,
    seed: int = 0,
    num_envs: int = 16,
    progress: Progress | None = None,
    *,
    steps: int | None = None,
    overwrite: bool = False,
) -> Path:
    """Make a dataset of the paper anew; name, episodes and seed determine every byte of it.

    Args:
        name: of a recipe, for example "walker-stand-buffer", or a file of a tape, "<name>.tape".
        folder: the folder to make.
        episodes: how many; of a mix, the same number of each part; of a tape, spread evenly over
            it. None: those of the recipe or of the tape.
        seed: of the environments and of the noise of the policy; a tape has its own.
        num_envs: environments stepped together; changes the speed only.
        progress: called after each episode with the episodes done and in all.
        steps: decision steps of an episode. None: as many as the task has.
        overwrite: replace a folder of episodes.

    Raises:
        ValueError: there is no such recipe, a number is below 1, a mix has fewer episodes than
            parts, a tape fewer than asked for, or a file is no tape.
        FileNotFoundError: the package has no expert or no tape for it.
        FileExistsError: see `write_dataset`.
    """
    recipe = _tape_recipe(Path(name)) if name.endswith(".tape") else parse(name)
    total = recipe.episodes if episodes is None else episodes
    if total < 1 or num_envs < 1:
        raise ValueError(f"episodes and num_envs must be at least 1, got {total} and {num_envs}.")
    if total < len(recipe.parts):
        raise ValueError(
            f"episodes must be at least {len(recipe.parts)}, the parts of {name}, got {total}."
        )
    check_target(Path(folder).absolute(), overwrite)
    counts = [len(part) for part in np.array_split(np.arange(total), len(recipe.parts) or 1)]
    if recipe.parts and episodes is None:
        counts = [parse(part).episodes for part in recipe.parts]
    # all are prepared before the first one plays, so that a missing file is known at once
    plays = [
        _play(part, parse(part) if recipe.parts else recipe, count, seed, num_envs, steps)
        for part, count in zip(recipe.parts or (name,), counts, strict=True)
    ]
    report = None if progress is None else lambda done: progress(done, total)
    played = (episode for play in plays for episode in play)
    return write_dataset(folder, played, overwrite=overwrite, progress=report)


def _tape_recipe(path: Path) -> Recipe:
    tape = load_tape(path)
    return Recipe(tape.env_id, "tape", len(tape.seeds))


def _play(
    name: str, recipe: Recipe, total: int, seed: int, num_envs: int, steps: int | None
) -> Iterator[Episode]:
    """Prepare whoever acts, and give the episodes."""
    agent: Agent
    match recipe.kind:
        case "random":
            agent = RandomAgent(find_task(recipe.env_id).action_size, seed)
        case "expert":
            agent = Expert.open(recipe.env_id)
        case "tape":
            path = Path(name) if name.endswith(".tape") else TAPES / f"{name}.tape"
            if not path.is_file():
                raise FileNotFoundError(
                    f"no tape of {name} in {TAPES}; such a one is made by: {recipe.recorded}"
                )
            return play(load_tape(path), total, num_envs, steps)
        case "mix":
            raise ValueError(f"{name} is a mix, expected a recipe of one agent.")
    return _rollouts(agent, recipe.env_id, total, seed, num_envs, steps)


def _rollouts(
    agent: Agent, env_id: str, total: int, seed: int, num_envs: int, steps: int | None
) -> Iterator[Episode]:
    env = make_vec(env_id, min(num_envs, total), episode_steps=steps)
    try:
        # a seed per episode instead of one per environment: the bytes do not depend on num_envs
        for first in range(0, total, env.num_envs):
            numbers = range(first, first + env.num_envs)
            seeds = [_env_seed(seed, number) for number in numbers]
            yield from rollout(env, agent, min(env.num_envs, total - first), seed=seeds)
    finally:
        env.close()


def _env_seed(seed: int, episode: int) -> int:
    # apart from the agent's stream of the same episode
    return int(np.random.SeedSequence((seed, episode, 1)).generate_state(1, np.uint64)[0])
