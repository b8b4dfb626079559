"""Training: one loop for every method, exactly resumable.

Everything that decides the next step is either a pure function of the step's number (which records
it reads, its learning rate) or part of the checkpoint (weights, AdamW's moments, random-number
states). So a run that was stopped anywhere and resumed walks the same path as one that never was:
on a CPU, with as many threads, to the same bits.
"""

from __future__ import annotations

import json
import math
import os
import random
import signal
import threading
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple, Protocol, cast

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from torch.utils.data import DataLoader, Sampler

from fastgoal_kernels import cached_backward

from .checkpoints import (
    Checkpoint,
    CheckpointError,
    checkpoint_path,
    complete_checkpoints,
    latest_checkpoint,
    load_checkpoint,
    save_checkpoint,
    write_text_atomically,
)
from .devices import default_device
from .errors import ConfigError, UserError

PRECISIONS = ("auto", "bf16", "fp16", "fp32")

# These say where and how often to write, how fast to read, and how often to look: a resumed run may
# change them.
_FREE_TO_CHANGE = ("out", "save_every", "keep", "num_workers", "eval_every", "keep_best")

# A scaler starts at 2^16 and halves with every overflow: below this it is not the scale's fault.
_SMALLEST_SCALE = 1e-4


class TrainingError(UserError, RuntimeError):
    """Training can not start or go on; the message says why and what to do."""


@dataclass(frozen=True)
class TrainConfig(ABC):
    """Everything a run depends on besides its model and its data; a subclass for each method.

    `steps` or `epochs`, exactly one of them. An epoch is ⌊records / batch_size⌋ steps over a fresh
    permutation; the records left over sit out that epoch. Raises ConfigError for values that make
    no sense.
    """

    out: Path  # checkpoints/ and log.jsonl go here
    steps: int | None = None
    epochs: int | None = None
    batch_size: int = 32
    micro_batch: int | None = None  # records encoded at a time; the loss sees the whole batch
    learning_rate: float = 1e-5  # the peak
    weight_decay: float = 0.05
    decay_all: bool = False  # also norms, biases and the logit scale, as published code does
    betas: tuple[float, float] = (0.9, 0.98)
    eps: float = 1e-8
    warmup: float = 0.05  # while the rate rises from zero: below 1 a share of the steps, else steps
    clip_norm: float | None = 1.0  # largest norm of the whole gradient; None: no clipping
    ema: float | None = None  # decay of a moving average of the weights, kept beside them
    precision: str = "auto"  # bf16 autocast where a CUDA device has it, else float32
    seed: int = 0
    save_every: int | None = None  # steps between checkpoints; None: only at the end
    keep: int | None = 2  # newest checkpoints to keep; None: all
    num_workers: int = 0  # processes that read images
    eval_every: int | None = None  # steps between evaluations; None: only at the end
    keep_best: bool = False  # also the checkpoint that the evaluation found best

    def __post_init__(self) -> None:
        object.__setattr__(self, "out", Path(self.out))
        object.__setattr__(self, "betas", tuple(self.betas))
        if (self.steps is None) == (self.epochs is None):
            raise ConfigError("give steps or epochs, one of the two")
        at_least_one = (
            "steps",
            "epochs",
            "batch_size",
            "micro_batch",
            "save_every",
            "keep",
            "eval_every",
        )
        not_negative = ("learning_rate", "weight_decay", "num_workers", "seed")
        for names, is_good, wanted in (
            (at_least_one, lambda value: value >= 1, "at least 1"),
            (not_negative, lambda value: value >= 0, "0 or more"),
            (("eps", "clip_norm"), lambda value: value > 0, "above 0"),
            (("ema",), lambda value: 0 < value < 1, "between 0 and 1"),
        ):
            for name in names:
                value = getattr(self, name)
                if value is not None and not is_good(value):
                    raise ConfigError(f"{name} must be {wanted}; got {value}")
        if self.warmup < 0 or (self.warmup >= 1 and self.warmup != int(self.warmup)):
            raise ConfigError(
                "warmup is a share of the steps, in [0, 1), or a whole number of steps; got "
                f"{self.warmup}"
            )
        if self.precision not in PRECISIONS:
            raise ConfigError(f"precision must be one of {PRECISIONS}; got {self.precision!r}")
        if self.micro_batch is not None and type(self).encode is TrainConfig.encode:
            raise ConfigError(
                f"micro_batch: {type(self).__name__} can not cut a batch. Fix: leave it out"
            )

    @abstractmethod
    def collate(self, items: Sequence[Any]) -> Any:
        """Items of the dataset as one batch, which has a `to(device)`."""

    @abstractmethod
    def losses(self, model: Any, batch: Any) -> dict[str, Tensor]:
        """The weighted parts of the loss, by name; their sum is what is minimised."""

    # These two together are `losses`, for a method that can cut a batch (`cached_backward`).

    def encode(self, model: Any, batch: Any) -> Any:
        """What the loss reads of each record: tensors with the records as first dimension."""
        raise NotImplementedError

    def losses_of(self, encoded: Any) -> dict[str, Tensor]:
        """`losses` from what `encode` made of a whole batch."""
        raise NotImplementedError

    @abstractmethod
    def log_scale(self, model: Any) -> Tensor:
        """The logarithm of the logit scale that the log shows."""

    @abstractmethod
    def after_step(self, model: Any) -> None:
        """What keeps the weights in bounds, after each optimizer step."""


