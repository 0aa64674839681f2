"""
Compiled kernels. They trust their arguments; the ops in fastrssm.ops check them.
"""
from __future__ import annotations
import collections.abc
import typing
__all__: list[str] = ['Memory', 'PackedNet', 'RssmStep', 'categorical_kl_backward', 'categorical_kl_forward', 'cuda_status', 'gaussian_kl_backward', 'gaussian_kl_backward_cuda', 'gaussian_kl_forward', 'gaussian_kl_forward_cuda', 'gaussian_nll_backward', 'gaussian_nll_forward', 'gemm_add_outer_products', 'gemm_bytes', 'gemm_isa', 'gemm_isas', 'gemm_multiply', 'gemm_pack_weights', 'lambda_return_backward', 'lambda_return_forward', 'mlp_backward', 'mlp_forward', 'mlp_saved_numel', 'rssm_cluster_count', 'rssm_cluster_pack', 'rssm_cluster_refusal', 'rssm_cluster_run', 'rssm_cluster_sizes', 'rssm_scan_backward', 'rssm_scan_forward', 'rssm_scan_pack', 'rssm_scan_packed_bytes', 'rssm_scan_saved_numel']
class Memory:
    """
    Memory that goes back to a small pool when the last view of it is gone.
    """
    def __init__(self, bytes: typing.SupportsInt | typing.SupportsIndex) -> None:
        ...
class PackedNet:
    """
    A float32 network with ELU between its layers.
    """
    def __init__(self, precision: str, in_size: typing.SupportsInt | typing.SupportsIndex, out_sizes: collections.abc.Sequence[typing.SupportsInt | typing.SupportsIndex], weights: collections.abc.Sequence[typing.SupportsInt | typing.SupportsIndex], biases: collections.abc.Sequence[typing.SupportsInt | typing.SupportsIndex]) -> None:
        ...
    def run(self, threads: typing.SupportsInt | typing.SupportsIndex, B: typing.SupportsInt | typing.SupportsIndex, x: typing.SupportsInt | typing.SupportsIndex, y: typing.SupportsInt | typing.SupportsIndex) -> None:
        ...
class RssmStep:
    """
    One step of rssm_observe of float32 rows, for acting.
    """
    def __init__(self, precision: str, layout: collections.abc.Sequence[typing.SupportsInt | typing.SupportsIndex], constants: collections.abc.Sequence[typing.SupportsFloat | typing.SupportsIndex], weights: collections.abc.Sequence[typing.SupportsInt | typing.SupportsIndex], packed: typing.SupportsInt | typing.SupportsIndex, embed_weight: typing.SupportsInt | typing.SupportsIndex, embed_ld: typing.SupportsInt | typing.SupportsIndex, embed_size: typing.SupportsInt | typing.SupportsIndex, embed_bias: typing.SupportsInt | typing.SupportsIndex) -> None:
        ...
    def run(self, threads: typing.SupportsInt | typing.SupportsIndex, B: typing.SupportsInt | typing.SupportsIndex, embed: typing.SupportsInt | typing.SupportsIndex, action: typing.SupportsInt | typing.SupportsIndex, noise: typing.SupportsInt | typing.SupportsIndex, is_first: typing.SupportsInt | typing.SupportsIndex, deter: typing.SupportsInt | typing.SupportsIndex, stoch: typing.SupportsInt | typing.SupportsIndex, next_deter: typing.SupportsInt | typing.SupportsIndex, next_stoch: typing.SupportsInt | typing.SupportsIndex) -> None:
        ...
def categorical_kl_backward(threads: typing.SupportsInt | typing.SupportsIndex, dtype: str, N: typing.SupportsInt | typing.SupportsIndex, G: typing.SupportsInt | typing.SupportsIndex, K: typing.SupportsInt | typing.SupportsIndex, grad: typing.SupportsInt | typing.SupportsIndex, post_logits: typing.SupportsInt | typing.SupportsIndex, prior_logits: typing.SupportsInt | typing.SupportsIndex, kl: typing.SupportsInt | typing.SupportsIndex, statistics: typing.SupportsInt | typing.SupportsIndex, post_grad: typing.SupportsInt | typing.SupportsIndex, prior_grad: typing.SupportsInt | typing.SupportsIndex, unimix: typing.SupportsFloat | typing.SupportsIndex, post_scale: typing.SupportsFloat | typing.SupportsIndex, prior_scale: typing.SupportsFloat | typing.SupportsIndex, free_nats: typing.SupportsFloat | typing.SupportsIndex) -> None:
    ...
