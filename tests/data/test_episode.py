import pickle
import zipfile

import numpy as np
import pytest

from fastrssm.data.episode import read_arrays, read_episode, write_episode


def make_episode(length=7, seed=0):
    rng = np.random.default_rng(seed)
    frames = np.arange(length)
    episode = {
        "position": rng.standard_normal((length, 3)).astype(np.float32),
        "height": rng.standard_normal((length, 1)).astype(np.float32),
        "pre_action": rng.uniform(-1, 1, (length, 2)).astype(np.float32),
        "reward": rng.uniform(size=(length, 1)).astype(np.float32),
        "is_first": (frames == 0)[:, None],
        "is_last": (frames == length - 1)[:, None],
        "is_terminal": np.zeros((length, 1), bool),
    }
    episode["pre_action"][0] = 0
    episode["reward"][0] = 0
    return episode


def test_round_trip(tmp_path):
    episode = make_episode()
    episode["image"] = np.random.default_rng(1).integers(0, 256, (7, 4, 4, 3), np.uint8)
    write_episode(tmp_path / "0.npz", episode)
    got = read_episode(tmp_path / "0.npz")
    assert list(got) == list(episode)
    for key, column in episode.items():
        assert got[key].dtype == column.dtype
        np.testing.assert_array_equal(got[key], column)
    assert [path.name for path in tmp_path.iterdir()] == ["0.npz"]


def test_equal_arrays_give_equal_bytes(tmp_path):
    write_episode(tmp_path / "a.npz", make_episode())
    write_episode(tmp_path / "b.npz", make_episode())
    assert (tmp_path / "a.npz").read_bytes() == (tmp_path / "b.npz").read_bytes()
    with zipfile.ZipFile(tmp_path / "a.npz") as archive:
        assert {member.date_time[0] for member in archive.infolist()} == {1980}


def test_reads_files_as_aime_writes_them(tmp_path):
    # float64 columns, deflate, uint8 flags, bare vectors, and columns nobody knows
    episode = make_episode()
    foreign = {key: column.astype(np.float64) for key, column in episode.items()}
    foreign["is_first"] = episode["is_first"].astype(np.uint8)
    foreign["reward"] = foreign["reward"][:, 0]
    np.savez_compressed(tmp_path / "0.npz", task=np.array(["walk"]), **foreign)
    got = read_episode(tmp_path / "0.npz")
    assert set(got) == set(episode)
    for key, column in episode.items():
        assert got[key].dtype == column.dtype
        np.testing.assert_array_equal(got[key], column)
    assert list(read_episode(tmp_path / "0.npz", ["height"])) == ["height"]


def test_unreadable_files_are_named(tmp_path):
    path = tmp_path / "3.npz"
    write_episode(path, make_episode())
    whole = path.read_bytes()
    for size in (0, 10, len(whole) // 2, len(whole) - 5):
        path.write_bytes(whole[:size])
        with pytest.raises(ValueError, match=r"3\.npz: not a readable \.npz episode"):
            read_episode(path)
    damaged = bytearray(whole)
    damaged[whole.index(b"NUMPY") + 150] ^= 0xFF
    path.write_bytes(damaged)
    with pytest.raises(ValueError, match=r"3\.npz: column 'position' cannot be read \(Bad CRC"):
        read_episode(path)
    np.save(tmp_path / "array", np.zeros(3))
    (tmp_path / "array.npy").rename(path)
    with pytest.raises(ValueError, match=r"3\.npz: not an \.npz episode but a single array"):
        read_episode(path)
    with pytest.raises(FileNotFoundError, match=r"4\.npz: no such episode"):
        read_episode(tmp_path / "4.npz")


def test_pickles_are_never_loaded(tmp_path):
    class Trap:
        def __reduce__(self):
            return (pytest.fail, ("a pickle was executed",))

    path = tmp_path / "0.npz"
    path.write_bytes(pickle.dumps(Trap()))
    with pytest.raises(ValueError, match=r"0\.npz: not a readable \.npz episode"):
        read_episode(path)
    with path.open("wb") as file:
        np.savez(file, allow_pickle=True, position=np.array([Trap(), Trap()], object))
    with pytest.raises(ValueError, match=r"0\.npz: column 'position' cannot be read.*allow_pickle"):
        read_episode(path)


@pytest.mark.parametrize(
    ("key", "change", "message"),
    [
        (
            "position",
            lambda x: np.where(x == x[2, 1], np.nan, x),
            "'position' is not finite at fra",
        ),
        ("position", lambda x: x.astype(np.float64) * 1e300, "'position' is not finite at frame 0"),
        (
            "pre_action",
            lambda x: np.where(x == x[3, 0], np.inf, x),
            "'pre_action' is not finite at",
        ),
        ("pre_action", lambda x: x * 3, r"'pre_action' reaches [\d.]+, outside \[-1, 1\]"),
        ("height", lambda x: x[:-1], "columns differ in length: .*'height': 6"),
        ("height", lambda x: x[0, 0], "'height' is a single number"),
    ],
)
def test_malformed_content_is_refused(tmp_path, key, change, message):
    episode = make_episode()
    episode[key] = change(episode[key])
    np.savez(tmp_path / "0.npz", **episode)
    with pytest.raises(ValueError, match=rf"0\.npz: .*{message}"):
        read_episode(tmp_path / "0.npz")
    with pytest.raises(ValueError, match=rf"1\.npz: .*{message}"):
        write_episode(tmp_path / "1.npz", episode)
    assert not (tmp_path / "1.npz").exists()


def test_actions_may_exceed_one_by_rounding(tmp_path):
    episode = make_episode()
    episode["pre_action"][1] = np.nextafter(np.float32(1), np.float32(2))
    write_episode(tmp_path / "0.npz", episode)
    assert read_episode(tmp_path / "0.npz")["pre_action"].max() > 1


def test_missing_columns_are_named(tmp_path):
    write_episode(tmp_path / "0.npz", make_episode())
    with pytest.raises(ValueError, match=r"0\.npz: column 'velocity' is missing; the file has pos"):
        read_episode(tmp_path / "0.npz", ["position", "velocity"])
    np.savez(tmp_path / "1.npz", name=np.array(["walker"]))
    with pytest.raises(ValueError, match="column 'name' has dtype <U6, not numbers"):
        read_arrays(tmp_path / "1.npz", ["name"])
    with pytest.raises(ValueError, match="has no column of numbers"):
        read_arrays(tmp_path / "1.npz")


@pytest.mark.parametrize(
    ("key", "frame", "value", "message"),
    [
        ("pre_action", 0, 0.5, "'pre_action' of frame 0 must be zero"),
        ("reward", 0, 1.0, "'reward' of frame 0 must be zero"),
        ("is_first", 3, True, "'is_first' must be true at frame 0 and nowhere else"),
        ("is_last", 6, False, "'is_last' must be true at the last frame"),
    ],
)
def test_writing_keeps_the_layout(tmp_path, key, frame, value, message):
    episode = make_episode()
    episode[key][frame] = value
    with pytest.raises(ValueError, match=message):
        write_episode(tmp_path / "0.npz", episode)
    del episode[key]
    with pytest.raises(ValueError, match=f"lacks {key}"):
        write_episode(tmp_path / "0.npz", episode)
    assert not list(tmp_path.iterdir())
