"""
Compiled kernels. They trust their arguments; the ops in fastrssm.ops check them.
"""
from __future__ import annotations
import typing
__all__: list[str] = ['cuda_status', 'gaussian_kl_backward', 'gaussian_kl_backward_cuda', 'gaussian_kl_forward', 'gaussian_kl_forward_cuda']
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
