import json
import os
import shutil

import numpy as np
import pytest
from test_episode import make_episode

from fastrssm.data import Dataset, info
from fastrssm.data.episode import write_episode

KEYS = ("position", "height", "pre_action", "is_first")


@pytest.fixture
def folder(tmp_path):
    # more than nine, so that the order of integers differs from that of names
    for n in range(12):
        write_episode(tmp_path / f"{n}.npz", make_episode(5 + n % 3, seed=n))
    return tmp_path


def test_columns_are_the_episodes_in_order(folder):
    dataset = Dataset.open(folder, KEYS)
    assert dataset.num_episodes == 12
    assert dataset.num_frames == 12 * 6
    assert set(dataset.arrays) == set(KEYS)
    for n in range(12):
        episode = make_episode(5 + n % 3, seed=n)
        rows = slice(dataset.starts[n], dataset.starts[n + 1])
        for key in KEYS:
            assert dataset.arrays[key].dtype == np.float32
            np.testing.assert_array_equal(dataset.arrays[key][rows], episode[key])
    with pytest.raises(ValueError, match="read-only"):
        dataset.arrays["height"][0] = 1


def test_images_stay_bytes(tmp_path):
    episode = make_episode()
    episode["image"] = np.random.default_rng(1).integers(0, 256, (7, 4, 4, 3), np.uint8)
    write_episode(tmp_path / "0.npz", episode)
    image = Dataset.open(tmp_path, ["image"]).arrays["image"]
    assert image.dtype == np.uint8
    np.testing.assert_array_equal(image, episode["image"])


def test_cache_is_used_extended_and_rebuilt(folder, monkeypatch):
    reads = []
    original = np.load

    def load(path, *args, **kwargs):
        reads.append(os.fspath(path))
        return original(path, *args, **kwargs)

    monkeypatch.setattr(np, "load", load)

    def episodes_read(keys):
        reads.clear()
        dataset = Dataset.open(folder, keys)
        return dataset, sum(path.endswith(".npz") for path in reads)

    assert episodes_read(["height"])[1] == 12
    assert episodes_read(["height"])[1] == 0
    # one more column is unpacked without touching those that exist
    assert episodes_read(["height", "position"])[1] == 12
    assert episodes_read(["height", "position"])[1] == 0
    stale = list((folder / ".cache").iterdir())
    write_episode(folder / "3.npz", make_episode(9, seed=99))
    dataset, count = episodes_read(["height"])
    assert count == 12
    begin = dataset.starts[3]
    np.testing.assert_array_equal(
        dataset.arrays["height"][begin : begin + 9], make_episode(9, seed=99)["height"]
    )
    assert len(stale) == 1
    assert not stale[0].exists()
    (folder / "11.npz").unlink()
    assert episodes_read(["height"])[0].num_episodes == 11
    names = {path.name for path in (folder / ".cache").rglob("*") if path.is_file()}
    assert names == {"starts.npy", "column-height.npy"}


def test_first_episodes_only(folder):
    part = Dataset.open(folder, KEYS, max_episodes=2)
    assert (part.num_episodes, part.num_frames) == (2, 11)
    assert len(part.arrays["height"]) == 11
    assert Dataset.open(folder, KEYS, max_episodes=100).num_episodes == 12


def test_windows_lie_inside_episodes(folder):
    dataset = Dataset.open(folder, KEYS)
    windows = dataset.windows(6)
    expected = [
        frame
        for begin, end in zip(dataset.starts[:-1], dataset.starts[1:], strict=True)
        for frame in range(begin, end - 5)
    ]
    assert windows.tolist() == expected
    assert len(dataset.windows(1)) == dataset.num_frames
    assert dataset.windows(7, np.array([2, 5])).tolist() == [dataset.starts[2], dataset.starts[5]]
    with pytest.raises(ValueError, match="no window of horizon 8 fits; the longest .* 7 frames"):
        dataset.windows(8)
    with pytest.raises(ValueError, match="horizon must be at least 1, got 0"):
        dataset.windows(0)


def test_bad_input_is_refused(folder, tmp_path_factory):
    empty = tmp_path_factory.mktemp("empty")
    with pytest.raises(FileNotFoundError, match="nowhere: no such dataset folder"):
        Dataset.open(empty / "nowhere", KEYS)
    (empty / "walker.npz").touch()
    with pytest.raises(ValueError, match="holds no episode named <number>.npz"):
        Dataset.open(empty, KEYS)
    with pytest.raises(ValueError, match="keys must be a non-empty sequence"):
        Dataset.open(folder, "height")
    with pytest.raises(ValueError, match="max_episodes must be at least 1, got 0"):
        Dataset.open(folder, KEYS, max_episodes=0)
    with pytest.raises(ValueError, match="column 'speed' is missing; the file has"):
        Dataset.open(folder, ["speed"])
    wider = make_episode()
    wider["height"] = np.zeros((7, 2))
    write_episode(folder / "12.npz", wider)
    with pytest.raises(ValueError, match=r"12\.npz: column 'height' has frames of float32 \(2,\)"):
        Dataset.open(folder, ["height"])
    # nothing half-made is left that a later opening could take for whole
    assert not [path for path in (folder / ".cache").rglob("*") if path.is_file()]


def test_damaged_cache_is_noticed(folder):
    Dataset.open(folder, ["height"])
    (column,) = (folder / ".cache").rglob("column-height.npy")
    np.save(column, np.zeros((3, 1), np.float32))
    with pytest.raises(ValueError, match="damaged cache; delete"):
        Dataset.open(folder, ["height"])


def test_info(folder, tmp_path_factory):
    summary = json.loads(json.dumps(info(folder)))
    assert (summary["episodes"], summary["frames"]) == (12, 72)
    assert summary["keys"]["position"] == {"shape": [3], "dtype": "float32"}
    returns = [make_episode(5 + n % 3, seed=n)["reward"].sum(dtype=np.float64) for n in range(12)]
    assert summary["returns"]["mean"] == pytest.approx(np.mean(returns), rel=1e-12)
    assert summary["returns"]["std"] == pytest.approx(np.std(returns), rel=1e-12)
    # the checksum sees content, not the container
    other = tmp_path_factory.mktemp("compressed")
    for n in range(12):
        np.savez_compressed(other / f"{n}.npz", **np.load(folder / f"{n}.npz"))
    assert info(other)["checksum"] == summary["checksum"]
    shutil.copy(other / "1.npz", other / "0.npz")
    assert info(other)["checksum"] != summary["checksum"]
