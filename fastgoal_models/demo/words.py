"""Cosines between the words of one sentence of a caption and the patches of its photograph."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from ..captions import tokenize_caption
from ..fast_goal import FastGoalModel
from ..glit import GlitRecord
from ..pictures import Box


def word_patch_cosines(
    model: FastGoalModel, image: Tensor, sentences: Sequence[str], which: int
) -> tuple[list[str], Tensor]:
    """The words of `sentences[which]`, read in the whole caption, against every patch.

    Args:
        image: (3, S, S), normalised, on any device.
        sentences: the caption's sentences; one cut off by the context has fewer words or none.

    Returns:
        The words, and (words, down, across) float32 cosines on the CPU. A word of several tokens
        is the mean of their projected features; punctuation belongs to no word and is left out.
    """
    device = next(model.parameters()).device
    caption = tokenize_caption(sentences, model.tokenizer, model.context_length)
    training = model.training
    model.eval()
    with torch.no_grad():
        _, patches = model.image_tokens(image[None].to(device))
        _, tokens = model.text_tokens(caption.tokens[None].to(device))
        patch_features = F.normalize(model.project_patches(patches[0]).float(), dim=1)
        token_features = F.normalize(model.project_words(tokens[0]).float(), dim=1)
    model.train(training)
    words: list[str] = []
    features: list[Tensor] = []
    start, end = caption.spans[which]
    spelled, group = "", []
    for position in range(start, end):
        piece = model.tokenizer.decoder[int(caption.tokens[position])]
        spelled += piece.removesuffix("</w>")
        group.append(token_features[position])
        if piece.endswith("</w>"):
            if any(character.isalnum() for character in spelled):
                words.append(spelled)
                features.append(F.normalize(torch.stack(group).mean(dim=0), dim=0))
            spelled, group = "", []
    if not words:
        raise ValueError(f"sentence {which} lies past the context of {model.context_length} tokens")
    cosines = torch.stack(features) @ patch_features.T
    return words, cosines.unflatten(1, model.grid_size).cpu()


def inside_and_outside(cosines: Tensor, box: Box, record: GlitRecord) -> tuple[float, float]:
    """Mean of (words, down, across) cosines over the patches in a box, and over all others."""
    _, down, across = cosines.shape
    left, top, right, bottom = box
    x = (torch.arange(across) + 0.5) * record.width / across
    y = (torch.arange(down) + 0.5) * record.height / down
    inside = ((y >= top) & (y < bottom))[:, None] & ((x >= left) & (x < right))
    return float(cosines[:, inside].mean()), float(cosines[:, ~inside].mean())
