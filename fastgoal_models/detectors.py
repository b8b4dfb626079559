"""Boxes beside FLISM's five: object detectors behind one small protocol.

    transformers:hustvl/yolos-base    a name on Hugging Face's hub, or a folder with the model
    torchvision:retinanet_resnet50_fpn=weights.pth    torchvision's architecture, a weights file
    boxes.jsonl    boxes that were found before

The last has one JSON object a line, {"image": "a.jpg", "boxes": [{"box": [x1, y1, x2, y2],
"label": "cat", "score": 0.9}]}, in pixels of the upright picture; label and score may be missing,
and a picture may have several lines.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch
from PIL import Image
from torch import nn

from .errors import ConfigError, how_to_install
from .glit import json_lines
from .hf_checkpoints import read_weights
from .options import tensors_digest
from .pictures import Box

LEAST_SCORE = 0.5


class Detection(NamedTuple):
    """Something that was found in a picture."""

    box: Box
    label: str
    score: float


class Detector(Protocol):
    """Finds things in pictures."""

    def identity(self) -> str:
        """What changes when its boxes would: a name with a digest of weights or boxes."""
        ...

    def detect(self, images: Sequence[Image.Image], names: Sequence[str]) -> list[list[Detection]]:
        """What is in each picture, best first. `names` are the pictures' paths in their data."""
        ...


def create_detector(
    spec: str,
    device: torch.device,
    least_score: float | None = None,
    root: Path | None = None,
) -> Detector:
    """The detector a user asked for; see the module for how they are called.

    Args:
        spec: its name.
        device: where a model runs.
        least_score: of the boxes that are kept; None: LEAST_SCORE, and of a file all boxes, which
            whoever wrote it has chosen.
        root: folder that the images of a file's lines are relative to.

    Raises ConfigError for one that is not known, not installed or not here.
    """
    if spec.endswith(".jsonl"):
        return BoxFile(Path(spec), -math.inf if least_score is None else least_score, root)
    least_score = LEAST_SCORE if least_score is None else least_score
    kind, colon, name = spec.partition(":")
    if colon and kind == "transformers":
        return TransformersDetector(name, device, least_score)
    if colon and kind == "torchvision":
        return TorchvisionDetector(name, device, least_score)
    raise ConfigError(
        f"detector {spec!r} is not known. Fix: transformers:NAME_OR_FOLDER, "
        "torchvision:ARCHITECTURE=WEIGHTS, or a .jsonl file of boxes"
    )


class TransformersDetector:
    """YOLOS, DETR and other detectors of `transformers`; pictures of one shape share a batch."""

    def __init__(self, name: str, device: torch.device, least_score: float = LEAST_SCORE) -> None:
        try:
            from transformers import AutoImageProcessor, AutoModelForObjectDetection
        except ImportError as error:
            raise ConfigError(
                f"detector {name!r} needs transformers, which is not installed. "
                f"Fix: {how_to_install('hf')}"
            ) from error

        try:
            # Never code that comes with the weights.
            self.processor: Any = AutoImageProcessor.from_pretrained(name, trust_remote_code=False)
            model: Any = AutoModelForObjectDetection.from_pretrained(name, trust_remote_code=False)
        except (OSError, ValueError, RuntimeError, KeyError) as error:
            raise ConfigError(f"detector {name!r} can not be loaded: {error}") from error
        self.name, self.device, self.least_score = name, device, least_score
        # Weights in half precision load as such, and the pictures are float32.
        self.model = model.to(device).float().eval()

    def identity(self) -> str:
        weights = tensors_digest(self.model.state_dict())
        return f"transformers:{self.name}, {weights}, {self.least_score}"

    @torch.no_grad()
    def detect(self, images: Sequence[Image.Image], names: Sequence[str]) -> list[list[Detection]]:
        # One by one, because the processor would pad them to the largest of a call, and YOLOS knows
        # no padding: its boxes would be shares of the padded picture.
        inputs = [self.processor(images=[image], return_tensors="pt") for image in images]
        alike: dict[tuple[int, ...], list[int]] = {}
        for place, one in enumerate(inputs):
            alike.setdefault(tuple(one["pixel_values"].shape), []).append(place)
        labels = self.model.config.id2label
        results: list[list[Detection]] = [[] for _ in images]
        for places in alike.values():
            batch = {
                key: torch.cat([inputs[place][key] for place in places]).to(self.device)
                for key in inputs[places[0]]
            }
            found = self.processor.post_process_object_detection(
                self.model(**batch),
                threshold=self.least_score,
                target_sizes=[(images[place].height, images[place].width) for place in places],
            )
            for place, one in zip(places, found, strict=True):
                results[place] = _best_first(
                    one["boxes"],
                    [labels.get(n, str(n)) for n in one["labels"].tolist()],
                    one["scores"],
                )
        return results


