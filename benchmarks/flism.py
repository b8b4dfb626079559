"""`fastgoal prepare` against a script that handles one image at a time, in one table.

    python -m benchmarks.flism [--images 48] [--detector yolos] [--rounds 3] [--threads 2]
                               [--json PATH]

Both make FLISM's local pairs on a CPU, float32, with the same small CLIP (the demo's sizes) and,
with --detector yolos, the same small YOLOS, whose ten boxes an image come on top of the five fixed
regions. Weights are random, and pictures are drawn scenes with a photograph's grain, JPEG files of
about 1000 × 750 with captions of five to nine sentences: which pairs come out means nothing, how
long it takes does.

The script is a restatement of how research code goes about it: it runs the detector on an image
alone; opens the image anew for every region, crops it, puts the crop through open_clip's transform
and model alone; and tokenises and encodes every sentence alone, padded to the whole context.
It holds its pairs in memory, where `prepare` writes them to the disk with all that makes a run
resumable. A second script is lent our own reading and resizing, which are faster than Pillow's, so
that what batches alone bring can be seen.

That all find the same pairs is asserted before anything is timed: ours and the script with our
pixels to rounding; the script itself to what Pillow's resizing, which rounds to bytes elsewhere,
makes of the scores. A second row of ours has its towers in bfloat16 (`--precision bf16`), whose
scores are coarser, too: of two regions that are as good to that the other one may be taken. Each
round runs all ways once, so that a busy machine slows them alike; processor time stands beside the
clock's, because it suffers least from it. How the time splits up is measured in a run of its own,
in one thread: in several, stages of different pictures run at once.

On a machine with other work give --threads 1: threads that wait for each other's turn slow the
script's many small products far more than our few large ones, which would flatter us.

The JSON it writes:

    schema 1, kind "flism", command, date, source {commit, modified}, versions, device {...}
    rows                       one per contender:
        contender detector images regions sentences status
        parity                 {scores: largest difference, other_regions: sentences for which
                               another region is as good, to within the limit, and was taken},
                               against the script with our pixels; zeros for that one itself
        images_per_second      by the median
        median_ms low_ms high_ms best_ms repeats  an image, with the 20th and 80th percentile
        cpu_ms                 an image: processor time of all threads, the median
        split_ms               an image, in one thread: {detector, image_tower, text_tower, rest};
                               the rest is reading, cropping, tokenising and writing. Missing
                               where it was measured in several threads, which says nothing
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import asdict, replace
from functools import cache, partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from open_clip import CLIP, SimpleTokenizer
from open_clip.transform import PreprocessCfg, image_transform_v2
from PIL import Image
from torch import Tensor, nn

from fastgoal_models.captions import split_sentences
from fastgoal_models.detectors import Detection, Detector, TransformersDetector
from fastgoal_models.fast_goal import DEMO_CONFIG, FastGoalModel
from fastgoal_models.flism import Matcher, Region, RegionRules
from fastgoal_models.pictures import Box, crop_region, image_tensor, load_image
from fastgoal_models.prepare import prepare
from fastgoal_models.synthetic import draw, scene

from . import cpu_rows, flism_sections
from .cpu_rows import CPU, Row
from .flism_sections import BFLOAT16, OUR_PIXELS, OURS, SCRIPT
from .measure import Timing, measure_in_turns

SAME_SCORE = 1e-4
# Of unit vectors whose elements are off by 2^-9 each and more after some layers: 5e-4 is seen.
SAME_IN_BFLOAT16 = 1e-2
# Pixels of 256 steps that are off by one, here and there: a tenth of that is seen.
SAME_BY_PILLOW = 1e-2
CONTEXT = 77
SIZES = ((1000, 750), (1000, 750), (1000, 667), (750, 1000))
GRAIN = 12.0  # standard deviation of the noise, of 255

_YOLOS: dict[str, Any] = {
    "hidden_size": 192, "num_hidden_layers": 4, "num_attention_heads": 3,
    "intermediate_size": 768, "image_size": [256, 384], "patch_size": 16,
    "num_detection_tokens": 10, "num_labels": 8, "use_mid_position_embeddings": False,
}  # fmt: skip
_YOLOS_INPUT = {"shortest_edge": 256, "longest_edge": 384}


# ---------------------------------------------------------------------------------------------
# What both work on
# ---------------------------------------------------------------------------------------------


def write_data(folder: Path, images: int, sizes: Sequence[tuple[int, int]] = SIZES) -> Path:
    """JPEG files and a JSONL file with their captions, whose path is given back."""
    rows = []
    for number in range(images):
        told, (width, height) = scene(number), sizes[number % len(sizes)]
        drawn = draw(told, max(width, height)).resize((width, height))
        grain = np.random.default_rng(number).normal(0, GRAIN, (height, width, 1))
        pixels = (np.asarray(drawn) + grain).clip(0, 255).astype(np.uint8)
        name = f"{number:05d}.jpg"
        Image.fromarray(pixels).save(folder / name, quality=90)
        rows.append(json.dumps({"id": name, "image": name, "caption": told.caption}))
    path = folder / "data.jsonl"
    path.write_text("\n".join(rows) + "\n")
    return path


class Clock:
    """Seconds spent in each stage, while it is switched on."""

    def __init__(self) -> None:
        self.on, self.seconds = False, dict.fromkeys(flism_sections.TIMED, 0.0)

    def __call__(self, stage: str) -> AbstractContextManager[None]:
        return self._count(stage) if self.on else nullcontext()

    @contextmanager
    def _count(self, stage: str):
        began = time.perf_counter()
        yield
        self.seconds[stage] += time.perf_counter() - began


class TimedModel(FastGoalModel):
    """A FastGoalModel whose towers can be timed."""

    def __init__(self, clip: CLIP, clock: Clock) -> None:
        super().__init__(clip, CONTEXT)
        self.clock: Clock = clock

    def encode_image(self, images: Tensor, normalize: bool = True) -> Tensor:
        with self.clock("image_tower"):
            return super().encode_image(images, normalize)

    def encode_text(self, texts: Tensor, normalize: bool = True) -> Tensor:
        with self.clock("text_tower"):
            return super().encode_text(texts, normalize)


class TimedDetector:
    """A detector that can be timed."""

    def __init__(self, detector: Detector, clock: Clock) -> None:
        self.detector, self.clock = detector, clock

    def identity(self) -> str:
        return self.detector.identity()

    def detect(self, images: Sequence[Image.Image], names: Sequence[str]) -> list[list[Detection]]:
        with self.clock("detector"):
            return self.detector.detect(images, names)


def make_model(clock: Clock) -> TimedModel:
    """The demo's CLIP with random weights, the same each time."""
    torch.manual_seed(0)
    model = TimedModel(FastGoalModel.create(DEMO_CONFIG, context_length=CONTEXT).clip, clock)
    model.eval()
    return model