def categorical_kl_forward(threads: typing.SupportsInt | typing.SupportsIndex, dtype: str, N: typing.SupportsInt | typing.SupportsIndex, G: typing.SupportsInt | typing.SupportsIndex, K: typing.SupportsInt | typing.SupportsIndex, post_logits: typing.SupportsInt | typing.SupportsIndex, prior_logits: typing.SupportsInt | typing.SupportsIndex, kl: typing.SupportsInt | typing.SupportsIndex, statistics: typing.SupportsInt | typing.SupportsIndex, unimix: typing.SupportsFloat | typing.SupportsIndex) -> None:
    ...
def cuda_status() -> str:
    """
    Empty when CUDA kernels can run, else the reason why not.
    """
def gaussian_kl_backward(threads: typing.SupportsInt | typing.SupportsIndex, dtype: str, N: typing.SupportsInt | typing.SupportsIndex, S: typing.SupportsInt | typing.SupportsIndex, grad: typing.SupportsInt | typing.SupportsIndex, kl: typing.SupportsInt | typing.SupportsIndex, post_mean: typing.SupportsInt | typing.SupportsIndex, post_std: typing.SupportsInt | typing.SupportsIndex, prior_mean: typing.SupportsInt | typing.SupportsIndex, prior_std: typing.SupportsInt | typing.SupportsIndex, post_mean_grad: typing.SupportsInt | typing.SupportsIndex, post_std_grad: typing.SupportsInt | typing.SupportsIndex, prior_mean_grad: typing.SupportsInt | typing.SupportsIndex, prior_std_grad: typing.SupportsInt | typing.SupportsIndex, post_scale: typing.SupportsFloat | typing.SupportsIndex, prior_scale: typing.SupportsFloat | typing.SupportsIndex, free_nats: typing.SupportsFloat | typing.SupportsIndex) -> None:
    ...
def gaussian_kl_backward_cuda(stream: typing.SupportsInt | typing.SupportsIndex, dtype: str, N: typing.SupportsInt | typing.SupportsIndex, S: typing.SupportsInt | typing.SupportsIndex, grad: typing.SupportsInt | typing.SupportsIndex, kl: typing.SupportsInt | typing.SupportsIndex, post_mean: typing.SupportsInt | typing.SupportsIndex, post_std: typing.SupportsInt | typing.SupportsIndex, prior_mean: typing.SupportsInt | typing.SupportsIndex, prior_std: typing.SupportsInt | typing.SupportsIndex, post_mean_grad: typing.SupportsInt | typing.SupportsIndex, post_std_grad: typing.SupportsInt | typing.SupportsIndex, prior_mean_grad: typing.SupportsInt | typing.SupportsIndex, prior_std_grad: typing.SupportsInt | typing.SupportsIndex, post_scale: typing.SupportsFloat | typing.SupportsIndex, prior_scale: typing.SupportsFloat | typing.SupportsIndex, free_nats: typing.SupportsFloat | typing.SupportsIndex) -> None:
    ...
def gaussian_kl_forward(threads: typing.SupportsInt | typing.SupportsIndex, dtype: str, N: typing.SupportsInt | typing.SupportsIndex, S: typing.SupportsInt | typing.SupportsIndex, post_mean: typing.SupportsInt | typing.SupportsIndex, post_std: typing.SupportsInt | typing.SupportsIndex, prior_mean: typing.SupportsInt | typing.SupportsIndex, prior_std: typing.SupportsInt | typing.SupportsIndex, kl: typing.SupportsInt | typing.SupportsIndex) -> None:
    ...
