"""The demo's report.md: what was done, what came out, and what it does not show."""

from __future__ import annotations

import textwrap
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from ..atomic_files import write_text_atomically
from ..fast_goal_training import FastGoalTrainConfig
from ..retrieval import Retrieval
from ..training import StepRecord
from .maxsim_table import MaxSimTable


@dataclass(frozen=True)
class Findings:
    """Everything the report tells; pictures lie below the report's folder."""

    command: str
    facts: Mapping[str, str]
    model: str
    parameters: int
    pretrained: str | None
    precision: str
    config: FastGoalTrainConfig
    num_photographs: int
    log: Sequence[StepRecord]
    before: Retrieval
    after: Retrieval
    losses: Path
    sheets: Sequence[Path]
    same_pairs: int
    heat_map: Path
    heat_map_name: str
    heat_map_sentence: str
    heat_map_region: str
    inside_before: tuple[float, float]  # mean cosine within the region, and outside it
    inside_after: tuple[float, float]
    maxsim: MaxSimTable
    seconds: float


def write_report(out: Path, found: Findings) -> Path:
    """Write `out/report.md` in one piece and return its path."""
    path = out / "report.md"
    sections = [
        _summary(found),
        _losses(found, out),
        _retrieval(found),
        _pairs(found, out),
        _words(found, out),
        _maxsim(found),
        _made_with(found),
    ]
    write_text_atomically(path, _reflow("\n\n".join(sections)) + "\n")
    return path


def _summary(found: Findings) -> str:
    count = found.num_photographs
    weights = (
        f"started from the weights `{found.pretrained}`"
        if found.pretrained
        else "started from **random weights**"
    )
    first, last = found.log[0].losses["loss"], found.log[-1].losses["loss"]
    return f"""# FAST-GOAL on {count} photographs

A CLIP of {found.parameters / 1e6:.1f} million parameters ({found.model}) {weights} and was
fine-tuned for {len(found.log)} steps on {count} real photographs with long captions. The loss
went from {first:.2f} to {last:.2f}. Of the {count} captions,
{_hits(found.before.text_to_image, count)} found their own photograph first before training and
{_hits(found.after.text_to_image, count)} after it.

> **What this shows, and what it does not.** It shows that the parts work together: reader, region
> matching, model, fused losses, training, evaluation. The model is evaluated on the very {count}
> photographs it was trained on, so it says nothing about how well it generalises."""


