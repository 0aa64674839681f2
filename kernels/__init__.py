"""Triton kernels; imported only when one runs."""
