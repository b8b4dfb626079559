"""`fastgoal train-open-clip` and open_clip's own trainer train alike, and what it says and refuses.

For the distributed flags torchrun starts this file as a script, which runs both trainers.
"""

from __future__ import annotations

import json
import logging
import math
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from PIL import Image
from typer.testing import CliRunner

from fastgoal_kernels import modules, unpatch_open_clip, use_backend
from fastgoal_models.cli import app
from fastgoal_models.open_clip_command import run_open_clip_train

TINY = {
    "embed_dim": 16,
    "vision_cfg": {"image_size": 16, "layers": 1, "width": 32, "head_width": 16, "patch_size": 8},
    "text_cfg": {"context_length": 16, "vocab_size": 49408, "width": 16, "heads": 2, "layers": 1},
}
PICTURES, BATCH = 32, 8
EPOCHS = 5  # so 20 steps
# SGD, because Adam does not see by which factor a gradient is wrong.
TRAINING = f"--batch-size {BATCH} --epochs {EPOCHS} --opt timm/sgd --momentum 0.9 --warmup 2"
QUIET = "--workers 0 --device cpu --save-frequency 0 --log-every-n-steps 1"
CLIP, SIGLIP = "--lr 0.03", "--lr 0.01 --siglip"
ACCUMULATED = f"--accum-freq 2 --batch-size {BATCH // 2}"


def run(*flags: str):
    arguments = ["train-open-clip", *(["--", *flags] if flags else [])]
    return CliRunner().invoke(app, arguments, env={"COLUMNS": "300"})


@pytest.fixture(autouse=True)
def logging_as_before():
    """open_clip_train gives the root logger handlers, and every logger that there is its level."""
    loggers = [logging.root, *map(logging.getLogger, list(logging.root.manager.loggerDict))]
    levels, handlers = [logger.level for logger in loggers], logging.root.handlers[:]
    yield
    for handler in set(logging.root.handlers) - set(handlers):
        logging.root.removeHandler(handler)
        handler.close()
    for logger, level in zip(loggers, levels, strict=True):
        logger.setLevel(level)


@pytest.fixture(autouse=True)
def nothing_stays_patched():
    yield
    unpatch_open_clip()


@pytest.fixture(scope="module")
def trainer():
    return pytest.importorskip("open_clip_train.main")


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """A tiny model and one-coloured pictures with captions, as open_clip_train reads them.

    Its own synthetic data are one black picture and one caption, over and over: the softmax loss
    of those is log(batch) without a gradient, whoever computes it.
    """
    folder = tmp_path_factory.mktemp("open_clip")
    config = {"model_cfg": TINY, "preprocess_cfg": {}}
    (folder / "open_clip_config.json").write_text(json.dumps(config))
    generator = torch.Generator().manual_seed(0)
    rows = ["filepath\ttitle"]
    for number in range(PICTURES):
        red, green, blue = torch.randint(0, 256, (3,), generator=generator).tolist()
        path = folder / f"{number}.png"
        Image.new("RGB", (20, 20), (red, green, blue)).save(path)
        rows.append(f"{path}\tred {red}, green {green}, blue {blue}")
    (folder / "pairs.csv").write_text("\n".join(rows) + "\n")
    return folder


def flags(folder: Path, out: Path, *options: str) -> list[str]:
    data = f"--train-data {folder / 'pairs.csv'} --model local-dir:{folder} --logs {out}"
    return " ".join([data, "--name run", TRAINING, QUIET, *options]).split()


def backward_losses(train) -> list[float]:
    """The losses that `train()` calls backward on, in full: the log rounds them to five digits."""
    import open_clip_train.train

    backward, losses = open_clip_train.train.backward, []

    def spy(total_loss, scaler):
        losses.append(total_loss.item())
        backward(total_loss, scaler)

    with mock.patch.object(open_clip_train.train, "backward", spy):
        train()
    return losses