def make_yolos(folder: Path) -> TransformersDetector:
    """A small YOLOS with random weights that keeps all of its boxes, which lie apart."""
    from transformers import YolosConfig, YolosForObjectDetection, YolosImageProcessor

    torch.manual_seed(0)
    model = YolosForObjectDetection(YolosConfig(**_YOLOS))
    with torch.no_grad():
        model.vit.embeddings.detection_tokens.normal_()
        for head in (model.bbox_predictor, model.class_labels_classifier):
            last: Any = head.layers[-1]
            nn.init.normal_(last.weight)
    model.save_pretrained(folder)
    YolosImageProcessor(size=_YOLOS_INPUT).save_pretrained(folder)
    return TransformersDetector(str(folder), CPU, least_score=0.0)


class Setup(NamedTuple):
    """What both use."""

    data: Path
    model: TimedModel
    tokenizer: SimpleTokenizer
    detector: TimedDetector | None
    clock: Clock

    def open_clip_image(self, images: Tensor) -> Tensor:
        with self.clock("image_tower"):
            return self.model.clip.encode_image(images)

    def open_clip_text(self, texts: Tensor) -> Tensor:
        with self.clock("text_tower"):
            return self.model.clip.encode_text(texts)


def make_setup(
    folder: Path, images: int, detector: bool, sizes: Sequence[tuple[int, int]] = SIZES
) -> Setup:
    """Pictures and models, the detector's weights among them, below `folder`."""
    clock = Clock()
    (folder / "pictures").mkdir()
    return Setup(
        write_data(folder / "pictures", images, sizes),
        make_model(clock),
        SimpleTokenizer(context_length=CONTEXT),
        TimedDetector(make_yolos(folder / "yolos"), clock) if detector else None,
        clock,
    )


