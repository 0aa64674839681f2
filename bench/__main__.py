"""Run benchmarks: `python -m bench --only KL --threads 1 --out bench/results/NAME.json`."""

import argparse
import gc
import json
import os
from importlib import import_module
from pathlib import Path

import torch

from bench import harness

# imported when chosen: environments are stepped without OpenGL, and drawn with it;
# `module:function`, where a module has several functions that give workloads
BENCHES = {
    "KL": "bench.ops.bench_gaussian_kl",
    "categorical-KL": "bench.ops.bench_categorical_kl",
    "nll": "bench.ops.bench_gaussian_nll",
    "lambda": "bench.ops.bench_lambda_return",
    "mlp": "bench.ops.bench_mlp",
    "envs": "bench.bench_env",
    "render": "bench.bench_render",
    "gemm": "bench.bench_gemm",
    "W1": "bench.ops.bench_rssm_scan:w1",
    "W2": "bench.ops.bench_rssm_scan:w2",
    "W3": "bench.ops.bench_rssm_scan:w3",
    "W3-imagine": "bench.ops.bench_rssm_scan:w3_imagine",
    "DV3": "bench.ops.bench_rssm_scan:dv3",
    "W4": "bench.ops.bench_rssm_scan:w4",
    "W4-2048": "bench.ops.bench_rssm_scan:w4_2048",
    "W5": "bench.ops.bench_rssm_scan:w5",
    "W6": "bench.ops.bench_rssm_scan:w6",
    "W7": "bench.bench_update:pretraining",
    "W8": "bench.bench_update:imitation",
    # `make gpu` chooses among these
    "gpu-losses": "bench.ops.bench_losses_cuda",
    "gpu-W1": "bench.ops.bench_rssm_cuda:w1",
    "gpu-W2": "bench.ops.bench_rssm_cuda:w2",
    "gpu-W3": "bench.ops.bench_rssm_cuda:w3",
    "gpu-W3-imagine": "bench.ops.bench_rssm_cuda:w3_imagine",
    "gpu-DV3": "bench.ops.bench_rssm_cuda:dv3",
    "gpu-W6": "bench.ops.bench_rssm_cuda:w6",
    "gpu-torchrl": "bench.ops.bench_rssm_cuda:torchrl",
    "gpu-batches": "bench.ops.bench_rssm_cuda:batches",
    "gpu-rehearsal": "bench.ops.bench_rssm_cuda:rehearsal",
}


def main():
    parser = argparse.ArgumentParser(prog="python -m bench", description=__doc__)
    on_cpu = [name for name in BENCHES if not name.startswith("gpu-")]
    parser.add_argument("--only", default=",".join(on_cpu), help="comma-separated workloads")
    parser.add_argument(
        "--threads", type=int, default=1, help="threads of torch and of the kernels"
    )
    parser.add_argument(
        "--rounds", type=int, default=harness.ROUNDS, help="at most; two are enough for a look"
    )
    parser.add_argument("--out", type=Path, required=True, help="results file")
    args = parser.parse_args()
    chosen = args.only.split(",")
    if unknown := set(chosen) - set(BENCHES):
        parser.error(f"--only has {sorted(unknown)}, expected some of {sorted(BENCHES)}")
    torch.set_num_threads(args.threads)
    # before the first run: the load that others make, not ours
    result = {"machine": harness.machine(), "rows": []}
    for name in chosen:
        module, _, function = BENCHES[name].partition(":")
        for workload in getattr(import_module(module), function or "workloads")(args.threads):
            for row in harness.rows(workload, args.threads, args.rounds):
                result["rows"].append(row)
                cells = row["workload"], row["mode"], row["device"], row["provider"]
                took = "" if row["median_s"] is None else f"{row['median_s'] * 1e6:.1f} us"
                print(*cells, took, row["note"], flush=True)
            _write(args.out, result)
            # before the next one is made: a thousand environments of each provider are gigabytes
            del workload
            gc.collect()


def _write(path, result):
    """Write after each workload: a run that is cut off leaves what it has."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(".part")
    partial.write_text(json.dumps(result, indent=1) + "\n")
    os.replace(partial, path)


if __name__ == "__main__":
    main()
