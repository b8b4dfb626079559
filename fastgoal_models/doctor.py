"""`fastgoal doctor`: what is here, what it means, and whether the losses are right on it.

It does not fail where it is needed: what can not be found out is said in words instead. All is well
when the self-test could run losses, and all that it ran are right.

The JSON it writes:

    schema, kind "doctor", ok
    facts       kernels, python, system, packages, cuda, devices, settings, choices: see `machine`;
                {"unknown": why} in the place of what could not be found out
    self_test   device and results: see `self_test`; or {"unknown": why}
    advice      [{what, meaning, fix, is_problem}]
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from rich.console import Console
from rich.markup import escape
from rich.padding import Padding
from rich.table import Table

from .advice import Advice, advise, advise_after
from .errors import ConfigError
from .json_output import write_json
from .machine import Choice, Cuda, Device, Facts, Package, Unknown, attempt, find_facts

if TYPE_CHECKING:  # it imports PyTorch, which may be what is broken
    from .self_test import Result

SCHEMA = 1


@dataclass(frozen=True)
class SelfTest:
    """The device that was chosen and what the losses did on it."""

    device: str
    results: list[Result]


def run_doctor(device: str | None, json_path: Path | None, console: Console) -> bool:
    """Find out, print, write; whether all is well.

    Args:
        device: where the self-test runs; default: a GPU if PyTorch sees one, else the CPU.
        json_path: where the same facts go as JSON (`json_output`).

    Raises:
        ConfigError: a device that is not here, before anything else is looked at.
        OSError: the JSON can not be written.
    """
    with console.status("") as status:

        def say(what: str) -> None:
            status.update(f"{what} ...")

        if device is not None:
            say("looking for the device")
            _check_device(device)
        facts = find_facts(say)
        _show_facts(facts, console)
        tested = attempt(lambda: _run_self_test(device, say))
    _show_self_test(tested, console)
    results = [] if isinstance(tested, Unknown) else tested.results
    advice = advise(facts) + advise_after(results)
    _show_advice(advice, console)
    statuses = {result.status for result in results}
    ok = "ok" in statuses and "FAILED" not in statuses
    _show_verdict(ok, statuses, advice, console)
    document = {
        "schema": SCHEMA,
        "kind": "doctor",
        "ok": ok,
        "facts": asdict(facts),
        "self_test": asdict(tested),
        "advice": [asdict(each) for each in advice],
    }
    write_json(document, json_path, console)
    return ok


def _check_device(name: str) -> None:
    """Raises ConfigError for one that is not here; where PyTorch is broken, the report says so."""
    try:
        from .devices import parse_device

        parse_device(name)
    except ConfigError as error:
        raise ConfigError(
            f"--device: {error}. Fix: leave --device out, and the report says what is here"
        ) from error
    except Exception:  # importing PyTorch can raise anything
        return


def _run_self_test(name: str | None, say: Callable[[str], None]) -> SelfTest:
    say("preparing the self-test")
    from .devices import parse_device
    from .self_test import self_test

    device = parse_device(name)
    results = []
    for result in self_test(device):
        say(f"self-test: {result.loss} done")
        results.append(result)
    return SelfTest(str(device), results)


# ---------------------------------------------------------------------------------------------
# The screen
# ---------------------------------------------------------------------------------------------


def _heading(text: str, console: Console) -> None:
    console.print(f"\n[bold]{escape(text)}[/]", highlight=False)


def _grid(rows: Iterable[Iterable[str]], console: Console) -> None:
    """Aligned columns of plain text; the last one takes what is left of the width."""
    table = Table.grid(padding=(0, 2), pad_edge=True)
    for row in rows:
        table.add_row(*map(escape, row))
    console.print(table, highlight=False)


def _show_facts(facts: Facts, console: Console) -> None:
    version = facts.kernels if isinstance(facts.kernels, str) else "(see below)"
    _heading(f"fastgoal {version}, Python {facts.python}, {facts.system}", console)

    _heading("Versions", console)
    rows = [_package_row(package) for package in facts.packages]
    _grid([*rows, *_cuda_rows(facts.cuda)], console)

    _heading("Devices", console)
    if isinstance(facts.devices, Unknown):
        _grid([_unknown_row(facts.devices)], console)
    else:
        _grid(([d.name, d.model, _describe(d)] for d in facts.devices), console)

    _heading("Settings", console)
    rows = [[s.name, "not set" if s.value is None else s.value, s.meaning] for s in facts.settings]
    _grid(rows, console)

    if isinstance(facts.choices, Unknown):
        _heading("Backends", console)
        _grid([_unknown_row(facts.choices)], console)
        return
    for names, choices in _alike(facts.choices):
        _heading(f"Backends of float32 tensors on {', '.join(names)}", console)
        for reason, ops in _by_reason(choices).items():
            console.print(f"  {escape(reason)}:", highlight=False)
            console.print(Padding(", ".join(ops), (0, 0, 0, 4)), highlight=False)


def _unknown_row(part: Unknown) -> list[str]:
    return [f"could not be found out: {part.unknown}"]


def _package_row(package: Package) -> list[str]:
    if package.version is None:
        return [package.name, "not installed", f"needed for {package.needed_for}"]
    if package.broken is not None:
        return [package.name, package.version, f"BROKEN: {package.broken}"]
    return [package.name, package.version, ""]


def _cuda_rows(cuda: Cuda | Unknown) -> list[list[str]]:
    if isinstance(cuda, Unknown):
        return [["CUDA", *_unknown_row(cuda)]]
    runtime = ["CUDA runtime", cuda.built_for or "none", "what PyTorch is built for"]
    if cuda.rocm is not None:
        runtime = ["ROCm", cuda.rocm, "what PyTorch is built for"]
    runs = "" if cuda.driver_cuda is None else f"runs CUDA up to {cuda.driver_cuda}"
    return [runtime, ["NVIDIA driver", cuda.driver or "none found", runs]]


def _describe(device: Device) -> str:
    """All that is known of a device beside its name, in one line."""
    parts = []
    if device.capability is not None:
        parts.append("compute capability {}.{}".format(*device.capability))
    if device.processors is not None:
        on_gpu = device.capability is not None
        parts.append(f"{device.processors} {'multiprocessors' if on_gpu else 'cores'}")
    if device.threads is not None:
        parts.append(f"{device.threads} thread{'s' * (device.threads != 1)}")
    if device.vectors is not None:
        parts.append(f"PyTorch uses {device.vectors}")
    if device.bfloat16 is not None:
        parts.append(f"bfloat16 products: {'yes' if device.bfloat16 else 'no'}")
    if device.memory is not None:
        parts.append(f"{device.memory / 2**30:.1f} GiB")
    return ", ".join(parts)


def _alike(by_device: dict[str, list[Choice]]) -> list[tuple[list[str], list[Choice]]]:
    """Devices on which the backends, and the reasons, are the same, under one heading."""
    found: list[tuple[list[str], list[Choice]]] = []
    for name, choices in by_device.items():
        for names, others in found:
            if others == choices:
                names.append(name)
                break
        else:
            found.append(([name], choices))
    return found


def _by_reason(choices: list[Choice]) -> dict[str, list[str]]:
    """The ops of each backend and reason, in words that fit all of them."""
    found: dict[str, list[str]] = {}
    for choice in choices:
        why = choice.why.replace(choice.op, "the op")
        reason = f"{choice.backend or 'none'}, because {why}"
        found.setdefault(reason, []).append(choice.op)
    return found


def _show_self_test(tested: SelfTest | Unknown, console: Console) -> None:
    if isinstance(tested, Unknown):
        _heading("Self-test", console)
        console.print(
            f"  [bold red]FAILED[/]: it could not run: {escape(tested.unknown)}", highlight=False
        )
        return
    _heading(
        f"Self-test on {tested.device}: small inputs, against the reference in float64", console
    )
    for dtype in dict.fromkeys(result.dtype for result in tested.results):
        _show_results([r for r in tested.results if r.dtype == dtype], console)


def _show_results(results: list[Result], console: Console) -> None:
    """Those of one dtype, and so of one bound."""
    table = Table(box=None, pad_edge=True, collapse_padding=True)
    table.add_column(f"{results[0].dtype}, errors up to {results[0].bound:.0e}")
    table.add_column("on")
    for column in ("loss", "gradients", "first ms", "then ms"):
        table.add_column(column, justify="right")
    table.add_column("")
    for result in results:
        errors = (_number(error, ".1e") for error in (result.loss_error, result.gradient_error))
        times = (_number(ms, ",.1f") for ms in (result.first_ms, result.warm_ms))
        colour = {"ok": "green", "FAILED": "bold red"}.get(result.status, "yellow")
        verdict = f"[{colour}]{result.status}[/]"
        table.add_row(result.loss, result.backend or "", *errors, *times, verdict)
    console.print(table, highlight=False)
    for result in results:
        if result.status == "FAILED":
            text = f"  {result.loss}: {result.reason}"
            console.print(escape(text), highlight=False, soft_wrap=True)


def _number(value: float | None, form: str) -> str:
    return "" if value is None else format(value, form)


def _show_advice(advice: list[Advice], console: Console) -> None:
    if advice:
        _heading("What this means", console)
    for each in advice:
        colour = "yellow" if each.is_problem else "cyan"
        console.print(f"  [{colour}]• {escape(each.what)}[/]", highlight=False, soft_wrap=True)
        for line in (f"{each.meaning}.", f"Fix: {each.fix}."):
            console.print(Padding(escape(line), (0, 0, 0, 4)), highlight=False)


def _show_verdict(ok: bool, statuses: set[str], advice: list[Advice], console: Console) -> None:
    problems = sum(each.is_problem for each in advice)
    if "FAILED" in statuses:
        text = "[bold red]The self-test failed.[/]"
    elif not ok:
        text = "[bold red]No loss could be tested.[/]"
    elif problems:
        text = f"[yellow]The losses that ran are right; problems above: {problems}.[/]"
    else:
        text = "[bold green]All is well.[/]"
    console.print(f"\n{text}", highlight=False)
