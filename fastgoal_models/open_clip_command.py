"""`fastgoal train-open-clip`: open_clip's own trainer and flags, with our losses inside."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Any

import torch

from fastgoal_kernels import BackendError, explain_backend, patch_open_clip, unpatch_open_clip

from .errors import ConfigError

# What open_clip's losses call, once patched.
_CALLS = {
    "ClipLoss": "clip_contrastive_loss",
    "CoCaLoss": "clip_contrastive_loss",
    "SigLipLoss": "sigmoid_contrastive_loss",
}


def run_open_clip_train(flags: Sequence[str]) -> None:
    """Run `open_clip_train.main` with these flags, as they are, under `patch_open_clip`.

    When the trainer builds its loss, the first process logs one line: which loss it is, and on
    which backend. Afterwards open_clip's classes are their own again.

    Raises:
        ConfigError: a package that is missing, --horovod, a backend that can not serve, or a run
            that open_clip_train itself gave up.
        SystemExit: by open_clip_train's parser, for --help (code 0) and mistyped flags (code 2).
        Exception: whatever open_clip_train raises, unchanged.
    """
    try:
        import open_clip_train.main as trainer
        from open_clip_train.params import parse_args
    except ModuleNotFoundError as error:
        raise ConfigError(
            f"open_clip's trainer can not be imported: {error}. "
            "Fix: pip install 'open_clip_torch[training]'"
        ) from error

    # The loss refuses it too, but only after the model is built, and where Horovod is installed.
    if parse_args(list(flags)).horovod:
        raise ConfigError(
            "--horovod is not served: the features travel over torch.distributed. "
            "Fix: launch with torchrun, without --horovod"
        )

    create_loss = trainer.create_loss

    def create_and_name(args: Any) -> torch.nn.Module:
        # Only now is the device known: without a GPU the trainer moves to the CPU.
        loss = create_loss(args)
        if args.rank == 0:
            logging.info(_name(loss, args.device))
        return loss

    patch_open_clip()
    trainer.create_loss = create_and_name
    try:
        status = trainer.main(list(flags))
    except ModuleNotFoundError as error:
        raise ConfigError(f"{error}, and these flags need it. Fix: install it") from error
    except SystemExit as stop:
        status = stop.code
    finally:
        trainer.create_loss = create_loss
        unpatch_open_clip()
    if status:
        raise ConfigError("open_clip_train gave up; what it says about it is above")


def _name(loss: torch.nn.Module, device: str) -> str:
    """The line about the loss that will run.

    Raises:
        ConfigError: FASTGOAL_BACKEND asks for a backend that can not serve this device.
    """
    name = type(loss).__name__
    if name not in _CALLS:
        return f"{name} is open_clip's own: it compares whole matrices of logits"
    try:
        backend = explain_backend(_CALLS[name], torch.empty(0, device=device))
    except BackendError as error:
        raise ConfigError(str(error)) from error
    return f"{name} calls fastgoal's {_CALLS[name]}, backend {backend}"
