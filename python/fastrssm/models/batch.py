"""What a batch must look like: checks before any work, and the flags in the form of the models."""

import torch
from torch import Tensor

from fastrssm.models.config import IMAGE, TERMINAL, WorldModelConfig
from fastrssm.models.nets import IMAGE_SHAPE


def check_shape(name: str, tensor: Tensor, shape: tuple[int, ...]) -> None:
    """Raise a ValueError that names the tensor unless it has this shape."""
    if tuple(tensor.shape) != shape:
        raise ValueError(f"{name} has shape {list(tensor.shape)}, expected {list(shape)}")


def check_batch(
    config: WorldModelConfig,
    batch: dict[str, Tensor],
    needed: tuple[str, ...],
    *,
    dtype: torch.dtype,
) -> tuple[int, int]:
    """Check keys, shapes and dtypes of a batch of sequences; return its T and B."""
    name = config.inputs[0]
    if name in batch and batch[name].ndim < 3:
        shape = list(batch[name].shape)
        raise ValueError(f"batch[{name!r}] has shape {shape}, expected [T, B, ...]")
    T, B = batch[name].shape[:2] if name in batch else (1, 1)
    if T < 1 or B < 1:
        raise ValueError(f"batch has {T} frames of {B} sequences, expected at least one of each")
    terminal = (TERMINAL,) if config.terminal else ()
    names = (*config.inputs, *config.targets, *config.probes, *terminal, *needed)
    check_keys(config, "batch", batch, tuple(dict.fromkeys(names)), (T, B), dtype=dtype)
    return T, B


def check_keys(
    config: WorldModelConfig,
    given: str,
    batch: dict[str, Tensor],
    names: tuple[str, ...],
    lead: tuple[int, ...],
    *,
    dtype: torch.dtype,
) -> None:
    """Raise, naming the first key that is missing or has another shape [*lead, size] or dtype."""
    sizes = dict(config.sensors) | {TERMINAL: 1, "pre_action": config.action_size}
    for name in names:
        if name not in batch:
            raise ValueError(f"{given} has no {name!r}, expected the keys {list(names)}")
        shape = IMAGE_SHAPE if name == IMAGE else (sizes[name],)
        check_shape(f"{given}[{name!r}]", batch[name], (*lead, *shape))
        kind = batch[name].dtype
        if kind != dtype and not (name == IMAGE and kind == torch.uint8):
            raise TypeError(f"{given}[{name!r}] has dtype {kind}, expected {dtype}")


def first_frames(is_first: Tensor | None, lead: tuple[int, ...]) -> Tensor | None:
    """Return the flag as bool [*lead]; it may be a number and have a trailing axis of 1."""
    if is_first is None:
        return None
    if tuple(is_first.shape) == (*lead, 1):
        is_first = is_first.squeeze(-1)
    check_shape("is_first", is_first, lead)
    return is_first if is_first.dtype == torch.bool else is_first != 0


def kept_frames(terminal: Tensor) -> Tensor:
    """Return [T, B]: 0 for terminal frames after the first one, which are padding, else 1."""
    terminal = terminal.squeeze(-1)
    seen_before = terminal.cumsum(0) - terminal > 0
    return torch.where(seen_before, 1.0 - terminal, 1.0)


def image_values(image: Tensor, dtype: torch.dtype) -> Tensor:
    """Return the image in [0, 1]."""
    return image.to(dtype) / 255.0 if image.dtype == torch.uint8 else image
