"""torchrl's own RSSM of the sizes of a problem: its rollout, in a loop and with a compiled step.

Of block_gru it has the same networks; others of its networks have no norms. Its sequences are
[B, T], weights and noise its own, and it evaluates the prior in every step.
"""

import torch
from tensordict import TensorDict
from tensordict.nn import TensorDictModule
from torchrl.data import Unbounded
from torchrl.modules.models import model_based

from bench.ops.rssm_peers import divergence

_STATE, _BELIEF = ("next", "state"), ("next", "belief")
_PRIOR = {
    "gaussian": [("next", "prior_mean"), ("next", "prior_std")],
    "categorical": [("next", "prior_logits")],
}
_POST = {
    "gaussian": [("next", "posterior_mean"), ("next", "posterior_std")],
    "categorical": [("next", "posterior_logits")],
}


def _networks(config, embed, action):
    if config.latent == "gaussian":
        # the input of its prior has the width of its hidden layers
        assert config.deter == config.hidden
        sizes = {"hidden_dim": config.hidden, "rnn_hidden_dim": config.deter}
        sizes |= {"state_dim": config.stoch, "scale_lb": config.min_std}
        prior = model_based.RSSMPrior(Unbounded((action,)), action_dim=action, **sizes)
        return prior, model_based.RSSMPosterior(obs_embed_dim=embed, **sizes)
    sizes = {"hidden_dim": config.hidden, "rnn_hidden_dim": config.deter}
    sizes |= {"num_categoricals": config.groups, "num_classes": config.stoch // config.groups}
    sizes |= {"unimix": config.unimix}
    of_prior, of_post = {}, {}
    if config.cell == "block_gru":
        of_prior = {"recurrent_model": "block_gru", "num_blocks": config.blocks}
        of_prior |= {"prior_num_layers": config.layers}
        of_post = {"use_rms_norm": True, "num_layers": config.posterior_layers or config.layers}
    shape = {"action_shape": (action,), "action_dim": action}
    prior = model_based.RSSMPriorV3(**shape, **sizes, **of_prior)
    return prior, model_based.RSSMPosteriorV3(obs_embed_dim=embed, **sizes, **of_post)


def _rollout(latent, prior, post, compiled):
    prior_keys, post_keys = _PRIOR[latent], _POST[latent]
    prior = TensorDictModule(
        prior,
        in_keys=["state", "belief", "action"],
        out_keys=[*prior_keys, _STATE, _BELIEF],
    )
    post = TensorDictModule(
        post,
        in_keys=[_BELIEF, ("next", "encoded_latents")],
        out_keys=[*post_keys, _STATE],
    )
    if latent == "gaussian":
        return model_based.RSSMRollout(prior, post, compile_step=compiled)
    rollout = model_based.RSSMRolloutV3(prior, post)
    if compiled:
        rollout.compile_rollout("step")
    return rollout


def sequences(problem):
    """Return {provider: (call of the whole sequence, what has a gradient)}."""
    config, latent = problem.rssm.config, problem.rssm.config.latent
    embed, action = (
        x.detach().transpose(0, 1).contiguous() for x in (problem.embed, problem.action)
    )
    embed.requires_grad_()
    shape = action.shape[:2]
    torch.manual_seed(0)
    nets = [net.to(embed.device) for net in _networks(config, embed.shape[-1], action.shape[-1])]
    zeros = {
        name: embed.new_zeros(*shape, size)
        for name, size in (("state", config.stoch), ("belief", config.deter))
    }

    def sequence(compiled):
        rollout = _rollout(latent, *nets, compiled)

        def run():
            given = {**zeros, "action": action, "next": {"encoded_latents": embed}}
            found = rollout(TensorDict(given, shape))
            post, prior = ([found[key] for key in keys[latent]] for keys in (_POST, _PRIOR))
            kl = divergence(config.unimix, post, prior)
            return [x.transpose(0, 1) for x in (found[_BELIEF], found[_STATE], kl)]

        return run

    learnt = [embed, *(p for net in nets for p in net.parameters())]
    return {
        "torchrl": (sequence(compiled=False), learnt),
        "torchrl-compiled": (sequence(compiled=True), learnt),
    }
