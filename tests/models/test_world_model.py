"""World models: sizes, configurations, what no golden number covers of the loss, errors."""

import dataclasses
import json
import math

import pytest
import torch
from test_golden import WALKER, walker_batch
from torch._subclasses.fake_tensor import FakeTensorMode

from fastrssm.models.policy import TanhGaussianPolicy
from fastrssm.models.rssm import State
from fastrssm.models.world_model import WorldModel, WorldModelConfig, world_model_config

CHEETAH = (("position", 8, "first"), ("velocity", 9, "second"))
PRESETS = ("rssm", "rssmo", "rssmo_v2", "rssmo_discrete")
SETUPS = ("mdp", "lpomdp", "visual")
COUNTS = {  # of the published checkpoints
    ("rssm", "mdp"): (2_198_588, 1_996_078),
    ("rssm", "lpomdp"): (2_094_259, 1_891_749),
    ("rssm", "visual"): (7_317_351, 7_217_888),
    ("rssmo", "mdp"): (5_976_732, 5_426_837),
    ("rssmo", "lpomdp"): (5_972_124, 5_422_229),
    ("rssmo", "visual"): (11_290_847, 10_744_536),
    ("rssmo_v2", "visual"): (9_738_056, 9_738_056),
}
WALKER_COUNTS = {
    ("rssmo_v2", "mdp"): 6_064_413,
    ("rssmo_v2", "lpomdp"): 5_512_468,
    ("rssmo_discrete", "visual"): 13_398_992,
}


def count(config: WorldModelConfig) -> int:
    with torch.device("meta"):
        return sum(p.numel() for p in WorldModel(config).parameters())


def tiny(preset: str, setup: str = "mdp", **changes) -> WorldModelConfig:
    config = world_model_config(preset, WALKER, setup, 6)
    sizes = {"deter": 8, "stoch": 6, "hidden": 8}
    if preset == "rssmo_discrete":
        sizes |= {"groups": 3}
    rssm = dataclasses.replace(config.rssm, **sizes)
    return dataclasses.replace(config, rssm=rssm, hidden=8, **changes)


def tiny_model(preset: str, setup: str = "mdp", **changes) -> WorldModel:
    torch.manual_seed(0)
    return WorldModel(tiny(preset, setup, **changes)).double()


def batch_for(setup: str) -> dict[str, torch.Tensor]:
    batch = walker_batch()
    if setup == "visual":
        g = torch.Generator().manual_seed(0)
        batch["image"] = torch.randint(0, 256, (4, 3, 3, 64, 64), generator=g, dtype=torch.uint8)
    return batch


def seeded() -> torch.Generator:
    return torch.Generator().manual_seed(3)


@pytest.mark.parametrize(("preset", "setup"), COUNTS)
def test_parameter_counts(preset, setup):
    got = tuple(count(world_model_config(preset, s, setup, 6)) for s in (WALKER, CHEETAH))
    assert got == COUNTS[preset, setup]


@pytest.mark.parametrize(("preset", "setup"), WALKER_COUNTS)
def test_parameter_counts_of_version_2(preset, setup):
    assert count(world_model_config(preset, WALKER, setup, 6)) == WALKER_COUNTS[preset, setup]


@pytest.mark.parametrize("setup", SETUPS)
@pytest.mark.parametrize("preset", PRESETS)
def test_configuration_survives_json(preset, setup):
    config = world_model_config(preset, WALKER, setup, 6)
    assert WorldModelConfig.from_dict(json.loads(json.dumps(dataclasses.asdict(config)))) == config


def test_setups():
    lpomdp = world_model_config("rssm", WALKER, "lpomdp", 6)
    assert lpomdp.inputs == lpomdp.targets == ("orientations", "height")
    assert lpomdp.probes == ("velocity",)
    visual = world_model_config("rssmo", WALKER, "visual", 6)
    assert visual.inputs == visual.targets == ("image",)
    assert visual.probes == ("orientations", "height", "velocity")


@pytest.mark.parametrize("preset", PRESETS)
def test_the_losses_never_wait_for_the_device(preset):
    """Tensors without values: whatever would read one (.item(), bool()) raises."""
    with FakeTensorMode(allow_non_fake_inputs=False):
        model = WorldModel(tiny(preset))
        batch = {k: torch.empty(4, 3, v.shape[-1]) for k, v in walker_batch().items()}
        policy = TanhGaussianPolicy(model.config.feature_size, 6, hidden=8)
        losses, _ = model.elbo(batch)
        losses["total"].backward()
        losses, _ = model.elbo_with_policy(batch, policy, use_idm=True)
        losses["total"].backward()
        assert all(p.grad is not None for p in policy.parameters())


