"""A synthetic long-caption set: drawn scenes, captions that tell all of them, a box a sentence.

Every scene is a function of its number and of whether it is held out: a background, and three to
five shapes at different places of a 3 x 3 grid. Its caption describes each shape, the background,
and how shapes stand to each other, in five to nine sentences. It is made to see whether a method
learns at all, in minutes and without any download; it says nothing about photographs.

Training and held-out scenes can not coincide: which of the two a scene is, its contents decide.
"""

from __future__ import annotations

import hashlib
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from open_clip import OPENAI_DATASET_MEAN, OPENAI_DATASET_STD, SimpleTokenizer
from PIL import Image
from torch import Tensor

from .caft.captions import training_captions
from .caft.data import CaftBatch, text_rows
from .captions import pack_row, sentence_tokens
from .fast_goal import FastGoalBatch
from .pictures import Box, crop_region, image_tensor

COLOURS = {
    "red": (214, 39, 40), "green": (44, 160, 44), "blue": (31, 80, 200),
    "yellow": (240, 220, 40), "purple": (140, 60, 170), "orange": (250, 130, 20),
    "white": (250, 250, 250), "black": (15, 15, 15),
}  # fmt: skip
BACKGROUNDS = {"grey": (128, 128, 128), "beige": (222, 205, 170), "teal": (90, 160, 160)}
SHAPES = ("circle", "square", "triangle", "diamond", "cross", "ring")
TEXTURES = ("plain", "striped", "dotted", "checked")
SIZES = {"small": 0.5, "large": 0.9}  # of a cell of the grid
PLACES = (
    "at the upper left", "at the top", "at the upper right",
    "on the left", "in the middle", "on the right",
    "at the lower left", "at the bottom", "at the lower right",
)  # fmt: skip
_HELD_OUT = 4  # one scene in so many


class Thing(NamedTuple):
    """One shape of a scene."""

    shape: str
    colour: str
    texture: str
    size: str
    place: int
    """cell of the 3 x 3 grid, row by row"""

    @property
    def name(self) -> str:
        """How relations call it."""
        return f"{self.colour} {self.shape}"


@dataclass(frozen=True)
class Scene:
    """What there is to see, and the sentences that tell it."""

    background: str
    background_texture: str
    things: tuple[Thing, ...]
    sentences: tuple[str, ...]
    about: tuple[int | None, ...]
    """for each sentence the thing it describes; None for a relation or the background"""

    @property
    def caption(self) -> str:
        """All sentences."""
        return " ".join(self.sentences)


def scene(number: int, held_out: bool = False) -> Scene:
    """Scene `number` of the training scenes, or of the held-out ones."""
    rng = random.Random(f"scene {number} {held_out}")
    while True:
        found = _draw_scene(rng)
        digest = hashlib.sha256(repr((found.background, sorted(found.things))).encode()).digest()
        if (digest[0] % _HELD_OUT == 0) == held_out:
            return found


def _draw_scene(rng: random.Random) -> Scene:
    count = rng.randint(3, 5)
    places = rng.sample(range(9), count)
    names = rng.sample([(c, s) for c in COLOURS for s in SHAPES], count)
    things = tuple(
        Thing(shape, colour, rng.choice(TEXTURES), rng.choice(list(SIZES)), place)
        for (colour, shape), place in zip(names, places, strict=True)
    )
    background, texture = rng.choice(list(BACKGROUNDS)), rng.choice(("plain", "striped"))
    told: list[tuple[str, int | None]] = [
        (f"A {t.size} {t.texture} {t.colour} {t.shape} is {PLACES[t.place]}.", at)
        for at, t in enumerate(things)
    ]
    told.append((f"The background is {texture} {background}.", None))
    pairs = [(a, b) for a in things for b in things if a != b]
    for a, b in rng.sample(pairs, rng.randint(max(1, 5 - len(told)), 3)):
        told.append((f"The {a.name} is {_relation(a, b)} the {b.name}.", None))
    rng.shuffle(told)
    sentences, about = zip(*told, strict=True)
    return Scene(background, texture, things, sentences, about)


def _relation(a: Thing, b: Thing) -> str:
    down, across = a.place // 3 - b.place // 3, a.place % 3 - b.place % 3
    if abs(across) >= abs(down):
        return "to the left of" if across < 0 else "to the right of"
    return "above" if down < 0 else "below"


def reworded(told: Scene) -> list[str]:
    """The things once more, in other words: captions beside the long one."""
    return [
        f"{PLACES[t.place].capitalize()} you see a {t.colour} {t.shape}, {t.texture} and {t.size}."
        for t in told.things
    ]


# -- drawing --------------------------------------------------------------------------------------