class TorchvisionDetector:
    """A detector of torchvision with weights from a file; nothing is downloaded."""

    def __init__(self, spec: str, device: torch.device, least_score: float = LEAST_SCORE) -> None:
        from torchvision.models import detection, get_model, list_models
        from torchvision.models._meta import _COCO_CATEGORIES

        name, _, weights = spec.partition("=")
        known = list_models(module=detection)
        if name not in known or not weights:
            raise ConfigError(
                f"detector torchvision:{spec} is not known. Fix: torchvision:ARCHITECTURE=WEIGHTS, "
                f"one of {', '.join(known)}, and a weights file"
            )
        model = get_model(name, weights=None, weights_backbone=None)
        try:
            model.load_state_dict(read_weights(Path(weights)))
        except FileNotFoundError as error:
            raise ConfigError(f"detector torchvision:{spec}: there is no {weights}") from error
        except RuntimeError as error:
            raise ConfigError(f"{weights} holds no weights of {name}: {error}") from error
        self.name, self.device, self.least_score = name, device, least_score
        self.labels = _COCO_CATEGORIES
        self.model: nn.Module = model.to(device).eval()

    def identity(self) -> str:
        weights = tensors_digest(self.model.state_dict())
        return f"torchvision:{self.name}, {weights}, {self.least_score}"

    @torch.no_grad()
    def detect(self, images: Sequence[Image.Image], names: Sequence[str]) -> list[list[Detection]]:
        tensors = [
            torch.from_numpy(np.array(image)).to(self.device).permute(2, 0, 1) / 255
            for image in images
        ]
        results = []
        for one in self.model(tensors):
            good = one["scores"] >= self.least_score
            results.append(
                _best_first(one["boxes"][good],
                            [self._label(n) for n in one["labels"][good].tolist()],
                            one["scores"][good])
            )  # fmt: skip
        return results

    def _label(self, number: int) -> str:
        return self.labels[number] if number < len(self.labels) else str(number)


class BoxFile:
    """Boxes that were found before, by the picture's path in its data.

    However a path is written, `./a.jpg`, absolute or through links, it is the file that counts.

    Args:
        path: the file of boxes.
        least_score: of the boxes that are kept; by default all are.
        root: folder that the paths in it, and the pictures' names, are relative to (default: that
            of `path`).

    Attributes: `pictures`, how many were asked for; `missing`, how many of them no line names.

    Raises ConfigError for no such file, or a line that is not as it should be.
    """

    def __init__(
        self, path: Path, least_score: float = -math.inf, root: Path | None = None
    ) -> None:
        self.path, self.root = path, path.parent if root is None else root
        self.pictures = self.missing = 0
        self._counting = threading.Lock()
        self._first_missing = ""
        self.found: dict[str, list[Detection]] = {}
        digest = hashlib.sha256()
        if not path.is_file():
            raise ConfigError(f"detector {path}: there is no file")
        with path.open("rb") as file:
            for number, line in json_lines(file):
                digest.update(line)
                try:
                    row = json.loads(line)
                    boxes = [_detection(box) for box in row["boxes"]]
                    kept = self.found.setdefault(self._file(row["image"]), [])
                    kept += [box for box in boxes if box.score >= least_score]
                except (ValueError, TypeError, KeyError, RecursionError) as error:
                    raise ConfigError(
                        f"{path}, line {number} is not an object with image and boxes ({error!r})"
                    ) from error
        self.digest = digest.hexdigest()[:16]
        self.least_score = least_score

    def identity(self) -> str:
        return f"boxes {self.digest}, {self.least_score}"

    def detect(self, images: Sequence[Image.Image], names: Sequence[str]) -> list[list[Detection]]:
        files = [self._file(name) for name in names]
        missing = [file for file in files if file not in self.found]
        with self._counting:
            if missing and not self.missing:
                self._first_missing = missing[0]
            self.pictures += len(files)
            self.missing += len(missing)
        return [sorted(self.found.get(file, ()), key=lambda d: -d.score) for file in files]

    def unmatched(self) -> str | None:
        """How many of the pictures that were asked for no line names; None where all are named."""
        if not self.missing:
            return None
        return (
            f"{self.missing} of {self.pictures} pictures have no boxes in {self.path}: it names "
            f"for example {next(iter(self.found), 'nothing')}, and not {self._first_missing}"
        )

    def _file(self, image: str) -> str:
        return os.path.realpath(self.root / image)


def _detection(row: Any) -> Detection:
    x1, y1, x2, y2 = (float(x) for x in row["box"])
    return Detection((x1, y1, x2, y2), str(row.get("label", "box")), float(row.get("score", 1.0)))


def _best_first(
    boxes: torch.Tensor, labels: Sequence[str], scores: torch.Tensor
) -> list[Detection]:
    found = [
        Detection((x1, y1, x2, y2), label, score)
        for (x1, y1, x2, y2), label, score in zip(
            boxes.tolist(), labels, scores.tolist(), strict=True
        )
    ]
    return sorted(found, key=lambda detection: -detection.score)
