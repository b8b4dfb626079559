"""The `fastgoal` command.

Exit codes: 0 done, 1 `doctor` or `bench` found our results wrong, 2 the user's input is at fault,
130 Ctrl-C.

A command imports what it runs inside its own body: PyTorch and open_clip take seconds, which --help
should not wait for, and `fastgoal doctor` must work where one of them is missing or broken.
"""

from __future__ import annotations

import importlib.metadata
import shlex
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from enum import Enum
from pathlib import Path
from typing import Annotated, Any, NoReturn

import typer
from rich.console import Console
from rich.markup import escape

from .errors import UserError, how_to_install
from .json_output import console_beside

EXIT_NOT_WELL = 1
EXIT_USER_ERROR = 2
EXIT_INTERRUPTED = 130

app = typer.Typer(
    name="fastgoal",
    help="Train CLIP on long captions with FAST-GOAL and CAFT.",
    no_args_is_help=True,
    context_settings={"help_option_names": ["-h", "--help"]},
)


class Precision(str, Enum):
    auto = "auto"
    bf16 = "bf16"
    fp32 = "fp32"


class Preset(str, Enum):
    default = "default"
    published = "published"
    fast_goal_b16 = "fast-goal-b16"
    fast_goal_l14 = "fast-goal-l14"
    goal_b16 = "goal-b16"


class Pairs(str, Enum):
    best = "best"
    uniform = "uniform"
    weighted = "weighted"


class LongCaptions(str, Enum):
    cut = "cut"
    chunk = "chunk"


class CaftPreset(str, Enum):
    default = "default"
    m3 = "3m"
    m12 = "12m"
    m15 = "15m"
    m30 = "30m"


class TrainPrecision(str, Enum):
    auto = "auto"
    bf16 = "bf16"
    fp16 = "fp16"
    fp32 = "fp32"


class SuperpixelMaker(str, Enum):
    sfcn = "sfcn"
    slic = "slic"
    grid = "grid"


class Negatives(str, Enum):
    all = "all"
    sample = "sample"


class Resize(str, Enum):
    own = "own"
    squash = "squash"


class Layout(str, Enum):
    open_clip = "open-clip"
    hf = "hf"


train_app = typer.Typer(
    help="Train: FAST-GOAL fine-tunes a CLIP, CAFT trains its own encoders.", no_args_is_help=True
)
app.add_typer(train_app, name="train")

DeviceOption = Annotated[
    str | None, typer.Option(help="cpu, cuda, cuda:1 ... Default: a GPU if there is one.")
]
PrecisionOption = Annotated[
    Precision, typer.Option(help="auto: bf16 where a GPU has it, else float32.")
]
SeedOption = Annotated[int, typer.Option(min=0, help="Weights (if random) and data order.")]
ResumeOption = Annotated[
    bool, typer.Option("--resume", help="Continue from the newest checkpoint in --out.")
]
EmaOption = Annotated[
    float | None,
    typer.Option(
        min=0,
        max=1,
        help="Keep a moving average of the weights with this decay, e.g. 0.999: what is evaluated, "
        "and what is loaded of the run.",
    ),
]
ConfigOption = Annotated[
    Path | None,
    typer.Option(help="Options from a file, e.g. a run's config.yaml; those typed here win."),
]
BatchSizeOption = Annotated[
    int | None,
    typer.Option(
        min=2,
        help="Default: the preset's, or the number of records where there are fewer.",
    ),
]
SaveEveryOption = Annotated[
    int | None,
    typer.Option(
        min=1,
        help="Steps between checkpoints, of which --keep stay. Default: only at the end.",
    ),
]


def _number_or_all(value: str | int) -> int | None:
    if value == "all":
        return None
    try:
        number = int(value)
    except ValueError:
        number = 0
    if number < 1:
        raise typer.BadParameter(f"{value!r} is neither a number from 1 nor all")
    return number