class StepRecord(NamedTuple):
    """One optimizer step, as `on_step` gets it and as `log.jsonl` keeps it."""

    step: int  # from 1
    total_steps: int
    losses: dict[str, float]  # "loss", then the weighted parts it is the sum of
    gradient_norm: float  # before clipping
    logit_scale: float  # the multiplier, after the step
    learning_rate: float
    seconds: float
    images_per_second: float = 0.0
    peak_bytes: int | None = None  # of the CUDA device's memory since the run began
    skipped_steps: int = 0  # so far, for gradients that overflowed fp16: no weight moved in those


class EvalRecord(NamedTuple):
    """One evaluation, as `on_eval` gets it and as `eval.jsonl` keeps it."""

    step: int  # steps done
    total_steps: int
    of: str  # what it was measured on: records of other sets are not compared
    score: float  # decides which is best
    values: dict[str, float]  # all that was measured, by name
    seconds: float
    averaged: bool = False  # of the moving average of the weights; not compared with the others


@dataclass(frozen=True)
class Evaluation:
    """How a model is judged during training."""

    of: str
    """what it is measured on, e.g. a digest of the data"""
    measure: Callable[[Any], tuple[float, dict[str, float]]]
    """from the model the score, of which more is better, and all values by name"""


class TrainResult(NamedTuple):
    step: int
    total_steps: int
    interrupted: bool  # by Ctrl-C; what was done is saved
    checkpoint: Path


class Records(Protocol):
    """A map-style dataset whose items `collate` takes; item i must always be the same.

    One whose items change from epoch to epoch has a method `at(epoch, index)` as well, which is
    then called instead, and whose result must depend on nothing else.
    """

    def __len__(self) -> int: ...

    def __getitem__(self, index: int, /) -> Any: ...


class Adapters(Protocol):
    """Small weights that train beside a model's own, which stay as they were when it was built."""

    def merged(self) -> dict[str, Tensor]:
        """The state dict of a model without them that gives the same results."""
        ...

    def state_dict(self) -> dict[str, Any]: ...

    def load_state_dict(self, state: Mapping[str, Any], /) -> None:
        """Raises RuntimeError where they were trained beside other weights than the model's."""
        ...


