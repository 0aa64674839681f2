"""All that a machine with an NVIDIA GPU can tell, in one file and ten minutes: `make gpu`.

Only the standard library is needed to start it, and no network: it looks for a Python with torch
and CUDA, builds the native module where its tools are there, and runs tests and benchmarks with
what there is. After each piece the result is written, so that a run cut off leaves what it has.
"""

import argparse
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
SITE = ROOT / "build/gpu"
# seconds of the whole, and of each piece at most
LIMIT = 570
BUILD, TESTS, SANITIZER = 120, 150, 40
BENCHES = {
    "gpu-losses": 80,
    "gpu-W1": 140,
    "gpu-batches": 100,
    "gpu-W3": 80,
    "gpu-DV3": 110,
    "gpu-W2": 80,
    "gpu-W6": 60,
    "gpu-W3-imagine": 60,
    "gpu-torchrl": 120,
}
PIECES = ("tests", "gpu-losses", "gpu-W1", "gpu-batches", "sanitizer", *list(BENCHES)[3:])
# what the build needs, and what makes the tests faster
MODULES = ("triton", "pytest", "pybind11", "scikit_build_core", "xdist", "torchrl")
PROBE = f"""
import importlib.util, json, platform
found = {{name: importlib.util.find_spec(name) is not None for name in {MODULES}}}
found["python"] = platform.python_version()
try:
    import torch
    found["torch"], gpu = torch.__version__, torch.cuda.is_available()
    found["gpu"] = torch.cuda.get_device_name() if gpu else None
except ImportError:
    found["torch"] = found["gpu"] = None
print(json.dumps(found))
"""
STATUS = "import fastrssm._native as n; print(n.__file__); print(n.cuda_status() or 'ready')"
MACHINE = "import json; from bench import harness; print(json.dumps(harness.machine()))"


class Run:
    """One run: the Python it found, the time that is left, and what is known so far."""

    def __init__(self, args):
        self.dry, self.started = args.dry, time.monotonic()
        self.limit, self.out = args.limit, args.out
        self.environment = {**os.environ, "PYTHONUNBUFFERED": "1", "OMP_NUM_THREADS": "1"}
        self.result = {"machine": {}, "pieces": [], "tests": {}, "rows": []}
        self.python, self.has = self._find_python()

    def _find_python(self):
        """The first Python with torch that sees a GPU; in a dry run with torch."""
        candidates = (sys.executable, ROOT / ".venv/bin/python", *map(shutil.which, _NAMES))
        seen = []
        for candidate in dict.fromkeys(str(c) for c in candidates if c and Path(c).exists()):
            run = subprocess.run([candidate, "-c", PROBE], capture_output=True, text=True)
            if run.returncode:
                seen.append(f"{candidate}: {tail(run.stderr, 1)}")
                continue
            has = json.loads(run.stdout.splitlines()[-1])
            if has["torch"] and (has["gpu"] or self.dry):
                print(f"{candidate}: {has}", flush=True)
                return candidate, has
            missing = "no GPU that it sees" if has["torch"] else "no torch"
            seen.append(f"{candidate} (Python {has['python']}): {missing}")
        raise SystemExit("no Python with torch and a GPU:\n" + "\n".join(seen))

    def left(self):
        return self.limit - (time.monotonic() - self.started)

    def call(self, command, limit, **environment):
        """Run a command for at most so long; return how it ended, and all it printed."""
        limit = min(limit, self.left())
        process = subprocess.Popen(
            [str(word) for word in command], cwd=ROOT, env=self.environment | environment,
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True,
        )  # fmt: skip
        try:
            printed, _ = process.communicate(timeout=max(limit, 1))
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            printed, _ = process.communicate()
            return f"cut off after {limit:.0f} s", printed
        return "done" if process.returncode == 0 else f"exit code {process.returncode}", printed

    def note(self, name, status, started, **more):
        """Keep what became of a piece, and write the file."""
        seconds = round(time.monotonic() - started, 1)
        self.result["pieces"].append({"piece": name, "status": status, "seconds": seconds, **more})
        print(f"{name}: {status}, {seconds} s", more.get("note", ""), flush=True)
        self.write()

    def write(self):
        folders = [self.out.parent]
        if os.environ.get("OUT") and not self.dry:
            folders.append(Path(os.environ["OUT"]))
        for folder in folders:
            folder.mkdir(parents=True, exist_ok=True)
            partial = folder / f"{self.out.name}.part"
            partial.write_text(json.dumps(self.result, indent=1) + "\n")
            os.replace(partial, folder / self.out.name)


_NAMES = ("python3", "python")


def tail(printed, lines=15):
    return "\n".join(printed.strip().splitlines()[-lines:])


def tool(name):
    """Path of a tool of CUDA, which need not be on the PATH."""
    beside = Path(os.environ.get("CUDA_HOME", "/usr/local/cuda")) / "bin" / name
    return shutil.which(name) or (str(beside) if beside.exists() else None)


def build(run):
    """Put our sources on the path, with the native module where it can be built."""
    started, sources = time.monotonic(), f"{ROOT / 'python'}:{ROOT}"
    status, printed = ("dry", "") if run.dry else run.call([run.python, "-c", STATUS], 60)
    if status == "done" and printed.splitlines()[-1] == "ready":
        run.note("build", "the installed module is taken", started, note=printed.splitlines()[-2])
        return
    missing = [name for name in ("pybind11", "scikit_build_core") if not run.has[name]]
    missing += [name for name in ("nvcc", "cmake", "g++") if not tool(name)]
    command = [run.python, "-m", "pip", "install", "--quiet", "--no-index", "--no-deps"]
    command += ["--no-build-isolation", "--upgrade", "--target", SITE]
    command += ["-Ccmake.define.FASTRSSM_CUDA=ON", "."]
    if missing or run.dry:
        run.environment["PYTHONPATH"] = sources
        note = f"missing: {', '.join(missing)}" if missing else "all it needs is there"
        run.note("build", "not built: reference and Triton alone", started, note=note)
        return
    status, printed = run.call(command, BUILD, CUDACXX=tool("nvcc"))
    run.environment["PYTHONPATH"] = f"{SITE}:{ROOT}" if status == "done" else sources
    _, said = run.call([run.python, "-c", STATUS], 60)
    run.note("build", status, started, note=tail(said if status == "done" else printed))


