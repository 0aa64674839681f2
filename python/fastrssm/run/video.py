"""Film an agent."""

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import numpy.typing as npt

from fastrssm.envs import make_vec
from fastrssm.envs.render import Renderer, write_video
from fastrssm.run.collect import Agent


def record_video(agent: Agent, env_id: str, path: Path, *, seed: int) -> int:
    """Write one episode as `.mp4` or `.gif`, at the speed of the simulation.

    Args:
        agent: what acts.
        env_id: where.
        path: the file to write.
        seed: of the environment; the agent has its own.

    Returns:
        The number of frames.

    Raises:
        ValueError: an unknown env_id, or another suffix.
        RuntimeError: there is no OpenGL.
    """
    env = make_vec(env_id, 1)
    frames = env.episode_steps + 1

    def play(renderer: Renderer) -> Iterator[npt.NDArray[np.uint8]]:
        obs, _ = env.reset(seed=seed)
        agent.reset(1)
        action = np.zeros((1, env.task.action_size), np.float32)
        is_first = np.ones(1, np.bool_)
        yield renderer.frame()
        for _ in range(frames - 1):
            action = agent.act(obs, is_first, action)
            is_first = np.zeros(1, np.bool_)
            obs, *_ = env.step(action)
            yield renderer.frame()

    try:
        with Renderer(env) as renderer:
            fps = 1.0 / (env.task.control_timestep * env.action_repeat)
            write_video(path, play(renderer), fps)
    finally:
        env.close()
    return frames
