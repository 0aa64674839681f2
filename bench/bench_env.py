"""Environment steps beside the physics alone and every peer: workload envs.

One call is one step (action repeat 2) of all environments with fresh random actions. The limit is
`mj_step` in a compiled loop over pinned threads, with nothing around it. Of the peers only EnvPool,
dm_control and gymnasium give observations and rewards as ours does. MuJoCo's timers are off in ours
and in the limit; the peers that leave them on are measured with and without.

With many environments of few substeps `mujoco.rollout` may pass the limit: one `MjData` per thread
stays in the cache, where one per environment does not. The price is that positions, sensors and
observations lag a substep behind; to work them out costs what the cache gives.
"""

import ctypes
import functools
import glob
import importlib.util
import itertools
import logging
import os
import subprocess
import tempfile
from functools import partial
from pathlib import Path

# dm_control only steps here
os.environ.setdefault("MUJOCO_GL", "disable")

import gymnasium
import mujoco
import mujoco.batch
import mujoco.rollout
import numpy as np
from gymnasium import spaces

from bench.harness import Workload
from fastrssm.envs import make_vec

# a deprecation notice per loaded model of dm_control
logging.getLogger("absl").setLevel(logging.ERROR)

ENV_IDS = ("walker-walk", "cheetah-run", "cartpole-swingup")
SIZES = (16, 64, 256, 1024)
REPEAT = 2
# dm_control needs seconds to load more
_MOST_DM_CONTROL = 64
# EnvPool takes 12 MB for each environment
_MOST_ENVPOOL = 256


@functools.cache
def _mujoco():
    """The libmujoco that `import mujoco` has loaded."""
    (path,) = glob.glob(os.path.join(os.path.dirname(mujoco.__file__), "libmujoco.so*"))
    return ctypes.CDLL(path)


@functools.cache
def _limit():
    """The functions of mj_step.cpp, compiled once per process."""
    with tempfile.TemporaryDirectory() as folder:
        library = os.path.join(folder, "mj_step.so")
        source = str(Path(__file__).with_name("mj_step.cpp"))
        command = "g++ -std=c++20 -O2 -shared -fPIC -pthread -o"
        subprocess.run([*command.split(), library, source], check=True)
        functions = ctypes.CDLL(library)
    functions.limit_make.restype = ctypes.c_void_p
    functions.limit_make.argtypes = [ctypes.c_void_p] * 5
    functions.limit_run.argtypes = [ctypes.c_void_p] * 2
    functions.limit_free.argtypes = [ctypes.c_void_p]
    return functions


def _without_timers(step):
    """Call `step` while MuJoCo's clock, which feeds only its timers, is off."""
    clock = ctypes.c_void_p.in_dll(_mujoco(), "mjcb_time")

    def call(action):
        saved, clock.value = clock.value, None
        step(action)
        clock.value = saved

    return call


class Bare:
    """The limit: mj_step on one MjData per environment."""

    def __init__(self, env_id, num_envs, threads, substeps):
        self.env = make_vec(env_id, num_envs)
        self.env.reset(seed=0)
        data = np.array([data._address for data in self.env.data])
        ctrl = np.array([data.ctrl.ctypes.data for data in self.env.data])
        sizes = np.array([num_envs, self.env.model.nu, substeps, threads], np.int32)
        self.functions = _limit()
        self.limit = self.functions.limit_make(
            ctypes.cast(_mujoco().mj_step, ctypes.c_void_p),
            self.env.model._address,
            *(array.ctypes.data for array in (data, ctrl, sizes)),
        )

    def __call__(self, action):
        self.functions.limit_run(self.limit, action.ctypes.data)

    def __del__(self):
        self.functions.limit_free(self.limit)