def _losses(found: Findings, out: Path) -> str:
    log, config = found.log, found.config
    rate = len(log) / sum(record.seconds for record in log)
    names = list(log[0].losses)
    shown = sorted({0, len(log) // 4, len(log) // 2, 3 * len(log) // 4, len(log) - 1})
    rows = [[str(log[i].step), *(f"{log[i].losses[name]:.4f}" for name in names)] for i in shown]
    heads = [name.removesuffix("_loss").replace("_", " ").replace("tsl", "TSL") for name in names]
    return f"""## Losses

![Loss curves]({_link(found.losses, out)})

{_table(["step", *heads], rows)}

The parts carry their weights (global {config.global_weight:g}, local {config.local_weight:g}, TSL
{config.tsl_weight:g}) and add up to the loss. *Global* and *local* are CLIP's contrastive loss on
(photograph, caption) and (region, sentence). *Region TSL* and *span TSL* pull the region's patch
tokens and the sentence's word tokens towards the embeddings of the region and the sentence alone.
Batches of {config.batch_size}, {rate:.2f} steps a second."""


def _retrieval(found: Findings) -> str:
    count = found.num_photographs
    rows = []
    for name, before, after in (
        ("text → image", found.before.text_to_image, found.after.text_to_image),
        ("image → text", found.before.image_to_text, found.after.image_to_text),
    ):
        rows.append([name, "before", *(f"{100 * value:.1f} %" for value in before.values())])
        rows.append([name, "**after**", *(f"**{100 * value:.1f} %**" for value in after.values())])
    ks = list(found.before.text_to_image)
    rows.append(["either", "chance", *(f"{100 * min(k / count, 1):.1f} %" for k in ks)])
    return f"""## Long-text retrieval, before and after

{_table(["direction", "", *(f"R@{k}" for k in ks)], rows)}

Each whole caption against all {count} photographs, and each photograph against all captions. Ties
count against the model. Photographs are cropped to their centre here, as CLIP's evaluation does,
and squashed in training, as FAST-GOAL does: the model has not seen quite these views."""


def _pairs(found: Findings, out: Path) -> str:
    pictures = "\n\n".join(
        f"![Photographs, matched regions and sentences, sheet {number}]({_link(path, out)})"
        for number, path in enumerate(found.sheets, start=1)
    )
    chosen = (
        "The random weights that training started from chose it, so it is *arbitrary*: whether "
        "the sentence fits the region is luck."
        if found.pretrained is None
        else "The pretrained weights that training started from chose it."
    )
    return f"""## The matched regions and sentences

FLISM compares every sentence with five fixed regions, the four quarters and the centre, and the
most similar pair of each photograph is trained on: the **orange** one.
{chosen}
**Blue**, dashed, is the pair that the fine-tuned model would choose itself. It is the same one for
{found.same_pairs} of {found.num_photographs}: having been trained on, it should come back, which
is no evidence that it was right.

{pictures}"""


def _words(found: Findings, out: Path) -> str:
    caution = (
        " Random weights matched it, so a bright patch means “resembles what the sentence was "
        "trained with”, not “shows the thing”."
        if found.pretrained is None
        else ""
    )
    rows = [
        [when, f"{inside:.3f}", f"{outside:.3f}", f"{inside - outside:+.3f}"]
        for when, (inside, outside) in (
            ("before", found.inside_before),
            ("after", found.inside_after),
        )
    ]
    return f"""## Words and patches

How similar each word of one sentence of *{found.heat_map_name}* is to each patch of the
photograph: cosines of the last layer's tokens, through the towers' own projections.

> {found.heat_map_sentence}

![Token-to-region similarity, before and after]({_link(found.heat_map, out)})

The white box is the region that the sentence was matched with ({found.heat_map_region}). Each half
has its own colour scale, printed beside it.{caution}

{_table(["mean cosine", "patches in the box", "other patches", "difference"], rows)}

Contrastive training on a handful of photographs pulls all words and patches of each one together;
the last column is what is left of a difference between the box and the rest."""


def _maxsim(found: Findings) -> str:
    table = found.maxsim
    size = table.size
    fused = table.rows[-1]
    rows = [
        [
            row.name,
            f"{1e3 * row.seconds:.1f} ms",
            f"{1e3 * row.fastest:.1f} to {1e3 * row.slowest:.1f} ms",
            f"{row.extra_bytes / 2**20:.1f} MiB",
            f"{row.seconds / fused.seconds:.2f}×",
            f"{row.extra_bytes / max(fused.extra_bytes, 1):.1f}×",
        ]
        for row in table.rows
    ]
    head = ["loss", "median", "range", "extra memory", "time / fused", "memory / fused"]
    return f"""## The fused MaxSim loss against the eager one

{_table(head, rows)}

`maxsim_contrastive_loss`, both directions, forward and backward: {size.pairs} images ×
{size.pairs} texts, {size.image_tokens} and {size.text_tokens} tokens of {size.dim} channels,
float32, on {table.device}; median of {table.runs} warm runs taken in turns. Extra memory is the
peak of live tensor bytes beyond the inputs and their gradients. Before anything was timed, losses
and gradients were compared: they differ by {table.error:.1e} (relative)
at most. This is one size on one machine, whatever else that was doing; `benchmarks/` measures with
care."""


def _made_with(found: Findings) -> str:
    config = found.config
    rows = [
        ["command", f"`{found.command}`"],
        *([name, value] for name, value in found.facts.items()),
        ["model", f"{found.model}, {found.pretrained or 'random weights'}, {found.precision}"],
        [
            "optimizer",
            f"AdamW, peak learning rate {config.learning_rate:g}, weight decay "
            f"{config.weight_decay:g}, cosine after {100 * config.warmup:.0f} % warm-up, gradients "
            f"clipped at {config.clip_norm:g}",
        ],
        ["seed", str(config.seed)],
        ["whole demo", f"{found.seconds:.0f} s"],
    ]
    return f"""## Made with

{_table(["", ""], rows)}

The photographs come inside scikit-image, scikit-learn and matplotlib. Their captions were written
for this demo; `data/annotations.jsonl` gives each one's licence and source."""


def _reflow(text: str) -> str:
    """Prose in lines of even length, whatever was put into it; tables and the like as they are."""
    return "\n\n".join(
        block
        if block.startswith(("#", "|", "!", ">"))
        else textwrap.fill(block, 100, break_long_words=False, break_on_hyphens=False)
        for block in text.split("\n\n")
    )


def _hits(recall: Mapping[int, float], count: int) -> str:
    return str(round(recall[min(recall)] * count))


def _table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = ["| " + " | ".join(head) + " |", "|" + " --- |" * len(head)]
    lines += ["| " + " | ".join(row) + " |" for row in rows]
    return "\n".join(lines)


def _link(path: Path, out: Path) -> str:
    return path.relative_to(out).as_posix()
