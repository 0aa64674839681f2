"""Images of environments beside MuJoCo's and dm_control's own renderers: workload render.

One call draws 64 x 64 images of all environments as they stand. The limit is the drawing of one
scene that is ready, again and again, and reading its pixels.
"""

import copy
import logging
import os
import threading
from concurrent.futures import ThreadPoolExecutor

from fastrssm.envs import Renderer, make_vec, render

# dm_control draws with the same OpenGL
os.environ["MUJOCO_GL"] = render.GL

import mujoco
import numpy as np

from bench.harness import Workload

# a deprecation notice per loaded model of dm_control
logging.getLogger("absl").setLevel(logging.ERROR)

SIZE = 64
NUM_ENVS = 4
_OWN = threading.local()


class OnThread:
    """A provider with a thread of its own.

    dm_control, which stays on the main one, does not notice when another context becomes current.
    """

    def __init__(self, make, env):
        self.pool = ThreadPoolExecutor(1)
        self.pool.submit(self.make, make, env).result()

    def make(self, make, env):
        _OWN.draw = make(env)

    def draw(self):
        _OWN.draw()

    def __call__(self):
        self.pool.submit(self.draw).result()


class Mujoco:
    """mujoco.Renderer, one environment after the other."""

    def __init__(self, env):
        self.renderer, self.data = mujoco.Renderer(env.model, SIZE, SIZE), env.data
        self.images = np.empty((env.num_envs, SIZE, SIZE, 3), np.uint8)

    def __call__(self):
        for data, image in zip(self.data, self.images, strict=True):
            self.renderer.update_scene(data, 0)
            self.renderer.render(out=image)


class Scene:
    """The limit: mjr_render and mjr_readPixels, and nothing around them."""

    def __init__(self, env):
        model = copy.deepcopy(env.model)
        model.vis.global_.offwidth = model.vis.global_.offheight = SIZE
        self.gl = render._open_gl(SIZE, SIZE)
        self.gl.make_current()
        self.context = mujoco.MjrContext(model, mujoco.mjtFontScale.mjFONTSCALE_150.value)
        self.scene, camera = mujoco.MjvScene(model, 1000), mujoco.MjvCamera()
        camera.type, camera.fixedcamid = mujoco.mjtCamera.mjCAMERA_FIXED, 0
        everything = mujoco.mjtCatBit.mjCAT_ALL.value
        mujoco.mjv_updateScene(
            model, env.data[0], mujoco.MjvOption(), None, camera, everything, self.scene
        )
        mujoco.mjr_setBuffer(mujoco.mjtFramebuffer.mjFB_OFFSCREEN.value, self.context)
        self.rect, self.count = mujoco.MjrRect(0, 0, SIZE, SIZE), env.num_envs
        self.image = np.empty((SIZE, SIZE, 3), np.uint8)

    def __call__(self):
        for _ in range(self.count):
            mujoco.mjr_render(self.rect, self.scene, self.context)
            mujoco.mjr_readPixels(self.image, None, self.rect, self.context)


class DmControl:
    """physics.render, one environment after the other, each with a context of its own."""

    def __init__(self, env):
        from dm_control import suite

        self.physics = [suite.load(*env.env_id.split("-")).physics for _ in env.data]
        for physics, data in zip(self.physics, env.data, strict=True):
            with physics.reset_context():
                physics.data.qpos[:] = data.qpos

    def __call__(self):
        for physics in self.physics:
            physics.render(SIZE, SIZE, camera_id=0)


def workload(env_id, threads):
    env = make_vec(env_id, NUM_ENVS, num_threads=1)
    env.reset(seed=0)
    images = np.empty((NUM_ENVS, SIZE, SIZE, 3), np.uint8)
    renderer = Renderer(env, SIZE, SIZE, num_threads=threads)
    providers = {
        "mjr_render": OnThread(Scene, env),
        "mujoco.Renderer": OnThread(Mujoco, env),
        "dm_control": DmControl(env),
        "fastrssm-renderer": lambda: renderer.frames(images),
    }
    return Workload(
        "render", f"{env_id}, {NUM_ENVS} images of {SIZE} x {SIZE}", "render", "uint8", "cpu",
        None, providers, limit="mjr_render",
    )  # fmt: skip


def workloads(threads):
    for env_id in ("walker-walk", "cheetah-run"):
        yield workload(env_id, threads)
