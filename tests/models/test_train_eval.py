"""Evaluation during training: it changes nothing, and the best checkpoint stays."""

import json
import os
import random
import re
import shutil
import signal
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from typer.testing import CliRunner

from fastgoal_models import FastGoalDataset, FastGoalModel, write_glit
from fastgoal_models.checkpoints import complete_checkpoints, latest_checkpoint, load_checkpoint
from fastgoal_models.cli import app
from fastgoal_models.errors import ConfigError
from fastgoal_models.fast_goal_training import FastGoalTrainConfig
from fastgoal_models.loading import load_model
from fastgoal_models.lora import LoraAdapters
from fastgoal_models.options import tensors_digest
from fastgoal_models.trackers import scalars, watched
from fastgoal_models.training import (
    EvalRecord,
    Evaluation,
    best_checkpoint,
    read_evaluations,
    read_log,
    train,
)
from tests.models.small_models import CONFIG, coloured_records
from tests.models.test_training import (
    STEPS,
    assert_same_bits,
    final,
    make_config,
    make_items,
    make_model,
    without_time,
)

SCORES = {1: 0.1, 2: 0.5, 3: 0.2, 4: 0.5, 5: 0.6, 6: 0.3, 7: 0.1, 8: 0.4}


def evaluation(scores=SCORES, of: str = "set") -> Evaluation:
    """Gives the scores of the list in turn, and draws random numbers meanwhile."""
    waiting = iter(scores.values() if isinstance(scores, dict) else scores)

    def measure(model):
        assert not torch.is_autocast_enabled("cpu")
        torch.rand(3), random.random()
        score = next(waiting)
        return score, {"mean_r1": score, "other": 1.0}

    return Evaluation(of, measure)


def run(out: Path, judge: Evaluation | None, resume=False, **changes):
    more = {"on_step": changes.pop("on_step", None), "on_eval": changes.pop("on_eval", None)}
    config = make_config(out, **changes)
    return train(
        make_model(), make_items(), config, device="cpu", resume=resume, evaluation=judge, **more
    )


def steps_in(out: Path) -> list[int]:
    return [
        int(path.name.removeprefix("step-")) for path in complete_checkpoints(out / "checkpoints")
    ]


def best_of(out: Path) -> dict:
    return json.loads((out / "best.json").read_text())


def without_seconds(out: Path) -> list[EvalRecord]:
    return [record._replace(seconds=0.0) for record in read_evaluations(out)]


def test_it_changes_nothing(tmp_path):
    run(tmp_path / "without", None, save_every=1, keep=None)
    seen: list[EvalRecord] = []
    run(tmp_path / "with", evaluation(), eval_every=1, save_every=1, keep=None, on_eval=seen.append)
    for step in range(1, STEPS + 1):
        name = f"checkpoints/step-{step:08d}"
        assert_same_bits(tmp_path / "with" / name, tmp_path / "without" / name)
    assert without_time(read_log(tmp_path / "with")) == without_time(read_log(tmp_path / "without"))
    assert seen == read_evaluations(tmp_path / "with")
    assert [(record.step, record.score) for record in seen] == list(SCORES.items())
    assert seen[0].values == {"mean_r1": 0.1, "other": 1.0} and seen[0].total_steps == STEPS
    assert not (tmp_path / "without" / "eval.jsonl").exists()
    assert not (tmp_path / "with" / "best.json").exists()


def test_when_it_is_made(tmp_path):
    run(tmp_path / "a", evaluation(), eval_every=3)
    assert [record.step for record in read_evaluations(tmp_path / "a")] == [3, 6, 8]
    run(tmp_path / "b", evaluation())
    assert [record.step for record in read_evaluations(tmp_path / "b")] == [8]
    assert steps_in(tmp_path / "a") == [8]


