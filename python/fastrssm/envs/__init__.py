"""Vectorised environments on MuJoCo, equal to dm_control bit for bit."""

# render comes first: it chooses an OpenGL before mujoco is imported
from fastrssm.envs.render import Renderer, write_video
from fastrssm.envs.tasks import TASKS, Task
from fastrssm.envs.vector_env import MujocoVectorEnv, VectorState, make_vec, register

__all__ = [
    "TASKS",
    "MujocoVectorEnv",
    "Renderer",
    "Task",
    "VectorState",
    "make_vec",
    "write_video",
]

register()
