"""Training on a backend is training on the reference: the same losses, update for update."""

from dataclasses import replace

import pytest
import torch

import fastrssm
from fastrssm.models.world_model import WorldModel, world_model_config

SENSORS = (("position", 3, "first"), ("velocity", 2, "second"))
UPDATES, T, B, A = 50, 6, 4, 2


def losses(backend, preset):
    """Total loss of each of some updates of a tiny world model in float32."""
    config = world_model_config(preset, SENSORS, "mdp", A)
    config = replace(config, rssm=replace(config.rssm, deter=16, stoch=4, hidden=8), hidden=8)
    torch.manual_seed(0)
    model = WorldModel(config)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    noise = torch.Generator().manual_seed(1)
    data = torch.Generator().manual_seed(2)
    seen = []
    with fastrssm.use_backend(backend):
        for _ in range(UPDATES):
            action = torch.rand(T, B, A, generator=data) * 2 - 1
            position = torch.cat((action.cumsum(0), action[..., :1]), -1)
            batch = {"position": position, "velocity": action * 0.5, "pre_action": action}
            total = model.elbo(batch, generator=noise)[0]["total"]
            optimizer.zero_grad()
            total.backward()
            optimizer.step()
            seen.append(float(total.detach()))
    return torch.tensor(seen, dtype=torch.float64)


@pytest.mark.parametrize("preset", ["rssm", "rssmo"])
def test_losses_agree(preset):
    """Both differ by rounding only, which training amplifies: 1e-7 becomes at most 1e-4."""
    reference, cpu = losses("reference", preset), losses("cpu", preset)
    assert reference[-10:].mean() < reference[:10].mean() - 1.0, "nothing was learnt"
    torch.testing.assert_close(cpu, reference, rtol=1e-4, atol=1e-4)
    assert not torch.equal(cpu, reference), "both ran on one backend"
