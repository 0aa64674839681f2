"""Vectorised MuJoCo environments: gymnasium's `VectorEnv` over one C++ stepping loop."""

# mujoco ships no type information
# pyright: reportAttributeAccessIssue=false

import os
from collections.abc import Sequence
from typing import Any, NamedTuple

import mujoco
import numpy as np
from gymnasium import spaces
from gymnasium.error import AlreadyPendingCallError, ClosedEnvironmentError, NoAsyncCallError
from gymnasium.vector import AutoresetMode, VectorEnv
from gymnasium.vector.utils import batch_space
from numpy.typing import NDArray

from fastrssm.envs.loop import make_loop
from fastrssm.envs.model import load_model, parameter_views
from fastrssm.envs.physics import rng_words
from fastrssm.envs.render import Renderer
from fastrssm.envs.state import VectorState
from fastrssm.envs.tasks import Task, find_task

# positions, velocities, controls and the solver's warm start: what the next step depends on
_INTEGRATION = mujoco.mjtState.mjSTATE_INTEGRATION

Observation = dict[str, NDArray[Any]]
StepResult = tuple[
    Observation, NDArray[np.float64], NDArray[np.bool_], NDArray[np.bool_], dict[str, Any]
]


class _Buffers(NamedTuple):
    """What one call writes; the loop alternates between two of them."""

    observation: NDArray[Any]  # [num_envs, width]
    final_observation: NDArray[Any]  # [num_envs, width]
    reward: NDArray[np.float64]  # [num_envs]
    truncated: NDArray[np.bool_]  # [num_envs]
    diverged: NDArray[np.bool_]  # [num_envs]


