"""`fastgoal doctor`: what it finds out, what it makes of it, and that it never fails itself."""

import io
import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from rich.console import Console
from typer.testing import CliRunner

import fastgoal_kernels
from fastgoal_kernels import backends
from fastgoal_models import advice, machine
from fastgoal_models.cli import app
from fastgoal_models.doctor import run_doctor
from fastgoal_models.machine import Choice, Cuda, Device, Facts, Package, Setting, Unknown
from fastgoal_models.self_test import BOUNDS, self_test

ROOT = Path(__file__).parents[2]
CPU = torch.device("cpu")
NAMES = (
    "FASTGOAL_BACKEND", "FASTGOAL_AUTOTUNE", "FASTGOAL_CACHE_DIR", "FASTGOAL_CHECKS",
    "TRITON_INTERPRET", "CUDA_VISIBLE_DEVICES", "CC",
)  # fmt: skip


@pytest.fixture
def clean(monkeypatch):
    """None of the settings that doctor looks at."""
    for name in NAMES:
        monkeypatch.delenv(name, raising=False)


def diagnose(tmp_path: Path, device: str | None = "cpu") -> tuple[bool, str, dict]:
    """All of it: whether all is well, the screen, the JSON."""
    console = Console(record=True, width=200, force_terminal=False, file=io.StringIO())
    path = tmp_path / "new" / "doctor.json"
    well = run_doctor(device, path, console)
    return well, console.export_text(), json.loads(path.read_text())


# -- the whole ------------------------------------------------------------------------------------


def test_a_healthy_cpu(clean, tmp_path):
    well, text, document = diagnose(tmp_path)
    assert well and document["ok"]
    for words in (
        "fastgoal " + fastgoal_kernels.__version__,
        "torch",
        "open-clip-torch",
        "timm",
        "transformers",
        "NVIDIA driver",
        "CUDA runtime",
        "FASTGOAL_AUTOTUNE",
        "float32 matmul precision",
        "CPU threads",
        "Self-test on cpu",
    ):
        assert words in text  # fmt: skip
    assert torch.backends.cpu.get_cpu_capability() in text
    assert "FAILED" not in text and "BROKEN" not in text
    choices = {c["op"]: c for c in document["facts"]["choices"]["cpu"]}
    assert set(choices) == set(fastgoal_kernels.available_backends())
    assert choices["maxsim_scores"]["backend"] == "torch" and choices["maxsim_scores"]["why"]
    results = document["self_test"]["results"]
    assert {r["dtype"] for r in results} == {"float32", "bfloat16"}
    losses = [op for op in choices if op.endswith("_loss")]
    for loss in losses:
        rows = [r for r in results if r["loss"].startswith(loss)]
        assert rows and all(r["status"] == "ok" and r["warm_ms"] > 0 for r in rows), loss
        assert all(0 <= r["gradient_error"] <= r["bound"] for r in rows)


