"""The four RSSM scans at their edges: empty, strided and bad inputs, errors, repeatability."""

from dataclasses import replace

import pytest
import torch
from scan_runs import CASES, EVERY_OP, FUSED, run, same, values_and_gradients
from torch.utils._pytree import tree_map

from fastrssm import ops
from fastrssm._dispatch import OPS

# 5. edges


@FUSED
@EVERY_OP
def test_empty_batch(op, backend):
    values, gradients = run(op, replace(CASES["rssm"], B=0), torch.float32, backend)
    assert values[0].shape == (6, 0, 37)
    assert not any(g.any() for g in gradients)


@FUSED
@EVERY_OP
def test_not_contiguous(op, backend):
    args, options = CASES["rssmo"].arguments(op, torch.float64)

    def strided(x):
        if not torch.is_tensor(x):
            return x
        wide = torch.stack((x.detach(), x.detach()), -1)[..., 0]
        return wide.requires_grad_(x.requires_grad)

    want = values_and_gradients(getattr(ops, op), args, options, backend=backend)
    args, options = tree_map(strided, (args, options))
    assert not args[0].is_contiguous()
    assert same(values_and_gradients(getattr(ops, op), args, options, backend=backend), want)


@FUSED
def test_bad_numbers_are_not_hidden(backend):
    args, options = CASES["rssm"].arguments("rssm_imagine")
    with torch.no_grad():
        args[0][1, 2, 0] = float("nan")
    states = ops.rssm_imagine(*args, **options, backend=backend)
    assert states.deter[1:, 2].isnan().any(-1).all()
    assert states.deter[:, :2].isfinite().all()
    assert states.deter[:1].isfinite().all()


@EVERY_OP
def test_what_a_kernel_does_not_do_runs_on_the_reference(op):
    for case, dtype, why in (
        (replace(CASES["rssm"], hidden=0, width=11), torch.float32, "there are none"),
        (CASES["rssm"], torch.bfloat16, "bfloat16 tensors run on reference only"),
    ):
        args, options = case.arguments(op, dtype)
        assert getattr(ops, op)(*args, **options).deter.dtype == dtype
        with pytest.raises(RuntimeError, match=f"{op}: backend 'cpu' is not available: .*{why}"):
            getattr(ops, op)(*args, **options, backend="cpu")


# clusters do not run on these tensors, which the last of the errors needs
@pytest.mark.parametrize("backend", [x for x in OPS["rssm_observe"] if x != "cuda"])
@EVERY_OP
def test_errors_are_the_same_on_every_backend(op, backend):
    case = CASES["rssm"]
    args, options = case.arguments(op)
    where = {"rssm_observe": 2, "rssm_imagine_policy": 0}.get(op, 1)
    noise = args[where]
    weights = next(x for x in args if isinstance(x, ops.RSSMWeights))

    def refused(error, match, old=None, new=None, **more):
        changed = [new if x is old else x for x in args]
        with pytest.raises(error, match=match):
            getattr(ops, op)(*changed, **options | more, backend=backend)

    def with_head(i, **parts):
        layers = list(weights.head)
        layers[i] = layers[i]._replace(**parts)
        return weights._replace(head=tuple(layers))

    refused(
        ValueError, r"noise has shape \[6, 7, 10\], expected \[6, 7, 11\]", noise, noise[..., 1:]
    )
    refused(
        ValueError, r"noise has shape \[7, 11\], expected \[T, B, ...\] with T > 0", noise, noise[0]
    )
    refused(ValueError, "noise has shape .0, 7, 11., expected", noise, noise[:0])
    refused(TypeError, "noise is torch.float64, expected torch.float32", noise, noise.double())
    refused(TypeError, "noise is a list, expected a Tensor", noise, [1.0])
    deter = next(x for x in args if torch.is_tensor(x) and x.shape == (7, 37))
    refused(ValueError, r"deter0 has shape \[6, 37\], expected \[7, 37\]", deter, deter[1:])
    refused(
        ValueError, "latent is 'normal', expected one of gaussian, categorical", latent="normal"
    )
    refused(ValueError, "cell is 'gru', expected one of torch_gru", cell="gru")
    refused(ValueError, "cell_state is a Layer, expected None for cell='ln_", cell="ln_gru_a")
    refused(ValueError, "min_std is -1, expected a finite number of at least 0", min_std=-1)
    refused(ValueError, "unimix is 1.0, expected a number in", unimix=1.0)
    refused(ValueError, "groups is 3, expected a divisor of the latent's size 11", groups=3)
    bias = weights.head[1].bias
    message = r"weights.head\[1\].bias has shape \[2, 18\], expected \[2, 19\]"
    refused(ValueError, message, weights, with_head(1, bias=bias[:, 1:]))
    message = r"weights.head\[1\].bias is torch.float64, expected torch.float32"
    refused(TypeError, message, weights, with_head(1, bias=bias.double()))
    if "observe" in op:
        first = args[where + 1 + ("policy" in op)]
        message = "is_first is torch.float32, expected torch.bool"
        refused(TypeError, message, first, first.float())
        message = r"head\[0\].bias is a Tensor, expected None"
        refused(ValueError, message, weights, with_head(0, bias=torch.zeros(38)))
        refused(TypeError, "embed_proj is a NoneType, expected a Tensor", args[0], None)
    if backend != "reference":
        message = "noise requires grad, expected noise without requires_grad, or backend='ref"
        refused(ValueError, message, noise, noise.clone().requires_grad_())


# 6. repeatability


@FUSED
@EVERY_OP
@pytest.mark.parametrize("name", ["rssm", "discrete", "dreamer v3", "many rows to a block"])
def test_runs_and_numbers_of_threads_are_equal_bit_for_bit(name, op, backend):
    threads, found = torch.get_num_threads(), []
    for count in (1, 1, 2, 3):
        torch.set_num_threads(count)
        found.append(run(op, CASES[name], torch.float32, backend))
    torch.set_num_threads(threads)
    assert all(same(other, found[0]) for other in found[1:])


@FUSED
def test_rows_do_not_depend_on_each_other(backend):
    args, options = CASES["many rows to a block"].arguments("rssm_imagine")
    whole = ops.rssm_imagine(*args, **options, backend=backend)
    action, noise, deter, stoch, weights = args
    part = action[:, 70:83], noise[:, 70:83], deter[70:83], stoch[70:83], weights
    states = ops.rssm_imagine(*part, **options, backend=backend)
    assert torch.equal(states.stoch, whole.stoch[:, 70:83])
