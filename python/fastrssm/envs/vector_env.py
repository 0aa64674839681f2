"""Vectorised MuJoCo environments: gymnasium's `VectorEnv` over one C++ stepping loop."""

# mujoco ships no type information
# pyright: reportAttributeAccessIssue=false

import copy
import glob
import logging
import os
from collections.abc import Sequence
from dataclasses import dataclass, fields
from importlib import import_module
from importlib.util import find_spec
from typing import Any

import gymnasium
import mujoco
import numpy as np
from gymnasium import spaces
from gymnasium.vector import AutoresetMode, VectorEnv
from gymnasium.vector.utils import batch_space
from numpy.typing import NDArray

from fastrssm import _stepper
from fastrssm.envs.physics import Physics, arrays_of, compile_task, rng_words
from fastrssm.envs.tasks import TASKS, Task

_LOG = logging.getLogger("fastrssm")
# positions, velocities, controls and the solver's warm start: what the next step depends on
_INTEGRATION = mujoco.mjtState.mjSTATE_INTEGRATION
_PLACE = 624  # the word of a random stream that says which of the 624 before it is next


@dataclass(frozen=True)
class VectorState:
    """All environments at one moment; every field is an array, so that it fits an npz as it is.

    `np.savez(path, **vars(state))` writes it, `VectorState(**np.load(path))` reads it.

    Attributes:
        env_id: [] str; this and the next two say which environments the state belongs to.
        action_repeat: [] int64.
        episode_control_steps: [] int64, control steps of a whole episode.
        is_reset: [] bool, whether reset was ever called.
        physics: [num_envs, P] float64, MuJoCo's integration state.
        random: [num_envs, W] uint32, the random streams of the resets to come.
        control_steps: [num_envs] int64, control steps of the episode so far.
    """

    env_id: NDArray[np.str_]
    action_repeat: NDArray[np.int64]
    episode_control_steps: NDArray[np.int64]
    is_reset: NDArray[np.bool_]
    physics: NDArray[np.float64]
    random: NDArray[np.uint32]
    control_steps: NDArray[np.int64]


