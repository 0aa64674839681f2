"""The C++ stepping loop of a task, put together from compiled functions and addresses."""

# mujoco ships no type information
# pyright: reportAttributeAccessIssue=false

import copy
import ctypes
import math
from importlib import import_module
from typing import Any

import mujoco
import numpy as np
from gymnasium.vector import AutoresetMode
from numba.core.dispatcher import Dispatcher
from numpy.typing import NDArray

from fastrssm import _stepper
from fastrssm.envs.compile import compile_function
from fastrssm.envs.model import contact_count_address, library_path, parameter_views
from fastrssm.envs.physics import Physics, arrays_of
from fastrssm.envs.tasks import Task

_AUTORESET = {
    AutoresetMode.NEXT_STEP: _stepper.Autoreset.NEXT_STEP,
    AutoresetMode.SAME_STEP: _stepper.Autoreset.SAME_STEP,
    AutoresetMode.DISABLED: _stepper.Autoreset.DISABLED,
}

# bits of a number that no task computes
_UNTOUCHED = np.uint64(0x7FF4_DEAD_BEEF_0001)


def make_loop(
    task: Task,
    model: mujoco.MjModel,
    data: list[mujoco.MjData],
    parameters: NDArray[np.float64],
    rng: NDArray[np.uint32],
    *,
    width: int,
    action_repeat: int,
    control_steps: int,
    num_threads: int,
    autoreset_mode: AutoresetMode,
) -> _stepper.Stepper:
    """Compile the functions of `task` and start the threads.

    Args:
        task: what to step.
        model: its model; only read.
        data: one for each environment, of that model; also kept by the caller.
        parameters: [num_envs, P] entries of the model, drawn by resets.
        rng: [num_envs, RNG_WORDS] random streams of the resets.
        width: of an observation.
        action_repeat: control steps of a step.
        control_steps: control steps of an episode.
        num_threads: threads that step, the caller's among them.
        autoreset_mode: what happens when an episode ends.

    Raises:
        ValueError: the task does not fit its model or its functions.
    """
    substeps = round(task.control_timestep / model.opt.timestep)
    if not math.isclose(task.control_timestep, max(substeps, 1) * model.opt.timestep):
        raise ValueError(
            f"Task.control_timestep is {task.control_timestep} s, expected a multiple of the "
            f"model's timestep, {model.opt.timestep} s"
        )
    if task.action_size != model.nu:
        raise ValueError(
            f"Task.action_size is {task.action_size}, but the model has {model.nu} actuators"
        )
    arrays = [arrays_of(model, one, row) for one, row in zip(data, parameters, strict=True)]
    functions = _compile(task, arrays[0], width)
    models = _models_of_threads(model, num_threads, shared=not task.parameters)
    config = _stepper.StepperConfig()
    config.library = library_path()
    config.models = [
        _stepper.ThreadModels(
            one._address,  # noqa: SLF001
            passive._address,  # noqa: SLF001
            [
                view.ctypes.data
                for both in (one, passive)
                for view in parameter_views(both, task.parameters)
            ],
        )
        for one, passive in models
    ]
    config.data = [one._address for one in data]  # noqa: SLF001
    config.contacts = [contact_count_address(one) for one in data]
    config.warnings = [one.warning.lastinfo.ctypes.data for one in data]
    config.fields = [[array.ctypes.data for array in one] for one in arrays]
    config.rng = [row.ctypes.data for row in rng]
    config.ctrl_field = Physics._fields.index("ctrl")
    config.parameters_field = Physics._fields.index("parameters")
    config.engine_field = Physics._fields.index("engine")
    config.num_controls = model.nu
    config.observation_size = width
    config.substeps = substeps
    config.action_repeat = action_repeat
    config.episode_steps = control_steps
    config.settle_steps = task.settle_steps
    config.runge_kutta = model.opt.integrator == mujoco.mjtIntegrator.mjINT_RK4
    config.autoreset = _AUTORESET[autoreset_mode]
    addresses = {
        name: functions[name].address if name in functions else 0
        for name in ("reset", "observe", "reward", "finish")
    }
    # what the addresses point into must live as long as the threads
    return _stepper.Stepper(config, addresses, (arrays, models, data, parameters, rng, functions))


def _models_of_threads(
    model: mujoco.MjModel, num_threads: int, *, shared: bool
) -> list[tuple[mujoco.MjModel, mujoco.MjModel]]:
    """Give each thread its model and the one without actuation; shared if never written."""
    pairs: list[tuple[mujoco.MjModel, mujoco.MjModel]] = []
    for _ in range(1 if shared else num_threads):
        passive = copy.deepcopy(model)
        passive.opt.disableflags |= mujoco.mjtDisableBit.mjDSBL_ACTUATION
        pairs.append((model if shared else copy.deepcopy(model), passive))
    return pairs * num_threads if shared else pairs


def _compile(task: Task, arrays: Physics, width: int) -> dict[str, Any]:
    """Compile the functions of `task`; tasks that share one share its compilation."""
    shapes = Physics(*(array.shape for array in arrays))
    roles = ["reset", "observe", "reward"] + ["finish"] * (task.finish is not None)
    compiled = {
        role: compile_function(role, _function(task, role), shapes, width) for role in roles
    }
    _check_observe(compiled["observe"], arrays, width)
    return compiled


def _function(task: Task, role: str) -> Any:
    name = getattr(task, role)
    function = getattr(import_module(task.domain), name, None)
    if not isinstance(function, Dispatcher):
        raise ValueError(
            f"Task.{role} is {name!r}, but {task.domain} has no function of that name "
            "with numba.njit"
        )
    return function


def _check_observe(observe: Any, arrays: Physics, width: int) -> None:
    """Call `observe` once: it must write `width` numbers and none beyond, which C would not see."""
    out = np.full(width + 64, _UNTOUCHED).view(np.float64)
    fields = (ctypes.c_void_p * len(arrays))(*(array.ctypes.data for array in arrays))
    call = ctypes.CFUNCTYPE(None, ctypes.c_void_p, ctypes.c_void_p)(observe.address)
    call(ctypes.addressof(fields), out.ctypes.data)
    written = np.flatnonzero(out.view(np.uint64) != _UNTOUCHED)
    if not np.array_equal(written, np.arange(width)):
        raise ValueError(
            f"Task.sensors has {width} numbers in all, but observe wrote {len(written)}, the last "
            f"to out[{written.max(initial=-1)}]"
        )
