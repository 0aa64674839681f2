"""How one writes an RSSM in PyTorch without this package.

`textbook` is the published loop: all networks in every step. `hoisted` takes out of the loop what
does not feed back, and multiplies in any dtype, weights cast once. Both compute what ours do.
"""

from functools import partial

import torch
import torch.nn.functional as F
from torch.utils._pytree import tree_map

from fastrssm.models.cells import BlockGRUCell
from fastrssm.models.nets import split_input
from fastrssm.ops import Layer


def _at(x, t):
    return None if x is None else x[t]


def _compiled(function, wanted):
    """Compile where `wanted` is True or the name of a mode."""
    mode = wanted if isinstance(wanted, str) else None
    return torch.compile(function, dynamic=False, mode=mode) if wanted else function


def _start(state, compiled):
    # then one graph serves the first step as well as the others
    learnt = compiled and torch.is_grad_enabled()
    return [x.clone().requires_grad_() for x in state] if learnt else state


def _sample(stats, noise, unimix):
    if len(stats) == 2:
        return stats[0] + stats[1] * noise
    classes = stats[0].shape[-1]
    probs = _mixed(stats[0], unimix)
    index = (probs.detach().cumsum(-1) <= noise.unsqueeze(-1)).sum(-1).clamp_max(classes - 1)
    drawn = F.one_hot(index, classes).to(probs.dtype)
    return (drawn + (probs - probs.detach())).flatten(-2)


def _mixed(logits, unimix):
    probs = logits.float().softmax(-1)
    return (1 - unimix) * probs + unimix / logits.shape[-1] if unimix else probs


def divergence(unimix, post, prior):
    """KL of the posterior from the prior, summed over the latent."""
    if len(post) == 2:
        (mean, std), (prior_mean, prior_std) = post, prior
        ratio, shift = (std / prior_std).square(), ((mean - prior_mean) / prior_std).square()
        return 0.5 * (ratio + shift - 1 - ratio.log()).sum(-1)
    if not unimix:
        q, p = (x[0].float().log_softmax(-1) for x in (post, prior))
        return (q.exp() * (q - p)).sum((-2, -1))
    q, p = (_mixed(x[0], unimix) for x in (post, prior))
    return (q * (q / p).log()).sum((-2, -1))


def _head(rssm, head, x):
    """Statistics of the prior or the posterior; `.net`: torch's modules, not our op."""
    config, nets = rssm.config, rssm._nets(head)
    if config.heads == "split":
        mean, std = (mlp.net(x) for mlp in nets)
        return mean, F.softplus(std) + config.min_std
    y = nets[0].net(x)
    if config.latent == "categorical":
        return (y.unflatten(-1, (config.groups, -1)),)
    mean, raw = y.chunk(2, -1)
    return mean, 2 * torch.sigmoid(raw / 2) + config.min_std


def _recur(cell, x, deter):
    if not (x.is_cuda and torch.compiler.is_compiling()):
        return cell(x, deter)
    # the compiler does not know the fused cell of a GPU
    xr, xz, xn = F.linear(x, cell.weight_ih, cell.bias_ih).chunk(3, -1)
    hr, hz, hn = F.linear(deter, cell.weight_hh, cell.bias_hh).chunk(3, -1)
    new = torch.tanh(xn + torch.sigmoid(xr + hr) * hn)
    return torch.lerp(new, deter.to(new.dtype), torch.sigmoid(xz + hz))


def _blocks(x, weight, bias):
    """[B, blocks, in] -> [B, blocks, out], a matrix for each block."""
    y = torch.baddbmm(bias.unsqueeze(1), x.to(weight.dtype).transpose(0, 1), weight.mT)
    return y.transpose(0, 1)


def _with_branches(deter, branches, blocks):
    """What each block of block_gru reads: its own deter, and all of the branches."""
    own, x = deter.unflatten(-1, (blocks, -1)), torch.cat(branches, -1).unsqueeze(-2)
    return torch.cat((own, x.expand(-1, blocks, -1)), -1)


def _block_gates(gates, deter):
    """[B, blocks, 3 D / blocks] -> [B, D], the new state."""
    r, c, u = (x.flatten(-2) for x in gates.unflatten(-1, (3, -1)).unbind(-2))
    new, update = torch.tanh(torch.sigmoid(r) * c), torch.sigmoid(u - 1)
    return update * new + (1 - update) * deter


