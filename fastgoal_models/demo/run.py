"""`fastgoal demo`: real photographs in, a fine-tuned CLIP and a report out, in a few minutes.

Nothing here is special to the demo's photographs but where they come from: they go through the
same reader, matching, data set, training loop and evaluation as anybody's data.
"""

from __future__ import annotations

import json
import shutil
import time
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from open_clip import SimpleTokenizer
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from ..atomic_files import write_text_atomically
from ..devices import parse_device
from ..errors import ConfigError
from ..evaluation import caption_set, evaluate_set
from ..fast_goal import DEMO_CONFIG, FastGoalBatch, FastGoalModel
from ..fast_goal_training import FastGoalTrainConfig
from ..flism import match_pairs
from ..glit import GlitRecord, LocalPair, read_glit, write_glit
from ..glit_dataset import FastGoalDataset
from ..options import create_model, records_digest
from ..progress import StepPrinter
from ..retrieval import Retrieval
from ..training import precision_name, read_log, train
from . import maxsim_table, pictures
from .facts import machine_facts
from .photographs import write_annotations
from .report import Findings, write_report
from .words import inside_and_outside, word_patch_cosines

KS = (1, 5, 10)

# What the demo writes into its folder, and so may replace in it.
_MARKER = "fastgoal-demo.json"
_SENTENCE_TOKENS = 77  # a sentence is short: a third of the captions' context is plenty


@dataclass(frozen=True)
class DemoOptions:
    """The options of `fastgoal demo`; `command` is how it was called, for the report."""

    out: Path
    steps: int = 120
    batch_size: int = 8
    model: str | None = None
    pretrained: str | None = None
    seed: int = 0
    resume: bool = False
    device: str | None = None
    precision: str = "auto"
    command: str = "fastgoal demo"


def run_demo(options: DemoOptions, console: Console) -> Path | None:
    """Run the whole demo; the report's path, or None when Ctrl-C stopped the training."""
    began = time.perf_counter()
    device = parse_device(options.device)
    config = _config(options)
    _prepare_folder(options, console)

    model = _create_model(options, console).to(device)
    records = _read_photographs(options.out / "data")
    console.print(
        f"{len(records)} photographs with long captions, laid out in {options.out / 'data'}"
    )

    _heading(console, "Local pairs, by FLISM's fixed regions")
    records = _match(model, records)
    write_glit(records, options.out / "data" / "pairs.jsonl")
    dataset = FastGoalDataset(
        records, model.tokenizer, model.image_size, model.context_length, model.normalisation
    )
    items = [dataset[index] for index in range(len(dataset))]  # few enough to read only once
    console.print(
        f"one region and one sentence for each photograph: {options.out}/data/pairs.jsonl"
    )
    if options.pretrained is None:
        console.print("[yellow]Random weights match at random: these pairs are arbitrary.[/]")

    _heading(console, "Long-text retrieval before")
    photographs = caption_set(records, "photographs")
    before = evaluate_set(model, photographs, ks=KS).retrieval
    console.print(_recall_table({"before": before}))
    shown = _record_for_heat_map(dataset.pairs, records)
    words_before = _word_cosines(model, items, dataset, shown)

    _heading(console, f"Fine-tuning: {options.steps} steps on {device}")
    identity = {
        "model": options.model or DEMO_CONFIG.name,
        "pretrained": options.pretrained,
        "data": records_digest(records),
    }
    with StepPrinter(console) as printer:
        result = train(
            model,
            items,
            config,
            device=device,
            resume=options.resume,
            identity=identity,
            on_step=printer,
        )
    if result.interrupted:
        return None

    _heading(console, "Long-text retrieval after")
    after = evaluate_set(model, photographs, ks=KS).retrieval
    console.print(_recall_table({"before": before, "after": after}))
    words_after = _word_cosines(model, items, dataset, shown)
    rematched = _match(model, records)

    _heading(console, "The fused MaxSim loss against the eager one")
    table = maxsim_table.compare(device)
    console.print(_maxsim_table(table))

    _heading(console, "Pictures and report")
    folder = options.out / "pictures"
    log = read_log(options.out)
    pictures.loss_curves(log, folder / "losses.png")
    sheets = pictures.contact_sheets(
        [
            pictures.PairPicture(old.id, old.image, old.sentences, pair, new.pairs[0])
            for old, pair, new in zip(records, dataset.pairs, rematched, strict=True)
        ],
        folder,
    )
    pair = dataset.pairs[shown]
    maps = pictures.WordMaps(words_before[0], words_before[1], words_after[1])
    pictures.heat_map(records[shown].image, pair, maps, folder / "words.png")
    report = write_report(
        options.out,
        Findings(
            command=options.command,
            facts=machine_facts(device),
            model=options.model or "the demo's small ViT",
            parameters=sum(parameter.numel() for parameter in model.parameters()),
            pretrained=options.pretrained,
            precision=precision_name(config, device),
            config=config,
            num_photographs=len(records),
            log=log,
            before=before,
            after=after,
            sheets=sheets,
            same_pairs=sum(
                pair[:2] == new.pairs[0][:2]
                for pair, new in zip(dataset.pairs, rematched, strict=True)
            ),
            heat_map=folder / "words.png",
            heat_map_name=records[shown].id,
            heat_map_sentence=records[shown].sentences[pair.sentence],
            heat_map_region=pair.region,
            inside_before=inside_and_outside(maps.before, pair.box, records[shown]),
            inside_after=inside_and_outside(maps.after, pair.box, records[shown]),
            losses=folder / "losses.png",
            maxsim=table,
            seconds=time.perf_counter() - began,
        ),
    )
    console.print(
        f"[bold]{escape(str(report))}[/] has the curves, the pictures and the tables "
        f"({time.perf_counter() - began:.0f} s in all)."
    )
    console.print(
        f"{len(records)} photographs, trained on and tested on: this shows that it works, "
        "not how well it generalises."
    )
    return report


