"""Tanh-Gaussian policies: AIME's policy, and its inverse dynamics model."""

import torch.nn.functional as F
from torch import Tensor, nn

from fastrssm.models.distributions import TanhNormal
from fastrssm.models.kept import Kept
from fastrssm.models.nets import MLP, Merged, paired_layers, together
from fastrssm.ops import PolicyWeights
from fastrssm.ops.acting import Net, prepare_net


class TanhGaussianPolicy(nn.Module):
    """pi(a | feature): two networks, a = tanh(mean + std * noise), std = softplus + 1e-6."""

    min_std = 1e-6

    def __init__(
        self, feature_size: int, action_size: int, hidden: int = 128, layers: int = 2
    ) -> None:
        """Build the networks.

        Args:
            feature_size: inputs, F for a policy, F + E for an inverse dynamics model.
            action_size: A.
            hidden: width of the hidden layers (ELU).
            layers: number of hidden layers.

        Raises:
            ValueError: a size is below 1.
        """
        super().__init__()
        for name, size in (
            ("feature_size", feature_size),
            ("action_size", action_size),
            ("hidden", hidden),
            ("layers", layers),
        ):
            if size < 1:
                raise ValueError(f"{name} is {size}, expected at least 1")
        self.feature_size = feature_size
        self.action_size = action_size
        self.mean_net = MLP(feature_size, action_size, width=hidden, depth=layers)
        self.std_net = MLP(feature_size, action_size, width=hidden, depth=layers)
        self._merged: Merged[PolicyWeights] = Merged()
        self._mode: Kept[Net] = Kept()

    def forward(self, feature: Tensor) -> TanhNormal:
        """Return the distribution of actions [..., A] in (-1, 1) for features [..., F]."""
        self._mode.forget_while_learning()
        mean, raw = together(feature, (self.mean_net, self.std_net))
        return TanhNormal(mean, F.softplus(raw) + self.min_std)

    def act(self, feature: Tensor) -> Tensor:
        """Return the mode action [..., A], tanh of the mean, as AIME is evaluated."""
        net = self._mode.get(self, self._mode_parts, self._prepare_mode)
        mean = None if net is None else net(feature)
        return self.mean_net(feature).tanh() if mean is None else mean.tanh_()

    def weights(self) -> PolicyWeights:
        """Return the parameters in the form of the ops."""
        self._mode.forget_while_learning()

        def make() -> PolicyWeights:
            return PolicyWeights(paired_layers(self.mean_net, self.std_net))

        return self._merged.get((self.mean_net, self.std_net), make)

    def _mode_parts(self) -> list[nn.Module]:
        return [self.mean_net]

    def _prepare_mode(self) -> Net | None:
        return prepare_net(self.mean_net.layers())
