"""CAFT's retrieval: the three scores against the plain formula over all pairs of a small set."""

from __future__ import annotations

import weakref

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from fastgoal_models.caft import Caft
from fastgoal_models.caft.scoring import CaftFeatures, caft_recall, encode
from fastgoal_models.errors import ConfigError
from fastgoal_models.retrieval import recall_at_k

KS = (1, 2, 5)


@pytest.fixture(scope="module")
def model() -> Caft:
    torch.manual_seed(0)
    model = Caft.create("caft-xs", superpixels="grid")
    with torch.no_grad():
        model.logit_scale.fill_(1.3)
        model.logit_bias.fill_(-2.0)
        model.logit_scale_coarse.fill_(0.7)
        model.logit_bias_coarse.fill_(-1.0)
    return model.eval()


def features(model: Caft, images: int, texts: int, seed: int = 1) -> CaftFeatures:
    """Random ones: those of an untrained model would nearly all tie."""
    torch.manual_seed(seed)
    dim = model.visual_proj.attn.embed_dim
    return CaftFeatures(
        torch.randn(images, 6, dim), torch.randn(images, dim), torch.randn(texts, 4, dim),
        torch.randn(texts, dim),
    )  # fmt: skip


@torch.no_grad()
def plain_scores(model: Caft, x: CaftFeatures, alpha: float, shortlist: int | None) -> Tensor:
    """The published score, one pair of image and part at a time."""
    scores = torch.empty(len(x.fine_tokens), len(x.part_features))
    whole = F.normalize(x.whole_image_features, dim=1) @ F.normalize(x.whole_text_features, dim=1).T
    whole = model.logit_scale_coarse.exp() * whole + model.logit_bias_coarse
    for i, tokens in enumerate(x.fine_tokens):
        for j, parts in enumerate(x.part_features):
            parts = F.normalize(parts, dim=1)
            pooled = torch.stack(
                [model.visual_proj(p[None, None], tokens[None], tokens[None])[0, 0] for p in parts]
            )
            part = F.cosine_similarity(pooled, parts, dim=1)
            part = (model.logit_scale.exp() * part + model.logit_bias).mean()
            scores[i, j] = (1 - alpha) * whole[i, j] + alpha * part
    if shortlist is not None:
        listed = whole.topk(shortlist, dim=1).indices
        scores = torch.full_like(scores, -torch.inf).scatter(1, listed, scores.gather(1, listed))
    return scores


@pytest.mark.parametrize(
    ("score", "alpha", "shortlist"),
    [("whole", 0.0, None), ("blended", 0.3, None), ("blended", 0.8, None), ("reranked", 0.3, 4)],
)
def test_recall_is_that_of_the_plain_formula(model, score, alpha, shortlist):
    owner = torch.arange(12) % 9
    x = features(model, 9, 12)
    got = caft_recall(
        model, x, KS, score=score, alpha=alpha, shortlist=shortlist or 16, text_image=owner
    )
    assert got == recall_at_k(plain_scores(model, x, alpha, shortlist), KS, text_image=owner)
    assert 0 < got.text_to_image[5] < 1  # neither nothing nor everything: the ranks tell


def test_encode_gives_the_models_features_batch_by_batch(model):
    torch.manual_seed(2)
    size = model.config.image_size
    images, texts = torch.randn(3, 3, size, size), torch.randint(1, 400, (5, 6, 9))
    texts[..., -1] = 49407
    was_training = model.train().training
    got = encode(model, images.split(2), texts.split(2))
    assert model.training == was_training
    model.eval()
    with torch.no_grad():
        image, text = model.encode_image(images), model.encode_text(texts[:, :4])
    for a, b in zip(
        got,
        (image.fine_tokens, image.whole_features, text.part_features, text.whole_features),
        strict=True,
    ):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


def test_encode_keeps_no_more_than_a_batch_where_it_encodes(model, monkeypatch):
    made, encode_image = [], model.encode_image

    def watched(batch):
        found = encode_image(batch)
        made.append(weakref.ref(found.fine_tokens))
        return found

    monkeypatch.setattr(model, "encode_image", watched)
    size = model.config.image_size

    def images():
        for _ in range(3):
            assert all(there() is None for there in made)
            yield torch.randn(1, 3, size, size)

    texts = torch.randint(1, 400, (1, 4, 9))
    texts[..., -1] = 49407
    got = encode(model, images(), [texts], keep_on="meta")  # as another device
    assert got.fine_tokens.is_meta and len(got.fine_tokens) == len(made) == 3


def test_bad_input_is_named(model):
    with pytest.raises(ValueError, match=r"score must be one of .*got 'both'"):
        caft_recall(model, features(model, 2, 2), score="both")
    with pytest.raises(ValueError, match="pass text_image"):
        caft_recall(model, features(model, 2, 3))
    with pytest.raises(ConfigError, match="no images or no captions"):
        encode(model, [], [])
