"""How environments are made by name."""

from typing import Any

import gymnasium

from fastrssm.envs.tasks import TASKS, Task
from fastrssm.envs.vector_env import MujocoVectorEnv


def make_vec(env_id: str | Task, num_envs: int = 1, **kwargs: Any) -> MujocoVectorEnv:
    """Make `num_envs` environments of `env_id`; see `MujocoVectorEnv` for the keyword arguments."""
    return MujocoVectorEnv(env_id, num_envs, **kwargs)


def register_task(env_id: str, task: Task) -> None:
    """Make `task` known by name to `make_vec`, the command line and gymnasium.

    After `register_task("slider-centre", task)` in a module `my_tasks`, others find it as
    `make_vec("my_tasks:slider-centre")`, `--env my_tasks:slider-centre` and
    `gymnasium.make_vec("my_tasks:fastrssm/slider-centre-v0")`.

    Raises:
        ValueError: the name belongs to another task.
    """
    if TASKS.setdefault(env_id, task) != task:
        raise ValueError(f"env_id is {env_id!r}, which is the name of another task")
    gymnasium.register(
        f"fastrssm/{env_id}-v0",
        vector_entry_point="fastrssm.envs.registration:make_vec",
        kwargs={"env_id": env_id},
    )