def train(
    model: nn.Module,
    dataset: Records,
    config: TrainConfig,
    *,
    device: torch.device | str | None = None,
    resume: bool | Path = False,
    identity: Mapping[str, Any] | None = None,
    adapters: Adapters | None = None,
    evaluation: Evaluation | None = None,
    on_start: Callable[[], object] | None = None,
    on_step: Callable[[StepRecord], None] | None = None,
    on_eval: Callable[[EvalRecord], None] | None = None,
) -> TrainResult:
    """Train `model` in place; write `log.jsonl` and `checkpoints/` below `config.out`.

    With an evaluation also `eval.jsonl`, and with `config.keep_best` `best.json`, which names the
    checkpoint of the best score. The weights are the same to the bit as without. Where a moving
    average is kept (`config.ema`), it is what is evaluated, and what is loaded of the checkpoint.

    Ctrl-C lets the current step finish, saves, and returns with `interrupted=True` (a second one
    stops at once, without saving).

    Args:
        model: moved to `device`; parameters with requires_grad=False stay as they are.
        dataset: at least `config.batch_size` items.
        device: default CUDA where there is a GPU, else the CPU.
        resume: True continues from the newest complete checkpoint below `config.out`, a path from
            that one. False starts afresh, and refuses to where checkpoints are.
        identity: what else a resumed run must agree on, e.g. the model's name and a digest of the
            data; plain JSON values.
        adapters: those of `model`. A checkpoint then holds the merged weights, and its state the
            adapters; a resumed run needs a model that was built from the same weights.
        evaluation: made every `config.eval_every` steps and at the end, outside of autocast.
        on_start: called once, when nothing speaks against the run any more, before its first step.
        on_step: called after each step.
        on_eval: called after each evaluation.

    Raises:
        ConfigError: a moving average is asked for with adapters; `eval_every` or `keep_best`
            without an evaluation.
        TrainingError: too few records, checkpoints in the way, a loss or gradient that is not
            finite (the weights since the last checkpoint are then lost on purpose). In fp16 a step
            whose gradient overflowed is left out and counted, and the run goes on.
        CheckpointError: nothing to resume from, a damaged checkpoint, or one of a run that was
            started differently; the message names the fields.
    """
    if adapters is not None and config.ema is not None:
        # It pairs parameters by their order, which peft's adapters change in a forward pass.
        raise ConfigError("ema does not go with adapters. Fix: leave ema or --lora out")
    for name in ("eval_every", "keep_best"):
        if evaluation is None and getattr(config, name):
            raise ConfigError(
                f"--{name.replace('_', '-')} needs something to evaluate on. Fix: --eval-data FILE"
            )
    device = default_device() if device is None else torch.device(device)
    total = total_steps(config, len(dataset))
    folder, log_path = config.out / "checkpoints", config.out / "log.jsonl"
    run = _run_identity(config, {"records": len(dataset), **(identity or {})})

    torch.manual_seed(config.seed)
    random.seed(config.seed)
    model.to(device).train()
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = _optimizer(trained, config, device)
    scaler = torch.amp.GradScaler(device.type, enabled=config.precision == "fp16")
    average = _moving_average(model, config)
    parts_of_state: dict[str, Any] = {"optimizer": optimizer, "scaler": scaler}
    if average is not None:
        parts_of_state["ema"] = average
    if adapters is not None:
        parts_of_state["adapters"] = adapters
    done, skipped, saved = 0, 0, None
    if resume is not False:
        checkpoint = _find_checkpoint(folder, resume, run)
        # With adapters its weights are merged ones, and the model has its own already.
        _restore(checkpoint, model if adapters is None else None, parts_of_state, device)
        done, saved = checkpoint.step, checkpoint.path
        skipped = checkpoint.state.get("skipped_steps", 0)  # older runs did not count
    elif latest_checkpoint(folder) is not None:
        raise TrainingError(f"{folder} already holds checkpoints: resume, or choose another folder")
    _forget_after(config.out, done)
    judge = None if evaluation is None else _Judge(evaluation, config)
    if on_start is not None:
        on_start()

    loader = _loader(dataset, config, done, total, device)
    autocast = torch.autocast(device.type, **_autocast_options(config, device))
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    with log_path.open("a", encoding="utf-8") as log, _deferred_interrupt() as interrupted:
        began = time.perf_counter()
        for step, batch in enumerate(loader, done + 1):
            rate = learning_rate(step, total, config)
            for group in optimizer.param_groups:
                group["lr"] = rate
            optimizer.zero_grad()
            with autocast:
                parts = _backward(model, batch, config, scaler, device)
                loss = torch.stack(list(parts.values())).sum()
            scaler.unscale_(optimizer)
            norm = nn.utils.get_total_norm([p.grad for p in trained if p.grad is not None])
            if config.clip_norm is not None:
                nn.utils.clip_grads_with_norm_(trained, config.clip_norm, norm)
            scaler.step(optimizer)
            scaler.update()
            config.after_step(model)
            if average is not None:
                average.update_parameters(model)

            values = _to_floats(
                {"loss": loss, **parts}, norm, config.log_scale(model)
            )  # waits for the device
            now = time.perf_counter()
            overflowed = scaler.is_enabled() and not math.isfinite(values[1])
            skipped += overflowed
            record = StepRecord(
                step, total, *values, learning_rate=rate, seconds=now - began,
                images_per_second=config.batch_size / max(now - began, 1e-9),
                peak_bytes=(
                    torch.cuda.max_memory_allocated(device) if device.type == "cuda" else None
                ),
                skipped_steps=skipped,
            )  # fmt: skip
            began = now
            forgiven = overflowed and scaler.get_scale() >= _SMALLEST_SCALE
            finite = math.isfinite(record.gradient_norm) or forgiven
            if not math.isfinite(record.losses["loss"]) or not finite:
                raise TrainingError(_not_finite(record, saved))
            done = step
            log.write(json.dumps(record._asdict()) + "\n")
            log.flush()
            if on_step is not None:
                on_step(record)
            is_best = False
            if judge is not None and (done == total or _due(done, config.eval_every)):
                # The average is a model of its own, so that the weights that train stay untouched.
                judged = model if average is None else average.module
                with _undisturbed(device):
                    is_best = judge.look(judged, done, total, on_eval)
                began = time.perf_counter()
            stop = interrupted.is_set()
            if stop or is_best or done == total or _due(done, config.save_every):
                os.fsync(log.fileno())
                state = {name: part.state_dict() for name, part in parts_of_state.items()}
                state["random"] = _random_states(device)
                state["skipped_steps"] = skipped
                weights = model.state_dict() if adapters is None else adapters.merged()
                best = None if judge is None else judge.best
                spare = checkpoint_path(folder, best.step) if best else best_checkpoint(config.out)
                saved = save_checkpoint(
                    folder, done, weights, state, run, keep=config.keep, spare=spare
                )
                if judge is not None:
                    judge.note_best()
            if stop:
                break
    assert saved is not None  # at least one step was made, or the checkpoint had them all
    return TrainResult(done, total, done < total, saved)