def test_the_best_is_kept_beside_the_newest(tmp_path):
    run(tmp_path, evaluation(), eval_every=1, keep_best=True, save_every=1, keep=2)
    assert steps_in(tmp_path) == [5, 7, 8]
    told = best_of(tmp_path)
    assert told == {
        "checkpoint": "checkpoints/step-00000005", "step": 5, "score": 0.6, "of": "set"
    }  # fmt: skip
    assert best_checkpoint(tmp_path) == tmp_path / told["checkpoint"]


def test_the_best_is_saved_when_it_is_found(tmp_path):
    """Though nothing else is due; of two that are equal it is the first."""
    run(tmp_path, evaluation([0.3, 0.3, 0.2, 0.1]), eval_every=2, keep_best=True)
    assert steps_in(tmp_path) == [2, 8] and best_of(tmp_path)["step"] == 2


@pytest.mark.parametrize("stop", range(1, STEPS))
def test_resumed_keeps_the_record(tmp_path, stop):
    more = {"eval_every": 1, "keep_best": True, "keep": 1}
    run(tmp_path / "a", evaluation(), **more)

    def press(record) -> None:
        if record.step == stop:
            os.kill(os.getpid(), signal.SIGINT)

    out = tmp_path / "b"
    assert run(out, evaluation(), on_step=press, **more).interrupted
    rest = [SCORES[step] for step in range(stop + 1, STEPS + 1)]
    run(out, evaluation(rest), resume=True, **more)
    assert_same_bits(final(out), final(tmp_path / "a"))
    assert without_seconds(out) == without_seconds(tmp_path / "a")
    assert best_of(out) == best_of(tmp_path / "a")
    assert steps_in(out) == steps_in(tmp_path / "a") == [5, 8]


def test_killed_between_the_checkpoint_and_its_note(tmp_path, monkeypatch):
    from fastgoal_models.training.judge import Judge

    class Killed(BaseException):
        pass

    def die(judge) -> None:
        if judge.best is not None and judge.best.step == 5:
            raise Killed
        note(judge)

    more = {"eval_every": 1, "keep_best": True, "keep": 1}
    note = Judge.note_best
    with monkeypatch.context() as patch:
        patch.setattr(Judge, "note_best", die)
        with pytest.raises(Killed):
            run(tmp_path, evaluation(), **more)
    # The note never names what is gone.
    assert best_of(tmp_path)["step"] == 2 and steps_in(tmp_path) == [2, 5]
    run(tmp_path, evaluation([0.3, 0.1, 0.4]), resume=True, **more)
    assert best_of(tmp_path)["step"] == 5 and steps_in(tmp_path) == [5, 8]


def test_killed_in_an_evaluation(tmp_path):
    """What was written after the last checkpoint is dropped, and made again."""
    more = {"eval_every": 1, "keep_best": True, "save_every": 4, "keep": 1}
    with pytest.raises(StopIteration):
        run(tmp_path, evaluation([0.1, 0.5, 0.2, 0.5, 0.5, 0.4]), **more)
    assert steps_in(tmp_path) == [2, 4] and len(read_evaluations(tmp_path)) == 6
    with (tmp_path / "eval.jsonl").open("a") as file:
        file.write('{"step": 7, "tot')
    run(tmp_path, evaluation([0.4, 0.3, 0.6, 0.1]), resume=True, **more)
    assert [record.score for record in read_evaluations(tmp_path)][4:] == [0.4, 0.3, 0.6, 0.1]
    assert best_of(tmp_path)["step"] == 7


def test_an_older_checkpoint_forgets_a_later_best(tmp_path):
    more = {"eval_every": 1, "keep_best": True, "save_every": 1, "keep": None}
    run(tmp_path, evaluation(), **more)
    older = tmp_path / "checkpoints" / "step-00000003"
    run(tmp_path, evaluation([0.1, 0.2, 0.2, 0.3, 0.4]), resume=older, **more)
    assert best_of(tmp_path)["step"] == 2


