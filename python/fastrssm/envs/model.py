"""A task's MuJoCo model, and what the stepping loop must know of MuJoCo's memory."""

# mujoco ships no type information
# pyright: reportAttributeAccessIssue=false

import ctypes
import glob
import logging
import os
import re
from collections.abc import Sequence
from functools import lru_cache
from importlib import import_module
from importlib.util import find_spec

import mujoco
import numpy as np
from numpy.typing import NDArray

from fastrssm.envs.tasks import Task

_LOG = logging.getLogger("fastrssm")
_KINDS = {
    "body": mujoco.mjtObj.mjOBJ_BODY,
    "dof": mujoco.mjtObj.mjOBJ_JOINT,
    "geom": mujoco.mjtObj.mjOBJ_GEOM,
    "jnt": mujoco.mjtObj.mjOBJ_JOINT,
    "site": mujoco.mjtObj.mjOBJ_SITE,
    "tendon": mujoco.mjtObj.mjOBJ_TENDON,
    "actuator": mujoco.mjtObj.mjOBJ_ACTUATOR,
}
_PROBE = """<mujoco><worldbody><geom type="plane" size="1 1 1"/>
<body pos="0 0 .099"><freejoint/><geom type="box" size=".1 .1 .1"/></body>
</worldbody></mujoco>"""


def load_model(task: Task) -> mujoco.MjModel:
    """Load and compile the model of `task`, without importing dm_control, which looks for OpenGL.

    Raises:
        FileNotFoundError: the task's file does not exist.
        RuntimeError: the file is one of dm_control's and that is not installed.
    """
    path = task.model if os.path.isabs(task.model) else os.path.join(_suite(), task.model)
    if not os.path.isfile(path):
        raise FileNotFoundError(f"Task.model is {task.model!r}, but there is no file {path}")
    # MuJoCo would write its warnings to a file in the current folder
    before = mujoco.get_mju_user_warning()
    mujoco.set_mju_user_warning(lambda message: _LOG.debug("%s: %s", task.model, message))
    try:
        if task.edit is None:
            return mujoco.MjModel.from_xml_path(path)
        spec = mujoco.MjSpec.from_file(path)
        getattr(import_module(task.domain), task.edit)(spec)
        return spec.compile()
    finally:
        mujoco.set_mju_user_warning(before)


def _suite() -> str:
    spec = find_spec("dm_control")
    if spec is None or not spec.submodule_search_locations:
        raise RuntimeError("dm_control is not installed: pip install 'fastrssm[sim]'")
    return os.path.join(spec.submodule_search_locations[0], "suite")


def parameter_views(model: mujoco.MjModel, names: Sequence[str]) -> list[NDArray[np.float64]]:
    """Find entries of `model` by names such as "geom_pos[target,0]": array, element, column.

    Returns:
        One view [1] of the model's own memory for each name.

    Raises:
        ValueError: a name has another form, or names nothing that is float64.
    """
    return [_parameter_view(model, name) for name in names]


def _parameter_view(model: mujoco.MjModel, name: str) -> NDArray[np.float64]:
    form = re.fullmatch(r"((\w+?)_\w+)\[([^,\]]+)(?:,(\d+))?\]", name)
    if form is None or form[2] not in _KINDS:
        raise ValueError(f"Task.parameters has {name!r}, expected for example 'geom_pos[target,0]'")
    array = getattr(model, form[1], None)
    if not isinstance(array, np.ndarray) or array.dtype != np.float64:
        raise ValueError(
            f"Task.parameters has {name!r}, but mjModel has no float64 array {form[1]}"
        )
    row = mujoco.mj_name2id(model, _KINDS[form[2]], form[3])
    if row < 0:
        raise ValueError(f"Task.parameters has {name!r}, but the model has no {form[2]} {form[3]}")
    if form[2] == "dof":
        row = model.jnt_dofadr[row]
    table = array.reshape(len(array), -1)
    column = int(form[4] or 0)
    if column >= table.shape[1]:
        raise ValueError(f"Task.parameters has {name!r}, expected a column below {table.shape[1]}")
    return table[row, column : column + 1]


def contact_count_address(data: mujoco.MjData) -> int:
    """Find mjData.ncon, of which the bindings give the value but no view."""
    _check_layout()
    return _after_timers(data)


@lru_cache
def _check_layout() -> None:
    model = mujoco.MjModel.from_xml_string(_PROBE)
    data = mujoco.MjData(model)
    seen = [ctypes.c_int.from_address(_after_timers(data)).value]
    mujoco.mj_forward(model, data)
    seen.append(ctypes.c_int.from_address(_after_timers(data)).value)
    if seen != [0, data.ncon]:
        raise RuntimeError(f"mujoco {mujoco.__version__} keeps mjData.ncon at an unknown place")


def _after_timers(data: mujoco.MjData) -> int:
    # in mjData the number of contacts follows the timers
    durations = data.timer.duration
    return durations.ctypes.data + durations.strides[0] * len(durations)


def library_path() -> str:
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
