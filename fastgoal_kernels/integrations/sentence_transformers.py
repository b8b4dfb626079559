"""sentence-transformers' losses with in-batch negatives, with ours inside.

>>> from fastgoal_kernels.integrations.sentence_transformers import patch_sentence_transformers
>>> patch_sentence_transformers()
>>> loss = losses.MultipleNegativesRankingLoss(model)      # as before; so is the trainer

What is replaced is what happens to the embeddings in `MultipleNegativesRankingLoss` and
`CachedMultipleNegativesRankingLoss`, and so in the symmetric ones, which are both with other
defaults: the cross-entropy of anchors x candidates, without that matrix. How the model is called,
GradCache's passes, the gathering across devices and wrappers such as `MatryoshkaLoss` stay theirs.

Ours have `directions` ("query_to_doc",), and ("query_to_doc", "doc_to_query") with
`partition_mode="per_direction"`; cosine and dot product; any number of negatives. One softmax over
several directions, hardness weights and other similarities are refused, by name, when the loss is
called: `unpatch_sentence_transformers()` gives them back.
"""

from __future__ import annotations

import functools
import importlib.util
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..functional.contrastive import clip_contrastive_loss, row_cross_entropy
from .patching import Method, Patch, PatchSet

_FIX = "Fix: unpatch_sentence_transformers() gives this loss its own code back"


def _is_cosine(loss: Any) -> bool:
    from sentence_transformers import util

    if loss.similarity_fct in (util.cos_sim, util.dot_score):
        return loss.similarity_fct is util.cos_sim
    raise NotImplementedError(
        f"{type(loss).__name__}: similarity_fct must be cos_sim or dot_score of "
        f"sentence_transformers.util, not {loss.similarity_fct!r}. {_FIX}"
    )


def _is_symmetric(loss: Any) -> bool:
    directions = set(loss.directions)
    if directions == {"query_to_doc"}:
        return False
    if directions == {"query_to_doc", "doc_to_query"} and loss.partition_mode == "per_direction":
        return True
    raise NotImplementedError(
        f"{type(loss).__name__}: directions={loss.directions} with partition_mode="
        f"{loss.partition_mode!r} is one softmax over several matrices, which is not fused. {_FIX}"
    )


def _ranking_loss(loss: Any, anchors: Tensor, candidates: list[Tensor]) -> Tensor:
    """The loss of anchors (N, D) and candidates, positives and then negatives, (N, D) each."""
    if not candidates:
        raise ValueError(f"{type(loss).__name__} needs anchors and positives; got anchors only")
    if loss.hardness_mode is not None and loss.hardness_strength > 0:
        raise NotImplementedError(
            f"{type(loss).__name__}: hardness_mode={loss.hardness_mode!r} is not fused. {_FIX}"
        )
    symmetric = _is_symmetric(loss)
    if _is_cosine(loss):
        anchors, *candidates = (F.normalize(x, dim=-1) for x in (anchors, *candidates))
    all_anchors, first = anchors, 0
    positives = candidates[0]
    if loss.gather_across_devices:
        from sentence_transformers.util import all_gather_with_grad

        if torch.distributed.is_available() and torch.distributed.is_initialized():
            first = torch.distributed.get_rank() * len(anchors)
        all_anchors, *candidates = (all_gather_with_grad(x) for x in (anchors, *candidates))
    elif symmetric and len(candidates) == 1:
        return clip_contrastive_loss(anchors, positives, loss.scale)  # both ways in one pass
    forth = row_cross_entropy(anchors, torch.cat(candidates), loss.scale, first_target=first)
    if not symmetric:
        return forth
    back = row_cross_entropy(positives, all_anchors, loss.scale, first_target=first)
    return (forth + back) / 2


def _plain(original: Method) -> Method:
    @functools.wraps(original)
    def compute_loss_from_embeddings(
        self: Any, embeddings: list[Tensor], labels: Tensor | None = None
    ) -> Tensor:
        return _ranking_loss(self, embeddings[0], list(embeddings[1:]))

    return compute_loss_from_embeddings


def _cached(original: Method) -> Method:
    @functools.wraps(original)
    def calculate_loss(
        self: Any,
        reps: list[list[Tensor]],
        labels: Tensor | None = None,
        *,
        with_backward: bool = False,
    ) -> Tensor:
        """`reps`: each column's embeddings in mini-batches; their gradients are what is cached."""
        anchors, *candidates = (torch.cat(chunks) for chunks in reps)
        loss = _ranking_loss(self, anchors, candidates)
        if with_backward:
            loss.backward()
            return loss.detach()
        return loss

    return calculate_loss


_HOME = "sentence_transformers.sentence_transformer"
_PATCHES = PatchSet(
    "sentence_transformers",
    tuple(
        Patch(f"{_HOME}.losses", owner, method, replace)
        for owner, method, replace in (
            ("MultipleNegativesRankingLoss", "compute_loss_from_embeddings", _plain),
            ("CachedMultipleNegativesRankingLoss", "calculate_loss", _cached),
        )
    ),
)


def patch_sentence_transformers() -> None:
    """Make sentence-transformers' in-batch contrastive losses ours, for the whole process.

    Same arguments, same loss and gradients, on one process or several; the loss is float32 where
    the embeddings are of half precision. Twice is once.

    Raises:
        ImportError: sentence-transformers is not installed, or older than 5.4.
    """
    if importlib.util.find_spec("sentence_transformers") and not importlib.util.find_spec(_HOME):
        raise ImportError(
            "patch_sentence_transformers() needs sentence-transformers 5.4 or newer. "
            "Fix: pip install -U sentence-transformers"
        )
    _PATCHES.apply()


def unpatch_sentence_transformers() -> None:
    """Give the losses their own code back, exactly; without a patch it does nothing."""
    _PATCHES.undo()
