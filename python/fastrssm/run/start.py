"""What a run does before its first update: check arguments, claim the folder, choose the device."""

import errno
import fcntl
import json
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch

from fastrssm.envs import find_task
from fastrssm.models.config import Preset, Setup, WorldModelConfig, world_model_config
from fastrssm.run.checkpoint import write_atomic

MatmulPrecision = Literal["highest", "high", "medium"]

# what file systems without locks say
_NO_LOCKS = (errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP)
# the locked file of this process's run; a process has one run at a time
_claimed: dict[Path, int] = {}

# these say how long, how often or where, not what is trained, so they may change between two starts
FREE_FIELDS = frozenset(
    {
        "out",
        "updates",
        "max_epochs",
        "episodes",
        "log_every",
        "checkpoint_every",
        "eval_every",
        "eval_episodes",
        "final_episodes",
        "device",
        "threads",
        "wandb",
    }
)


@dataclass(frozen=True)
class Sizes:
    """Sizes of the model; those left out are the preset's."""

    deter: int | None = None
    """Size of the recurrent state."""
    stoch: int | None = None
    """Size of the sampled latent."""
    groups: int | None = None
    """Categorical variables of a discrete latent; divides stoch."""
    hidden: int | None = None
    """Width of all hidden layers."""


def check_arguments(
    args: Any,
    *,
    positive: tuple[str, ...],
    not_negative: tuple[str, ...],
    shares: tuple[str, ...] = (),
) -> None:
    """Refuse numbers outside their range.

    Args:
        args: a dataclass of arguments.
        positive: names of fields that must be above 0.
        not_negative: names of fields that must be 0 or above.
        shares: names of fields that must lie in [0, 1].

    Raises:
        ValueError: a field is out of its range; the message names it as the command line does.
    """
    ranges = (
        (positive, "a number above 0", lambda value: value > 0),
        (not_negative, "a number 0 or above", lambda value: value >= 0),
        (shares, "a number in [0, 1]", lambda value: 0 <= value <= 1),
    )
    for names, expected, holds in ranges:
        for name in names:
            value = getattr(args, name)
            if not holds(value):
                raise ValueError(f"--{name.replace('_', '-')} is {value}, expected {expected}")


def choose_device(
    device: str, threads: int, matmul_precision: MatmulPrecision = "highest"
) -> torch.device:
    """Set the number of CPU threads and the precision of products, and return the device.

    Args:
        device: "cpu", "cuda" or "cuda:<n>".
        threads: threads of PyTorch on the CPU; 0: leave it.
        matmul_precision: of float32 products, see `torch.set_float32_matmul_precision`.

    Raises:
        ValueError: the name is none of these.
        RuntimeError: CUDA is asked for but not available.
    """
    if threads:
        torch.set_num_threads(threads)
    torch.set_float32_matmul_precision(matmul_precision)
    kind, _, index = device.partition(":")
    if kind not in ("cpu", "cuda") or (index and not index.isdigit()):
        raise ValueError(f"--device is {device!r}, expected 'cpu', 'cuda' or 'cuda:<n>'")
    if kind == "cuda" and not torch.cuda.is_available():
        raise RuntimeError(f"--device is {device!r}, but PyTorch finds no CUDA device; use 'cpu'")
    return torch.device(device)


def build_config(env: str, preset: Preset, setup: Setup, sizes: Sizes) -> WorldModelConfig:
    """Build the configuration of the world model that arguments ask for.

    Raises:
        ValueError: unknown task, preset or setup, or a size that does not fit.
    """
    task = find_task(env, "--env")
    config = world_model_config(preset, task.sensors, setup, task.action_size)
    given = {name: size for name, size in asdict(sizes).items() if size is not None}
    width = given.get("hidden", config.hidden)
    return replace(config, rssm=replace(config.rssm, **given), hidden=width)


def open_run(folder: Path, algorithm: str, args: Mapping[str, Any]) -> None:
    """Create a run folder, or check that an existing one belongs to the same run.

    Args:
        folder: the run folder.
        algorithm: name of the algorithm.
        args: JSON-able arguments. Those in FREE_FIELDS may differ from the stored ones and
            replace them.

    Raises:
        ValueError: the folder holds another algorithm's run, or one with other arguments; the
            message lists them.
        RuntimeError: another process runs in the folder.
    """
    _claim(folder)
    now = json.loads(json.dumps({"algorithm": algorithm, "args": args}, default=str))
    path = folder / "config.json"
    if path.exists():
        before = _read_config(path)
        if before["algorithm"] != algorithm:
            raise ValueError(
                f"run folder {folder} holds a run of {before['algorithm']!r}, "
                f"expected {algorithm!r}: choose another folder"
            )
        changes = _differences(before["args"], now["args"])
        if changes:
            lines = "".join(f"\n  {change}" for change in changes)
            raise ValueError(
                f"run folder {folder} was started with other arguments; "
                f"repeat them or choose another folder:{lines}"
            )
    elif (folder / "checkpoints").exists():
        raise ValueError(f"{folder} has checkpoints but no config.json: choose another folder")
    write_atomic(path, (json.dumps(now, indent=2) + "\n").encode())


def _claim(folder: Path) -> None:
    """Lock the folder until this process ends or opens another run: two writers mix their files."""
    folder.mkdir(parents=True, exist_ok=True)
    folder = folder.resolve()
    if folder in _claimed:
        return
    file = os.open(folder / ".lock", os.O_RDWR | os.O_CREAT, 0o644)
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno not in _NO_LOCKS:
            os.close(file)
            if isinstance(error, BlockingIOError):
                raise RuntimeError(
                    f"another process runs in {folder}: stop it, or choose another folder"
                ) from error
            raise
    for path in list(_claimed):
        os.close(_claimed.pop(path))
    _claimed[folder] = file


def _read_config(path: Path) -> dict[str, Any]:
    try:
        config = json.loads(path.read_text())
        return {"algorithm": str(config["algorithm"]), "args": dict(config["args"])}
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path} is not the config.json of a run: {error}") from error


def _differences(before: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """One line per field that may not change but did."""
    old, new = _flatten(before), _flatten(now)
    return [
        f"{name}: {old.get(name, 'absent')!r} in the run, {new.get(name, 'absent')!r} now"
        for name in sorted(old.keys() | new.keys())
        if name not in FREE_FIELDS and old.get(name, "absent") != new.get(name, "absent")
    ]


def _flatten(fields: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for name, value in fields.items():
        if isinstance(value, Mapping):
            flat |= _flatten(value, f"{prefix}{name}.")
        else:
            flat[prefix + name] = value
    return flat
