"""The losses compiled for GPUs that are not here: registers, spills, width of loads."""

import pytest

from tests.ahead_of_time import compile_kernels

CATEGORICAL = {"BLOCK_N": 1, "BLOCK_G": 32, "BLOCK_K": 32}
NLL = {"BLOCK_N": 8, "BLOCK_S": 128}
RETURNS = {"BLOCK_B": 128, "AHEAD": 6}
# tensors of the op's dtype, tensors of float32, integers, other numbers, constants
KERNELS = {
    "categorical_kl_forward_kernel": (
        "post_logits prior_logits", "kl", "N G K", "unimix",
        [CATEGORICAL | {"MIXED": mixed} for mixed in (False, True)],
    ),
    "categorical_kl_backward_kernel": (
        "post_logits prior_logits post_grad prior_grad", "grad kl", "N G K",
        "unimix post_scale prior_scale free_nats",
        [CATEGORICAL | {"MIXED": mixed} for mixed in (False, True)],
    ),
    "gaussian_nll_forward_kernel": (
        "target mean std mask", "nll", "N S", "constant",
        [NLL | {"HAS_STD": True, "WEIGHT_BY_STD": True, "MASK": 2}],
    ),
    "gaussian_nll_backward_kernel": (
        "target mean std mask mean_grad std_grad", "grad", "N S", "",
        [NLL | {"HAS_STD": True, "WEIGHT_BY_STD": True, "MASK": 2}],
    ),
    "lambda_return_forward_kernel": (
        "rewards next_values discounts", "returns", "N T B", "discount lambda_",
        [RETURNS | {"HAS_DISCOUNTS": has} for has in (False, True)],
    ),
    "lambda_return_backward_kernel": (
        "next_values discounts rewards_grad next_values_grad discounts_grad", "grad returns",
        "N T B", "discount lambda_", [RETURNS | {"HAS_DISCOUNTS": has} for has in (False, True)],
    ),
}  # fmt: skip
SHARED = {80: 163 * 1024, 90: 227 * 1024}
# seconds matter: one of the two for the older
DTYPES = {80: ["fp32"], 90: ["fp32", "bf16"]}


def jobs(capability):
    for kernel, (same, wide, integers, numbers, constants) in KERNELS.items():
        for constant in constants:
            for dtype in DTYPES[capability]:
                pointers = dict.fromkeys(same.split(), f"*{dtype}")
                pointers |= dict.fromkeys(wide.split(), "*fp32")
                scalars = dict.fromkeys(integers.split(), "i32")
                scalars |= dict.fromkeys(numbers.split(), "fp32")
                module = "fastrssm.kernels." + kernel.rsplit("_", 2)[0]
                options = {"num_warps": 1 if "lambda" in kernel else 4}
                yield module, kernel, capability, pointers, scalars, constant, options


@pytest.mark.parametrize("capability", DTYPES)
def test_kernels_compile_without_spills(capability):
    asked = list(jobs(capability))
    for job, found in zip(asked, compile_kernels(asked), strict=True):
        assert found["stack"] == 0, job
        assert found["registers"] <= 255, job
        assert found["shared"] <= SHARED[capability], job
        # the scan loads ahead, past its registers
        ahead = "lambda" in job[1]
        assert found["load_bits"] >= 64 or ahead, job
        assert found["asynchronous"] > 0 or not ahead, job
