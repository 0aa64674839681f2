"""
Compiled kernels of fastrssm. The ops in fastrssm.ops check what they pass here.
"""
from __future__ import annotations
import numpy
import numpy.typing
import typing
__all__: list[str] = ['cuda_status', 'gaussian_kl_backward', 'gaussian_kl_backward_cuda', 'gaussian_kl_forward', 'gaussian_kl_forward_cuda']
def cuda_status() -> str:
    """
    Empty when CUDA kernels can run, else the reason why not.
    """
@typing.overload
def gaussian_kl_backward(grad: numpy.typing.NDArray[numpy.float32], kl: numpy.typing.NDArray[numpy.float32], post_mean: numpy.typing.NDArray[numpy.float32], post_std: numpy.typing.NDArray[numpy.float32], prior_mean: numpy.typing.NDArray[numpy.float32], prior_std: numpy.typing.NDArray[numpy.float32], post_mean_grad: numpy.typing.NDArray[numpy.float32], post_std_grad: numpy.typing.NDArray[numpy.float32], prior_mean_grad: numpy.typing.NDArray[numpy.float32], prior_std_grad: numpy.typing.NDArray[numpy.float32], post_scale: typing.SupportsFloat | typing.SupportsIndex, prior_scale: typing.SupportsFloat | typing.SupportsIndex, free_nats: typing.SupportsFloat | typing.SupportsIndex, threads: typing.SupportsInt | typing.SupportsIndex) -> None:
    ...
@typing.overload
def gaussian_kl_backward(grad: numpy.typing.NDArray[numpy.float64], kl: numpy.typing.NDArray[numpy.float64], post_mean: numpy.typing.NDArray[numpy.float64], post_std: numpy.typing.NDArray[numpy.float64], prior_mean: numpy.typing.NDArray[numpy.float64], prior_std: numpy.typing.NDArray[numpy.float64], post_mean_grad: numpy.typing.NDArray[numpy.float64], post_std_grad: numpy.typing.NDArray[numpy.float64], prior_mean_grad: numpy.typing.NDArray[numpy.float64], prior_std_grad: numpy.typing.NDArray[numpy.float64], post_scale: typing.SupportsFloat | typing.SupportsIndex, prior_scale: typing.SupportsFloat | typing.SupportsIndex, free_nats: typing.SupportsFloat | typing.SupportsIndex, threads: typing.SupportsInt | typing.SupportsIndex) -> None:
    ...
@typing.overload
def gaussian_kl_backward(grad: numpy.typing.NDArray[numpy.float32], kl: numpy.typing.NDArray[numpy.float32], post_mean: numpy.typing.NDArray[numpy.uint16], post_std: numpy.typing.NDArray[numpy.uint16], prior_mean: numpy.typing.NDArray[numpy.uint16], prior_std: numpy.typing.NDArray[numpy.uint16], post_mean_grad: numpy.typing.NDArray[numpy.uint16], post_std_grad: numpy.typing.NDArray[numpy.uint16], prior_mean_grad: numpy.typing.NDArray[numpy.uint16], prior_std_grad: numpy.typing.NDArray[numpy.uint16], post_scale: typing.SupportsFloat | typing.SupportsIndex, prior_scale: typing.SupportsFloat | typing.SupportsIndex, free_nats: typing.SupportsFloat | typing.SupportsIndex, threads: typing.SupportsInt | typing.SupportsIndex) -> None:
    ...
def gaussian_kl_backward_cuda(stream: typing.SupportsInt | typing.SupportsIndex, dtype: str, N: typing.SupportsInt | typing.SupportsIndex, S: typing.SupportsInt | typing.SupportsIndex, grad: typing.SupportsInt | typing.SupportsIndex, kl: typing.SupportsInt | typing.SupportsIndex, post_mean: typing.SupportsInt | typing.SupportsIndex, post_std: typing.SupportsInt | typing.SupportsIndex, prior_mean: typing.SupportsInt | typing.SupportsIndex, prior_std: typing.SupportsInt | typing.SupportsIndex, post_mean_grad: typing.SupportsInt | typing.SupportsIndex, post_std_grad: typing.SupportsInt | typing.SupportsIndex, prior_mean_grad: typing.SupportsInt | typing.SupportsIndex, prior_std_grad: typing.SupportsInt | typing.SupportsIndex, post_scale: typing.SupportsFloat | typing.SupportsIndex, prior_scale: typing.SupportsFloat | typing.SupportsIndex, free_nats: typing.SupportsFloat | typing.SupportsIndex) -> None:
    ...
@typing.overload
def gaussian_kl_forward(post_mean: numpy.typing.NDArray[numpy.float32], post_std: numpy.typing.NDArray[numpy.float32], prior_mean: numpy.typing.NDArray[numpy.float32], prior_std: numpy.typing.NDArray[numpy.float32], kl: numpy.typing.NDArray[numpy.float32], threads: typing.SupportsInt | typing.SupportsIndex) -> None:
    ...
@typing.overload
def gaussian_kl_forward(post_mean: numpy.typing.NDArray[numpy.float64], post_std: numpy.typing.NDArray[numpy.float64], prior_mean: numpy.typing.NDArray[numpy.float64], prior_std: numpy.typing.NDArray[numpy.float64], kl: numpy.typing.NDArray[numpy.float64], threads: typing.SupportsInt | typing.SupportsIndex) -> None:
    ...
@typing.overload
def gaussian_kl_forward(post_mean: numpy.typing.NDArray[numpy.uint16], post_std: numpy.typing.NDArray[numpy.uint16], prior_mean: numpy.typing.NDArray[numpy.uint16], prior_std: numpy.typing.NDArray[numpy.uint16], kl: numpy.typing.NDArray[numpy.float32], threads: typing.SupportsInt | typing.SupportsIndex) -> None:
    ...
def gaussian_kl_forward_cuda(stream: typing.SupportsInt | typing.SupportsIndex, dtype: str, N: typing.SupportsInt | typing.SupportsIndex, S: typing.SupportsInt | typing.SupportsIndex, post_mean: typing.SupportsInt | typing.SupportsIndex, post_std: typing.SupportsInt | typing.SupportsIndex, prior_mean: typing.SupportsInt | typing.SupportsIndex, prior_std: typing.SupportsInt | typing.SupportsIndex, kl: typing.SupportsInt | typing.SupportsIndex) -> None:
    ...
