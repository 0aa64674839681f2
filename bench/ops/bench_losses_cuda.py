"""The losses and the returns on a GPU: what fills it, then what a small batch needs."""

from bench.ops import bench_categorical_kl, bench_gaussian_kl, bench_gaussian_nll
from bench.ops import bench_lambda_return as bench_returns
from bench.ops.calls import MODES
from tests.op_cases import (
    CATEGORICAL_KL_BENCH,
    GAUSSIAN_KL_BENCH,
    GAUSSIAN_NLL_BENCH,
    LAMBDA_RETURN_BENCH,
    CategoricalKLCase,
    GaussianKLCase,
    GaussianNLLCase,
    LambdaReturnCase,
)

# about 400 MB of inputs, which no cache holds; returns are never as large
LARGE = (
    (bench_gaussian_kl, GaussianKLCase("[819200, 30]", (819200, 30))),
    (
        bench_categorical_kl,
        CategoricalKLCase("[51200, 32, 32], unimix 0.01", (51200, 32, 32), 0.01),
    ),
    (bench_gaussian_nll, GaussianNLLCase("[65536, 512], weighted", (65536, 512), True, True)),
    (bench_returns, LambdaReturnCase("[15, 16384]", (15, 16384))),
)
SMALL = (
    (bench_gaussian_kl, GAUSSIAN_KL_BENCH[1]),
    (bench_categorical_kl, CATEGORICAL_KL_BENCH[1]),
    (bench_gaussian_nll, GAUSSIAN_NLL_BENCH[1]),
    (bench_returns, LAMBDA_RETURN_BENCH[0]),
)


def workloads(threads):
    for module, case in LARGE + SMALL:
        for mode in MODES:
            yield module.workload(case, mode, "cuda")