def _bounded(action):
    return action / action.detach().abs().clamp_min(1)


def _recur_in_blocks(cell, deter, stoch, action):
    blocks = len(cell.dynhid.weight)
    branches = (
        F.silu(cell.dynin0norm(cell.dynin0(deter))),
        F.silu(cell.dynin1norm(cell.dynin1(stoch))),
        F.silu(cell.dynin2norm(cell.dynin2(_bounded(action)))),
    )
    mixed = _blocks(_with_branches(deter, branches, blocks), cell.dynhid.weight, cell.dynhid.bias)
    x = F.silu(cell.dynhidnorm(mixed.flatten(-2))).unflatten(-1, (blocks, -1))
    return _block_gates(_blocks(x, cell.dyngru.weight, cell.dyngru.bias), deter)


def textbook_step(rssm, policy, compare, deter, stoch, action, embed, noise, action_noise):
    """One step: next state, action, prior to compare with if wanted, statistics of the state."""
    if policy is not None:
        feature = torch.cat((deter, stoch), -1)
        std = F.softplus(policy.std_net.net(feature)) + policy.min_std
        action = torch.tanh(policy.mean_net.net(feature) + std * action_noise)
    cell = rssm.memory_cell
    x = torch.cat((stoch, action), -1)
    if rssm.config.input_layer:
        x = rssm.pre_memory.net(x)
    if isinstance(cell, BlockGRUCell):
        deter = _recur_in_blocks(cell, deter, stoch, action)
    elif isinstance(cell, torch.nn.GRUCell):
        deter = _recur(cell, x, deter)
    else:
        z, r, o = cell.norm(cell.input_layer(torch.cat((x, deter), -1))).chunk(3, -1)
        z = torch.sigmoid(z)
        deter = (1 - z) * torch.tanh(torch.sigmoid(r) * o) + z * deter
    prior = _head(rssm, "prior", deter) if compare or embed is None else ()
    stats = prior if embed is None else _head(rssm, "posterior", torch.cat((deter, embed), -1))
    return deter, _sample(stats, noise, rssm.config.unimix), action, prior, stats


def textbook(problem, compiled=False):
    """Return a call of the whole sequence, step by step."""
    p = problem
    step = _compiled(partial(textbook_step, p.rssm, p.policy, p.embed is not None), compiled)
    compare = _compiled(partial(divergence, p.rssm.config.unimix), compiled)

    def run():
        (deter, stoch), steps = _start(p.state, compiled), []
        for t in range(p.case.length):
            given = _at(p.action, t), _at(p.embed, t), p.noise[t], _at(p.action_noise, t)
            deter, stoch, action, prior, stats = step(deter, stoch, *given)
            steps.append((deter, stoch, action, *prior, *stats))
        deters, stochs, actions, *stats = map(torch.stack, zip(*steps, strict=True))
        if p.embed is None:
            return deters, stochs, actions
        half = len(stats) // 2
        return deters, stochs, compare(stats[half:], stats[:half])

    return run


def _dense(x, layer, offset=None):
    """A layer in the dtype of its weights; what is normalised comes back in float32."""
    y = F.linear(x.to(layer.weight.dtype), layer.weight, layer.bias)
    y = y if offset is None else y + offset
    return _norm(y, layer)


def _norm(y, layer):
    if layer.scale is None:
        return y
    scale = layer.scale.flatten()
    if layer.shift is None:
        return F.rms_norm(y.float(), scale.shape, scale, 1e-4)
    return F.layer_norm(y.float(), scale.shape, scale, layer.shift)


def _stats(x, layers, config, split, min_std, offset=None):
    y = _dense(x, layers[0], offset)
    if split:
        y = y.unflatten(-1, (2, -1)).movedim(-2, 0)
        for layer in layers[1:]:
            flat = F.elu(y).flatten(1, -2)
            out = torch.baddbmm(layer.bias.unsqueeze(1), flat, layer.weight.mT)
            y = out.unflatten(1, y.shape[1:-1])
        return y[0].float(), F.softplus(y[1].float()) + min_std
    for layer in layers[1:]:
        y = _dense(F.silu(y), layer)
    if config.latent == "categorical":
        return (y.float().unflatten(-1, (config.groups, -1)),)
    mean, raw = y.float().chunk(2, -1)
    return mean, 2 * torch.sigmoid(raw / 2) + min_std


