"""Compile Triton kernels for GPUs that are not here, and read what the compiler made of them.

The work is done in a process of its own, since TRITON_INTERPRET must be unset there.
"""

import importlib
import json
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path


def compile_kernels(jobs):
    """Return what each job needs, in its order.

    That is: registers, bytes of stack and of shared memory, bits of the widest load, and how many
    loads are asynchronous. A job is (module, kernel, compute capability, pointers, scalars,
    constants, options); the middle three map parameters to Triton types, types and values, and the
    last, which may be left out, is what the compiler is told. Pointers and integers are promised
    to be multiples of 16, as torch's are: without that promise no load is vectorised.
    """
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    command = [sys.executable, __file__, json.dumps(jobs)]
    run = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    return json.loads(run.stdout)


def _compile(module, kernel, capability, pointers, scalars, constants, options=None):
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    function = getattr(importlib.import_module(module), kernel)
    types = {**pointers, **scalars, **dict.fromkeys(constants, "constexpr")}
    signature = {name: types[name] for name in function.arg_names}
    aligned = {
        (i,): [["tt.divisibility", 16]]
        for i, name in enumerate(function.arg_names)
        if name in pointers or types[name] == "i32"
    }
    compiled = triton.compile(
        ASTSource(fn=function, signature=signature, constexprs=constants, attrs=aligned),
        target=GPUTarget("cuda", capability, 32),
        options=options,
    )
    tools = Path(triton.__file__).parent / "backends/nvidia/bin"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        command = [tools / "cuobjdump", "--dump-resource-usage", file.name]
        usage = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    widths = re.findall(r"ld\.global\S*?\.v(\d)\.b(\d+)", compiled.asm["ptx"])
    return {
        "registers": int(re.search(r"REG:(\d+)", usage)[1]),
        "stack": int(re.search(r"STACK:(\d+)", usage)[1]),
        "shared": compiled.metadata.shared,
        "asynchronous": compiled.asm["ptx"].count("cp.async.c"),
        "load_bits": max((int(n) * int(bits) for n, bits in widths), default=0),
    }


if __name__ == "__main__":
    print(json.dumps([_compile(*job) for job in json.loads(sys.argv[1])]))
