"""The golden numbers of AIME and AIME-v2: losses, gradients, states and actions of whole models.

Recorded from the original networks in float64 (walker, mdp, T = 4, B = 3). Weights, data and noise
follow from formulas, so that only the numbers below had to be stored.
"""

from functools import cache

import numpy as np
import pytest
import torch

from fastrssm.models.policy import TanhGaussianPolicy
from fastrssm.models.world_model import WorldModel, world_model_config

WALKER = (("orientations", 14, "first"), ("height", 1, "first"), ("velocity", 9, "second"))
T, B, A = 4, 3, 6

# fmt: off
FILLED = {"rssm": 76, "rssmo": 70, "rssmo_v2": 76}
PHASE_1 = {  # reconstruction, kl, idm, total
    "rssm": ("71.9253407642", "5.9761113449", "11.7204785917", "89.6219307007"),
    "rssmo": ("117.9599232045", "11.0786508775", "11.9573544866", "140.9959285685"),
    "rssmo_v2": ("32.6988829410", "12.4282572182", "10.6536552514", "55.7807954105"),
}
UNWEIGHTED = {  # rec_term, kl_term
    "rssm": ("-104.6869963984", "-8.6556744545"),
    "rssmo": ("-117.9599232045", "-11.0786508775"),
}
GRADIENT = {"rssm": "52.9898591789", "rssmo": "312.4088665205", "rssmo_v2": "328.6239887208"}
CELL_GRADIENT = {"rssm": "9.1973369836", "rssmo": "113.8663142750"}
LAST_DETER = {
    "rssm": ("0.3061328441", "-0.2326355050", "0.4142498229"),
    "rssmo": ("0.1713365278", "0.1670863827", "-0.2845935520"),
    "rssmo_v2": ("-0.8169071461", "-0.5802791762", "-0.3879018715"),
}
LAST_STOCH = {
    "rssm": ("-0.7387595759", "-0.7785731912", "-0.7477946993"),
    "rssmo": ("-1.4483123130", "-1.2753013016", "-0.7905325896"),
    "rssmo_v2": ("-0.7591054439", "-0.8453069722", "-0.7466555167"),
}
PHASE_2 = {  # reconstruction, kl, total
    "rssm": ("71.8546664886", "5.9791851487", "77.8338516374"),
    "rssmo": ("118.1276424891", "12.5311194530", "130.6587619422"),
    "rssmo_v2": ("31.5405370608", "12.6476824033", "44.1882194642"),
}
POLICY_GRADIENT = {"rssm": "0.2768137007", "rssmo": "4.6589632842", "rssmo_v2": "5.2291478833"}
FIRST_ACTION = ("0.1369932042", "0.5457595363", "0.4636238715")
LAST_ACTION = {
    "rssm": ("0.6746904073", "0.3036454721", "-0.3918025097"),
    "rssmo": ("0.6623549820", "0.2724980745", "-0.4465479380"),
    "rssmo_v2": ("0.7191712462", "0.2686144811", "-0.4031845020"),
}
# reconstruction, kl, action_kl, total, gradient norm of the policy. The action_kl of rssmo is the
# printed total minus the printed other two; the table itself has ...475, which does not add up
WITH_IDM = {
    "rssm": ("71.8380975972", "6.0099238171", "0.5928749869", "78.4408964011", "5.1446925750"),
    "rssmo": ("118.2366273954", "12.4582217395", "0.7529776485", "131.4478267834", "6.3906541901"),
}
# fmt: on


def fill(module: torch.nn.Module) -> int:
    """Set every parameter by the formula of the specification; return how many there are."""
    k_factor, n_factor = np.uint32(0x9E3779B1), np.uint32(0x85EBCA6B)
    state = module.state_dict()
    for n, (name, tensor) in enumerate(state.items(), start=1):
        z = np.arange(1, tensor.numel() + 1, dtype=np.uint32) * k_factor
        z += np.array([n], np.uint32) * n_factor
        z ^= z >> 16
        z *= np.uint32(0x7FEB352D)
        z ^= z >> 15
        z *= np.uint32(0x846CA68B)
        z ^= z >> 16
        u = torch.from_numpy(2.0 * z.astype(np.float64) / 2.0**32 - 1.0).reshape(tensor.shape)
        if tensor.ndim >= 2:
            u = u / tensor.shape[-1] ** 0.5
        else:
            u = 1.0 + 0.1 * u if name.endswith("weight") else 0.1 * u
        tensor.copy_(u)
    return len(state)


def wave(function, t, b, i, size, *, scale=1.0):
    """function(t * step + b * row + i * element), [T, B, size]."""
    steps, rows, elements = (torch.arange(n, dtype=torch.float64) for n in (T, B, size))
    return scale * function(t * steps[:, None, None] + b * rows[:, None] + i * elements)