@pytest.mark.slow
def test_without_what_it_can_do_without(tmp_path):
    """In a new process: open_clip broken, timm, transformers and Triton not to be had."""
    broken = tmp_path / "open_clip"
    broken.mkdir()
    (broken / "__init__.py").write_text("raise RuntimeError('operator nms does not exist\\nmore')")
    code = (
        "import sys\n"
        "for name in ('timm', 'transformers', 'triton', 'torchvision'): sys.modules[name] = None\n"
        "from fastgoal_models.__main__ import main\n"
        "main()\n"
    )
    environment = {name: value for name, value in os.environ.items() if name not in NAMES}
    environment |= {"PYTHONPATH": os.pathsep.join([str(tmp_path), str(ROOT)]), "COLUMNS": "300"}
    done = subprocess.run(
        [sys.executable, "-c", code, "doctor", "--device", "cpu"],
        env=environment, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    assert "BROKEN: RuntimeError: operator nms does not exist" in done.stdout
    assert "open-clip-torch" in done.stdout and "timm" in done.stdout
    assert "Triton is not installed" in done.stdout or "not on a CUDA device" in done.stdout
    assert "problems above: " in done.stdout


@pytest.mark.parametrize("part", ["find_cuda", "find_devices", "kernels_version", "find_choices"])
def test_what_can_not_be_found_out_is_said_in_words(clean, monkeypatch, tmp_path, part):
    def explode(*_):
        raise OSError("the driver is on fire\nand a page of registers")

    monkeypatch.setattr(machine, part, explode)
    well, text, document = diagnose(tmp_path)
    assert well  # what could be tested is right
    assert "OSError: the driver is on fire" in text and "registers" not in text
    assert {"unknown": "OSError: the driver is on fire"} in document["facts"].values()


def test_without_torch_itself(clean, monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "torch", None)
    monkeypatch.setattr(machine, "PACKAGES", (("torch", "torch", "everything"),))
    for name in ("fastgoal_models.devices", "fastgoal_models.self_test"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    well, text, document = diagnose(tmp_path)
    assert not well and not document["ok"]
    assert "can not be imported" in text and "it could not run" in text
    assert "FASTGOAL_BACKEND" in text  # the settings of the environment are still there
    assert "No loss could be tested" in text


def run(*arguments: object):
    return CliRunner().invoke(app, ["doctor", *map(str, arguments)], env={"COLUMNS": "300"})


def test_exit_codes(clean, monkeypatch, tmp_path):
    assert run("--device", "cpu").exit_code == 0
    nowhere = run("--device", "toaster")
    assert nowhere.exit_code == 2 and "--device: device 'toaster' can not" in nowhere.output
    assert "Fix: leave --device out" in nowhere.output
    assert len(nowhere.output.strip().splitlines()) == 1  # and no report
    (tmp_path / "file").write_text("")
    unwritable = run("--device", "cpu", "--json", tmp_path / "file" / "doctor.json")
    assert unwritable.exit_code == 2 and "All is well" in unwritable.output
    make_wrong(monkeypatch, lambda loss, _: 1.01 * loss)
    wrong = run("--device", "cpu")
    assert wrong.exit_code == 1 and "The self-test failed" in wrong.output


# -- the self-test --------------------------------------------------------------------------------


def make_wrong(monkeypatch, change) -> None:
    """Change CLIP's loss, but for the reference."""
    right = fastgoal_kernels.clip_contrastive_loss

    def wrong(images, texts, scale, backend=None):
        loss = right(images, texts, scale, backend=backend)
        return loss if backend == "reference" else change(loss, images)

    monkeypatch.setattr(fastgoal_kernels, "clip_contrastive_loss", wrong)


def results_of_clip(seconds: float = 100) -> dict:
    found = list(self_test(CPU, seconds))
    others = [r for r in found if not r.loss.startswith("clip")]
    assert len(others) > 6 and all(r.status == "ok" for r in others)
    return {r.dtype: r for r in found if r.loss.startswith("clip")}


def test_a_wrong_loss_fails_with_its_number_and_the_bound(monkeypatch):
    make_wrong(monkeypatch, lambda loss, _: 1.001 * loss)
    clip = results_of_clip()
    assert clip["float32"].status == "FAILED"
    assert clip["float32"].loss_error == pytest.approx(1e-3, rel=0.01)
    assert "loss error 1.0e-03 is above 0.0001" in clip["float32"].reason
    assert clip["bfloat16"].status == "ok"  # within its bound


def test_a_wrong_gradient_fails_though_the_loss_is_right(monkeypatch):
    def change(loss, images):
        detour = images.float().square().sum()
        return loss + 0.01 * (detour - detour.detach())

    make_wrong(monkeypatch, change)
    for result in results_of_clip().values():
        assert result.status == "FAILED" and result.loss_error < result.bound
        assert "gradient error" in result.reason


def test_nan_and_exceptions_fail(monkeypatch):
    make_wrong(monkeypatch, lambda loss, _: loss * float("nan"))
    assert all("loss error inf" in r.reason for r in results_of_clip().values())

    def explode(loss, _):
        raise RuntimeError("no kernel image is available\nfor your GPU")

    make_wrong(monkeypatch, explode)
    for result in results_of_clip().values():
        assert result.status == "FAILED" and result.gradient_error is None
        assert result.reason == "RuntimeError: no kernel image is available"


def test_a_forced_backend_that_can_not_serve_is_refused_not_wrong(clean, monkeypatch, tmp_path):
    monkeypatch.setattr(backends, "_default", "triton")
    if backends.INTERPRETED:
        pytest.skip("Triton's interpreter serves CPU tensors")
    well, text, document = diagnose(tmp_path)
    assert not well and "No loss could be tested" in text
    assert {r["status"] for r in document["self_test"]["results"]} == {"refused"}
    assert all(c["backend"] is None for c in document["facts"]["choices"]["cpu"])
    assert "can not serve maxsim_scores on cpu and 15 more" in text


def test_no_loss_starts_late():
    found = list(self_test(CPU, seconds=-1))
    assert {r.status for r in found} == {"not run"}
    (said,) = advice.advise_after(found)
    assert "ran out of time" in said.what and not said.is_problem


def test_float32_products_are_ieee_within_and_as_before_after():
    torch.set_float32_matmul_precision("medium")
    seen = [torch.get_float32_matmul_precision() for _ in self_test(CPU)]
    assert set(seen) == {"highest"}
    assert torch.get_float32_matmul_precision() == "medium"


def test_the_bounds_tell_right_from_wrong():
    """Nothing here is near its bound, so that a healthy machine is not called ill."""
    for result in self_test(CPU, seconds=100):
        share = 0.1 if result.dtype == "float32" else 0.5
        assert max(result.loss_error, result.gradient_error) < share * result.bound
    assert BOUNDS[torch.float32] < 2**-11  # what one rounding to TF32 may do


# -- settings -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name, value, meaning",
    [
        ("FASTGOAL_AUTOTUNE", "1", "on:"),
        ("FASTGOAL_AUTOTUNE", "true", "only the value 1 turns it on"),
        ("FASTGOAL_CHECKS", "0", "off"),
        ("FASTGOAL_BACKEND", "torch", "'torch'"),
        ("FASTGOAL_CACHE_DIR", "/tuned", "/tuned"),
        ("TRITON_INTERPRET", "1", "on:"),
        ("TRITON_INTERPRET", "0", "off"),
    ],
)
def test_settings(clean, monkeypatch, name, value, meaning):
    assert {s.name: s.value for s in machine.find_settings()}[name] is None
    monkeypatch.setenv(name, value)
    found = {s.name: s for s in machine.find_settings()}[name]
    assert found.value == value and meaning in found.meaning


def test_the_driver_is_asked(monkeypatch, tmp_path):
    tool = tmp_path / "nvidia-smi"
    tool.write_text("#!/bin/sh\necho '470.82.01, Tesla V100'\necho '470.82.01, Tesla T4'\n")
    tool.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    cuda = machine.find_cuda()
    assert cuda.driver == "470.82.01" and cuda.gpus == ("Tesla V100", "Tesla T4")
    tool.write_text("#!/bin/sh\necho 'NVIDIA-SMI has failed, as it does'\nexit 9\n")
    assert machine.find_cuda().driver is None


# -- advice ---------------------------------------------------------------------------------------

GPU = Device("cuda:0", "NVIDIA H200", capability=(9, 0), memory=2**37)
HEALTHY = Facts(
    kernels="1.0",
    python="3.12.0",
    system="Linux x86_64",
    packages=[Package("torch", "2.9.0+cu128", ""), Package("triton", "3.5.0", "")],
    cuda=Cuda("12.8", None, True, None, "570.86", "12.8", ("NVIDIA H200",)),
    devices=[Device("cpu", "a CPU"), GPU],
    settings=[Setting("float32 matmul precision", "highest", "")],
    choices={
        "cpu": [Choice("maxsim_scores", "torch", "")],
        "cuda:0": [Choice("maxsim_scores", "triton", "")],
    },
)
NO_GPU = replace(HEALTHY.cuda, available=False, driver=None, driver_cuda=None, gpus=())
UNUSED = replace(HEALTHY.cuda, available=False)


def with_cuda(cuda: Cuda) -> Facts:
    return replace(HEALTHY, cuda=cuda, devices=[Device("cpu", "a CPU")], choices={"cpu": []})


def with_gpu(capability: tuple[int, int]) -> Facts:
    return replace(HEALTHY, devices=[replace(GPU, capability=capability)])


def with_setting(name: str, value: str) -> Facts:
    return replace(HEALTHY, settings=[Setting(name, value, "")])


@pytest.fixture
def compiler(monkeypatch):
    monkeypatch.setattr(advice.shutil, "which", lambda name: f"/usr/bin/{name}")


def test_a_healthy_gpu_needs_no_advice(clean, compiler):
    assert advice.advise(HEALTHY) == []


KNOWN = {
    "no GPU": (with_cuda(NO_GPU), False, "there is no CUDA device", "torch backend"),
    "built for CPU": (
        with_cuda(replace(UNUSED, built_for=None)), True, "built without CUDA", "pytorch.org",
    ),
    "old driver": (
        with_cuda(replace(UNUSED, driver="470.82", driver_cuda="11.4")), True,
        "470.82 is too old: it runs CUDA up to 11.4, and PyTorch is built for CUDA 12.8",
        "update the driver",
    ),
    "CUDA does not start": (
        with_cuda(replace(UNUSED, failure="RuntimeError: error 802")), True, "error 802", "restart",
    ),
    "AMD": (
        replace(HEALTHY, cuda=replace(HEALTHY.cuda, rocm="6.4")), False, "ROCm 6.4",
        "the torch backend",
    ),
    "Turing": (with_gpu((7, 5)), False, "(NVIDIA H200) is sm_75", "the torch backend"),
    "no Triton": (
        replace(HEALTHY, packages=HEALTHY.packages[:1]), True, "Triton is not installed",
        "pip install triton",
    ),
    "old Triton": (
        replace(HEALTHY, packages=[HEALTHY.packages[0], Package("triton", "3.1.0", "kernels")]),
        True, "triton 3.1.0 is older than 3.2", "--upgrade triton",
    ),
    "broken": (
        replace(
            HEALTHY, packages=[*HEALTHY.packages, Package("timm", "1", "models", "OSError: nms")]
        ),
        True, "timm 1 can not be imported: OSError: nms", "torchvision",
    ),
    "no torch": (replace(HEALTHY, packages=[]), True, "PyTorch is not installed", "install torch"),
    "misspelt backend": (
        replace(HEALTHY, kernels=Unknown("ValueError: FASTGOAL_BACKEND: unknown backend")), True,
        "unknown backend", "unset FASTGOAL_BACKEND",
    ),
    "reference": (
        with_setting("FASTGOAL_BACKEND", "reference"), True, "reference", "unset FASTGOAL_BACKEND",
    ),
    "TF32": (with_setting("float32 matmul precision", "high"), False, "'high'", "highest"),
}  # fmt: skip


@pytest.mark.parametrize("name", KNOWN)
def test_known_problems(clean, compiler, name):
    facts, is_problem, what, fix = KNOWN[name]
    found = advice.advise(facts)
    matching = [each for each in found if what in each.what]
    assert len(matching) == 1, found
    assert matching[0].is_problem == is_problem
    assert fix in matching[0].fix + matching[0].meaning
    if name not in ("no torch", "no Triton"):  # these two are also two problems
        assert len(found) == 1


def test_settings_that_are_problems(clean, compiler, monkeypatch):
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    (interpreted,) = advice.advise(HEALTHY)
    assert "TRITON_INTERPRET" in interpreted.what and "slower" in interpreted.meaning
    monkeypatch.delenv("TRITON_INTERPRET")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    (hidden,) = advice.advise(with_cuda(UNUSED))
    assert "CUDA_VISIBLE_DEVICES='' hides it" in hidden.what


def test_a_missing_compiler(clean, monkeypatch):
    monkeypatch.setattr(advice.shutil, "which", lambda name: None)
    (found,) = advice.advise(HEALTHY)
    assert "C compiler" in found.what


def test_newer_gpus_and_drivers_are_no_problem(clean, compiler):
    assert advice.advise(with_gpu((12, 0))) == []
    minor = replace(UNUSED, driver_cuda="12.2", failure="RuntimeError: other")
    assert "other" in advice.advise(with_cuda(minor))[0].what  # 12.2 runs what 12.8 built


def test_problems_come_first(clean, compiler):
    facts = replace(with_cuda(NO_GPU), kernels=Unknown("OSError: x"))
    assert [each.is_problem for each in advice.advise(facts)] == [True, False]
