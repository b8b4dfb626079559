"""Do the local and hierarchical losses teach anything that the global loss alone does not?

    python -m benchmarks.learning [--method fast-goal | caft] [--variant full | global]
                                  [--seed N ...] [--steps N] [--out DIR]
    python -m benchmarks.learning --render

Small models learn from scratch on synthetic scenes (fastgoal_models/synthetic.py), each method with
its whole loss and, for the same steps, scenes and seed, with its global loss alone. On held-out
scenes: Recall@K of whole captions, and pointing: whether what a sentence looks at most lies inside
the box of the thing it describes, beside what chance would hit. One run is one file below --out; a
run that is there is not made again, one that was stopped goes on. `--render` turns the runs into
benchmarks/results/learning.json and docs/learning.md.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
import time
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fastgoal_models.atomic_files import write_text_atomically
from fastgoal_models.caft import Caft
from fastgoal_models.caft.captions import evaluation_parts
from fastgoal_models.caft.data import text_rows
from fastgoal_models.caft.maps import caft_maps
from fastgoal_models.caft.pictures import draw_caft
from fastgoal_models.caft.scoring import caft_recall, encode
from fastgoal_models.caft.training import TERMS, CaftTrainConfig
from fastgoal_models.fast_goal import FastGoalModel
from fastgoal_models.fast_goal_training import FastGoalTrainConfig
from fastgoal_models.localisation import Pointing, pointing_of, points_into
from fastgoal_models.pictures import Box
from fastgoal_models.retrieval import Retrieval, feature_recall
from fastgoal_models.synthetic import (
    Scene,
    SyntheticCaft,
    SyntheticFastGoal,
    box,
    draw,
    held_out,
    pixels_of,
)
from fastgoal_models.training import TrainConfig, read_log, train

from . import facts, learning_page

METHODS, VARIANTS = ("fast-goal", "caft"), ("full", "global")
KS = (1, 5)
IMAGE_SIZE, CONTEXT = 96, 128
# About five minutes a run on one core. CAFT starts slower: sigmoid losses, and positions that weigh
# more than what the untrained stem sees.
STEPS, BATCH = {"fast-goal": 400, "caft": 1500}, {"fast-goal": 32, "caft": 16}
SCENES, POINTED = 500, 200  # held out: for retrieval, and of those for pointing
RUNS = facts.ROOT / ".cache" / "learning"

_CAFT: dict[str, Any] = {
    "embed_dim": 64, "pool_heads": 4,
    "vision_cfg": {"image_size": IMAGE_SIZE, "width": 96, "heads": 3, "layers": [1, 1, 1, 1],
                   "tokens": [24, 12, 6]},
    "text_cfg": {"context_length": 77, "vocab_size": 49408, "width": 64, "heads": 2, "layers": 2,
                 "parts": 4, "whole_layers": 1, "adapter_width": 32},
}  # fmt: skip
_FAST_GOAL: dict[str, Any] = {
    "embed_dim": 64,
    "vision_cfg": {"image_size": IMAGE_SIZE, "layers": 3, "width": 96, "head_width": 32,
                   "patch_size": 12},
    "text_cfg": {"context_length": CONTEXT, "vocab_size": 49408, "width": 64, "heads": 2,
                 "layers": 2},
}  # fmt: skip


def run(method: str, variant: str, seed: int, steps: int, out: Path) -> dict[str, Any]:
    """Train and evaluate one model; its row. Goes on where it was stopped."""
    torch.manual_seed(seed)
    batch = BATCH[method]
    folder = out / f"{method}-{variant}-{seed}"
    options: dict[str, Any] = {
        "out": folder, "steps": steps, "batch_size": batch, "learning_rate": 1e-3,
        "weight_decay": 0.05, "warmup": 0.1, "precision": "fp32", "seed": seed, "keep": 1,
        "save_every": max(steps // 6, 1),
    }  # fmt: skip
    model: Any
    config: TrainConfig
    dataset: Any
    if method == "caft":
        model = Caft.create(_CAFT, superpixels="grid")
        with torch.no_grad():  # CAFT's own start, -10, is for batches of thousands
            for bias in (model.logit_bias, model.logit_bias_coarse):
                bias.fill_(-math.log(batch - 1))
        config = CaftTrainConfig(**options, terms=TERMS if variant == "full" else TERMS[-1:])
        dataset = SyntheticCaft(steps * batch, IMAGE_SIZE, model.tokenizer)
    else:
        model = FastGoalModel.create(_FAST_GOAL, context_length=CONTEXT)
        if variant == "global":
            options |= {"local_weight": 0.0, "tsl_weight": 0.0}
        config = FastGoalTrainConfig(**options)
        dataset = SyntheticFastGoal(steps * batch, IMAGE_SIZE, model.tokenizer, CONTEXT)
    begun = (folder / "checkpoints").is_dir() and any((folder / "checkpoints").glob("step-*"))
    start = time.perf_counter()
    train(model, dataset, config, device="cpu", resume=begun, on_step=_say(method, variant, seed))
    seconds = time.perf_counter() - start
    scenes = held_out(SCENES)
    model.eval()
    recalls: dict[str, Retrieval]
    if isinstance(model, Caft):
        recalls = _caft_recalls(model, scenes)
        pointing = _caft_pointing(model, scenes[:POINTED])
        if variant == "full":
            _picture(model, scenes[0], out / f"caft-{seed}.png")
    else:
        recalls = {"global": _fast_goal_recall(model, scenes)}
        pointing = _fast_goal_pointing(model, scenes[:POINTED])
    log = read_log(folder)
    return {
        "method": method, "variant": variant, "seed": seed, "steps": steps, "batch": batch,
        "parameters": sum(p.numel() for p in model.parameters()),
        "train_seconds": sum(record.seconds for record in log) or seconds,
        "losses": [[r.step, r.losses["loss"]] for r in log[:: max(len(log) // 60, 1)]],
        "recall": {
            name: {
                "text_to_image": list(found.text_to_image.values()),
                "image_to_text": list(found.image_to_text.values()),
            }
            for name, found in recalls.items()
        },
        "pointing": pointing.hits,
        "chance": pointing.chance,
    }  # fmt: skip


def _say(method: str, variant: str, seed: int) -> Any:
    def on_step(record: Any) -> None:
        if record.step % 50 == 0 or record.step == 1:
            print(
                f"{method} {variant} {seed}: step {record.step}/{record.total_steps} "
                f"loss {record.losses['loss']:.3f}, {record.images_per_second:.0f} images/s",
                flush=True,
            )

    return on_step


# -- evaluation -----------------------------------------------------------------------------------


def _images(scenes: Sequence[Scene]) -> list[Tensor]:
    return [
        torch.stack([pixels_of(told, IMAGE_SIZE) for told in scenes[at : at + 50]])
        for at in range(0, len(scenes), 50)
    ]


def _caft_recalls(model: Caft, scenes: Sequence[Scene]) -> dict[str, Retrieval]:
    texts = torch.stack(
        [text_rows(evaluation_parts(told.sentences), model.tokenizer) for told in scenes]
    )
    features = encode(model, _images(scenes), texts.split(50))
    return {score: caft_recall(model, features, KS, score=score) for score in ("whole", "blended")}


@torch.no_grad()
def _fast_goal_recall(model: FastGoalModel, scenes: Sequence[Scene]) -> Retrieval:
    texts = model.tokenizer([told.caption for told in scenes])
    return feature_recall(
        torch.cat([model.encode_image(batch) for batch in _images(scenes)]),
        torch.cat([model.encode_text(batch) for batch in texts.split(50)]),
        KS,
    )


def _described(told: Scene) -> list[tuple[str, Box]]:
    return [
        (sentence, box(told.things[thing], IMAGE_SIZE))
        for sentence, thing in zip(told.sentences, told.about, strict=True)
        if thing is not None
    ]


def _points(maps: Iterable[Tensor], boxes: Iterable[Box]) -> list[tuple[float, float]]:
    return [
        points_into(heat, target, IMAGE_SIZE, IMAGE_SIZE)
        for heat, target in zip(maps, boxes, strict=True)
    ]


def _caft_pointing(model: Caft, scenes: Sequence[Scene]) -> Pointing:
    """By the text-conditioned attention of each sentence over the fine tokens."""
    found = []
    for told in scenes:
        sentences, boxes = zip(*_described(told), strict=True)
        texts = text_rows(sentences, model.tokenizer)
        maps = caft_maps(model, pixels_of(told, IMAGE_SIZE), texts)
        found += [
            points_into(*pair, IMAGE_SIZE, IMAGE_SIZE)
            for pair in zip(maps.attention, boxes, strict=True)
        ]
    return pointing_of(found)


@torch.no_grad()
def _fast_goal_pointing(model: FastGoalModel, scenes: Sequence[Scene]) -> Pointing:
    """By the cosine of each sentence's feature with every projected patch."""
    found = []
    for told in scenes:
        sentences, boxes = zip(*_described(told), strict=True)
        features = model.encode_text(model.tokenizer(list(sentences)))
        _, patches = model.image_tokens(pixels_of(told, IMAGE_SIZE)[None])
        patches = F.normalize(model.project_patches(patches[0]), dim=-1)
        maps = (features @ patches.T).unflatten(1, model.grid_size)
        found += [
            points_into(*pair, IMAGE_SIZE, IMAGE_SIZE) for pair in zip(maps, boxes, strict=True)
        ]
    return pointing_of(found)


