"""The gradient cache with real towers: open_clip's CLIP and a FAST-GOAL model, in float64.

A batch in chunks must give the loss and the gradients of the whole batch; what differs is the
order of float64 sums.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import open_clip
import pytest
import torch
from torch import Tensor, nn

from fastgoal_kernels import ClipLoss, FastGoalLoss, SigLipLoss, cached_backward
from fastgoal_models import FastGoalBatch, FastGoalModel

DEVICES = ["cpu"] + (["cuda"] if torch.cuda.is_available() else [])
ITEMS, SIDE, CONTEXT = 7, 32, 12
CONFIG: dict[str, Any] = {
    "embed_dim": 16,
    "vision_cfg": {"image_size": SIDE, "layers": 2, "width": 32, "head_width": 16, "patch_size": 8},
    "text_cfg": {"context_length": CONTEXT, "width": 16, "heads": 2, "layers": 2},
}


def make_clip(custom_text: bool = False, bias: bool = False, device: str = "cpu") -> Any:
    torch.manual_seed(11)
    build = open_clip.CustomTextCLIP if custom_text else open_clip.CLIP
    model = build(**CONFIG, init_logit_bias=-5.0 if bias else None, output_dict=True)
    return model.to(device).double()


def make_texts(generator: torch.Generator) -> Tensor:
    texts = torch.zeros(ITEMS, CONTEXT, dtype=torch.long)
    for row in range(ITEMS):
        words = torch.randint(320, 49000, (3 + row,), generator=generator)
        texts[row, : row + 5] = torch.tensor([49406, *words.tolist(), 49407])
    return texts


def make_pairs(device: str = "cpu") -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(12)
    images = torch.randn(ITEMS, 3, SIDE, SIDE, generator=generator, dtype=torch.float64)
    return images.to(device), make_texts(generator).to(device)


def assert_same_gradients(one: nn.Module, other: nn.Module) -> None:
    """Float64. A weight's gradient adds some thousand products, so the scale is the largest."""
    wanted = dict(other.named_parameters())
    for name, parameter in one.named_parameters():
        got, want = parameter.grad, wanted[name].grad
        assert (got is None) == (want is None), name
        if got is not None and want is not None:
            scale = max(float(want.abs().max()), 1e-3)
            torch.testing.assert_close(got, want, rtol=0, atol=1e-12 * scale, msg=name)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("chunk_size", [1, 3, 7])
@pytest.mark.parametrize("custom_text", [False, True])
@pytest.mark.parametrize(
    "make_loss",
    [open_clip.loss.ClipLoss, open_clip.loss.SigLipLoss, ClipLoss, SigLipLoss],
    ids=["open_clip ClipLoss", "open_clip SigLipLoss", "ClipLoss", "SigLipLoss"],
)
def test_open_clip_in_chunks(make_loss: Callable[[], Any], custom_text, chunk_size, device):
    """As open_clip's trainer calls model and loss; the scale and the bias are outputs."""
    bias = "SigLip" in make_loss.__name__
    pairs = make_pairs(device)
    loss = make_loss()
    other = make_clip(custom_text, bias, device)
    expected = loss(**other(*pairs), output_dict=True)
    expected["contrastive_loss"].backward()
    model = make_clip(custom_text, bias, device)
    got = cached_backward(
        lambda chunk: model(*chunk),
        pairs,
        lambda outputs: loss(**outputs, output_dict=True),
        chunk_size=chunk_size,
        module=model,
    )
    assert isinstance(got, dict) and got.keys() == expected.keys()
    torch.testing.assert_close(
        got["contrastive_loss"], expected["contrastive_loss"].detach(), rtol=1e-12, atol=0
    )
    assert_same_gradients(model, other)


