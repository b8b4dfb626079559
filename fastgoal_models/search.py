"""Images of a folder for a long text, and the index that makes the second search quick."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import NamedTuple

import torch
from open_clip.transform import PreprocessCfg
from safetensors import SafetensorError, safe_open
from torch import Tensor

from fastgoal_kernels import hierarchical_scores, maxsim_scores

from .caft.model import Caft
from .caft.scoring import ALPHA, encode
from .checkpoints import save_tensors_atomically
from .encoding import (
    Pictures,
    Progress,
    batches_of_pictures,
    caft_rows,
    encode_captions,
    encode_pictures,
    pixels_for,
)
from .errors import ConfigError
from .evaluation import word_tokens
from .fast_goal import FastGoalModel
from .options import tensors_digest
from .zero_shot import picture_files

SCORES = ("global", "maxsim", "reranked")
SHORTLIST = 100
"""Images that "reranked" looks at word by word."""


class Hit(NamedTuple):
    """An image that was found."""

    image: Path
    score: float


@dataclass(frozen=True)
class Index:
    """The features of a folder's images under one model."""

    folder: Path
    names: list[str]
    """paths relative to the folder"""
    features: Tensor
    """(num_images, E), L2-normalised, float32"""
    weights: str
    """`identity_of` the model"""

    def path(self, place: int) -> Path:
        """Of one image. Raises ConfigError where a link leads out of the folder."""
        path = self.folder / self.names[place]
        try:
            inside = path.resolve().is_relative_to(self.folder.resolve())
        except (OSError, ValueError, RuntimeError):  # a zero byte, links in a circle
            inside = False
        if not inside:
            raise ConfigError(
                f"{path} of the index is a link out of its folder, or no file. Fix: make the index "
                "anew with `fastgoal embed`"
            )
        return path

    def save(self, path: Path) -> None:
        """Write it in one step, as safetensors; no image is stored."""
        notes = {
            "kind": "fastgoal index",
            "folder": str(self.folder),
            "names": json.dumps(self.names),
            "weights": self.weights,
        }
        save_tensors_atomically({"features": self.features}, path, notes)

    @classmethod
    def load(cls, path: Path) -> Index:
        """Read one back.

        Raises ConfigError for another kind of file, and for an index that is damaged or names files
        outside its folder, which `make_index` never does.
        """
        try:
            with safe_open(path, framework="pt") as file:
                notes = file.metadata() or {}
                if notes.get("kind") != "fastgoal index":
                    raise ConfigError(f"{path} is no index. Fix: make one with `fastgoal embed`")
                features = file.get_tensor("features")
        except (SafetensorError, OSError) as error:
            raise ConfigError(
                f"{path} is neither a folder of images nor an index that `fastgoal embed` wrote: "
                f"{error}"
            ) from error
        try:
            names = json.loads(notes["names"])
            index = cls(Path(notes["folder"]), names, features, notes["weights"])
        except (KeyError, ValueError, RecursionError) as error:
            raise _damaged(path, f"its notes can not be read ({error!r})") from error
        if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
            raise _damaged(path, "its names are no list of names")
        if features.ndim != 2 or len(features) != len(names) or not features.is_floating_point():
            raise _damaged(
                path, f"features {tuple(features.shape)} are not one row for {len(names)} names"
            )
        outside = next((name for name in names if _leaves(name)), None)
        if outside is not None:
            raise _damaged(path, f"it names {outside!r}, which is not in {index.folder}")
        return index


def _damaged(path: Path, what: str) -> ConfigError:
    return ConfigError(
        f"{path} is an index that can not be used: {what}. Fix: make it anew with `fastgoal embed`"
    )


def _leaves(name: str) -> bool:
    """Whether a path that should be relative to a folder leads out of it."""
    path = PurePosixPath(name)
    return path.is_absolute() or ".." in path.parts


def make_index(
    model: FastGoalModel,
    folder: Path,
    *,
    batch_size: int = 64,
    progress: Progress | None = None,
) -> tuple[Index, dict[str, str]]:
    """The index of all pictures below a folder, and why others could not be read, by name.

    Raises ConfigError for a folder without a picture that can be read.
    """
    paths = files_below(folder)
    features, found = encode_pictures(model, paths, batch_size=batch_size, progress=progress)
    names = [path.relative_to(folder).as_posix() for path in paths]
    kept = [names[place] for place in found.kept]
    lost = {names[place]: why for place, why in found.lost.items()}
    return Index(folder.resolve(), kept, features, identity_of(model)), lost