def both(trainer, folder, out, *options: str) -> tuple[list[float], list[float]]:
    """Losses of open_clip's trainer as it is, and of the command."""
    plain = backward_losses(lambda: trainer.main(flags(folder, out / "plain", *options)))
    ours = "sigmoid_contrastive_loss" if SIGLIP in options else "clip_contrastive_loss"

    def command():
        found = run(*flags(folder, out / "ours", *options))
        assert found.exit_code == 0, found.output

    with mock.patch.object(modules, ours, wraps=getattr(modules, ours)) as spy:
        patched = backward_losses(command)
    assert spy.call_count == len(patched) == len(plain)
    return plain, patched


@pytest.mark.parametrize("batches", ["", ACCUMULATED], ids=["whole", "accumulated"])
@pytest.mark.parametrize("loss", [CLIP, SIGLIP], ids=["clip", "siglip"])
def test_it_trains_as_open_clip_does(trainer, folder, tmp_path, loss, batches):
    options = (loss, batches, "--precision fp32")
    plain, patched = both(trainer, folder, tmp_path, *options)
    assert len(plain) == EPOCHS * PICTURES // BATCH * (2 if batches else 1)
    # Float32 sums in another order, through 20 steps of feedback.
    assert patched == pytest.approx(plain, rel=1e-5)
    assert plain[-1] < 0.9 * plain[0], "nothing was learned, so nothing was compared"


@pytest.mark.parametrize("precision", ["amp", "amp_bf16", "pure_bf16"])
@pytest.mark.parametrize("loss", [CLIP, SIGLIP], ids=["clip", "siglip"])
def test_half_precision(trainer, folder, tmp_path, loss, precision):
    options = (loss, f"--precision {precision}", "--epochs 1")
    plain, patched = both(trainer, folder, tmp_path, *options)
    # In the first step the weights are the same. bfloat16 has eight bits: open_clip rounds a logit
    # (below 16) by up to 2^-5, and in pure_bf16 the loss (below 8) by up to 2^-6; ours are float32.
    assert patched[0] == pytest.approx(plain[0], abs=2**-5 + 2**-6)
    assert all(map(math.isfinite, patched))


def test_the_log_names_loss_and_backend(trainer, folder, tmp_path):
    found = run(*flags(folder, tmp_path, CLIP, "--precision fp32 --epochs 1"))
    assert found.exit_code == 0, found.output
    said = [line for line in log(tmp_path).splitlines() if "fastgoal's" in line]
    assert len(said) == 1
    assert said[0].endswith(
        "ClipLoss calls fastgoal's clip_contrastive_loss, "
        "backend torch: the tensors are on cpu, not on a CUDA device"
    )


def log(out: Path) -> str:
    return (out / "run" / "out.log").read_text()


# -- without training -----------------------------------------------------------------------------


@pytest.fixture
def only_the_loss(trainer, monkeypatch):
    """open_clip_train.main cut down to the place where it builds its loss; the losses so built."""
    built = []

    def main(arguments):
        args = trainer.parse_args(arguments)
        args.rank, args.world_size = 0, 1
        args.distill = args.distill_model is not None
        built.append(trainer.create_loss(args))

    monkeypatch.setattr(trainer, "main", main)
    return built


@pytest.mark.parametrize(
    "options, words",
    [
        ("--siglip", "SigLipLoss calls fastgoal's sigmoid_contrastive_loss, backend torch"),
        ("--model coca_ViT-B-32", "CoCaLoss calls fastgoal's clip_contrastive_loss, backend torch"),
        ("--distill-model RN50", "DistillClipLoss is open_clip's own"),
    ],
)
def test_every_loss_is_named(only_the_loss, caplog, options, words):
    caplog.set_level(logging.INFO)
    assert run(*options.split(), "--device", "cpu").exit_code == 0
    assert words in caplog.text
    assert type(only_the_loss[0]).__name__ == words.split()[0]


def test_other_ranks_say_nothing(trainer, only_the_loss, caplog, monkeypatch):
    caplog.set_level(logging.INFO)
    create_loss = trainer.create_loss

    def on_rank_1(args):
        args.rank = 1
        return create_loss(args)

    monkeypatch.setattr(trainer, "create_loss", on_rank_1)
    assert run("--device", "cpu").exit_code == 0
    assert only_the_loss and "fastgoal" not in caplog.text


