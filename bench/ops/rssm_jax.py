"""The hoisted RSSM in JAX: one jitted lax.scan, with gradients.

Weights and results are those of the problem's modules; arrays stay JAX's between calls. Weights
are [in, out], as they are in JAX: XLA multiplies a batch with them up to 2.5 times as fast.
"""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import torch
from jax import lax
from torch.utils._pytree import tree_map

from fastrssm.ops import Layer


def _array(x):
    return jnp.asarray(x.detach().numpy()) if isinstance(x, torch.Tensor) else x


def _each_layer(function, nets):
    """Apply a function to all weights."""
    return jax.tree.map(
        lambda x: x._replace(weight=function(x.weight)) if isinstance(x, Layer) else x,
        nets,
        is_leaf=lambda x: isinstance(x, Layer),
    )


def _nets(problem):
    with torch.no_grad():
        nets = tree_map(_array, problem.nets())
    return _each_layer(lambda weight: weight.mT, nets)


def _dense(x, layer, offset=None):
    dtype = layer.weight.dtype
    y = jnp.matmul(x.astype(dtype), layer.weight, preferred_element_type=jnp.float32)
    if layer.bias is not None:
        y = y + layer.bias
    y = y if offset is None else y + offset
    return y if layer.scale is None else _norm(y, layer)


def _norm(y, layer):
    if layer.shift is None:
        y = y * lax.rsqrt((y * y).mean(-1, keepdims=True) + 1e-4)
        return y * layer.scale.reshape(-1)
    y = (y - y.mean(-1, keepdims=True)) * lax.rsqrt(y.var(-1, keepdims=True) + 1e-5)
    return y * layer.scale + layer.shift


def _blocks(x, layer):
    """[B, blocks, in] -> [B, blocks, out], a matrix for each block."""
    dtype = layer.weight.dtype
    float32 = jnp.float32
    y = jnp.einsum("bgi,gio->bgo", x.astype(dtype), layer.weight, preferred_element_type=float32)
    return y + layer.bias


def _recur_in_blocks(weights, deter, stoch, action):
    *inputs, mix = weights.branches
    blocks, rows = len(mix.weight), len(deter)
    action = action / jnp.maximum(lax.stop_gradient(jnp.abs(action)), 1)
    pairs = zip((deter, stoch, action), inputs, strict=True)
    x = jnp.concatenate([jax.nn.silu(_dense(x, layer)) for x, layer in pairs], -1)
    x = jnp.broadcast_to(x[:, None], (rows, blocks, x.shape[-1]))
    x = jnp.concatenate((deter.reshape(rows, blocks, -1), x), -1)
    x = jax.nn.silu(_norm(_blocks(x, mix).reshape(rows, -1), mix)).reshape(rows, blocks, -1)
    gates = jnp.split(_blocks(x, weights.cell_input), 3, -1)
    r, c, u = (gate.reshape(rows, -1) for gate in gates)
    return deter + jax.nn.sigmoid(u - 1) * (jnp.tanh(jax.nn.sigmoid(r) * c) - deter)


def _stats(x, layers, config, split, min_std, offset=None):
    y = _dense(x, layers[0], offset)
    if split:
        halves = jnp.split(y, 2, -1)
        for layer in layers[1:]:
            pairs = zip(halves, layer.weight, layer.bias, strict=True)
            halves = [_dense(jax.nn.elu(y), Layer(w, b)) for y, w, b in pairs]
        return halves[0], jax.nn.softplus(halves[1]) + min_std
    for layer in layers[1:]:
        y = _dense(jax.nn.silu(y), layer)
    if config.latent == "categorical":
        return (y.reshape(*y.shape[:-1], config.groups, -1),)
    mean, raw = jnp.split(y, 2, -1)
    return mean, 2 * jax.nn.sigmoid(raw / 2) + min_std


def _mixed(logits, unimix):
    return (1 - unimix) * jax.nn.softmax(logits) + unimix / logits.shape[-1]


def _sample(stats, noise, unimix):
    if len(stats) == 2:
        return stats[0] + stats[1] * noise
    probs = _mixed(stats[0], unimix)
    classes = probs.shape[-1]
    index = (lax.stop_gradient(probs).cumsum(-1) <= noise[..., None]).sum(-1)
    drawn = jax.nn.one_hot(jnp.minimum(index, classes - 1), classes)
    drawn = drawn + (probs - lax.stop_gradient(probs))
    return drawn.reshape(*drawn.shape[:-2], -1)


def _divergence(post, prior, unimix):
    if len(post) == 2:
        (mean, std), (prior_mean, prior_std) = post, prior
        ratio, shift = (std / prior_std) ** 2, ((mean - prior_mean) / prior_std) ** 2
        return 0.5 * (ratio + shift - 1 - jnp.log(ratio)).sum(-1)
    if not unimix:
        q, p = (jax.nn.log_softmax(x[0]) for x in (post, prior))
        return (jnp.exp(q) * (q - p)).sum((-2, -1))
    q, p = (_mixed(x[0], unimix) for x in (post, prior))
    return (q * jnp.log(q / p)).sum((-2, -1))


