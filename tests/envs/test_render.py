import os
import subprocess
import sys

import numpy as np
import pytest

SCENE = """
import numpy as np
from fastrssm.envs import Renderer, make_vec
env = make_vec("walker-walk", 2)
env.reset(seed=0)
with Renderer(env, 48, 64) as camera:
    first, second = camera.frame(0), camera.frame(1)
np.save("frames.npy", np.stack([first, second]))
import torch._dynamo  # Triton, if it is there, after Mesa
"""


def run(code, folder, **environment):
    clean = {k: v for k, v in os.environ.items() if k not in ("MUJOCO_GL", "PYOPENGL_PLATFORM")}
    return subprocess.run(
        [sys.executable, "-c", code],
        cwd=folder,
        env=clean | environment,
        capture_output=True,
        text=True,
        check=False,
    )


def test_frames_of_two_environments(tmp_path):
    done = run(SCENE, tmp_path)
    if "no OpenGL for rendering" in done.stderr:
        pytest.skip(done.stderr.strip().splitlines()[-1])
    assert done.returncode == 0, done.stderr
    frames = np.load(tmp_path / "frames.npy")
    assert (frames.shape, frames.dtype) == ((2, 48, 64, 3), np.dtype(np.uint8))
    assert frames.std() > 10
    assert not np.array_equal(frames[0], frames[1])


def test_without_opengl_the_error_says_what_is_missing(tmp_path):
    done = run(SCENE, tmp_path, MUJOCO_GL="disable")
    assert done.returncode == 1
    assert "RuntimeError: no OpenGL for rendering (MUJOCO_GL='disable'" in done.stderr


def test_video(tmp_path):
    imageio = pytest.importorskip("imageio.v2")
    from fastrssm.envs import write_video

    frames = [np.full((48, 64, 3), 20 * i, np.uint8) for i in range(6)]
    for name in ("walk.mp4", "walk.gif"):
        write_video(tmp_path / name, frames, fps=10)
        read = np.stack(list(imageio.get_reader(tmp_path / name).iter_data()))
        assert read.shape == (6, 48, 64, 3)
        assert abs(read[3].mean() - 60) < 4
    assert sorted(path.name for path in tmp_path.iterdir()) == ["walk.gif", "walk.mp4"]
    with pytest.raises(ValueError, match=r"expected the suffix \.mp4 or \.gif"):
        write_video(tmp_path / "walk.avi", frames, fps=10)
