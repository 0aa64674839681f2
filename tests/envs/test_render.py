import os
import subprocess
import sys
import threading

import numpy as np
import pytest

from fastrssm.envs import Renderer, make_vec, render, write_video

# all that needs OpenGL, in one process of its own: here it is switched off
SCENE = """
import gc, importlib.util, logging, os, threading
import numpy as np
from dataclasses import replace
from fastrssm.envs import Renderer, make_vec, render
from fastrssm.envs.model import parameter_views

opened, freed = [], []
class Context:
    def __init__(self, height, width):
        self.real = open_gl(height, width)
        opened.append(threading.get_ident())
    def make_current(self):
        self.real.make_current()
    def free(self):
        self.real.free()
        freed.append(threading.get_ident())
open_gl, render._open_gl = render._open_gl, Context

seen = {}
rng = np.random.default_rng(0)
os.environ["MUJOCO_GL"] = render.GL
with Renderer(make_vec("walker-walk"), 64, 64) as renderer:
    renderer.frames()
logging.getLogger("absl").setLevel(logging.ERROR)  # a deprecation of dm_control's
from dm_control import suite  # after ours, which raises where there is no OpenGL

def draw_with_dm_control(env, height, width, camera):
    oracle = suite.load(*env.env_id.split("-"))
    oracle.reset()  # some tasks set sizes then
    physics = oracle.physics
    physics.model.vis.global_.offheight = 501
    views = parameter_views(physics.model.ptr, env.task.parameters)
    for data, parameters in zip(env.data, env.parameters):
        for view, value in zip(views, parameters):
            view[0] = value
        with physics.reset_context():
            physics.data.qpos[:] = data.qpos
        yield physics.render(height, width, camera_id=camera)
    physics.free()

for env_id in ("reacher-easy", "walker-walk", "cheetah-run"):
    env = make_vec(env_id, 3)
    env.reset(seed=0)
    for _ in range(5):
        env.step(rng.uniform(-1, 1, env.action_space.shape))
    if env_id == "reacher-easy":
        # positions are in the data, sizes in the model alone
        env.task = replace(env.task, parameters=(*env.task.parameters, "geom_size[target,0]"))
        env.parameters = np.concatenate([env.parameters, [[0.01], [0.05], [0.1]]], axis=1)
    for num_threads in (1, 2):
        with Renderer(env, 64, 64, num_threads=num_threads) as renderer:
            seen[f"{env_id} {num_threads}"] = renderer.frames()
    seen[f"{env_id} oracle"] = np.stack(list(draw_with_dm_control(env, 64, 64, 0)))

one = Renderer(env, 64, 64)
out = np.zeros((3, 64, 64, 3), np.uint8)
assert one.frames(out) is out
seen["out"], seen["one"] = out, one.frame(1)
one.close()
try:
    one.frame()
except RuntimeError:
    seen["closed"] = True

# more rows than the model's buffer has, and a width with nothing even about it
with Renderer(env, 501, 7, camera=1) as renderer:
    seen["tall"] = renderer.frames()
seen["tall oracle"] = np.stack(list(draw_with_dm_control(env, 501, 7, 1)))

# images as an observation
env = make_vec("walker-walk", 2, pixels=(16, 24), render_threads=2)
observation, _ = env.reset(seed=0)
seen["first image"] = observation["image"]
assert env.observation_space.contains(observation)
seen["image"] = env.step(np.ones((2, 6)))[0]["image"]
with Renderer(env, 16, 24) as renderer:
    seen["image oracle"] = renderer.frames()
with Renderer(env, 16, 24, camera=-1) as renderer:
    seen["free"] = renderer.frames()
env.close()

env = make_vec("walker-walk", 3)
forgotten = Renderer(env, 8, 8, num_threads=8)
forgotten.frames()
ours = [thread for thread in threading.enumerate() if thread.name.startswith("fastrssm")]
env = forgotten = None
gc.collect()
for thread in ours:
    thread.join(10)
seen["left"] = sum(thread.is_alive() for thread in ours)
seen["opened"], seen["freed"] = opened, freed
np.savez("seen.npz", **seen)

if importlib.util.find_spec("triton"):
    import triton  # after Mesa
# left open: the end of the process must be a quiet one
last = Renderer(make_vec("walker-walk", 2), 8, 8, num_threads=2)
last.frames()
"""

MISSING = """
import ctypes
load = ctypes.CDLL
def refuse(name, *args, **kwargs):
    if "EGL" in str(name) or "OSMesa" in str(name):
        raise OSError(f"{name}: not here")
    return load(name, *args, **kwargs)
ctypes.CDLL = refuse
from types import SimpleNamespace
from fastrssm.envs import TASKS, Renderer
import mujoco
print("mujoco needs no OpenGL")
model = mujoco.MjModel.from_xml_string("<mujoco><worldbody><camera/></worldbody></mujoco>")
Renderer(SimpleNamespace(model=model, num_envs=1, task=TASKS["walker-walk"]))
"""


def run(code, folder, **environment):
    unset = ("MUJOCO_GL", "PYOPENGL_PLATFORM", "DISPLAY")
    clean = {k: v for k, v in os.environ.items() if k not in unset}
    return subprocess.run(
        [sys.executable, "-c", code],
        cwd=folder,
        env=clean | environment,
        capture_output=True,
        text=True,
        check=False,
    )


