"""Algorithms: one file each, with its arguments, its update and its training loop."""
