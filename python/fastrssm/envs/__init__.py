"""Vectorised environments on MuJoCo, equal to dm_control bit for bit."""

# render comes first: it chooses an OpenGL before mujoco is imported
from fastrssm.envs.render import Renderer, write_video

# isort: split
from fastrssm.envs.dm_env_view import DmEnvView
from fastrssm.envs.physics import Physics
from fastrssm.envs.registration import make_vec, register_task
from fastrssm.envs.state import VectorState
from fastrssm.envs.tasks import TASKS, Task, find_task
from fastrssm.envs.vector_env import MujocoVectorEnv

__all__ = [
    "TASKS",
    "DmEnvView",
    "MujocoVectorEnv",
    "Physics",
    "Renderer",
    "Task",
    "VectorState",
    "find_task",
    "make_vec",
    "register_task",
    "write_video",
]

for _env_id, _task in TASKS.items():
    register_task(_env_id, _task)