def test_options_may_change_from_run_to_run(tmp_path):
    """The best of before stays until there is a better one; other sets are not compared."""
    run(tmp_path, evaluation(), eval_every=1, keep_best=True, keep=1, save_every=1)
    for step in (6, 7, 8):
        shutil.rmtree(tmp_path / f"checkpoints/step-{step:08d}", ignore_errors=True)
    run(tmp_path, None, resume=True, keep=1, save_every=1)
    assert steps_in(tmp_path) == [5, 8] and best_of(tmp_path)["step"] == 5
    shutil.rmtree(tmp_path / "checkpoints/step-00000008")
    run(tmp_path, evaluation([0.01, 0.2, 0.1], of="else"), resume=True, keep=1, eval_every=1,
        keep_best=True)  # fmt: skip
    assert steps_in(tmp_path) == [7, 8]
    assert best_of(tmp_path) == {
        "checkpoint": "checkpoints/step-00000007", "step": 7, "score": 0.2, "of": "else"
    }  # fmt: skip


# -- with a moving average ------------------------------------------------------------------------


def weighing(seen: list | None = None, fail_at: int = 0) -> Evaluation:
    """The score tells one set of weights from another; `seen` gets their digests."""
    seen = [] if seen is None else seen

    def measure(model):
        model.eval()
        weights = model.state_dict()
        seen.append(tensors_digest(weights))
        if len(seen) == fail_at:
            raise KeyboardInterrupt
        model.train()
        score = float(sum(tensor.double().abs().sum() for tensor in weights.values()))
        return score, {"mean_r1": score}

    return Evaluation("set", measure)


def averages(path: Path) -> dict[str, torch.Tensor]:
    state = load_checkpoint(path).state["ema"]
    return {
        name.removeprefix("module."): tensor
        for name, tensor in state.items()
        if name.startswith("module.")
    }


def test_the_moving_average_is_what_is_evaluated_and_nothing_else_changes(tmp_path):
    more = {"save_every": 1, "keep": None, "ema": 0.5}
    run(tmp_path / "without", None, **more)
    seen: list[str] = []
    run(tmp_path / "with", weighing(seen), eval_every=1, **more)
    for step in range(1, STEPS + 1):
        name = f"checkpoints/step-{step:08d}"
        assert_same_bits(tmp_path / "with" / name, tmp_path / "without" / name)
        average = averages(tmp_path / "with" / name)
        expected = averages(tmp_path / "without" / name)
        assert all(torch.equal(average[key], tensor) for key, tensor in expected.items())
        assert seen[step - 1] == tensors_digest(expected)
    records = read_evaluations(tmp_path / "with")
    assert all(record.averaged for record in records)
    assert without_time(read_log(tmp_path / "with")) == without_time(read_log(tmp_path / "without"))


def test_an_evaluation_of_the_average_that_is_interrupted_leaves_the_weights(tmp_path):
    model = make_model()
    config = make_config(tmp_path / "broken", eval_every=4, save_every=1, keep=None, ema=0.5)
    with pytest.raises(KeyboardInterrupt):
        train(model, make_items(), config, device="cpu", evaluation=weighing(fail_at=1))
    run(tmp_path / "whole", None, save_every=1, keep=None, ema=0.5)
    expected = load_checkpoint(tmp_path / "whole/checkpoints/step-00000004").weights
    found = model.state_dict()
    assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())
    train(make_model(), make_items(), config, device="cpu", resume=True, evaluation=weighing())
    assert_same_bits(final(tmp_path / "broken"), final(tmp_path / "whole"))


def test_raw_and_averaged_evaluations_are_not_compared(tmp_path):
    """Runs of before evaluated the raw weights, also where they kept an average."""
    more = {"ema": 0.5, "eval_every": 4, "keep_best": True, "save_every": 4, "keep": None}
    run(tmp_path, evaluation([0.9, 0.8]), **more)
    shutil.rmtree(final(tmp_path))
    first = read_evaluations(tmp_path)[0]._asdict()
    del first["averaged"]
    (tmp_path / "eval.jsonl").write_text(json.dumps(first) + "\n")
    run(tmp_path, evaluation([0.1]), resume=True, **more)
    assert [record.averaged for record in read_evaluations(tmp_path)] == [False, True]
    assert best_of(tmp_path)["step"] == 8 and best_of(tmp_path)["score"] == 0.1


