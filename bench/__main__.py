"""Run benchmarks: `python -m bench --only KL --threads 1 --out bench/results/NAME.json`."""

import argparse
import json
import os
from importlib import import_module
from pathlib import Path

import torch

from bench import harness

# imported when chosen: environments are stepped without OpenGL, and drawn with it
BENCHES = {
    "KL": "bench.ops.bench_gaussian_kl",
    "envs": "bench.bench_env",
    "render": "bench.bench_render",
    "gemm": "bench.bench_gemm",
}


def main():
    parser = argparse.ArgumentParser(prog="python -m bench", description=__doc__)
    parser.add_argument("--only", default=",".join(BENCHES), help="comma-separated workloads")
    parser.add_argument(
        "--threads", type=int, default=1, help="threads of torch and of the kernels"
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
        for workload in import_module(BENCHES[name]).workloads(args.threads):
            for row in harness.rows(workload, args.threads):
                result["rows"].append(row)
                cells = row["workload"], row["mode"], row["device"], row["provider"]
                print(*cells, f"{row['median_s'] * 1e6:.1f} us", flush=True)
    args.out.parent.mkdir(parents=True, exist_ok=True)
    partial = args.out.with_suffix(".part")
    partial.write_text(json.dumps(result, indent=1) + "\n")
    os.replace(partial, args.out)


if __name__ == "__main__":
    main()
