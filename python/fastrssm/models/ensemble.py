"""An ensemble of predictors of the next embedding, and its disagreement."""

import torch
from torch import Tensor, nn


class _Layers(nn.Module):
    """A linear layer of each member: [K, N, in] or [N, in] -> [K, N, out]."""

    def __init__(self, members: int, in_size: int, out_size: int) -> None:
        super().__init__()
        bound = in_size**-0.5  # as torch.nn.Linear
        self.weight = nn.Parameter(torch.empty(members, out_size, in_size).uniform_(-bound, bound))
        self.bias = nn.Parameter(torch.empty(members, out_size).uniform_(-bound, bound))

    def forward(self, x: Tensor) -> Tensor:
        x = x.expand(self.weight.shape[0], *x.shape[-2:])
        return torch.baddbmm(self.bias.unsqueeze(1), x, self.weight.transpose(1, 2))


class Ensemble(nn.Module):
    """K networks [feature, action] -> embedding of the next frame, evaluated side by side.

    Two hidden layers with ELU; names and shapes of parameters are those of AIME-v2's files.

    Source:
        Plan2Explore (2005.05960), section 3.
    """

    def __init__(self, in_size: int, out_size: int, *, members: int = 5, width: int = 1024) -> None:
        """Build the networks for inputs F + A and embeddings E.

        Raises:
            ValueError: fewer than two members, which cannot disagree, or a size below 1.
        """
        super().__init__()
        if members < 2:
            raise ValueError(f"members is {members}, expected at least 2")
        if width < 1:
            raise ValueError(f"width is {width}, expected at least 1")
        self.net = nn.Sequential(
            _Layers(members, in_size, width),
            nn.ELU(),
            _Layers(members, width, width),
            nn.ELU(),
            _Layers(members, width, out_size),
        )

    def forward(self, x: Tensor) -> Tensor:
        """[N, F + A] -> [K, N, E]."""
        return self.net(x)

    def loss(self, feature: Tensor, action: Tensor, embed: Tensor) -> Tensor:
        """Return the mean squared error, summed over the members; nothing but them gets a gradient.

        Args:
            feature: [T, B, F] states.
            action: [T, B, A] action that led to each frame.
            embed: [T, B, E] the frames' embeddings; the first is not predicted.
        """
        inputs = torch.cat((feature[:-1], action[1:]), -1).flatten(0, 1).detach()
        error = self(inputs) - embed[1:].flatten(0, 1).detach()
        return error.square().mean((1, 2)).sum()

    def disagreement(self, feature: Tensor, action: Tensor) -> Tensor:
        """Return the intrinsic reward, the mean over the embedding of ln Var over the members.

        Args:
            feature: [H, N, F] states that are left.
            action: [H, N, A] by these actions.

        Returns:
            [H, N], with gradient to both.
        """
        x = torch.cat((feature, action), -1)
        predicted = self(x.flatten(0, 1))
        # torch.var over so few members takes five times as long
        apart = predicted - predicted.mean(0)
        variance = apart.square().sum(0) / (len(predicted) - 1)
        # members that agree exactly would give minus infinity
        tiny = torch.finfo(variance.dtype).tiny
        return variance.clamp_min(tiny).log().mean(-1).unflatten(0, x.shape[:2])
