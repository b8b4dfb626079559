"""`fastgoal prepare`: from images and captions to local pairs, with what a person wants to see."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from open_clip import SimpleTokenizer
from rich.console import Console
from rich.markup import escape

from .detectors import BoxFile, create_detector
from .devices import bfloat16_by_default, parse_device, warn_of_emulated_bfloat16
from .errors import ConfigError
from .flism import Matcher, RegionRules
from .json_output import write_json
from .loading import load_fast_goal
from .options import tensors_digest
from .prepare import Prepared, Share, kept_lines, prepare
from .progress import counting
from .random_weights import warn_of_random_weights

_CLIP_CONTEXT = 77  # a sentence is 18 to 24 tokens


@dataclass(frozen=True)
class PrepareOptions:
    """The options of `fastgoal prepare`."""

    data: Path
    out: Path
    root: Path | None = None
    model: str = "ViT-B-16"
    pretrained: str | None = None
    detector: str | None = None
    least_score: float | None = None
    """None: what `create_detector` takes"""
    rules: RegionRules = field(default_factory=RegionRules)
    keep_pairs: int | None = None
    published: bool = False
    shard: str | None = None
    batch_size: int = 64
    device: str | None = None
    bfloat16: bool | None = None
    """None: on a GPU that has it"""


def run_prepare(
    options: PrepareOptions, json_path: Path | None, command: str, console: Console
) -> Prepared:
    """Make the pairs. Raises what a user can mend (see `cli`)."""
    share = None if options.shard is None else Share.parse(options.shard)
    device = parse_device(options.device)
    loaded = load_fast_goal(options.model, options.pretrained)
    model = loaded.model.to(device).eval()
    detector = None
    if options.detector is None:
        if options.least_score is not None:
            raise ConfigError("--least-score is of a detector's boxes. Fix: name a --detector")
        console.print(
            "No detector: the regions are the four quadrants and the centre. --detector adds "
            "boxes, e.g. --detector transformers:hustvl/yolos-base",
            soft_wrap=True,
        )
    else:
        root = options.data.parent if options.root is None else options.root
        detector = create_detector(options.detector, device, options.least_score, root)
    if loaded.random:
        warn_of_random_weights(console, "which pairs they match is arbitrary")
    if options.bfloat16:
        warn_of_emulated_bfloat16(console, device)
    matcher = Matcher(
        model,
        tokenizer=SimpleTokenizer(context_length=min(_CLIP_CONTEXT, model.context_length)),
        detector=detector,
        rules=options.rules,
        batch_size=options.batch_size,
        device=device,
        autocast=bfloat16_by_default(device) if options.bfloat16 is None else options.bfloat16,
    )
    bar = counting(console, "images")
    task = bar.add_task("local pairs", total=None)
    try:
        with bar:
            done = prepare(
                options.data,
                options.out,
                matcher,
                root=options.root,
                identity={"model": loaded.name, "weights": tensors_digest(model.state_dict())},
                keep_pairs=options.keep_pairs,
                published=options.published,
                share=share,
                on_images=lambda at, of: bar.update(task, completed=at, total=of),
            )
    except KeyboardInterrupt:
        kept, lines = kept_lines(options.data, options.out)
        raise KeyboardInterrupt(
            f"Stopped: {kept} of {lines} lines are kept; the same command goes on."
        ) from None
    _say(done, options, console)
    if isinstance(detector, BoxFile) and (unmatched := detector.unmatched()) is not None:
        style = "yellow" if detector.missing == detector.pictures else None
        console.print(escape(unmatched), style=style, highlight=False, soft_wrap=True)
    if json_path is not None:
        document = {"schema": 1, "kind": "prepare", "command": command, **_found(done)}
        write_json(document, json_path, console)
    return done


def _found(done: Prepared) -> dict[str, Any]:
    """What `--json` says; of a shard's run the pairs, which lie in parts, are not counted."""
    pairs = None
    if done.done:
        with done.path.open(encoding="utf-8") as lines:
            pairs = sum(len(json.loads(line)["pairs"]) for line in lines)
    return {
        "out": str(done.path),
        "done": done.done,
        "parts": done.parts,
        "parts_missing": done.parts_missing,
        "pictures": done.report.read,
        "pairs": pairs,
        "skipped": done.report.counts,
        "names": done.report.names,
        "images": done.images,  # of this call
        "seconds": done.seconds,
        "images_per_second": done.images / done.seconds if done.images else None,
    }


def _say(done: Prepared, options: PrepareOptions, console: Console) -> None:
    console.print(escape(str(done.report)), highlight=False, soft_wrap=True)
    if done.images:
        rate = done.images / max(done.seconds, 1e-9)
        console.print(
            f"{done.images} images in {done.seconds:.1f} s, {rate:.1f} images/s", highlight=False
        )
    if not done.done:
        console.print(
            f"{done.parts_missing} of {done.parts} parts are still to be made, by other shards",
            highlight=False,
        )
        return
    console.print(f"{escape(str(done.path))} written", soft_wrap=True)
    root = (options.root or options.data.parent).resolve()
    if root != options.out.parent.resolve():
        console.print(f"Its images are relative to --root {escape(str(root))}", soft_wrap=True)