def box(thing: Thing, image_size: int) -> Box:
    """x1, y1, x2, y2 in pixels."""
    cell = image_size / 3
    radius = SIZES[thing.size] * cell / 2
    x, y = (thing.place % 3 + 0.5) * cell, (thing.place // 3 + 0.5) * cell
    return x - radius, y - radius, x + radius, y + radius


def draw(told: Scene, image_size: int) -> Image.Image:
    """The picture, image_size x image_size."""
    rows, columns = np.mgrid[0:image_size, 0:image_size] + 0.5
    pixels = np.empty((image_size, image_size, 3), dtype=np.uint8)
    stripes = (columns // (image_size / 12) % 2 == 0)[..., None]
    ground = np.array(BACKGROUNDS[told.background])
    light = np.where(stripes & (told.background_texture == "striped"), 0.85, 1.0)
    pixels[:] = (ground * light).astype(np.uint8)
    for thing in told.things:
        x1, y1, x2, y2 = box(thing, image_size)
        x = (columns - (x1 + x2) / 2) / ((x2 - x1) / 2)  # -1 to 1 across the box
        y = (rows - (y1 + y2) / 2) / ((y2 - y1) / 2)
        inside = _SHAPES[thing.shape](x, y)
        dark = inside & _TEXTURES[thing.texture](x, y)
        colour = np.array(COLOURS[thing.colour])
        pixels[inside] = colour
        pixels[dark] = colour * 0.45 if thing.colour != "black" else [110, 110, 110]
    return Image.fromarray(pixels)


_Mask = Callable[[np.ndarray, np.ndarray], np.ndarray]

_SHAPES: dict[str, _Mask] = {
    "circle": lambda x, y: x**2 + y**2 <= 1,
    "square": lambda x, y: (abs(x) <= 0.9) & (abs(y) <= 0.9),
    "triangle": lambda x, y: (abs(y) <= 1) & (abs(x) <= (y + 1) / 2),
    "diamond": lambda x, y: abs(x) + abs(y) <= 1,
    "cross": lambda x, y: ((abs(x) <= 0.33) | (abs(y) <= 0.33)) & (abs(x) <= 1) & (abs(y) <= 1),
    "ring": lambda x, y: (x**2 + y**2 <= 1) & (x**2 + y**2 >= 0.3),
}
_TEXTURES: dict[str, _Mask] = {
    "plain": lambda x, y: np.zeros(x.shape, dtype=bool),
    "striped": lambda x, y: (y + 1) % 0.5 < 0.25,
    "dotted": lambda x, y: ((x + 1) % 0.5 - 0.25) ** 2 + ((y + 1) % 0.5 - 0.25) ** 2 < 0.02,
    "checked": lambda x, y: ((x + 1) % 0.8 < 0.4) ^ ((y + 1) % 0.8 < 0.4),
}


def pixels_of(told: Scene, image_size: int) -> Tensor:
    """(3, S, S) float32, CLIP-normalised."""
    return image_tensor(draw(told, image_size), image_size, OPENAI_DATASET_MEAN, OPENAI_DATASET_STD)


# -- data sets ------------------------------------------------------------------------------------


class SyntheticFastGoal:
    """Training scenes as FAST-GOAL's items; each epoch has another local pair of a scene."""

    def __init__(
        self, scenes: int, image_size: int, tokenizer: SimpleTokenizer, context_length: int
    ) -> None:
        self.scenes, self.image_size = scenes, image_size
        self.tokenizer, self.context_length = tokenizer, context_length

    def __len__(self) -> int:
        return self.scenes

    def __getitem__(self, index: int) -> FastGoalBatch:
        return self.at(0, index)

    def at(self, epoch: int, index: int) -> FastGoalBatch:
        """The item, a function of epoch and index."""
        told = scene(index)
        described = [at for at, thing in enumerate(told.about) if thing is not None]
        sentence = random.Random(f"pair {epoch} {index}").choice(described)
        thing = told.things[told.about[sentence] or 0]
        region = box(thing, self.image_size)
        picture = draw(told, self.image_size)
        words = sentence_tokens(told.caption, told.sentences, self.tokenizer)
        flat = [token for piece in words for token in piece]
        start = sum(len(piece) for piece in words[:sentence])
        end = start + len(words[sentence])
        return FastGoalBatch(
            images=image_tensor(picture, self.image_size),
            texts=pack_row(flat, self.tokenizer, self.context_length),
            local_images=image_tensor(crop_region(picture, region), self.image_size),
            local_texts=pack_row(words[sentence], self.tokenizer, self.context_length),
            boxes=torch.tensor(region, dtype=torch.float32),
            image_sizes=torch.tensor((self.image_size, self.image_size)),
            spans=torch.tensor((start + 1, end + 1)),
            lengths=torch.tensor(len(flat) + 2),
        )


class SyntheticCaft:
    """Training scenes as CAFT's items; each epoch has other parts and extras of a scene."""

    def __init__(self, scenes: int, image_size: int, tokenizer: SimpleTokenizer) -> None:
        self.scenes, self.image_size, self.tokenizer = scenes, image_size, tokenizer

    def __len__(self) -> int:
        return self.scenes

    def __getitem__(self, index: int) -> CaftBatch:
        return self.at(0, index)

    def at(self, epoch: int, index: int) -> CaftBatch:
        """The item, a function of epoch and index."""
        told = scene(index)
        captions = {"long": told.sentences, "reworded": reworded(told)}
        rng = random.Random(f"captions {epoch} {index}")
        texts = training_captions(captions, rng)
        return CaftBatch(pixels_of(told, self.image_size), text_rows(texts, self.tokenizer))


def held_out(count: int) -> Sequence[Scene]:
    """The first `count` held-out scenes."""
    return [scene(number, held_out=True) for number in range(count)]