KeepOption = Annotated[
    int | None,
    typer.Option(
        parser=_number_or_all,
        metavar="N|all",
        help="Checkpoints that stay, the newest; older ones are deleted.",
    ),
]
EvalDataOption = Annotated[
    Path | None,
    typer.Option(
        help="Annotations to measure retrieval on during training, into eval.jsonl. It changes "
        "nothing else."
    ),
]
EvalRootOption = Annotated[
    Path | None, typer.Option(help="Folder of their images. Default: that of --eval-data.")
]
EvalEveryOption = Annotated[
    int | None, typer.Option(min=1, help="Steps between evaluations. Default: only at the end.")
]
KeepBestOption = Annotated[
    bool,
    typer.Option(
        "--keep-best", help="Also keep the checkpoint with the best mean R@1: see best.json."
    ),
]
TensorBoardOption = Annotated[
    bool, typer.Option("--tensorboard", help="Also write curves below --out for TensorBoard.")
]
WandbOption = Annotated[bool, typer.Option("--wandb", help="Also send curves to Weights & Biases.")]
RootOption = Annotated[
    Path | None, typer.Option(help="Folder of the images. Default: that of --data.")
]
MODEL_HELP = "open_clip model name, a JSON config, or the folder of a run of `fastgoal train`."
ModelOption = Annotated[str, typer.Option(help=MODEL_HELP)]
ContextOption = Annotated[
    int | None,
    typer.Option(min=3, help="Tokens of a text. Default: as many as the weights have."),
]
PretrainedOption = Annotated[
    str | None,
    typer.Option(help="An open_clip tag of --model, or a weights file. Default: random weights."),
]

JsonOption = Annotated[
    Path | None,
    typer.Option("--json", help="Also write what was found here; - is the standard output."),
]


def _show_version(asked: bool) -> None:
    if asked:
        try:
            version = importlib.metadata.version("fastgoal")
        except importlib.metadata.PackageNotFoundError:  # a checkout that is not installed
            from fastgoal_kernels import __version__ as version
        typer.echo(f"fastgoal {version}")
        raise typer.Exit


@app.callback()
def _fastgoal(
    version: Annotated[
        bool,
        typer.Option("--version", callback=_show_version, is_eager=True, help="Show the version."),
    ] = False,
) -> None:
    pass


@app.command()
def demo(
    out: Annotated[Path, typer.Option(help="Folder for the report.")] = Path("fastgoal-demo"),
    steps: Annotated[int, typer.Option(min=1, help="Optimizer steps.")] = 120,
    batch_size: Annotated[int, typer.Option(min=2, help="Photographs a step.")] = 8,
    model: Annotated[
        str | None,
        typer.Option(help="An open_clip model name. Default: a small ViT made for this demo."),
    ] = None,
    pretrained: PretrainedOption = None,
    seed: SeedOption = 0,
    resume: ResumeOption = False,
    device: DeviceOption = None,
    precision: PrecisionOption = Precision.auto,
) -> None:
    """Fine-tune a small CLIP on real photographs and write a report with pictures.

    Takes one to two minutes on two CPU cores that have nothing else to do. Downloads nothing,
    unless --pretrained names weights that are not here.
    """
    console = Console()
    with _user_errors(extra="demo"):  # plots need what only that extra installs
        from .demo.run import DemoOptions, run_demo

        result = run_demo(
            DemoOptions(
                out=out,
                steps=steps,
                batch_size=batch_size,
                model=model,
                pretrained=pretrained,
                seed=seed,
                resume=resume,
                device=device,
                precision=precision.value,
                command=_command(),
            ),
            console,
        )
    if result is None:
        _say_how_to_resume(console)