@pytest.mark.parametrize("setup", SETUPS)
@pytest.mark.parametrize("preset", PRESETS)
def test_both_phases_run_and_reach_every_parameter(preset, setup):
    model, batch = tiny_model(preset, setup), batch_for(setup)
    losses, metrics = model.elbo(batch, generator=seeded())
    assert set(losses) == {"reconstruction", "kl", "idm", "probe", "total"}
    losses["total"].backward()
    without = [name for name, p in model.named_parameters() if p.grad is None]
    assert without == []
    assert all(v.ndim == 0 and v.isfinite() and not v.requires_grad for v in metrics.values())
    for name in model.config.targets:
        assert {f"{name}_mse", f"{name}_rec_term"} <= set(metrics)

    model.zero_grad()
    model.freeze()
    policy = TanhGaussianPolicy(model.config.feature_size, 6, hidden=8).double()
    losses, metrics = model.elbo_with_policy(batch, policy, generator=seeded())
    losses["total"].backward()
    assert all(p.grad is None for p in model.parameters())
    assert all(p.grad.any() for p in policy.parameters())
    assert metrics["action_mse"].isfinite()


def test_the_same_seed_gives_the_same_loss():
    model, batch = tiny_model("rssm"), walker_batch()
    first, second = (model.elbo(batch, generator=seeded())[0]["total"] for _ in range(2))
    assert torch.equal(first, second)


def test_modality_wise_weighting():
    batch = walker_batch()
    dim, modality, none = (
        tiny_model("rssm", nll_weight=mode) for mode in ("dim_wise", "modality_wise", "none")
    )
    noise = dim.rssm.draw_noise(4, 3, generator=seeded())
    losses, metrics = modality.elbo(batch, noise=noise)
    other, _ = dim.elbo(batch, noise=noise)
    plain, _ = none.elbo(batch, noise=noise)
    torch.testing.assert_close(losses["reconstruction"], other["reconstruction"])
    torch.testing.assert_close(plain["reconstruction"], -metrics["rec_term"])
    torch.testing.assert_close(plain["kl"], -metrics["kl_term"])
    # the KL weight by its definition: mean over sensors of the mean std of their elements
    states = modality.rssm.observe(modality.encode(batch), batch["pre_action"], noise=noise)
    feature = torch.cat((states.deter, states.stoch), -1)
    stds = [decoder(feature).std for decoder in modality.decoders.values()]
    q = torch.distributions.Normal(*states.stats)
    p = torch.distributions.Normal(*modality.rssm.prior(states.deter))
    kl = torch.distributions.kl_divergence(q, p).sum(-1)
    by_modality = torch.stack([s.mean(-1) for s in stds]).mean(0)
    torch.testing.assert_close(losses["kl"], (kl * by_modality).sum(0).mean())
    by_dimension = torch.cat(stds, -1).mean(-1)
    torch.testing.assert_close(other["kl"], (kl * by_dimension).sum(0).mean())


def test_categorical_kl_of_the_discrete_model():
    model, batch = tiny_model("rssmo_discrete"), walker_batch()
    noise = model.rssm.draw_noise(4, 3, generator=seeded())
    losses, _ = model.elbo(batch, noise=noise)
    states = model.rssm.observe(model.encode(batch), batch["pre_action"], noise=noise)
    q = torch.distributions.Categorical(logits=states.stats[0])
    p = torch.distributions.Categorical(logits=model.rssm.prior(states.deter)[0])
    kl = torch.distributions.kl_divergence(q, p).sum(-1)
    torch.testing.assert_close(losses["kl"], kl.sum(0).mean())


def test_probes_read_and_do_not_disturb():
    model, batch = tiny_model("rssm", "lpomdp"), walker_batch()
    losses, metrics = model.elbo(batch, generator=seeded())
    trained = torch.autograd.grad(losses["probe"], list(model.parameters()), allow_unused=True)
    names = [
        n for (n, _), g in zip(model.named_parameters(), trained, strict=True) if g is not None
    ]
    assert names
    assert all(name.startswith("probes.velocity") for name in names)
    # the first frame is left out
    batch["velocity"][0] += 1.0
    assert torch.equal(model.elbo(batch, generator=seeded())[0]["probe"], losses["probe"])
    assert torch.equal(metrics["reconstruction_loss"], losses["reconstruction"].detach())
    assert torch.equal(metrics["probe_loss"], losses["probe"].detach())


