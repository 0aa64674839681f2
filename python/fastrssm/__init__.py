"""Fused recurrent state-space models, batched KL/ELBO and vectorised MuJoCo."""

from fastrssm import ops as ops
from fastrssm._dispatch import Backend as Backend
from fastrssm._dispatch import backends as backends
from fastrssm._dispatch import use_backend as use_backend

__version__ = "0.1.0"