class MujocoVectorEnv(VectorEnv[Observation, NDArray[Any], NDArray[Any]]):
    """`num_envs` copies of one task, stepped together; observations equal dm_control's bit for bit.

    (The few sensors that dm_control passes through NumPy's vector maths or BLAS, whose last bits
    depend on the processor, are equal within rounding: hopper's and finger's touch, humanoid's
    extremities, quadruped's force_torque, ball_state and target_position.)

    Use it from one thread and from the process that made it.

    Attributes:
        env_id: the name of the task.
        task: the constants of the task.
        action_repeat: control steps of one step; their rewards are summed.
        episode_steps: steps of one episode.
        model: the shared `mujoco.MjModel`.
        data: one `mujoco.MjData` per environment, for rendering and inspection.
        parameters: [num_envs, P] float64, the entries of the model that `task.parameters` names,
            as the last reset of each environment has drawn them; `model` holds none of them.
    """

    metadata: dict[str, Any] = {"render_modes": []}  # noqa: RUF012

    def __init__(
        self,
        env_id: str | Task,
        num_envs: int = 1,
        *,
        action_repeat: int | None = None,
        episode_steps: int | None = None,
        num_threads: int | None = None,
        dtype: type[np.floating[Any]] = np.float32,
        autoreset_mode: AutoresetMode | str = AutoresetMode.NEXT_STEP,
        copy: bool = True,
        pixels: tuple[int, int] | None = None,
        render_threads: int = 1,
    ):
        """Load the model, compile the task's functions and allocate the environments.

        Args:
            env_id: the name of a task, for example "walker-walk", see `find_task`; or a task.
            num_envs: how many environments.
            action_repeat: control steps of one step. None: the task's.
            episode_steps: steps of one episode. None: the task's.
            num_threads: threads of the stepping loop. None: one per core, if there are as many
                environments.
            dtype: of observations and actions, np.float32 or np.float64.
            autoreset_mode: NEXT_STEP: the step after an episode's last one resets it; SAME_STEP:
                the last step does, and gives its observation as `infos["final_obs"]`; DISABLED:
                call `reset(options={"reset_mask": mask})`.
            copy: whether results are the caller's own. False: they are views of two buffers used
                in turn, and hold until the next step but one.
            pixels: height and width of a further observation "image", uint8 [h, w, 3], drawn by
                the task's camera. None: no images.
            render_threads: threads that draw, each with its own OpenGL context.

        Raises:
            ValueError: unknown env_id or autoreset_mode, a number below 1, a task that does not
                fit its model or its functions, or pixels with SAME_STEP, which would have to draw
                a state that is gone.
            TypeError: dtype is neither float32 nor float64.
            RuntimeError: pixels are asked for and there is no OpenGL.
        """
        task = env_id if isinstance(env_id, Task) else find_task(env_id)
        repeat = task.action_repeat if action_repeat is None else action_repeat
        steps = -(-task.episode_steps // max(repeat, 1)) if episode_steps is None else episode_steps
        cores = len(os.sched_getaffinity(0))
        threads = min(cores, max(num_envs, 1)) if num_threads is None else num_threads
        for name, value in (
            ("num_envs", num_envs),
            ("action_repeat", repeat),
            ("episode_steps", steps),
            ("num_threads", threads),
            ("render_threads", render_threads),
        ):
            if value < 1:
                raise ValueError(f"{name} is {value}, expected at least 1")
        if np.dtype(dtype) not in (np.dtype(np.float32), np.dtype(np.float64)):
            raise TypeError(f"dtype is {np.dtype(dtype)}, expected float32 or float64")

        self.env_id: str = env_id if isinstance(env_id, str) else task.domain
        self.task: Task = task
        self.num_envs: int = num_envs
        self.action_repeat: int = repeat
        self.episode_steps: int = steps
        self._control_steps = task.episode_steps if episode_steps is None else steps * repeat
        self._mode = AutoresetMode(autoreset_mode)
        if pixels is not None and self._mode is AutoresetMode.SAME_STEP:
            raise ValueError(f"pixels is {pixels}, expected None with autoreset_mode SAME_STEP")
        self.metadata = {**type(self).metadata, "autoreset_mode": self._mode}
        self.model: mujoco.MjModel = load_model(task)
        # a diverged state must be seen, not silently replaced by the initial pose
        self.model.opt.disableflags |= mujoco.mjtDisableBit.mjDSBL_AUTORESET
        self.data: list[mujoco.MjData] = [mujoco.MjData(self.model) for _ in range(num_envs)]
        self.parameters: NDArray[np.float64] = np.empty((num_envs, len(task.parameters)))
        self.parameters[:] = [view[0] for view in parameter_views(self.model, task.parameters)]

        self._copy = copy
        self._dtype = np.dtype(dtype)
        self._columns: dict[str, slice] = {}
        self._width = 0
        for name, size, _ in task.sensors:
            self._columns[name] = slice(self._width, self._width + size)
            self._width += size
        self._buffers = (self._allocate(), self._allocate())
        self._action = np.zeros((num_envs, self.model.nu), self._dtype)
        self._pending = self._is_reset = False
        self._rng = np.stack([rng_words(np.random.RandomState()) for _ in range(num_envs)])
        self._stepper = make_loop(
            task,
            self.model,
            self.data,
            self.parameters,
            self._rng,
            width=self._width,
            action_repeat=repeat,
            control_steps=self._control_steps,
            num_threads=threads,
            autoreset_mode=self._mode,
        )

        boxes: dict[str, spaces.Space[Any]] = {
            name: spaces.Box(-np.inf, np.inf, (size,), dtype) for name, size, _ in task.sensors
        }
        self._renderer: Renderer | None = None
        if pixels is not None:
            camera = min(task.camera, self.model.ncam - 1)
            self._renderer = Renderer(self, *pixels, camera=camera, num_threads=render_threads)
            boxes["image"] = spaces.Box(0, 255, (*pixels, 3), np.uint8)
        self.single_observation_space = spaces.Dict(boxes)
        self.single_action_space = spaces.Box(-1.0, 1.0, (self.model.nu,), dtype)
        self.observation_space = batch_space(self.single_observation_space, num_envs)
        self.action_space = batch_space(self.single_action_space, num_envs)
        self.spec = None

    def _allocate(self) -> _Buffers:
        shape = (self.num_envs, self._width)
        return _Buffers(
            np.zeros(shape, self._dtype),
            np.zeros(shape, self._dtype),
            np.zeros(self.num_envs),
            np.zeros(self.num_envs, np.bool_),
            np.zeros(self.num_envs, np.bool_),
        )

    def reset(
        self, *, seed: int | Sequence[int] | None = None, options: dict[str, Any] | None = None
    ) -> tuple[Observation, dict[str, Any]]:
        """Start a new episode in every environment, or where a mask says so.

        Args:
            seed: environment i draws from `RandomState(MT19937(s))` with
                `s = SeedSequence(seed).spawn(num_envs)[i]`, or `s = SeedSequence(seed[i])` if a
                sequence is given. None: the streams go on.
            options: {"reset_mask": [num_envs] bool}, for `AutoresetMode.DISABLED`: the others keep
                their episode, their stream and their observation.

        Returns:
            Observations, one [num_envs, size] array per sensor, and an empty info.

        Raises:
            ValueError: seed is a sequence whose length is not num_envs, or reset_mask has another
                shape or dtype, or leaves out an environment that was never reset.
        """
        self._check_idle("reset")
        mask = (options or {}).get("reset_mask")
        if mask is not None:
            mask = np.asarray(mask)
            if mask.shape != (self.num_envs,) or mask.dtype != np.bool_:
                raise ValueError(
                    f"options['reset_mask'] has shape {mask.shape} and dtype {mask.dtype}, "
                    f"expected ({self.num_envs},) and bool"
                )
            if not (self._is_reset or mask.all()):
                raise ValueError("options['reset_mask'] leaves out environments never reset before")
        if seed is not None:
            if isinstance(seed, int | np.integer):
                sequences = np.random.SeedSequence(int(seed)).spawn(self.num_envs)
            elif len(seed) == self.num_envs:
                sequences = [np.random.SeedSequence(s) for s in seed]
            else:
                raise ValueError(f"seed has {len(seed)} entries, expected {self.num_envs}")
            for n, sequence in enumerate(sequences):
                if mask is None or mask[n]:
                    self._rng[n] = rng_words(np.random.RandomState(np.random.MT19937(sequence)))
        previous, observation, *_ = self._in_and_out()
        observation[:] = previous
        self._stepper.reset(mask, observation)
        self._is_reset = True
        return self._observed(observation.copy() if self._copy else observation), {}

    def step(self, actions: NDArray[Any]) -> StepResult:
        """Take one step everywhere; what follows an episode's end is `autoreset_mode`'s choice.

        An environment whose physics diverges (MuJoCo finds its state bad, or its observation is
        not finite) ends its episode alone: it is truncated, repeats its last finite observation,
        is rewarded for the control steps before, and is marked in `infos["diverged"]`.

        Args:
            actions: [num_envs, A], clipped to [-1, 1], infinite ones too.

        Returns:
            Observations, rewards [num_envs] float64 (0 for a reset), terminated (never), truncated,
            infos.

        Raises:
            ValueError: actions has another shape or contains NaN.
            RuntimeError: called before reset, after a fork, or an environment has ended and
                nothing resets it.
        """
        self._take(actions)
        self._stepper.step(self._action, *self._in_and_out())
        return self._results()

    def step_async(self, actions: NDArray[Any]) -> None:
        """Begin a step and return at once; `step_wait` gives its result.

        Args and Raises: as `step`, and AlreadyPendingCallError: a step is under way.
        """
        self._take(actions)
        self._stepper.start(self._action, *self._in_and_out())
        self._pending = True

    def step_wait(self) -> StepResult:
        """Wait for the step begun by `step_async` and return what `step` would have.

        Raises:
            NoAsyncCallError: no step is under way.
        """
        if not self._pending:
            raise NoAsyncCallError("step_wait was called without step_async", "step")
        self._stepper.wait()
        self._pending = False
        return self._results()

    def _take(self, actions: NDArray[Any]) -> None:
        self._check_idle("step")
        if not self._is_reset:
            raise RuntimeError("step was called before reset")
        actions = np.asarray(actions)
        if actions.shape != self._action.shape:
            raise ValueError(f"actions has shape {actions.shape}, expected {self._action.shape}")
        if self._mode is AutoresetMode.DISABLED:
            steps = np.array(self._stepper.steps)
            if (steps >= self._control_steps).any():
                raise RuntimeError(
                    f"environment {int(steps.argmax())} has ended: call "
                    "reset(options={'reset_mask': mask})"
                )
        self._action[:] = actions

    def _in_and_out(self) -> tuple[NDArray[Any], ...]:
        """Give the buffers of a step, last observation first, and swap them."""
        self._buffers = self._buffers[::-1]
        return (self._buffers[1].observation, *self._buffers[0])

    def _results(self) -> StepResult:
        out = self._buffers[0]
        if self._copy:
            out = _Buffers._make(array.copy() for array in out)
        infos: dict[str, Any] = {}
        if out.diverged.any():
            infos["diverged"] = infos["_diverged"] = out.diverged
        if self._mode is AutoresetMode.SAME_STEP and out.truncated.any():
            final = self._by_sensor(out.final_observation)
            infos["final_obs"] = np.full(self.num_envs, None)
            for n in out.truncated.nonzero()[0]:
                infos["final_obs"][n] = {name: value[n] for name, value in final.items()}
            infos["final_info"] = {}
            infos["_final_obs"] = infos["_final_info"] = out.truncated
        terminated = np.zeros(self.num_envs, np.bool_)
        return self._observed(out.observation), out.reward, terminated, out.truncated, infos

    def _check_idle(self, call: str) -> None:
        if self.closed:
            raise ClosedEnvironmentError(f"{call} was called after close")
        if self._pending:
            raise AlreadyPendingCallError(f"{call} was called before step_wait", "step")
        # an interrupt within step_async may have left a step under way
        self._stepper.wait()

    def close_extras(self, **kwargs: Any) -> None:
        """Wait for a step under way, end the threads and free the physics."""
        if self._pending:
            self._stepper.wait()
        self._pending = False
        if self._renderer is not None:
            self._renderer.close()
        del self._stepper, self.data

    def state(self) -> VectorState:
        """Copy all that the future depends on, for `set_state` here or in a like environment."""
        self._check_idle("state")
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
            parameters=self.parameters.copy(),
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
        state.check_like(self.state())
        views = parameter_views(self.model, self.task.parameters)
        for n, data in enumerate(self.data):
            for view, value in zip(views, state.parameters[n], strict=True):
                view[:] = value
            mujoco.mj_setState(self.model, data, state.physics[n], _INTEGRATION)
            # the stepping loop leaves behind positions and velocities that are worked out
            mujoco.mj_step1(self.model, data)
        self.parameters[:] = state.parameters
        self._rng[:] = state.random
        self._stepper.steps = state.control_steps.tolist()
        self._stepper.observe(self._buffers[0].observation)
        self._is_reset = bool(state.is_reset)

    def _observed(self, observation: NDArray[Any]) -> Observation:
        found = self._by_sensor(observation)
        if self._renderer is not None:
            found["image"] = self._renderer.frames()
        return found

    def _by_sensor(self, observation: NDArray[Any]) -> Observation:
        return {name: observation[:, columns] for name, columns in self._columns.items()}
