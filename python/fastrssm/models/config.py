"""Configurations of the models, and the published ones as constants."""

import math
from dataclasses import dataclass, fields, replace
from typing import Any, Literal, Self

from fastrssm.models.nets import IMAGE_EMBED, IMAGE_SHAPE, Activation, Norm
from fastrssm.ops import Cell, Heads, Latent

Preset = Literal["rssm", "rssmo", "rssmo_v2", "rssmo_discrete"]
Setup = Literal["mdp", "lpomdp", "visual"]
NLLWeight = Literal["none", "modality_wise", "dim_wise"]
IDMMode = Literal["detach", "end2end", "none"]
IDMReduction = Literal["sum_batch", "mean"]

IMAGE = "image"
TERMINAL = "is_terminal"


@dataclass(frozen=True)
class RSSMConfig:
    """Sizes of an RSSM and the choices that tell the published variants apart."""

    deter: int = 512
    """units D of the recurrent state"""
    stoch: int = 128
    """size S of the latent; groups * classes if it is categorical"""
    groups: int = 1
    """categorical variables G of the latent; 1 if it is gaussian"""
    hidden: int = 128
    """width of prior, posterior and input layer"""
    layers: int = 2
    """hidden layers of prior and posterior"""
    posterior_layers: int | None = None
    """those of the posterior, if they differ"""
    input_layer: bool = False
    """a layer between [stoch, action] and the cell"""
    cell: Cell = "torch_gru"
    """recurrent cell; block_gru: RMS norms here and in prior and posterior, instead of LayerNorm"""
    blocks: int = 1
    """diagonal blocks of block_gru"""
    latent: Latent = "gaussian"
    """family of the latent"""
    heads: Heads = "split"
    """split: mean and std networks, ELU, softplus; joint: one network, LayerNorm, SiLU, sigmoid"""
    min_std: float = 1e-6
    """added to the standard deviation of prior and posterior"""
    unimix: float = 0.0
    """share of the uniform distribution in a categorical latent"""

    def __post_init__(self) -> None:
        """Refuse what no module can be built from."""
        for name in ("deter", "stoch", "groups", "hidden", "layers", "blocks"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}, expected at least 1")
        if self.posterior_layers is not None and self.posterior_layers < 1:
            raise ValueError(
                f"posterior_layers is {self.posterior_layers}, expected at least 1 or None"
            )
        if self.cell not in ("torch_gru", "ln_gru_a", "block_gru"):
            raise ValueError(
                f"cell is {self.cell!r}, expected 'torch_gru', 'ln_gru_a' or 'block_gru'"
            )
        if self.cell == "block_gru" and (self.input_layer or self.heads == "split"):
            raise ValueError("cell is 'block_gru', expected heads='joint' and input_layer=False")
        if self.deter % self.blocks or (self.blocks > 1 and self.cell != "block_gru"):
            raise ValueError(
                f"blocks is {self.blocks}, expected a divisor of deter, and 1 but for block_gru"
            )
        if self.latent not in ("gaussian", "categorical"):
            raise ValueError(f"latent is {self.latent!r}, expected 'gaussian' or 'categorical'")
        if self.heads not in ("split", "joint"):
            raise ValueError(f"heads is {self.heads!r}, expected 'split' or 'joint'")
        if self.latent == "categorical" and self.heads == "split":
            raise ValueError("heads is 'split', expected 'joint' for a categorical latent")
        if self.stoch % self.groups:
            raise ValueError(f"stoch is {self.stoch}, expected a multiple of groups {self.groups}")
        if self.min_std < 0.0:
            raise ValueError(f"min_std is {self.min_std}, expected at least 0")
        if not 0.0 <= self.unimix < 1.0:
            raise ValueError(f"unimix is {self.unimix}, expected a value in [0, 1)")

    @property
    def feature_size(self) -> int:
        """F = D + S."""
        return self.deter + self.stoch

    @property
    def noise_size(self) -> int:
        """Random numbers per step and sequence: S normals, or G uniforms."""
        return self.stoch if self.latent == "gaussian" else self.groups


AIME_RSSM = RSSMConfig()
AIME_RSSMO = RSSMConfig(
    stoch=30, hidden=512, layers=1, input_layer=True, heads="joint", min_std=0.1
)
AIME_V2_RSSMO = replace(AIME_RSSMO, cell="ln_gru_a")
AIME_V2_DISCRETE = replace(AIME_V2_RSSMO, stoch=1024, groups=32, latent="categorical")