@pytest.mark.parametrize("device", DEVICES)
def test_open_clip_towers_apart_with_a_locked_image_tower(device):
    """LiT: the locked tower runs once, in chunks of its own size; its weights get no gradient."""
    images, texts = make_pairs(device)
    other, model = (make_clip(device=device) for _ in range(2))
    loss = ClipLoss()
    for clip in (other, model):
        clip.lock_image_tower()
    expected = loss(**other(images, texts))
    expected.backward()
    chunks = []

    def encode_image(chunk: Tensor) -> Tensor:
        chunks.append(len(chunk))
        return model.encode_image(chunk, normalize=True)

    got = cached_backward(
        (encode_image, lambda chunk: model.encode_text(chunk, normalize=True)),
        (images, texts),
        lambda image, text: loss(image, text, model.logit_scale.exp()),
        chunk_size=(3, 2),
        module=(model.visual, model.transformer),
    )
    assert chunks == [3, 3, 1]
    torch.testing.assert_close(got, expected.detach(), rtol=1e-12, atol=0)
    assert_same_gradients(model, other)


def make_fast_goal(device: str) -> tuple[FastGoalModel, FastGoalBatch]:
    torch.manual_seed(13)
    model = FastGoalModel.create(CONFIG, context_length=CONTEXT).to(device).double()
    generator = torch.Generator().manual_seed(14)
    images, texts = make_pairs()
    corner = torch.rand(ITEMS, 2, generator=generator) * 40
    extent = 10 + torch.rand(ITEMS, 2, generator=generator) * 50
    start = torch.arange(ITEMS) % 3 + 1
    batch = FastGoalBatch(
        images=images,
        texts=texts,
        local_images=torch.randn(ITEMS, 3, SIDE, SIDE, generator=generator, dtype=torch.float64),
        local_texts=make_texts(generator)[:, : CONTEXT - 1],  # narrower, as training cuts them
        boxes=torch.cat([corner, corner + extent], dim=1),
        image_sizes=torch.tensor([100, 120]).repeat(ITEMS, 1),
        spans=torch.stack([start, start + 2], dim=1),
        lengths=torch.arange(ITEMS) + 5,
    )
    return model, batch.to(device)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("chunk_size", [1, 3, 7])
def test_fast_goal_in_chunks(chunk_size, device):
    """The model takes the chunk of its batch as it is: boxes, spans and sizes are cut with it."""
    other, batch = make_fast_goal(device)
    model, _ = make_fast_goal(device)
    loss = FastGoalLoss()
    expected = loss(**other(batch), output_dict=True)
    torch.stack(list(expected.values())).sum().backward()
    got = cached_backward(
        model, batch, lambda outputs: loss(**outputs, output_dict=True), chunk_size=chunk_size
    )
    assert isinstance(got, dict) and list(got) == list(expected)
    for name, part in got.items():
        torch.testing.assert_close(part, expected[name].detach(), rtol=1e-12, atol=1e-14)
    assert_same_gradients(model, other)


def test_fast_goal_with_checkpointed_layers():
    other, batch = make_fast_goal("cpu")
    model, _ = make_fast_goal("cpu")
    model.set_grad_checkpointing()
    loss = FastGoalLoss()
    loss(**other(batch)).backward()
    cached_backward(model, batch, lambda outputs: loss(**outputs), chunk_size=3)
    assert_same_gradients(model, other)


def test_open_clip_resnet_is_refused_while_it_trains():
    """CLIP's ResNets have batch norm; locked as open_clip locks them, they may pass."""
    config = CONFIG | {
        "vision_cfg": {"layers": [1, 1, 1, 1], "width": 8, "image_size": 32, "patch_size": None}
    }
    torch.manual_seed(15)
    model = open_clip.CLIP(**config, output_dict=True).double().train()
    pairs, loss = make_pairs(), ClipLoss()

    def step() -> Any:
        return cached_backward(
            lambda chunk: model(*chunk),
            pairs,
            lambda outputs: loss(**outputs),
            chunk_size=3,
            module=model,
        )

    with pytest.raises(ValueError, match=r"module's visual\.bn1 is batch norm in training mode"):
        step()
    model.visual.eval()
    expected = loss(**model(*pairs))
    torch.testing.assert_close(step(), expected.detach(), rtol=1e-12, atol=0)
