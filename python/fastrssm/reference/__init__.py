"""The executable specification of every op: plain PyTorch, differentiable twice, no other import."""

from fastrssm.reference.gaussian_kl import gaussian_kl as gaussian_kl
