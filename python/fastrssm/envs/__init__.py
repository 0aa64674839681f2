"""Vectorised environments on MuJoCo, equal to dm_control bit for bit."""

# render comes first: it chooses an OpenGL before mujoco is imported
from fastrssm.envs.render import Renderer, write_video

# isort: split
from fastrssm.envs.dm_env_view import DmEnvView
from fastrssm.envs.tasks import TASKS, Task
from fastrssm.envs.vector_env import MujocoVectorEnv, VectorState, make_vec, register

__all__ = [
    "TASKS",
    "DmEnvView",
    "MujocoVectorEnv",
    "Renderer",
    "Task",
    "VectorState",
    "make_vec",
    "write_video",
]

register()