def dreamer_v3(deter: int, hidden: int, classes: int) -> RSSMConfig:
    """Return a size of DreamerV3: 1M is (512, 64, 4), 12M (2048, 256, 16), 25M (3072, 384, 24).

    Source:
        Hafner et al. 2023 (2301.04104): 8 blocks, 32 categorical variables, unimix 0.01.
    """
    return RSSMConfig(
        deter=deter, stoch=32 * classes, groups=32, hidden=hidden, layers=2, posterior_layers=1,
        cell="block_gru", blocks=8, latent="categorical", heads="joint", unimix=0.01,
    )  # fmt: skip


DREAMER_V3_1M = dreamer_v3(512, 64, 4)


@dataclass(frozen=True)
class WorldModelConfig:
    """Everything a world model is built from; `dataclasses.asdict` of it is valid JSON."""

    rssm: RSSMConfig = AIME_RSSM
    """transition model"""
    sensors: tuple[tuple[str, int], ...] = ()
    """name and size of each sensor; the one called image is 3 x 64 x 64"""
    action_size: int = 1
    """A"""
    inputs: tuple[str, ...] = ()
    """sensors that are encoded"""
    targets: tuple[str, ...] = ()
    """sensors that are decoded from the feature"""
    probes: tuple[str, ...] = ()
    """sensors read out from the detached feature, for diagnosis only"""
    encoder: Literal["identity", "mlp"] = "identity"
    """of tabular inputs; mlp: one network for all of them"""
    decoder: Literal["gaussian", "unit"] = "gaussian"
    """of tabular targets; unit: standard deviation 1 instead of a learned one"""
    hidden: int = 128
    """width of encoder, decoders, probes and inverse dynamics"""
    layers: int = 2
    """their hidden layers"""
    norm: Norm = "none"
    """of encoder, decoders and probes"""
    activation: Activation = "elu"
    """of encoder, decoders and probes"""
    image_sigmoid: bool = True
    """bound decoded images by a sigmoid; False: add 0.5"""
    terminal: bool = False
    """decode is_terminal, and ignore frames padded after the first terminal one"""
    gaussian_constant: bool = True
    """keep ln(2 pi) / 2 per element in the decoders' likelihoods"""
    nll_weight: NLLWeight = "dim_wise"
    """weighting of likelihood and KL by the detached predicted standard deviations"""
    kl_scale: float = 1.0
    """factor on the KL term"""
    kl_balance: float | None = None
    """share of the KL's gradient that trains the prior; None: plain KL"""
    free_nats: float = 0.0
    """no gradient where the KL of a step is below this"""
    idm: IDMMode = "detach"
    """inverse dynamics model: on detached inputs, end to end, or none"""
    idm_reduction: IDMReduction = "sum_batch"
    """sum_batch: mean over time, sum over the batch, as published; mean: sum over time, mean over
    the batch"""

    def __post_init__(self) -> None:
        """Refuse what no module can be built from."""
        sizes = dict(self.sensors)
        for field, names in (
            ("inputs", self.inputs), ("targets", self.targets), ("probes", self.probes)
        ):  # fmt: skip
            for name in names:
                if name not in sizes:
                    raise ValueError(f"{field} names {name!r}, expected one of {sorted(sizes)}")
        if IMAGE in self.probes:
            raise ValueError("probes names 'image', expected tabular sensors")
        for name, size in self.sensors:
            if size < 1:
                raise ValueError(f"sensors gives {name!r} size {size}, expected at least 1")
        for field, value, known in (
            ("encoder", self.encoder, ("identity", "mlp")),
            ("decoder", self.decoder, ("gaussian", "unit")),
            ("norm", self.norm, ("none", "layer", "rms")),
            ("activation", self.activation, ("elu", "swish")),
            ("nll_weight", self.nll_weight, ("none", "modality_wise", "dim_wise")),
            ("idm", self.idm, ("detach", "end2end", "none")),
            ("idm_reduction", self.idm_reduction, ("sum_batch", "mean")),
        ):
            if value not in known:
                raise ValueError(f"{field} is {value!r}, expected one of {list(known)}")
        for field in ("action_size", "hidden", "layers"):
            if getattr(self, field) < 1:
                raise ValueError(f"{field} is {getattr(self, field)}, expected at least 1")
        if self.kl_balance is not None and not 0.0 <= self.kl_balance <= 1.0:
            raise ValueError(f"kl_balance is {self.kl_balance}, expected a value in [0, 1] or None")
        if not (math.isfinite(self.free_nats) and self.free_nats >= 0.0):
            raise ValueError(
                f"free_nats is {self.free_nats}, expected a finite value of at least 0"
            )

    @property
    def feature_size(self) -> int:
        """F = D + S, the input of policies."""
        return self.rssm.feature_size

    @property
    def embed_size(self) -> int:
        """E, the size of an encoded observation."""
        sizes = dict(self.sensors)
        tabular = sum(sizes[name] for name in self.inputs if name != IMAGE)
        if self.encoder == "mlp" and tabular:
            tabular = self.hidden
        return tabular + (IMAGE_EMBED if IMAGE in self.inputs else 0)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> Self:
        """Rebuild a configuration from `dataclasses.asdict`, also after a round trip through JSON.

        Raises:
            ValueError: a field is unknown; the message names it.
        """
        rssm = dict(values.get("rssm", {}))
        for given, kind in ((values, cls), (rssm, RSSMConfig)):
            unknown = sorted(set(given) - {field.name for field in fields(kind)})
            if unknown:
                raise ValueError(f"{kind.__name__} has no field {unknown[0]!r}")
        rest: dict[str, Any] = {
            k: tuple(v) if isinstance(v, list) else v for k, v in values.items() if k != "rssm"
        }
        rest["sensors"] = tuple((name, size) for name, size in values.get("sensors", ()))
        return cls(rssm=RSSMConfig(**rssm), **rest)


