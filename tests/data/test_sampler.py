import threading

import numpy as np
import pytest
import torch
from test_episode import make_episode

from fastrssm.data import Dataset, FrameStacks, WindowSampler
from fastrssm.data.episode import write_episode

LENGTHS = (9, 6, 12, 4, 7)


@pytest.fixture(scope="module")
def dataset(tmp_path_factory):
    """Episodes in which `position` tells the frame, and `height` the episode."""
    folder = tmp_path_factory.mktemp("episodes")
    frame = 0
    for n, length in enumerate(LENGTHS):
        episode = make_episode(length)
        episode["position"] = np.arange(frame, frame + length, dtype=np.float32)[:, None]
        episode["height"] = np.full((length, 1), n, np.float32)
        episode["image"] = np.full((length, 2, 2, 3), n, np.uint8)
        write_episode(folder / f"{n}.npz", episode)
        frame += length
    return Dataset.open(folder, ["position", "height", "pre_action", "is_first", "image"])


def assert_equal_batches(a, b):
    assert list(a) == list(b)
    for key in a:
        assert torch.equal(a[key], b[key]), key


def test_windows_are_contiguous_frames_of_one_episode(dataset):
    with WindowSampler(dataset, horizon=5, batch_size=16) as sampler:
        for _ in range(20):
            batch = sampler.sample()
            assert {key: x.shape for key, x in batch.items()} == {
                "position": (5, 16, 1),
                "height": (5, 16, 1),
                "pre_action": (5, 16, 2),
                "is_first": (5, 16, 1),
                "image": (5, 16, 2, 2, 3),
            }
            assert batch["image"].dtype == torch.uint8
            assert all(x.dtype == torch.float32 for k, x in batch.items() if k != "image")
            assert (batch["position"].diff(dim=0) == 1).all()
            assert (batch["height"] == batch["height"][0]).all()
            # every other column comes from the same frames
            rows = batch["position"][..., 0].long().numpy()
            for key, column in dataset.arrays.items():
                np.testing.assert_array_equal(batch[key].numpy(), column[rows])


def test_every_window_is_equally_likely(dataset):
    draws, horizon = 40_000, 5
    sampler = WindowSampler(dataset, horizon, draws, keys=["position"], prefetch=False)
    begins = sampler.sample()["position"][0, :, 0].long().numpy()
    windows = dataset.windows(horizon)
    counts = np.array([(begins == w).sum() for w in windows])
    assert counts.sum() == draws
    # chi-square with W - 1 degrees of freedom: mean W - 1, variance 2 (W - 1); six deviations
    expected = draws / len(windows)
    chi2 = ((counts - expected) ** 2 / expected).sum()
    freedom = len(windows) - 1
    assert abs(chi2 - freedom) < 6 * np.sqrt(2 * freedom)


def test_seed_determines_the_batches(dataset):
    with (
        WindowSampler(dataset, 4, 8, seed=3) as ahead,
        WindowSampler(dataset, 4, 8, seed=3, prefetch=False) as plain,
        WindowSampler(dataset, 4, 8, seed=4) as other,
    ):
        for _ in range(6):
            batch = ahead.sample()
            assert_equal_batches(batch, plain.sample())
            assert not torch.equal(batch["position"], other.sample()["position"])


def test_batches_are_not_overwritten(dataset):
    with WindowSampler(dataset, 4, 8) as sampler, WindowSampler(dataset, 4, 8) as again:
        kept = [sampler.sample() for _ in range(8)]
        for batch in kept:
            assert_equal_batches(batch, again.sample())


@pytest.mark.parametrize("prefetch", [True, False])
def test_resume_continues_with_the_same_batches(dataset, prefetch):
    with WindowSampler(dataset, 4, 8, seed=5, prefetch=prefetch) as sampler:
        for _ in range(3):
            sampler.sample()
        state = sampler.state_dict()
        expected = [sampler.sample() for _ in range(4)]
    assert all(type(value) is int for value in state.values())
    with WindowSampler(dataset, 4, 8, seed=0, prefetch=not prefetch) as resumed:
        # batches that were gathered ahead of the old stream are dropped
        resumed.sample()
        resumed.load_state_dict(state)
        assert resumed.state_dict() == state
        for batch in expected:
            assert_equal_batches(resumed.sample(), batch)
    with (
        WindowSampler(dataset, 5, 8) as other,
        pytest.raises(ValueError, match="state was taken over 23 windows, but the dataset has 18"),
    ):
        other.load_state_dict(state)


