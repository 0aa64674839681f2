"""The limits: as many multiply-adds as a workload has, between registers; or its bytes, read once.

They are timed in turn with the providers, as one of them. The tile units of AMX are no registers:
on a processor that has them a provider may pass the limit of bfloat16.
"""

import ctypes
import functools
import os
import subprocess
import tempfile
from pathlib import Path

import torch
from torch.utils.flop_counter import FlopCounterMode


@functools.cache
def _library():
    """The functions of peak.cpp, compiled once per process."""
    with tempfile.TemporaryDirectory() as folder:
        library = os.path.join(folder, "peak.so")
        command = "g++ -std=c++20 -O3 -march=native -ffp-contract=fast -shared -fPIC -pthread -o"
        source = str(Path(__file__).with_name("peak.cpp"))
        subprocess.run([*command.split(), library, source], check=True)
        functions = ctypes.CDLL(library)
    functions.peak_run.argtypes = [ctypes.c_int, ctypes.c_double, ctypes.c_int]
    functions.peak_read.argtypes = [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_int64]
    return functions


def limit(flop, dtype, threads):
    """Return name and call of the limit of `flop` operations in a dtype."""
    functions = _library()
    rounded = int(dtype == "bfloat16" and functions.peak_has_bfloat16())
    name = "bfloat16 multiply-adds" if rounded else "float32 multiply-adds"
    return name, functools.partial(functions.peak_run, rounded, flop, threads)


def reading(size):
    """Return a call that reads `size` bytes on one thread, again and again the same ones."""
    memory = torch.zeros(size // 4)
    first, half = memory.data_ptr(), size // 256 * 128
    call = functools.partial(_library().peak_read, first, first + half, half)
    # the call keeps the memory
    call.memory = memory
    return call


def flop(call):
    """Count the operations of the products in a call of plain PyTorch."""
    with FlopCounterMode(display=False) as counter:
        call()
    return counter.get_total_flops()
