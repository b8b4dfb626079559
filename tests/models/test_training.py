"""The training loop: its path does not depend on where it was stopped (kills: their own file)."""

import math
import os
import random
import signal
import threading
from itertools import accumulate, chain, pairwise
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from fastgoal_models import FastGoalBatch, FastGoalModel
from fastgoal_models.checkpoints import (
    CheckpointError,
    complete_checkpoints,
    latest_checkpoint,
    load_checkpoint,
)
from fastgoal_models.errors import ConfigError
from fastgoal_models.fast_goal_training import FastGoalTrainConfig
from fastgoal_models.training import (
    BatchOrder,
    StepRecord,
    TrainingError,
    learning_rate,
    precision_name,
    read_log,
    train,
)

DEVICES = ["cpu"] + (["cuda"] if torch.cuda.is_available() else [])

RECORDS, BATCH, STEPS = (
    7,
    2,
    8,
)  # three steps an epoch, one record left over: steps 4 and 7 start one
CONTEXT = 12
CLIP = {
    "embed_dim": 16,
    "vision_cfg": {"image_size": 32, "layers": 1, "width": 32, "head_width": 16, "patch_size": 16},
    "text_cfg": {"context_length": CONTEXT, "width": 8, "heads": 2, "layers": 1},
}


class NoisyModel(FastGoalModel):
    """Uses random numbers in the forward pass, so that resuming has to restore them too."""

    def forward(self, batch):
        features = super().forward(batch)
        dropped = F.dropout(features["image_features"], 0.2, self.training)
        return features | {"image_features": dropped * (1 + 0.1 * random.random())}


def make_model() -> NoisyModel:
    torch.manual_seed(3)
    return NoisyModel.create(CLIP, context_length=CONTEXT)


def make_items(count: int = RECORDS) -> list[FastGoalBatch]:
    """Random pictures and captions; every caption has its own length."""
    generator = torch.Generator().manual_seed(4)
    items = []
    for number in range(count):
        words = 3 + number % 6
        text = torch.zeros(CONTEXT, dtype=torch.long)
        text[: words + 2] = torch.tensor([49406, *range(320 + number, 320 + number + words), 49407])
        local = torch.zeros(CONTEXT, dtype=torch.long)
        local[:4] = torch.tensor([49406, 320 + number, 321 + number, 49407])
        items.append(
            FastGoalBatch(
                images=torch.randn(3, 32, 32, generator=generator),
                texts=text,
                local_images=torch.randn(3, 32, 32, generator=generator),
                local_texts=local,
                boxes=torch.tensor([0.0, 0.0, 20.0, 10.0]),
                image_sizes=torch.tensor([40, 20]),
                spans=torch.tensor([1, 3]),
                lengths=torch.tensor(words + 2),
            )
        )
    return items


def make_config(out: Path, **changes) -> FastGoalTrainConfig:
    return FastGoalTrainConfig(
        **({"out": out, "steps": STEPS, "batch_size": BATCH, "learning_rate": 1e-3} | changes)
    )


def weights_of(path: Path) -> dict[str, torch.Tensor]:
    return load_checkpoint(path).weights


def assert_same_bits(first: Path, second: Path) -> None:
    one, two = load_checkpoint(first), load_checkpoint(second)
    assert one.step == two.step
    assert one.weights.keys() == two.weights.keys()
    for name, tensor in one.weights.items():
        assert torch.equal(tensor, two.weights[name]), name
    for key, state in one.state["optimizer"]["state"].items():
        for name, value in state.items():
            assert torch.equal(value, two.state["optimizer"]["state"][key][name]), (key, name)
    assert torch.equal(one.state["random"]["torch"], two.state["random"]["torch"])
    assert one.state["random"]["python"] == two.state["random"]["python"]


def without_time(records: list[StepRecord]) -> list[StepRecord]:
    return [record._replace(seconds=0.0, images_per_second=0.0) for record in records]


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory) -> Path:
    """A run that nobody stopped, with a checkpoint after every step."""
    out = tmp_path_factory.mktemp("undisturbed")
    result = train(
        make_model(), make_items(), make_config(out, save_every=1, keep=None), device="cpu"
    )
    assert (result.step, result.total_steps, result.interrupted) == (STEPS, STEPS, False)
    assert len(complete_checkpoints(out / "checkpoints")) == STEPS
    return out


def final(out: Path) -> Path:
    return out / "checkpoints" / f"step-{STEPS:08d}"


# -- resuming -------------------------------------------------------------------------------------