# ---------------------------------------------------------------------------------------------
# The two ways
# ---------------------------------------------------------------------------------------------


class Answer(NamedTuple):
    """What the script finds for a picture."""

    regions: list[Region]
    scores: Tensor
    """(sentences, regions)"""


Pixels = Callable[[Path, Box, int], Tensor]
"""of a file, the part in a box, squashed to a side in pixels: (3, S, S)"""


def open_clip_pixels(path: Path, box: Box, image_size: int) -> Tensor:
    """As a script has them."""
    transform: Any = image_transform_v2(_squash(image_size), is_train=False)
    return transform(crop_region(Image.open(path).convert("RGB"), box))


def our_pixels(path: Path, box: Box, image_size: int) -> Tensor:
    """As `prepare` has them, but that it reads a file once."""
    return image_tensor(crop_region(load_image(path), box), image_size)


@cache
def _squash(image_size: int) -> PreprocessCfg:
    return PreprocessCfg(size=image_size, resize_mode="squash")


@torch.no_grad()
def one_at_a_time(setup: Setup, pixels: Pixels = our_pixels) -> list[Answer]:
    """The script."""
    answers = []
    for line in setup.data.read_text().splitlines():
        row = json.loads(line)
        path = setup.data.parent / row["image"]
        image = Image.open(path).convert("RGB")
        found = setup.detector.detect([image], [row["image"]])[0] if setup.detector else []
        regions = RegionRules().regions(image.width, image.height, found)
        of_regions = [
            setup.open_clip_image(pixels(path, region.box, setup.model.image_size)[None])
            for region in regions
        ]
        of_sentences = [
            setup.open_clip_text(setup.tokenizer([sentence]))
            for sentence in split_sentences(row["caption"])
        ]
        v = F.normalize(torch.cat(of_regions), dim=-1)
        t = F.normalize(torch.cat(of_sentences), dim=-1)
        answers.append(Answer(regions, t @ v.T))
    return answers


def by_prepare(setup: Setup, bfloat16: bool = False) -> list[dict[str, Any]]:
    """Ours: the rows of the file that it writes."""
    matcher = Matcher(
        setup.model, tokenizer=setup.tokenizer, detector=setup.detector, rules=RegionRules(),
        autocast=bfloat16,
    )  # fmt: skip
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "pairs.jsonl"
        prepare(setup.data, out, matcher, root=setup.data.parent)
        return [json.loads(line) for line in out.read_text("utf-8").splitlines()]


def compare(
    rows: Sequence[dict[str, Any]], answers: Sequence[Answer], limit: float = SAME_SCORE
) -> dict[str, float]:
    """How far the pairs are apart. Raises AssertionError where they are not the same."""
    assert len(rows) == len(answers)
    worst, others = 0.0, 0
    for row, answer in zip(rows, answers, strict=True):
        names = [region.name for region in answer.regions]
        assert [region["name"] for region in row["regions"]] == names
        boxes = torch.tensor([region["box"] for region in row["regions"]])
        expected = torch.tensor([region.box for region in answer.regions])
        torch.testing.assert_close(boxes, expected, atol=0.05, rtol=0)
        best = answer.scores.max(dim=1)
        assert sorted(pair["sentence"] for pair in row["pairs"]) == list(range(len(best.values)))
        for pair in row["pairs"]:
            sentence = pair["sentence"]
            at = [region["box"] for region in row["regions"]].index(pair["box"])
            theirs = float(answer.scores[sentence, at])
            assert theirs >= float(best.values[sentence]) - limit, (row["id"], pair)
            worst = max(worst, abs(pair["score"] - theirs))
            others += at != int(best.indices[sentence])
    assert worst <= limit, f"scores differ by {worst:.2g}"
    return {"scores": worst, "other_regions": others}


def compare_scripts(answers: Sequence[Answer], expected: Sequence[Answer]) -> dict[str, float]:
    """How far two scripts are apart. Raises AssertionError beyond what Pillow's bytes explain."""
    worst, others = 0.0, 0
    for one, other in zip(answers, expected, strict=True):
        assert one.regions == other.regions
        worst = max(worst, float((one.scores - other.scores).abs().max()))
        others += int((one.scores.argmax(dim=1) != other.scores.argmax(dim=1)).sum())
    assert worst <= SAME_BY_PILLOW, f"scores differ by {worst:.2g}"
    return {"scores": worst, "other_regions": others}


