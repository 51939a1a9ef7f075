"""The checkpoints of a run: which are complete, which to resume from, and protection of those of other runs.

An interrupted save, due to a full disk for example, leaves an incomplete folder that looks like a checkpoint. It is
recognised by files that are missing or truncated; their values are not checked.
"""

import json
import re
import shutil
import zipfile
from os import PathLike
from pathlib import Path

from safetensors import SafetensorError, safe_open
from transformers.trainer import OPTIMIZER_NAME, SCHEDULER_NAME, TRAINER_STATE_NAME

# Of every kind at least one file is needed, usually of the first pattern; others are for adapters, DeepSpeed and FSDP.
_WEIGHTS = ("model.safetensors", "model.safetensors.index.json", "adapter_model.*", "pytorch_model*", "global_step*")
_STATES = (
    (OPTIMIZER_NAME, "optimizer.bin", "optimizer_*", "global_step*"),
    (SCHEDULER_NAME,),
    ("rng_state.pth", "rng_state_*"),
)


def checkpoints(output_dir: str | PathLike) -> list[Path]:
    """Return the folders of checkpoints in ``output_dir``, complete or not, oldest first."""
    folders = Path(output_dir).glob("checkpoint-*")
    steps = {folder: re.fullmatch(r"checkpoint-(\d+)", folder.name) for folder in folders if folder.is_dir()}
    return sorted((folder for folder, step in steps.items() if step), key=lambda folder: int(steps[folder][1]))


def fault(checkpoint: Path, model_only: bool = False) -> str | None:
    """Return why a checkpoint is incomplete, in words; None if it is complete.

    Args:
        checkpoint: the checkpoint's folder.
        model_only: whether the states of optimizer and random number generators may be missing (``save_only_model``).
    """
    for kind in ((TRAINER_STATE_NAME,), _WEIGHTS, *(() if model_only else _STATES)):
        if not any(any(checkpoint.glob(pattern)) for pattern in kind):
            return f"no {kind[0]}"
    for file in sorted(path for path in checkpoint.iterdir() if path.is_file()):
        try:
            _read(file)
        except FileNotFoundError as missing:
            return f"no {missing}"
        except (OSError, ValueError, KeyError, TypeError, SafetensorError):
            return f"{file.name} is broken"
    return None


def _read(file: Path) -> None:
    """Read just enough of a file to tell whether it is truncated, and raise an error if so."""
    if file.suffix == ".safetensors":
        with safe_open(file, "pt"):
            pass  # opening compares the header with the file's length
    elif file.suffix in (".pt", ".pth", ".bin") and not zipfile.is_zipfile(file):  # the zip directory is at the end
        raise ValueError
    elif file.suffix == ".json":
        content = json.loads(file.read_text(encoding="utf-8"))
        if file.name.endswith(".index.json"):
            for shard in sorted(set(content["weight_map"].values())):
                if not (file.parent / shard).is_file():
                    raise FileNotFoundError(shard)


def last_whole(output_dir: str | PathLike, model_only: bool = False) -> Path | None:
    """Return the newest complete checkpoint in ``output_dir``, if any."""
    return next((found for found in reversed(checkpoints(output_dir)) if fault(found, model_only) is None), None)


def to_resume(wanted: str | PathLike, output_dir: str | PathLike, model_only: bool = False) -> str:
    """Return the checkpoint to resume from: ``wanted``, or for "last" the newest complete one in ``output_dir``.

    Raises:
        ValueError: ``wanted`` is incomplete, or there is no complete checkpoint. The message says what is missing and
            which checkpoint could be used instead.
    """
    if wanted == "last":
        if (found := last_whole(output_dir, model_only)) is not None:
            return str(found)
        faults = ", ".join(f"{broken.name}: {fault(broken, model_only)}" for broken in checkpoints(output_dir))
        kind, detail = ("whole checkpoint", f" ({faults})") if faults else ("checkpoint", "")
        raise ValueError(f"resume_from_checkpoint must not be 'last' without a {kind} in {output_dir}{detail}")
    folder = Path(wanted)
    found = fault(folder, model_only) if folder.is_dir() else "no such folder"
    if found is None:
        return str(wanted)
    other = last_whole(folder.parent, model_only) or last_whole(output_dir, model_only)
    raise ValueError(
        f"resume_from_checkpoint must be the folder of a checkpoint, got {str(wanted)!r}: {found}"
        + (f"; the last whole one is {other}" if other else "")
    )


def check_output_dir(output_dir: str | PathLike, resume: str | None, overwrite: bool) -> None:
    """Check that a run does not write into a folder with another run's checkpoints.

    Raises:
        ValueError: it would.
    """
    folder = Path(output_dir)
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"output_dir must be a folder, got a file: {output_dir}")
    if overwrite and resume is not None:
        raise ValueError("overwrite_output_dir cannot be used together with resume_from_checkpoint")
    there = checkpoints(folder)
    if not there or overwrite or (resume is not None and Path(resume).resolve().parent == folder.resolve()):
        return
    names = there[0].name if len(there) == 1 else f"{there[0].name} to {there[-1].name}"
    raise ValueError(
        f"output_dir must not hold the checkpoints of another run, got {names} in {output_dir}: go on from there with "
        "--resume_from_checkpoint last, take another folder, or remove them with --overwrite_output_dir"
    )


def remove_checkpoints(output_dir: str | PathLike) -> None:
    """Remove every checkpoint in ``output_dir``, complete or not."""
    for folder in checkpoints(output_dir):
        shutil.rmtree(folder)