def _due(step: int, every: int | None) -> bool:
    return every is not None and step % every == 0


@contextmanager
def _undisturbed(device: torch.device) -> Iterator[None]:
    """Leave the random numbers as if nothing had been drawn here."""
    states = _random_states(device)
    try:
        yield
    finally:
        _set_random_states(states, device)


class _Judge:
    """Evaluations of a run, and which of them was the best.

    `eval.jsonl` has them all; which is best follows from it, also after a kill at any moment.
    """

    def __init__(self, evaluation: Evaluation, config: TrainConfig) -> None:
        self.evaluation, self.config = evaluation, config
        self.averaged = config.ema is not None
        self.folder = config.out / "checkpoints"
        self.best: EvalRecord | None = None
        if config.keep_best:
            saved = set(complete_checkpoints(self.folder))
            for record in read_evaluations(config.out):
                if checkpoint_path(self.folder, record.step) in saved:
                    self._compare(record)
            self.note_best()

    def look(
        self,
        model: nn.Module,
        step: int,
        total: int,
        tell: Callable[[EvalRecord], None] | None,
    ) -> bool:
        """Evaluate and write it down; whether its checkpoint is the best, and to be kept."""
        began = time.perf_counter()
        score, values = self.evaluation.measure(model)
        seconds = time.perf_counter() - began
        record = EvalRecord(step, total, self.evaluation.of, score, values, seconds, self.averaged)
        with (self.config.out / "eval.jsonl").open("a", encoding="utf-8") as file:
            file.write(json.dumps(record._asdict()) + "\n")
            file.flush()
            os.fsync(file.fileno())
        if tell is not None:
            tell(record)
        return self.config.keep_best and self._compare(record)

    def note_best(self) -> None:
        """Write `best.json`, once the checkpoint that it names is there."""
        if self.best is None:
            return
        told = {"checkpoint": f"checkpoints/{checkpoint_path(self.folder, self.best.step).name}"}
        told |= {name: getattr(self.best, name) for name in ("step", "score", "of")}
        write_text_atomically(self.config.out / "best.json", json.dumps(told, indent=1) + "\n")

    def _compare(self, record: EvalRecord) -> bool:
        comparable = (record.of, record.averaged) == (self.evaluation.of, self.averaged)
        is_best = comparable and (self.best is None or record.score > self.best.score)
        if is_best:
            self.best = record
        return is_best