@app.command(no_args_is_help=True)
def unpack(
    source: Annotated[
        str,
        typer.Argument(
            help="A folder of Dataset.save_to_disk, of parquet files or of images, the name of a "
            "dataset on the Hugging Face hub, or webdataset shards: 'part-*.tar', in quotes."
        ),
    ],
    out: Annotated[Path, typer.Option(help="Folder for images/ and captions.jsonl.")],
    split: Annotated[
        str | None, typer.Option(help="Of a dataset, e.g. test. Default: the only one.")
    ] = None,
    subset: Annotated[
        str | None, typer.Option(help="Of a dataset that has several configurations.")
    ] = None,
    image_column: Annotated[
        str, typer.Option(help="Of a dataset; a shard's image is found by its ending.")
    ] = "image",
    caption_column: Annotated[
        list[str] | None,
        typer.Option(
            help="Column of a dataset or key of a shard's JSON, e.g. longSV_captions; a shard's "
            ".txt is its caption. Give it several times for several captions an image. "
            "Default: caption.",
            show_default=False,
        ),
    ] = None,
    id_column: Annotated[
        str | None,
        typer.Option(
            help="Column or key with an image's own id. Default: the row's number, a shard's id or "
            "the sample's name."
        ),
    ] = None,
    keep_column: Annotated[
        list[str] | None,
        typer.Option(
            help="Also keep this column, several times for more. Of a shard's JSON all is kept.",
            show_default=False,
        ),
    ] = None,
    limit: Annotated[int | None, typer.Option(min=1, help="Only the first samples.")] = None,
    json_path: JsonOption = None,
) -> None:
    """Turn a dataset or shards into images and a captions.jsonl, as the other commands read them.

    Images stay the files that their authors made. Stop it whenever you like: the same command goes
    on where it was.
    """
    with _user_errors():
        from .unpack import Columns, UnpackOptions
        from .unpack.command import run_unpack

        columns = Columns(
            image=image_column,
            captions=tuple(caption_column or Columns.captions),
            id=id_column,
            keep=tuple(keep_column or ()),
        )
        options = UnpackOptions(columns, split, subset, limit)
        run_unpack(source, out, options, json_path, _command(), console_beside(json_path))


@app.command()
def prepare(
    data: Annotated[Path, typer.Option(help="One JSON object a line: image and caption.")],
    out: Annotated[Path, typer.Option(help="The GLIT file to write.")],
    root: RootOption = None,
    model: ModelOption = "ViT-B-16",
    pretrained: PretrainedOption = None,
    detector: Annotated[
        str | None,
        typer.Option(
            help="transformers:NAME_OR_FOLDER, torchvision:ARCHITECTURE=WEIGHTS, or a .jsonl file "
            "of boxes. Default: only the five fixed regions."
        ),
    ] = None,
    detector_only: Annotated[
        bool, typer.Option("--detector-only", help="Leave the five fixed regions out.")
    ] = False,
    most_boxes: Annotated[
        int, typer.Option(min=1, help="Boxes of the detector that are kept, the surest.")
    ] = 32,
    least_area: Annotated[
        float, typer.Option(min=0, max=1, help="Share of the picture a detector's box must have.")
    ] = 0.0,
    keep_pairs: Annotated[
        int | None,
        typer.Option(min=1, help="Best pairs to keep. Default: one for every sentence."),
    ] = None,
    published: Annotated[
        bool,
        typer.Option(
            "--published", help="Cut captions at every full stop, as published code does."
        ),
    ] = False,
    shard: Annotated[
        str | None,
        typer.Option(help="Make only a share of the parts, e.g. 2/8; the last one joins them."),
    ] = None,
    batch_size: Annotated[int, typer.Option(min=1, help="Crops encoded at once.")] = 64,
    device: DeviceOption = None,
    precision: PrecisionOption = Precision.auto,
) -> None:
    """Find local pairs: which sentence of a caption tells of which part of its picture.

    Stop it whenever you like: the same command goes on where it was.
    """
    console = Console()
    with _user_errors():
        from .flism import RegionRules
        from .prepare_command import PrepareOptions, run_prepare

        run_prepare(
            PrepareOptions(
                data=data,
                out=out,
                root=root,
                model=model,
                pretrained=pretrained,
                detector=detector,
                rules=RegionRules(not detector_only, most_boxes, least_area),
                keep_pairs=keep_pairs,
                published=published,
                shard=shard,
                batch_size=batch_size,
                device=device,
                bfloat16=None if precision is Precision.auto else precision is Precision.bf16,
            ),
            console,
        )


