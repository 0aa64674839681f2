"""The tasks: constants here, physics in one file per domain."""

from dataclasses import dataclass, replace
from importlib import import_module


@dataclass(frozen=True)
class Task:
    """Constants of one task.

    Attributes:
        domain: the module with its functions, as one imports it.
        reward: njit function of that module, called after each control step and summed.
        sensors: (name, size, order) in observation order; order is "first" for positions and
            "second" for velocities.
        action_size: number of controls, each in [-1, 1].
        finish: njit function that turns the sum into the reward of the step. None: the sum stays.
        model: the model's file: of dm_control's suite, or an absolute path.
        control_timestep: seconds between two controls.
        episode_steps: control steps of an episode.
        settle_steps: physics steps between the initial pose and the first observation.
        action_repeat: AIME's control steps per action.
        expert_return: the return that scores 100 (AIME's constant).
        reset: njit function of that module that draws the initial pose.
        observe: njit function of that module that writes the sensors.
        edit: function of that module that changes the `mujoco.MjSpec` before it is compiled.
        camera: number of the model's camera that draws pixels.
        parameters: entries of the model that `reset` draws anew, for example
            "geom_pos[target,0]": array, element, column. It writes them to `physics.parameters`.
            What MuJoCo derives from an entry when it compiles a model is not derived again.
    """

    domain: str
    reward: str
    sensors: tuple[tuple[str, int, str], ...]
    action_size: int
    model: str
    control_timestep: float
    finish: str | None = None
    episode_steps: int = 1000
    settle_steps: int = 0
    action_repeat: int = 2
    expert_return: float | None = None
    reset: str = "reset"
    observe: str = "observe"
    edit: str | None = None
    camera: int = 0
    parameters: tuple[str, ...] = ()


def _walker(reward: str, finish: str | None = None, expert_return: float | None = None) -> Task:
    return Task(
        domain="fastrssm.envs.tasks.walker",
        reward=reward,
        sensors=(("orientations", 14, "first"), ("height", 1, "first"), ("velocity", 9, "second")),
        action_size=6,
        model="walker.xml",
        control_timestep=0.025,
        finish=finish,
        expert_return=expert_return,
    )


def _cheetah(reward: str, finish: str | None = None, expert_return: float | None = None) -> Task:
    return Task(
        domain="fastrssm.envs.tasks.cheetah",
        reward=reward,
        sensors=(("position", 8, "first"), ("velocity", 9, "second")),
        action_size=6,
        model="cheetah.xml",
        control_timestep=0.01,
        finish=finish,
        settle_steps=200,
        expert_return=expert_return,
    )


def _cartpole(reset: str, reward: str) -> Task:
    return Task(
        domain="fastrssm.envs.tasks.cartpole",
        reset=reset,
        reward=reward,
        sensors=(("position", 3, "first"), ("velocity", 2, "second")),
        action_size=1,
        model="cartpole.xml",
        control_timestep=0.01,
        action_repeat=8,
    )


def _hopper(reward: str) -> Task:
    return Task(
        domain="fastrssm.envs.tasks.hopper",
        reward=reward,
        sensors=(("position", 6, "first"), ("velocity", 7, "second"), ("touch", 2, "first")),
        action_size=4,
        model="hopper.xml",
        control_timestep=0.02,
    )


def _reacher(edit: str | None = None) -> Task:
    return Task(
        domain="fastrssm.envs.tasks.reacher",
        reward="reach",
        sensors=(("position", 2, "first"), ("to_target", 2, "first"), ("velocity", 2, "second")),
        action_size=2,
        model="reacher.xml",
        control_timestep=0.02,
        action_repeat=4,
        edit=edit,
        parameters=("geom_pos[target,0]", "geom_pos[target,1]"),
    )


_FINGER = Task(
    domain="fastrssm.envs.tasks.finger",
    reward="spin",
    sensors=(("position", 4, "first"), ("velocity", 3, "second"), ("touch", 2, "first")),
    action_size=2,
    model="finger.xml",
    control_timestep=0.02,
    edit="edit_spin",
)


def _finger_turn(edit: str | None = None) -> Task:
    return replace(
        _FINGER,
        reward="turn",
        sensors=(
            *_FINGER.sensors,
            ("target_position", 2, "first"),
            ("dist_to_target", 1, "first"),
        ),
        reset="reset_target",
        observe="observe_target",
        edit=edit,
        parameters=("site_pos[target,0]", "site_pos[target,2]"),
    )


_HUMANOID_SENSORS = (
    ("joint_angles", 21, "first"),
    ("head_height", 1, "first"),
    ("extremities", 12, "first"),
    ("torso_vertical", 3, "first"),
    ("com_velocity", 3, "second"),
    ("velocity", 27, "second"),
)


def _humanoid(
    reward: str,
    observe: str = "observe",
    sensors: tuple[tuple[str, int, str], ...] = _HUMANOID_SENSORS,
) -> Task:
    return Task(
        domain="fastrssm.envs.tasks.humanoid",
        reward=reward,
        observe=observe,
        sensors=sensors,
        action_size=21,
        model="humanoid.xml",
        control_timestep=0.025,
    )


