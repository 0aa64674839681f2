"""Weights and outputs of the four RSSM scans; the order of the fields is the order of the ops."""

from typing import Literal, NamedTuple

from torch import Tensor

Heads = Literal["split", "joint"]
Latent = Literal["gaussian", "categorical"]


class Layer(NamedTuple):
    """An affine layer; LayerNorm follows where it has scale and shift, RMS norm where only scale.

    From the second layer of split heads on, weights are [2, out, in] and biases [2, out]:
    mean network first, std network second. The first one is [2 * out, in], one product for both.
    Block-diagonal layers have weights [blocks, out, in], the other parts are [blocks, out].
    """

    weight: Tensor  # [out, in]
    bias: Tensor | None  # [out]; None where a projection made outside the loop contains it
    scale: Tensor | None = None  # [out]
    shift: Tensor | None = None  # [out]


class RSSMWeights(NamedTuple):
    """Everything a scan multiplies with, in the order in which a step uses it."""

    pre: Layer | None  # [stoch | action] -> M, norm, SiLU; None: the cell reads [stoch | action]
    # torch_gru: [3D, in]; ln_gru_*: [3D, in + D] with the norm of the gates;
    # block_gru: [blocks, 3D / blocks, D / blocks]
    cell_input: Layer
    cell_state: Layer | None  # torch_gru: [3D, D]; else None
    head: tuple[Layer, ...]  # the latent's: posterior (first layer: deter half) or prior
    # block_gru: layers of deter, stoch and action -> M, norm, SiLU each, and then of all of them:
    # [blocks, D / blocks, D / blocks + 3M] on [the block's deter | deter | stoch | action], norm
    # over all blocks, SiLU; else empty
    branches: tuple[Layer, ...] = ()


class PolicyWeights(NamedTuple):
    """Split mean and std networks of a tanh-Gaussian policy; the input is [deter | stoch]."""

    layers: tuple[Layer, ...]


class Trajectory(NamedTuple):
    """States along a sequence."""

    deter: Tensor  # [T, B, D]
    stoch: Tensor  # [T, B, S]
    stats: tuple[Tensor, ...]  # gaussian: mean, std [T, B, S]; categorical: logits [T, B, G, K]


class PolicyTrajectory(NamedTuple):
    """States along a sequence, and the actions that led to them."""

    deter: Tensor
    stoch: Tensor
    stats: tuple[Tensor, ...]
    action: Tensor  # [T, B, A]