def _backward(
    model: nn.Module,
    batch: Any,
    config: TrainConfig,
    scaler: torch.amp.GradScaler,
    device: torch.device,
) -> dict[str, Tensor]:
    """The parts of the loss; its gradients, scaled, are left at the parameters."""
    if config.micro_batch is not None:
        return cast(
            dict[str, Tensor],
            cached_backward(
                # The batch stays where it is: a large one may not fit beside the model.
                lambda some: config.encode(model, some.to(device)),
                batch,
                config.losses_of,
                chunk_size=config.micro_batch,
                module=model,
                scaler=scaler,
            ),
        )
    parts = config.losses(model, batch.to(device))
    loss = scaler.scale(torch.stack(list(parts.values())).sum())
    with torch.autocast(device.type, enabled=False):  # a backward takes the forward's own dtypes
        loss.backward()
    return parts


def learning_rate(step: int, total: int, config: TrainConfig) -> float:
    """The rate of step 1 ... total: a linear rise over the warm-up, then half a cosine to zero.

    Without warm-up, step s uses the cosine at (s - 1) / total, as PyTorch's CosineAnnealingLR
    stepped once a step: the first step has the whole rate, the last almost none.
    """
    share = config.warmup < 1
    warmup = math.ceil(config.warmup * total) if share else min(int(config.warmup), total)
    if step <= warmup:
        return config.learning_rate * step / warmup
    progress = (step - 1 - warmup) / (total - warmup)
    return config.learning_rate * 0.5 * (1 + math.cos(math.pi * progress))


class BatchOrder(Sampler[list[int]]):
    """The record numbers of steps `start + 1` to `stop`: a function of the seed and the step alone.

    Each epoch is cut from its own permutation, drawn from (seed, epoch); nothing needs to be
    replayed or stored to start in the middle.
    """

    def __init__(self, records: int, batch_size: int, seed: int, start: int, stop: int) -> None:
        self.records, self.batch_size, self.seed = records, batch_size, seed
        self.steps = range(start, stop)

    def __len__(self) -> int:
        return len(self.steps)

    def __iter__(self) -> Iterator[list[int]]:
        per_epoch = self.records // self.batch_size
        epoch, order = -1, []
        for step in self.steps:
            if step // per_epoch != epoch:
                epoch = step // per_epoch
                # Mixed through a string, so that (seed, epoch) and (seed + 1, epoch - 1) differ.
                generator = torch.Generator()
                generator.manual_seed(random.Random(f"{self.seed}/{epoch}").getrandbits(63))
                order = torch.randperm(self.records, generator=generator).tolist()
            first = step % per_epoch * self.batch_size
            yield order[first : first + self.batch_size]