# ---------------------------------------------------------------------------------------------
# Measuring and showing
# ---------------------------------------------------------------------------------------------


def _split(way: Callable[[Setup], Any], setup: Setup, images: int) -> dict[str, float]:
    """Milliseconds an image of each stage, and of the rest, in one thread."""
    threads = torch.get_num_threads()
    setup.clock.on, setup.clock.seconds = True, dict.fromkeys(flism_sections.TIMED, 0.0)
    torch.set_num_threads(1)
    began = time.perf_counter()
    way(setup)
    whole = time.perf_counter() - began
    torch.set_num_threads(threads)
    setup.clock.on = False
    found = dict(setup.clock.seconds)
    found["rest"] = whole - sum(found.values())
    return {stage: 1e3 * seconds / images for stage, seconds in found.items()}


def measure(setup: Setup, rounds: int) -> list[Row]:
    """A row for each way. Raises AssertionError where they do not find the same pairs."""
    ways: dict[str, Callable[[Setup], Any]] = {
        OURS: by_prepare,
        BFLOAT16: partial(by_prepare, bfloat16=True),
        OUR_PIXELS: one_at_a_time,
        SCRIPT: partial(one_at_a_time, pixels=open_clip_pixels),
    }
    answers = one_at_a_time(setup)
    parity = {
        OURS: compare(by_prepare(setup), answers),
        BFLOAT16: compare(by_prepare(setup, bfloat16=True), answers, SAME_IN_BFLOAT16),
        OUR_PIXELS: {"scores": 0.0, "other_regions": 0},
        SCRIPT: compare_scripts(one_at_a_time(setup, open_clip_pixels), answers),
    }
    processor: dict[str, list[float]] = {name: [] for name in ways}

    def call(name: str) -> None:
        began = time.process_time()
        ways[name](setup)
        processor[name].append(time.process_time() - began)

    times = measure_in_turns({name: partial(call, name) for name in ways}, rounds)
    images = len(answers)
    known = {
        "detector": "yolos" if setup.detector else None,
        "images": images,
        "regions": sum(len(answer.regions) for answer in answers),
        "sentences": sum(len(answer.scores) for answer in answers),
        "status": "ok",
    }
    return [
        {
            "contender": name,
            **known,
            "parity": parity[name],
            "images_per_second": 1e3 * images / times[name].median_ms,
            **asdict(_an_image(times[name], images)),
            "cpu_ms": 1e3 * statistics.median(processor[name][-rounds:]) / images,
            "split_ms": _split(way, setup, images),
        }
        for name, way in ways.items()
    ]


def _an_image(timing: Timing, images: int) -> Timing:
    return replace(
        timing,
        median_ms=timing.median_ms / images,
        low_ms=timing.low_ms / images,
        high_ms=timing.high_ms / images,
        best_ms=timing.best_ms / images,
    )


def main(argv: list[str] | None = None) -> int:
    """The command; always 0 unless the pairs differ: times are read, not asserted."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.flism", description=__doc__.splitlines()[0]
    )
    parser.add_argument("--images", type=int, default=48)
    parser.add_argument("--detector", choices=["yolos"], help="boxes beside the fixed regions")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--json", type=Path, help="also write the figures here")
    arguments = parser.parse_args(argv)
    torch.set_num_threads(arguments.threads)
    with tempfile.TemporaryDirectory() as folder:
        setup = make_setup(Path(folder), arguments.images, arguments.detector is not None)
        rows = measure(setup, arguments.rounds)
    sections = flism_sections
    cpu_rows.show(
        sections.title(rows), sections.HEAD, [sections.table(rows)], sections.footer(rows),
        cpu_rows.console(),
    )  # fmt: skip
    if arguments.json:
        detector = f" --detector {arguments.detector}" if arguments.detector else ""
        command = (
            f"python -m benchmarks.flism --images {arguments.images}{detector} "
            f"--rounds {arguments.rounds} --threads {arguments.threads}"
        )
        cpu_rows.write(arguments.json, "flism", 1, command, rows, **_versions(arguments.detector))
    return 0


def _versions(detector: str | None) -> dict[str, str]:
    import PIL

    found = {"pillow": PIL.__version__}
    if detector:
        import transformers

        found["transformers"] = transformers.__version__
    return found


if __name__ == "__main__":
    sys.exit(main())
