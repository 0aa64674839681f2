"""Train an expert with soft actor-critic, and keep what it learned from.

The learner is SAC of sbx (stable-baselines3 in JAX), an optional extra: `pip install
'fastrssm[experts]'`. What is kept is a small actor, from which demonstrations are collected anew,
and with `--tape` the whole replay, as seeds and actions: the task's "buffer".
"""

# the learner is an optional extra
# pyright: reportMissingImports=false, reportAttributeAccessIssue=false
# pyright: reportUntypedBaseClass=false

import json
import math
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from gymnasium import spaces
from numpy.typing import NDArray
from safetensors.numpy import save

from fastrssm.envs import MujocoVectorEnv, find_task, make_vec
from fastrssm.run.agents import Expert
from fastrssm.run.checkpoint import write_atomic
from fastrssm.run.evaluate import evaluate
from fastrssm.run.tapes import Tape, episode_seed, from_bytes, save_tape, to_bytes


@dataclass(frozen=True, kw_only=True)
class Args:
    """Train an expert with soft actor-critic, and keep what it learned from."""

    env: str
    """Task, for example walker-run."""
    out: Path
    """Folder for the actor (<env>.safetensors) and the curve (<env>.json)."""
    steps: int = 300_000
    """Environment steps in all."""
    num_envs: int = 16
    """Environments stepped together."""
    updates: int = 4
    """Gradient steps per step of all environments."""
    batch_size: int = 256
    """Transitions in a gradient step."""
    lr: float = 1e-3
    """Learning rate of all parts; it falls linearly to 0 over the second half."""
    gamma: float = 0.99
    """Discount."""
    actor_width: int = 128
    """Width of the actor's two hidden layers."""
    critic_width: int = 256
    """Width of the critics' two hidden layers."""
    policy_delay: int = 2
    """Critic updates per actor update."""
    entropy: float = -1.0
    """Entropy of an action's component that the learner keeps, in nats, below the 0.69 of a
    uniform one. More of it makes a buffer that shows more of the body."""
    evaluations: int = 20
    """How often to evaluate; evenly on a square-root scale of time, from start to end."""
    eval_episodes: int = 20
    """Episodes of an evaluation."""
    seed: int = 0
    """Of everything."""
    tape: bool = False
    """Keep the replay as well, all whole episodes that it learned from (<env>-buffer.tape)."""