@pytest.mark.parametrize("step", [1, 2, 3, 5, 7])
def test_resumed_is_undisturbed_bit_for_bit(undisturbed, tmp_path, step):
    checkpoint = undisturbed / "checkpoints" / f"step-{step:08d}"
    torch.manual_seed(99)  # whatever the process did before
    random.seed(99)
    train(make_model(), make_items(), make_config(tmp_path), device="cpu", resume=checkpoint)
    assert_same_bits(final(tmp_path), final(undisturbed))
    resumed = without_time(read_log(tmp_path))
    assert resumed == without_time(read_log(undisturbed))[step:]


@pytest.mark.parametrize("step", [2, 4])
def test_ctrl_c_finishes_the_step_saves_and_resumes(undisturbed, tmp_path, step):
    def press(record: StepRecord) -> None:
        if record.step == step:
            os.kill(os.getpid(), signal.SIGINT)

    before = signal.getsignal(signal.SIGINT)
    config = make_config(tmp_path)
    stopped = train(make_model(), make_items(), config, device="cpu", on_step=press)
    assert stopped.interrupted and stopped.step == step
    assert stopped.checkpoint == latest_checkpoint(tmp_path / "checkpoints")
    assert signal.getsignal(signal.SIGINT) is before
    done = train(make_model(), make_items(), config, device="cpu", resume=True)
    assert not done.interrupted and done.step == STEPS
    assert_same_bits(final(tmp_path), final(undisturbed))
    assert without_time(read_log(tmp_path)) == without_time(read_log(undisturbed))


def test_a_second_ctrl_c_stops_at_once(tmp_path):
    def press_twice(record: StepRecord) -> None:
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGINT)

    before = signal.getsignal(signal.SIGINT)
    with pytest.raises(KeyboardInterrupt):
        train(make_model(), make_items(), make_config(tmp_path), device="cpu", on_step=press_twice)
    assert signal.getsignal(signal.SIGINT) is before
    assert latest_checkpoint(tmp_path / "checkpoints") is None


def test_training_works_outside_the_main_thread(undisturbed, tmp_path):
    """Where no signal handler can be set; and the same bits come out."""
    thread = threading.Thread(
        target=train,
        args=(make_model(), make_items(), make_config(tmp_path)),
        kwargs={"device": "cpu"},
    )
    thread.start()
    thread.join()
    # Another thread may use another number of them for a product: the weights, not their bits.
    for name, tensor in weights_of(final(tmp_path)).items():
        torch.testing.assert_close(tensor, weights_of(final(undisturbed))[name])


def test_resuming_a_finished_run_changes_nothing(undisturbed):
    before = (undisturbed / "log.jsonl").read_bytes()
    config = make_config(undisturbed, save_every=1, keep=None)
    model = make_model()
    result = train(model, make_items(), config, device="cpu", resume=True)
    assert result == (STEPS, STEPS, False, final(undisturbed))
    assert (undisturbed / "log.jsonl").read_bytes() == before
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, weights_of(final(undisturbed))[name])


def test_what_a_kill_after_the_last_save_leaves_is_taken_away(tmp_path):
    config = make_config(tmp_path, steps=2, save_every=1, keep=None)
    done = train(make_model(), make_items(), config, device="cpu")
    left = [tmp_path / "checkpoints" / ".writing-old-dead", tmp_path / "checkpoints/step-00000001"]
    left[0].mkdir()
    file = tmp_path / ".writing-best.json-dead"
    file.write_text("{")
    config = make_config(tmp_path, steps=2, save_every=1, keep=1)
    again = train(make_model(), make_items(), config, device="cpu", resume=True)
    assert again.checkpoint == done.checkpoint
    assert not any(path.exists() for path in [*left, file])


# -- refusals -------------------------------------------------------------------------------------


def test_a_different_run_is_not_resumed(undisturbed, tmp_path):
    other = make_config(tmp_path, learning_rate=5e-4, seed=1, num_workers=0, keep=9, save_every=3)
    checkpoint = undisturbed / "checkpoints" / "step-00000002"
    with pytest.raises(CheckpointError) as refused:
        train(make_model(), make_items(6), other, device="cpu", resume=checkpoint)
    message = str(refused.value)
    assert "learning_rate was 0.001, is now 0.0005" in message
    assert "seed was 0, is now 1" in message
    assert "records was 7, is now 6" in message
    # What only says where and how often to write is free to change.
    assert not any(name in message for name in ("out", "keep", "save_every"))


def test_identity_must_agree(tmp_path):
    config = make_config(tmp_path, steps=1)
    train(make_model(), make_items(), config, device="cpu", identity={"data": "a1"})
    with pytest.raises(CheckpointError, match="data was 'a1', is now 'b2'"):
        train(
            make_model(), make_items(), config, device="cpu", resume=True, identity={"data": "b2"}
        )


