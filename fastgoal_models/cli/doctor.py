"""`fastgoal doctor`."""

from __future__ import annotations

import typer

from ..json_output import console_beside
from .exits import EXIT_NOT_WELL, user_errors
from .shared_options import DeviceOption, JsonOption


def doctor(
    device: DeviceOption = None,
    json_path: JsonOption = None,
) -> None:
    """Look at this machine: versions, devices, settings, backends; test the losses on it.

    The self-test compares each loss and its gradients with the reference in float64, in about ten
    seconds. Exit code 0: all is well; 1: the self-test failed.
    """
    with user_errors():
        from ..doctor import run_doctor

        well = run_doctor(device, json_path, console_beside(json_path))
    if not well:
        raise typer.Exit(EXIT_NOT_WELL)
