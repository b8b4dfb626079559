"""The loop, and what a step of it does."""

from __future__ import annotations

import json
import math
import os
import random
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn

from fastgoal_kernels import cached_backward

from ..checkpoints import checkpoint_path, latest_checkpoint, prune_checkpoints, sweep
from ..devices import default_device
from ..errors import ConfigError
from .batches import Records, loader
from .config import TrainConfig, TrainingError, autocast_options, learning_rate, total_steps
from .interrupts import deferred_interrupt
from .judge import Evaluation, Judge
from .records import EvalRecord, StepRecord, best_checkpoint, forget_after
from .state import Adapters, TrainState, find_checkpoint, run_identity, undisturbed

# A scaler starts at 2^16 and halves with every overflow: below this it is not the scale's fault.
_SMALLEST_SCALE = 1e-4


class TrainResult(NamedTuple):
    step: int
    total_steps: int
    interrupted: bool  # by Ctrl-C; what was done is saved
    checkpoint: Path


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
    _refuse_contradictions(config, adapters, evaluation)
    device = default_device() if device is None else torch.device(device)
    total = total_steps(config, len(dataset))
    folder = config.out / "checkpoints"
    run = run_identity(config, {"records": len(dataset), **(identity or {})})

    torch.manual_seed(config.seed)
    random.seed(config.seed)
    model.to(device).train()
    state = TrainState(model, config, adapters, device)
    if resume is not False:
        state.restore(find_checkpoint(folder, resume, run))
    elif latest_checkpoint(folder) is not None:
        raise TrainingError(f"{folder} already holds checkpoints: resume, or choose another folder")
    forget_after(config.out, state.done)
    judge = None if evaluation is None else Judge(evaluation, config)
    if state.done == total:  # a run that was killed after its last save saves nothing more
        sweep(folder)
        _prune(folder, config, judge)
    if on_start is not None:
        on_start()

    batches = loader(dataset, config, state.done, total, device)
    autocast = torch.autocast(device.type, **autocast_options(config, device))
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    log_path = config.out / "log.jsonl"
    with log_path.open("a", encoding="utf-8") as log, deferred_interrupt() as interrupted:
        began = time.perf_counter()
        for step, batch in enumerate(batches, state.done + 1):
            rate = learning_rate(step, total, config)
            values = _step(state, batch, config, rate, autocast)  # waits for the device
            now = time.perf_counter()
            overflowed = state.scaler.is_enabled() and not math.isfinite(values[1])
            state.skipped += overflowed
            record = StepRecord(
                step, total, *values, learning_rate=rate, seconds=now - began,
                images_per_second=config.batch_size / max(now - began, 1e-9),
                peak_bytes=(
                    torch.cuda.max_memory_allocated(device) if device.type == "cuda" else None
                ),
                skipped_steps=state.skipped,
            )  # fmt: skip
            began = now
            forgiven = overflowed and state.scaler.get_scale() >= _SMALLEST_SCALE
            finite = math.isfinite(record.gradient_norm) or forgiven
            if not math.isfinite(record.losses["loss"]) or not finite:
                raise TrainingError(_not_finite(record, state.saved))
            state.done = step
            log.write(json.dumps(record._asdict()) + "\n")
            log.flush()
            if on_step is not None:
                on_step(record)
            is_best = False
            if judge is not None and (step == total or _due(step, config.eval_every)):
                with undisturbed(device):
                    is_best = judge.look(state.judged, step, total, on_eval)
                began = time.perf_counter()
            stop = interrupted.is_set()
            if stop or is_best or step == total or _due(step, config.save_every):
                os.fsync(log.fileno())
                state.save(folder, run)
                if judge is not None:
                    judge.note_best()  # first: it still names one of those that go
                _prune(folder, config, judge)
            if stop:
                break
    assert state.saved is not None  # at least one step was made, or the checkpoint had them all
    return TrainResult(state.done, total, state.done < total, state.saved)


def _prune(folder: Path, config: TrainConfig, judge: Judge | None) -> None:
    best = None if judge is None else judge.best
    spare = checkpoint_path(folder, best.step) if best else best_checkpoint(config.out)
    prune_checkpoints(folder, config.keep, spare)


def _refuse_contradictions(
    config: TrainConfig, adapters: Adapters | None, evaluation: Evaluation | None
) -> None:
    if adapters is not None and config.ema is not None:
        # It pairs parameters by their order, which peft's adapters change in a forward pass.
        raise ConfigError("ema does not go with adapters. Fix: leave ema or --lora out")
    for name in ("eval_every", "keep_best"):
        if evaluation is None and getattr(config, name):
            raise ConfigError(
                f"--{name.replace('_', '-')} needs something to evaluate on. Fix: --eval-data FILE"
            )


def _step(
    state: TrainState, batch: Any, config: TrainConfig, rate: float, autocast: torch.autocast
) -> tuple[dict[str, float], float, float]:
    """Move the weights once; the loss and its parts, the gradient's norm and the logit scale."""
    for group in state.optimizer.param_groups:
        group["lr"] = rate
    state.optimizer.zero_grad()
    with autocast:
        parts = _backward(state.model, batch, config, state.scaler, state.device)
        loss = torch.stack(list(parts.values())).sum()
    state.scaler.unscale_(state.optimizer)
    norm = nn.utils.get_total_norm([p.grad for p in state.trained if p.grad is not None])
    if config.clip_norm is not None:
        nn.utils.clip_grads_with_norm_(state.trained, config.clip_norm, norm)
    state.scaler.step(state.optimizer)
    state.scaler.update()
    config.after_step(state.model)
    if state.average is not None:
        state.average.update_parameters(state.model)
    return _to_floats({"loss": loss, **parts}, norm, config.log_scale(state.model))


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


def _due(step: int, every: int | None) -> bool:
    return every is not None and step % every == 0
