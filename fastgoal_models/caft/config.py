"""What a CAFT is built from: a configuration by name, from a JSON file, or as a dictionary.

The layout is open_clip's: `embed_dim`, `vision_cfg` and `text_cfg`, here of the two hierarchies.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from itertools import pairwise
from pathlib import Path
from typing import Any

from ..errors import ConfigError

_CONFIGS = Path(__file__).parent.parent / "configs"


@dataclass(frozen=True)
class CaftVisionConfig:
    """The fine-to-coarse image encoder. Cells are 16 pixels wide, the encoder's grid 8."""

    image_size: int  # of the square input that the positions are made for; divisible by 16
    width: int
    heads: int
    layers: tuple[int, ...]  # blocks of each stage
    tokens: tuple[int, ...]  # after each pool: one pool fewer than stages


@dataclass(frozen=True)
class CaftTextConfig:
    """The part encoder, a causal transformer, and the encoder of the whole caption above it."""

    context_length: int
    vocab_size: int
    width: int
    heads: int
    layers: int
    parts: int  # the first captions of an image, which make up the whole
    whole_layers: int
    adapter_width: int


@dataclass(frozen=True)
class CaftConfig:
    """Everything about a CAFT but its weights. Raises ConfigError for what can not be built."""

    embed_dim: int
    pool_heads: int  # of the text-conditioned pool
    vision: CaftVisionConfig
    text: CaftTextConfig

    def __post_init__(self) -> None:
        vision, text = self.vision, self.text
        for name, width, heads in (
            ("embed_dim", self.embed_dim, self.pool_heads),
            ("vision_cfg.width", vision.width, vision.heads),
            ("text_cfg.width", text.width, text.heads),
        ):
            if heads < 1 or width < 1 or width % heads:
                raise ConfigError(f"{name} {width} must be divisible by its {heads} heads")
        if vision.width % 8:
            raise ConfigError(f"vision_cfg.width must be divisible by 8; got {vision.width}")
        if vision.image_size < 16 or vision.image_size % 16:
            raise ConfigError(
                f"vision_cfg.image_size must be divisible by 16; got {vision.image_size}"
            )
        if len(vision.layers) != len(vision.tokens) + 1 or not vision.tokens:
            raise ConfigError(
                "vision_cfg.tokens must name a number for each pool between two stages: one fewer "
                f"than layers; got layers {vision.layers}, tokens {vision.tokens}"
            )
        counts = ((vision.image_size // 16) ** 2, *vision.tokens)
        if any(finer < coarser for finer, coarser in pairwise(counts)):
            raise ConfigError(f"the numbers of tokens must not grow: {counts}")

    @property
    def image_size(self) -> int:
        """The side of the square input in pixels, S."""
        return self.vision.image_size

    @classmethod
    def load(cls, source: str | Path | Mapping[str, Any] | CaftConfig) -> CaftConfig:
        """By name ("caft-b", "caft-s", "caft-xs"), from a JSON file or from its contents.

        Raises ConfigError for an unknown name, a file that is not there, unknown or missing keys.
        """
        if isinstance(source, CaftConfig):
            return source
        if isinstance(source, Mapping):
            return _from_json(source)
        path = Path(source)
        if path.suffix != ".json":
            path = _CONFIGS / f"{source}.json"
            names = sorted(found.stem for found in _CONFIGS.glob("caft-*.json"))
            if str(source) not in names:
                raise ConfigError(
                    f"no CAFT configuration {str(source)!r}; there are {', '.join(names)}, or give "
                    "the path of a .json file"
                )
        try:
            return _from_json(json.loads(path.read_text("utf-8")))
        except (OSError, ValueError) as error:
            if isinstance(error, ConfigError):
                raise
            raise ConfigError(f"{path} is not a CAFT configuration: {error}") from error

    def as_json(self) -> dict[str, Any]:
        """The layout that `load` reads."""
        found = asdict(self)
        return {
            "embed_dim": found["embed_dim"],
            "pool_heads": found["pool_heads"],
            "vision_cfg": found["vision"],
            "text_cfg": found["text"],
        }


def _from_json(settings: Mapping[str, Any]) -> CaftConfig:
    try:
        vision, text = dict(settings["vision_cfg"]), dict(settings["text_cfg"])
        vision["layers"], vision["tokens"] = tuple(vision["layers"]), tuple(vision["tokens"])
        known = {"embed_dim", "pool_heads", "vision_cfg", "text_cfg"}
        unknown = sorted(set(settings) - known)
        for part, kind in ((vision, CaftVisionConfig), (text, CaftTextConfig)):
            unknown += sorted(set(part) - {field.name for field in fields(kind)})
        if unknown:
            raise ConfigError(f"unknown keys in the CAFT configuration: {', '.join(unknown)}")
        return CaftConfig(
            settings["embed_dim"],
            settings["pool_heads"],
            CaftVisionConfig(**vision),
            CaftTextConfig(**text),
        )
    except (KeyError, TypeError) as error:
        raise ConfigError(f"the CAFT configuration lacks a key: {error}") from error
