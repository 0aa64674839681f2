"""The executable specification of every op: plain PyTorch, nothing else."""

from fastrssm.reference.gaussian_kl import gaussian_kl as gaussian_kl