def test_an_evaluation_is_needed(tmp_path):
    for changes in ({"eval_every": 2}, {"keep_best": True}):
        with pytest.raises(ConfigError, match="Fix: --eval-data FILE"):
            run(tmp_path, None, **changes)
    with pytest.raises(ConfigError, match="eval_every must be at least 1"):
        make_config(tmp_path, eval_every=0)


# -- the command ----------------------------------------------------------------------------------


@pytest.fixture
def folder(tmp_path) -> Path:
    write_glit(coloured_records(tmp_path), tmp_path / "data.jsonl")
    (tmp_path / "model.json").write_text(json.dumps(CONFIG))
    return tmp_path


def fastgoal(*words: object):
    found = CliRunner().invoke(app, [str(w) for w in words], env={"COLUMNS": "400"})
    return found.exit_code, re.sub(r"\x1b\[[0-9;]*m", "", found.output)


def command(folder: Path, out: str, *words: object):
    return fastgoal(
        "train", "fast-goal", "--data", folder / "data.jsonl", "--out", folder / out, "--model",
        folder / "model.json", "--context-length", 24, "--steps", 4, "--batch-size", 2, "--device",
        "cpu", "--lr", 1e-2, *words,
    )  # fmt: skip


@pytest.mark.parametrize(
    "more", [[], ["--lora", 2], ["--unlocked-image-blocks", 0], ["--ema", 0.9]]
)
def test_what_is_measured_is_what_eval_says(folder, more):
    if more[:1] == ["--lora"]:
        pytest.importorskip("peft")
    data = ["--eval-data", folder / "data.jsonl", "--eval-every", 3, "--save-every", 1]
    code, said = command(folder, "run", *data, "--keep-best", *more)
    assert code == 0, said
    what = "evaluation of the moving average" if more[:1] == ["--ema"] else "evaluation"
    assert "--eval-data: 3 records read" in said and f"{what} at step 3/4  mean_r1 " in said
    records = read_evaluations(folder / "run")
    assert [record.step for record in records] == [3, 4]
    code, plain = command(folder, "plain", "--save-every", 1, *more)
    assert code == 0, plain
    for name in ("step-00000003", "step-00000004"):
        assert_same_bits(folder / "run/checkpoints" / name, folder / "plain/checkpoints" / name)
    last = latest_checkpoint(folder / "run/checkpoints")
    code, said = fastgoal(
        "eval", "--model", last, "--data", folder / "data.jsonl", "--device", "cpu", "--json",
        folder / "eval.json",
    )  # fmt: skip
    assert code == 0, said
    (model,) = json.loads((folder / "eval.json").read_text())["models"]
    for way in ("text_to_image", "image_to_text"):
        for k, found in model["retrieval"][way].items():
            assert records[-1].values[f"{way}_r{k}"] == found["recall"]
    values = records[-1].values
    mean = (values["text_to_image_r1"] + values["image_to_text_r1"]) / 2
    assert records[-1].score == values["mean_r1"] == mean
    assert (folder / "run" / best_of(folder / "run")["checkpoint"]).is_dir()
    code, said = command(folder, "run", "--resume", "--save-every", 1, *more)
    assert code == 0, said