class _WithEpoch(Sampler[list[tuple[int, int]]]):
    """A BatchOrder whose record numbers come with their epoch."""

    def __init__(self, order: BatchOrder) -> None:
        self.order = order

    def __len__(self) -> int:
        return len(self.order)

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        per_epoch = self.order.records // self.order.batch_size
        for step, numbers in zip(self.order.steps, self.order, strict=True):
            yield [(step // per_epoch, number) for number in numbers]


class _ByEpoch:
    """A dataset with `at`, as a loader sees it that asks for (epoch, number)."""

    def __init__(self, dataset: Any) -> None:
        self.dataset = dataset

    def __getitem__(self, key: tuple[int, int]) -> Any:
        return self.dataset.at(*key)


def _moving_average(model: nn.Module, config: TrainConfig) -> AveragedModel | None:
    if config.ema is None:
        return None
    return AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(config.ema), use_buffers=False)


def precision_name(config: TrainConfig, device: torch.device) -> str:
    """What the forward pass runs in: "bf16", "fp16" or "float32"."""
    if config.precision == "auto":
        is_cuda = device.type == "cuda"
        has_bf16 = is_cuda and torch.cuda.is_bf16_supported(including_emulation=False)
        return "bf16" if has_bf16 else "float32"
    return "float32" if config.precision == "fp32" else config.precision


def _autocast_options(config: TrainConfig, device: torch.device) -> dict[str, Any]:
    name = precision_name(config, device)
    dtype = torch.float16 if name == "fp16" else torch.bfloat16
    return {"dtype": dtype, "enabled": name != "float32"}


def read_log(out: Path) -> list[StepRecord]:
    """The steps that `train` logged in `out/log.jsonl`, in order; a half-written line ends it."""
    return _read_records(Path(out) / "log.jsonl", StepRecord)


def read_evaluations(out: Path) -> list[EvalRecord]:
    """The evaluations in `out/eval.jsonl`, in order; a half-written line ends it."""
    return _read_records(Path(out) / "eval.jsonl", EvalRecord)


def best_checkpoint(out: Path) -> Path | None:
    """The checkpoint that `out/best.json` names; None where there is none."""
    step = _best_step(out)
    path = None if step is None else checkpoint_path(Path(out) / "checkpoints", step)
    return path if path in complete_checkpoints(Path(out) / "checkpoints") else None


def _best_step(out: Path) -> int | None:
    try:
        return int(json.loads((Path(out) / "best.json").read_text("utf-8"))["step"])
    except (OSError, ValueError, TypeError, KeyError):
        return None


def _read_records(path: Path, kind: Callable[..., Any]) -> list[Any]:
    records = []
    for line in path.read_text("utf-8").splitlines() if path.is_file() else ():
        try:
            records.append(kind(**json.loads(line)))
        except (ValueError, TypeError):
            break
    return records


def _write_records(path: Path, records: Sequence[StepRecord] | Sequence[EvalRecord]) -> None:
    lines = "".join(json.dumps(record._asdict()) + "\n" for record in records)
    write_text_atomically(path, lines)


def total_steps(config: TrainConfig, records: int) -> int:
    """The steps of a run on so many records. Raises TrainingError where they fill no batch."""
    if records == 0:
        raise TrainingError("there is no usable record to train on")
    if records < config.batch_size:
        fix = f"a batch size of at most {records}" if records > 1 else "give more than one"
        raise TrainingError(
            f"{records} usable records do not fill one batch of {config.batch_size}. Fix: {fix}"
        )
    return config.steps or (config.epochs or 0) * (records // config.batch_size)


def _run_identity(config: TrainConfig, more: Mapping[str, Any]) -> dict[str, Any]:
    """What a resumed run must agree on, as it looks after a trip through JSON."""
    fixed = {name: value for name, value in asdict(config).items() if name not in _FREE_TO_CHANGE}
    return json.loads(json.dumps(fixed | dict(more)))


def _optimizer(
    trained: list[nn.Parameter], config: TrainConfig, device: torch.device
) -> torch.optim.AdamW:
    # Vectors and scalars are norms, biases, the class embedding and the logit scale: pulling those
    # to zero is not regularisation.
    matrices = [p for p in trained if config.decay_all or p.ndim >= 2]
    vectors = [p for p in trained if not (config.decay_all or p.ndim >= 2)]
    groups = [
        {"params": matrices, "weight_decay": config.weight_decay},
        {"params": vectors, "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(
        [group for group in groups if group["params"]],
        lr=config.learning_rate,
        betas=config.betas,
        eps=config.eps,
        fused=device.type in ("cuda", "cpu"),
    )


def _loader(
    dataset: Records, config: TrainConfig, done: int, total: int, device: torch.device
) -> DataLoader[Any]:
    order = BatchOrder(len(dataset), config.batch_size, config.seed, done, total)
    changes = hasattr(dataset, "at")
    return DataLoader(
        # Typed as its own Dataset, it takes anything with items.
        cast(Any, _ByEpoch(dataset) if changes else dataset),
        batch_sampler=cast(Any, _WithEpoch(order) if changes else order),
        collate_fn=config.collate,
        num_workers=config.num_workers,
        pin_memory=device.type == "cuda",
        # Of its own: the loader draws a seed when it starts, which a resumed run does once more.
        generator=torch.Generator(),
        worker_init_fn=_ignore_interrupts,
    )


def _ignore_interrupts(_worker: int) -> None:
    # A terminal sends Ctrl-C to every process; the loop still needs its readers for the last step.
    signal.signal(signal.SIGINT, signal.SIG_IGN)


@contextmanager
def _deferred_interrupt() -> Iterator[threading.Event]:
    """Turn the first Ctrl-C into a flag; the second one interrupts as always."""
    asked = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield asked  # only the main thread may set signal handlers
        return
    before = signal.getsignal(signal.SIGINT)

    def note(_signal: int, _frame: object) -> None:
        asked.set()
        signal.signal(signal.SIGINT, before)

    signal.signal(signal.SIGINT, note)
    try:
        yield asked
    finally:
        signal.signal(signal.SIGINT, before)


def _to_floats(
    losses: Mapping[str, Tensor], norm: Tensor, log_scale: Tensor
) -> tuple[dict[str, float], float, float]:
    """Losses, gradient norm and logit scale as Python floats, in one transfer."""
    scalars = [*losses.values(), norm, log_scale.exp()]
    *parts, norm_value, scale = torch.stack([v.detach().float() for v in scalars]).tolist()
    return dict(zip(losses, parts, strict=True)), norm_value, scale


def _not_finite(record: StepRecord, saved: Path | None) -> str:
    parts = ", ".join(f"{name} {value:.4g}" for name, value in record.losses.items())
    kept = f"the last good checkpoint is {saved}" if saved else "no checkpoint was written yet"
    return (
        f"the loss is not finite at step {record.step} ({parts}; gradient norm "
        f"{record.gradient_norm}); {kept}. A smaller learning rate may help"
    )


def _random_states(device: torch.device) -> dict[str, Any]:
    states: dict[str, Any] = {"torch": torch.get_rng_state(), "python": random.getstate()}
    if device.type == "cuda":
        states["cuda"] = torch.cuda.get_rng_state(device)
    return states


def _find_checkpoint(folder: Path, resume: bool | Path, run: Mapping[str, Any]) -> Checkpoint:
    path = latest_checkpoint(folder) if isinstance(resume, bool) else resume
    if path is None:
        raise CheckpointError(f"{folder} holds no complete checkpoint to resume from")
    checkpoint = load_checkpoint(path)
    names = sorted(run.keys() | checkpoint.config.keys())
    differing = [
        f"{name} was {checkpoint.config.get(name)!r}, is now {run.get(name)!r}"
        for name in names
        if checkpoint.config.get(name) != run.get(name)
    ]
    if differing:
        raise CheckpointError(
            f"{path} belongs to a run that was started differently: {'; '.join(differing)}. "
            "Resume with the old values, or start again in another folder"
        )
    return checkpoint


def _restore(
    checkpoint: Checkpoint,
    model: nn.Module | None,
    parts_of_state: Mapping[str, Any],
    device: torch.device,
) -> None:
    try:
        if model is not None:
            model.load_state_dict(checkpoint.weights)
        for name, part in parts_of_state.items():
            part.load_state_dict(checkpoint.state[name])
    except (RuntimeError, ValueError, KeyError) as error:
        raise CheckpointError(f"{checkpoint.path} does not fit this model: {error}") from error
    _set_random_states(checkpoint.state["random"], device)


def _set_random_states(states: Mapping[str, Any], device: torch.device) -> None:
    torch.set_rng_state(states["torch"])
    random.setstate(states["python"])
    if device.type == "cuda" and "cuda" in states:
        torch.cuda.set_rng_state(states["cuda"], device)


def _forget_after(out: Path, step: int) -> None:
    """Drop what was written of later steps: those are about to be made again."""
    _write_records(out / "log.jsonl", [r for r in read_log(out) if r.step <= step])
    if (out / "eval.jsonl").is_file():
        _write_records(out / "eval.jsonl", [r for r in read_evaluations(out) if r.step <= step])
    best = _best_step(out)
    if best is None or best > step or best_checkpoint(out) is None:
        (out / "best.json").unlink(missing_ok=True)
