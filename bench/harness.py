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

from bench import cuda

ROOT = Path(__file__).resolve().parents[1]
ROUNDS = 30
# a round repeats a short call until it lasts this long
_ROUND_SECONDS = 2e-3
# of first calls, at most five
_WARM_SECONDS = 1.0


@dataclass(frozen=True)
class Workload:
    """One thing to compute, by several providers, and what bounds it.

    The bound is a copy of `moved` bytes, or the provider called `limit`. `notes` of providers are
    printed beside their times; `rounds` is enough where one round takes seconds. `failed` says why
    a provider has no time.
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
    failed: dict[str, str] = field(default_factory=dict)


def measure(providers, device="cpu", rounds=ROUNDS):
    """Seconds per call: {provider: (median, lower quartile, upper quartile)}.

    Every round runs each provider in turn, so that a busy moment of the machine hits all of them.
    """
    times = cuda.times(providers, rounds) if device == "cuda" else _times(providers, rounds)
    quartiles = {name: statistics.quantiles(values, n=4) for name, values in times.items()}
    return {name: (median, low, high) for name, (low, median, high) in quartiles.items()}


def _times(providers, rounds):
    repeats, times = {}, {name: [] for name in providers}
    for name, call in providers.items():
        start = time.perf_counter()
        for _ in range(5):
            call()
            if time.perf_counter() - start > _WARM_SECONDS:
                break
        start = time.perf_counter()
        call()
        repeats[name] = max(1, round(_ROUND_SECONDS / (time.perf_counter() - start)))
    for _ in range(rounds):
        for name, call in providers.items():
            start = time.perf_counter()
            for _ in range(repeats[name]):
                call()
            times[name].append((time.perf_counter() - start) / repeats[name])
    return times


def floor(moved, device="cpu"):
    """Seconds that a copy takes which moves as many bytes: the same caches, the same pages."""
    source = torch.zeros(moved // 2, dtype=torch.uint8, device=device)
    if device == "cuda":
        # memory may be told that it is zero
        source.random_()
    target = torch.empty_like(source)
    return measure({"copy": lambda: target.copy_(source)}, device)["copy"][0]


def rows(workload, threads, rounds=ROUNDS):
    """Measure a workload; one row of the results file per provider."""
    rounds = min(rounds, workload.rounds)
    timed = measure(workload.providers, workload.device, rounds)
    limit = timed.get(workload.limit)
    floor_s = limit[0] if limit else floor(workload.moved, workload.device)
    notes = {provider: workload.notes.get(provider, "") for provider in timed}
    notes |= {workload.limit: "limit"} if limit else {}
    timed |= dict.fromkeys(workload.failed, (None, None, None))
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
            "note": (notes | workload.failed)[provider],
        }
        for provider, (median, low, high) in timed.items()
    ]


def machine():
    """What a number depends on."""
    cpu = Path("/proc/cpuinfo").read_text() if Path("/proc/cpuinfo").exists() else ""
    model = re.search(r"model name\s*: (.*)", cpu)
    flags = re.search(r"flags\s*: (.*)", cpu)
    found = set(flags[1].split()) if flags else set()
    return {
        "cpu": model[1] if model else platform.processor(),
        "cores": os.cpu_count(),
        "isa": [name for name in ("avx2", "avx512f", "avx512_bf16", "amx_bf16") if name in found],
        **(cuda.description() if torch.cuda.is_available() else {"gpu": None}),
        **{name: _version(name) for name in ("torch", "triton", "mujoco")},
        "commit": _commit(),
        "load": round(os.getloadavg()[0], 2),
    }


def _version(name):
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def _commit():
    command = ["git", "-C", str(ROOT), "describe", "--always", "--dirty"]
    try:
        return subprocess.run(command, capture_output=True, text=True).stdout.strip() or None
    except FileNotFoundError:
        # a copy of the files alone, where there is no git
        return None
