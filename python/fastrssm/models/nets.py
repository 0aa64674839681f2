"""Multi-layer perceptrons, image encoders and decoders; names of parameters as in AIME's files."""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Generic, Literal, Self, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn import Parameter

from fastrssm import ops
from fastrssm.models.distributions import Bernoulli, Normal
from fastrssm.ops import Layer

Activation = Literal["elu", "swish"]
Norm = Literal["none", "layer", "rms"]
V = TypeVar("V")
IMAGE_SHAPE = (3, 64, 64)
IMAGE_EMBED = 1024
# below so many rows packing the weights of a network costs more than it brings
_FEW_ROWS = 16

_ACTIVATIONS: dict[Activation, Callable[[], nn.Module]] = {"elu": nn.ELU, "swish": nn.SiLU}


class MLP(nn.Module):
    """`depth` hidden layers of `width` (linear, norm, activation), then a linear head if given."""

    def __init__(
        self,
        in_size: int,
        out_size: int | None,
        *,
        width: int,
        depth: int,
        norm: Norm = "none",
        activation: Activation = "elu",
    ) -> None:
        """Build the layers; `out_size` None leaves the head out."""
        super().__init__()
        layers: list[nn.Module] = []
        for i in range(depth):
            layers.append(nn.Linear(width if i else in_size, width))
            if norm == "layer":
                layers.append(nn.LayerNorm(width))
            elif norm == "rms":
                layers.append(nn.RMSNorm(width, eps=1e-4))
            layers.append(_ACTIVATIONS[activation]())
        if out_size is not None:
            layers.append(nn.Linear(width if depth else in_size, out_size))
        self.net = nn.Sequential(*layers)
        self.headless = out_size is None
        # networks of one kind run together; None: the op has no such network
        fused = (norm == "none") == (activation == "elu") or depth == 0
        self.kind = (width, depth, norm, self.headless) if fused else None

    def forward(self, x: Tensor) -> Tensor:
        """[..., in] -> [..., out], or [..., width] without a head."""
        return together(x, (self,))[0]

    def layers(self) -> tuple[Layer, ...]:
        """Return the parameters in the form of the ops."""
        found: list[Layer] = []
        for module in self.net:
            if isinstance(module, nn.Linear):
                found.append(Layer(module.weight, module.bias))
            elif isinstance(module, nn.LayerNorm):
                found[-1] = found[-1]._replace(scale=module.weight, shift=module.bias)
            elif isinstance(module, nn.RMSNorm):
                found[-1] = found[-1]._replace(scale=module.weight)
        return tuple(found)


def together(x: Tensor, nets: Sequence[MLP]) -> tuple[Tensor, ...]:
    """[..., in] -> [..., out] of each of some networks of one kind, in one pass over the input."""
    if nets[0].kind is None or _is_for_torch(x):
        return tuple(net.net(x) for net in nets)
    return ops.mlp(x, [net.layers() for net in nets], activate_last=nets[0].headless)


def paired_layers(mean: MLP, std: MLP) -> tuple[Layer, ...]:
    """Merge two networks of one shape: first layers side by side, later ones stacked."""
    merged: list[Layer] = []
    for i, (m, s) in enumerate(zip(mean.layers(), std.layers(), strict=True)):
        assert m.bias is not None
        assert s.bias is not None
        join = torch.stack if i else torch.cat
        merged.append(Layer(join((m.weight, s.weight)), join((m.bias, s.bias))))
    return tuple(merged)


def split_input(layers: tuple[Layer, ...], size: int) -> tuple[tuple[Layer, ...], Layer]:
    """Split the first layer: on the first `size` inputs (no bias), and on the rest (with bias).

    The first part stays in the loop of a scan; the second is projected before it.
    """
    first = layers[0]
    inner = first._replace(weight=first.weight[:, :size].contiguous(), bias=None)
    return (inner, *layers[1:]), Layer(first.weight[:, size:], first.bias)


def project(x: Tensor, layer: Layer) -> Tensor:
    """Apply the part of a layer that `split_input` takes out of the loop."""
    if _is_for_torch(x):
        return F.linear(x, layer.weight, layer.bias)
    return ops.mlp(x, ((layer,),))[0]


def _is_for_torch(x: Tensor) -> bool:
    """Whether its own products are as fast as ours."""
    return x.device.type != "cpu" or math.prod(x.shape[:-1]) < _FEW_ROWS


class Merged(Generic[V]):
    """What is made of the parameters of some modules, made once while no gradient is wanted.

    It is made again when a parameter has changed, and at every call that wants a gradient: a
    training step may change parameters through `.data`, which shows in no version.
    """

    def __init__(self) -> None:
        """Hold nothing yet."""
        # identities, addresses and versions; what keeps the first two from being used again; result
        self._kept: tuple[list[tuple[int, int, int]], object, V] | None = None

    def get(self, modules: Sequence[nn.Module], make: Callable[[], V]) -> V:
        """Return make(), or what it returned before."""
        parameters = _parameters(modules)
        learning = torch.is_grad_enabled() and any(p.requires_grad for p in parameters)
        if learning or torch.compiler.is_compiling() or not _are_plain(parameters):
            self._kept = None
            return make()
        state = [(id(p), p.data_ptr(), p._version) for p in parameters]
        if self._kept is None or self._kept[0] != state:
            owners = parameters, [p.untyped_storage() for p in parameters]
            # a tensor of inference mode would have no version
            with torch.inference_mode(False), torch.no_grad():
                self._kept = state, owners, make()
        return self._kept[2]

    def __reduce__(self) -> tuple[type[Self], tuple[()]]:
        """Copy and store nothing of it with the module."""
        return type(self), ()