def test_inverse_dynamics_modes():
    batch = {k: v[:, :2] for k, v in walker_batch().items()}
    published, intended, end2end, none = (
        tiny_model("rssm", **changes)
        for changes in ({}, {"idm_reduction": "mean"}, {"idm": "end2end"}, {"idm": "none"})
    )
    (idm, _), (mean, _) = (m.elbo(batch, generator=seeded()) for m in (published, intended))
    # mean over 3 steps and sum over 2 rows against sum over steps and mean over rows
    torch.testing.assert_close(idm["idm"] * 3, mean["idm"] * 2)
    state_dict = {k: v for k, v in published.state_dict().items() if not k.startswith("idm")}
    none.load_state_dict(state_dict)
    without, metrics = none.elbo(batch, generator=seeded())
    torch.testing.assert_close(without["total"], idm["total"] - idm["idm"])
    assert "idm_loss" not in metrics
    for model, reached in ((published, False), (end2end, True)):
        loss = model.elbo(batch, generator=seeded())[0]["idm"]
        cell = list(model.rssm.memory_cell.parameters())
        grads = torch.autograd.grad(loss, cell, allow_unused=True)
        assert all((g is not None) == reached for g in grads)


def test_one_frame_has_no_inverse_dynamics_and_no_probes():
    model = tiny_model("rssm", "lpomdp")
    losses, _ = model.elbo({k: v[:1] for k, v in walker_batch().items()}, generator=seeded())
    assert losses["idm"] == 0.0
    assert losses["probe"] == 0.0
    assert losses["total"].isfinite()


def test_frames_after_the_first_terminal_one_are_ignored():
    model, batch = tiny_model("rssmo_v2"), walker_batch()
    noise = model.rssm.draw_noise(4, 3, generator=seeded())
    batch["is_terminal"][2:, 1] = 1.0
    losses, _ = model.elbo(batch, noise=noise)
    changed = {k: v.clone() for k, v in batch.items()}
    changed["velocity"][3, 1] += 5.0
    changed["pre_action"][3, 1] += 0.1
    same, _ = model.elbo(changed, noise=noise)
    for name, value in losses.items():
        torch.testing.assert_close(same[name], value)
    changed["velocity"][2, 1] += 5.0
    other, _ = model.elbo(changed, noise=noise)
    assert not torch.isclose(other["reconstruction"], losses["reconstruction"])


def test_sensor_masks():
    model, batch = tiny_model("rssm"), walker_batch()
    masked = batch | {"velocity_mask": torch.zeros(4, 3, 1, dtype=torch.float64)}
    full, part = (model.elbo(b, generator=seeded())[1] for b in (batch, masked))
    assert part["velocity_rec_term"] == 0.0
    torch.testing.assert_close(part["height_rec_term"], full["height_rec_term"])


def test_kl_only_and_kl_scale():
    model, batch = tiny_model("rssm", kl_scale=0.5), walker_batch()
    policy = TanhGaussianPolicy(model.config.feature_size, 6, hidden=8).double()
    losses, _ = model.elbo_with_policy(batch, policy, generator=seeded(), kl_only=True)
    torch.testing.assert_close(losses["total"], 0.5 * losses["kl"])
    whole, _ = model.elbo_with_policy(batch, policy, generator=seeded())
    torch.testing.assert_close(whole["total"], losses["total"] + whole["reconstruction"])


def test_filter_step_is_one_step_of_the_sequence():
    model, batch = tiny_model("rssmo"), walker_batch()
    noise = model.rssm.draw_noise(4, 3, generator=seeded())
    is_first = torch.zeros(4, 3)
    is_first[2, 1] = 1.0
    states = model.rssm.observe(
        model.encode(batch), batch["pre_action"], noise=noise, is_first=is_first.bool()
    )
    state = model.rssm.initial(3)
    for t in range(4):
        obs = {name: batch[name][t] for name in model.config.inputs}
        state = model.filter_step(
            obs, batch["pre_action"][t], state, noise=noise[t], is_first=is_first[t]
        )
        torch.testing.assert_close(state.deter, states.deter[t], rtol=1e-12, atol=1e-14)
        torch.testing.assert_close(state.stoch, states.stoch[t], rtol=1e-12, atol=1e-14)
    assert not state.feature.requires_grad
    assert state.feature.shape == (3, model.config.feature_size)


def test_a_given_state_continues_the_sequence():
    model, batch = tiny_model("rssm"), walker_batch()
    noise = model.rssm.draw_noise(4, 3, generator=seeded())
    states = model.rssm.observe(model.encode(batch), batch["pre_action"], noise=noise)
    middle = State(states.deter[1], states.stoch[1])
    late, _ = model.elbo({k: v[2:] for k, v in batch.items()}, noise=noise[2:], state=middle)
    fresh, _ = model.elbo({k: v[2:] for k, v in batch.items()}, noise=noise[2:])
    assert not torch.isclose(late["kl"], fresh["kl"])
    early, _ = model.elbo({k: v[:2] for k, v in batch.items()}, noise=noise[:2])
    whole, _ = model.elbo(batch, noise=noise)
    torch.testing.assert_close(early["kl"] + late["kl"], whole["kl"])