def test_the_best_checkpoint_of_a_run_with_an_average_is_the_one_that_was_measured(folder):
    """Loaded as `eval` loads it, it has the weights that were evaluated, to the bit."""
    records = coloured_records(folder)
    model = FastGoalModel.create(CONFIG, context_length=24)
    seen: list[str] = []
    config = FastGoalTrainConfig(
        folder / "run", steps=4, batch_size=2, learning_rate=1e-2, ema=0.5, eval_every=1,
        keep_best=True, keep=None,
    )  # fmt: skip
    dataset = FastGoalDataset(records, model.tokenizer, 32, 24)
    identity = {"architecture": CONFIG, "context_length": 24}
    judge = weighing(seen)
    train(model, dataset, config, device="cpu", evaluation=judge, identity=identity)
    best = best_checkpoint(folder / "run")
    assert best is not None
    step = best_of(folder / "run")["step"]
    loaded = load_model(str(best)).model
    assert tensors_digest(loaded.state_dict()) == seen[step - 1]
    score, _ = weighing().measure(loaded)
    assert score == best_of(folder / "run")["score"]
    assert step > 1 and tensors_digest(load_checkpoint(best).weights) != seen[step - 1]


def test_other_pictures_in_another_folder(folder):
    other = folder / "other" / "images"
    other.mkdir(parents=True)
    rows = []
    for number in range(3):
        noise = np.random.default_rng(number).integers(0, 256, (20, 20, 3), dtype=np.uint8)
        Image.fromarray(noise).save(other / f"{number}.png")
        rows.append({"image": f"{number}.png", "caption": f"Noise {number}."})
    (other / "2.png").write_bytes(b"")
    file = folder / "other" / "eval.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    data = ["--eval-data", file, "--eval-root", other]
    code, said = command(folder, "run", *data)
    assert code == 0, said
    assert "--eval-data: 2 records read, 1 skipped" in said
    assert "eval_root: " + str(other) in (folder / "run/config.yaml").read_text()
    code, said = command(folder, "strict", *data, "--strict")
    assert code == 2 and "image is empty" in said


@pytest.mark.parametrize(
    "more",
    [["--eval-every", 2], ["--keep-best"], ["--eval-root", "."], ["--eval-data", "no.jsonl"]],
)
def test_options_that_make_no_sense(folder, more):
    code, said = command(folder, "run", *more)
    assert code == 2
    assert ("Fix: --eval-data FILE" in said) == (more[0] != "--eval-data")
    assert more[0] in said or "no.jsonl" in said
    (folder / "empty.jsonl").write_text("")
    code, said = command(folder, "run", "--eval-data", folder / "empty.jsonl")
    assert code == 2 and "has no usable record" in said


def test_trackers_are_told(capsys):
    from rich.console import Console

    record = EvalRecord(2, 4, "set", 0.5, {"mean_r1": 0.5}, 0.1)
    assert scalars(record) == {"eval/mean_r1": 0.5}
    told: list = []

    class Tracker:
        def __enter__(self):
            return told.append

        def __exit__(self, *error):
            return None

    with watched(Console(width=100), [Tracker()]) as tell:
        tell(record)
    assert told == [record]
    assert "evaluation at step 2/4  mean_r1 0.5" in capsys.readouterr().out
    averaged = record._replace(averaged=True)
    assert scalars(averaged) == {"eval_average/mean_r1": 0.5}
    with watched(Console(width=100), []) as tell:
        tell(averaged)
    assert "evaluation of the moving average at step 2/4" in capsys.readouterr().out


def test_lora_in_evaluation_mode_leaves_its_weights_alone(tmp_path):
    pytest.importorskip("peft")

    def with_lora(out: Path, judge: Evaluation | None):
        model = make_model()
        adapters = LoraAdapters(model, 2)
        config = make_config(out, eval_every=None if judge is None else 1)
        train(model, make_items(), config, device="cpu", adapters=adapters, evaluation=judge)
        return load_checkpoint(latest_checkpoint(out / "checkpoints")).weights

    def measure(model):
        model.eval()
        with torch.no_grad():
            model.encode_image(torch.zeros(1, 3, 32, 32))
            model.encode_text(torch.tensor([[49406, 320, 49407]]))
        model.train()
        return 0.0, {}

    one = with_lora(tmp_path / "one", None)
    two = with_lora(tmp_path / "two", Evaluation("set", measure))
    assert all(torch.equal(one[name], two[name]) for name in one)