def gaussian_kl_forward_cuda(stream: typing.SupportsInt | typing.SupportsIndex, dtype: str, N: typing.SupportsInt | typing.SupportsIndex, S: typing.SupportsInt | typing.SupportsIndex, post_mean: typing.SupportsInt | typing.SupportsIndex, post_std: typing.SupportsInt | typing.SupportsIndex, prior_mean: typing.SupportsInt | typing.SupportsIndex, prior_std: typing.SupportsInt | typing.SupportsIndex, kl: typing.SupportsInt | typing.SupportsIndex) -> None:
    ...
def gaussian_nll_backward(threads: typing.SupportsInt | typing.SupportsIndex, dtype: str, N: typing.SupportsInt | typing.SupportsIndex, S: typing.SupportsInt | typing.SupportsIndex, mask_width: typing.SupportsInt | typing.SupportsIndex, grad: typing.SupportsInt | typing.SupportsIndex, target: typing.SupportsInt | typing.SupportsIndex, mean: typing.SupportsInt | typing.SupportsIndex, std: typing.SupportsInt | typing.SupportsIndex, mask: typing.SupportsInt | typing.SupportsIndex, mean_grad: typing.SupportsInt | typing.SupportsIndex, std_grad: typing.SupportsInt | typing.SupportsIndex, weight_by_std: bool) -> None:
    ...
def gaussian_nll_forward(threads: typing.SupportsInt | typing.SupportsIndex, dtype: str, N: typing.SupportsInt | typing.SupportsIndex, S: typing.SupportsInt | typing.SupportsIndex, mask_width: typing.SupportsInt | typing.SupportsIndex, target: typing.SupportsInt | typing.SupportsIndex, mean: typing.SupportsInt | typing.SupportsIndex, std: typing.SupportsInt | typing.SupportsIndex, mask: typing.SupportsInt | typing.SupportsIndex, nll: typing.SupportsInt | typing.SupportsIndex, constant: typing.SupportsFloat | typing.SupportsIndex, weight_by_std: bool) -> None:
    ...
def gemm_add_outer_products(dtype: str, precision: str, isa: str, dy: typing.SupportsInt | typing.SupportsIndex, ldy: typing.SupportsInt | typing.SupportsIndex, x: typing.SupportsInt | typing.SupportsIndex, ldx: typing.SupportsInt | typing.SupportsIndex, R: typing.SupportsInt | typing.SupportsIndex, N: typing.SupportsInt | typing.SupportsIndex, K: typing.SupportsInt | typing.SupportsIndex, dw: typing.SupportsInt | typing.SupportsIndex, ldw: typing.SupportsInt | typing.SupportsIndex, workspace: typing.SupportsInt | typing.SupportsIndex, threads: typing.SupportsInt | typing.SupportsIndex) -> None:
    ...
def gemm_bytes(dtype: str, precision: str, isa: str, M: typing.SupportsInt | typing.SupportsIndex, N: typing.SupportsInt | typing.SupportsIndex, K: typing.SupportsInt | typing.SupportsIndex, threads: typing.SupportsInt | typing.SupportsIndex) -> tuple[int, int, int]:
    """
    Memory of packed weights [N, K], packed rows [M, K] and add_outer_products.
    """
def gemm_isa() -> str:
    """
    The instruction set that the scans use; FASTRSSM_ISA lowers it.
    """
def gemm_isas() -> list[str]:
    """
    Instruction sets whose products run on this processor.
    """
def gemm_multiply(dtype: str, precision: str, isa: str, first: typing.SupportsInt | typing.SupportsIndex, first_ld: typing.SupportsInt | typing.SupportsIndex, first_K: typing.SupportsInt | typing.SupportsIndex, second: typing.SupportsInt | typing.SupportsIndex, second_ld: typing.SupportsInt | typing.SupportsIndex, second_K: typing.SupportsInt | typing.SupportsIndex, rows: typing.SupportsInt | typing.SupportsIndex, weights: typing.SupportsInt | typing.SupportsIndex, M: typing.SupportsInt | typing.SupportsIndex, N: typing.SupportsInt | typing.SupportsIndex, c: typing.SupportsInt | typing.SupportsIndex, ldc: typing.SupportsInt | typing.SupportsIndex, accumulate: bool) -> None:
    """
    c = or += [first | second] W^T, rows packed into `rows` before.
    """
