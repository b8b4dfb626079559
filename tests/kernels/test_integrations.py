"""Patched open_clip and transformers train as unpatched, and come back exactly."""

from __future__ import annotations

import argparse
import inspect
import subprocess
import sys
from unittest import mock

import pytest
import torch

from fastgoal_kernels import integrations, modules
from fastgoal_kernels.integrations import hf_clip
from fastgoal_kernels.integrations.patching import Patch, PatchSet

STEPS, BATCH, VOCABULARY, CONTEXT, PIXELS = 20, 6, 64, 8, 16


@pytest.fixture(autouse=True)
def nothing_stays_patched():
    yield
    integrations.unpatch_open_clip()
    integrations.unpatch_hf_clip()


def batches() -> list[tuple[torch.Tensor, torch.Tensor]]:
    generator = torch.Generator().manual_seed(5)
    return [
        (
            torch.randn(BATCH, 3, PIXELS, PIXELS, generator=generator),
            torch.randint(1, VOCABULARY, (BATCH, CONTEXT), generator=generator),
        )
        for _ in range(STEPS)
    ]


def train(model: torch.nn.Module, loss_of) -> list[float]:
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    losses = []
    for images, texts in batches():
        loss = loss_of(model, images, texts)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


def assert_same_training(patched: list[float], plain: list[float]) -> None:
    # Float32 sums in another order, through 20 steps of feedback.
    assert patched == pytest.approx(plain, rel=1e-5)
    assert max(plain) - min(plain) > 1e-2, "nothing was learned, so nothing was compared"


# ---------------------------------------------------------------------------------------------
# open_clip
# ---------------------------------------------------------------------------------------------


def open_clip_arguments(**changes) -> argparse.Namespace:
    options = {
        "distill": False, "model": "tiny", "siglip": False, "local_loss": False,
        "gather_with_grad": False, "rank": 0, "world_size": 1, "horovod": False,
        "loss_dist_impl": None, "coca_caption_loss_weight": 2.0,
        "coca_contrastive_loss_weight": 1.0,
    }  # fmt: skip
    return argparse.Namespace(**options | changes)


def train_open_clip(**changes) -> list[float]:
    import open_clip

    torch.manual_seed(0)
    model = open_clip.CLIP(
        embed_dim=16,
        vision_cfg={"layers": 1, "width": 32, "head_width": 16, "patch_size": 8,
                    "image_size": PIXELS},
        text_cfg={"layers": 1, "width": 32, "heads": 2, "context_length": CONTEXT,
                  "vocab_size": VOCABULARY},
        init_logit_bias=-10 if changes.get("siglip") else None,
        output_dict=True,
    )  # fmt: skip
    loss = open_clip.create_loss(open_clip_arguments(**changes))

    def step(model, images, texts):
        return loss(**model(images, texts), output_dict=True)["contrastive_loss"]

    return train(model, step)


@pytest.mark.parametrize("siglip", [False, True])
def test_open_clip_trains_alike(siglip):
    pytest.importorskip("open_clip")
    plain = train_open_clip(siglip=siglip)
    integrations.patch_open_clip()
    ours = "sigmoid_contrastive_loss" if siglip else "clip_contrastive_loss"
    with mock.patch.object(modules, ours, wraps=getattr(modules, ours)) as spy:
        patched = train_open_clip(siglip=siglip)
    assert spy.call_count == STEPS
    assert_same_training(patched, plain)


def test_open_clip_is_patched_once_and_restored():
    open_clip = pytest.importorskip("open_clip")
    classes = (open_clip.loss.ClipLoss, open_clip.loss.SigLipLoss)
    ours = (modules.ClipLoss, modules.SigLipLoss)
    originals = [vars(cls)["forward"] for cls in classes]
    existing = open_clip.create_loss(open_clip_arguments())
    for _ in range(2):
        integrations.patch_open_clip()
        assert [cls.forward for cls in classes] == [cls.forward for cls in ours]
    assert type(existing).forward is modules.ClipLoss.forward  # instances made before change too
    for _ in range(2):
        integrations.unpatch_open_clip()
        assert [vars(cls)["forward"] for cls in classes] == originals


def test_open_clips_other_losses_still_work():
    open_clip = pytest.importorskip("open_clip")
    image, text = torch.randn(4, 8), torch.randn(4, 8)
    words, labels = torch.randn(4, 5, 9), torch.randint(1, 9, (4, 5))
    coca = open_clip.create_loss(open_clip_arguments(model="coca_tiny"))
    distill = open_clip.create_loss(open_clip_arguments(distill=True))

    def losses():
        scale = torch.tensor(3.0)
        teacher = (text, image, scale)
        return [*coca(image, text, words, labels, scale), *distill(image, text, scale, *teacher)]

    plain = losses()
    integrations.patch_open_clip()
    with mock.patch.object(
        modules, "clip_contrastive_loss", wraps=modules.clip_contrastive_loss
    ) as spy:
        torch.testing.assert_close(losses(), plain)
    assert spy.call_count == 1  # CoCaLoss; DistillClipLoss needs the logits and keeps its own


