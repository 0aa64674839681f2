"""Episodes on disk, datasets of them, and batches for training."""

from fastrssm.data.dataset import Dataset, info
from fastrssm.data.sampler import FrameStacks, WindowSampler

__all__ = ["Dataset", "FrameStacks", "WindowSampler", "info"]