def gemm_pack_weights(dtype: str, precision: str, isa: str, w: typing.SupportsInt | typing.SupportsIndex, stride_n: typing.SupportsInt | typing.SupportsIndex, stride_k: typing.SupportsInt | typing.SupportsIndex, N: typing.SupportsInt | typing.SupportsIndex, K: typing.SupportsInt | typing.SupportsIndex, packed: typing.SupportsInt | typing.SupportsIndex) -> None:
    ...
def lambda_return_backward(threads: typing.SupportsInt | typing.SupportsIndex, dtype: str, N: typing.SupportsInt | typing.SupportsIndex, T: typing.SupportsInt | typing.SupportsIndex, B: typing.SupportsInt | typing.SupportsIndex, grad: typing.SupportsInt | typing.SupportsIndex, returns: typing.SupportsInt | typing.SupportsIndex, next_values: typing.SupportsInt | typing.SupportsIndex, discounts: typing.SupportsInt | typing.SupportsIndex, rewards_grad: typing.SupportsInt | typing.SupportsIndex, values_grad: typing.SupportsInt | typing.SupportsIndex, discounts_grad: typing.SupportsInt | typing.SupportsIndex, discount: typing.SupportsFloat | typing.SupportsIndex, lambda_: typing.SupportsFloat | typing.SupportsIndex) -> None:
    ...
def lambda_return_forward(threads: typing.SupportsInt | typing.SupportsIndex, dtype: str, N: typing.SupportsInt | typing.SupportsIndex, T: typing.SupportsInt | typing.SupportsIndex, B: typing.SupportsInt | typing.SupportsIndex, rewards: typing.SupportsInt | typing.SupportsIndex, next_values: typing.SupportsInt | typing.SupportsIndex, discounts: typing.SupportsInt | typing.SupportsIndex, returns: typing.SupportsInt | typing.SupportsIndex, discount: typing.SupportsFloat | typing.SupportsIndex, lambda_: typing.SupportsFloat | typing.SupportsIndex) -> None:
    ...
def mlp_backward(threads: typing.SupportsInt | typing.SupportsIndex, dtype: str, precision: str, layout: collections.abc.Sequence[typing.SupportsInt | typing.SupportsIndex], x: typing.SupportsInt | typing.SupportsIndex, weights: collections.abc.Sequence[typing.SupportsInt | typing.SupportsIndex], results: typing.SupportsInt | typing.SupportsIndex, saved: typing.SupportsInt | typing.SupportsIndex, grad: typing.SupportsInt | typing.SupportsIndex, x_grad: typing.SupportsInt | typing.SupportsIndex, weight_grads: collections.abc.Sequence[typing.SupportsInt | typing.SupportsIndex]) -> None:
    ...
def mlp_forward(threads: typing.SupportsInt | typing.SupportsIndex, dtype: str, precision: str, layout: collections.abc.Sequence[typing.SupportsInt | typing.SupportsIndex], x: typing.SupportsInt | typing.SupportsIndex, weights: collections.abc.Sequence[typing.SupportsInt | typing.SupportsIndex], results: typing.SupportsInt | typing.SupportsIndex, saved: typing.SupportsInt | typing.SupportsIndex) -> None:
    ...
def mlp_saved_numel(layout: collections.abc.Sequence[typing.SupportsInt | typing.SupportsIndex]) -> int:
    ...
def rssm_cluster_count(device: typing.SupportsInt | typing.SupportsIndex, layout: collections.abc.Sequence[typing.SupportsInt | typing.SupportsIndex], backward: bool, ranks: typing.SupportsInt | typing.SupportsIndex, rows: typing.SupportsInt | typing.SupportsIndex) -> int:
    """
    How many clusters the device runs at once.
    """