@pytest.mark.parametrize("ends", ["well", "badly"])
def test_open_clip_is_itself_again(trainer, monkeypatch, ends):
    import open_clip

    before = open_clip.ClipLoss.forward, open_clip.loss.SigLipLoss.forward, trainer.create_loss
    during = []

    def main(arguments):
        assert trainer.create_loss is not before[-1]
        during.append((open_clip.ClipLoss.forward, open_clip.loss.SigLipLoss.forward))
        if ends == "badly":
            raise ZeroDivisionError("a bug")

    monkeypatch.setattr(trainer, "main", main)
    found = run("--device", "cpu")
    assert found.exit_code == (1 if ends == "badly" else 0)
    assert during == [(modules.ClipLoss.forward, modules.SigLipLoss.forward)]
    after = open_clip.ClipLoss.forward, open_clip.loss.SigLipLoss.forward, trainer.create_loss
    assert after == before
    assert not set(before) & set(during[0])


# -- what it refuses ------------------------------------------------------------------------------


def assert_refused(found, *words: str) -> None:
    assert found.exit_code == 2, found.output
    assert "error:" in found.output and "Traceback" not in found.output
    for word in words:
        assert word in found.output


def test_a_missing_package_is_named_with_the_fix(trainer, monkeypatch):
    for name in ("open_clip_train.main", "open_clip_train.data"):
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "webdataset", None)
    fix = "Fix: pip install 'open_clip_torch[training]'"
    assert_refused(run("--device", "cpu"), "webdataset", fix)


def test_a_package_that_a_flag_needs_is_named(trainer, monkeypatch):
    monkeypatch.setattr(trainer, "main", lambda arguments: __import__("no_such_package"))
    assert_refused(run("--use-bnb-linear", "x"), "No module named 'no_such_package'", "Fix:")


def test_horovod_is_refused_by_name(only_the_loss):
    assert_refused(run("--horovod"), "--horovod is not served", "torchrun")
    assert not only_the_loss


def test_a_backend_that_can_not_serve_is_refused(only_the_loss, monkeypatch):
    with use_backend("triton"):
        found = run("--device", "cpu")
    assert_refused(found, "backend 'triton' was asked for, but the tensors are on cpu")


def test_a_run_that_exists_is_refused(trainer, folder, tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "out.log").touch()
    found = run(*flags(folder, tmp_path, CLIP))
    assert_refused(found, "Experiment already exists", "open_clip_train gave up")


def test_a_scheduler_that_does_not_exist_is_refused(trainer, folder, tmp_path):
    found = run(*flags(folder, tmp_path, CLIP, "--lr-scheduler linear"))
    assert_refused(found, "open_clip_train gave up")
    assert "Unknown scheduler, linear" in log(tmp_path)


def test_ctrl_c(trainer, monkeypatch):
    def main(arguments):
        raise KeyboardInterrupt

    monkeypatch.setattr(trainer, "main", main)
    found = run("--device", "cpu")
    assert found.exit_code == 130 and "Interrupted" in found.output


@pytest.mark.parametrize(
    "arguments, code, words",
    [
        (["--help"], 0, "--accum-freq"),
        (["--no-such-flag"], 2, "--no-such-flag"),
        ([], 2, "-- FLAGS"),
    ],
)
def test_help_and_mistyped_flags(trainer, arguments, code, words):
    found = run(*arguments)
    assert found.exit_code == code
    assert words in found.output


# -- open_clip's own tests ------------------------------------------------------------------------

WITH_THE_PATCH = """
import sys
from unittest import mock

import pytest

from fastgoal_kernels import modules, patch_open_clip

patch_open_clip()
ours = modules.clip_contrastive_loss
with mock.patch.object(modules, "clip_contrastive_loss", wraps=ours) as spy:
    code = pytest.main(sys.argv[1:])
print(f"our loss was called {spy.call_count} times")
sys.exit(code or not spy.call_count)
"""