@train_app.command("fast-goal")
def train_fast_goal(
    ctx: typer.Context,
    data: Annotated[
        Path | None,
        typer.Option(
            help="Annotations in the GLIT format, one JSON a line; or webdataset shards, "
            "'part-*.tar', with such an object and an image a sample. Needed.",
            show_default=False,
        ),
    ] = None,
    out: Annotated[
        Path | None,
        typer.Option(
            help="Folder for checkpoints, the log and config.yaml. Needed.", show_default=False
        ),
    ] = None,
    config: ConfigOption = None,
    root: RootOption = None,
    model: ModelOption = "ViT-B-16",
    pretrained: PretrainedOption = None,
    context_length: Annotated[
        int | None,
        typer.Option(min=3, help="Tokens of a caption. Default: 248, or those of the run."),
    ] = None,
    preset: Annotated[
        Preset,
        typer.Option(
            help="published: the paper's optimizer (lr 5e-6, weight decay 0.05 on everything, "
            "cosine without warm-up, no clipping, batch 256, 10 epochs). fast-goal-b16 and -l14: "
            "the same on OpenAI's ViT-B-16 and ViT-L-14. goal-b16: with GOAL's batches of 16."
        ),
    ] = Preset.default,
    steps: Annotated[int | None, typer.Option(min=1, help="Optimizer steps.")] = None,
    epochs: Annotated[
        int | None, typer.Option(min=1, help="Or passes over the data. Default: 10.")
    ] = None,
    batch_size: BatchSizeOption = None,
    micro_batch: Annotated[
        int | None,
        typer.Option(
            min=1,
            help="Encode this many records at a time, for batches that do not fit in memory. The "
            "loss still sees the whole batch. Default: all of it at once.",
        ),
    ] = None,
    lr: Annotated[float | None, typer.Option(min=0, help="Default: the preset's.")] = None,
    ema: EmaOption = None,
    unlocked_image_blocks: Annotated[
        int | None,
        typer.Option(
            min=0,
            help="Train only this many last blocks of the image tower, with its final norm and "
            "projection; 0 locks the tower. Default: all of it trains.",
        ),
    ] = None,
    unlocked_text_blocks: Annotated[
        int | None, typer.Option(min=0, help="The same for the text tower.")
    ] = None,
    lora: Annotated[
        int | None,
        typer.Option(
            min=1,
            help="Train LoRA adapters of this rank in both towers and nothing else: queries, keys "
            "and values of the attention and both layers of the MLP, not the attention's output "
            "layer. Checkpoints hold merged weights. Needs peft, of the extra lora.",
        ),
    ] = None,
    pairs: Annotated[
        Pairs,
        typer.Option(
            help="Local pair of a record: the best, or one of its --top-k best that is drawn each "
            "epoch, uniformly or weighted by similarity."
        ),
    ] = Pairs.best,
    top_k: Annotated[int, typer.Option(min=1, help="Pairs that --pairs draws from.")] = 3,
    long_captions: Annotated[
        LongCaptions,
        typer.Option(
            help="Captions past the context: cut them, or train on all of it in chunks of whole "
            "sentences."
        ),
    ] = LongCaptions.cut,
    save_every: SaveEveryOption = None,
    keep: KeepOption = 2,
    eval_data: EvalDataOption = None,
    eval_root: EvalRootOption = None,
    eval_every: EvalEveryOption = None,
    keep_best: KeepBestOption = False,
    num_workers: Annotated[int, typer.Option(min=0, help="Processes that read images.")] = 0,
    strict: Annotated[
        bool, typer.Option("--strict", help="Refuse the data if one record is unusable.")
    ] = False,
    seed: SeedOption = 0,
    resume: ResumeOption = False,
    device: DeviceOption = None,
    precision: Annotated[
        TrainPrecision, typer.Option(help="auto: bf16 where a GPU has it, else float32.")
    ] = TrainPrecision.auto,
    tensorboard: TensorBoardOption = False,
    wandb: WandbOption = False,
) -> None:
    """Fine-tune an open_clip model on your own images and long captions."""
    given = _typed(ctx, locals())
    console = Console()
    with _user_errors():
        from .train_command import METHOD, run_training

        result = run_training(*METHOD.resolve(given, config), console, resume=resume)
    if result.interrupted:
        _say_how_to_resume(console)


