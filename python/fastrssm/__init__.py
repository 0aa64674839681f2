"""Fused recurrent state-space models, batched KL/ELBO and vectorised MuJoCo."""

__version__ = "0.1.0"
