"""Render the runs of `benchmarks.learning`: one JSON, one picture of curves, docs/learning.md."""

from __future__ import annotations

import json
import shutil
import statistics
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")

import matplotlib.pyplot as plt
import torch

from . import facts
from .device import write

Row = dict[str, Any]

NAMES = {"fast-goal": "FAST-GOAL", "caft": "CAFT"}
VARIANTS = {"full": "whole loss", "global": "global loss alone"}
_COLOURS = {"full": "#0072B2", "global": "#D55E00"}


def render(runs: Path, command: str) -> None:
    """Write benchmarks/results/learning.json, docs/learning/losses.png and docs/learning.md."""
    rows = [json.loads(path.read_text("utf-8")) for path in sorted(runs.glob("*.json"))]
    if not rows:
        raise SystemExit(f"{runs} holds no finished run: {command}")
    document = {
        "schema": 1, "kind": "learning", **facts.provenance(command, torch.device("cpu")),
        "rows": rows,
    }  # fmt: skip
    write(document, facts.ROOT / "benchmarks" / "results" / "learning.json")
    pictures = facts.ROOT / "docs" / "learning"
    _draw_losses(rows, pictures / "losses.png")
    if (runs / "caft-0.png").is_file():
        shutil.copyfile(runs / "caft-0.png", pictures / "caft.png")
    (facts.ROOT / "docs" / "learning.md").write_text(page(document), "utf-8")


def spread(values: Sequence[float]) -> str:
    """Mean and standard deviation in per cent."""
    mean = 100 * statistics.fmean(values)
    if len(values) < 2:
        return f"{mean:.1f}"
    return f"{mean:.1f} ± {100 * statistics.stdev(values):.1f}"


def table(rows: Iterable[Row]) -> str:
    """One line for each method, variant and score."""
    lines = [
        "| method | trained with | scored by | R@1 t→i | R@5 t→i | R@1 i→t | R@5 i→t | pointing "
        "| seeds | minutes a run |",
        "| --- | --- | --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: |",
    ]
    rows = list(rows)
    for method in NAMES:
        for variant in VARIANTS:
            found = [r for r in rows if r["method"] == method and r["variant"] == variant]
            for score in found[0]["recall"] if found else ():
                cells = [
                    spread([r["recall"][score][way][k] for r in found])
                    for way in ("text_to_image", "image_to_text")
                    for k in (0, 1)
                ]
                minutes = statistics.fmean(r["train_seconds"] for r in found) / 60
                lines.append(
                    f"| {NAMES[method]} | {VARIANTS[variant]} | {score} | "
                    + " | ".join(cells)
                    + f" | {spread([r['pointing'] for r in found])} | {len(found)} | "
                    f"{minutes:.1f} |"
                )
    return "\n".join(lines) + "\n"


def page(document: dict[str, Any]) -> str:
    """docs/learning.md."""
    rows, device = document["rows"], document["device"]
    first, versions = rows[0], document["versions"]
    chance = 100 * statistics.fmean(row["chance"] for row in rows)
    sizes = {row["method"]: f"{row['steps']:,} steps of {row['batch']} scenes" for row in rows}
    made = ", ".join(f"{NAMES[method]} {text}" for method, text in sizes.items())
    return f"""# Do the local and hierarchical losses teach anything?

On a **synthetic** set (`fastgoal_models/synthetic.py`): drawn scenes of three to five coloured,
textured shapes, captions of five to nine sentences that describe each shape, the background and how
shapes stand to each other, and the box that each describing sentence is about. Small models learn
from nothing, once with their method's whole loss and once with its global loss alone, with the same
scenes, batches, steps and seeds. It shows whether a method's losses do what they are for; it says
nothing about photographs.

    {document["command"]}             # all runs, one after the other
    {document["command"]} --render    # this page

{made}; {first["parameters"] / 1e6:.1f} million parameters or a few more; {device["name"]}, one
thread a run with another run beside it, torch {versions["torch"]}. Evaluated on 500 held-out
scenes. In per cent, mean ± standard deviation over the seeds:

{table(rows)}
*Recall* is of whole captions; chance is 0.2 % at 1 and 1 % at 5. *Pointing* is the share of
describing sentences whose peak lies in the box of the shape they describe, where chance hits
{chance:.1f} %: for FAST-GOAL the cosine of the sentence with each projected patch, for CAFT the
text-conditioned attention over the fine tokens. CAFT's global loss alone never trains that
attention: its pointing is that of random weights.

## What it shows

{conclusions(rows)}
![Losses](learning/losses.png)

A held-out scene as CAFT sees it after training with its whole loss (first seed): the segments of
its levels, and below where each part of the caption looks. Superpixels are the plain grid here.

![CAFT's segments and attention](learning/caft.png)
"""


def conclusions(rows: list[Row]) -> str:
    """The differences in words, with their numbers; nothing is said of what was not run."""
    lines = []
    for method, name in NAMES.items():
        pairs = {
            variant: [r for r in rows if r["method"] == method and r["variant"] == variant]
            for variant in VARIANTS
        }
        if not all(pairs.values()):
            continue
        score = list(pairs["full"][0]["recall"])[-1]

        def mean(variant: str, key: str, score: str = score, pairs: Any = pairs) -> float:
            if key == "pointing":
                return 100 * statistics.fmean(r["pointing"] for r in pairs[variant])
            return 100 * statistics.fmean(r["recall"][score][key][0] for r in pairs[variant])

        lines.append(
            f"- **{name}**: pointing {mean('full', 'pointing'):.1f} % with the whole loss, "
            f"{mean('global', 'pointing'):.1f} %\n  with the global loss alone; R@1 "
            f"{mean('full', 'text_to_image'):.1f} and {mean('global', 'text_to_image'):.1f} % from "
            f"text to image,\n  {mean('full', 'image_to_text'):.1f} and "
            f"{mean('global', 'image_to_text'):.1f} % from image to text. Seeds: "
            f"{min(len(pairs['full']), len(pairs['global']))} of 3."
        )
    return "\n".join(lines) + "\n"


def _draw_losses(rows: list[Row], path: Path) -> None:
    figure, axes = plt.subplots(1, 2, figsize=(9, 3.4), layout="constrained", squeeze=False)
    for axis, method in zip(axes[0], NAMES, strict=True):
        for row in rows:
            if row["method"] != method:
                continue
            steps, losses = zip(*row["losses"], strict=True)
            axis.plot(
                steps, losses, color=_COLOURS[row["variant"]], alpha=0.8,
                label=VARIANTS[row["variant"]] if row["seed"] == 0 else None,
            )  # fmt: skip
        axis.set_title(NAMES[method])
        axis.set_xlabel("step")
        axis.set_ylabel("loss")
        axis.set_yscale("log")
        axis.grid(alpha=0.3)
        if axis.lines:
            axis.legend(frameon=False)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=90)
    plt.close(figure)
