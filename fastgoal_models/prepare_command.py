"""`fastgoal prepare`: from images and captions to local pairs, with what a person wants to see."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from open_clip import SimpleTokenizer
from rich.console import Console
from rich.markup import escape

from .detectors import create_detector
from .devices import parse_device
from .flism import Matcher, RegionRules
from .loading import load_fast_goal
from .options import tensors_digest
from .prepare import Prepared, Share, kept_lines, prepare
from .progress import counting

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
    rules: RegionRules = field(default_factory=RegionRules)
    keep_pairs: int | None = None
    published: bool = False
    shard: str | None = None
    batch_size: int = 64
    device: str | None = None
    bfloat16: bool | None = None
    """None: where there is a GPU"""


def run_prepare(options: PrepareOptions, console: Console) -> Prepared:
    """Make the pairs. Raises what a user can mend (see `cli`)."""
    share = None if options.shard is None else Share.parse(options.shard)
    device = parse_device(options.device)
    loaded = load_fast_goal(options.model, options.pretrained)
    model = loaded.model.to(device).eval()
    detector = None
    if options.detector is None:
        console.print(
            "No detector: the regions are the four quadrants and the centre. --detector adds "
            "boxes, e.g. --detector transformers:hustvl/yolos-base",
            soft_wrap=True,
        )
    else:
        detector = create_detector(options.detector, device)
    if loaded.random:
        console.print("[yellow]The weights are random, so which pairs they match is arbitrary.[/]")
    matcher = Matcher(
        model,
        tokenizer=SimpleTokenizer(context_length=min(_CLIP_CONTEXT, model.context_length)),
        detector=detector,
        rules=options.rules,
        batch_size=options.batch_size,
        device=device,
        autocast=device.type == "cuda" if options.bfloat16 is None else options.bfloat16,
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
    return done


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
