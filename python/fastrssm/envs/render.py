"""Draw environments without a screen.

MuJoCo chooses its OpenGL when it is imported. On Linux without a display its own default fails, so
EGL or OSMesa is chosen here, before that import, unless `MUJOCO_GL` says otherwise.
"""

# mujoco ships no type information
# pyright: reportAttributeAccessIssue=false

import ctypes
import os
import sys
from collections.abc import Iterable
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    from fastrssm.envs.vector_env import MujocoVectorEnv

_LIBRARIES = {"egl": "libEGL.so.1", "osmesa": "libOSMesa.so.8"}


def _loads(library: str) -> bool:
    try:
        ctypes.CDLL(library)
    except OSError:
        return False
    return True


def _choose_gl() -> str:
    """Give `MUJOCO_GL`, or the first of EGL and OSMesa whose library loads."""
    headless = sys.platform == "linux" and "DISPLAY" not in os.environ
    if not headless or "MUJOCO_GL" in os.environ:
        return os.environ.get("MUJOCO_GL", "")
    return next((name for name, library in _LIBRARIES.items() if _loads(library)), "disable")


GL = _choose_gl()
# only while mujoco looks: dm_control, if somebody imports it, has its own way of choosing
_given = os.environ.get("MUJOCO_GL")
os.environ["MUJOCO_GL"] = GL
import mujoco  # noqa: E402

if _given is None:
    del os.environ["MUJOCO_GL"]


class Renderer:
    """Camera on one environment of a `MujocoVectorEnv`; frames are [height, width, 3] uint8.

    Args:
        env: the environments.
        height: of the image, pixels.
        width: of the image, pixels.
        camera: number of the model's camera; 0 is the side camera that follows the body.

    Raises:
        RuntimeError: OpenGL cannot be used here; the message says what is missing.
    """

    def __init__(
        self, env: "MujocoVectorEnv", height: int = 240, width: int = 320, camera: int = 0
    ):
        self._env = env
        self._camera = camera
        # Mesa renders with an LLVM of its own: loaded before Triton's, it makes that crash
        if find_spec("triton"):
            import_module("triton")
        try:
            self._renderer: Any = mujoco.Renderer(env.model, height, width)
        # mujoco's own error, PyOpenGL's and AttributeError, by what is missing
        except Exception as error:
            raise RuntimeError(
                f"no OpenGL for rendering (MUJOCO_GL={GL!r}: {error}); on Debian or Ubuntu "
                "`apt install libegl1 libgl1-mesa-dri` brings EGL, on a GPU machine its driver does"
            ) from error

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        value: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._renderer.close()

    def frame(self, index: int = 0) -> NDArray[np.uint8]:
        """Draw environment `index` as it stands now."""
        self._renderer.update_scene(self._env.data[index], self._camera)
        return self._renderer.render().copy()


def write_video(path: Path, frames: Iterable[NDArray[np.uint8]], fps: float) -> None:
    """Write frames [height, width, 3] as `.mp4` or `.gif`, whole or not at all.

    Raises:
        ValueError: another suffix.
    """
    import imageio.v2 as imageio

    if path.suffix not in (".mp4", ".gif"):
        raise ValueError(f"path is {path}, expected the suffix .mp4 or .gif")
    unfinished = path.with_name(f".{path.stem}.part{path.suffix}")
    options: dict[str, Any] = {"fps": fps} if path.suffix == ".mp4" else {"duration": 1000 / fps}
    with imageio.get_writer(unfinished, **options) as writer:
        for frame in frames:
            writer.append_data(frame)
    os.replace(unfinished, path)
