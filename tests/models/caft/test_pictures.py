"""What is drawn of a CAFT: shares that add up, segments, and attention that is the pool's own."""

from __future__ import annotations

import pytest
import torch
from PIL import Image

from fastgoal_models.caft import Caft
from fastgoal_models.caft.data import text_rows
from fastgoal_models.caft.maps import caft_maps, cell_shares
from fastgoal_models.caft.picture_command import draw_hierarchy
from fastgoal_models.caft.pictures import draw_caft
from fastgoal_models.errors import ConfigError


def test_shares_of_every_level_sum_to_one_and_maps_to_the_attention(tmp_path):
    torch.manual_seed(0)
    model = Caft.create("caft-xs", superpixels="slic").train()
    image = torch.randn(3, 96, 96)
    captions = ["A cat.", "A red sofa behind it.", "Light.", "A lamp."]
    texts = text_rows(captions, model.tokenizer)
    maps = caft_maps(model, image, texts)
    assert model.training
    model.eval()
    with torch.no_grad():
        encoded = model.encode_image(image[None], with_hierarchy=True)
        shares = cell_shares(encoded.hierarchy)
        pool, tokens = model.visual_proj, encoded.fine_tokens
        parts = torch.nn.functional.normalize(model.encode_parts(texts), dim=1)
        keys = pool.ln_k(tokens)
        _, weights = pool.attn(pool.ln_q(parts)[None], keys, pool.ln_v(tokens))
    assert [share.shape[1:] for share in shares] == [
        (12, 12, 36), (12, 12, 16), (12, 12, 8), (12, 12, 4),
    ]  # fmt: skip
    for share in shares:
        torch.testing.assert_close(share.sum(dim=-1), torch.ones(1, 12, 12))
    assert [segments.shape for segments in maps.segments] == [(12, 12)] * 4
    assert maps.tokens == [36, 16, 8, 4]
    # What the zero token takes is left out; the rest of the attention lies in the cells.
    torch.testing.assert_close(
        maps.attention.sum(dim=(1, 2)), weights[0, :, :-1].sum(dim=1), rtol=1e-3, atol=1e-4
    )
    picture = Image.effect_noise((60, 40), 50).convert("RGB")
    draw_caft(picture, captions, maps, tmp_path / "drawn.png")
    with Image.open(tmp_path / "drawn.png") as drawn:
        assert drawn.width > drawn.height > 300


def test_an_ending_that_names_no_picture_is_refused_before_anything_is_loaded(tmp_path):
    gone = tmp_path / "gone"
    with pytest.raises(ConfigError, match=r"seen\.txt should end in one of .*png"):
        draw_hierarchy(gone / "cat.jpg", "A cat.", gone, tmp_path / "seen.txt")