def test_untrained_gaussian_constant():
    batch = walker_batch()
    with_it, without = (tiny_model("rssmo", gaussian_constant=c) for c in (True, False))
    first, second = (
        m.elbo(batch, generator=seeded())[0]["reconstruction"] for m in (with_it, without)
    )
    # 24 elements in each of 4 frames
    torch.testing.assert_close(first - second, torch.tensor(48 * math.log(2 * math.pi)).double())


def test_errors_name_what_is_wrong():
    model, batch = tiny_model("rssmo_v2"), walker_batch()
    policy = TanhGaussianPolicy(model.config.feature_size, 6, hidden=8).double()
    short = batch | {"velocity": batch["velocity"][..., :8]}
    message = r"batch\['velocity'\] has shape \[4, 3, 8\], expected \[4, 3, 9\]"
    with pytest.raises(ValueError, match=message):
        model.elbo(short)
    with pytest.raises(ValueError, match=message):
        model.elbo_with_policy(short, policy)
    with pytest.raises(ValueError, match="batch has no 'pre_action'"):
        model.elbo({k: v for k, v in batch.items() if k != "pre_action"})
    with pytest.raises(ValueError, match="batch has no 'is_terminal'"):
        model.elbo({k: v for k, v in batch.items() if k != "is_terminal"})
    with pytest.raises(ValueError, match=r"orientations.*expected \[T, B, \.\.\.\]"):
        model.elbo({k: v[0] for k, v in batch.items()})
    with pytest.raises(ValueError, match="batch has 0 frames of 3 sequences"):
        model.elbo({k: v[:0] for k, v in batch.items()})
    with pytest.raises(TypeError, match=r"batch\['height'\] has dtype torch.float32"):
        model.elbo(batch | {"height": batch["height"].float()})
    with pytest.raises(ValueError, match=r"noise has shape \[4, 3, 2\], expected \[4, 3, 6\]"):
        model.elbo(batch, noise=torch.zeros(4, 3, 2).double())
    with pytest.raises(ValueError, match=r"is_first has shape \[3, 4\], expected \[4, 3\]"):
        model.elbo(batch | {"is_first": torch.zeros(3, 4)})
    with pytest.raises(ValueError, match="policy has action_size 2, expected 6"):
        model.elbo_with_policy(batch, TanhGaussianPolicy(14, 2))
    with pytest.raises(ValueError, match="policy has feature_size 3, expected 14"):
        model.elbo_with_policy(batch, TanhGaussianPolicy(3, 6))
    no_idm = tiny_model("rssm", idm="none")
    with pytest.raises(ValueError, match="use_idm is True"):
        no_idm.elbo_with_policy(batch, policy, use_idm=True)
    obs = {k: v[0] for k, v in batch.items()} | {"height": torch.zeros(3, 2).double()}
    with pytest.raises(ValueError, match=r"obs\['height'\] has shape"):
        model.filter_step(obs, batch["pre_action"][0], model.rssm.initial(3))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"inputs": ("hight",)}, "inputs names 'hight'"),
        ({"nll_weight": "dim"}, "nll_weight is 'dim'"),
        ({"hidden": 0}, "hidden is 0"),
        ({"kl_balance": 1.5}, "kl_balance is 1.5"),
        ({"free_nats": -1.0}, "free_nats is -1.0"),
        ({"free_nats": math.nan}, "free_nats is nan"),
    ],
)
def test_configurations_that_cannot_be_built(change, message):
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(tiny("rssm"), **change)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"cell": "gru"}, "cell is 'gru'"),
        ({"latent": "categorical"}, "heads is 'split'"),
        ({"groups": 5}, "stoch is 128, expected a multiple of groups 5"),
        ({"unimix": 1.0}, "unimix is 1.0"),
        ({"deter": 0}, "deter is 0"),
    ],
)
def test_rssm_configurations_that_cannot_be_built(change, message):
    rssm = world_model_config("rssm", WALKER, "mdp", 6).rssm
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(rssm, **change)


def test_unknown_names_of_the_builder():
    with pytest.raises(ValueError, match="preset is 'rssn'"):
        world_model_config("rssn", WALKER, "mdp", 6)
    with pytest.raises(ValueError, match="setup is 'pomdp'"):
        world_model_config("rssm", WALKER, "pomdp", 6)
    with pytest.raises(ValueError, match="order 'third'"):
        world_model_config("rssm", (("height", 1, "third"),), "mdp", 6)
    with pytest.raises(ValueError, match="WorldModelConfig has no field 'free_bits'"):
        WorldModelConfig.from_dict({"free_bits": 1.0})