class MujocoVectorEnv(VectorEnv[dict[str, NDArray[Any]], NDArray[Any], NDArray[Any]]):
    """`num_envs` copies of one task, stepped together; observations equal dm_control's bit for bit.

    Attributes:
        env_id: the name of the task.
        task: the constants of the task.
        action_repeat: control steps of one step; their rewards are summed.
        episode_steps: steps of one episode.
        model: the shared `mujoco.MjModel`.
        data: one `mujoco.MjData` per environment, for rendering and inspection.
    """

    metadata: dict[str, Any] = {  # noqa: RUF012
        "autoreset_mode": AutoresetMode.NEXT_STEP,
        "render_modes": [],
    }

    def __init__(
        self,
        env_id: str,
        num_envs: int = 1,
        *,
        action_repeat: int | None = None,
        episode_steps: int | None = None,
        num_threads: int | None = None,
        dtype: type[np.floating[Any]] = np.float32,
    ):
        """Load the model, compile the task's functions and allocate the environments.

        Args:
            env_id: a key of `TASKS`, for example "walker-walk".
            num_envs: how many environments.
            action_repeat: control steps of one step. None: the task's.
            episode_steps: steps of one episode. None: the task's.
            num_threads: threads of the stepping loop. None: one per core, if there are as many
                environments.
            dtype: of observations and actions, np.float32 or np.float64.

        Raises:
            ValueError: unknown env_id, or a number below 1.
            TypeError: dtype is neither float32 nor float64.
        """
        if env_id not in TASKS:
            known = ", ".join(TASKS)
            raise ValueError(f"env_id is {env_id!r}, expected one of {known}")
        task = TASKS[env_id]
        repeat = task.action_repeat if action_repeat is None else action_repeat
        steps = -(-task.episode_steps // max(repeat, 1)) if episode_steps is None else episode_steps
        cores = len(os.sched_getaffinity(0))
        threads = min(cores, max(num_envs, 1)) if num_threads is None else num_threads
        for name, value in (
            ("num_envs", num_envs),
            ("action_repeat", repeat),
            ("episode_steps", steps),
            ("num_threads", threads),
        ):
            if value < 1:
                raise ValueError(f"{name} is {value}, expected at least 1")
        if np.dtype(dtype) not in (np.dtype(np.float32), np.dtype(np.float64)):
            raise TypeError(f"dtype is {np.dtype(dtype)}, expected float32 or float64")

        self.env_id: str = env_id
        self.task: Task = task
        self.num_envs: int = num_envs
        self.action_repeat: int = repeat
        self.episode_steps: int = steps
        self._control_steps = task.episode_steps if episode_steps is None else steps * repeat
        self.model: mujoco.MjModel = _load_model(task.model)
        # a diverged state must be seen, not silently replaced by the initial pose
        self.model.opt.disableflags |= mujoco.mjtDisableBit.mjDSBL_AUTORESET
        self._passive_model = copy.deepcopy(self.model)
        self._passive_model.opt.disableflags |= mujoco.mjtDisableBit.mjDSBL_ACTUATION
        self.data: list[mujoco.MjData] = [mujoco.MjData(self.model) for _ in range(num_envs)]

        self._dtype = np.dtype(dtype)
        sizes = [size for _, size, _ in task.sensors]
        self._ends = np.cumsum(sizes)[:-1]
        self._width = sum(sizes)
        self._is_reset = False
        self._rng = np.stack([rng_words(np.random.RandomState()) for _ in range(num_envs)])
        self._arrays = [arrays_of(self.model, data) for data in self.data]
        self._functions = _compile(task, self._arrays[0], self._width)
        self._stepper = _stepper.Stepper(
            self._config(threads),
            {
                name: self._functions[name].address if name in self._functions else 0
                for name in ("reset", "observe", "reward", "finish")
            },
        )

        self.single_observation_space = spaces.Dict(
            {name: spaces.Box(-np.inf, np.inf, (size,), dtype) for name, size, _ in task.sensors}
        )
        self.single_action_space = spaces.Box(-1.0, 1.0, (self.model.nu,), dtype)
        self.observation_space = batch_space(self.single_observation_space, num_envs)
        self.action_space = batch_space(self.single_action_space, num_envs)
        self.spec = None

    def _config(self, threads: int) -> Any:
        config = _stepper.StepperConfig()
        config.library = _library_path()
        config.model = self.model._address  # noqa: SLF001
        config.passive_model = self._passive_model._address  # noqa: SLF001
        config.data = [data._address for data in self.data]  # noqa: SLF001
        config.fields = [[array.ctypes.data for array in arrays] for arrays in self._arrays]
        config.rng = [row.ctypes.data for row in self._rng]
        config.ctrl_field = Physics._fields.index("ctrl")
        config.num_controls = self.model.nu
        config.observation_size = self._width
        config.substeps = round(self.task.control_timestep / self.model.opt.timestep)
        config.action_repeat = self.action_repeat
        config.episode_steps = self._control_steps
        config.settle_steps = self.task.settle_steps
        config.runge_kutta = self.model.opt.integrator == mujoco.mjtIntegrator.mjINT_RK4
        config.num_threads = threads
        return config

    def reset(
        self, *, seed: int | Sequence[int] | None = None, options: dict[str, Any] | None = None
    ) -> tuple[dict[str, NDArray[Any]], dict[str, Any]]:
        """Start a new episode in every environment.

        Args:
            seed: environment i draws from `RandomState(MT19937(s))` with
                `s = SeedSequence(seed).spawn(num_envs)[i]`, or `s = SeedSequence(seed[i])` if a
                sequence is given. None: the streams go on.
            options: not used.

        Returns:
            Observations, one [num_envs, size] array per sensor, and an empty info.

        Raises:
            ValueError: seed is a sequence whose length is not num_envs.
        """
        if seed is not None:
            if isinstance(seed, int | np.integer):
                sequences = np.random.SeedSequence(int(seed)).spawn(self.num_envs)
            elif len(seed) == self.num_envs:
                sequences = [np.random.SeedSequence(s) for s in seed]
            else:
                raise ValueError(f"seed has {len(seed)} entries, expected {self.num_envs}")
            for row, sequence in zip(self._rng, sequences, strict=True):
                row[:] = rng_words(np.random.RandomState(np.random.MT19937(sequence)))
        observation = np.empty((self.num_envs, self._width), self._dtype)
        self._stepper.reset(observation)
        self._is_reset = True
        return self._by_sensor(observation), {}

    def step(
        self, actions: NDArray[Any]
    ) -> tuple[
        dict[str, NDArray[Any]],
        NDArray[np.float64],
        NDArray[np.bool_],
        NDArray[np.bool_],
        dict[str, Any],
    ]:
        """Take one step everywhere; an episode that ended in the last call starts anew instead.

        Args:
            actions: [num_envs, A], clipped to [-1, 1].

        Returns:
            Observations, rewards [num_envs] float64 (0 for a reset), terminated (never), truncated,
            an empty info.

        Raises:
            ValueError: actions has another shape or contains NaN.
            RuntimeError: called before reset, or the physics of an environment diverged.
        """
        if not self._is_reset:
            raise RuntimeError("step was called before reset")
        action = np.ascontiguousarray(actions, self._dtype)
        expected = (self.num_envs, self.model.nu)
        if action.shape != expected:
            raise ValueError(f"actions has shape {action.shape}, expected {expected}")
        observation = np.empty((self.num_envs, self._width), self._dtype)
        reward = np.empty(self.num_envs)
        truncated = np.empty(self.num_envs, np.bool_)
        self._stepper.step(action, observation, reward, truncated)
        return self._by_sensor(observation), reward, np.zeros_like(truncated), truncated, {}

    def state(self) -> VectorState:
        """Copy all that the future depends on, for `set_state` here or in a like environment."""
        size = mujoco.mj_stateSize(self.model, _INTEGRATION)
        physics = np.empty((self.num_envs, size))
        for data, row in zip(self.data, physics, strict=True):
            mujoco.mj_getState(self.model, data, row, _INTEGRATION)
        return VectorState(
            env_id=np.array(self.env_id),
            action_repeat=np.array(self.action_repeat, np.int64),
            episode_control_steps=np.array(self._control_steps, np.int64),
            is_reset=np.array(self._is_reset),
            physics=physics,
            random=self._rng.copy(),
            control_steps=np.array(self._stepper.steps, np.int64),
        )

    def set_state(self, state: VectorState) -> None:
        """Continue from `state`: what follows is bit for bit what followed there.

        Forces and accelerations in `data`, which belong to the step that led to the state, are
        those of this environment's last step until the next one.

        Args:
            state: of an environment with the same task, num_envs and lengths.

        Raises:
            ValueError: state belongs to another task, num_envs or lengths, or is damaged.
            TypeError: a field of state has another dtype.
        """
        self._check(state)
        for data, row in zip(self.data, state.physics, strict=True):
            mujoco.mj_setState(self.model, data, row, _INTEGRATION)
            # the stepping loop leaves behind positions and velocities that are worked out
            mujoco.mj_step1(self.model, data)
        self._rng[:] = state.random
        self._stepper.steps = state.control_steps.tolist()
        self._is_reset = bool(state.is_reset)

    def _check(self, state: VectorState) -> None:
        ours = self.state()
        for name in ("env_id", "action_repeat", "episode_control_steps"):
            value, expected = getattr(state, name), getattr(ours, name)
            if not np.array_equal(value, expected):
                raise ValueError(f"state.{name} is {value}, expected {expected}")
        for field in fields(VectorState):
            value, expected = getattr(state, field.name), getattr(ours, field.name)
            if value.shape != expected.shape:
                raise ValueError(
                    f"state.{field.name} has shape {value.shape}, expected {expected.shape}"
                )
            if value.dtype != expected.dtype:
                raise TypeError(
                    f"state.{field.name} has dtype {value.dtype}, expected {expected.dtype}"
                )
        # the place in a stream is used as an index without a check
        if (state.random[:, _PLACE] > _PLACE).any():
            raise ValueError(
                f"state.random has {state.random[:, _PLACE].max()} in column {_PLACE}, "
                f"expected at most {_PLACE}"
            )
        if ((state.control_steps < 0) | (state.control_steps > self._control_steps)).any():
            raise ValueError(
                f"state.control_steps is {state.control_steps}, "
                f"expected numbers from 0 to {self._control_steps}"
            )

    def _by_sensor(self, observation: NDArray[Any]) -> dict[str, NDArray[Any]]:
        names = (name for name, _, _ in self.task.sensors)
        return dict(zip(names, np.split(observation, self._ends, axis=1), strict=True))


_COMPILED: dict[Task, dict[str, Any]] = {}


def _compile(task: Task, arrays: Physics, width: int) -> dict[str, Any]:
    """Compile the functions of `task` once per process."""
    if task not in _COMPILED:
        module = import_module(f"fastrssm.envs.tasks.{task.domain}")
        _COMPILED[task] = compile_task(
            Physics(*(array.shape for array in arrays)),
            width,
            getattr(module, task.reset),
            module.observe,
            getattr(module, task.reward),
            getattr(module, task.finish) if task.finish else None,
        )
    return _COMPILED[task]


def _load_model(file: str) -> mujoco.MjModel:
    """Load a model of dm_control's suite without importing it, which would look for OpenGL."""
    spec = find_spec("dm_control")
    if spec is None or not spec.submodule_search_locations:
        raise RuntimeError("dm_control is not installed: pip install 'fastrssm[sim]'")
    path = os.path.join(spec.submodule_search_locations[0], "suite", file)
    # MuJoCo would write its warnings to a file in the current folder
    before = mujoco.get_mju_user_warning()
    mujoco.set_mju_user_warning(lambda message: _LOG.debug("%s: %s", file, message))
    try:
        return mujoco.MjModel.from_xml_path(path)
    finally:
        mujoco.set_mju_user_warning(before)


def _library_path() -> str:
    """Find the libmujoco that `import mujoco` has loaded."""
    if not hasattr(mujoco.MjModel, "_address"):
        raise RuntimeError(
            f"mujoco {mujoco.__version__} does not give the address of a model; "
            "fastrssm needs mujoco>=3.17,<4"
        )
    folder = os.path.dirname(mujoco.__file__)
    libraries = glob.glob(os.path.join(folder, "libmujoco.*"))
    if not libraries:
        raise RuntimeError(f"no libmujoco in {folder}")
    return libraries[0]


def make_vec(env_id: str, num_envs: int = 1, **kwargs: Any) -> MujocoVectorEnv:
    """Make `num_envs` environments of `env_id`; see `MujocoVectorEnv` for the keyword arguments."""
    return MujocoVectorEnv(env_id, num_envs, **kwargs)


def register() -> None:
    """Register every task: `gymnasium.make_vec("fastrssm/walker-walk-v0", num_envs=64)`."""
    for env_id in TASKS:
        gymnasium.register(
            f"fastrssm/{env_id}-v0",
            vector_entry_point="fastrssm.envs.vector_env:make_vec",
            kwargs={"env_id": env_id},
        )
