"""Checkpoints of a run folder.

    RUN/checkpoints/step-000000500/        model.safetensors, train_state.pt
    RUN/checkpoints/latest                 symbolic link to the newest whole checkpoint

A checkpoint is written under a temporary name, synced, renamed, and only then named by `latest`;
so a process that is killed at any moment leaves the old or the new checkpoint, never a torn one.
"""

import io
import json
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import safetensors.torch
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn


class Checkpoint(NamedTuple):
    """Weights of a run, without what only its training needs.

    Attributes:
        algorithm: name of the algorithm that wrote it.
        step: updates made so far.
        config: what the algorithm stored beside the weights; holds at least "args".
        tensors: "<module>.<parameter>" to tensor, on the CPU.
    """

    algorithm: str
    step: int
    config: dict[str, Any]
    tensors: dict[str, Tensor]


def save_checkpoint(
    folder: Path,
    step: int,
    *,
    algorithm: str,
    config: Mapping[str, Any],
    modules: Mapping[str, nn.Module],
    train_state: Mapping[str, Any],
) -> None:
    """Write the checkpoint of a step and let `latest` name it; older ones are deleted.

    A step that `latest` already names is not written again.

    Args:
        folder: the run folder.
        step: updates made so far.
        algorithm: name of the algorithm.
        config: JSON-able description that rebuilds the modules; becomes metadata of the weights.
        modules: name to module.
        train_state: tensors, numbers, strings, lists and dicts only; `step` is added.

    Raises:
        ValueError: a weight is not finite; nothing is written then.
    """
    parent = folder / "checkpoints"
    final, latest = parent / f"step-{step:09d}", parent / "latest"
    if latest.is_symlink() and os.readlink(latest) == final.name:
        return
    tensors = {
        f"{name}.{key}": value.detach().contiguous()
        for name, module in modules.items()
        for key, value in module.state_dict().items()
    }
    for name, value in tensors.items():
        if not bool(torch.isfinite(value).all()):
            raise ValueError(f"{name} is not finite at step {step}: no checkpoint is written")
    metadata = {
        "algorithm": algorithm,
        "step": str(step),
        "config": json.dumps(config, default=str),
    }
    buffer = io.BytesIO()
    torch.save({**train_state, "step": step}, buffer)

    parent.mkdir(parents=True, exist_ok=True)
    staging = parent / f"{final.name}.tmp"
    for leftover in (staging, final):  # of a process that was killed before `latest` named it
        if leftover.exists():
            shutil.rmtree(leftover)
    staging.mkdir()
    _write_synced(staging / "model.safetensors", safetensors.torch.save(tensors, metadata))
    _write_synced(staging / "train_state.pt", buffer.getvalue())
    _sync_folder(staging)
    staging.rename(final)
    _sync_folder(parent)
    if latest.is_dir() and not latest.is_symlink():  # a copy that followed links made it a folder
        latest.rename(parent / "step-copied")
    link = parent / "latest.tmp"
    link.unlink(missing_ok=True)
    link.symlink_to(final.name)
    link.replace(latest)
    _sync_folder(parent)
    for older in parent.glob("step-*"):
        if older != final:
            shutil.rmtree(older)


def load_checkpoint(folder: Path, *, expected: tuple[str, ...]) -> Checkpoint:
    """Read the weights of the latest checkpoint of a run.

    Args:
        folder: the run folder.
        expected: names of the algorithms whose runs the caller can use.

    Raises:
        ValueError: no run, no checkpoint yet, another algorithm, or a damaged file.
    """
    path = folder / "checkpoints" / "latest" / "model.safetensors"
    if not path.is_file():
        raise ValueError(f"{folder} is not the folder of a run that has a checkpoint: no {path}")
    try:
        with safe_open(path, framework="pt", device="cpu") as file:
            metadata = file.metadata()
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        checkpoint = Checkpoint(
            metadata["algorithm"], int(metadata["step"]), json.loads(metadata["config"]), tensors
        )
    except (SafetensorError, KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{path} is damaged or foreign: {error}") from error
    if checkpoint.algorithm not in expected:
        wanted = " or ".join(map(repr, expected))
        raise ValueError(f"{folder} holds a run of {checkpoint.algorithm!r}, expected {wanted}")
    return checkpoint


def restore(checkpoint: Checkpoint, modules: Mapping[str, nn.Module]) -> None:
    """Copy weights into modules; every name and shape must agree.

    Raises:
        ValueError: a tensor is missing, left over, or has another shape: another model variant.
    """
    for name, module in modules.items():
        prefix = f"{name}."
        weights = {
            key.removeprefix(prefix): value
            for key, value in checkpoint.tensors.items()
            if key.startswith(prefix)
        }
        own = module.state_dict()
        for key in sorted(own.keys() | weights.keys()):
            stored = tuple(weights[key].shape) if key in weights else None
            wanted = tuple(own[key].shape) if key in own else None
            if stored != wanted:
                raise ValueError(
                    f"checkpoint is of another model variant: {name}.{key} is "
                    f"{'absent' if stored is None else list(stored)}, expected "
                    f"{'absent' if wanted is None else list(wanted)}"
                )
        module.load_state_dict(weights)


def resume(folder: Path, algorithm: str, modules: Mapping[str, nn.Module]) -> dict[str, Any] | None:
    """Restore the modules of a run and return its training state.

    Returns:
        What `save_checkpoint` got as train_state, and "step"; None: there is no checkpoint yet.

    Raises:
        ValueError: another algorithm, another model variant, or a damaged file.
    """
    path = folder / "checkpoints" / "latest" / "train_state.pt"
    if not path.parent.exists():
        return None
    restore(load_checkpoint(folder, expected=(algorithm,)), modules)
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch raises many types for a damaged file; all mean the same here
        raise ValueError(f"{path} is damaged or foreign: {error}") from error


def write_atomic(path: Path, content: bytes) -> None:
    """Write a file under a temporary name beside it, sync it, and rename it into place."""
    staging = path.with_name(path.name + ".tmp")
    _write_synced(staging, content)
    staging.replace(path)
    _sync_folder(path.parent)


def _write_synced(path: Path, content: bytes) -> None:
    with path.open("wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())


def _sync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