def _quadruped(
    name: str,
    reset: str = "reset",
    observe: str = "observe",
    sensors: tuple[tuple[str, int, str], ...] = (),
) -> Task:
    return Task(
        domain="fastrssm.envs.tasks.quadruped",
        reset=reset,
        observe=observe,
        reward=name,
        edit=f"edit_{name}",
        camera=2,
        sensors=(
            ("egocentric_state", 44, "first"),
            ("torso_velocity", 3, "second"),
            ("torso_upright", 1, "first"),
            ("imu", 6, "first"),
            ("force_torque", 24, "first"),
            *sensors,
        ),
        action_size=12,
        model="quadruped.xml",
        control_timestep=0.02,
    )


# dm_control's own, then AIME's: the definitions of its two code bases differ, and so do the returns
TASKS: dict[str, Task] = {
    "walker-stand": _walker("stand", expert_return=957.87109375),
    "walker-walk": _walker("walk", expert_return=943.7876586914062),
    "walker-run": _walker("run", expert_return=604.10009765625),
    "cheetah-run": _cheetah("run", expert_return=888.6480102539062),
    "cartpole-swingup": _cartpole("reset", "smooth"),
    "cartpole-swingup_sparse": _cartpole("reset", "sparse"),
    "cartpole-balance": _cartpole("reset_near_top", "smooth"),
    "cartpole-balance_sparse": _cartpole("reset_near_top", "sparse"),
    "hopper-stand": _hopper("stand"),
    "hopper-hop": _hopper("hop"),
    "reacher-easy": _reacher(),
    "reacher-hard": _reacher("edit_hard"),
    "finger-spin": _FINGER,
    "finger-turn_easy": _finger_turn("edit_turn_easy"),
    "finger-turn_hard": _finger_turn(),
    "pendulum-swingup": Task(
        domain="fastrssm.envs.tasks.pendulum",
        reward="swingup",
        sensors=(("orientation", 2, "first"), ("velocity", 1, "second")),
        action_size=1,
        model="pendulum.xml",
        control_timestep=0.02,
    ),
    "ball_in_cup-catch": Task(
        domain="fastrssm.envs.tasks.ball_in_cup",
        reward="catch",
        sensors=(("position", 4, "first"), ("velocity", 4, "second")),
        action_size=2,
        model="ball_in_cup.xml",
        control_timestep=0.02,
        action_repeat=4,
    ),
    "humanoid-stand": _humanoid("stand"),
    "humanoid-walk": _humanoid("walk"),
    "humanoid-run": _humanoid("run"),
    "humanoid-run_pure_state": _humanoid(
        "run", "observe_state", (("position", 28, "first"), ("velocity", 27, "second"))
    ),
    "quadruped-walk": _quadruped("walk"),
    "quadruped-run": _quadruped("run"),
    "quadruped-fetch": _quadruped(
        "fetch",
        "reset_fetch",
        "observe_fetch",
        (("ball_state", 9, "first"), ("target_position", 3, "first")),
    ),
    "walker-walkbackward-aime1": _walker("stand", "walkbackward_aime1"),
    "walker-runbackward-aime1": _walker("stand", "runbackward_aime1"),
    "walker-flip-aime1": _walker("stand", "flip_aime1"),
    "walker-flipbackward-aime1": _walker("stand", "flipbackward_aime1"),
    "walker-jump-aime1": _walker("stand", "jump_aime1"),
    "walker-walkbackward-aime2": _walker("walkbackward_aime2"),
    "walker-runbackward-aime2": _walker("runbackward_aime2"),
    "walker-flip-aime2": _walker("flip_aime2"),
    "walker-flipbackward-aime2": _walker("flipbackward_aime2"),
    "walker-jump-aime2": _walker("jump_aime2"),
    "cheetah-runbackward-aime1": _cheetah("run", "runbackward_aime1", 218.50271606445312),
    "cheetah-flip-aime1": _cheetah("run", "flip_aime1", 485.7939758300781),
    "cheetah-flipbackward-aime1": _cheetah("run", "flipbackward_aime1", 379.9083251953125),
    "cheetah-runbackward-aime2": _cheetah("runbackward_aime2"),
    "cheetah-flip-aime2": _cheetah("flip_aime2"),
    "cheetah-flipbackward-aime2": _cheetah("flipbackward_aime2"),
}


def find_task(env_id: str, argument: str = "env_id") -> Task:
    """Look up a task; for "module:name" the module is imported first, which may register it.

    Args:
        env_id: a key of `TASKS`, for example "walker-walk" or "my_tasks:slider-centre".
        argument: what to call env_id in an error.

    Raises:
        ValueError: no such task.
    """
    module, _, name = env_id.rpartition(":")
    if module:
        import_module(module)
    if name not in TASKS:
        raise ValueError(f"{argument} is {env_id!r}, expected one of {', '.join(TASKS)}")
    return TASKS[name]