def test_failure_of_the_thread_is_raised_and_skips_nothing(dataset, monkeypatch):
    with WindowSampler(dataset, 4, 8) as sampler, WindowSampler(dataset, 4, 8) as whole:
        gather = sampler._gather
        monkeypatch.setattr(sampler, "_gather", lambda number: gather(number) if number else 1 / 0)
        for _ in range(2):
            with pytest.raises(ZeroDivisionError):
                sampler.sample()
        monkeypatch.undo()
        sampler.load_state_dict(sampler.state_dict())
        assert_equal_batches(sampler.sample(), whole.sample())


def test_close_ends_the_thread(dataset):
    before = threading.active_count()
    sampler = WindowSampler(dataset, 4, 8)
    sampler.sample()
    assert threading.active_count() == before + 1
    sampler.close()
    assert threading.active_count() == before
    with pytest.raises(RuntimeError, match="after shutdown"):
        sampler.sample()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"batch_size": 0}, "batch_size must be at least 1, got 0"),
        ({"seed": -1}, "seed must not be negative, got -1"),
        ({"horizon": 13}, "no window of horizon 13 fits; the longest of 5 episodes has 12 frames"),
        ({"keys": ["speed"]}, "keys contains speed; the dataset was opened with position"),
    ],
)
def test_bad_arguments(dataset, change, message):
    with pytest.raises(ValueError, match=message):
        WindowSampler(dataset, **{"horizon": 4, "batch_size": 8, **change})


def test_epoch_gives_every_window_once(dataset):
    train, validation = FrameStacks.split(dataset, 3, keys=["position", "height"])
    seen = []
    for side in (train, validation):
        batches = list(side.epoch(0, batch_size=4))
        assert [b["position"].shape[1] for b in batches[:-1]] == [4] * (len(batches) - 1)
        assert all((b["position"].diff(dim=0) == 1).all() for b in batches)
        begins = torch.cat([b["position"][0, :, 0] for b in batches]).long().tolist()
        assert len(begins) == len(side)
        seen += begins
    assert sorted(seen) == dataset.windows(3).tolist()


def test_split_is_by_episode(dataset):
    train, validation = FrameStacks.split(dataset, 1, seed=1)
    sides = [
        {int(h) for b in side.epoch(0, 8) for h in b["height"].flatten()}
        for side in (train, validation)
    ]
    assert sides[0] | sides[1] == set(range(5))
    assert not sides[0] & sides[1]
    # 70 % of five episodes, rounded
    assert len(sides[0]) == 4


def test_epochs_are_shuffled_anew_and_repeatable(dataset):
    train, _ = FrameStacks.split(dataset, 2)

    def order(number, seed=0):
        return torch.cat([b["position"][0, :, 0] for b in train.epoch(number, 4, seed)])

    assert torch.equal(order(0), order(0))
    assert not torch.equal(order(0), order(1))
    assert not torch.equal(order(0), order(0, seed=1))
    assert not torch.equal(order(0), order(0).sort().values)


def test_split_by_window_gives_each_window_to_one_side(dataset):
    train, validation = FrameStacks.split(dataset, 3, by="window", train_share=0.5, seed=1)
    windows = dataset.windows(3)
    assert len(train) == round(0.5 * len(windows))
    np.testing.assert_array_equal(np.sort([*train.starts, *validation.starts]), windows)
    # episodes lie on both sides, as in the original
    episodes = [
        set(np.searchsorted(dataset.starts, x.starts, "right")) for x in (train, validation)
    ]
    assert episodes[0] & episodes[1]
    with pytest.raises(ValueError, match="by must be one of episode, window, got 'frame'"):
        FrameStacks.split(dataset, 3, by="frame")


def test_split_refuses_what_cannot_be_divided(dataset):
    with pytest.raises(ValueError, match=r"train_share must be between 0 and 1, got 1\.0"):
        FrameStacks.split(dataset, 2, train_share=1.0)
    one = Dataset.open(dataset.folder, ["position"], max_episodes=1)
    with pytest.raises(ValueError, match="one episode cannot be divided"):
        FrameStacks.split(one, 2)
    with pytest.raises(ValueError, match="no window of horizon 12 fits"):
        FrameStacks.split(dataset, 12)


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
def test_cuda_batches_equal_those_of_the_cpu(dataset):
    with (
        WindowSampler(dataset, 4, 8, device="cuda") as gpu,
        WindowSampler(dataset, 4, 8) as cpu,
    ):
        for _ in range(50):
            batch = gpu.sample()
            assert all(x.is_cuda for x in batch.values())
            assert_equal_batches({key: x.cpu() for key, x in batch.items()}, cpu.sample())
