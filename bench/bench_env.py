"""Environment steps beside the physics alone and every peer: workload envs.

One call is one step (action repeat 2) of all environments with fresh random actions. The limit is
`mj_step` in a compiled loop over threads, with nothing around it. Of the peers only EnvPool,
dm_control and gymnasium give observations and rewards as ours does.
"""

import ctypes
import glob
import importlib.util
import itertools
import logging
import os
from concurrent.futures import ThreadPoolExecutor
from functools import partial

# dm_control only steps here
os.environ.setdefault("MUJOCO_GL", "disable")

import mujoco
import mujoco.batch
import mujoco.rollout
import numba
import numpy as np
from numba import types

from bench.harness import Workload
from fastrssm.envs import make_vec

# a deprecation notice per loaded model of dm_control
logging.getLogger("absl").setLevel(logging.ERROR)

SIZES = {"walker-walk": (64,), "cheetah-run": (64, 256)}
REPEAT = 2


def _physics_alone():
    """A C function that sets controls and steps a share of the environments."""
    library = glob.glob(os.path.join(os.path.dirname(mujoco.__file__), "libmujoco.so*"))[0]
    step = ctypes.CDLL(library).mj_step
    step.argtypes, step.restype = [ctypes.c_void_p] * 2, None
    doubles = types.CPointer(types.float64)
    shares = (types.CPointer(types.voidptr), types.CPointer(doubles), types.CPointer(types.float32))

    @numba.cfunc(types.void(types.voidptr, *shares, types.intp, types.intp, types.intp))
    def physics_alone(model, data, ctrl, action, count, controls, substeps):
        for n in range(count):
            for k in range(controls):
                ctrl[n][k] = action[n * controls + k]
            for _ in range(substeps):
                step(model, data[n])

    return physics_alone, ctypes.c_void_p.in_dll(ctypes.CDLL(library), "mjcb_time")


class Bare:
    """The limit: mj_step on one MjData per environment, shares of them on threads."""

    def __init__(self, env_id, num_envs, threads, substeps):
        self.env = make_vec(env_id, num_envs)
        self.env.reset(seed=0)
        self.compiled, self.clock = _physics_alone()
        # a call through ctypes holds no GIL
        self.run = self.compiled.ctypes
        self.substeps = substeps
        self.pool = ThreadPoolExecutor(threads)
        data = np.array([data._address for data in self.env.data])
        ctrl = np.array([data.ctrl.ctypes.data for data in self.env.data])
        self.shares = [
            (share, data[share].copy(), ctrl[share].copy())
            for share in np.array_split(np.arange(num_envs), threads)
        ]

    def __call__(self, action):
        saved, self.clock.value = self.clock.value, None
        own, *others = [(*share, action[share[0]]) for share in self.shares]
        parts = [self.pool.submit(self.step, *share) for share in others]
        self.step(*own)
        for part in parts:
            part.result()
        self.clock.value = saved

    def step(self, share, data, ctrl, action):
        pointers = (array.ctypes.data for array in (data, ctrl, action))
        model = self.env.model._address
        arguments = zip(self.run.argtypes, (model, *pointers), strict=False)
        self.run(*(ctypes.cast(p, kind) for kind, p in arguments), *action.shape, self.substeps)


class Rollout:
    """mujoco.rollout, one step at a time; no observations."""

    def __init__(self, env_id, num_envs, threads, substeps):
        env = make_vec(env_id, num_envs)
        env.reset(seed=0)
        spec = mujoco.mjtState.mjSTATE_FULLPHYSICS
        self.state = np.empty((num_envs, mujoco.mj_stateSize(env.model, spec)))
        for n, data in enumerate(env.data):
            mujoco.mj_getState(env.model, data, self.state[n], spec)
        self.data = [mujoco.MjData(env.model) for _ in range(threads)]
        self.rollout = mujoco.rollout.Rollout(nthread=threads)
        self.model, self.substeps = env.model, substeps

    def __call__(self, action):
        control = np.repeat(action[:, None], self.substeps, axis=1)
        states, _ = self.rollout.rollout(self.model, self.data, self.state, control)
        self.state = states[:, -1].copy()


class Batch:
    """mujoco.batch with fields current after the last substep; no observations."""

    def __init__(self, env_id, num_envs, threads, substeps):
        env = make_vec(env_id, num_envs)
        env.reset(seed=0)
        self.batch = mujoco.batch.Batch(env.model, num_envs, threads, persistent=True)
        self.batch.bind("qpos")[:] = [data.qpos for data in env.data]
        self.ctrl, self.substeps = self.batch.bind("ctrl"), substeps
        self.outputs = [self.batch.bind(name) for name in ("xpos", "xmat", "sensordata")]

    def __call__(self, action):
        self.ctrl[:] = action
        self.batch.step(nstep=self.substeps, stage=mujoco.mjtStage.mjSTAGE_VEL)


def _envpool(env_id, num_envs, threads, substeps):
    import envpool

    name = "".join(word.capitalize() for word in env_id.split("-")) + "-v1"
    env = envpool.make(
        name, env_type="gymnasium", num_envs=num_envs, num_threads=threads, frame_skip=substeps
    )
    env.reset()
    return env.step


class DmControl:
    """dm_control in a Python loop, one process."""

    def __init__(self, env_id, num_envs):
        from dm_control import suite

        self.envs = [suite.load(*env_id.split("-")) for _ in range(num_envs)]
        for env in self.envs:
            env.reset()

    def __call__(self, action):
        for env, row in zip(self.envs, action, strict=True):
            for _ in range(REPEAT):
                if env.step(row).last():
                    break


def _ours(env_id, num_envs, threads):
    env = make_vec(env_id, num_envs, num_threads=threads)
    env.reset(seed=0)
    return env.step


def workload(env_id, num_envs, threads):
    model = make_vec(env_id)
    substeps = REPEAT * round(model.task.control_timestep / model.model.opt.timestep)
    made = {
        "mj_step": Bare(env_id, num_envs, threads, substeps),
        "mujoco.rollout": Rollout(env_id, num_envs, threads, substeps),
        "mujoco.batch": Batch(env_id, num_envs, threads, substeps),
        "dm_control": DmControl(env_id, num_envs),
        "fastrssm-stepper": _ours(env_id, num_envs, threads),
    }
    if importlib.util.find_spec("envpool"):
        made["envpool"] = _envpool(env_id, num_envs, threads, substeps)
    rng = np.random.default_rng(0)
    actions = rng.uniform(-1, 1, (16, num_envs, model.task.action_size)).astype(np.float32)

    def call(step, fresh):
        step(next(fresh))

    providers = {name: partial(call, step, itertools.cycle(actions)) for name, step in made.items()}
    return Workload(
        "envs", f"{env_id}, {num_envs} environments", "step", "float32", "cpu", None, providers,
        limit="mj_step",
    )  # fmt: skip


def workloads(threads):
    for env_id, sizes in SIZES.items():
        for num_envs in sizes:
            yield workload(env_id, num_envs, threads)