def identity_of(model: FastGoalModel) -> str:
    """What features depend on: the weights, and what they do not tell: heads, activation, mean …"""
    shape = repr(model).encode()
    return f"{tensors_digest(model.state_dict())}-{hashlib.sha256(shape).hexdigest()[:8]}"


def files_below(folder: Path) -> list[Path]:
    """The pictures below a folder. Raises ConfigError where there are none, or no folder."""
    if not folder.is_dir():
        what = "is a file, and no folder of images" if folder.exists() else "does not exist"
        raise ConfigError(f"{folder} {what}")
    paths = picture_files(folder)
    if not paths:
        raise ConfigError(f"{folder} holds no pictures")
    return paths


def search_index(
    model: FastGoalModel,
    index: Index,
    query: str,
    k: int,
    *,
    score: str = "global",
    batch_size: int = 64,
) -> list[Hit]:
    """The `k` best images for a text, best first; of equal scores the first by name.

    Args:
        model: the one that made the index.
        index: of `make_index`.
        query: any text; past the context it is cut.
        k: how many; fewer where there are fewer.
        score: "global": the cosine of whole features; "maxsim": each word's best patch, for every
            image; "reranked": the mean of both, for the hundred best by the first.
        batch_size: images encoded, and scored word by word, at once.

    Raises:
        ConfigError: an unknown score, another model's index, an empty query, an image that has
            gone since.
    """
    if score not in SCORES:
        raise ConfigError(f"score must be one of {SCORES}; got {score!r}")
    if not query.strip():
        raise ConfigError("the query has no words")
    if identity_of(model) != index.weights:
        raise ConfigError(
            "the index was made by a model with other weights or settings. Fix: make it anew with "
            "`fastgoal embed`"
        )
    text, _ = encode_captions(model, [query])
    scores = (index.features @ text.T)[:, 0]
    if score == "global":
        return _best(index, scores, torch.arange(len(scores)), k)
    among = torch.arange(len(scores))
    if score == "reranked":
        among = scores.argsort(descending=True, stable=True)[: max(SHORTLIST, k)]
    words, offsets, _ = word_tokens(model, [query])
    paths = [index.path(place) for place in among.tolist()]
    blocks = []
    for start in range(0, len(paths), batch_size):  # patches are large: never those of all images
        some = paths[start : start + batch_size]
        patches, found = encode_pictures(model, some, tokens=True, batch_size=batch_size)
        if found.lost:
            raise ConfigError(f"an image of the index is gone: {next(iter(found.lost.values()))}")
        scored = maxsim_scores(patches, words, text_offsets=offsets)
        assert isinstance(scored, Tensor)
        blocks.append(scored[:, 0])
    fine = torch.cat(blocks)
    return _best(index, fine if score == "maxsim" else (fine + scores[among]) / 2, among, k)


def _best(index: Index, scores: Tensor, among: Tensor, k: int) -> list[Hit]:
    order = scores.argsort(descending=True, stable=True)[:k].tolist()
    return [Hit(index.path(int(among[at])), float(scores[at])) for at in order]


@torch.no_grad()
def search_with_caft(
    model: Caft,
    paths: Sequence[Path],
    query: str,
    k: int,
    *,
    alpha: float = ALPHA,
    published: bool | None = None,
    batch_size: int = 64,
    progress: Progress | None = None,
) -> tuple[list[Hit], dict[str, str]]:
    """`search_index` for a CAFT: (1 - alpha) whole + alpha parts; and pictures not to be read.

    `published`: cut the query as the published code does; None: as the model was trained.
    """
    if not query.strip():
        raise ConfigError("the query has no words")
    found = Pictures()

    transform = pixels_for(PreprocessCfg(model.config.image_size))
    pictures = batches_of_pictures(paths, transform, batch_size, found, progress)
    if published is None:
        published = model.visual.published
    rows, _ = caft_rows(model, [query], published)
    features = encode(model, pictures, [rows], keep_on=model.logit_scale.device)
    scores = hierarchical_scores(
        model.visual_proj, features.fine_tokens, features.part_features,
        features.whole_image_features, features.whole_text_features,
        model.logit_scale.exp(), model.logit_bias,
        model.logit_scale_coarse.exp(), model.logit_bias_coarse, alpha=alpha,
    )[:, 0].cpu()  # fmt: skip
    order = scores.argsort(descending=True, stable=True)[:k].tolist()
    hits = [Hit(paths[found.kept[at]], float(scores[at])) for at in order]
    return hits, {str(paths[place]): why for place, why in found.lost.items()}
