"""Train an expert actor with soft actor-critic and keep snapshots of its learning.

The learner is SAC of sbx (stable-baselines3 in JAX), an optional extra: `pip install
'fastrssm[experts]'`. What is kept are small actors, from which every dataset of the paper can be
collected anew: the expert is the last snapshot, a buffer is a replay of all of them.
"""

import json
import os
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from safetensors.numpy import save_file

from fastrssm.envs import MujocoVectorEnv, make_vec


@dataclass(frozen=True)
class Args:
    """Soft actor-critic on one task.

    Attributes:
        env: task, for example walker-run.
        out: folder of the snapshots (`<env>.safetensors`) and the curve (`<env>.json`).
        steps: environment steps in all.
        num_envs: environments stepped together.
        updates: gradient steps per vector step.
        batch_size: transitions per gradient step.
        lr: learning rate of all parts; falls linearly to 0 over the second half.
        gamma: discount.
        actor_width: width of the actor's two hidden layers.
        critic_width: width of the critics' two hidden layers.
        policy_delay: critic updates per actor update.
        snapshots: how many actors to keep along learning.
        eval_episodes: episodes per evaluation; there is one per snapshot.
        seed: of everything.
    """

    env: str
    out: Path = Path("python/fastrssm/data/experts")
    steps: int = 1_000_000
    num_envs: int = 16
    updates: int = 4
    batch_size: int = 256
    lr: float = 1e-3
    gamma: float = 0.99
    actor_width: int = 128
    critic_width: int = 256
    policy_delay: int = 2
    snapshots: int = 20
    eval_episodes: int = 20
    seed: int = 0


def _flat(observation: dict[str, NDArray[np.float32]]) -> NDArray[np.float32]:
    return np.concatenate(list(observation.values()), axis=1)


def _wrap(env: MujocoVectorEnv) -> Any:
    """Give `env` the face of stable-baselines3; all episodes are equally long and end together."""
    from gymnasium import spaces
    from stable_baselines3.common.vec_env import VecEnv

    class Face(VecEnv):
        def reset(self) -> Any:
            return _flat(env.reset(seed=self.first_seed)[0])

        first_seed: int | None = None

        def step_async(self, actions: Any) -> None:
            self.actions = actions

        def step_wait(self) -> Any:
            observation, reward, _, truncated, _ = env.step(self.actions)
            flat = _flat(observation)
            infos: list[dict[str, Any]] = [{} for _ in range(env.num_envs)]
            if truncated.any():
                assert truncated.all()
                infos = [{"terminal_observation": o, "TimeLimit.truncated": True} for o in flat]
                flat = _flat(env.step(self.actions)[0])
            return flat, reward.astype(np.float32), truncated, infos

        def close(self) -> None: ...
        def get_attr(self, attr_name: str, indices: Any = None) -> list[Any]:
            return [getattr(self, attr_name, None)] * env.num_envs

        def set_attr(self, attr_name: str, value: Any, indices: Any = None) -> None: ...
        def env_method(self, method_name: str, *a: Any, indices: Any = None, **k: Any) -> list[Any]:
            return []

        def env_is_wrapped(self, wrapper_class: Any, indices: Any = None) -> list[bool]:
            return [False] * env.num_envs

    size = sum(size for _, size, _ in env.task.sensors)
    box = spaces.Box(-np.inf, np.inf, (size,), np.float32)
    return Face(env.num_envs, box, env.single_action_space)


def _snapshot(model: Any, normaliser: Any) -> dict[str, NDArray[np.float32]]:
    """Give the actor's tensors: two hidden layers, two heads, scaling of the observation."""
    params = model.policy.actor_state.params["params"]
    names = {"Dense_0": "l0", "Dense_1": "l1", "Dense_2": "mean", "Dense_3": "log_std"}
    out = {
        "obs_mean": normaliser.obs_rms.mean,
        "obs_scale": 1 / np.sqrt(normaliser.obs_rms.var + normaliser.epsilon),
    }
    for module, name in names.items():
        out[f"{name}.weight"] = np.asarray(params[module]["kernel"]).T
        out[f"{name}.bias"] = np.asarray(params[module]["bias"])
    return {name: np.ascontiguousarray(value, np.float32) for name, value in out.items()}


