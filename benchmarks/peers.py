"""Other fused MaxSim kernels, behind one signature, so that all do the same work.

All peers score one direction a call and sum over query tokens; a second call gives the other
direction, PyTorch divides and adds the loss. None is a dependency: what is not installed, or can
not run on the device at hand, is left out with the reason. Those of a GPU are here, those of a CPU
in cpu_peers.py.

    pip install --no-deps late-interaction-kernels flash-maxsim
"""

from __future__ import annotations

import importlib
import os
from collections.abc import Callable
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from types import ModuleType

import torch
from torch import Tensor

from .baselines import Scores


class Unavailable(RuntimeError):
    """This contender can not take part; the message says why."""


def import_peer(module: str) -> ModuleType:
    """Another package's module.

    Raises:
        Unavailable: not installed, or not importable here.
    """
    try:
        return importlib.import_module(module)
    except Exception as error:  # other people's import-time code can raise anything
        reason = str(error).strip().splitlines() or [""]
        raise Unavailable(f"import fails: {type(error).__name__}: {reason[0]}") from error


@dataclass(frozen=True)
class Captions:
    """Text tokens: (texts, longest, dim), with a mask unless all are full; or packed."""

    tokens: Tensor  # padded as above, or packed (total, dim) if there are offsets
    longest: int
    lengths: Tensor | None = None  # (texts,) int32; None: all are `longest`
    mask: Tensor | None = None  # (texts, longest) bool, of padded captions
    offsets: Tensor | None = None  # (texts + 1,) int32, of packed captions


Score = Callable[[Tensor, Captions, tuple[str, ...]], Scores]


@dataclass(frozen=True)
class Peer:
    """A package and how to call it.

    Attributes:
        device: the kind of device that this way of calling it is for, "cuda" or "cpu".
        native: compiled code on NumPy arrays: no gradients, and memory that PyTorch does not see.
    """

    name: str
    module: str
    licence: str
    call: Callable[[ModuleType, Tensor, Captions, tuple[str, ...]], Scores]
    device: str = "cuda"
    native: bool = False

    def load(self, device: torch.device) -> Score:
        """Its scores as a function of image tokens, captions and directions.

        Raises:
            Unavailable: not installed, not importable, or not made for this device.
        """
        if device.type != self.device:
            kind = {"cuda": "a CUDA device", "cpu": "a CPU"}[self.device]
            raise Unavailable(f"its kernels need {kind}")
        module = import_peer(self.module)
        return lambda images, captions, directions: self.call(module, images, captions, directions)

    def version(self) -> str | None:
        """The installed version, or None."""
        try:
            return version(self.name)
        except PackageNotFoundError:
            return None


def _late_interaction_kernels(
    module: ModuleType, images: Tensor, captions: Captions, directions: tuple[str, ...]
) -> Scores:
    # Without this its first call waits for the device to look at the norms of the tokens.
    os.environ.setdefault("LIK_SUPPRESS_NORM_WARN", "1")
    num_images, regions, dim = images.shape
    texts, mask, longest = captions.tokens, captions.mask, captions.longest
    count = longest if captions.lengths is None else captions.lengths
    scores = {}
    if captions.offsets is None:
        if "text_to_image" in directions:
            scores["text_to_image"] = module.maxsim(texts, images, q_mask=mask).T / count
        if "image_to_text" in directions:
            scores["image_to_text"] = module.maxsim(images, texts, d_mask=mask) / regions
        return scores
    starts = torch.arange(num_images + 1, device=images.device, dtype=torch.int32) * regions
    packed_images, offsets = images.reshape(-1, dim), captions.offsets
    if "text_to_image" in directions:
        total = module.maxsim_varlen(texts, packed_images, offsets, starts, longest, regions)
        scores["text_to_image"] = total.T / count
    if "image_to_text" in directions:
        total = module.maxsim_varlen(packed_images, texts, starts, offsets, regions, longest)
        scores["image_to_text"] = total / regions
    return scores


def _flash_maxsim(
    module: ModuleType, images: Tensor, captions: Captions, directions: tuple[str, ...]
) -> Scores:
    if captions.offsets is not None:
        raise Unavailable("no packed captions for batches of queries; see the padded row")
    texts, lengths, regions = captions.tokens, captions.lengths, images.shape[1]
    training = images.requires_grad or texts.requires_grad
    call = module.flash_maxsim_batched_train if training else module.flash_maxsim_batched
    count = captions.longest if lengths is None else lengths
    scores = {}
    if "text_to_image" in directions:
        scores["text_to_image"] = call(texts, images, query_lengths=lengths).T / count
    if "image_to_text" in directions:
        scores["image_to_text"] = call(images, texts, doc_lengths=lengths) / regions
    return scores


PEERS = (
    Peer(
        "late-interaction-kernels", "late_interaction_kernels", "Apache-2.0",
        _late_interaction_kernels,
    ),
    Peer("flash-maxsim", "flash_maxsim", "Apache-2.0", _flash_maxsim),
)  # fmt: skip