@train_app.command("caft")
def train_caft(
    ctx: typer.Context,
    data: Annotated[
        Path | None,
        typer.Option(
            help="One JSON object a line: image, and caption or DreamLIP's caption keys. Or "
            "webdataset shards with those keys: 'part-*.tar', in quotes. Needed.",
            show_default=False,
        ),
    ] = None,
    out: Annotated[
        Path | None,
        typer.Option(
            help="Folder for checkpoints, the log and config.yaml. Needed.", show_default=False
        ),
    ] = None,
    config: ConfigOption = None,
    root: RootOption = None,
    model: Annotated[
        str, typer.Option(help="caft-b, caft-s, caft-xs, or a JSON configuration.")
    ] = "caft-b",
    checkpoint: Annotated[
        Path | None,
        typer.Option(help="Weights, or a run's folder, to start from. Default: random weights."),
    ] = None,
    superpixels: Annotated[
        SuperpixelMaker, typer.Option(help="sfcn: CAFT's network, from --checkpoint.")
    ] = SuperpixelMaker.slic,
    negatives: Annotated[
        Negatives | None, typer.Option(help="Of the text-conditioned loss. Default: the preset's.")
    ] = None,
    preset: Annotated[
        CaftPreset,
        typer.Option(help="3m ... 30m: the published recipes, whose batch is 2,048 images."),
    ] = CaftPreset.default,
    published: Annotated[
        bool,
        typer.Option(
            "--published", help="Keep the published habits: sentence cuts, superpixel statistics."
        ),
    ] = False,
    steps: Annotated[int | None, typer.Option(min=1, help="Optimizer steps.")] = None,
    epochs: Annotated[
        int | None, typer.Option(min=1, help="Or passes over the data. Default: the preset's.")
    ] = None,
    batch_size: BatchSizeOption = None,
    lr: Annotated[float | None, typer.Option(min=0, help="Default: the preset's.")] = None,
    ema: EmaOption = None,
    save_every: SaveEveryOption = None,
    keep: KeepOption = 2,
    eval_data: EvalDataOption = None,
    eval_root: EvalRootOption = None,
    eval_every: EvalEveryOption = None,
    keep_best: KeepBestOption = False,
    num_workers: Annotated[int, typer.Option(min=0, help="Processes that read images.")] = 0,
    compile: Annotated[
        bool,
        typer.Option("--compile", help="torch.compile the towers: a slow start, fast steps."),
    ] = False,
    seed: SeedOption = 0,
    resume: ResumeOption = False,
    device: DeviceOption = None,
    precision: Annotated[
        TrainPrecision | None, typer.Option(help="Default: the preset's; auto is bf16 on a GPU.")
    ] = None,
    tensorboard: TensorBoardOption = False,
    wandb: WandbOption = False,
) -> None:
    """Train a CAFT on your own images with long and short captions."""
    given = _typed(ctx, locals())
    console = Console()
    with _user_errors():
        from .caft.train_command import METHOD, run_caft_training

        result = run_caft_training(*METHOD.resolve(given, config), console, resume=resume)
    if result.interrupted:
        _say_how_to_resume(console)


@app.command(no_args_is_help=True)
def train_open_clip(
    flags: Annotated[
        list[str], typer.Argument(metavar="-- FLAGS", help="Flags of open_clip_train, after a --.")
    ],
) -> None:
    """Train with open_clip's own trainer and its own flags, and our losses inside.

    On several GPUs: torchrun --nproc-per-node 8 -m fastgoal_models train-open-clip -- FLAGS
    """
    with _user_errors():
        from .open_clip_command import run_open_clip_train

        run_open_clip_train(flags)