def test_another_model_is_not_resumed(undisturbed, tmp_path):
    torch.manual_seed(0)
    wider = NoisyModel.create(CLIP | {"embed_dim": 24}, context_length=CONTEXT)
    checkpoint = undisturbed / "checkpoints" / "step-00000002"
    with pytest.raises(CheckpointError, match="does not fit this model"):
        train(wider, make_items(), make_config(tmp_path), device="cpu", resume=checkpoint)


def test_nothing_to_resume(tmp_path):
    with pytest.raises(CheckpointError, match="no complete checkpoint"):
        train(make_model(), make_items(), make_config(tmp_path), device="cpu", resume=True)


def test_a_fresh_run_does_not_overwrite_checkpoints(undisturbed):
    with pytest.raises(TrainingError, match="already holds checkpoints"):
        train(make_model(), make_items(), make_config(undisturbed), device="cpu")


def test_too_few_records(tmp_path):
    with pytest.raises(TrainingError, match="1 usable records do not fill one batch of 2"):
        train(make_model(), make_items(1), make_config(tmp_path), device="cpu")
    with pytest.raises(TrainingError, match="no usable record"):
        train(make_model(), [], make_config(tmp_path), device="cpu")
    assert list(tmp_path.iterdir()) == []


def test_a_loss_that_is_not_finite_stops_without_a_checkpoint(tmp_path):
    items = make_items()
    items[2] = items[2]._replace(images=torch.full((3, 32, 32), torch.nan))
    with pytest.raises(TrainingError, match="not finite at step"):
        train(make_model(), items, make_config(tmp_path, save_every=1), device="cpu")
    saved = latest_checkpoint(tmp_path / "checkpoints")
    if saved is not None:
        assert all(bool(tensor.isfinite().all()) for tensor in weights_of(saved).values())
    assert [record.step for record in read_log(tmp_path)] == list(
        range(1, len(read_log(tmp_path)) + 1)
    )


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"steps": None}, "steps or epochs"),
        ({"epochs": 2}, "steps or epochs"),
        ({"steps": 0}, "steps must be at least 1"),
        ({"batch_size": 0}, "batch_size must be at least 1"),
        ({"learning_rate": -1.0}, "learning_rate must be 0 or more"),
        ({"clip_norm": 0.0}, "clip_norm must be above 0"),
        ({"warmup": 1.5}, "warmup"),
        ({"precision": "fp64"}, "precision must be one of"),
        ({"save_every": 0}, "save_every must be at least 1"),
        ({"seed": -1}, "seed must be 0 or more"),
    ],
)
def test_bad_configurations(tmp_path, changes, message):
    with pytest.raises(ConfigError, match=message):
        make_config(tmp_path, **changes)


# -- what a step does -----------------------------------------------------------------------------