def rssm_cluster_pack(stream: typing.SupportsInt | typing.SupportsIndex, layout: collections.abc.Sequence[typing.SupportsInt | typing.SupportsIndex], backward: bool, ranks: typing.SupportsInt | typing.SupportsIndex, rows: typing.SupportsInt | typing.SupportsIndex, layers: collections.abc.Sequence[typing.SupportsInt | typing.SupportsIndex], packed: typing.SupportsInt | typing.SupportsIndex) -> None:
    ...
def rssm_cluster_refusal(layout: collections.abc.Sequence[typing.SupportsInt | typing.SupportsIndex], backward: bool, ranks: typing.SupportsInt | typing.SupportsIndex, rows: typing.SupportsInt | typing.SupportsIndex) -> str:
    """
    Why a cluster cannot hold a scan; empty when it can.
    """
def rssm_cluster_run(stream: typing.SupportsInt | typing.SupportsIndex, layout: collections.abc.Sequence[typing.SupportsInt | typing.SupportsIndex], backward: bool, ranks: typing.SupportsInt | typing.SupportsIndex, rows: typing.SupportsInt | typing.SupportsIndex, clusters: typing.SupportsInt | typing.SupportsIndex, constants: typing.Annotated[collections.abc.Sequence[typing.SupportsFloat | typing.SupportsIndex], "FixedSize(3)"], learns: bool, tensors: collections.abc.Sequence[typing.SupportsInt | typing.SupportsIndex]) -> None:
    ...
def rssm_cluster_sizes(layout: collections.abc.Sequence[typing.SupportsInt | typing.SupportsIndex], backward: bool, ranks: typing.SupportsInt | typing.SupportsIndex, rows: typing.SupportsInt | typing.SupportsIndex) -> list[int]:
    """
    Bytes of packed weights, numbers a row kept, and of gradients.
    """
def rssm_scan_backward(threads: typing.SupportsInt | typing.SupportsIndex, dtype: str, precision: str, layout: collections.abc.Sequence[typing.SupportsInt | typing.SupportsIndex], constants: collections.abc.Sequence[typing.SupportsFloat | typing.SupportsIndex], inputs: collections.abc.Sequence[typing.SupportsInt | typing.SupportsIndex], weights: collections.abc.Sequence[typing.SupportsInt | typing.SupportsIndex], packed_transposed: typing.SupportsInt | typing.SupportsIndex, outputs: collections.abc.Sequence[typing.SupportsInt | typing.SupportsIndex], output_grads: collections.abc.Sequence[typing.SupportsInt | typing.SupportsIndex], input_grads: collections.abc.Sequence[typing.SupportsInt | typing.SupportsIndex], weight_grads: collections.abc.Sequence[typing.SupportsInt | typing.SupportsIndex]) -> None:
    ...
def rssm_scan_forward(threads: typing.SupportsInt | typing.SupportsIndex, dtype: str, precision: str, layout: collections.abc.Sequence[typing.SupportsInt | typing.SupportsIndex], constants: collections.abc.Sequence[typing.SupportsFloat | typing.SupportsIndex], inputs: collections.abc.Sequence[typing.SupportsInt | typing.SupportsIndex], weights: collections.abc.Sequence[typing.SupportsInt | typing.SupportsIndex], packed: typing.SupportsInt | typing.SupportsIndex, outputs: collections.abc.Sequence[typing.SupportsInt | typing.SupportsIndex]) -> None:
    ...
def rssm_scan_pack(threads: typing.SupportsInt | typing.SupportsIndex, dtype: str, precision: str, layout: collections.abc.Sequence[typing.SupportsInt | typing.SupportsIndex], weights: collections.abc.Sequence[typing.SupportsInt | typing.SupportsIndex], transposed: bool, packed: typing.SupportsInt | typing.SupportsIndex) -> None:
    ...
def rssm_scan_packed_bytes(dtype: str, precision: str, layout: collections.abc.Sequence[typing.SupportsInt | typing.SupportsIndex], transposed: bool) -> int:
    ...
def rssm_scan_saved_numel(layout: collections.abc.Sequence[typing.SupportsInt | typing.SupportsIndex]) -> int:
    ...