def test_patched_open_clip_refuses_horovod_by_name():
    open_clip = pytest.importorskip("open_clip")
    loss = open_clip.create_loss(open_clip_arguments(horovod=True, world_size=2))
    integrations.patch_open_clip()
    with pytest.raises(NotImplementedError, match="use_horovod"):
        loss(torch.randn(4, 8), torch.randn(4, 8), 3.0)


# ---------------------------------------------------------------------------------------------
# transformers
# ---------------------------------------------------------------------------------------------


def hf_model(name: str) -> torch.nn.Module:
    import transformers

    torch.manual_seed(0)
    tower = {"hidden_size": 32, "intermediate_size": 40, "num_hidden_layers": 1,
             "num_attention_heads": 2}  # fmt: skip
    config_class = getattr(transformers, f"{name}Config")
    config = config_class(
        text_config=tower | {"vocab_size": VOCABULARY, "max_position_embeddings": CONTEXT,
                             "projection_size": 32, "bos_token_id": 0,
                             "eos_token_id": VOCABULARY - 1},
        vision_config=tower | {"image_size": PIXELS, "patch_size": 8},
    )  # fmt: skip
    config.projection_dim = 16
    return getattr(transformers, f"{name}Model")(config)


def hf_step(model, images, texts):
    return model(input_ids=texts, pixel_values=images, return_loss=True).loss.squeeze()


@pytest.mark.parametrize("name", ["CLIP", "Siglip"])
def test_transformers_trains_alike(name):
    pytest.importorskip("transformers")
    plain = train(hf_model(name), hf_step)
    integrations.patch_hf_clip()
    ours = "clip_contrastive_loss" if name == "CLIP" else "sigmoid_contrastive_loss"
    with mock.patch.object(hf_clip, ours, wraps=getattr(hf_clip, ours)) as spy:
        patched = train(hf_model(name), hf_step)
    assert spy.call_count == STEPS
    assert_same_training(patched, plain)


def test_transformers_outputs_are_as_before():
    pytest.importorskip("transformers")
    model = hf_model("CLIP").eval()
    images, texts = batches()[0]

    def outputs():
        with torch.no_grad():
            positional = model(texts, images, None, None, True)
            as_tuple = model(texts, images, return_loss=True, return_dict=False)
            without_loss = model(input_ids=texts, pixel_values=images)
        return positional, as_tuple, without_loss

    plain = outputs()
    integrations.patch_hf_clip()
    for got, want in zip(outputs(), plain, strict=True):
        assert type(got) is type(want)
        if isinstance(want, tuple):
            assert len(got) == len(want)
            torch.testing.assert_close(got[:5], want[:5])
            continue
        assert list(got) == list(want)
        for key in ("loss", "logits_per_image", "logits_per_text", "image_embeds"):
            value = getattr(want, key)
            if value is None:
                assert getattr(got, key) is None
            else:
                torch.testing.assert_close(getattr(got, key), value)
    # Trainers decide by the signature whether a model can return its loss.
    assert "return_loss" in inspect.signature(type(model).forward).parameters


def test_transformers_is_patched_once_and_restored():
    transformers = pytest.importorskip("transformers")
    names = [n for n in ("CLIPModel", "SiglipModel", "Siglip2Model") if hasattr(transformers, n)]
    classes = [getattr(transformers, name) for name in names]
    originals = [vars(cls)["forward"] for cls in classes]
    integrations.patch_hf_clip()
    patched = [cls.forward for cls in classes]
    assert all(now is not before for now, before in zip(patched, originals, strict=True))
    integrations.patch_hf_clip()
    assert [cls.forward for cls in classes] == patched
    for _ in range(2):
        integrations.unpatch_hf_clip()
        assert [vars(cls)["forward"] for cls in classes] == originals


# ---------------------------------------------------------------------------------------------
# The patching itself
# ---------------------------------------------------------------------------------------------


def test_a_package_that_is_missing_is_named():
    patches = PatchSet("no_such_package", (Patch("no_such_package.a", "A", "f", lambda f: f),))
    with pytest.raises(ImportError, match="no_such_package is not installed"):
        patches.apply()
    patches.undo()


def test_a_model_that_an_older_release_lacks_is_passed_over():
    patches = PatchSet(
        "json",
        (
            Patch("json.no_such_model.modeling", "Model", "forward", lambda f: f),
            Patch("json.decoder", "JSONDecoder", "decode", lambda f: print),
        ),
    )
    from json import JSONDecoder

    original = JSONDecoder.decode
    patches.apply()
    assert JSONDecoder.decode is print
    patches.undo()
    assert JSONDecoder.decode is original


def test_the_kernels_import_neither_open_clip_nor_transformers():
    code = (
        "import sys, fastgoal_kernels, fastgoal_kernels.integrations, fastgoal_kernels.distributed;"
        "found = {'open_clip', 'transformers', 'timm'} & set(sys.modules); assert not found, found"
    )
    search = f"import sys; sys.path[:] = {sys.path!r}; "
    done = subprocess.run([sys.executable, "-c", search + code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