@pytest.mark.parametrize("device", DEVICES)
def test_training_learns_and_logs(tmp_path, device):
    seen: list[StepRecord] = []
    config = make_config(tmp_path, steps=None, epochs=12, warmup=0.1, learning_rate=5e-3)
    result = train(make_model(), make_items(), config, device=device, on_step=seen.append)
    assert result.total_steps == 12 * (RECORDS // BATCH) == len(seen)
    assert read_log(tmp_path) == seen
    first = sum(record.losses["loss"] for record in seen[:5])
    last = sum(record.losses["loss"] for record in seen[-5:])
    assert last < 0.7 * first
    for record in seen:
        parts = [value for name, value in record.losses.items() if name != "loss"]
        assert len(parts) == 4
        assert record.losses["loss"] == pytest.approx(sum(parts), rel=1e-5)
        assert record.seconds > 0 and record.gradient_norm > 0


def test_frozen_parameters_stay(tmp_path):
    model = make_model()
    model.clip.visual.requires_grad_(False)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    train(model, make_items(), make_config(tmp_path, steps=2), device="cpu")
    for name, tensor in model.state_dict().items():
        frozen = name.startswith("clip.visual.")
        assert torch.equal(tensor, before[name]) == frozen or "bias" in name, name


def test_logit_scale_is_clamped(tmp_path):
    model = make_model()
    config = make_config(tmp_path, steps=2, learning_rate=1.0, warmup=0.0, max_logit_scale=14.0)
    train(model, make_items(), config, device="cpu")
    assert float(model.clip.logit_scale.detach().exp()) <= 14.0 * (1 + 1e-6)


def test_padding_does_not_matter(tmp_path):
    """Longer rows of zeros behind the end token: the same captions, so nearly the same weights.

    A text of another width may be multiplied in another order, so not the same bits.
    """
    short = [
        item._replace(texts=item.texts[:10], local_texts=item.local_texts[:10])
        for item in make_items()
    ]
    train(make_model(), make_items(), make_config(tmp_path / "a", steps=2), device="cpu")
    train(make_model(), short, make_config(tmp_path / "b", steps=2), device="cpu")
    for name, tensor in weights_of(tmp_path / "a/checkpoints/step-00000002").items():
        other = weights_of(tmp_path / "b/checkpoints/step-00000002")[name]
        torch.testing.assert_close(tensor, other, rtol=1e-4, atol=1e-6)


def test_readers_in_other_processes_change_nothing(undisturbed, tmp_path):
    train(make_model(), make_items(), make_config(tmp_path, num_workers=1), device="cpu")
    assert_same_bits(final(tmp_path), final(undisturbed))


def test_weight_decay_spares_vectors_unless_published(tmp_path):
    def groups(config: FastGoalTrainConfig) -> list[tuple[int, float]]:
        train(make_model(), make_items(), config, device="cpu")
        state = load_checkpoint(latest_checkpoint(config.out / "checkpoints")).state["optimizer"]
        return [(len(g["params"]), g["weight_decay"]) for g in state["param_groups"]]

    parameters = list(make_model().parameters())
    matrices = sum(parameter.ndim >= 2 for parameter in parameters)
    assert groups(make_config(tmp_path / "default", steps=1)) == [
        (matrices, 0.05),
        (len(parameters) - matrices, 0.0),
    ]
    published = FastGoalTrainConfig.published(tmp_path / "published", steps=1, batch_size=2)
    assert groups(published) == [(len(parameters), 0.05)]


def test_the_published_recipe():
    config = FastGoalTrainConfig.published(Path("run"))
    assert (config.epochs, config.steps, config.batch_size) == (10, None, 256)
    assert (config.learning_rate, config.weight_decay, config.decay_all) == (5e-6, 0.05, True)
    assert (config.warmup, config.clip_norm, config.max_logit_scale) == (0.0, None, None)
    assert (config.global_weight, config.local_weight, config.tsl_weight) == (1.0, 0.5, 1.0)


def test_published_schedule_is_pytorchs_cosine():
    config = FastGoalTrainConfig.published(Path("run"), steps=20)
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=5e-6)
    cosine = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=20)
    for step in range(1, 21):
        # The scheduler multiplies up rounding step by step; the formula does not.
        assert learning_rate(step, 20, config) == pytest.approx(cosine.get_last_lr()[0], rel=1e-9)
        optimizer.step()
        cosine.step()


def test_warm_up_rises_to_the_peak_and_then_falls():
    config = make_config(Path("run"), steps=100, warmup=0.1, learning_rate=1.0)
    rates = [learning_rate(step, 100, config) for step in range(1, 101)]
    assert rates[:10] == pytest.approx([step / 10 for step in range(1, 11)])
    assert rates[10] == 1.0
    assert all(a > b for a, b in pairwise(rates[10:]))
    assert 0 < rates[-1] < 1e-3


def test_order_is_a_permutation_of_each_epoch_and_of_nothing_else():
    whole = list(BatchOrder(7, 2, seed=5, start=0, stop=9))
    for epoch in range(3):
        read = list(chain(*whole[3 * epoch : 3 * epoch + 3]))
        assert len(set(read)) == 6 and set(read) <= set(range(7))
    for start in range(9):
        assert list(BatchOrder(7, 2, seed=5, start=start, stop=9)) == whole[start:]
    assert whole != list(BatchOrder(7, 2, seed=6, start=0, stop=9))
    assert whole[:3] != whole[3:6]


def test_bf16_is_chosen_where_there_is_some(tmp_path):
    cpu = torch.device("cpu")
    for precision, name in (
        ("auto", "float32"), ("bf16", "bf16"), ("fp16", "fp16"), ("fp32", "float32")
    ):  # fmt: skip
        assert precision_name(make_config(tmp_path, precision=precision), cpu) == name
    train(
        make_model(), make_items(), make_config(tmp_path, precision="bf16", steps=2), device="cpu"
    )
    assert math.isfinite(read_log(tmp_path)[-1].losses["loss"])


def test_a_half_written_log_line_is_dropped(tmp_path):
    train(make_model(), make_items(), make_config(tmp_path, steps=2), device="cpu")
    log = tmp_path / "log.jsonl"
    log.write_bytes(log.read_bytes() + b'{"step": 3, "tot')
    assert [record.step for record in read_log(tmp_path)] == [1, 2]