def mean_action(
    actor: dict[str, NDArray[np.float32]], observation: NDArray[np.float32]
) -> NDArray[np.float32]:
    """Give the mode action [N, A] of one snapshot for observations [N, O]."""
    x = (observation - actor["obs_mean"]) * actor["obs_scale"]
    for layer in ("l0", "l1"):
        x = np.maximum(x @ actor[f"{layer}.weight"].T + actor[f"{layer}.bias"], 0)
    return np.tanh(x @ actor["mean.weight"].T + actor["mean.bias"])


def _returns(env: MujocoVectorEnv, actor: dict[str, NDArray[np.float32]], seed: int) -> Any:
    observation, _ = env.reset(seed=seed)
    total = np.zeros(env.num_envs)
    for _ in range(env.episode_steps):
        observation, reward, *_ = env.step(mean_action(actor, _flat(observation)))
        total += reward
    return total


def train(args: Args) -> None:
    """Train, snapshot along the way, and write both files after every snapshot."""
    from sbx import SAC
    from stable_baselines3.common.callbacks import BaseCallback
    from stable_baselines3.common.vec_env import VecNormalize

    vec = _wrap(make_vec(args.env, args.num_envs, num_threads=1))
    vec.first_seed = args.seed
    normaliser = VecNormalize(vec, norm_reward=False, clip_obs=1e6)
    eval_env = make_vec(args.env, args.eval_episodes, num_threads=1)
    model = SAC(
        "MlpPolicy",
        normaliser,
        learning_rate=lambda left: args.lr * min(1.0, 2 * left),
        buffer_size=args.steps,
        learning_starts=5000,
        batch_size=args.batch_size,
        gamma=args.gamma,
        train_freq=1,
        gradient_steps=args.updates,
        policy_delay=args.policy_delay,
        policy_kwargs={
            "net_arch": {
                "pi": [args.actor_width, args.actor_width],
                "qf": [args.critic_width, args.critic_width],
            },
            "layer_norm": True,
        },
        seed=args.seed,
    )
    # learning is fast at first: snapshots lie evenly on a square-root scale of time
    at = (np.linspace(0, 1, args.snapshots) ** 2 * (args.steps - args.num_envs)).astype(int)
    tensors: dict[str, NDArray[np.float16]] = {}
    curve: dict[str, list[float]] = {"steps": [], "returns": [], "std": [], "seconds": []}
    start = time.time()
    args.out.mkdir(parents=True, exist_ok=True)

    class Keep(BaseCallback):
        def _on_step(self) -> bool:
            while len(curve["steps"]) < len(at) and self.num_timesteps >= at[len(curve["steps"])]:
                actor = _snapshot(self.model, normaliser)
                returns = _returns(eval_env, actor, seed=args.seed + 1000)
                k = len(curve["steps"])
                tensors.update(
                    {f"snapshot_{k}.{n}": v.astype(np.float16) for n, v in actor.items()}
                )
                curve["steps"].append(self.num_timesteps)
                curve["returns"].append(round(float(returns.mean()), 2))
                curve["std"].append(round(float(returns.std()), 2))
                curve["seconds"].append(round(time.time() - start, 1))
                _write(args, tensors, curve)
                print(json.dumps({key: value[-1] for key, value in curve.items()}), flush=True)
            return True

    model.learn(args.steps, callback=Keep(), log_interval=10**9)


def _write(args: Args, tensors: dict[str, Any], curve: dict[str, list[float]]) -> None:
    inputs = [name for name, _, _ in make_vec(args.env).task.sensors]
    path = args.out / f"{args.env}.safetensors"
    meta = {"steps": curve["steps"], "returns": curve["returns"], "inputs": inputs}
    save_file(tensors, f"{path}.tmp", {key: json.dumps(value) for key, value in meta.items()})
    os.replace(f"{path}.tmp", path)
    record = {"args": {key: str(value) for key, value in asdict(args).items()}, **curve}
    path.with_suffix(".json").write_text(json.dumps(record, indent=1))