def _step(config, policy_min_std, nets, carry, given):
    deter, stoch = carry
    action, offset, noise, action_noise = given
    if nets.policy is not None:
        feature = jnp.concatenate((deter, stoch), -1)
        mean, std = _stats(feature, nets.policy.layers, config, True, policy_min_std)
        action = jnp.tanh(mean + std * action_noise)
    if nets.rssm.branches:
        deter = _recur_in_blocks(nets.rssm, deter, stoch, action)
    else:
        deter = _recur(nets, deter, jnp.concatenate((stoch, action), -1))
    split = config.heads == "split"
    stats = _stats(deter, nets.rssm.head, config, split, config.min_std, offset)
    stoch = _sample(stats, noise, config.unimix)
    return (deter, stoch), (deter, stoch, action, stats)


def _recur(nets, deter, x):
    if nets.rssm.pre is not None:
        x = jax.nn.silu(_dense(x, nets.rssm.pre))
    if nets.rssm.cell_state is not None:
        xr, xz, xn = jnp.split(_dense(x, nets.rssm.cell_input), 3, -1)
        hr, hz, hn = jnp.split(_dense(deter, nets.rssm.cell_state), 3, -1)
        z, new = jax.nn.sigmoid(xz + hz), jnp.tanh(xn + jax.nn.sigmoid(xr + hr) * hn)
    else:
        gates = _dense(jnp.concatenate((x, deter), -1), nets.rssm.cell_input)
        z, r, o = jnp.split(gates, 3, -1)
        z, new = jax.nn.sigmoid(z), jnp.tanh(jax.nn.sigmoid(r) * o)
    return new + z * (deter - new)


def _split(nets, size):
    """Take what reads the embedding out of the posterior's first layer."""
    first, *others = nets.rssm.head
    inner, outer = jnp.split(first.weight, [size], 0)
    head = (first._replace(weight=inner, bias=None), *others)
    return nets._replace(rssm=nets.rssm._replace(head=head)), Layer(outer, first.bias)


def _sequence(config, policy_min_std, dtype, nets, embed, action, noise, action_noise, state):
    nets, offsets = _each_layer(lambda weight: weight.astype(dtype), nets), None
    if embed is not None:
        nets, outer = _split(nets, config.deter)
        offsets = _dense(embed, outer)
    step = partial(_step, config, policy_min_std, nets)
    given = action, offsets, noise, action_noise
    _, (deters, stochs, actions, stats) = lax.scan(step, state, given)
    if embed is None:
        return deters, stochs, actions
    prior = _stats(deters, nets.prior, config, config.heads == "split", config.min_std)
    return deters, stochs, _divergence(stats, prior, config.unimix)


def calls(problem, dtype):
    """Return a call for the results and one for the gradients."""
    p = problem
    min_std = None if p.policy is None else p.policy.min_std
    dtype = jnp.dtype(dtype)
    nets = _nets(problem)
    names = "action", "noise", "action_noise", "state"
    embed, others = _array(p.embed), [tree_map(_array, getattr(p, name)) for name in names]
    others[-1] = tuple(others[-1])
    upstream = tuple(map(_array, p.upstream))

    def sequence(nets, embed, others):
        return _sequence(p.rssm.config, min_std, dtype, nets, embed, *others)

    def gradients(nets, embed, others):
        if nets.policy is None:
            _, back = jax.vjp(lambda nets, embed: sequence(nets, embed, others), nets, embed)
            nets, embed = back(upstream)
            return embed, nets
        run = lambda policy: sequence(nets._replace(policy=policy), embed, others)  # noqa: E731
        _, back = jax.vjp(run, nets.policy)
        return back(upstream)

    forward, backward = jax.jit(sequence), jax.jit(gradients)
    return (
        lambda: jax.block_until_ready(forward(nets, embed, others)),
        lambda: jax.block_until_ready(backward(nets, embed, others)),
    )


def acting(problem):
    """Return a call of one step with the posterior, in float32: bfloat16 is slower for one row."""
    p, config = problem, problem.rssm.config
    nets, outer = _split(_nets(problem), config.deter)

    @jax.jit
    def step(nets, outer, state, embed, action, noise):
        given = action, _dense(embed, outer), noise, None
        return _step(config, None, nets, state, given)[0]

    given = tuple(map(_array, p.state)), *(_array(x)[0] for x in (p.embed, p.action, p.noise))
    return lambda: jax.block_until_ready(step(nets, outer, *given))


def tensors(found):
    """Results or gradients of a call as tensors, in the form of the ops."""
    found = _each_layer(lambda weight: weight.mT, found)
    return [torch.from_numpy(np.array(x)) for x in jax.tree.leaves(found)]