@app.command(no_args_is_help=True)
def convert(
    source: Annotated[
        Path,
        typer.Argument(help="Weights file, a folder with one, or that of a run or a checkpoint."),
    ],
    target: Annotated[
        Path,
        typer.Argument(help="A .safetensors file; for hf also a folder, with config.json then."),
    ],
    to: Annotated[Layout, typer.Option(help="The layout to write.")],
    model: Annotated[
        str | None,
        typer.Option(
            help="open_clip model name, or a JSON config, of open_clip weights: config.json needs "
            "its heads and activation. Default: what `fastgoal train` noted with its checkpoint."
        ),
    ] = None,
    force: Annotated[bool, typer.Option("--force", help="Replace what is there.")] = False,
) -> None:
    """Convert CLIP weights between Hugging Face's layout and open_clip's, without loss.

    Reads safetensors, and PyTorch files without running code that they may hold; also GOAL's
    checkpoints, and texts of 248 positions.
    """
    with _user_errors():
        from .convert_command import ConvertOptions, run_convert

        run_convert(ConvertOptions(source, target, to.value, model, force), Console())


@app.command(no_args_is_help=True)
def interpolate(
    old: Annotated[
        Path, typer.Argument(help="Weights file, or the folder of a run or of a checkpoint.")
    ],
    new: Annotated[Path, typer.Argument(help="The same, after further training.")],
    out: Annotated[Path, typer.Argument(help="A .safetensors file.")],
    alpha: Annotated[
        float, typer.Option(min=0, max=1, help="Share of NEW: 0 is OLD, 1 is NEW.")
    ] = 0.5,
    force: Annotated[bool, typer.Option("--force", help="Replace what is there.")] = False,
) -> None:
    """Mix the weights of a model before and after fine-tuning (WiSE-FT), to keep some of both.

    Texts of OLD that have fewer positions are stretched as training does.
    """
    with _user_errors():
        from .interpolate import InterpolateOptions, run_interpolate

        run_interpolate(InterpolateOptions(old, new, out, alpha, force), Console())


@app.command()
def hierarchy(
    image: Annotated[Path, typer.Argument(help="A photograph.")],
    caption: Annotated[str, typer.Argument(help="Its caption, one to many sentences.")],
    checkpoint: Annotated[
        Path,
        typer.Option(
            help="CAFT weights, or the folder of a run of `fastgoal train caft` or of one of its "
            "checkpoints."
        ),
    ],
    out: Annotated[Path, typer.Option(help="The picture to write.")] = Path("hierarchy.png"),
    model: Annotated[
        str | None,
        typer.Option(help="caft-b, ... or a JSON file. Default: what the folder notes, or caft-b."),
    ] = None,
    superpixels: Annotated[
        SuperpixelMaker | None, typer.Option(help="Default: what the folder notes, or sfcn.")
    ] = None,
) -> None:
    """Draw what a CAFT found: segments level by level, and where each part of a caption looks."""
    with _user_errors(extra="demo"):
        from .caft.picture_command import draw_hierarchy

        kind = None if superpixels is None else superpixels.value
        name = draw_hierarchy(image, caption, checkpoint, out, model, kind)
    Console().print(escape(f"{name}: {out} written"), soft_wrap=True)


