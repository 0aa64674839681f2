"""Which backend runs an op: the argument, `use_backend`, FASTRSSM_BACKEND, then the fastest."""

import functools
import importlib.util
import logging
import os
import threading
from collections.abc import Generator, Mapping
from contextlib import contextmanager
from typing import Literal, get_args

import torch
from torch import Tensor

Backend = Literal["reference", "cpu", "triton", "cuda"]
_NAMES: tuple[Backend, ...] = get_args(Backend)
# every op that has a card, with its backends
OPS: dict[str, tuple[Backend, ...]] = {
    "gaussian_kl": ("reference", "cpu", "triton", "cuda"),
    "categorical_kl": ("reference", "cpu", "triton"),
    "gaussian_nll": ("reference", "cpu", "triton"),
    "mlp": ("reference", "cpu"),
    "lambda_return": ("reference", "cpu", "triton"),
    "rssm_observe": ("reference", "cpu", "triton", "cuda"),
    "rssm_imagine": ("reference", "cpu", "triton", "cuda"),
    "rssm_observe_policy": ("reference", "cpu", "triton", "cuda"),
    "rssm_imagine_policy": ("reference", "cpu", "triton", "cuda"),
}
_ORDER: dict[str, tuple[Backend, ...]] = {"cpu": ("cpu",), "cuda": ("cuda", "triton")}
# blocks of these wait for one another, and no GPU has run them yet: never without being asked for
_ON_REQUEST: frozenset[tuple[str, Backend]] = frozenset(
    (op, "cuda") for op in OPS if op.startswith("rssm_")
)
_NOTHING: Mapping[Backend, str] = {}
_log_once = functools.cache(logging.getLogger("fastrssm").debug)


def _checked(backend: str | None, source: str) -> Backend | None:
    if backend is None or backend in _NAMES:
        return backend
    raise ValueError(f"{source} is {backend!r}, expected one of {', '.join(_NAMES)}")


# thread-local and not a context variable, which torch.compile cannot read
_CHOSEN = threading.local()
_ENVIRONMENT = _checked(os.environ.get("FASTRSSM_BACKEND") or None, "FASTRSSM_BACKEND")
_INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"


@functools.cache
def _absence(backend: Backend) -> str | None:
    """Why this installation cannot run `backend`; None when it can."""
    if backend == "triton":
        if importlib.util.find_spec("triton") is None:
            return "triton is not installed"
        if not _INTERPRETED and not torch.cuda.is_available():
            return "no GPU is visible, and TRITON_INTERPRET is not 1"
    elif backend != "reference":
        try:
            from fastrssm import _native
        except ImportError as error:  # a source tree that was not built has the other backends
            return f"the compiled module does not load ({error})"
        return _native.cuda_status() or None if backend == "cuda" else None
    return None


def _refusal(op: str, backend: Backend, device: str, dtype: torch.dtype) -> str | None:
    """Why `backend` cannot run `op` on such a tensor; None when it can."""
    if backend not in OPS[op]:
        return "no kernel"
    if reason := _absence(backend):
        return reason
    if backend not in ("reference", "triton" if _INTERPRETED else "", *_ORDER.get(device, ())):
        return f"tensor is on {device}"
    if backend in ("triton", "cuda") and dtype == torch.float64:
        return "float64 runs on cpu and reference only"
    return None


# what torch.compiler.assume_constant_result does, without its import of the whole compiler
_refusal._dynamo_marked_constant = True  # type: ignore[attr-defined]


def preferred() -> Backend | None:
    """Return what `use_backend` or FASTRSSM_BACKEND asks for; None: neither does."""
    return getattr(_CHOSEN, "backend", None) or _ENVIRONMENT


def resolve(
    op: str, x: Tensor, requested: Backend | None, refused: Mapping[Backend, str] = _NOTHING
) -> Backend:
    """Choose the backend of `op` for tensors like `x`; an explicit request never falls back.

    `refused` says which backends cannot run this very call, and why.
    """
    device, dtype = x.device.type, x.dtype
    wanted = _checked(requested, "backend") or preferred()
    if wanted is not None:
        if reason := _refusal(op, wanted, device, dtype) or refused.get(wanted):
            raise RuntimeError(f"{op}: backend {wanted!r} is not available: {reason}")
        return wanted
    for backend in _ORDER.get(device, ()):
        if (op, backend) in _ON_REQUEST:
            continue
        if (reason := _refusal(op, backend, device, dtype) or refused.get(backend)) is None:
            return backend
        if not torch.compiler.is_compiling():
            _log_once("%s does not run on %s: %s", op, backend, reason)
    return "reference"


@contextmanager
def use_backend(backend: Backend) -> Generator[None]:
    """Run every op of this thread inside the block on `backend`, or raise where it cannot."""
    outer = getattr(_CHOSEN, "backend", None)
    _CHOSEN.backend = _checked(backend, "backend")
    try:
        yield
    finally:
        _CHOSEN.backend = outer


def backends() -> dict[str, dict[Backend, str | None]]:
    """Tabulate op x backend: None where it can run here, else the reason why not."""
    return {op: {b: _absence(b) if b in OPS[op] else "no kernel" for b in _NAMES} for op in OPS}