@pytest.mark.parametrize("changes", [{"ema": 0.5}, {"warmup": 3}, {"precision": "bf16"}])
def test_resumed_with_other_options_is_undisturbed(tmp_path, changes):
    config = make_config(tmp_path / "a", steps=4, save_every=2, keep=None, **changes)
    train(make_model(), make_items(), config, device="cpu")
    again = make_config(tmp_path / "b", steps=4, save_every=2, keep=None, **changes)
    checkpoint = tmp_path / "a" / "checkpoints" / "step-00000002"
    train(make_model(), make_items(), again, device="cpu", resume=checkpoint)
    last = "checkpoints/step-00000004"
    assert_same_bits(tmp_path / "b" / last, tmp_path / "a" / last)


def test_the_moving_average_is_kept_beside_the_weights(tmp_path):
    config = make_config(tmp_path, steps=3, save_every=1, keep=None, ema=0.9)
    train(make_model(), make_items(), config, device="cpu")
    saved = [load_checkpoint(tmp_path / "checkpoints" / f"step-{step:08d}") for step in (1, 2, 3)]
    name = "clip.visual.proj"
    average = saved[0].weights[name]
    for checkpoint in saved[1:]:
        average = 0.9 * average + 0.1 * checkpoint.weights[name]
    torch.testing.assert_close(saved[-1].state["ema"][f"module.{name}"], average)


def test_warm_up_by_steps():
    config = make_config(Path("run"), steps=100, warmup=4, learning_rate=1.0)
    assert [learning_rate(step, 100, config) for step in (1, 2, 4)] == [0.25, 0.5, 1.0]
    assert learning_rate(5, 100, config) == 1.0 > learning_rate(6, 100, config)


class ByEpoch:
    """Items that say from which epoch they were asked for."""

    def __init__(self) -> None:
        self.items, self.asked = make_items(), []

    def __len__(self) -> int:
        return len(self.items)

    def __getitem__(self, index: int):
        raise AssertionError("the loop asks `at`")

    def at(self, epoch: int, index: int):
        self.asked.append((epoch, index))
        return self.items[index]


def test_items_that_change_are_asked_for_by_epoch(tmp_path):
    dataset = ByEpoch()
    config = make_config(tmp_path, steps=None, epochs=3)
    train(make_model(), dataset, config, device="cpu")
    per_epoch = len(dataset) // config.batch_size * config.batch_size
    assert [epoch for epoch, _ in dataset.asked] == sorted([0, 1, 2] * per_epoch)
    assert len({index for epoch, index in dataset.asked if epoch == 1}) == per_epoch


def test_fp16_leaves_out_what_overflows_and_resumes_with_its_scale(tmp_path):
    """The first scale, 2^16, is too large for this model: steps are left out until it fits."""

    def config(out: str) -> FastGoalTrainConfig:
        return make_config(tmp_path / out, precision="fp16", save_every=1, keep=None)

    train(make_model(), make_items(), config("a"), device="cpu")
    log = read_log(tmp_path / "a")
    skipped = [not math.isfinite(record.gradient_norm) for record in log]
    assert skipped[0] and not all(skipped)
    assert [record.skipped_steps for record in log] == list(accumulate(skipped))
    saved = [tmp_path / "a" / "checkpoints" / f"step-{step:08d}" for step in range(1, STEPS + 1)]
    projections = [
        make_model().clip.visual.proj,
        *(weights_of(p)["clip.visual.proj"] for p in saved),
    ]
    assert [torch.equal(before, after) for before, after in pairwise(projections)] == skipped
    train(make_model(), make_items(), config("b"), device="cpu", resume=saved[0])
    assert_same_bits(final(tmp_path / "b"), final(tmp_path / "a"))
    assert [record.skipped_steps for record in read_log(tmp_path / "b")] == [
        record.skipped_steps for record in log[1:]
    ]


class Broken(NoisyModel):
    """A finite loss whose gradient never is."""

    def forward(self, batch):
        features = super().forward(batch)
        zero = (features["image_features"] * 0).sum()
        return features | {"image_features": features["image_features"] + zero.abs().sqrt()}


def test_fp16_does_not_leave_out_steps_for_ever(tmp_path):
    torch.manual_seed(3)
    model = Broken.create(CLIP, context_length=CONTEXT)
    config = make_config(tmp_path, steps=60, precision="fp16")
    with pytest.raises(TrainingError, match=r"not finite at step (29|30|31) .*gradient norm nan"):
        train(model, make_items(), config, device="cpu")
