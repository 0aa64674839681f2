import numpy as np
import pytest

from fastrssm.run.agents import RandomAgent
from fastrssm.run.video import record_video


def test_a_whole_episode_is_filmed(tmp_path):
    imageio = pytest.importorskip("imageio.v2")
    path = tmp_path / "cheetah.gif"
    try:
        count = record_video(
            RandomAgent(6), "cheetah-run", path, seed=0, num_envs=2, height=48, width=64, fps=5
        )
    except RuntimeError as error:
        pytest.skip(str(error))
    # 500 steps of 0.02 s: every tenth at five frames a second
    assert count == 50
    frames = list(imageio.get_reader(path).iter_data())
    assert len(frames) == count
    assert frames[0].shape[:2] == (48, 128)
    # two episodes from two poses
    assert not np.array_equal(frames[0][:, :64], frames[0][:, 64:])