@app.command("eval")
def evaluate(
    model: Annotated[str, typer.Option(help=MODEL_HELP)],
    pretrained: PretrainedOption = None,
    data: Annotated[
        Path | None,
        typer.Option(help="One JSON object a line: image and caption; or a GLIT file."),
    ] = None,
    set_name: Annotated[
        str | None,
        typer.Option("--set", help="Or a set in its official layout: docci, dci, coco ..."),
    ] = None,
    root: Annotated[
        Path | None, typer.Option(help="Folder of the set, or of --data's images.")
    ] = None,
    classes: Annotated[
        Path | None, typer.Option(help="Also classify: a folder with a folder for each class.")
    ] = None,
    before: Annotated[
        str | None, typer.Option(help="Another model to stand beside it, e.g. the untrained one.")
    ] = None,
    before_pretrained: Annotated[
        str | None, typer.Option(help="Tag or weights file of --before.")
    ] = None,
    trained_on: Annotated[
        list[Path] | None,
        typer.Option(
            help="Annotations that were trained on: is a test image among them? Default: what a "
            "run in --model notes."
        ),
    ] = None,
    score: Annotated[
        str | None,
        typer.Option(help="CLIP: global, maxsim. CAFT: whole, blended, reranked."),
    ] = None,
    resize: Annotated[
        Resize,
        typer.Option(
            help="own: as the model's own evaluation and published figures, CLIP's is a centre "
            "crop; squash: as we train."
        ),
    ] = Resize.own,
    published: Annotated[
        bool, typer.Option("--published", help="CAFT: cut captions as the published code does.")
    ] = False,
    sheets: Annotated[
        Path | None,
        typer.Option(help="Folder for pictures of what captions found, right and wrong marked."),
    ] = None,
    context_length: ContextOption = None,
    batch_size: Annotated[int, typer.Option(min=1, help="Images encoded at once.")] = 64,
    device: DeviceOption = None,
    json_path: JsonOption = None,
) -> None:
    """Evaluate a model: retrieval both ways, with what papers report beside it.

    With local pairs in --data also mAP on pictures and regions, and whether sentences look into
    their boxes.
    """
    with _user_errors(extra="demo"):  # --sheets draws
        from .eval_command import EvalOptions, run_eval

        run_eval(
            EvalOptions(
                model=model,
                pretrained=pretrained,
                before=before,
                before_pretrained=before_pretrained,
                data=data,
                set_name=set_name,
                root=root,
                classes=classes,
                trained_on=tuple(trained_on or ()),
                score=score,
                resize=resize.value,
                published=published,
                context_length=context_length,
                batch_size=batch_size,
                device=device,
                sheets=sheets,
                json_path=json_path,
                command=_command(),
            ),
            console_beside(json_path),
        )


@app.command()
def embed(
    images: Annotated[Path, typer.Argument(help="A folder of images.")],
    out: Annotated[Path, typer.Option(help="The index to write, a .safetensors file.")],
    model: Annotated[str, typer.Option(help=MODEL_HELP)],
    pretrained: PretrainedOption = None,
    context_length: ContextOption = None,
    batch_size: Annotated[int, typer.Option(min=1, help="Images encoded at once.")] = 64,
    device: DeviceOption = None,
    force: Annotated[bool, typer.Option("--force", help="Replace what is there.")] = False,
) -> None:
    """Embed a folder of images once, so that `fastgoal search` need not."""
    with _user_errors():
        from .search_command import ModelOptions, run_embed

        options = ModelOptions(model, pretrained, context_length, batch_size, device)
        run_embed(images, out, options, force, Console())


@app.command()
def search(
    query: Annotated[str, typer.Argument(help="A text, as long as you like.")],
    images: Annotated[Path, typer.Argument(help="A folder of images, or an index of one.")],
    model: Annotated[str, typer.Option(help=MODEL_HELP)],
    pretrained: PretrainedOption = None,
    k: Annotated[int, typer.Option("-k", min=1, help="How many images.")] = 12,
    score: Annotated[
        str | None,
        typer.Option(
            help="global: whole features; maxsim: word by word; reranked: both, for the hundred "
            "best. Default: reranked. A CAFT has its blended score."
        ),
    ] = None,
    out: Annotated[
        Path | None, typer.Option(help="Also draw a contact sheet, e.g. sheet.png.")
    ] = None,
    json_path: JsonOption = None,
    context_length: ContextOption = None,
    batch_size: Annotated[int, typer.Option(min=1, help="Images encoded at once.")] = 64,
    device: DeviceOption = None,
) -> None:
    """Find images for a long text."""
    with _user_errors(extra="demo"):
        from .search_command import ModelOptions, run_search

        options = ModelOptions(model, pretrained, context_length, batch_size, device)
        console = console_beside(json_path)
        run_search(query, images, k, score, options, out, json_path, _command(), console)


