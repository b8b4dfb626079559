"""TensorBoard and W&B if asked, and only then; neither need be installed for these tests."""

import io
import sys
from types import ModuleType, SimpleNamespace

import pytest
from rich.console import Console

from fastgoal_models.errors import UserError
from fastgoal_models.trackers import scalars, trackers, watched
from fastgoal_models.training import StepRecord


def record(step: int, **changes) -> StepRecord:
    made = StepRecord(step, 9, {"loss": 2.0, "fine_loss": 0.5}, 1.5, 14.0, 1e-3, 0.1, 80.0)
    return made._replace(**changes)


class FakeWandb(ModuleType):
    """Keeps what it is told; `broken` refuses to start, as without a key."""

    class Error(Exception):
        pass

    def __init__(self, broken: bool = False) -> None:
        super().__init__("wandb")
        self.broken, self.started, self.logged, self.ended = broken, [], [], []

    def init(self, **how):
        if self.broken:
            raise self.Error("no API key")
        self.started.append(how)
        return SimpleNamespace(
            log=lambda values, step: self.logged.append((step, values)),
            finish=lambda exit_code: self.ended.append(exit_code),
        )


@pytest.fixture
def wandb(monkeypatch) -> FakeWandb:
    monkeypatch.delenv("WANDB_PROJECT", raising=False)
    fake = FakeWandb()
    monkeypatch.setitem(sys.modules, "wandb", fake)
    return fake


@pytest.fixture
def writers(monkeypatch) -> list:
    """The SummaryWriters that were made, in a stand-in for torch.utils.tensorboard."""
    made = []

    class SummaryWriter:
        def __init__(self, folder, purge_step):
            self.folder, self.purge_step, self.rows, self.closed = folder, purge_step, [], False
            made.append(self)

        def add_scalar(self, name, value, step):
            self.rows.append((name, value, step))

        def close(self):
            self.closed = True

    module = ModuleType("torch.utils.tensorboard")
    module.SummaryWriter = SummaryWriter
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", module)
    return made


def run(out, *records: StepRecord, notes=None, resume=False, **which) -> str:
    """Tell the screen and `which` of the records; what the screen says."""
    which = {"tensorboard": False, "wandb": False} | which
    others = trackers(out, notes or {}, resume=resume, **which)
    screen = io.StringIO()
    with watched(Console(file=screen, width=300), others) as on_step:
        for one in records:
            on_step(one)
    return screen.getvalue()


def test_the_screen_is_told_and_nothing_else_is_written(tmp_path, wandb, writers):
    said = run(tmp_path, record(1), record(9, skipped_steps=3))
    assert "step 1/9  loss 2.0000  fine 0.5000" in said and "3 skipped" in said
    assert said.count("skipped") == 1
    assert not list(tmp_path.iterdir()) and not wandb.started and not writers


def test_scalars_have_names_and_numbers():
    assert scalars(record(2)) == {
        "loss": 2.0, "fine_loss": 0.5, "gradient_norm": 1.5, "logit_scale": 14.0,
        "learning_rate": 1e-3, "seconds": 0.1, "images_per_second": 80.0, "skipped_steps": 0,
    }  # fmt: skip
    assert scalars(record(2, peak_bytes=7))["peak_bytes"] == 7


def test_tensorboard_goes_on_where_the_run_does(tmp_path, writers):
    run(tmp_path, record(4), record(5), tensorboard=True, resume=True)
    (writer,) = writers
    assert (writer.folder, writer.purge_step) == (str(tmp_path / "tensorboard"), 4)
    assert ("loss", 2.0, 4) in writer.rows and ("fine_loss", 0.5, 5) in writer.rows
    assert writer.closed


def test_wandb_is_one_run_also_when_resumed(tmp_path, wandb):
    out = tmp_path / "run"
    run(out, record(1), wandb=True, notes={"out": out, "seed": 3})
    run(out, record(2), wandb=True, resume=True)
    run(out, record(1), wandb=True)
    first, second, third = wandb.started
    assert first["id"] == second["id"] != third["id"]
    assert (first["project"], first["name"], first["dir"]) == ("fastgoal", "run", str(out))
    assert first["config"] == {"out": str(out), "seed": 3}
    assert wandb.logged[0] == (1, scalars(record(1))) and wandb.ended == [0, 0, 0]


def test_wandb_hears_that_a_run_failed(tmp_path, wandb):
    others = trackers(tmp_path, {}, tensorboard=False, wandb=True, resume=False)
    with pytest.raises(ZeroDivisionError), watched(Console(file=io.StringIO()), others):
        raise ZeroDivisionError
    assert wandb.ended == [1]


def test_wandb_that_does_not_start_is_the_users_to_mend(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", FakeWandb(broken=True))
    with pytest.raises(UserError, match="W&B did not start: no API key"):
        run(tmp_path, record(1), wandb=True)


@pytest.mark.parametrize(
    "which, module", [("tensorboard", "torch.utils.tensorboard"), ("wandb", "wandb")]
)
def test_a_missing_package_is_named_before_anything_starts(tmp_path, monkeypatch, which, module):
    monkeypatch.setitem(sys.modules, module, None)
    asked = {"tensorboard": False, "wandb": False} | {which: True}
    with pytest.raises(UserError, match=f"--{which}: .*pip install {which}"):
        trackers(tmp_path / "out", {}, resume=False, **asked)
    assert not (tmp_path / "out").exists()
