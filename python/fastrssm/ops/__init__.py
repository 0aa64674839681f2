"""The public ops: checks, choice of the backend, gradient."""

from fastrssm.reference.gaussian_kl import gaussian_kl as gaussian_kl