@app.command()
def doctor(
    device: DeviceOption = None,
    json_path: JsonOption = None,
) -> None:
    """Look at this machine: versions, devices, settings, backends; test the losses on it.

    The self-test compares each loss and its gradients with the reference in float64, in about ten
    seconds. Exit code 0: all is well; 1: the self-test failed.
    """
    with _user_errors():
        from .doctor import run_doctor

        well = run_doctor(device, json_path, console_beside(json_path))
    if not well:
        raise typer.Exit(EXIT_NOT_WELL)


@app.command()
def bench(
    out: Annotated[Path, typer.Option(help="Folder for the figures and the picture.")] = Path(
        "fastgoal-bench"
    ),
    quick: Annotated[
        bool, typer.Option("--quick", help="Tiny sizes, in seconds: does everything run?")
    ] = False,
    budget: Annotated[
        float | None,
        typer.Option(min=0, help="Seconds after which nothing starts. Default: 90, on a GPU 450."),
    ] = None,
    device: DeviceOption = None,
) -> None:
    """Measure our losses against plain PyTorch and other libraries: time and extra memory.

    Needs a checkout of the repository. Takes about a minute on a CPU, where the sizes are small,
    and under eight on a GPU. Exit code 0: done; 1: a backend of ours was wrong.
    """
    console = Console()
    with _user_errors(extra="bench"):
        from .bench_command import BenchOptions, run_bench

        options = BenchOptions(
            out=out, quick=quick, device=device, budget=budget, command=_command()
        )
        outcome = run_bench(options, console)
    if not outcome.finished:
        raise typer.Exit(EXIT_INTERRUPTED)
    if not outcome.right:
        raise typer.Exit(EXIT_NOT_WELL)


def _command() -> str:
    return shlex.join(["fastgoal", *sys.argv[1:]])


def _refuse(message: str) -> NoReturn:
    Console(stderr=True).print(
        f"[bold red]error:[/] {escape(message)}", highlight=False, soft_wrap=True
    )
    raise typer.Exit(EXIT_USER_ERROR) from None


def _typed(ctx: typer.Context, values: Mapping[str, Any]) -> dict[str, Any]:
    """The options of a training run that were typed, by the names that configuration files use."""
    return {
        name: value.value if isinstance(value, Enum) else value
        for name, value in values.items()
        if name not in ("ctx", "config", "resume") and _was_typed(ctx, name)
    }


def _was_typed(ctx: typer.Context, name: str) -> bool:
    source = ctx.get_parameter_source(name)
    return source is not None and source.name == "COMMANDLINE"


def _say_how_to_resume(console: Console) -> None:
    again = _command() if "--resume" in sys.argv else f"{_command()} --resume"
    console.print(f"Stopped and saved. Go on with:\n  {escape(again)}", soft_wrap=True)
    raise typer.Exit(EXIT_INTERRUPTED)


@contextmanager
def _user_errors(extra: str = "models") -> Iterator[None]:
    """Errors a user can mend end in one line and exit code 2; a bug keeps its traceback.

    `extra`: the extra of this package that installs what the command imports.
    """
    try:
        yield
    except (UserError, OSError) as error:
        _refuse(str(error))
    except ModuleNotFoundError as error:
        if (error.name or "").startswith("fastgoal"):
            raise
        _refuse(f"{error}. Fix: {how_to_install(extra)}")
    except KeyboardInterrupt as stop:  # before the first step, or a second Ctrl-C
        Console(stderr=True).print(escape(str(stop) or "Interrupted."), soft_wrap=True)
        raise typer.Exit(EXIT_INTERRUPTED) from None