def _hoisted_step(config, policy_min_std, nets, deter, stoch, action, offset, noise, action_noise):
    if nets.policy is not None:
        feature = torch.cat((deter, stoch), -1)
        mean, std = _stats(feature, nets.policy.layers, config, True, policy_min_std)
        action = torch.tanh(mean + std * action_noise)
    x = torch.cat((stoch, action), -1)
    if nets.rssm.pre is not None:
        x = F.silu(_dense(x, nets.rssm.pre))
    if nets.rssm.branches:
        *inputs, mix = nets.rssm.branches
        blocks, pairs = len(mix.weight), zip((deter, stoch, _bounded(action)), inputs, strict=True)
        branches = [F.silu(_dense(x, layer)) for x, layer in pairs]
        mixed = _blocks(_with_branches(deter, branches, blocks), mix.weight, mix.bias)
        x = F.silu(_norm(mixed.flatten(-2), mix)).unflatten(-1, (blocks, -1))
        gates = _blocks(x, nets.rssm.cell_input.weight, nets.rssm.cell_input.bias)
        deter = _block_gates(gates.float(), deter)
    else:
        deter = _hoisted_recur(nets, x, deter)
    split = config.heads == "split"
    stats = _stats(deter, nets.rssm.head, config, split, config.min_std, offset)
    return deter, _sample(stats, noise, config.unimix), action, stats


def _hoisted_recur(nets, x, deter):
    if nets.rssm.cell_state is not None:
        gates = _dense(x, nets.rssm.cell_input).float().chunk(3, -1)
        (xr, xz, xn), (hr, hz, hn) = gates, _dense(deter, nets.rssm.cell_state).float().chunk(3, -1)
        z, new = torch.sigmoid(xz + hz), torch.tanh(xn + torch.sigmoid(xr + hr) * hn)
    else:
        z, r, o = _dense(torch.cat((x, deter), -1), nets.rssm.cell_input).chunk(3, -1)
        z, new = torch.sigmoid(z), torch.tanh(torch.sigmoid(r) * o)
    return torch.lerp(new, deter, z)


def _hoisted_compare(config, prior, deter, post):
    stats = _stats(deter, prior, config, config.heads == "split", config.min_std)
    return divergence(config.unimix, post, stats)


def hoisted(problem, dtype=torch.float32, compiled=False):
    """Return a call of the whole sequence; embedding, prior and KL are one product each."""
    p, config = problem, problem.rssm.config
    policy_min_std = None if p.policy is None else p.policy.min_std
    step = _compiled(partial(_hoisted_step, config, policy_min_std), compiled)
    compare = _compiled(partial(_hoisted_compare, config), compiled)

    def cast(layer):
        # the parameters of norms stay in float32
        bias = None if layer.bias is None else layer.bias.to(dtype)
        return layer._replace(weight=layer.weight.to(dtype), bias=bias)

    def run():
        nets = tree_map(
            lambda x: cast(x) if isinstance(x, Layer) else x,
            p.nets(),
            is_leaf=lambda x: isinstance(x, Layer),
        )
        offsets = None
        if p.embed is not None:
            inner, outside = split_input(nets.rssm.head, config.deter)
            nets = nets._replace(rssm=nets.rssm._replace(head=inner))
            offsets = F.linear(p.embed.to(dtype), outside.weight, outside.bias)
        (deter, stoch), steps = _start(p.state, compiled), []
        for t in range(p.case.length):
            given = _at(p.action, t), _at(offsets, t), p.noise[t], _at(p.action_noise, t)
            deter, stoch, action, stats = step(nets, deter, stoch, *given)
            steps.append((deter, stoch, action, *stats))
        deters, stochs, actions, *stats = map(torch.stack, zip(*steps, strict=True))
        if p.embed is None:
            return deters, stochs, actions
        return deters, stochs, compare(nets.prior, deters, stats)

    return run