def world_model_config(
    preset: Preset,
    sensors: tuple[tuple[str, int, str], ...],
    setup: Setup,
    action_size: int,
) -> WorldModelConfig:
    """Build the published configuration of a world model for one embodiment.

    Args:
        preset: "rssm" (walker of AIME), "rssmo" (cheetah of AIME), "rssmo_v2" (AIME-v2) or
            "rssmo_discrete" (its categorical variant).
        sensors: name, size and order ("first": position-like, "second": velocity-like) of each
            tabular sensor.
        setup: "mdp": all tabular sensors in and out; "lpomdp": those of first order in and out,
            probes for the rest; "visual": the image in and out, probes for all tabular ones.
        action_size: A.

    Returns:
        The configuration.

    Raises:
        ValueError: an unknown preset or setup, or an order other than first and second.

    Source:
        AIME (OpenReview WjlCQxpuxU) and AIME-v2 (2404.18896). Version 2 has no probes by default.
    """
    for name, _, order in sensors:
        if order not in ("first", "second"):
            raise ValueError(
                f"sensors gives {name!r} order {order!r}, expected 'first' or 'second'"
            )
    names = tuple(name for name, _, _ in sensors)
    first = tuple(name for name, _, order in sensors if order == "first")
    match setup:
        case "mdp":
            seen, probes = names, ()
        case "lpomdp":
            seen, probes = first, tuple(name for name in names if name not in first)
        case "visual":
            seen, probes = (IMAGE,), names
        case _:
            raise ValueError(f"setup is {setup!r}, expected 'mdp', 'lpomdp' or 'visual'")
    sizes = tuple((name, size) for name, size, _ in sensors)
    if setup == "visual":
        sizes = (*sizes, (IMAGE, math.prod(IMAGE_SHAPE)))
    common: dict[str, Any] = {
        "sensors": sizes, "action_size": action_size, "inputs": seen, "targets": seen,
    }  # fmt: skip
    if preset == "rssm":
        return WorldModelConfig(rssm=AIME_RSSM, probes=probes, **common)
    common |= {
        "encoder": "mlp", "decoder": "unit", "hidden": 512, "norm": "layer", "activation": "swish",
        "nll_weight": "none", "kl_balance": 0.8, "free_nats": 1.0,
    }  # fmt: skip
    if preset == "rssmo":
        return WorldModelConfig(rssm=AIME_RSSMO, probes=probes, **common)
    common |= {"terminal": True, "gaussian_constant": False, "image_sigmoid": False}
    if preset == "rssmo_v2":
        return WorldModelConfig(rssm=AIME_V2_RSSMO, **common)
    if preset == "rssmo_discrete":
        return WorldModelConfig(rssm=AIME_V2_DISCRETE, **common)
    raise ValueError(
        f"preset is {preset!r}, expected 'rssm', 'rssmo', 'rssmo_v2' or 'rssmo_discrete'"
    )
