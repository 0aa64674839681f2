"""Whole updates of both phases of AIME: workloads W7 and W8.

One call is a step of the optimiser on the same batch of 50 walker windows of 50 frames: encoder,
sequence, decoders, KL, gradients, clipping and Adam. The bound is its products; those of the
reference, which has no others. `published-loop` is how AIME's authors wrote it: a Python loop over
the frames with all networks of a step in it, the prior's too, and an optimiser that is not fused.
"""

import torch

from bench import peak
from bench.harness import Workload
from bench.ops.bench_rssm_scan import at, exact_medium, pin
from bench.ops.rssm_peers import textbook_step
from fastrssm import use_backend
from fastrssm.algos import aime, pretrain
from fastrssm.envs import find_task
from fastrssm.models.policy import TanhGaussianPolicy
from fastrssm.models.rssm import RSSM
from fastrssm.models.world_model import WorldModel, world_model_config
from fastrssm.ops import PolicyTrajectory, Trajectory

TASK = "walker-run"
T, B = 50, 50
GRAD_CLIP = 100.0
# relative differences of losses and gradient norms that no rounding explains
_LIMITS = {"float32": 1e-4, "bfloat16": 3e-2}


def batch(config):
    generator = torch.Generator().manual_seed(0)
    found = {name: torch.randn(T, B, size, generator=generator) for name, size in config.sensors}
    action = torch.randn(T, B, config.action_size, generator=generator).tanh()
    return found | {"pre_action": action}


class PublishedLoop(RSSM):
    """The same parameters, frame by frame."""

    def _walk(self, embed, policy, actions, noise, action_noise):
        state, steps = self.initial(embed.shape[1]), []
        for t in range(len(embed)):
            action = None if actions is None else actions[t]
            drawn = None if action_noise is None else action_noise[t]
            deter, stoch, action, prior, post = textbook_step(
                self, policy, True, *state, action, embed[t], noise[t], drawn
            )
            state = deter, stoch
            steps.append((deter, stoch, action, *prior, *post))
        deter, stoch, action, *stats = (torch.stack(x) for x in zip(*steps, strict=True))
        self._found, post = tuple(stats[:2]), tuple(stats[2:])
        return deter, stoch, post, action

    def observe(self, embed, action, *, noise=None, generator=None, **_):
        noise = self.draw_noise(*embed.shape[:2], generator=generator) if noise is None else noise
        return Trajectory(*self._walk(embed, None, action, noise, None)[:3])

    def observe_with_policy(self, embed, policy, *, generator=None, **_):
        T, B = embed.shape[:2]
        noise = self.draw_noise(T, B, generator=generator)
        action_noise = torch.randn(T, B, self.action_size, generator=generator)
        return PolicyTrajectory(*self._walk(embed, policy, None, noise, action_noise))

    def prior(self, deter):
        return self._found


def as_published(make):
    """Return the update with that loop and PyTorch's own choice of optimiser."""
    model, update = make(fused=None)
    model.rssm.__class__ = PublishedLoop
    return model, update


def phase_1(fused=True):
    """Return an update of a fresh world model."""
    torch.manual_seed(0)
    task = find_task(TASK)
    model = WorldModel(world_model_config("rssm", task.sensors, "mdp", task.action_size))
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-4, fused=fused)
    noise, frames = torch.Generator().manual_seed(1), batch(model.config)

    def update():
        return pretrain.update(model, optimizer, frames, noise, grad_clip=GRAD_CLIP)

    return model, update


def phase_2(fused=True):
    """Return an update of a fresh policy with a frozen world model."""
    torch.manual_seed(0)
    task = find_task(TASK)
    model = WorldModel(world_model_config("rssm", task.sensors, "mdp", task.action_size))
    model.freeze()
    policy = TanhGaussianPolicy(model.config.feature_size, task.action_size)
    optimizer = torch.optim.Adam(policy.parameters(), lr=3e-4, fused=fused)
    noise, frames = torch.Generator().manual_seed(1), batch(model.config)
    options = {"kl_only": False, "use_idm": False, "grad_clip": GRAD_CLIP}

    def update():
        return aime.update(model, policy, optimizer, frames, noise, **options)

    return model, update


def on(backend, made):
    _, update = made

    def call():
        with use_backend(backend):
            return update()

    return call


def workload(name, make, dtype, threads):
    """Each provider trains modules of its own, which start alike."""
    precision = "highest" if dtype == "float32" else "medium"
    torch.set_float32_matmul_precision("highest")
    limit, run = peak.limit(peak.flop(on("reference", make())), dtype, threads)
    expected, providers, notes = on("reference", make())(), {limit: run}, {}
    if dtype == "float32":
        providers["published-loop"] = at("highest", on("reference", as_published(make)))
    if dtype == "float32" and exact_medium():
        providers["fastrssm-reference-onednn"] = at("medium", on("reference", make()))
    for backend in ("reference", "cpu"):
        providers[f"fastrssm-{backend}"] = at(precision, on(backend, make()))
    for provider, call in list(providers.items())[1:]:
        found = call()
        error = max(abs(found[key] / value - 1).item() for key, value in expected.items())
        assert error < _LIMITS[dtype], f"{provider}: metrics differ by {error:.1e}"
        notes[provider] = f"metrics of the first update differ by {error:.1e}"
    return Workload("update", name, "update", dtype, "cpu", None, providers, limit, notes)


def workloads(name, make, threads):
    pin(threads)
    for dtype in ("float32", "bfloat16"):
        yield workload(name, make, dtype, threads)
    torch.set_float32_matmul_precision("highest")


def pretraining(threads):
    return workloads(f"W7 pretrain, {B} x {T}", phase_1, threads)


def imitation(threads):
    return workloads(f"W8 aime, {B} x {T}", phase_2, threads)
