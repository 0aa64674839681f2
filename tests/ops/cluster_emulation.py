"""The cluster scan on the host: compiled once from the kernels' own source, called as they are."""

import ctypes
import functools
import hashlib
import os
import subprocess
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from rounded import RoundedProducts
from scan_runs import matmul_precision, run, same, settled

from fastrssm.ops import rssm_cuda, rssm_plan, rssm_scan
from fastrssm.ops.rssm_cuda_weights import spread
from tests.checks import assert_matches

ROOT = Path(__file__).resolve().parents[2]
CSRC = ROOT / "csrc"
OPTIONS = ("-std=c++20", "-O1", "-fPIC", "-shared", "-Wno-unknown-pragmas", f"-I{CSRC}")
# orders in which stores arrive: at once, as late as possible, any
AT_ONCE, LATE, ANY = range(3)
EVERY_MUTATION = (
    "none",
    "parity",
    "bytes",
    "buffer",
    "token",
    "skipped wait",
    "wrong barrier",
    "skipped sync",
)
# those of one barrier
MUTATIONS = ("parity", "bytes", "skipped wait", "wrong barrier")
BOTH_DIRECTIONS = pytest.mark.parametrize("backward", [False, True], ids=["forward", "backward"])


@functools.cache
def library():
    """Compile the emulation unless that was done for the same source."""
    files = sorted([*CSRC.glob("cuda/rssm_*.h"), *CSRC.glob("cuda/rssm_*.cpp")])
    files += sorted(CSRC.glob("common/*.h"))
    text = b"".join(path.read_bytes() for path in files) + " ".join(OPTIONS).encode()
    target = ROOT / "build" / "emulation" / f"{hashlib.sha256(text).hexdigest()[:16]}.so"
    if not target.exists():
        target.parent.mkdir(parents=True, exist_ok=True)
        temporary = target.with_suffix(f".{os.getpid()}")
        units = [str(path) for path in files if path.suffix == ".cpp"]
        subprocess.run(["g++", *OPTIONS, *units, "-o", str(temporary)], check=True)
        os.replace(temporary, target)
    return ctypes.CDLL(str(target))


def formulas(name, x, count, *constants):
    """Apply the scalar formulas `name` to float32 numbers; returns `count` arrays."""
    x = x.float().contiguous()
    out = torch.empty(count, x.shape[-1])
    given = [ctypes.c_float(constant) for constant in constants]
    function = getattr(library(), f"emulator_{name}")
    function(x.shape[-1], ctypes.c_void_p(x.data_ptr()), *given, ctypes.c_void_p(out.data_ptr()))
    return out


def _numbers(values, kind):
    return (kind * len(values))(*values)


class Emulator:
    """What `fastrssm._native` offers for clusters, on the host."""

    def __init__(self, ranks=16, rows=8, clusters=2, order=ANY, seed=0,
                 mutation="none", barrier=0, backward=False):  # fmt: skip
        self.ranks, self.rows, self.clusters = ranks, rows, clusters
        self.order, self.seed = order, seed
        # in one direction
        self.mutation, self.barrier = EVERY_MUTATION.index(mutation), barrier
        self.backward = backward
        self._library = library()
        for name in ("sizes", "pack", "run"):
            getattr(self._library, f"emulator_{name}").restype = ctypes.c_char_p

    def _sizes(self, layout, backward, ranks, rows):
        found = (ctypes.c_int64 * 5)()
        why = self._library.emulator_sizes(
            _numbers(layout, ctypes.c_int64), int(backward), ranks, rows, found
        )
        return why, list(found)

    def rssm_cluster_refusal(self, layout, backward, ranks, rows):
        if (ranks, rows) != (self.ranks, self.rows):
            return "another cluster is emulated"
        return (self._sizes(layout, backward, ranks, rows)[0] or b"").decode()

    def rssm_cluster_sizes(self, layout, backward, ranks, rows):
        return self._sizes(layout, backward, ranks, rows)[1]

    def rssm_cluster_count(self, device, layout, backward, ranks, rows):
        return self.clusters

    def rssm_cluster_pack(self, stream, layout, backward, ranks, rows, weights, packed):
        why = self._library.emulator_pack(
            _numbers(layout, ctypes.c_int64), int(backward), ranks, rows,
            _numbers(weights, ctypes.c_size_t), len(weights) // 4, ctypes.c_size_t(packed),
        )  # fmt: skip
        assert not why, why

    def rssm_cluster_run(
        self,
        stream,
        layout,
        backward,
        ranks,
        rows,
        clusters,
        constants,
        learns,
        tensors,
    ):
        options = [int(backward), ranks, rows, clusters]
        mutation = self.mutation if backward == self.backward else 0
        options += [self.order, self.seed, mutation, self.barrier, int(learns)]
        why = self._library.emulator_run(
            _numbers(layout, ctypes.c_int64), _numbers(options, ctypes.c_int),
            _numbers(constants, ctypes.c_double), _numbers(tensors, ctypes.c_size_t),
            (len(tensors) - 24) // 4,
        )  # fmt: skip
        if why:
            raise RuntimeError(why.decode())


def forget():
    rssm_cuda._fitting.cache_clear()
    rssm_cuda.kept_width.cache_clear()
    rssm_cuda._PACKS._entries.clear()


@contextmanager
def emulated(**options):
    """Let the backend "cuda" run on the emulation."""
    emulator = Emulator(**options)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(rssm_cuda, "_native", lambda: emulator)
        # it runs on tensors of the CPU
        patch.setattr(rssm_scan, "resolve", lambda op, x, requested, refused: requested)
        forget()
        try:
            yield emulator
        finally:
            forget()


def emulate(op, case, noise=None, **options):
    with matmul_precision("medium"), emulated(**options):
        return run(op, case, torch.float32, "cuda", noise)


def assert_agrees(op, case, **options):
    noise = settled(op, case)
    exact = run(op, case, torch.float64, "reference", noise)
    with RoundedProducts("bfloat16"):
        plain = run(op, case, torch.float32, "reference", noise)
    got = emulate(op, case, noise, **options)
    for kind, *three in zip(("value", "gradient"), got, exact, plain, strict=True):
        for i, one in enumerate(zip(*three, strict=True)):
            assert_matches(f"{kind} {i}", *one)


def noticed(op, case, wanted, **options):
    """Whether the emulation stops, or its results show it."""
    try:
        found = emulate(op, case, **options)
    except RuntimeError:
        return True
    return not same(found, wanted)


def assert_packed_once(case, ranks, backward):
    args, options = case.arguments("rssm_observe_policy")
    weights, policy = args[-2:]
    names = ("cell", "heads", "latent")
    projected = options.get("policy_proj") is not None
    variant = *(options[name] for name in names), case.groups or 1
    plan = rssm_plan.make_plan(weights, policy, *variant, True, projected, False)
    tensors = [x for x in rssm_plan.flatten(weights, policy) if x is not None]
    with emulated(ranks=ranks):
        packed = rssm_cuda._Launch(
            torch.zeros(3, 9, case.S), tensors, plan.structure, backward=backward
        ).packed(learning=True)
    layers = spread(plan.structure, tensors)
    wanted = torch.cat([layer[0].detach().bfloat16().flatten() for layer in layers])
    found = packed.view(torch.bfloat16)
    assert torch.equal(found[found != 0].sort().values, wanted[wanted != 0].sort().values)
