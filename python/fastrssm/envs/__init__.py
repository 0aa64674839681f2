"""Vectorised environments on MuJoCo, equal to dm_control bit for bit."""

from fastrssm.envs.tasks import TASKS, Task
from fastrssm.envs.vector_env import MujocoVectorEnv, make_vec, register

__all__ = ["TASKS", "MujocoVectorEnv", "Task", "make_vec"]

register()
