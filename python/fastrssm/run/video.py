"""Film an agent."""

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import numpy.typing as npt

from fastrssm.envs import make_vec
from fastrssm.envs.render import Renderer, write_video
from fastrssm.run.collect import Agent


def record_video(
    agent: Agent,
    env_id: str,
    path: Path,
    *,
    seed: int,
    num_envs: int = 1,
    height: int = 240,
    width: int = 320,
    fps: float = 20.0,
) -> int:
    """Write whole episodes, side by side, as `.mp4` or `.gif` at the speed of the simulation.

    Args:
        agent: what acts.
        env_id: where.
        path: the file to write.
        seed: of the environment; the agent has its own.
        num_envs: episodes in one picture.
        height: of each, pixels.
        width: of each, pixels.
        fps: frames a second, as nearly as leaving out whole steps allows.

    Returns:
        The number of frames.

    Raises:
        ValueError: an unknown env_id, or another suffix.
        RuntimeError: there is no OpenGL.
    """
    env = make_vec(env_id, num_envs)
    step_time = env.task.control_timestep * env.action_repeat
    stride = max(1, round(1.0 / (fps * step_time)))
    drawn = range(0, env.episode_steps, stride)

    def play(renderer: Renderer) -> Iterator[npt.NDArray[np.uint8]]:
        obs, _ = env.reset(seed=seed)
        agent.reset(num_envs)
        action = np.zeros((num_envs, env.task.action_size), np.float32)
        is_first = np.ones(num_envs, np.bool_)
        for t in range(drawn[-1] + 1):
            if t in drawn:
                yield np.concatenate([renderer.frame(n) for n in range(num_envs)], axis=1)
            action = agent.act(obs, is_first, action)
            is_first = np.zeros(num_envs, np.bool_)
            obs, *_ = env.step(action)

    try:
        with Renderer(env, height, width) as renderer:
            write_video(path, play(renderer), 1.0 / (stride * step_time))
    finally:
        env.close()
    return len(drawn)
