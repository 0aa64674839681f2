"""An ensemble of predictors of the next embedding, and its disagreement."""

from typing import Any

import torch
from torch import Tensor, nn

from fastrssm import ops
from fastrssm.ops import Layer


class _Layers(nn.Module):
    """The parameters of a linear layer of each member."""

    def __init__(self, members: int, in_size: int, out_size: int) -> None:
        super().__init__()
        bound = in_size**-0.5  # as torch.nn.Linear
        self.weight = nn.Parameter(torch.empty(members, out_size, in_size).uniform_(-bound, bound))
        self.bias = nn.Parameter(torch.empty(members, out_size).uniform_(-bound, bound))

    def members(self) -> list[Layer]:
        """Return the layers of the members."""
        return [Layer(*parts) for parts in zip(self.weight, self.bias, strict=True)]


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
        # ELU stands between them for the numbering: the op applies it
        self.net = nn.Sequential(
            _Layers(members, in_size, width),
            nn.ELU(),
            _Layers(members, width, width),
            nn.ELU(),
            _Layers(members, width, out_size),
        )

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        """[N, F + A] -> [N, E] of each member."""
        layers = [layer.members() for layer in self.net if isinstance(layer, _Layers)]
        return ops.mlp(x, list(zip(*layers, strict=True)))

    def loss(self, feature: Tensor, action: Tensor, embed: Tensor) -> Tensor:
        """Return the mean squared error, summed over the members; nothing but them gets a gradient.

        Args:
            feature: [T, B, F] states.
            action: [T, B, A] action that led to each frame.
            embed: [T, B, E] the frames' embeddings; the first is not predicted.
        """
        inputs = torch.cat((feature[:-1], action[1:]), -1).flatten(0, 1).detach()
        target = embed[1:].flatten(0, 1).detach()
        errors = [nn.functional.mse_loss(predicted, target) for predicted in self(inputs)]
        return torch.stack(errors).sum()

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
        return _MeanLogVariance.apply(*predicted).unflatten(0, x.shape[:2])


class _MeanLogVariance(torch.autograd.Function):
    """Mean over E of the logarithm of the unbiased variance over K predictions, K x [N, E] -> [N].

    Formed by hand, because three passes over predictions of all members take most of the time: the
    gradient of ln Var to prediction k is 2 (x_k - mean) / ((K - 1) Var).
    """

    @staticmethod
    def forward(ctx: Any, *predicted: Tensor) -> Tensor:
        mean = predicted[0] + predicted[1]
        for x in predicted[2:]:
            mean.add_(x)
        mean.div_(len(predicted))
        apart = [x - mean for x in predicted]
        variance = apart[0].square()
        for x in apart[1:]:
            variance.addcmul_(x, x)
        # members that agree exactly would give minus infinity; they have no gradient
        variance.div_(len(apart) - 1).clamp_min_(torch.finfo(mean.dtype).tiny)
        ctx.save_for_backward(variance, *apart)
        return variance.log().mean(-1)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx: Any, *grad_outputs: Tensor
    ) -> tuple[Tensor, ...]:
        variance, *apart = ctx.saved_tensors
        scale = 2 / ((len(apart) - 1) * variance.shape[-1])
        weight = (scale * grad_outputs[0]).unsqueeze(-1) / variance
        weight.masked_fill_(variance == torch.finfo(variance.dtype).tiny, 0.0)
        return tuple(x * weight for x in apart)
