"""Draw environments without a screen.

MuJoCo chooses its OpenGL when it is imported. On Linux its own default needs a display, so EGL or
OSMesa is chosen here, before that import, unless `MUJOCO_GL` says otherwise. OSMesa is left out of
that import (see below): whoever wants it for `mujoco.Renderer` too imports mujoco first.
"""

# mujoco ships no type information
# pyright: reportAttributeAccessIssue=false

import copy
import ctypes
import os
import sys
import threading
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
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
    """Give `MUJOCO_GL`, or EGL if its library loads, or what is left to try."""
    given = os.environ.get("MUJOCO_GL", "").lower().strip()
    if given or sys.platform != "linux":
        return given
    if _loads(_LIBRARIES["egl"]):
        return "egl"
    return "" if "DISPLAY" in os.environ else "osmesa"


GL = _choose_gl()
# only while mujoco looks: dm_control, if somebody imports it, has its own way of choosing
_given = os.environ.get("MUJOCO_GL")
if GL in _LIBRARIES:
    # a library that is missing would end the import, though stepping needs none; OSMesa is Mesa
    # itself, and Mesa renders with an LLVM of its own: loaded before Triton's, it makes that crash
    usable = GL == "egl" and _loads(_LIBRARIES["egl"])
    os.environ["MUJOCO_GL"] = "egl" if usable else "disable"
import mujoco  # noqa: E402

if _given is not None:
    os.environ["MUJOCO_GL"] = _given
else:
    os.environ.pop("MUJOCO_GL", None)

# isort: split
from fastrssm.envs.model import parameter_views  # noqa: E402

# the largest image of llvmpipe and of most GPUs
_MAX_PIXELS = 16384
_MAX_GEOMS = 10_000
# .camera: of one drawing thread; freed on that thread, when it ends for whatever reason
_OWN = threading.local()
# neither MuJoCo nor its EGL initialises twice at the same time
_OPENING = threading.Lock()


class _Camera:
    """An OpenGL context, and what MuJoCo needs to draw in it; belongs to the thread it is made on.

    Args:
        model: what to draw; it is copied.
        parameters: names of the entries of the model that each environment has its own of.
        height: of the image, pixels.
        width: of the image, pixels.
        camera: number of the model's camera, or -1.
    """

    def __init__(self, model: Any, parameters: Sequence[str], height: int, width: int, camera: int):
        self._model = copy.deepcopy(model)
        self._parameters = parameter_views(self._model, parameters)
        # no larger than the image, whatever the model says: less to clear
        self._model.vis.global_.offheight = height
        self._model.vis.global_.offwidth = width
        self._scene: Any = mujoco.MjvScene(self._model, _MAX_GEOMS)
        self._option: Any = mujoco.MjvOption()
        self._view: Any = mujoco.MjvCamera()
        if camera < 0:
            mujoco.mjv_defaultFreeCamera(self._model, self._view)
        else:
            self._view.type = mujoco.mjtCamera.mjCAMERA_FIXED
            self._view.fixedcamid = camera
        self._rect: Any = mujoco.MjrRect(0, 0, width, height)
        self._pixels = np.empty((height, width, 3), np.uint8)
        self._gl = _open_gl(height, width)
        self._gl.make_current()
        self._context: Any = mujoco.MjrContext(
            self._model, mujoco.mjtFontScale.mjFONTSCALE_150.value
        )
        mujoco.mjr_setBuffer(mujoco.mjtFramebuffer.mjFB_OFFSCREEN.value, self._context)

    def __del__(self) -> None:
        # what lies in the context goes before the context; either is absent if it was not made
        for part in ("_context", "_gl"):
            if hasattr(self, part):
                getattr(self, part).free()

    def draw(self, data: Any, parameters: NDArray[np.float64], image: NDArray[np.uint8]) -> None:
        """Draw one environment into image [height, width, 3]."""
        for view, value in zip(self._parameters, parameters, strict=True):
            view[0] = value
        everything = mujoco.mjtCatBit.mjCAT_ALL.value
        mujoco.mjv_updateScene(
            self._model, data, self._option, None, self._view, everything, self._scene
        )
        mujoco.mjr_render(self._rect, self._scene, self._context)
        mujoco.mjr_readPixels(self._pixels, None, self._rect, self._context)
        # OpenGL counts rows from below
        image[:] = self._pixels[::-1]