def walker_batch() -> dict[str, torch.Tensor]:
    observation = wave(torch.cos, 0.3, 0.5, 0.7, 24)
    orientations, height, velocity = observation.split([14, 1, 9], -1)
    return {
        "orientations": orientations,
        "height": height,
        "velocity": velocity,
        "pre_action": wave(torch.sin, 0.2, 0.4, 0.6, A, scale=0.8),
        "is_first": torch.zeros(T, B, 1, dtype=torch.float64),
        "is_terminal": torch.zeros(T, B, 1, dtype=torch.float64),
    }


@cache
def golden_model(preset: str) -> tuple[WorldModel, int]:
    model = WorldModel(world_model_config(preset, WALKER, "mdp", A)).double()
    return model, fill(model)


def golden_policy(model: WorldModel) -> TanhGaussianPolicy:
    policy = TanhGaussianPolicy(model.config.feature_size, A).double()
    assert fill(policy) == 12
    return policy


def noises(model: WorldModel) -> dict[str, torch.Tensor]:
    return {
        "noise": wave(torch.cos, 1.1, 0.3, 0.05, model.config.rssm.stoch),
        "action_noise": wave(torch.sin, 0.5, 0.2, 0.9, A),
    }


def assert_printed(got: torch.Tensor, printed: tuple[str, ...]) -> None:
    """Every number agrees with the printed one within one unit of its last, tenth, digit."""
    expected = torch.tensor([float(x) for x in printed], dtype=torch.float64)
    torch.testing.assert_close(got.detach().flatten(), expected, rtol=0.0, atol=1e-10)


def norm(parameters) -> torch.Tensor:
    return torch.nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None])


@pytest.mark.parametrize("preset", PHASE_1)
def test_weights_follow_the_formula(preset):
    model, filled = golden_model(preset)
    assert filled == FILLED[preset]
    if preset == "rssm":
        first = next(iter(model.state_dict().values())).flatten()[:3]
        assert [f"{x:.13f}" for x in first.tolist()] == [
            "0.0209955011559",
            "0.0215508668882",
            "0.0101977809117",
        ]


@pytest.mark.parametrize("preset", PHASE_1)
def test_phase_1(preset):
    model, _ = golden_model(preset)
    model.requires_grad_(True).zero_grad()
    losses, metrics = model.elbo(walker_batch(), noise=noises(model)["noise"])
    names = ("reconstruction", "kl", "idm", "total")
    assert_printed(torch.stack([losses[name] for name in names]), PHASE_1[preset])
    if preset in UNWEIGHTED:
        assert_printed(torch.stack([metrics["rec_term"], metrics["kl_term"]]), UNWEIGHTED[preset])
    losses["total"].backward()
    assert_printed(norm(model.parameters()), (GRADIENT[preset],))
    if preset in CELL_GRADIENT:
        assert_printed(norm(model.rssm.memory_cell.parameters()), (CELL_GRADIENT[preset],))


@pytest.mark.parametrize("preset", PHASE_1)
def test_states(preset):
    model, _ = golden_model(preset)
    batch = walker_batch()
    with torch.no_grad():
        states = model.rssm.observe(
            model.encode(batch), batch["pre_action"], noise=noises(model)["noise"]
        )
    assert_printed(states.deter[-1, 0, :3], LAST_DETER[preset])
    assert_printed(states.stoch[-1, 0, :3], LAST_STOCH[preset])


@pytest.mark.parametrize("preset", PHASE_2)
def test_phase_2(preset):
    model, _ = golden_model(preset)
    model.freeze()
    policy, batch = golden_policy(model), walker_batch()
    losses, metrics = model.elbo_with_policy(batch, policy, **noises(model))
    names = ("reconstruction", "kl", "total")
    assert_printed(torch.stack([losses[name] for name in names]), PHASE_2[preset])
    losses["total"].backward()
    assert_printed(norm(policy.parameters()), (POLICY_GRADIENT[preset],))
    with torch.no_grad():
        states = model.rssm.observe_with_policy(model.encode(batch), policy, **noises(model))
    assert_printed(states.action[0, 0, :3], FIRST_ACTION)
    assert_printed(states.action[3, 2, :3], LAST_ACTION[preset])
    expected = (states.action - batch["pre_action"]).square().mean()
    torch.testing.assert_close(metrics["action_mse"], expected)


@pytest.mark.parametrize("preset", WITH_IDM)
def test_phase_2_with_inverse_dynamics(preset):
    model, _ = golden_model(preset)
    model.freeze()
    policy = golden_policy(model)
    losses, _ = model.elbo_with_policy(walker_batch(), policy, use_idm=True, **noises(model))
    losses["total"].backward()
    names = ("reconstruction", "kl", "action_kl", "total")
    got = torch.stack([*(losses[name] for name in names), norm(policy.parameters())])
    assert_printed(got, WITH_IDM[preset])
