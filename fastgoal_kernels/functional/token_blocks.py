"""Tokens and features of any number, wherever they live, in blocks on the device that scores.

What is on the device is bounded by the constants below, whatever the size of the corpus: at most
two blocks of each side, one in use and one on its way, and what scoring makes of the one in use.
"""

from __future__ import annotations

from bisect import bisect_right
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..checks import shape_of

# Of one block. Four million scores, and enough work between two copies to hide them: 256 MB are
# about a thousand long captions (248 tokens of 512 half-precision channels), or four hundred images
# (64 such tokens) whose keys and values are made.
_BLOCK_ITEMS = 1 << 11
_BLOCK_BYTES = 1 << 28


@dataclass  # torch 2.6 can not compile the properties of a NamedTuple
class Rows:
    """Tensors with one row for each item, wherever they live: features, padded tokens, a mask."""

    arguments: dict[str, Tensor | None]  # by the name under which the scoring function takes them
    wide_copies: int = 0  # that scoring makes of a block, in float32 or wider: they count with it

    @property
    def _tensors(self) -> list[Tensor]:
        return [x for x in self.arguments.values() if x is not None]

    @property
    def device(self) -> torch.device:
        return self._tensors[0].device

    @property
    def items(self) -> int:
        return self._tensors[0].shape[0]

    @property
    def fitting(self) -> int:
        """How many items the bytes of a block are enough for; at least one."""
        size = sum(
            x.shape[1:].numel() * (x.element_size() + self.wide_copies * max(x.element_size(), 4))
            for x in self._tensors
        )
        return max(_BLOCK_BYTES // max(size, 1), 1)

    def blocks(self, most: int = _BLOCK_BYTES) -> Iterator[slice]:
        """All items, in order, in blocks within the limits and `most`, but of at least one item."""
        step = min(_BLOCK_ITEMS, self.fitting, most)
        if 0 < self.items <= step:
            # torch.compile takes the number of items for a constant of the loop below.
            yield slice(0, self.items)
            return
        for first in range(0, self.items, step):
            yield slice(first, min(first + step, self.items))

    def on(self, device: torch.device, items: slice) -> dict[str, Any]:
        """These items, as arguments of the scoring function."""
        arguments = {}  # in a comprehension torch.compile would take `items` for a constant
        for name, x in self.arguments.items():
            arguments[name] = None if x is None else copied(x[items], device)
        return arguments


class Ragged(NamedTuple):
    """One modality's tokens (total, dim), wherever they live, cut into items of any length."""

    name: str  # "image" or "text"
    tokens: Tensor
    offsets: Tensor  # on the CPU
    bounds: list[int]  # the same: item b is rows bounds[b] to bounds[b + 1]

    @property
    def device(self) -> torch.device:
        return self.tokens.device

    @property
    def items(self) -> int:
        return len(self.bounds) - 1

    def blocks(self) -> Iterator[slice]:
        """All items, in order, in blocks within the limits, but of at least one item."""
        max_rows = _BLOCK_BYTES // (self.tokens.shape[-1] * self.tokens.element_size())
        first = 0
        while first < self.items:
            past = min(first + _BLOCK_ITEMS, self.items) + 1
            fitting = bisect_right(self.bounds, self.bounds[first] + max_rows, first + 1, past) - 1
            last = max(fitting, first + 1)
            yield slice(first, last)
            first = last

    def on(self, device: torch.device, items: slice) -> dict[str, Any]:
        """These items, as arguments of `maxsim_scores`."""
        bounds = self.bounds[items.start : items.stop + 1]
        offsets = self.offsets[items.start : items.stop + 1] - bounds[0]
        return {
            f"{self.name}_tokens": copied(self.tokens[bounds[0] : bounds[-1]], device),
            f"{self.name}_offsets": copied(offsets, device),
            f"max_{self.name}_tokens": max(end - start for start, end in pairwise(bounds)),
        }


def side_of(
    name: str, tokens: Tensor, mask: Tensor | None, offsets: Tensor | None
) -> Rows | Ragged:
    """One modality's tokens, already checked, as `maxsim_scores` takes them."""
    if offsets is not None:
        return Ragged(name, tokens, offsets, offsets.tolist())
    return Rows({f"{name}_tokens": tokens, f"{name}_mask": mask})


def scoring_device(
    device: torch.device | str | None, image_tokens: Tensor, text_tokens: Tensor
) -> torch.device:
    """Where to score: the device named, else where the tokens are; of a CPU and another, the other.

    Raises:
        ValueError: a device that is not there; tokens on two devices, neither of them the CPU.
    """
    if device is not None:
        try:
            return torch.empty(0, device=device).device  # with its index
        except (AssertionError, RuntimeError, TypeError) as error:
            raise ValueError(
                f"device must be one that is there, like 'cuda' or 'cpu'; got {device!r}: {error}"
            ) from error
    image, text = image_tokens.device, text_tokens.device
    if image != text and "cpu" not in (image.type, text.type):
        raise ValueError(
            f"image_tokens {shape_of(image_tokens)} are on {image}, text_tokens "
            f"{shape_of(text_tokens)} on {text}. Fix: name the one that scores, "
            f"device={str(image)!r}"
        )
    return text if image.type == "cpu" else image


def block_pairs(
    images: Rows | Ragged, texts: Rows | Ragged, device: torch.device
) -> Iterator[tuple[slice, slice, dict[str, Any]]]:
    """Every block of images with every block of texts: (images, texts, arguments for their scores).

    In row-major order, or in column-major order where that copies each text to the device only
    once, because the images are there already.
    """
    images_at, texts_at = images.device, texts.device
    swap = images_at == device and texts_at != device
    travels = images_at != device or texts_at != device
    outer, inner = (texts, images) if swap else (images, texts)
    scored: deque[torch.cuda.Event] = deque()
    for outer_items in outer.blocks():
        outer_arguments = outer.on(device, outer_items)
        for inner_items in inner.blocks():
            arguments = {**outer_arguments, **inner.on(device, inner_items)}
            if swap:
                yield inner_items, outer_items, arguments
            else:
                yield outer_items, inner_items, arguments
            if travels and device.type == "cuda":
                # The host prepares the next block while the device scores this one, and first waits
                # for the one before: running ahead, it would fill its memory with pinned copies.
                scored.append(torch.cuda.Event())
                scored[-1].record(torch.cuda.current_stream(device))
                if len(scored) > 1:
                    scored.popleft().synchronize()


def copied(x: Tensor, device: torch.device) -> Tensor:
    """x on the device. A copy from the CPU to a CUDA device does not keep the host waiting.

    Only one from pinned memory can be so; PyTorch keeps that memory until the device has read it.
    """
    if device.type != "cuda" or x.device.type != "cpu":
        return x.to(device)
    pinned = x if x.is_pinned() else x.contiguous().pin_memory()
    return pinned.to(device, non_blocking=True)
