"""Tapes: what is played is what was recorded, to the last bit."""

import json

import numpy as np
import pytest
from safetensors.numpy import save_file

from fastrssm.cli import main
from fastrssm.data.episode import read_episode, write_episode
from fastrssm.envs import find_task, make_vec
from fastrssm.run import datasets
from fastrssm.run.agents import RandomAgent
from fastrssm.run.collect import rollout
from fastrssm.run.tapes import OnGrid, episode_seed, load_tape, play, record_run, save_tape

# of the torso after 60 steps of the first episodes of the shipped tape
WALKER_HEIGHTS = (
    0.12234942, 0.23354565, 0.1260735, 0.6263653, 0.32354367, 0.12774448,
    0.090563215, 0.4198736, 0.07528497, 0.0758906, 0.09617058, 0.16927598,
)  # fmt: skip


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A folder like that of a run: nine short episodes of the walker, three at a time."""
    folder = tmp_path_factory.mktemp("tapes") / "run"
    (folder / "episodes").mkdir(parents=True)
    args = {"env": "walker-walk", "seed": 7}
    (folder / "config.json").write_text(json.dumps({"algorithm": "plan2explore", "args": args}))
    env = make_vec("walker-walk", 3, episode_steps=40)
    for first in (0, 3, 6):
        seeds = [episode_seed(7, first + i) for i in range(3)]
        agent = OnGrid(RandomAgent(6, first))
        for i, episode in enumerate(rollout(env, agent, 3, seed=seeds)):
            write_episode(folder / "episodes" / f"{first + i}.npz", episode)
    env.close()
    return folder


@pytest.fixture(scope="module")
def tape(run):
    return record_run(run)


@pytest.mark.parametrize("num_envs", [1, 4, 9, 16])
def test_a_tape_plays_what_was_recorded(run, tape, num_envs):
    assert tape.actions.shape == (9, 40, 6)
    assert tape.run["algorithm"] == "plan2explore"
    assert tape.run["args"]["seed"] == 7
    for number, episode in enumerate(play(tape, 9, num_envs)):
        recorded = read_episode(run / "episodes" / f"{number}.npz")
        for name, column in recorded.items():
            np.testing.assert_array_equal(episode[name].astype(column.dtype), column)


def test_part_of_a_tape(run, tape):
    episodes = list(play(tape, 2, steps=10))
    assert [len(episode["reward"]) for episode in episodes] == [11, 11]
    # spread evenly over the nine
    recorded = read_episode(run / "episodes" / "4.npz")
    np.testing.assert_array_equal(episodes[1]["velocity"], recorded["velocity"][:11])


def test_the_file_and_the_command_line(run, tape, tmp_path, capsys):
    assert main(["data", "tape", str(run), "--out", str(tmp_path / "w.tape")]) == 0
    # a byte an action, and little else
    assert (tmp_path / "w.tape").stat().st_size < 9 * 40 * 6 + 500
    assert load_tape(tmp_path / "w.tape").env_id == "walker-walk"
    words = ["data", "make", str(tmp_path / "w.tape"), "--out", str(tmp_path / "made")]
    assert main([*words, "--episodes", "4"]) == 0
    assert len(list((tmp_path / "made").glob("*.npz"))) == 4
    assert (tmp_path / "made/3.npz").read_bytes() == (run / "episodes/6.npz").read_bytes()


def test_what_cannot_be_taped_is_refused(run, tmp_path):
    folder = tmp_path / "run"
    (folder / "episodes").mkdir(parents=True)
    episode = read_episode(run / "episodes/0.npz")
    write_episode(folder / "episodes/0.npz", episode)
    with pytest.raises(ValueError, match="is not a dreamer or plan2explore run"):
        record_run(folder)
    (folder / "config.json").write_text((run / "config.json").read_text())
    record_run(folder)
    # the episode of another seed
    write_episode(folder / "episodes/0.npz", read_episode(run / "episodes/1.npz"))
    with pytest.raises(ValueError, match="0.npz: .* is another when the actions are played again"):
        record_run(folder)
    between = episode["pre_action"] * np.float32(0.999)
    write_episode(folder / "episodes/0.npz", episode | {"pre_action": between})
    with pytest.raises(ValueError, match="an action is not a multiple of 1/127"):
        record_run(folder)


def test_damaged_tapes_are_refused(tape, tmp_path):
    path = tmp_path / "a.tape"
    path.write_bytes(b"no tape")
    with pytest.raises(ValueError, match="a.tape: not a tape"):
        load_tape(path)
    save_tape(path, tape._replace(env_id="cheetah-jump"))
    with pytest.raises(ValueError, match="cheetah-jump"):
        load_tape(path)
    save_tape(path, tape._replace(actions=tape.actions[:, :, :5].copy()))
    with pytest.raises(ValueError, match=r"expected int8 \[9, steps, 6\] for walker-walk"):
        load_tape(path)
    save_file({"seeds": tape.seeds}, path, {"tape": json.dumps({"env": "walker-walk", "run": {}})})
    with pytest.raises(ValueError, match="not a tape"):
        load_tape(path)


def test_the_tape_of_the_walker_plays_its_run():
    tape = load_tape(datasets.TAPES / "walker-plan2explore.tape")
    assert (tape.actions.shape, tape.run["args"]["seed"]) == ((1005, 500, 6), 42)
    # heights after 60 steps as the run saw them, random episodes first
    first = tape._replace(seeds=tape.seeds[:12], actions=tape.actions[:12])
    heights = [episode["height"][-1, 0] for episode in play(first, 12, steps=60)]
    np.testing.assert_allclose(heights, WALKER_HEIGHTS, rtol=0, atol=1e-4)


@pytest.mark.parametrize("path", sorted(datasets.TAPES.glob("*-buffer.tape")), ids=lambda p: p.stem)
def test_the_tapes_of_buffers_show_a_learner(path):
    tape = load_tape(path)
    assert tape.actions.shape == (500, 500, find_task(tape.env_id).action_size)
    assert (path.stem, tape.run["algorithm"]) == (f"{tape.env_id}-buffer", "expert")
    ends = np.r_[:5, 495:500]
    part = tape._replace(seeds=tape.seeds[ends], actions=tape.actions[ends])
    returns = [float(episode["reward"].sum()) for episode in play(part, 10)]
    # actions from another moment, or another seed, would not stand, walk or run at the end
    expert = find_task(tape.env_id).expert_return
    assert expert is not None
    assert max(returns[:5]) < 0.3 * expert
    assert min(returns[5:]) > 0.6 * expert
