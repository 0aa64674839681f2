"""The world model of AIME: encoders, RSSM, decoders, probes and inverse dynamics; its evidence."""

from typing import NamedTuple

import torch
from torch import Tensor, nn

from fastrssm import ops
from fastrssm.models.batch import (
    check_batch,
    check_keys,
    first_frames,
    image_values,
    kept_frames,
)
from fastrssm.models.config import IMAGE, TERMINAL
from fastrssm.models.config import WorldModelConfig as WorldModelConfig
from fastrssm.models.config import world_model_config as world_model_config
from fastrssm.models.distributions import Normal
from fastrssm.models.nets import (
    MLP,
    BinaryDecoder,
    GaussianDecoder,
    HaDecoder,
    HaEncoder,
    UnitGaussianDecoder,
    decode,
)
from fastrssm.models.policy import TanhGaussianPolicy
from fastrssm.models.rssm import RSSM, State

Losses = dict[str, Tensor]
Metrics = dict[str, Tensor]


class Filtered(NamedTuple):
    """What a world model makes of a batch: embeddings [T, B, E], and the states behind them."""

    embed: Tensor
    states: ops.Trajectory


class WorldModel(nn.Module):
    """Encoders, RSSM, decoders, probes and inverse dynamics model.

    Batches are dictionaries of time-major tensors in the parameters' dtype: each sensor
    [T, B, size] (the image [T, B, 3, 64, 64], uint8 or in [0, 1]), "pre_action" [T, B, A] the
    action that led to the frame, optionally "is_first" [T, B] or [T, B, 1], with `terminal` also
    "is_terminal" [T, B, 1], and optionally "<sensor>_mask" [T, B, size or 1], a factor on the
    sensor's log likelihood.
    Nothing here synchronises the device.
    """

    def __init__(self, config: WorldModelConfig) -> None:
        """Build the modules with PyTorch's default initialisation."""
        super().__init__()
        if not config.inputs or not config.targets:
            raise ValueError("config names no inputs or no targets, expected at least one of each")
        self.config = config
        sizes = dict(config.sensors)
        F, width, depth = config.feature_size, config.hidden, config.layers

        def mlp(in_size: int, out_size: int | None) -> MLP:
            return MLP(
                in_size, out_size,
                width=width, depth=depth, norm=config.norm, activation=config.activation,
            )  # fmt: skip

        # the order of registration is the order of AIME's files
        self._tabular = tuple(name for name in config.inputs if name != IMAGE)
        self.encoders = nn.ModuleDict()
        if IMAGE in config.inputs:
            self.encoders[IMAGE] = HaEncoder()
        if config.encoder == "mlp" and self._tabular:
            self.encoders["tabular"] = mlp(sum(sizes[name] for name in self._tabular), None)
        self.decoders = nn.ModuleDict()
        for name in config.targets:
            if name == IMAGE:
                self.decoders[name] = HaDecoder(F, sigmoid=config.image_sigmoid)
            elif config.decoder == "gaussian":
                self.decoders[name] = GaussianDecoder(mlp(F, sizes[name]), mlp(F, sizes[name]))
            else:
                self.decoders[name] = UnitGaussianDecoder(mlp(F, sizes[name]))
        if config.terminal:
            self.decoders[TERMINAL] = BinaryDecoder(MLP(F, 1, width=128, depth=2))
        self.probes = nn.ModuleDict(
            {name: UnitGaussianDecoder(mlp(F, sizes[name])) for name in config.probes}
        )
        if config.idm != "none":
            self.idm = TanhGaussianPolicy(F + config.embed_size, config.action_size, width, depth)
        self.rssm = RSSM(config.rssm, config.embed_size, config.action_size)

    def freeze(self) -> None:
        """Turn the gradients of all parameters off, as for phase 2."""
        self.requires_grad_(False)

    @property
    def _dtype(self) -> torch.dtype:
        return next(self.parameters()).dtype

    def encode(self, batch: dict[str, Tensor]) -> Tensor:
        """Return the embedding [..., E] of the inputs, each [..., size]."""
        parts = (
            [self.encoders[IMAGE](image_values(batch[IMAGE], self._dtype))]
            if IMAGE in self.encoders
            else []
        )
        if self._tabular:
            tabular = torch.cat([batch[name] for name in self._tabular], -1)
            mlp = "tabular" in self.encoders
            parts.append(self.encoders["tabular"](tabular) if mlp else tabular)
        return torch.cat(parts, -1) if len(parts) > 1 else parts[0]

    def filter(
        self,
        batch: dict[str, Tensor],
        *,
        noise: Tensor | None = None,
        generator: torch.Generator | None = None,
        state: State | None = None,
    ) -> Filtered:
        """Encode a batch and infer its states, given the true actions; arguments as in `elbo`."""
        T, B = check_batch(self.config, batch, ("pre_action",), dtype=self._dtype)
        embed, action = self.encode(batch), batch["pre_action"]
        first = first_frames(batch.get("is_first"), (T, B))
        states = self.rssm.observe(
            embed, action, noise=noise, generator=generator, is_first=first, state=state
        )
        return Filtered(embed, states)

    def elbo(
        self,
        batch: dict[str, Tensor],
        *,
        noise: Tensor | None = None,
        generator: torch.Generator | None = None,
        state: State | None = None,
        filtered: Filtered | None = None,
    ) -> tuple[Losses, Metrics]:
        """Compute the loss of phase 1, the negative evidence bound given the true actions.

        Args:
            batch: as described at the class.
            noise: [T, B, S] standard normal (categorical: [T, B, G] uniform); None: drawn here.
            generator: where the noise is drawn from if it is not given.
            state: before the first frame; None: zero.
            filtered: what `filter` gave for this batch, if it was needed before; the three
                arguments above are then not used. None: computed here.

        Returns:
            Losses "reconstruction", "kl", "idm", "probe" and their "total" (the KL times kl_scale),
            and detached metrics: `<sensor>_mse`, `<sensor>_rec_term`, `rec_term`, `kl_term`, `elbo`
            and the names of the losses with the suffix `_loss`. Reductions: sum over elements and
            time, mean over the batch.

        Raises:
            ValueError: a key is missing or has the wrong shape.
            TypeError: a tensor has another dtype than the parameters.

        Source:
            AIME (OpenReview WjlCQxpuxU) eq. 2 and 3.
        """
        if filtered is None:
            filtered = self.filter(batch, noise=noise, generator=generator, state=state)
        embed, states = filtered
        T, B = embed.shape[:2]
        feature = torch.cat((states.deter, states.stoch), -1)
        keep = kept_frames(batch[TERMINAL]) if self.config.terminal else None
        losses, metrics = self._evidence(
            batch, feature, states.deter, states.stats, keep,
            kl_balance=self.config.kl_balance, free_nats=self.config.free_nats,
        )  # fmt: skip
        losses["idm"] = feature.new_zeros(())
        if self.config.idm != "none" and T > 1:
            inputs = torch.cat((feature[:-1], embed[1:]), -1)
            predicted = self.idm(inputs.detach() if self.config.idm == "detach" else inputs)
            action = batch["pre_action"][1:]
            nll = _kept(-predicted.log_prob(action), None if keep is None else keep[1:])
            published = self.config.idm_reduction == "sum_batch"
            losses["idm"] = nll.sum() / (T - 1 if published else B)
            metrics["idm_loss"] = losses["idm"].detach()
            metrics["idm_mse"] = _mse(predicted.mode, action)
        losses["total"] = (
            losses["reconstruction"]
            + losses["probe"]
            + self.config.kl_scale * losses["kl"]
            + losses["idm"]
        )
        metrics["total_loss"] = losses["total"].detach()
        return losses, metrics

    def elbo_with_policy(
        self,
        batch: dict[str, Tensor],
        policy: TanhGaussianPolicy,
        *,
        noise: Tensor | None = None,
        action_noise: Tensor | None = None,
        generator: torch.Generator | None = None,
        kl_only: bool = False,
        use_idm: bool = False,
    ) -> tuple[Losses, Metrics]:
        """Compute the loss of phase 2: the same bound with actions inferred by the policy.

        No balancing and no free nats. Freeze the model first: gradients then flow through it to
        the policy only.

        Args:
            batch: as described at the class; "pre_action", if there, is used for a metric only.
            policy: inference model of the missing actions.
            noise: as in `elbo`.
            action_noise: [T, B, A] standard normal; None: drawn here, after `noise`.
            generator: where they are drawn from if not given.
            kl_only: the total contains no reconstruction and no probes.
            use_idm: actions come from the inverse dynamics model, and the policy is trained by its
                KL to that.

        Returns:
            Losses "reconstruction", "kl", "probe", with use_idm "action_kl", and "total"; metrics
            as in `elbo`, and "action_mse" where the batch has actions.

        Raises:
            ValueError: a key is missing or has the wrong shape, the policy does not fit, or use_idm
                is asked of a model without inverse dynamics.
            TypeError: a tensor has another dtype than the parameters.

        Source:
            AIME (OpenReview WjlCQxpuxU) eq. 4.
        """
        T, B = check_batch(self.config, batch, (), dtype=self._dtype)
        if policy.action_size != self.config.action_size:
            raise ValueError(
                f"policy has action_size {policy.action_size}, expected {self.config.action_size}"
            )
        if policy.feature_size != self.config.feature_size:
            raise ValueError(
                f"policy has feature_size {policy.feature_size}, "
                f"expected {self.config.feature_size}"
            )
        if use_idm and self.config.idm == "none":
            raise ValueError("use_idm is True, expected False for a model built with idm='none'")
        embed = self.encode(batch)
        is_first = first_frames(batch.get("is_first"), (T, B))
        states = self.rssm.observe_with_policy(
            embed,
            self.idm if use_idm else policy,
            noise=noise,
            action_noise=action_noise,
            generator=generator,
            is_first=is_first,
            policy_sees_embed=use_idm,
        )
        feature = torch.cat((states.deter, states.stoch), -1)
        keep = kept_frames(batch[TERMINAL]) if self.config.terminal else None
        losses, metrics = self._evidence(
            batch, feature, states.deter, states.stats, keep, kl_balance=None, free_nats=0.0
        )
        losses["total"] = self.config.kl_scale * losses["kl"]
        if not kl_only:
            losses["total"] = losses["total"] + losses["reconstruction"] + losses["probe"]
        if use_idm:
            before = torch.cat((torch.zeros_like(feature[:1]), feature[:-1]))
            if is_first is not None:
                before = torch.where(is_first.unsqueeze(-1), 0.0, before)
            inferred = self.idm(torch.cat((before, embed), -1))
            losses["action_kl"] = _reduce(inferred.kl(policy(before)), keep)
            losses["total"] = losses["total"] + self.config.kl_scale * losses["action_kl"]
            metrics["model_kl_loss"] = metrics["kl_loss"]
            metrics["action_kl_loss"] = losses["action_kl"].detach()
        metrics["total_loss"] = losses["total"].detach()
        if "pre_action" in batch:
            metrics["action_mse"] = _mse(states.action, batch["pre_action"])
        return losses, metrics

    @torch.no_grad()
    def filter_step(
        self,
        obs: dict[str, Tensor],
        prev_action: Tensor,
        state: State,
        *,
        noise: Tensor | None = None,
        is_first: Tensor | None = None,
    ) -> State:
        """Update the state with one observation, without gradient: the step of acting.

        Args:
            obs: inputs, each [B, size].
            prev_action: [B, A] the action that led to them; zero at the start of an episode.
            state: before them.
            noise: [B, S] standard normal (categorical: [B, G] uniform); None: drawn here.
            is_first: [B] the state is zeroed first.

        Returns:
            The state, the latent sampled from the posterior.

        Raises:
            ValueError: a key is missing or has the wrong shape.
            TypeError: a tensor has another dtype than the parameters.
        """
        B = prev_action.shape[0]
        check_keys(self.config, "obs", obs, self.config.inputs, (B,), dtype=self.rssm.dtype)
        first = first_frames(is_first, (B,))
        return self.rssm.step(self.encode(obs), prev_action, state, noise=noise, is_first=first)

    def _evidence(
        self,
        batch: dict[str, Tensor],
        feature: Tensor,
        deter: Tensor,
        post: tuple[Tensor, ...],
        keep: Tensor | None,
        *,
        kl_balance: float | None,
        free_nats: float,
    ) -> tuple[Losses, Metrics]:
        config, metrics = self.config, Metrics()
        weighted = config.nll_weight != "none"
        reconstruction = rec_term = feature.new_zeros(())
        # predicted standard deviations: their sum over elements, or mean, per decoder
        std_sums: list[Tensor | float] = []
        sizes: list[int] = []
        for name, output in decode(dict(self.decoders.items()), feature).items():
            target = batch[name]
            if name == IMAGE:
                target = image_values(target, self._dtype).flatten(-3)
            mask = batch.get(f"{name}_mask")
            constant = config.gaussian_constant
            loss = _reduce(
                output.nll(target, weight_by_std=weighted, mask=mask, constant=constant), keep
            )
            reconstruction = reconstruction + loss
            metrics[f"{name}_mse"] = _mse(output.mode, target)
            true = loss.detach()
            if weighted:
                metrics[f"{name}_reconstruction_loss"] = true
                with torch.no_grad():
                    nll = output.nll(target, weight_by_std=False, mask=mask, constant=constant)
                    true = _reduce(nll, keep)
                sizes.append(target.shape[-1])
                std = output.std if isinstance(output, Normal) else None
                std_sums.append(float(sizes[-1]) if std is None else std.detach().sum(-1))
            metrics[f"{name}_rec_term"] = -true
            rec_term = rec_term - true
        prior = self.rssm.prior(deter)
        if config.rssm.latent == "gaussian":
            kl = ops.gaussian_kl(*post, *prior, kl_balance=kl_balance, free_nats=free_nats)
        else:
            kl = ops.categorical_kl(
                *post, *prior,
                unimix=config.rssm.unimix, kl_balance=kl_balance, free_nats=free_nats,
            )  # fmt: skip
        kl_term = -_reduce(kl.detach(), keep)
        if config.nll_weight == "dim_wise":
            kl = kl * (sum(std_sums) / sum(sizes))
        elif config.nll_weight == "modality_wise":
            kl = kl * (sum(s / n for s, n in zip(std_sums, sizes, strict=True)) / len(sizes))
        losses = {"reconstruction": reconstruction, "kl": _reduce(kl, keep)}
        losses["probe"] = self._probe_loss(batch, feature, keep, metrics)
        metrics["rec_term"], metrics["kl_term"] = rec_term, kl_term
        metrics["elbo"] = rec_term + kl_term
        metrics["reconstruction_loss"] = reconstruction.detach()
        metrics["kl_loss"] = losses["kl"].detach()
        return losses, metrics

    def _probe_loss(
        self, batch: dict[str, Tensor], feature: Tensor, keep: Tensor | None, metrics: Metrics
    ) -> Tensor:
        total = feature.new_zeros(())
        if feature.shape[0] == 1 or not self.probes:
            return total
        inputs = feature[1:].detach()
        keep = None if keep is None else keep[1:]
        for name, output in decode(dict(self.probes.items()), inputs).items():
            target = batch[name][1:]
            nll = output.nll(
                target, weight_by_std=False, mask=None, constant=self.config.gaussian_constant
            )
            loss = _reduce(nll, keep)
            metrics[f"{name}_probe_mse"] = _mse(output.mode, target)
            metrics[f"{name}_probe_reconstruction_loss"] = loss.detach()
            total = total + loss
        metrics["probe_loss"] = total.detach()
        return total


def _kept(values: Tensor, keep: Tensor | None) -> Tensor:
    return values if keep is None else values * keep


def _reduce(values: Tensor, keep: Tensor | None) -> Tensor:
    """Sum [T, B] over time, average over the batch."""
    return _kept(values, keep).sum(0).mean()


def _mse(predicted: Tensor, target: Tensor) -> Tensor:
    return (predicted.detach() - target).square().mean()
