"""Products of bfloat16 operands train a world model as float32 ones do."""

import numpy as np
import pytest
import torch

from fastrssm.envs import find_task, make_vec
from fastrssm.models.world_model import WorldModel, world_model_config

UPDATES, T, B = 300, 50, 16


@pytest.fixture(scope="module")
def frames():
    """Random walkers: sensors and the actions that led to them, [steps, envs, size]."""
    env = make_vec("walker-walk", 64)
    observation, _ = env.reset(seed=0)
    rng = np.random.default_rng(0)
    rows = {name: [value] for name, value in observation.items()}
    rows["pre_action"] = [np.zeros((64, 6), np.float32)]
    for _ in range(200):
        action = rng.uniform(-1, 1, (64, 6)).astype(np.float32)
        for name, value in env.step(action)[0].items():
            rows[name].append(value)
        rows["pre_action"].append(action)
    return {name: torch.from_numpy(np.stack(values)) for name, values in rows.items()}


def last_loss(frames, seed, precision):
    """Mean total loss of the last 50 of all updates."""
    torch.manual_seed(seed)
    task = find_task("walker-walk")
    model = WorldModel(world_model_config("rssm", task.sensors, "mdp", task.action_size))
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-4)
    pick = torch.Generator().manual_seed(seed)
    seen = []
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision(precision)
    try:
        for _ in range(UPDATES):
            start = int(torch.randint(150, (), generator=pick))
            who = torch.randint(64, (B,), generator=pick)
            batch = {name: value[start : start + T, who] for name, value in frames.items()}
            losses, _ = model.elbo(batch, generator=pick)
            optimizer.zero_grad()
            losses["total"].backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 100.0)
            optimizer.step()
            seen.append(float(losses["total"].detach()))
    finally:
        torch.set_float32_matmul_precision(before)
    assert np.mean(seen[-50:]) < 0.5 * np.mean(seen[:10]), "nothing was learnt"
    return np.mean(seen[-50:])


@pytest.mark.slow
def test_bfloat16_ends_within_the_spread_of_seeds(frames, capsys):
    single = np.array([last_loss(frames, seed, "highest") for seed in range(4)])
    half = np.array([last_loss(frames, seed, "medium") for seed in range(4)])
    with capsys.disabled():
        print(f"\nfloat32 {single.round(4)} bfloat16 {half.round(4)}")
    assert (half != single).all()
    assert np.abs(half - single).max() <= np.ptp(single)
    assert abs(half.mean() - single.mean()) <= single.std(ddof=1)