@pytest.mark.slow
@pytest.mark.skipif(
    "FASTGOAL_OPEN_CLIP_TESTS" not in os.environ,
    reason="FASTGOAL_OPEN_CLIP_TESTS does not name the tests folder of an open_clip source archive",
)
def test_open_clips_own_training_tests(trainer):
    """Its models are whole ones: tens of minutes on two cores, and some GB of checkpoints."""
    tests = Path(os.environ["FASTGOAL_OPEN_CLIP_TESTS"]) / "test_training_simple.py"
    # The mt5 model downloads its text tower.
    options = ["-q", "-p", "no:cacheprovider", "-k", "not mt5", str(tests.resolve())]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    with tempfile.TemporaryDirectory() as folder:  # pytest's own folders outlive the run
        done = subprocess.run(
            [sys.executable, "-c", WITH_THE_PATCH, *options],
            cwd=folder, env=environment, capture_output=True, text=True,
        )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr


# -- several processes ----------------------------------------------------------------------------

RANKS = 2
LOCAL = "--local-loss --gather-with-grad"
DISTRIBUTED = [
    *(f"{CLIP} {how}" for how in ("", "--local-loss", "--gather-with-grad", LOCAL)),
    *(f"{SIGLIP} --loss-dist-impl {name}" for name in ("bidir", "shift", "reduce", "gather")),
    *(f"{loss} --accum-freq 2" for loss in (f"{CLIP} {LOCAL}", SIGLIP)),
]


def run_rank(folder: Path, out: Path) -> None:
    """Every case by both trainers, in one process of torchrun's; the losses go to a file."""
    import open_clip_train.main as trainer

    # Once: both trainers would start it anew, over and over.
    dist.init_process_group("gloo")
    data_parallel = torch.nn.parallel.DistributedDataParallel

    def on_the_cpu(model, device_ids, **options):  # open_clip names a device, CPUs must have none
        return data_parallel(model, **options)

    results = []
    with (
        mock.patch.object(dist, "init_process_group"),
        mock.patch.object(torch.nn.parallel, "DistributedDataParallel", on_the_cpu),
    ):
        for number, options in enumerate(DISTRIBUTED):
            common = ["--precision fp32 --epochs 1 --batch-size 4", options]
            pair = []
            for name, train in (("plain", trainer.main), ("ours", run_open_clip_train)):
                arguments = flags(folder, out / f"{name}-{number}", *common)
                pair.append(backward_losses(lambda train=train, a=arguments: train(a)))
                logging.root.handlers.clear()  # else every log goes on into the first file
                dist.barrier()
            results.append(pair)
    (out / f"{dist.get_rank()}.json").write_text(json.dumps(results))
    dist.barrier()
    dist.destroy_process_group()


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="gloo's interface is named as Linux names it")
def test_distributed_training(trainer, folder, tmp_path):
    """torchrun, two processes, data parallel training, and every distributed flag of the losses."""
    environment = os.environ | {
        "PYTHONPATH": os.pathsep.join(sys.path), "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo",
    }  # fmt: skip
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    done = subprocess.run(
        [*torchrun, "--nproc-per-node", str(RANKS), __file__, str(folder), str(tmp_path)],
        env=environment, capture_output=True, text=True, timeout=500,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    for rank in range(RANKS):
        results = json.loads((tmp_path / f"{rank}.json").read_text())
        for options, (plain, ours) in zip(DISTRIBUTED, results, strict=True):
            assert len(plain) == PICTURES // (4 * RANKS)
            # Float32 sums in another order, through four steps of feedback.
            assert ours == pytest.approx(plain, rel=1e-5), options
            assert max(plain) - min(plain) > 1e-2, "nothing was learned, so nothing was compared"
    for number in range(len(DISTRIBUTED)):  # one process logs the line
        assert (tmp_path / f"ours-{number}/run/out.log").read_text().count("fastgoal's") == 1


if __name__ == "__main__":
    run_rank(*map(Path, sys.argv[1:]))