class Rollout:
    """mujoco.rollout in its leanest form, one step at a time; no observations."""

    def __init__(self, env_id, num_envs, threads, substeps):
        env = make_vec(env_id, num_envs)
        env.reset(seed=0)
        spec = mujoco.mjtState.mjSTATE_FULLPHYSICS
        self.state = np.empty((num_envs, mujoco.mj_stateSize(env.model, spec)))
        for n, data in enumerate(env.data):
            mujoco.mj_getState(env.model, data, self.state[n], spec)
        self.data = [mujoco.MjData(env.model) for _ in range(threads)]
        # 0: the calling thread
        self.pool = mujoco.rollout.Rollout(nthread=threads if threads > 1 else 0)
        self.models, self.substeps = [env.model] * num_envs, substeps
        self.control = np.empty((num_envs, substeps, env.model.nu))
        self.states = np.empty((num_envs, substeps, self.state.shape[1]))
        self.sensors = np.empty((num_envs, substeps, env.model.nsensordata))

    def __call__(self, action):
        self.control[:] = action[:, None]
        self.pool.rollout(
            self.models, self.data, self.state, self.control, skip_checks=True,
            nstep=self.substeps, state=self.states, sensordata=self.sensors,
        )  # fmt: skip
        self.state[:] = self.states[:, -1]


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


class DmControl(gymnasium.Env):
    """dm_control in a Python loop, one process; all its environments are one of gymnasium's."""

    def __init__(self, env_id, num_envs):
        from dm_control import suite

        self.envs = [suite.load(*env_id.split("-")) for _ in range(num_envs)]
        observation = self.reset()[0]
        actions = (num_envs, *self.envs[0].action_spec().shape)
        self.observation_space = spaces.Box(-np.inf, np.inf, observation.shape, np.float64)
        self.action_space = spaces.Box(-1, 1, actions, np.float32)

    def reset(self, *, seed=None, options=None):
        return self._stack([env.reset() for env in self.envs]), {}

    def step(self, action):
        steps, rewards = [], np.zeros(len(self.envs))
        for n, env in enumerate(self.envs):
            for _ in range(REPEAT):
                step = env.step(action[n])
                # None in the first step after an end
                rewards[n] += step.reward or 0
                if step.last():
                    break
            steps.append(step)
        return self._stack(steps), rewards, False, False, {}

    def _stack(self, steps):
        rows = (np.concatenate([*map(np.ravel, step.observation.values())]) for step in steps)
        return np.stack([*rows])


def _gymnasium_async(env_id, num_envs, threads):
    """AsyncVectorEnv with one process per thread, each with its share."""
    make = partial(DmControl, env_id, num_envs // threads)
    # a fork would need as much memory as all MuJoCo data of this process
    env = gymnasium.vector.AsyncVectorEnv([make] * threads, context="spawn")
    env.reset()
    return lambda action: env.step(action.reshape(env.action_space.shape))


def _ours(env_id, num_envs, threads):
    env = make_vec(env_id, num_envs, num_threads=threads, action_repeat=REPEAT)
    env.reset(seed=0)
    return env.step


def workload(env_id, num_envs, threads):
    task = make_vec(env_id)
    substeps = REPEAT * round(task.task.control_timestep / task.model.opt.timestep)
    sizes = env_id, num_envs, threads
    batch, rollout = Batch(*sizes, substeps), Rollout(*sizes, substeps)
    # nobody follows one who has just warmed his memory
    made = {
        "mj_step": _without_timers(Bare(*sizes, substeps)),
        "mujoco.rollout": rollout,
        "mujoco.batch": batch,
        "fastrssm-stepper": _ours(*sizes),
        "mujoco.rollout, timers off": _without_timers(rollout),
        "mujoco.batch, timers off": _without_timers(batch),
    }
    if num_envs <= _MOST_DM_CONTROL:
        made["dm_control"] = DmControl(env_id, num_envs).step
        made["gymnasium async"] = _gymnasium_async(*sizes)
    if importlib.util.find_spec("envpool") and num_envs <= _MOST_ENVPOOL:
        made["envpool"] = _envpool(*sizes, substeps)
    rng = np.random.default_rng(0)
    actions = rng.uniform(-1, 1, (16, num_envs, task.model.nu)).astype(np.float32)

    def call(step, fresh):
        step(next(fresh))

    providers = {name: partial(call, step, itertools.cycle(actions)) for name, step in made.items()}
    return Workload(
        "envs", f"{env_id}, {num_envs} environments", "step", "float32", "cpu", None, providers,
        limit="mj_step",
    )  # fmt: skip


def workloads(threads):
    for env_id, num_envs in itertools.product(ENV_IDS, SIZES):
        yield workload(env_id, num_envs, threads)
