"""Policies of the baselines, which see the last few frames, and their agent."""

from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from fastrssm.envs import find_task
from fastrssm.models.nets import MLP
from fastrssm.run.checkpoint import Checkpoint, restore

Array = npt.NDArray[Any]

# frames that the policy sees: velocities are hidden in lpomdp, so it needs a few
STACK = {"mdp": 1, "lpomdp": 5}


class StackPolicy(nn.Module):
    """tanh(MLP(stacked frames)): [..., k * E] -> action [..., A] in (-1, 1)."""

    def __init__(self, in_size: int, action_size: int) -> None:
        """Build the network."""
        super().__init__()
        self.mlp = MLP(in_size, action_size, width=128, depth=2)

    def forward(self, stack: Tensor) -> Tensor:
        """[..., k * E] -> [..., A]."""
        return self.mlp(stack).tanh()


class StackAgent:
    """Act with a policy on the last k frames; an episode starts with k copies of its first."""

    def __init__(self, policy: StackPolicy, sensors: tuple[str, ...], stack: int) -> None:
        """Take the policy, the sensors it sees in order, and k."""
        self._policy, self._sensors, self._k = policy, sensors, stack
        self._device = next(policy.parameters()).device
        self._frames = torch.empty(0)

    def reset(self, num_envs: int) -> None:
        """Forget all frames."""
        self._frames = torch.zeros(num_envs, 0, 0)

    @torch.no_grad()
    def act(self, obs: dict[str, Array], is_first: Array, prev_action: Array) -> Array:
        """Return the actions [N, A] for observations [N, size] per sensor."""
        del prev_action
        frame = torch.from_numpy(np.concatenate([obs[name] for name in self._sensors], axis=-1))
        frame = frame.float().unsqueeze(1)
        copies = frame.expand(-1, self._k, -1)
        if self._frames.shape[1:] != copies.shape[1:]:
            self._frames = copies
        else:
            shifted = torch.cat((self._frames[:, 1:], frame), 1)
            first = torch.from_numpy(np.asarray(is_first, bool))[:, None, None]
            self._frames = torch.where(first, copies, shifted)
        return self._policy(self._frames.flatten(1).to(self._device)).cpu().numpy()


def sizes(env: str, setup: str) -> tuple[int, int]:
    """Return E, the size of one frame that the policy sees, and A, that of an action."""
    task, seen = find_task(env), inputs(env, setup)
    return sum(size for name, size, _ in task.sensors if name in seen), task.action_size


def build_policy(env: str, setup: str) -> StackPolicy:
    """Build a fresh policy for a task and a setup."""
    frame, action = sizes(env, setup)
    return StackPolicy(STACK[setup] * frame, action)


def inputs(env: str, setup: str) -> tuple[str, ...]:
    """Name the sensors that the policy of a task sees, in order.

    Raises:
        ValueError: unknown task or setup.
    """
    if setup not in STACK:
        raise ValueError(f"--setup is {setup!r}, expected one of {', '.join(STACK)}")
    sensors = find_task(env, "--env").sensors
    return tuple(name for name, _, order in sensors if setup == "mdp" or order == "first")


def load_agent(checkpoint: Checkpoint, seed: int, device: torch.device) -> StackAgent:
    """Rebuild the agent of a baseline's run; it draws nothing, so the seed is not used.

    Raises:
        ValueError: the checkpoint is of another model variant.
    """
    del seed
    env, setup = checkpoint.config["args"]["env"], checkpoint.config["args"]["setup"]
    policy = build_policy(env, setup)
    restore(checkpoint, {"policy": policy})
    return StackAgent(policy.to(device), inputs(env, setup), STACK[setup])
