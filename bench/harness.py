"""Timing of several providers of one result, side by side, and a description of the machine."""

import os
import platform
import re
import statistics
import subprocess
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from importlib import metadata
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parents[1]
ROUNDS = 30
# a round repeats a short call until it lasts this long
_ROUND_SECONDS = 2e-3
# of first calls, at most five
_WARM_SECONDS = 1.0
# more than the second-level cache of any GPU
_FLUSH_BYTES = 256 << 20


@dataclass(frozen=True)
class Workload:
    """One thing to compute, by several providers, and what bounds it.

    The bound is a copy of `moved` bytes, or the provider called `limit`. `notes` of providers are
    printed beside their times; `rounds` is enough where one round takes seconds.
    """

    bench: str
    name: str
    mode: str
    dtype: str
    device: str
    moved: int | None
    providers: dict[str, Callable[[], object]]
    limit: str | None = None
    notes: dict[str, str] = field(default_factory=dict)
    rounds: int = ROUNDS


def _synchronize(device):
    if device == "cuda":
        torch.cuda.synchronize()


def measure(providers, device="cpu", rounds=ROUNDS):
    """Seconds per call: {provider: (median, lower quartile, upper quartile)}.

    Every round runs each provider in turn, so that a busy moment of the machine hits all of them.
    """
    repeats, times = {}, {name: [] for name in providers}
    flush = (
        torch.empty(_FLUSH_BYTES, dtype=torch.uint8, device=device) if device == "cuda" else None
    )
    for name, call in providers.items():
        start = time.perf_counter()
        for _ in range(5):
            call()
            if time.perf_counter() - start > _WARM_SECONDS:
                break
        _synchronize(device)
        start = time.perf_counter()
        call()
        _synchronize(device)
        # on a GPU once, after a flush: the next call would find its inputs in the cache
        took = time.perf_counter() - start
        repeats[name] = 1 if device == "cuda" else max(1, round(_ROUND_SECONDS / took))
    for _ in range(rounds):
        for name, call in providers.items():
            if flush is not None:
                flush.zero_()
            _synchronize(device)
            start = time.perf_counter()
            for _ in range(repeats[name]):
                call()
            _synchronize(device)
            times[name].append((time.perf_counter() - start) / repeats[name])
    quartiles = {name: statistics.quantiles(values, n=4) for name, values in times.items()}
    return {name: (median, low, high) for name, (low, median, high) in quartiles.items()}


def floor(moved, device="cpu"):
    """Seconds that a copy takes which moves as many bytes: the same caches, the same pages."""
    source = torch.zeros(moved // 2, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    return measure({"copy": lambda: target.copy_(source)}, device)["copy"][0]


def rows(workload, threads, rounds=ROUNDS):
    """Measure a workload; one row of the results file per provider."""
    rounds = min(rounds, workload.rounds)
    timed = measure(workload.providers, workload.device, rounds)
    limit = timed.get(workload.limit)
    floor_s = limit[0] if limit else floor(workload.moved, workload.device)
    return [
        {
            "bench": workload.bench,
            "workload": workload.name,
            "mode": workload.mode,
            "provider": provider,
            "dtype": workload.dtype,
            "threads": threads,
            "device": workload.device,
            "median_s": median,
            "p25_s": low,
            "p75_s": high,
            "rounds": rounds,
            "floor_s": floor_s,
            "note": "limit" if provider == workload.limit else workload.notes.get(provider, ""),
        }
        for provider, (median, low, high) in timed.items()
    ]


def machine():
    """What a number depends on."""
    cpu = Path("/proc/cpuinfo").read_text() if Path("/proc/cpuinfo").exists() else ""
    model = re.search(r"model name\s*: (.*)", cpu)
    flags = re.search(r"flags\s*: (.*)", cpu)
    found = set(flags[1].split()) if flags else set()
    gpu = torch.cuda.is_available()
    return {
        "cpu": model[1] if model else platform.processor(),
        "cores": os.cpu_count(),
        "isa": [name for name in ("avx2", "avx512f", "avx512_bf16", "amx_bf16") if name in found],
        "gpu": torch.cuda.get_device_name() if gpu else None,
        "driver": _output("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader")
        if gpu
        else None,
        **{name: _version(name) for name in ("torch", "triton", "mujoco")},
        "commit": _output("git", "-C", str(ROOT), "describe", "--always", "--dirty"),
        "load": round(os.getloadavg()[0], 2),
    }


def _version(name):
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def _output(*command):
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
