"""A tiny dataset of a fake walker, and one tiny pretrained model for all tests of this folder."""

import numpy as np
import pytest

from fastrssm.algos import pretrain
from fastrssm.data.episode import write_episode
from fastrssm.envs import TASKS
from fastrssm.run.start import Sizes


@pytest.fixture(scope="session")
def walker_data(tmp_path_factory):
    """Six episodes of 30 frames whose sensors follow the actions, with the actions in the files."""
    folder = tmp_path_factory.mktemp("walker-data")
    random = np.random.default_rng(0)
    task = TASKS["walker-walk"]
    mixing = {name: random.normal(size=(task.action_size, n)) for name, n, _ in task.sensors}
    for number in range(6):
        action = random.uniform(-1, 1, (30, task.action_size)).astype(np.float32)
        action[0] = 0
        state = np.cumsum(action, 0) / 10
        first, last = np.zeros((2, 30, 1), bool)
        first[0] = last[-1] = True
        sensors = {name: np.tanh(state @ matrix) for name, matrix in mixing.items()}
        flags = {"is_first": first, "is_last": last, "is_terminal": np.zeros((30, 1), bool)}
        episode = {**sensors, **flags, "pre_action": action, "reward": np.zeros((30, 1))}
        write_episode(folder / f"{number}.npz", episode)
    return folder


@pytest.fixture(scope="session")
def pretrain_args(walker_data):
    """Arguments of a tiny phase 1 as a dict, without `out`."""
    return {
        "data": str(walker_data),
        "env": "walker-walk",
        "rssm": Sizes(deter=16, stoch=4, hidden=8),
        "updates": 6,
        "batch_size": 4,
        "horizon": 6,
        "log_every": 2,
        "checkpoint_every": 2,
        "eval_every": 3,
    }


@pytest.fixture(scope="session")
def pretrained(pretrain_args, tmp_path_factory):
    """Run folder of a tiny phase 1."""
    out = tmp_path_factory.mktemp("pretrained")
    pretrain.train(pretrain.Args(**pretrain_args, out=str(out)))
    return out
