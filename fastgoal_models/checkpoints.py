"""Checkpoints that are whole or not there, and that load without running anyone's code.

A checkpoint is a folder `step-00000120` of three files: `model.safetensors` (the weights),
`state.pt` (optimizer and random-number states, loaded with `weights_only=True`) and
`checkpoint.json` (step, configuration, and size and SHA-256 of the other two). It is written under
a temporary name, flushed to the disk and renamed, so that a process killed at any moment leaves
either the whole folder or a temporary one that every reader ignores.
"""

from __future__ import annotations

import hashlib
import json
import pickle
import re
import secrets
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from .atomic_files import TEMPORARY, flush
from .errors import UserError

_FORMAT = 1
_WEIGHTS, _STATE = "model.safetensors", "state.pt"
MANIFEST = "checkpoint.json"
_NAME = re.compile(r"step-(\d{8,})")


class CheckpointError(UserError, RuntimeError):
    """A checkpoint is missing, damaged, or belongs to another run."""


@dataclass(frozen=True)
class Checkpoint:
    """What `load_checkpoint` read: everything on the CPU, nothing applied yet."""

    path: Path
    step: int
    weights: dict[str, Tensor]
    state: dict[str, Any]
    config: dict[str, Any]


def save_checkpoint(
    folder: Path,
    step: int,
    weights: Mapping[str, Tensor],
    state: Mapping[str, Any],
    config: Mapping[str, Any],
) -> Path:
    """Write `folder/step-<step>` in one piece and return its path.

    Args:
        folder: holds the checkpoints of one run; made when it does not exist.
        step: optimizer steps done, the checkpoint's name and its order.
        weights: a state dict; tensors on any device.
        state: nested dicts, lists, tuples, numbers, strings and tensors: what `weights_only`
            loading allows.
        config: what the run was started with; must survive a trip through JSON.

    Raises:
        OSError: the disk is full or the folder can not be written; nothing is left behind.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    sweep(folder)
    final = checkpoint_path(folder, step)
    temporary = folder / f"{TEMPORARY}{final.name}-{secrets.token_hex(4)}"
    temporary.mkdir()
    try:
        # Copies: safetensors refuses tensors that share memory, and a view would save its base.
        copies = {
            name: tensor.detach().to("cpu", copy=True, memory_format=torch.contiguous_format)
            for name, tensor in weights.items()
        }
        save_file(copies, temporary / _WEIGHTS, metadata={"format": "pt"})
        torch.save(dict(state), temporary / _STATE)
        manifest = {
            "format": _FORMAT,
            "step": step,
            "torch": torch.__version__,
            "config": dict(config),
            "files": {name: _fingerprint(temporary / name) for name in (_WEIGHTS, _STATE)},
        }
        (temporary / MANIFEST).write_text(json.dumps(manifest, indent=2) + "\n", "utf-8")
        for name in (_WEIGHTS, _STATE, MANIFEST):
            flush(temporary / name)
        flush(temporary)
        if final.exists():
            # Only after resuming from an older checkpoint. A folder can not be replaced in one
            # step; killed in between, the run resumes from that older checkpoint again.
            final.rename(folder / f"{TEMPORARY}replaced-{secrets.token_hex(4)}")
        temporary.rename(final)
        flush(folder)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    sweep(folder)
    return final


def prune_checkpoints(folder: Path, keep: int | None, spare: Path | None = None) -> None:
    """Delete all but the newest `keep` checkpoints (None: all stay), and never `spare`."""
    if keep is not None:
        for old in complete_checkpoints(folder)[: -max(keep, 1)]:
            if old != spare:
                _discard(old)


def checkpoint_path(folder: Path, step: int) -> Path:
    """Where the checkpoint of this step is, or would be."""
    return Path(folder) / f"step-{step:08d}"


def complete_checkpoints(folder: Path) -> list[Path]:
    """The checkpoints of a run, oldest first; temporary and half-deleted folders do not count."""
    folder = Path(folder)
    if not folder.is_dir():
        return []
    found = [
        (int(match[1]), path)
        for path in folder.iterdir()
        if (match := _NAME.fullmatch(path.name)) and (path / MANIFEST).is_file()
    ]
    return [path for _, path in sorted(found)]


def latest_checkpoint(folder: Path) -> Path | None:
    """The complete checkpoint with the most steps, or None."""
    found = complete_checkpoints(folder)
    return found[-1] if found else None


def load_checkpoint(path: Path) -> Checkpoint:
    """Read and verify one checkpoint folder; tensors land on the CPU.

    Raises:
        CheckpointError: it is missing, of an unknown format, or a file's size or SHA-256 differs
            from what was written. The message names the file and what to do.
    """
    path = Path(path)
    if not path.is_dir():
        raise CheckpointError(f"there is no checkpoint folder {path}")
    if not (path / MANIFEST).is_file():
        raise CheckpointError(f"{path} is no checkpoint: it has no {MANIFEST}")
    try:
        manifest = json.loads((path / MANIFEST).read_text("utf-8"))
        version, step, config = manifest["format"], int(manifest["step"]), dict(manifest["config"])
        files = dict(manifest["files"])
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise _damaged(path, MANIFEST, f"it can not be read ({error!r})") from error
    if version != _FORMAT:
        raise CheckpointError(
            f"{path} has checkpoint format {version!r}; this version of the library reads {_FORMAT}"
        )
    for name in (_WEIGHTS, _STATE):
        if not (path / name).is_file():
            raise _damaged(path, name, "it is missing")
        if _fingerprint(path / name) != files.get(name):
            raise _damaged(path, name, "its size or SHA-256 is not the one that was written")
    try:
        weights = load_file(path / _WEIGHTS)
        state = torch.load(path / _STATE, map_location="cpu", weights_only=True)
    except (OSError, SafetensorError, RuntimeError, pickle.UnpicklingError) as error:
        raise _damaged(path, _STATE, f"it can not be read ({error})") from error
    return Checkpoint(path, step, weights, state, config)


def save_tensors_atomically(
    tensors: Mapping[str, Tensor], path: Path, metadata: dict[str, str]
) -> None:
    """Write a safetensors file, all of it or nothing: it gets its name when it is whole."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f"{TEMPORARY}{path.name}-{secrets.token_hex(4)}")
    try:
        contiguous = {name: tensor.contiguous() for name, tensor in tensors.items()}
        save_file(contiguous, temporary, metadata=metadata)
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def _damaged(path: Path, name: str, what: str) -> CheckpointError:
    others = [other for other in complete_checkpoints(path.parent) if other != path]
    instead = f"resume from {others[-1]} instead" if others else "start again in an empty folder"
    return CheckpointError(f"checkpoint {path} is damaged: {name}: {what}. Delete it and {instead}")


def _fingerprint(path: Path) -> dict[str, Any]:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return {"bytes": path.stat().st_size, "sha256": digest.hexdigest()}


def _discard(path: Path) -> None:
    """Delete a checkpoint; renamed first, so that a kill half-way leaves no half of one."""
    doomed = path.with_name(f"{TEMPORARY}old-{secrets.token_hex(4)}")
    path.rename(doomed)
    shutil.rmtree(doomed, ignore_errors=True)


def sweep(folder: Path) -> None:
    """Remove what killed processes left under temporary names."""
    for path in folder.glob(f"{TEMPORARY}*"):
        shutil.rmtree(path, ignore_errors=True)