def _picture(model: Caft, told: Scene, path: Path) -> None:
    parts = evaluation_parts(told.sentences)
    maps = caft_maps(model, pixels_of(told, IMAGE_SIZE), text_rows(parts, model.tokenizer))
    draw_caft(draw(told, 288), parts, maps, path)


# -- the command ----------------------------------------------------------------------------------


def main(argv: list[str] | None = None) -> int:
    """The command; always 0."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.learning", description=__doc__.splitlines()[0]
    )
    parser.add_argument("--method", choices=METHODS, help="default: both")
    parser.add_argument("--variant", choices=VARIANTS, help="default: both")
    parser.add_argument("--seed", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--steps", type=int, help=f"default: {STEPS}")
    parser.add_argument("--out", type=Path, default=RUNS, help="folder of the runs")
    parser.add_argument("--render", action="store_true", help="only write the page")
    arguments = parser.parse_args(argv)
    if arguments.render:
        learning_page.render(arguments.out, "python -m benchmarks.learning")
        return 0
    for seed in arguments.seed:
        for method in METHODS if arguments.method is None else (arguments.method,):
            for variant in VARIANTS if arguments.variant is None else (arguments.variant,):
                path = arguments.out / f"{method}-{variant}-{seed}.json"
                if path.is_file():
                    continue
                steps = arguments.steps or STEPS[method]
                row = run(method, variant, seed, steps, arguments.out)
                write_text_atomically(path, json.dumps(row) + "\n")
                print(json.dumps({k: row[k] for k in ("recall", "pointing", "chance")}))
    return 0


if __name__ == "__main__":
    sys.exit(main())