def train(args: Args) -> None:
    """Train from the start; actor and curve are rewritten after every evaluation.

    Raises:
        ValueError: an unknown task, fewer steps than an episode has for a tape, or an entropy that
            no actions have.
        RuntimeError: the learner is not installed.
    """
    task = find_task(args.env, "--env")
    least = args.num_envs * -(-task.episode_steps // task.action_repeat)
    if args.tape and args.steps < least:
        raise ValueError(
            f"--steps is {args.steps}, expected at least {least} for --tape, an episode of each of "
            f"the {args.num_envs} environments"
        )
    if not args.entropy < math.log(2):
        raise ValueError(
            f"--entropy is {args.entropy}, expected below 0.69, that of uniform actions"
        )
    try:
        from sbx import SAC
        from stable_baselines3.common.callbacks import BaseCallback
        from stable_baselines3.common.vec_env import VecNormalize
    except ImportError as error:
        raise RuntimeError(
            f"the learner is missing ({error}): pip install 'fastrssm[experts]'"
        ) from error
    face = _face(make_vec(args.env, args.num_envs, num_threads=1), args.seed)
    normalised = VecNormalize(face, norm_reward=False, clip_obs=1e6)
    model = SAC(
        "MlpPolicy",
        normalised,
        learning_rate=lambda left: args.lr * min(1.0, 2 * left),
        buffer_size=args.steps,
        learning_starts=5000,
        batch_size=args.batch_size,
        gamma=args.gamma,
        train_freq=1,
        gradient_steps=args.updates,
        policy_delay=args.policy_delay,
        target_entropy=args.entropy * face.action_space.shape[0],
        policy_kwargs={
            "net_arch": {"pi": [args.actor_width] * 2, "qf": [args.critic_width] * 2},
            "layer_norm": True,
        },
        seed=args.seed,
    )
    # learning is fast at first
    due = (np.linspace(0, 1, args.evaluations) ** 2 * (args.steps - args.num_envs)).astype(int)
    curve: dict[str, list[float]] = {"steps": [], "returns": [], "std": [], "seconds": []}
    start = time.time()
    args.out.mkdir(parents=True, exist_ok=True)

    class Keep(BaseCallback):
        def _on_step(self) -> bool:
            while len(curve["steps"]) < len(due) and self.num_timesteps >= due[len(curve["steps"])]:
                curve["steps"].append(self.num_timesteps)
                _write_actor(args, model, normalised)
                # what is evaluated is what is kept, in half precision
                expert = Expert.open(args.env, args.out)
                result = evaluate(expert, args.env, args.eval_episodes, seed=args.seed + 1000)
                curve["returns"].append(round(result.mean, 2))
                curve["std"].append(round(result.std, 2))
                curve["seconds"].append(round(time.time() - start, 1))
                record = json.dumps({"args": _options(args), **curve}, indent=1) + "\n"
                write_atomic(args.out / f"{args.env}.json", record.encode())
                print(json.dumps({name: values[-1] for name, values in curve.items()}), flush=True)
            return True

    model.learn(args.steps, callback=Keep(), log_interval=10**9)
    if args.tape:
        # the last round, hardly begun, is left out
        actions = np.concatenate([np.stack(each, 1) for each in face.actions[:-1]])
        run = {"algorithm": "expert", "args": _options(args)}
        tape = Tape(args.env, np.array(face.seeds[: len(actions)]), actions, run)
        save_tape(args.out / f"{args.env}-buffer.tape", tape)


def _options(args: Args) -> dict[str, Any]:
    return {name: value for name, value in asdict(args).items() if name != "out"}


def _face(env: MujocoVectorEnv, seed: int) -> Any:
    """Give `env` the face of stable-baselines3; all episodes are equally long and end together."""
    from stable_baselines3.common.vec_env import VecEnv

    def flat(observation: dict[str, NDArray[np.float32]]) -> NDArray[np.float32]:
        return np.concatenate(list(observation.values()), axis=1)

    class Face(VecEnv):
        def __init__(self, *args: Any) -> None:
            super().__init__(*args)
            self.seeds: list[int] = []
            # per round of episodes, per step: [N, A]
            self.actions: list[list[NDArray[np.int8]]] = []

        def reset(self) -> Any:
            numbers = range(len(self.seeds), len(self.seeds) + env.num_envs)
            self.seeds += [episode_seed(seed, number) for number in numbers]
            self.actions.append([])
            return flat(env.reset(seed=self.seeds[-env.num_envs :])[0])

        def step_async(self, actions: Any) -> None:
            self.actions[-1].append(to_bytes(actions))

        def step_wait(self) -> Any:
            observation, reward, _, truncated, _ = env.step(from_bytes(self.actions[-1][-1]))
            rows = flat(observation)
            infos: list[dict[str, Any]] = [{} for _ in range(env.num_envs)]
            if truncated.any():
                assert truncated.all()
                infos = [{"terminal_observation": o, "TimeLimit.truncated": True} for o in rows]
                rows = self.reset()
            return rows, reward.astype(np.float32), truncated, infos

        def close(self) -> None:
            env.close()

        def get_attr(self, attr_name: str, indices: Any = None) -> list[Any]:
            return [getattr(self, attr_name, None)] * env.num_envs

        def set_attr(self, attr_name: str, value: Any, indices: Any = None) -> None:
            raise NotImplementedError

        def env_method(self, method_name: str, *args: Any, **kwargs: Any) -> list[Any]:
            raise NotImplementedError

        def env_is_wrapped(self, wrapper_class: Any, indices: Any = None) -> list[bool]:
            return [False] * env.num_envs

    size = sum(size for _, size, _ in env.task.sensors)
    box = spaces.Box(-np.inf, np.inf, (size,), np.float32)
    return Face(env.num_envs, box, env.single_action_space)


def _write_actor(args: Args, model: Any, normalised: Any) -> None:
    """Keep the actor: two hidden layers, a head, scaling of the observation."""
    layers = model.policy.actor_state.params["params"]
    variance = normalised.obs_rms.var + normalised.epsilon
    tensors = {"obs_mean": normalised.obs_rms.mean, "obs_scale": 1 / np.sqrt(variance)}
    for layer, name in {"Dense_0": "l0", "Dense_1": "l1", "Dense_2": "mean"}.items():
        tensors[f"{name}.weight"] = np.asarray(layers[layer]["kernel"]).T
        tensors[f"{name}.bias"] = np.asarray(layers[layer]["bias"])
    halves = {name: np.ascontiguousarray(value, np.float16) for name, value in tensors.items()}
    inputs = json.dumps([name for name, _, _ in find_task(args.env).sensors])
    write_atomic(args.out / f"{args.env}.safetensors", save(halves, {"inputs": inputs}))