def describe(run):
    started = time.monotonic()
    status, printed = run.call([run.python, "-c", MACHINE], 60)
    if status == "done":
        run.result["machine"] = json.loads(printed.splitlines()[-1]) | {"python": run.has["python"]}
    run.note("machine", status, started, note="" if status == "done" else tail(printed))


def gpu_tests():
    """Files with tests that are marked."""
    files = sorted((ROOT / "tests").rglob("test_*.py"))
    return [path.relative_to(ROOT) for path in files if "mark.cuda" in path.read_text()]


def tests(run):
    started, outcomes = time.monotonic(), run.out.with_suffix(".tests")
    outcomes.parent.mkdir(parents=True, exist_ok=True)
    outcomes.write_text("")
    command = [run.python, "-m", "pytest", "-q", "-m", "cuda", "-p", "bench.outcomes"]
    command += ["--collect-only"] if run.dry else []
    # most of the time is the compiler's, on one core for each kernel
    workers = max(1, (os.cpu_count() or 1) - 2)
    command += ["-n", str(workers)] if run.has["xdist"] and not run.dry else []
    status, printed = run.call([*command, *gpu_tests()], TESTS, FASTRSSM_OUTCOMES=str(outcomes))
    lines = [json.loads(line) for line in outcomes.read_text().splitlines()]
    outcomes.unlink()
    failures = [line for line in lines if line["outcome"] == "failed"]
    counted = dict(Counter(line["outcome"] for line in lines))
    run.result["tests"] = {**counted, "failures": failures}
    run.note("tests", status, started, note=tail(printed, 1 if status == "done" else 15))


def sanitizer(run):
    """Memory errors and races of every kernel at small, ragged sizes."""
    started, checker = time.monotonic(), tool("compute-sanitizer")
    if checker is None or run.dry:
        reason = "left out: a dry run" if run.dry else "left out: no compute-sanitizer"
        run.note("sanitizer", reason, started)
        return
    # a graph cannot be captured without the cache of allocations
    chosen = ["-m", "cuda", "-k", "bit_for_bit and not replay", *gpu_tests()]
    for name in ("memcheck", "racecheck"):
        started = time.monotonic()
        command = [checker, "--tool", name, "--error-exitcode", "9", "--target-processes", "all"]
        status, printed = run.call(
            [*command, run.python, "-m", "pytest", "-q", *chosen],
            SANITIZER,
            # else one allocation of torch's would hide what is next to a tensor
            PYTORCH_NO_CUDA_MEMORY_CACHING="1",
        )
        found = re.findall(r"(?:ERROR|RACECHECK) SUMMARY: .*", printed)
        run.note(f"sanitizer {name}", status, started, note="; ".join(found) or tail(printed, 5))


def bench(run, name):
    started, part = time.monotonic(), run.out.with_suffix(f".{name}")
    rounds = ["--rounds", "2"] if run.dry else ["--rounds", "50"]
    command = [run.python, "-m", "bench", "--only", name, *rounds, "--out", part]
    status, printed = run.call(command, BENCHES.get(name, 60))
    if part.exists():
        found = json.loads(part.read_text())
        run.result["rows"] += found["rows"]
        run.result["machine"] = run.result["machine"] or found["machine"]
        part.unlink()
    run.note(name, status, started, note="" if status == "done" else tail(printed))


def pieces(run, chosen):
    for name in chosen:
        if run.left() < 10:
            run.note(name, "left out: no time", time.monotonic())
        elif name == "tests":
            tests(run)
        elif name == "sanitizer":
            sanitizer(run)
        elif name == "gpu-torchrl" and not run.has["torchrl"]:
            run.note(name, "left out: torchrl is not installed", time.monotonic())
        else:
            bench(run, name)


def main():
    parser = argparse.ArgumentParser(prog="python -m bench.gpu", description=__doc__)
    parser.add_argument("--dry", action="store_true", help="everything but what needs the GPU")
    parser.add_argument("--only", default=",".join(PIECES), help="comma-separated pieces")
    parser.add_argument("--limit", type=float, default=LIMIT, help="seconds in all")
    parser.add_argument("--out", type=Path, help="results file; named after the GPU if not given")
    args = parser.parse_args()
    chosen = args.only.split(",")
    if unknown := set(chosen) - set(PIECES):
        parser.error(f"--only has {sorted(unknown)}, expected some of {list(PIECES)}")
    run = Run(args)
    if run.out is None:
        gpu = re.sub(r"\W+", "-", run.has["gpu"] or "dry").lower()
        name = gpu if chosen == list(PIECES) else "-".join([gpu, *chosen])
        run.out = ROOT / ("build" if run.dry else "bench/results") / f"{name}.json"
    build(run)
    if not run.dry:
        describe(run)
    pieces(run, ("tests", "sanitizer", "gpu-rehearsal") if run.dry else chosen)
    failed = run.result["tests"].get("failures", [])
    for line in failed:
        print(f"FAILED {line['test']}: {line['message']}")
    print(run.out)
    broken = [p for p in run.result["pieces"] if p["status"].startswith("exit")]
    return 1 if failed or broken else 0


if __name__ == "__main__":
    sys.exit(main())
