"""The agent of world-model runs: filter observations, and act on the model's state."""

from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from fastrssm.models.config import WorldModelConfig
from fastrssm.models.policy import TanhGaussianPolicy
from fastrssm.models.world_model import WorldModel
from fastrssm.run.checkpoint import Checkpoint, restore

Array = npt.NDArray[Any]


class WorldModelAgent:
    """Filter observations with a world model and act with the mode of a policy on its state.

    The state is zero at the start of an episode, and the posterior is sampled (AIME's protocol).
    """

    def __init__(
        self,
        world_model: WorldModel,
        policy: TanhGaussianPolicy,
        seed: int,
        action_noise: float = 0.0,
    ) -> None:
        """Take the modules, the seed of all noise, and the deviation of that on the actions."""
        self._world_model, self._policy, self._seed = world_model, policy, seed
        self._action_noise = action_noise
        self._device = next(world_model.parameters()).device
        self._state = world_model.rssm.initial(0)
        self._noise = torch.Generator(self._device)

    def reset(self, num_envs: int) -> None:
        """Forget all episodes and start the noise anew."""
        self._state = self._world_model.rssm.initial(num_envs)
        self._noise.manual_seed(self._seed)

    @torch.no_grad()
    def act(self, obs: dict[str, Array], is_first: Array, prev_action: Array) -> Array:
        """Return the actions [N, A] for observations [N, size] per sensor."""
        model = self._world_model
        self._state = model.filter_step(
            {name: self._tensor(obs[name]) for name in model.config.inputs},
            self._tensor(prev_action),
            self._state,
            noise=model.rssm.draw_noise(len(is_first), generator=self._noise),
            is_first=torch.from_numpy(np.asarray(is_first, bool)).to(self._device),
        )
        action = self._policy.act(self._state.feature)
        if self._action_noise:
            noise = torch.randn(action.shape, generator=self._noise, device=self._device)
            action = (action + self._action_noise * noise).clamp(-1, 1)
        return action.cpu().numpy()

    def _tensor(self, array: Array) -> Tensor:
        return torch.from_numpy(np.asarray(array, np.float32)).to(self._device)


def load_agent(checkpoint: Checkpoint, seed: int, device: torch.device) -> WorldModelAgent:
    """Rebuild the agent of a run that has a world model and a policy.

    Raises:
        ValueError: the checkpoint is of another model variant.
    """
    config = WorldModelConfig.from_dict(checkpoint.config["world_model"])
    world_model = WorldModel(config)
    policy = TanhGaussianPolicy(config.feature_size, config.action_size)
    restore(checkpoint, {"world_model": world_model, "policy": policy})
    return WorldModelAgent(world_model.to(device), policy.to(device), seed)