def _open_gl(height: int, width: int) -> Any:
    if GL == "disable":
        raise RuntimeError("it is switched off")
    if GL not in _LIBRARIES:
        return mujoco.GLContext(width, height)
    # PyOpenGL's own error would not name the library
    ctypes.CDLL(_LIBRARIES[GL])
    return import_module(f"mujoco.{GL}").GLContext(width, height)


class Renderer:
    """Cameras on the environments of a `MujocoVectorEnv`; equal to dm_control's pixel for pixel.

    Each thread has an OpenGL context of its own, apart from any that the caller uses; `close`, or
    the end of a `with` block, frees them.

    Args:
        env: the environments, drawn as they stand when an image is asked for.
        height: of the image, pixels; any size, whatever the model's offscreen buffer.
        width: of the image, pixels.
        camera: number of the model's camera; 0 is the side camera that follows the body, -1 one
            that sees the whole model from where it stands.
        num_threads: threads that draw. Software OpenGL (llvmpipe) uses all cores by itself, and
            its contexts wait for each other: there a second thread gains nothing.

    Raises:
        ValueError: height, width, camera or num_threads is out of range.
        RuntimeError: OpenGL cannot be used here; the message says what is missing.
    """

    def __init__(
        self,
        env: "MujocoVectorEnv",
        height: int = 240,
        width: int = 320,
        *,
        camera: int = 0,
        num_threads: int = 1,
    ):
        for name, value, low, high in (
            ("height", height, 1, _MAX_PIXELS),
            ("width", width, 1, _MAX_PIXELS),
            ("camera", camera, -1, env.model.ncam - 1),
        ):
            if not low <= value <= high:
                raise ValueError(f"{name} is {value}, expected {low} to {high}")
        if num_threads < 1:
            raise ValueError(f"num_threads is {num_threads}, expected at least 1")
        self._env = env
        self._shape = (height, width, 3)
        self._camera = camera
        self._num_threads = min(num_threads, env.num_envs)
        # Mesa's LLVM after Triton's, as above
        if find_spec("triton"):
            import_module("triton")
        self._pool = ThreadPoolExecutor(self._num_threads, "fastrssm-render")
        try:
            self._pool.submit(self._own_camera).result()
        # mujoco's own error, PyOpenGL's, OSError and AttributeError, by what is missing
        except Exception as error:
            self._pool.shutdown()
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
        self.close()

    def close(self) -> None:
        """End the threads and free their contexts; nothing can be drawn afterwards."""
        self._pool.shutdown()

    def frame(self, index: int = 0) -> NDArray[np.uint8]:
        """Draw environment `index`: [height, width, 3]."""
        image = np.empty(self._shape, np.uint8)
        self._pool.submit(self._draw, range(index, index + 1), image[None]).result()
        return image

    def frames(self, out: NDArray[np.uint8] | None = None) -> NDArray[np.uint8]:
        """Draw all environments.

        Args:
            out: [num_envs, height, width, 3] uint8, overwritten. None: a new array.

        Returns:
            [num_envs, height, width, 3], `out` if it was given.

        Raises:
            ValueError: out has another shape.
            TypeError: out has another dtype.
        """
        count = self._env.num_envs
        expected = (count, *self._shape)
        images = np.empty(expected, np.uint8) if out is None else out
        if images.shape != expected:
            raise ValueError(f"out has shape {images.shape}, expected {expected}")
        if images.dtype != np.uint8:
            raise TypeError(f"out has dtype {images.dtype}, expected uint8")
        ends = [count * k // self._num_threads for k in range(self._num_threads + 1)]
        shares = [range(*pair) for pair in zip(ends[:-1], ends[1:], strict=True)]
        parts = [images[share.start : share.stop] for share in shares]
        for _ in self._pool.map(self._draw, shares, parts):
            continue
        return images

    def _draw(self, share: range, images: NDArray[np.uint8]) -> None:
        camera = self._own_camera()
        for index, image in zip(share, images, strict=True):
            camera.draw(self._env.data[index], self._env.parameters[index], image)

    def _own_camera(self) -> _Camera:
        """Give the calling thread's camera, made when it draws for the first time."""
        if not hasattr(_OWN, "camera"):
            env = self._env
            with _OPENING:
                _OWN.camera = _Camera(
                    env.model, env.task.parameters, *self._shape[:2], self._camera
                )
        return _OWN.camera


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
