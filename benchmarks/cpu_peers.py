"""Other people's MaxSim on a CPU, behind the signature of peers.py.

    pip install --no-deps late-interaction-kernels maxsim-cpu fast-maxsim

late-interaction-kernels runs its eager reference there, with gradients. maxsim-cpu is Rust on
NumPy arrays, forward only; fast-maxsim is a fork of it. Both score one query against many documents
a call, take unit-length tokens as they are and sum over the query's.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
from types import ModuleType

import numpy as np
import torch
from torch import Tensor

from .baselines import Scores
from .peers import Captions, Peer, Unavailable

# maxsim-cpu multiplies blocks of up to 64 document tokens with libxsmm, whose kernels end at 64³
# multiplications. Larger products go to a BLAS with which the wheel of 0.1.0 is not linked: the
# scores are garbage, or the process dies. A score is a sum over query tokens, so that long queries
# can be scored in parts that stay below.
LIBXSMM_BLOCK = 64
LIBXSMM_PRODUCT = 64**3


def _late_interaction_kernels(
    module: ModuleType, images: Tensor, captions: Captions, directions: tuple[str, ...]
) -> Scores:
    if captions.offsets is not None:
        raise Unavailable("no packed captions on a CPU; see the padded row")
    score = module.MaxSimScorer(normalize=False)
    texts, mask = captions.tokens, captions.mask
    count = captions.longest if captions.lengths is None else captions.lengths
    scores = {}
    if "text_to_image" in directions:
        scores["text_to_image"] = score(texts, images, q_mask=mask).T / count
    if "image_to_text" in directions:
        scores["image_to_text"] = score(images, texts, d_mask=mask) / images.shape[1]
    return scores


def _sums(module: ModuleType, queries: Tensor, documents: Tensor, part: int) -> Tensor:
    """(queries, documents) sums over query tokens, `part` of them a call."""
    array = documents.numpy()
    rows = [
        sum(module.maxsim_scores(query[at : at + part], array) for at in range(0, len(query), part))
        for query in queries.numpy()
    ]
    return torch.from_numpy(np.stack(rows))


def _native(
    module: ModuleType,
    images: Tensor,
    captions: Captions,
    directions: tuple[str, ...],
    limit: int | None,
) -> Scores:
    """`limit`: multiplications that a product of one block of a document may take."""
    texts = captions.tokens
    if images.requires_grad or texts.requires_grad:
        raise Unavailable("no gradients; see the forward's rows")
    if captions.lengths is not None:
        raise Unavailable("its adapter takes captions of one length")

    def sums(queries: Tensor, documents: Tensor) -> Tensor:
        _, tokens, dim = documents.shape
        part = queries.shape[1]
        if limit is not None:
            part = max(1, limit // (min(tokens, LIBXSMM_BLOCK) * dim))
        return _sums(module, queries, documents, part)

    scores = {}
    if "text_to_image" in directions:
        scores["text_to_image"] = sums(texts, images).T / captions.longest
    if "image_to_text" in directions:
        scores["image_to_text"] = sums(images, texts) / images.shape[1]
    return scores


def _maxsim_cpu(
    module: ModuleType, images: Tensor, captions: Captions, directions: tuple[str, ...]
) -> Scores:
    return _native(module, images, captions, directions, LIBXSMM_PRODUCT)


def _fast_maxsim(
    module: ModuleType, images: Tensor, captions: Captions, directions: tuple[str, ...]
) -> Scores:
    return _native(module, images, captions, directions, None)


CPU_PEERS = (
    Peer(
        "late-interaction-kernels", "late_interaction_kernels", "Apache-2.0",
        _late_interaction_kernels, device="cpu",
    ),
    Peer("maxsim-cpu", "maxsim_cpu", "Apache-2.0", _maxsim_cpu, device="cpu", native=True),
    Peer("fast-maxsim", "fast_maxsim", "Apache-2.0", _fast_maxsim, device="cpu", native=True),
)  # fmt: skip


def limit_native_threads(threads: int) -> None:
    """As many threads as PyTorch has for Rust code, which reads this when it first runs."""
    os.environ["RAYON_NUM_THREADS"] = str(threads)
    os.environ.setdefault("LIBXSMM_VERBOSE", "0")  # or it reports when the process ends


def _trial(peer: Peer, text_tokens: int, image_tokens: int, dim: int) -> None:
    generator = torch.Generator().manual_seed(0)
    images, texts = (
        torch.nn.functional.normalize(torch.randn(2, n, dim, generator=generator), dim=-1)
        for n in (image_tokens, text_tokens)
    )
    score = peer.load(torch.device("cpu"))
    score(images, Captions(texts, text_tokens), ("text_to_image", "image_to_text"))


def try_elsewhere(peer: Peer, text_tokens: int, image_tokens: int, dim: int) -> None:
    """Run a native peer on tokens of these sizes in a process that it may take down.

    Raises:
        Unavailable: it is not installed, or that process died.
    """
    peer.load(torch.device("cpu"))
    process = multiprocessing.get_context("spawn").Process(
        target=_trial, args=(peer, text_tokens, image_tokens, dim)
    )
    process.start()
    process.join()
    code = process.exitcode or 0
    if code < 0:
        raise Unavailable(f"the process dies of {signal.Signals(-code).name} on tokens this size")
    if code:
        raise Unavailable("it fails on tokens this size")
