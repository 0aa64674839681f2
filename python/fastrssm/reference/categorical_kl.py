"""KL divergence of grouped categorical distributions."""

import torch
from torch import Tensor


def categorical_kl(
    post_logits: Tensor,
    prior_logits: Tensor,
    *,
    unimix: float = 0.0,
    kl_balance: float | None = None,
    free_nats: float = 0.0,
) -> Tensor:
    """Sum the KL divergence between two sets of categoricals over all of their variables.

    Args:
        post_logits: [..., G, K] unnormalised log probabilities of q.
        prior_logits: [..., G, K] the same of p.
        unimix: share of the uniform distribution in both.
        kl_balance: weight in [0, 1] of the term that trains only the prior. None: plain KL.
        free_nats: elements of the result below this many nats get no gradient; their value stays.

    Returns:
        [...] KL(q || p) in nats; the value is the true one whatever the options.

    Source:
        Eq. 2 and Alg. 2 of DreamerV2 (2010.02193); unimix: DreamerV3 (2301.04104).
    """
    if kl_balance is None:
        kl = _kl(post_logits, prior_logits, unimix)
    else:
        to_prior = _kl(post_logits.detach(), prior_logits, unimix)
        to_post = _kl(post_logits, prior_logits.detach(), unimix)
        kl = kl_balance * to_prior + (1.0 - kl_balance) * to_post
    return torch.where(kl < free_nats, kl.detach(), kl) if free_nats > 0.0 else kl


def _kl(post_logits: Tensor, prior_logits: Tensor, unimix: float) -> Tensor:
    log_q, log_p = _log_probs(post_logits, unimix), _log_probs(prior_logits, unimix)
    return (log_q.exp() * (log_q - log_p)).sum((-2, -1))


def _log_probs(logits: Tensor, unimix: float) -> Tensor:
    if unimix == 0.0:
        # stays finite where a probability underflows to zero
        return torch.log_softmax(logits, -1)
    return torch.log((1.0 - unimix) * torch.softmax(logits, -1) + unimix / logits.shape[-1])