def _parameters(modules: Sequence[nn.Module]) -> list[Parameter]:
    # a third of the cost of nn.Module.parameters
    found: list[Parameter] = []
    for module in modules:
        found += [p for p in module._parameters.values() if p is not None]
        if module._modules:
            found += _parameters([m for m in module._modules.values() if m is not None])
    return found


def _are_plain(parameters: Sequence[Parameter]) -> bool:
    return not torch._C._are_functorch_transforms_active() and all(
        type(p) is Parameter and not p.is_inference() for p in parameters
    )


class UnitGaussianDecoder(nn.Module):
    """N(MLP(feature), 1)."""

    def __init__(self, net: MLP) -> None:
        """Take the network of the mean."""
        super().__init__()
        self.net = net

    @property
    def nets(self) -> tuple[MLP, ...]:
        """The network of the mean."""
        return (self.net,)

    def output(self, *results: Tensor) -> Normal:
        """[..., out] -> distribution over it."""
        return Normal(results[0])

    def forward(self, feature: Tensor) -> Normal:
        """[..., F] -> distribution over [..., out]."""
        return self.output(*together(feature, self.nets))


class GaussianDecoder(nn.Module):
    """N(MLP(feature), softplus(MLP(feature)) + min_std)."""

    def __init__(self, mu_net: MLP, std_net: MLP, min_std: float = 1e-6) -> None:
        """Take one network for the mean and one for the standard deviation."""
        super().__init__()
        self.mu_net = mu_net
        self.std_net = std_net
        self.min_std = min_std

    @property
    def nets(self) -> tuple[MLP, ...]:
        """The network of the mean and that of the standard deviation."""
        return (self.mu_net, self.std_net)

    def output(self, *results: Tensor) -> Normal:
        """Two of [..., out] -> distribution over it."""
        mean, raw = results
        return Normal(mean, F.softplus(raw) + self.min_std)

    def forward(self, feature: Tensor) -> Normal:
        """[..., F] -> distribution over [..., out]."""
        return self.output(*together(feature, self.nets))


class BinaryDecoder(nn.Module):
    """Bernoulli with logits MLP(feature)."""

    def __init__(self, prob_net: MLP) -> None:
        """Take the network of the logits."""
        super().__init__()
        self.prob_net = prob_net

    @property
    def nets(self) -> tuple[MLP, ...]:
        """The network of the logits."""
        return (self.prob_net,)

    def output(self, *results: Tensor) -> Bernoulli:
        """[..., out] -> distribution over it."""
        return Bernoulli(results[0])

    def forward(self, feature: Tensor) -> Bernoulli:
        """[..., F] -> distribution over [..., out]."""
        return self.output(*together(feature, self.nets))


MLPDecoder = UnitGaussianDecoder | GaussianDecoder | BinaryDecoder


def decode(decoders: Mapping[str, nn.Module], feature: Tensor) -> dict[str, Normal | Bernoulli]:
    """[..., F] -> the distribution of each decoder; networks of one kind run together."""
    outputs: dict[str, Normal | Bernoulli] = {}
    kinds: dict[object, dict[str, MLPDecoder]] = {}
    for name, decoder in decoders.items():
        if isinstance(decoder, MLPDecoder):
            kinds.setdefault(decoder.nets[0].kind, {})[name] = decoder
        else:
            outputs[name] = decoder(feature)
    for group in kinds.values():
        results = iter(together(feature, [net for one in group.values() for net in one.nets]))
        for name, decoder in group.items():
            outputs[name] = decoder.output(*(next(results) for _ in decoder.nets))
    return {name: outputs[name] for name in decoders}


class HaEncoder(nn.Module):
    """Four strided convolutions, 3 x 64 x 64 -> 1024 (Ha and Schmidhuber 2018, 1803.10122)."""

    def __init__(self) -> None:
        """Build the layers."""
        super().__init__()
        channels = (3, 32, 64, 128, 256)
        layers: list[nn.Module] = []
        for c_in, c_out in zip(channels[:-1], channels[1:], strict=True):
            layers += [nn.Conv2d(c_in, c_out, kernel_size=4, stride=2), nn.ReLU()]
        # AIME has no activation after the last convolution
        self.net = nn.Sequential(*layers[:-1])

    def forward(self, image: Tensor) -> Tensor:
        """[..., 3, 64, 64] in [0, 1] -> [..., 1024]."""
        return self.net(image.flatten(0, -4)).reshape(*image.shape[:-3], IMAGE_EMBED)


class HaDecoder(nn.Module):
    """Linear layer and four transposed convolutions, feature -> N(3 x 64 x 64 image, 1)."""

    def __init__(self, feature_size: int, *, sigmoid: bool) -> None:
        """Build the layers; `sigmoid` bounds the image, otherwise 0.5 is added (AIME-v2)."""
        super().__init__()
        sizes: Sequence[tuple[int, int, int]] = ((1024, 128, 5), (128, 64, 5), (64, 32, 6))
        layers: list[nn.Module] = [
            nn.Linear(feature_size, 1024),
            nn.Unflatten(-1, (1024, 1, 1)),
        ]
        for c_in, c_out, kernel in sizes:
            layers += [nn.ConvTranspose2d(c_in, c_out, kernel, stride=2), nn.ReLU()]
        self.net = nn.Sequential(*layers, nn.ConvTranspose2d(32, 3, 6, stride=2))
        self.sigmoid = sigmoid

    def forward(self, feature: Tensor) -> Normal:
        """[..., F] -> distribution over [..., 12288], the flattened image."""
        image = self.net(feature.flatten(0, -2)).reshape(*feature.shape[:-1], -1)
        return Normal(torch.sigmoid(image) if self.sigmoid else image + 0.5)