@pytest.fixture(scope="module")
def seen(tmp_path_factory):
    folder = tmp_path_factory.mktemp("scene")
    done = run(SCENE, folder)
    if "no OpenGL for rendering" in done.stderr:
        pytest.skip(done.stderr.strip().splitlines()[-1])
    assert (done.returncode, done.stderr) == (0, "")
    return np.load(folder / "seen.npz")


@pytest.mark.parametrize("env_id", ["walker-walk", "cheetah-run", "reacher-easy"])
def test_every_environment_equals_dm_control_for_any_number_of_threads(seen, env_id):
    oracle = seen[f"{env_id} oracle"]
    assert (oracle.shape, oracle.dtype) == ((3, 64, 64, 3), np.dtype(np.uint8))
    assert oracle.std() > 10
    assert (oracle[0] != oracle[1]).any()
    for num_threads in (1, 2):
        np.testing.assert_array_equal(seen[f"{env_id} {num_threads}"], oracle)


def test_all_into_an_array_and_one_alone(seen):
    np.testing.assert_array_equal(seen["out"], seen["cheetah-run oracle"])
    np.testing.assert_array_equal(seen["one"], seen["cheetah-run oracle"][1])


def test_any_size_whatever_the_model_offers(seen):
    assert seen["tall"].shape == (3, 501, 7, 3)
    assert seen["tall"].std() > 10
    np.testing.assert_array_equal(seen["tall"], seen["tall oracle"])


def test_images_are_an_observation_of_the_state_after_the_step(seen):
    assert (seen["image"].shape, seen["image"].dtype) == ((2, 16, 24, 3), np.dtype(np.uint8))
    np.testing.assert_array_equal(seen["image"], seen["image oracle"])
    assert (seen["image"] != seen["first image"]).any()
    assert (seen["free"] != seen["image"]).any()


def test_images_of_a_state_that_is_gone_are_refused():
    with pytest.raises(ValueError, match=r"pixels is \(8, 8\), expected None"):
        make_vec("walker-walk", pixels=(8, 8), autoreset_mode="SameStep")


def test_contexts_end_with_their_threads(seen):
    assert seen["closed"]
    assert seen["left"] == 0
    # each on the thread that opened it (idents are given again), 10 renderers' at least
    assert len(seen["opened"]) > 10
    np.testing.assert_array_equal(np.sort(seen["opened"]), np.sort(seen["freed"]))


def test_without_a_library_the_error_names_it(tmp_path):
    done = run(MISSING, tmp_path, MUJOCO_GL="egl")
    assert (done.returncode, done.stdout) == (1, "mujoco needs no OpenGL\n")
    message = "no OpenGL for rendering (MUJOCO_GL='egl': libEGL.so.1: not here)"
    assert f"RuntimeError: {message}" in done.stderr


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere mujoco chooses")
@pytest.mark.parametrize(
    ("given", "display", "egl", "chosen"),
    [
        (None, None, True, "egl"),
        (None, None, False, "osmesa"),
        (None, ":0", True, "egl"),
        (None, ":0", False, ""),
        ("OSMesa ", None, True, "osmesa"),
        ("disable", ":0", True, "disable"),
    ],
)
def test_choice(monkeypatch, given, display, egl, chosen):
    for name, value in (("MUJOCO_GL", given), ("DISPLAY", display)):
        monkeypatch.delenv(name, raising=False)
        if value is not None:
            monkeypatch.setenv(name, value)
    monkeypatch.setattr(render, "_loads", lambda library: egl)
    assert render._choose_gl() == chosen


def test_switched_off(monkeypatch):
    # chosen when the module was imported, which other tests may have done first
    monkeypatch.setattr(render, "GL", "disable")
    threads = threading.active_count()
    with pytest.raises(RuntimeError, match=r"no OpenGL for rendering \(MUJOCO_GL='disable'"):
        Renderer(make_vec("walker-walk"))
    assert threading.active_count() == threads


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"height": 0}, "height is 0, expected 1 to 16384"),
        ({"width": 20000}, "width is 20000, expected 1 to 16384"),
        ({"camera": 2}, "camera is 2, expected -1 to 1"),
        ({"camera": -2}, "camera is -2, expected -1 to 1"),
        ({"num_threads": 0}, "num_threads is 0, expected at least 1"),
    ],
)
def test_wrong_arguments(wrong, message):
    with pytest.raises(ValueError, match=message):
        Renderer(make_vec("walker-walk"), **wrong)


def test_video(tmp_path):
    imageio = pytest.importorskip("imageio.v2")
    frames = [np.full((48, 64, 3), 20 * i, np.uint8) for i in range(6)]
    for name in ("walk.mp4", "walk.gif"):
        write_video(tmp_path / name, frames, fps=10)
        read = np.stack(list(imageio.get_reader(tmp_path / name).iter_data()))
        assert read.shape == (6, 48, 64, 3)
        assert abs(read[3].mean() - 60) < 4
    assert sorted(path.name for path in tmp_path.iterdir()) == ["walk.gif", "walk.mp4"]
    with pytest.raises(ValueError, match=r"expected the suffix \.mp4 or \.gif"):
        write_video(tmp_path / "walk.avi", frames, fps=10)
