"""What is different on an NVIDIA GPU: timing by events, captured calls, what the machine can do."""

import functools
import statistics
import subprocess
import time

import torch

# more than the second-level cache of any GPU
_FLUSH_BYTES = 256 << 20
# of first calls, at most five
_WARM_SECONDS = 1.0
# of the square product that stands for a workload's
_WIDTH = 4096
_CEILING_BYTES = 2 << 30


def times(providers, rounds):
    """Seconds of each call by events: {provider: one per round}.

    Every round runs each provider in turn, each behind a flush of the cache: a call finds its
    inputs in memory, and what it launches first is queued before the flush ends. So one kernel is
    timed without its launch, and many that the processor cannot launch in time with the gaps.
    """
    flush = torch.empty(_FLUSH_BYTES, dtype=torch.uint8, device="cuda")
    for call in providers.values():
        start = time.perf_counter()
        for _ in range(5):
            call()
            torch.cuda.synchronize()
            if time.perf_counter() - start > _WARM_SECONDS:
                break
    found = {name: [] for name in providers}
    for _ in range(rounds):
        for name, call in providers.items():
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            torch.cuda.synchronize()
            flush.zero_()
            begin.record()
            call()
            end.record()
            torch.cuda.synchronize()
            found[name].append(begin.elapsed_time(end) * 1e-3)
    return found


def captured(call):
    """Return a call that replays this one from a CUDA graph; its result is always the same memory.

    What the call makes once, it makes before it is captured.
    """
    beside = torch.cuda.Stream()
    beside.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(beside):
        for _ in range(3):
            call()
    torch.cuda.current_stream().wait_stream(beside)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        result = call()

    def replay():
        graph.replay()
        return result

    return replay


def limit(flop, dtype):
    """Return name and call of cuBLAS products of about `flop` operations, on random numbers."""
    depth = max(16, round(flop / (2 * _WIDTH**2) / 16) * 16)
    stored = torch.bfloat16 if dtype == "bfloat16" else torch.float32
    shapes = (_WIDTH, depth), (depth, _WIDTH)
    a, b = (torch.randn(shape, device="cuda").to(stored) for shape in shapes)
    return f"{dtype} product {_WIDTH} x {depth} x {_WIDTH}", functools.partial(torch.mm, a, b)


def _rate(amount, call):
    """Return bytes or operations per second of the median call."""
    return f"{amount / statistics.median(times({'': call}, 10)['']):.3e}"


def _copied():
    source = torch.randint(0, 256, (_CEILING_BYTES // 2,), dtype=torch.uint8, device="cuda")
    target = torch.empty_like(source)
    return _rate(_CEILING_BYTES, lambda: target.copy_(source))


def _multiplied(dtype):
    flop = 2 * 8192 * _WIDTH**2
    return _rate(flop, limit(flop, dtype)[1])


def description():
    """The GPU, and what it copies and multiplies in a second: rates that peers are held against."""
    card = torch.cuda.get_device_properties(0)
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high")
    rates = {f"{dtype} FLOP/s": _multiplied(dtype) for dtype in ("tf32", "bfloat16")}
    torch.set_float32_matmul_precision(before)
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    driver = subprocess.run(command, capture_output=True, text=True).stdout.strip()
    return {
        "gpu": card.name,
        "driver": driver,
        "cuda": torch.version.cuda,
        "multiprocessors": card.multi_processor_count,
        "memory GB": round(card.total_memory / 1e9, 1),
        "copied bytes/s": _copied(),
        **rates,
    }