def _config(options: DemoOptions) -> FastGoalTrainConfig:
    return FastGoalTrainConfig(
        out=options.out,
        steps=options.steps,
        batch_size=options.batch_size,
        # Random weights have everything to learn, pretrained ones something to lose.
        learning_rate=5e-4 if options.pretrained is None else 1e-5,
        warmup=0.1,
        precision=options.precision,
        seed=options.seed,
        save_every=40,
        keep=1,
    )


def _prepare_folder(options: DemoOptions, console: Console) -> None:
    """Make the folder, or clear what an earlier demo left there; never touch anything else."""
    out = options.out
    if out.exists() and not out.is_dir():
        raise ConfigError(f"--out {out} is a file; name a folder")
    earlier = (out / _MARKER).is_file()
    if out.is_dir() and any(out.iterdir()) and not earlier:
        raise ConfigError(f"--out {out} holds other files; name a new or an empty folder")
    if earlier and not options.resume:
        console.print(f"Replacing the earlier demo in {escape(str(out))}.")
        for folder in ("checkpoints", "pictures"):
            shutil.rmtree(out / folder, ignore_errors=True)
        for file in ("report.md", "log.jsonl"):
            (out / file).unlink(missing_ok=True)
    out.mkdir(parents=True, exist_ok=True)
    text = json.dumps(asdict(options) | {"out": str(out)}, indent=2)
    write_text_atomically(out / _MARKER, text + "\n")


def _create_model(options: DemoOptions, console: Console) -> FastGoalModel:
    model = create_model(options.model or DEMO_CONFIG, options.pretrained, options.seed)
    count = sum(parameter.numel() for parameter in model.parameters()) / 1e6
    name = options.model or "a small CLIP"
    weights = f"weights {options.pretrained}" if options.pretrained else "[bold]random weights[/]"
    console.print(
        f"{name} of {count:.1f} million parameters with {weights}; photographs of "
        f"{model.image_size} × {model.image_size} pixels, captions of up to "
        f"{model.context_length} tokens"
    )
    return model


def _read_photographs(folder: Path) -> list[GlitRecord]:
    records, _ = read_glit(write_annotations(folder), strict=True)
    return records


def _match(model: FastGoalModel, records: list[GlitRecord]) -> list[GlitRecord]:
    tokenizer = SimpleTokenizer(context_length=min(_SENTENCE_TOKENS, model.context_length))
    return match_pairs(model, records, tokenizer=tokenizer, progress=False)


def _record_for_heat_map(pairs: list[LocalPair], records: list[GlitRecord]) -> int:
    """The first photograph whose matched sentence fills one to two rows of six words."""
    counts = [
        len(record.sentences[pair.sentence].split())
        for pair, record in zip(pairs, records, strict=True)
    ]
    return next((i for i, count in enumerate(counts) if 8 <= count <= 12), 0)


def _word_cosines(
    model: FastGoalModel, items: list[FastGoalBatch], dataset: FastGoalDataset, index: int
) -> tuple[list[str], torch.Tensor]:
    sentences = dataset.records[index].sentences
    return word_patch_cosines(model, items[index].images, sentences, dataset.pairs[index].sentence)


def _heading(console: Console, text: str) -> None:
    console.print()
    console.rule(f"[bold]{text}[/]", align="left")


def _recall_table(runs: dict[str, Retrieval]) -> Table:
    table = Table("direction", "", *(f"R@{k}" for k in KS))
    for direction in ("text_to_image", "image_to_text"):
        for name, found in runs.items():
            recalls = getattr(found, direction).values()
            cells = (f"{100 * recall:.1f} %" for recall in recalls)
            table.add_row(direction.replace("_", " "), name, *cells)
    return table


def _maxsim_table(found: maxsim_table.MaxSimTable) -> Table:
    size = found.size
    table = Table(
        title=f"{size.pairs} × {size.pairs} pairs, {size.text_tokens} × {size.image_tokens} tokens "
        f"of {size.dim}, float32, {found.device}"
    )
    table.add_column("loss, forward and backward")
    table.add_column("time", justify="right")
    table.add_column("extra memory", justify="right")
    for row in found.rows:
        name = row.name.replace("`", "")
        table.add_row(name, f"{1e3 * row.seconds:.0f} ms", f"{row.extra_bytes / 2**20:.1f} MiB")
    return table
