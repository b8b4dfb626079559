"""Turn benchmarks/results/*.json into docs/benchmarks.md and its plots, lost races included.

    python -m benchmarks.report [--results DIR] [--out docs/benchmarks.md]

A GPU figure appears only if a GPU measured it: what is promised and not yet measured is listed so.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

from . import (
    cpu_sections,
    feature_cpu_sections,
    flism_sections,
    pooling_workloads,
    step_workloads,
    text_conditioned_cpu_sections,
    token_workloads,
)
from .facts import ROOT
from .feature_peers import CLIP, SIGMOID
from .feature_workloads import CONTENDERS as FEATURE_CONTENDERS
from .feature_workloads import PROMISED
from .peers import PEERS
from .pooling_workloads import ALL, SAMPLE
from .token_workloads import FARTHEST, SIMILARITY

Row = dict[str, Any]
Document = dict[str, Any]

WORK = ("op", "direction", "stage", "images", "texts", "text_tokens", "image_tokens", "dim",
        "dtype", "layout", "fill", "batch", "negatives", "captions_per_image", "tokens", "heads",
        "count", "model", "superpixels")  # fmt: skip
PEER_NAMES = tuple(peer.name for peer in PEERS)
EAGER = ("eager amax", "eager max")
FEATURE_RIVALS = tuple(name for name in FEATURE_CONTENDERS if not name.startswith("fastgoal "))


KINDS = ("device", "maxsim_cpu", "feature_cpu", "text_conditioned_cpu", "flism")


def load(folder: Path) -> list[Document]:
    """All result files of a kind this report knows, by name."""
    documents = []
    for path in sorted(folder.glob("*.json")):
        document = json.loads(path.read_text())
        if document.get("kind") in KINDS:
            documents.append({**document, "stem": path.stem})
    return documents


# ---------------------------------------------------------------------------------------------
# Promises
# ---------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Promise:
    """One line of the table of targets; `measured` is None where nothing measured it."""

    what: str
    target: float
    at_least: bool
    measured: float | None
    unit: str = "×"

    def cells(self) -> tuple[str, str, str, str]:
        sign = "≥" if self.at_least else "≤"
        if self.measured is None:
            return self.what, f"{sign} {self.target:.3g} {self.unit}", "not yet measured", ""
        holds = (self.measured >= self.target) == self.at_least or self.measured == self.target
        value = f"{self.measured:.3g} {self.unit}"
        return self.what, f"{sign} {self.target:.3g} {self.unit}", value, "yes" if holds else "no"


class Results:
    """The rows of one sweep, looked up by contender and work."""

    def __init__(self, rows: Iterable[Row]) -> None:
        self.rows = [row for row in rows if row["status"] == "ok"]

    def value(self, key: str, contender: str, **work: Any) -> float | None:
        for row in self.rows:
            if row["contender"] == contender and all(row.get(k) == v for k, v in work.items()):
                return row[key]
        return None

    def best(self, contenders: Iterable[str], **work: Any) -> float | None:
        times = (self.value("median_ms", name, **work) for name in contenders)
        return min((time for time in times if time is not None), default=None)


def ratio(a: float | None, b: float | None) -> float | None:
    return None if a is None or b is None else a / b


def promises(rows: Iterable[Row]) -> list[Promise]:
    """What the fused MaxSim promises for an H200 in bf16, beside what these rows measured."""
    results = Results(rows)
    found = []

    def ours(key: str, op: str, direction: str, stage: str, dim: int, layout: str = "full"):
        return results.value(
            key, "fastgoal triton", op=op, direction=direction, stage=stage, dim=dim, layout=layout
        )

    def rival(names: Iterable[str], op: str, direction: str, stage: str, dim: int):
        return results.best(names, op=op, direction=direction, stage=stage, dim=dim, layout="full")

    scores, loss, one, both = "maxsim_scores", "maxsim_contrastive_loss", "text_to_image", "both"
    inference, training = "inference", "forward+backward"
    for (
        dim,
        share,
        more,
    ) in (512, 0.65, 1.25), (768, 0.70, 1.15):
        size = f"1024 × 1024, T 77, R 196, D {dim}"
        single = ours("median_ms", scores, one, inference, dim)
        found += [
            Promise(f"scores, one direction, {size}: share of the measured GEMM rate", share, True,
                    ours("share_of_gemm", scores, one, inference, dim), ""),
            Promise("… against the best fused peer", 4, True,
                    ratio(rival(PEER_NAMES, scores, one, inference, dim), single), "× faster"),
            Promise("… against our chunked torch backend", 1, True,
                    ratio(rival(["fastgoal torch"], scores, one, inference, dim), single),
                    "× faster"),
            Promise("scores, both, winners kept: time of one direction", more, False,
                    ratio(ours("median_ms", scores, both, "forward", dim), single)),
        ]  # fmt: skip
        for direction, limit in ((one, 2.5), (both, 3.3)):
            step = ours("median_ms", loss, direction, training, dim)
            forward = ours("median_ms", loss, direction, "forward", dim)
            extra = ours("extra_bytes", loss, direction, training, dim)
            cells = 77 + 8 if direction == one else 77 + 196 + 16
            found += [
                Promise(f"loss, {direction}, forward+backward, D {dim}: time of its forward", limit,
                        False, ratio(step, forward)),
                Promise("… against the best fused peer", 5, True,
                        ratio(rival(PEER_NAMES, loss, direction, training, dim), step), "× faster"),
                Promise("… against eager bf16", 2.5, True,
                        ratio(rival(EAGER, loss, direction, training, dim), step), "× faster"),
                Promise("… extra memory", (1024**2 * cells + 32 * 2**20) / 1e6, False,
                        None if extra is None else extra / 1e6, "MB"),
            ]  # fmt: skip
    packed = ours("median_ms", loss, both, training, 512, "packed")
    padded = ours("median_ms", loss, both, training, 512, "padded")
    found.append(
        Promise("loss, both, captions 55 % full, T 248, packed: time of padded", 0.65, False,
                ratio(packed, padded))
    )  # fmt: skip
    return found


def feature_promises(rows: Iterable[Row]) -> list[Promise]:
    """The same of the losses of plain features."""
    results = Results(rows)
    batch, dim = PROMISED
    found = []
    for op, name in ((CLIP, "softmax"), (SIGMOID, "sigmoid")):
        work = {"op": op, "stage": "forward+backward", "batch": batch, "dim": dim}
        step = results.value("median_ms", "fastgoal triton", **work)
        extra = results.value("extra_bytes", "fastgoal triton", **work)
        rival = results.best(FEATURE_RIVALS, **work)
        size = f"{name} loss of plain features, forward+backward, B {batch:,}, D {dim}"
        found.append(Promise(f"{size}: against the fastest rival", 1, True, ratio(rival, step),
                             "× faster"))  # fmt: skip
        if op == CLIP:
            share = results.value("share_of_gemm", "fastgoal triton", **work)
            found.append(Promise("… share of the measured GEMM rate", 0.55, True, share, ""))
        found.append(Promise("… extra memory", 16 * batch * dim / 1e6, False,
                             None if extra is None else extra / 1e6, "MB"))  # fmt: skip
    return found


def pooling_promises(rows: Iterable[Row]) -> list[Promise]:
    """The same of the text-conditioned loss."""
    results = Results(rows)
    ours, published = "fastgoal triton", pooling_workloads.PUBLISHED
    vectorised = (pooling_workloads.EAGER, pooling_workloads.COMPILED)

    def found(key: str, contender: str, negatives: str, images: int, captions: int):
        work = {"op": pooling_workloads.OP, "stage": "forward+backward", "negatives": negatives}
        return results.value(key, contender, images=images, captions_per_image=captions, **work)

    promised, large = pooling_workloads.PROMISED, pooling_workloads.LARGE
    work = {"op": pooling_workloads.OP, "negatives": SAMPLE, "images": promised[0]}
    size = "{} images, K {}, 64 tokens, D 512".format(*promised)
    sampled_ms, all_ms = (
        found("median_ms", ours, negatives, *promised) for negatives in (SAMPLE, ALL)
    )
    sampled_bytes, all_bytes = (
        found("extra_bytes", ours, negatives, *promised) for negatives in (SAMPLE, ALL)
    )
    published_bytes = found("extra_bytes", published, SAMPLE, *promised)
    large_bytes = found("extra_bytes", ours, ALL, *large)
    name = "text-conditioned loss, forward+backward"
    return [
        Promise(f"{name}, sampled negatives, {size}: against the published form", 5, True,
                ratio(found("median_ms", published, SAMPLE, *promised), sampled_ms), "× faster"),
        Promise("… share of its extra memory", 1 / 12, False,
                ratio(sampled_bytes, published_bytes), ""),
        Promise(f"{name}, all negatives, same size: share of the extra memory of the published "
                "form with sampled ones", 1, False, ratio(all_bytes, published_bytes), ""),
        Promise("… time of a vectorised loss with sampled ones", 2.5, False,
                ratio(all_ms, results.best(vectorised, **work))),
        Promise(f"{name}, all negatives, {large[0]:,} × {large[0] * large[1]:,}", 250, False,
                found("median_ms", ours, ALL, *large), "ms"),
        Promise("… extra memory", 6000, False,
                None if large_bytes is None else large_bytes / 1e6, "MB"),
    ]  # fmt: skip


def token_promises(rows: Iterable[Row]) -> list[Promise]:
    """The same of the token ops."""
    results = Results(rows)

    def found(contender: str, op: str):
        return results.value("median_ms", contender, op=op, images=256)

    ours = "fastgoal triton"
    points, gram = found(ours, FARTHEST), found(token_workloads.GRAM, FARTHEST)
    return [
        Promise("farthest_point_sampling, 256 × 197 → 65, D 768", 0.6, False, points, "ms"),
        Promise("… against a batched loop on a Gram matrix", 5, True, ratio(gram, points),
                "× faster"),
        Promise(f"{SIMILARITY}, forward+backward, 256 images", 0.3, False,
                found(ours, SIMILARITY), "ms"),
    ]  # fmt: skip


def step_promises(rows: Iterable[Row]) -> list[Promise]:
    """The same of whole training steps."""
    results = Results(rows)
    work = {"op": step_workloads.OP, "model": "caft-b", "images": 256, "negatives": SAMPLE}
    times = (
        results.value("median_ms", name, **work)
        for name in (step_workloads.PUBLISHED, "fastgoal triton")
    )
    return [
        Promise("CAFT-B training step, 256 images, K 8: against the published form", 3, True,
                ratio(*times), "× faster"),
    ]  # fmt: skip


# ---------------------------------------------------------------------------------------------
# The page
# ---------------------------------------------------------------------------------------------


def markdown_table(head: Iterable[str], rows: Iterable[Iterable[str]]) -> str:
    head = list(head)
    lines = ["| " + " | ".join(head) + " |", "| --- |" + " ---: |" * (len(head) - 1)]
    lines += ["| " + " | ".join(cell.replace("|", "\\|") for cell in row) + " |" for row in rows]
    return "\n".join(lines) + "\n"


def describe(row: Row) -> str:
    if "model" in row:
        return step_workloads.describe(row)
    if "negatives" in row:
        return pooling_workloads.describe(row)
    if "count" in row:
        return token_workloads.describe(row)
    if "batch" in row:  # plain features, one an image and one a caption
        size = f"B {row['batch']:,}, D {row['dim']}, {row['dtype']}"
        return f"{row['op']}, {row['stage']}: {size}"
    layout = "" if row["layout"] == "full" else f", {row['layout']} captions {row['fill']:.0%} full"
    return (
        f"{row['op']}, {row['direction']}, {row['stage']}: {row['images']} × {row['texts']}, "
        f"T {row['text_tokens']}, R {row['image_tokens']}, D {row['dim']}, {row['dtype']}{layout}"
    )


def groups(rows: Iterable[Row]) -> dict[tuple[Any, ...], list[Row]]:
    """The rows of each workload, in the order in which the workloads first appear."""
    found: dict[tuple[Any, ...], list[Row]] = {}
    for row in rows:
        found.setdefault(tuple(row.get(key) for key in WORK), []).append(row)
    return found


def races(rows: Iterable[Row]) -> list[list[Row]]:
    """Rivals side by side, ours first: `groups`, with padded and packed captions in one race.

    Each row has a `label` more: the contender, and its layout where there are two.
    """
    found: dict[str, list[Row]] = {}
    for rivals in groups(rows).values():
        race = found.setdefault(describe_race(rivals[0]), [])
        for row in rivals:
            layout = row.get("layout", "full")
            label = row["contender"] + ("" if layout == "full" else f", {layout}")
            race.append({**row, "label": label})
    return [
        sorted(race, key=lambda row: not row["contender"].startswith("fastgoal "))
        for race in found.values()
    ]


def describe_race(row: Row) -> str:
    """What the rows of one race measure."""
    if row.get("layout", "full") == "full":
        return describe(row)
    return describe({**row, "layout": "full"}) + f", captions {row['fill']:.0%} full"


def describe_machine(document: Document) -> str:
    """The device, the versions and the sources of a result, in one line."""
    device, versions = document["device"], document["versions"]
    threads = ""
    if "threads" in device:
        threads = f", {device['threads']} thread{'s' * (device['threads'] != 1)}"
    packages = ", ".join(
        f"{name} {versions[name]}" for name in ("torch", "triton", "cuda") if versions.get(name)
    )
    commit = document["source"]["commit"]
    commit = "" if commit is None else f", commit {commit[:12]}"
    if document["source"]["modified"]:
        commit += " with local changes"
    return f"{device['name']}{threads}, {packages}{commit}"


def our_default(document: Document) -> str:
    return "fastgoal triton" if document["device"]["type"] == "cuda" else "fastgoal torch"


def row_cells(row: Row, own: Row | None) -> list[str]:
    if row["status"] != "ok":
        return [row["contender"], f"{row['status']}: {row['reason']}", "", "", "", ""]
    time = f"{row['median_ms']:.3f} ({row['low_ms']:.3f}–{row['high_ms']:.3f})"
    relative = f"{row['median_ms'] / own['median_ms']:.2f}" if own else ""
    rate = "" if row["tflop_s"] is None else f"{row['tflop_s']:.3g} ({row['share_of_gemm']:.0%})"
    parity = f"{max(row['parity'].values()):.1e}"
    return [row["contender"], time, relative, f"{row['extra_bytes'] / 1e6:,.1f}", rate, parity]


def losses(document: Document) -> list[str]:
    """Every row in which someone else is faster or needs less memory than our default."""
    found = []
    for rows in groups(document["rows"]).values():
        ok = [row for row in rows if row["status"] == "ok"]
        own = next((row for row in ok if row["contender"] == our_default(document)), None)
        if own is None:
            continue
        for row in ok:
            if row["median_ms"] < own["median_ms"]:
                share = row["median_ms"] / own["median_ms"]
                found.append(f"{describe(row)}: {row['contender']} takes {share:.2f} of our time")
            if row["extra_bytes"] < own["extra_bytes"]:
                share = row["extra_bytes"] / own["extra_bytes"]
                found.append(f"{describe(row)}: {row['contender']} takes {share:.2f} of our memory")
    return found


def provenance(document: Document) -> str:
    device, versions = document["device"], document["versions"]
    packages = ", ".join(f"{name} {value}" for name, value in versions.items() if value)
    commit = document["source"]["commit"]
    commit = "of unknown commit" if commit is None else f"at commit `{commit[:12]}`"
    if document["source"]["modified"]:
        commit += " with local changes"
    return (
        f"`{document['command']}` on {document['date']}, sources {commit}, on {device['name']}; "
        f"{packages}.\n"
    )


def device_section(document: Document, plot: str | None) -> str:
    ceilings = document["ceilings"]
    parts = [
        f"## {document['device']['name']}\n",
        provenance(document),
        f"Measured ceilings: copy {ceilings['copy_gb_s']:,.0f} GB/s, {ceilings['gemm_dtype']} "
        f"matrix product {ceilings['gemm_tflop_s']:,.1f} TFLOP/s.\n",
        "Spot checks against float64: "
        + "; ".join(f"{c['name']} {c['status']}" for c in document["checks"])
        + ".\n",
    ]
    if not document["finished"]:
        parts.append("This run was interrupted; what follows is what it had measured.\n")
    if plot:
        parts.append(f"![time and memory]({plot})\n")
    head = ["", "ms (20–80 %)", "× our time", "extra MB", "TFLOP/s (of GEMM)", "parity error"]
    for rows in groups(document["rows"]).values():
        own = next(
            (r for r in rows if r["contender"] == our_default(document) and r["status"] == "ok"),
            None,
        )
        parts.append(f"**{describe(rows[0])}**\n")
        parts.append(markdown_table(head, (row_cells(row, own) for row in rows)))
    lost = losses(document)
    parts.append("### Honest non-wins\n")
    parts.append("\n".join(f"- {line}" for line in lost) + "\n" if lost else "None in this run.\n")
    return "\n".join(parts)


def cpu_section(document: Document, plot: str | None) -> str:
    row = document["rows"][0]
    parts = [
        f"### {row['images']} × {row['texts']} pairs, {document['device']['threads']} threads\n",
        provenance(document),
    ]
    if plot:
        parts.append(f"![time and memory]({plot})\n")
    for rows in cpu_sections.by_section(document["rows"]).values():
        parts.append(f"**{cpu_sections.title(rows)}**\n")
        parts.append(markdown_table(cpu_sections.HEAD, cpu_sections.table(rows)))
        footer = [f"- {line}" for line in cpu_sections.footer(rows)]
        if footer:
            parts.append("\n".join(footer) + "\n")
    return "\n".join(parts)


def table_section(
    heading: str, sections: ModuleType, cells: list[list[str]], document: Document, plot: str | None
) -> str:
    """A result whose rows stand in one table."""
    rows = document["rows"]
    parts = [f"### {heading}, {document['device']['threads']} threads\n", provenance(document)]
    if plot:
        parts.append(f"![time and memory]({plot})\n")
    parts += [f"**{sections.title(rows)}**\n", markdown_table(sections.HEAD, cells)]
    footer = [f"- {line}" for line in sections.footer(rows)]
    if footer:
        parts.append("\n".join(footer) + "\n")
    return "\n".join(parts)


def feature_cpu_section(document: Document, plot: str | None) -> str:
    sections, rows = feature_cpu_sections, document["rows"]
    heading = f"Losses of plain features: B {rows[0]['batch']:,}"
    return table_section(heading, sections, sections.table(rows), document, plot)


def text_conditioned_cpu_section(document: Document, plot: str | None) -> str:
    sections, rows = text_conditioned_cpu_sections, document["rows"]
    heading = (
        f"Text-conditioned loss: {rows[0]['images']} images, "
        f"{rows[0]['captions_per_image']} captions each"
    )
    cells = [row for group in sections.tables(rows) for row in group]
    return table_section(heading, sections, cells, document, plot)


def flism_section(document: Document) -> str:
    sections, rows = flism_sections, document["rows"]
    heading = f"Local pairs: {rows[0]['detector'] or 'no detector'}"
    return table_section(heading, sections, sections.table(rows), document, None)


def page(documents: list[Document], plots: dict[str, str]) -> str:
    """The whole of docs/benchmarks.md."""
    gpus = [d for d in documents if d["kind"] == "device" and d["device"]["type"] == "cuda"]
    cpus = [d for d in documents if d["kind"] == "device" and d["device"]["type"] != "cuda"]
    parts = [
        "# Benchmarks\n",
        "Written by `python -m benchmarks.report` from the files in `benchmarks/results/`. "
        "Medians of warm calls; in brackets the 20th to 80th percentile. Parity with float32 is "
        "asserted before anything is timed. Extra memory is the peak beyond the inputs and what "
        'the call returns (scores, or gradients); "not seen" is what a library allocates outside '
        "of PyTorch. Lost races are listed too.\n",
        "## Promises for an H200, bf16\n",
    ]
    if not gpus:
        parts.append(
            "No GPU result is in `benchmarks/results/` yet, so every line says so. "
            "`python -m benchmarks.device` measures all of them in one run.\n"
        )
    for document in gpus or [{"rows": [], "device": {"name": ""}}]:
        if document["device"]["name"]:
            parts.append(f"Measured on {document['device']['name']}:\n")
        kinds = (
            promises, feature_promises, pooling_promises, token_promises, step_promises,
        )  # fmt: skip
        promised = (promise for kind in kinds for promise in kind(document["rows"]))
        cells = (promise.cells() for promise in promised)
        parts.append(markdown_table(["", "promised", "measured", "holds"], cells))
    parts += [device_section(document, plots.get(document["stem"])) for document in gpus]
    parts.append("## CPU\n")
    small = [document for document in documents if document["kind"] == "maxsim_cpu"]
    parts += [
        cpu_section(document, plots.get(document["stem"]))
        for document in sorted(small, key=lambda d: d["rows"][0]["images"])
    ]
    if not small and not cpus:
        parts.append("Not yet measured: `python -m benchmarks.maxsim_cpu`.\n")
    features = [document for document in documents if document["kind"] == "feature_cpu"]
    parts += [feature_cpu_section(document, plots.get(document["stem"])) for document in features]
    if not features:
        parts.append("Losses of plain features, not yet measured: "
                     "`python -m benchmarks.feature_cpu`.\n")  # fmt: skip
    pooling = [document for document in documents if document["kind"] == "text_conditioned_cpu"]
    parts += [
        text_conditioned_cpu_section(document, plots.get(document["stem"])) for document in pooling
    ]
    if not pooling:
        parts.append("Text-conditioned loss, not yet measured: "
                     "`python -m benchmarks.text_conditioned_cpu`.\n")  # fmt: skip
    pairs = [document for document in documents if document["kind"] == "flism"]
    parts += [flism_section(document) for document in pairs]
    if not pairs:
        parts.append("Local pairs, not yet measured: `python -m benchmarks.flism`.\n")
    parts += [device_section(document, plots.get(document["stem"])) for document in cpus]
    return "\n".join(parts)


@dataclass(frozen=True)
class Panel:
    """Rivals whose bars stand together, and what they did."""

    title: str
    rows: list[Row]
    names: list[str]


def panels(document: Document) -> list[Panel]:
    """The training steps of a result, without who did not finish; of local pairs none."""
    if document["kind"] == "flism":
        return []
    rows = [row for row in document["rows"] if row["stage"] == "forward+backward"]
    if document["kind"] == "device":
        races_run = [race for race in races(rows) if pictured(race[0], rows)]
        titles = [describe_race(race[0]) for race in races_run]
    elif document["kind"] == "maxsim_cpu":
        races_run = list(cpu_sections.by_section(rows).values())
        titles = [cpu_sections.title(race) for race in races_run]
    else:
        group = {
            "feature_cpu": feature_cpu_sections.by_loss,
            "text_conditioned_cpu": text_conditioned_cpu_sections.by_negatives,
        }[document["kind"]]
        races_run = list(group(rows).values())
        titles = [describe(race[0]) for race in races_run]
    found = []
    for title, race in zip(titles, races_run, strict=True):
        ok = [row for row in race if row["status"] == "ok"]
        if ok:
            found.append(Panel(title, ok, [row.get("label", row["contender"]) for row in ok]))
    return found


def pictured(row: Row, rows: Iterable[Row]) -> bool:
    """Of the many sizes of plain features only the promised one, where that was measured."""
    sizes = {(other["batch"], other["dim"]) for other in rows if "batch" in other}
    return "batch" not in row or PROMISED not in sizes or (row["batch"], row["dim"]) == PROMISED


def plot(document: Document, folder: Path) -> Path | None:
    """Time and extra memory of the training steps, a bar a contender; None if there is none.

    The picture is `folder`/`document["stem"]`.png.
    """
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    steps = panels(document)
    if not steps:
        return None
    bars_in_all = sum(len(step.rows) for step in steps)
    figure, axes = plt.subplots(
        len(steps), 2, figsize=(11, 1.0 * len(steps) + 0.45 * bars_in_all), squeeze=False,
        layout="constrained", height_ratios=[1 + len(step.rows) for step in steps],
    )  # fmt: skip
    for (time_axis, memory_axis), step in zip(axes, steps, strict=True):
        rows, names = step.rows, step.names[::-1]
        colours = ["tab:green" if name.startswith("fastgoal") else "0.6" for name in names]
        for axis, key, scale, unit in (
            (time_axis, "median_ms", 1, "ms"),
            (memory_axis, "extra_bytes", 1e-6, "extra MB"),
        ):
            bars = axis.barh(names, [row[key] * scale for row in rows][::-1], color=colours)
            axis.bar_label(
                bars, fmt=lambda v: f"{v:,.0f}" if v >= 100 else f"{v:.3g}", padding=2, fontsize=7
            )
            axis.set_xlabel(unit, fontsize=8)
            axis.tick_params(labelsize=8)
            axis.margins(x=0.12)
        memory_axis.set_yticklabels([])
        time_axis.set_title(step.title, fontsize=8, loc="left")
    if document["kind"] == "device":
        figure.suptitle(describe_machine(document), fontsize=9)
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{document['stem']}.png"
    figure.savefig(path, dpi=120)
    plt.close(figure)
    return path


def main(argv: list[str] | None = None) -> int:
    """The command."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.report", description=__doc__.splitlines()[0]
    )
    parser.add_argument("--results", type=Path, default=ROOT / "benchmarks" / "results")
    parser.add_argument("--out", type=Path, default=ROOT / "docs" / "benchmarks.md")
    arguments = parser.parse_args(argv)
    documents = load(arguments.results)
    folder = arguments.out.parent / arguments.out.stem
    plots = {}
    for document in documents:
        path = plot(document, folder)
        if path is not None:
            plots[document["stem"]] = f"{folder.name}/{path.name}"
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    arguments.out.write_text(page(documents, plots))
    print(f"{len(documents)} result files -> {arguments.out}, {len(plots)} plots")
    return 0


if __name__ == "__main__":
    sys.exit(main())
