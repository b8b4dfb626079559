"""FastGoalModel against open_clip itself, and against separate passes with reference.py."""

import copy
import inspect
import json
import pickle

import open_clip
import pytest
import torch
import torch.nn.functional as F

from fastgoal_kernels import FastGoalLoss, reference
from fastgoal_models import (
    DEMO_CONFIG,
    FastGoalBatch,
    FastGoalModel,
    stretch_positional_embedding,
)

DEVICES = ["cpu"] + (["cuda"] if torch.cuda.is_available() else [])

# A whole encoder in float32 whose products are summed in another order (another batch size).
CLOSE = dict(rtol=1e-4, atol=1e-5)


def tiny(vision=(), text=(), **settings):
    vision_cfg = dict(image_size=32, patch_size=8, width=32, head_width=16, layers=2)
    text_cfg = dict(context_length=77, width=32, heads=2, layers=2)
    return {
        "embed_dim": 24,
        "vision_cfg": vision_cfg | dict(vision),
        "text_cfg": text_cfg | dict(text),
    } | settings


VARIANTS = {
    "plain": tiny(),
    "quick_gelu": tiny(quick_gelu=True),
    "average pool": tiny({"pool_type": "avg"}),
    "norm after average": tiny({"pool_type": "avg", "final_ln_after_pool": True}),
    "norm after pool": tiny({"final_ln_after_pool": True}),
    "no ln_pre, layer scale": tiny({"no_ln_pre": True, "ls_init_value": 0.1}),
    "tokens returned": tiny({"output_tokens": True}),
    "projection bias": tiny(text={"proj_bias": True}),
    "no text projection": tiny({}, {"width": 24, "heads": 2, "proj_type": "none"}),
    "custom text": tiny(custom_text=True),
    "one-element scale": tiny(nonscalar_logit_scale=True),
}


def build(config=None, device="cpu", **options):
    torch.manual_seed(0)
    return FastGoalModel.create(config or tiny(), **options).to(device).eval()


def make_texts(model, count, generator, longest=200):
    texts = torch.zeros(count, model.context_length, dtype=torch.long)
    lengths = torch.randint(5, longest, (count,), generator=generator)
    for row, length in zip(texts, lengths.tolist(), strict=True):
        row[:length] = torch.randint(1, 49000, (length,), generator=generator)
        row[0], row[length - 1] = 49406, 49407
    return texts, lengths


def make_batch(model, count=3, device="cpu"):
    g = torch.Generator().manual_seed(1)
    side = model.image_size
    texts, lengths = make_texts(model, count, g)
    local_texts, _ = make_texts(model, count, g, longest=20)
    corner = torch.rand(count, 2, generator=g) * 200
    batch = FastGoalBatch(
        images=torch.randn(count, 3, side, side, generator=g),
        texts=texts,
        local_images=torch.randn(count, 3, side, side, generator=g),
        local_texts=local_texts,
        boxes=torch.cat([corner, corner + 20 + 80 * torch.rand(count, 2, generator=g)], dim=1),
        image_sizes=torch.tensor([[300, 320]]).expand(count, 2),
        spans=torch.stack([lengths // 3, lengths - 1], dim=1),
        lengths=lengths,
    )
    return batch.to(device)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("name", VARIANTS)
def test_features_are_open_clips(name, device):
    model = build(VARIANTS[name], device)
    batch = make_batch(model, device=device)
    with torch.no_grad():
        theirs = model.clip.visual(batch.images)
        theirs = theirs[0] if name == "tokens returned" else theirs
        for normalize in (True, False):
            wanted = F.normalize(theirs, dim=-1) if normalize else theirs
            found = model.encode_image(batch.images, normalize=normalize)
            torch.testing.assert_close(found, wanted, rtol=1e-6, atol=1e-6)
            wanted = model.clip.encode_text(batch.texts, normalize=normalize)
            found = model.encode_text(batch.texts, normalize=normalize)
            torch.testing.assert_close(found, wanted, rtol=1e-6, atol=1e-6)


def run_watched(model, call):
    """What the towers' transformers put out during `call`: lists of (batch, tokens, width)."""
    seen = {"image": [], "text": []}
    text = model.clip.text if hasattr(model.clip, "text") else model.clip
    hooks = [
        tower.register_forward_hook(lambda _m, _i, out, name=name: seen[name].append(out))
        for name, tower in (("image", model.clip.visual.transformer), ("text", text.transformer))
    ]
    with torch.no_grad():
        found = call()
    for hook in hooks:
        hook.remove()
    return found, seen


@pytest.mark.parametrize("name", ["plain", "custom text"])
def test_tokens_are_the_last_layers(name):
    model = build(VARIANTS[name])
    batch = make_batch(model)
    (_, patches), seen = run_watched(model, lambda: model.image_tokens(batch.images))
    assert patches.shape == (3, 16, 32)
    assert torch.equal(patches, seen["image"][0][:, 1:])
    (features, words), seen = run_watched(model, lambda: model.text_tokens(batch.texts))
    assert words.shape == (3, 248, 32)
    assert torch.equal(words, seen["text"][0])
    at_end = words[torch.arange(3), batch.lengths - 1]
    torch.testing.assert_close(model.project_words(at_end), features, rtol=1e-6, atol=1e-6)


def test_projections_are_the_towers_own():
    model = build()
    clip = model.clip
    x = torch.randn(2, 5, 32)
    visual = F.layer_norm(x, (32,), clip.visual.ln_post.weight, clip.visual.ln_post.bias)
    torch.testing.assert_close(model.project_patches(x), visual @ clip.visual.proj)
    words = F.layer_norm(x, (32,), clip.ln_final.weight, clip.ln_final.bias)
    torch.testing.assert_close(model.project_words(x), words @ clip.text_projection)


def test_patches_are_row_by_row():
    # Without layers a patch token knows only its own pixels: change those and see which one moves.
    model = build(tiny({"layers": 0}))
    images = torch.zeros(1, 3, 32, 32)
    changed = images.clone()
    changed[:, :, 8:16, 24:32] = 1  # second row of patches, fourth column
    with torch.no_grad():
        moved = (model.image_tokens(images)[1] != model.image_tokens(changed)[1]).any(dim=2)
    assert moved.nonzero()[:, 1].tolist() == [1 * 4 + 3]


def test_later_words_do_not_reach_earlier_ones():
    model = build()
    texts, _ = make_texts(model, 1, torch.Generator().manual_seed(2))
    changed = texts.clone()
    changed[0, 100:] = 7
    with torch.no_grad():
        before, after = model.text_tokens(texts)[1], model.text_tokens(changed)[1]
    assert torch.equal(before[:, :100], after[:, :100])
    assert not torch.equal(before[:, 100], after[:, 100])


def test_texts_may_be_shorter_than_the_context():
    model = build()
    texts, _ = make_texts(model, 4, torch.Generator().manual_seed(2), longest=30)
    with torch.no_grad():
        whole, short = model.encode_text(texts), model.encode_text(texts[:, :40])
    torch.testing.assert_close(short, whole, **CLOSE)


@pytest.mark.parametrize("device", DEVICES)
def test_forward_is_separate_passes_put_together(device):
    model = build(device=device)
    batch = make_batch(model, device=device)
    out, seen = run_watched(model, lambda: model(batch))
    assert [len(x) for x in seen.values()] == [1, 1]  # one pass a tower
    with torch.no_grad():
        wanted = separately(model, batch)
    assert list(out) == list(wanted)
    for name, value in wanted.items():
        torch.testing.assert_close(out[name], value, **CLOSE, msg=lambda m, n=name: f"{n}: {m}")


def separately(model, batch):
    """What forward gives, by an encoder pass for each of its parts."""
    patches, words = model.image_tokens(batch.images)[1], model.text_tokens(batch.texts)[1]
    regions = reference.region_mean(patches, batch.boxes, batch.image_sizes, (4, 4), 32)
    spans = reference.span_mean(words, batch.spans, lengths=batch.lengths)
    return {
        "image_features": model.encode_image(batch.images),
        "text_features": model.encode_text(batch.texts),
        "local_image_features": model.encode_image(batch.local_images),
        "local_text_features": model.encode_text(batch.local_texts),
        "region_features": model.project_patches(regions),
        "span_features": model.project_words(spans),
        "logit_scale": model.clip.logit_scale.exp(),
    }


@pytest.mark.parametrize("output", range(7))
def test_every_output_has_its_gradient(output):
    model = build()
    batch = make_batch(model)
    gradients = []
    for outputs in (model(batch), separately(model, batch)):
        value = list(outputs.values())[output]
        weight = torch.randn(value.shape, generator=torch.Generator().manual_seed(3))
        model.zero_grad()
        (value * weight).sum().backward()
        gradients.append({n: p.grad for n, p in model.named_parameters() if p.grad is not None})
    found, wanted = gradients
    assert wanted.keys() == {name for name, gradient in found.items() if gradient.any()}
    for name, gradient in wanted.items():
        # Relative to the whole: the sums over tokens cancel in single elements.
        assert (found[name] - gradient).norm() <= 1e-4 * gradient.norm(), name


def test_forward_gives_the_losss_arguments():
    model = build()
    wanted = [p for p in inspect.signature(FastGoalLoss.forward).parameters if p != "self"]
    wanted.remove("output_dict")
    assert list(model(make_batch(model))) == wanted


@pytest.mark.parametrize("name", ["plain", "custom text", "one-element scale"])
def test_the_loss_trains_every_parameter(name):
    model = build(VARIANTS[name]).train()
    FastGoalLoss()(**model(make_batch(model))).sum().backward()
    still = [n for n, p in model.named_parameters() if p.grad is None or not p.grad.any()]
    assert still == []


def test_narrow_local_texts_change_nothing():
    model = build()
    batch = make_batch(model)
    with torch.no_grad():
        wide, narrow = model(batch), model(batch._replace(local_texts=batch.local_texts[:, :20]))
    for name in wide:
        assert torch.equal(wide[name], narrow[name])


def test_an_empty_batch():
    model = build()
    out = model(FastGoalBatch(*(x[:0] for x in make_batch(model))))
    assert out["region_features"].shape == out["text_features"].shape == (0, 24)


@pytest.mark.parametrize("device", DEVICES)
def test_compiles_as_one_graph(device):
    model = build(device=device)
    batch = make_batch(model, device=device)
    torch.compiler.reset()
    # Only the capture is ours to prove: what a backend makes of the graph is the backend's.
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    found, wanted = compiled(batch), model(batch)
    for name in wanted:
        torch.testing.assert_close(found[name], wanted[name], **CLOSE)


@pytest.mark.parametrize("device", DEVICES)
def test_autocast(device):
    model = build(device=device).train()
    batch = make_batch(model, device=device)
    with torch.autocast(device, dtype=torch.bfloat16):
        out = model(batch)
        loss = FastGoalLoss()(**out)
    loss.backward()
    exact = model(batch)
    for name in ("region_features", "span_features", "image_features"):
        # bf16 keeps 8 bits; two layers of it, relative to the size of the whole
        error = (out[name].float() - exact[name]).norm() / exact[name].norm()
        assert error < 0.03
    assert all(torch.isfinite(p.grad).all() for p in model.parameters())


def test_gradient_checkpointing_changes_no_gradient():
    model = build().train()
    gradients = []
    for enable in (False, True):
        model.set_grad_checkpointing(enable)
        model.zero_grad()
        FastGoalLoss()(**model(make_batch(model))).backward()
        gradients.append([p.grad.clone() for p in model.parameters()])
    for plain, checkpointed in zip(*gradients, strict=True):
        torch.testing.assert_close(checkpointed, plain, rtol=1e-5, atol=1e-7)


# -- the stretch in the model ---------------------------------------------------------------------


@pytest.mark.parametrize("name", ["plain", "custom text"])
def test_the_texts_positions_are_stretched(name):
    config = dict(VARIANTS[name])
    torch.manual_seed(0)
    plain = (open_clip.CustomTextCLIP if config.pop("custom_text", False) else open_clip.CLIP)(
        **config
    )
    text = plain.text if hasattr(plain, "text") else plain
    positions = text.positional_embedding.detach().clone()
    model = FastGoalModel(plain)
    assert model.clip is plain
    assert torch.equal(text.positional_embedding, stretch_positional_embedding(positions))
    assert text.positional_embedding.requires_grad
    assert plain.context_length == text.context_length == model.context_length == 248
    assert torch.equal(text.attn_mask, torch.full((248, 248), -torch.inf).triu(1))
    assert model.tokenizer("a cat").shape == (1, 248)
    assert not any("attn_mask" in key for key in model.state_dict())


def test_a_stretched_model_is_left_alone():
    first = build()
    positions = first.clip.positional_embedding
    second = FastGoalModel(first.clip)
    assert second.clip.positional_embedding is positions


def test_locked_positions_stay_locked():
    clip = open_clip.CLIP(**tiny())
    clip.positional_embedding.requires_grad_(False)
    assert not FastGoalModel(clip).clip.positional_embedding.requires_grad


def test_state_dict_goes_round():
    first, second = build(), FastGoalModel.create(tiny())
    batch = make_batch(first)
    second.load_state_dict(first.state_dict())
    assert all(key.startswith("clip.") for key in first.state_dict())
    with torch.no_grad():
        assert torch.equal(second.eval().encode_text(batch.texts), first.encode_text(batch.texts))


def test_copies_and_pickles():
    model = build()
    batch = make_batch(model)
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        with torch.no_grad():
            assert torch.equal(twin(batch)["span_features"], model(batch)["span_features"])


# -- create ---------------------------------------------------------------------------------------


def test_create_from_a_file_and_at_another_size(tmp_path):
    path = tmp_path / "model.json"
    path.write_text(json.dumps(tiny()))
    for source in (path, str(path), tiny()):
        model = FastGoalModel.create(source, context_length=120, image_size=48)
        assert (model.image_size, model.grid_size, model.context_length) == (48, (6, 6), 120)
    assert tiny() == json.loads(path.read_text())


def test_create_by_open_clips_name(tmp_path):
    (tmp_path / "fastgoal-test-tiny.json").write_text(json.dumps(tiny()))
    open_clip.add_model_config(tmp_path / "fastgoal-test-tiny.json")
    model = FastGoalModel.create("fastgoal-test-tiny", image_size=64)
    assert (model.image_size, model.context_length) == (64, 248)


@pytest.mark.parametrize("tag, quick_gelu", [("openai", True), ("laion2b_s34b_b88k", False)])
def test_activation_follows_the_pretrained_weights(monkeypatch, tag, quick_gelu):
    asked = {}

    def create_model(name, **options):
        asked.update(options, name=name)
        return open_clip.CLIP(**tiny())

    monkeypatch.setattr(open_clip, "create_model", create_model)
    FastGoalModel.create("ViT-B-16", tag)
    assert (asked["name"], asked["pretrained"]) == ("ViT-B-16", tag)
    assert asked["force_quick_gelu"] is quick_gelu


@pytest.mark.parametrize("custom_text", [False, True])
def test_weights_from_files(tmp_path, custom_text):
    config = tiny(custom_text=custom_text)
    stretched = build(config)
    batch = make_batch(stretched)
    torch.save(stretched.state_dict(), tmp_path / "ours.pt")
    torch.save(stretched.clip.state_dict(), tmp_path / "clip.pt")
    torch.manual_seed(5)
    for name in ("ours.pt", "clip.pt"):  # 248 positions already: taken as they are
        model = FastGoalModel.create(config, tmp_path / name).eval()
        with torch.no_grad():
            assert torch.equal(model.encode_text(batch.texts), stretched.encode_text(batch.texts))
            assert torch.equal(
                model.encode_image(batch.images), stretched.encode_image(batch.images)
            )

    plain = FastGoalModel.create(config, context_length=77).clip
    torch.save(plain.state_dict(), tmp_path / "plain.pt")
    model = FastGoalModel.create(config, str(tmp_path / "plain.pt"))
    name = "text.positional_embedding" if custom_text else "positional_embedding"
    weights, wanted = model.clip.state_dict(), plain.state_dict()
    assert torch.equal(weights.pop(name), stretch_positional_embedding(wanted.pop(name)))
    assert all(torch.equal(weights[key], wanted[key]) for key in wanted)

    larger = FastGoalModel.create(config, tmp_path / "plain.pt", image_size=64)
    assert larger.clip.visual.positional_embedding.shape == (8 * 8 + 1, 32)


def test_safetensors(tmp_path):
    safetensors = pytest.importorskip("safetensors.torch")
    model = build()
    safetensors.save_file(model.state_dict(), tmp_path / "weights.safetensors")
    loaded = FastGoalModel.create(tiny(), tmp_path / "weights.safetensors")
    assert torch.equal(loaded.clip.visual.proj, model.clip.visual.proj)


def test_a_missing_weights_file_is_named():
    with pytest.raises(FileNotFoundError, match=r"nowhere\.pt"):
        FastGoalModel.create(tiny(), "nowhere.pt")


def test_the_demos_model():
    model = FastGoalModel.create(DEMO_CONFIG)
    assert (model.image_size, model.grid_size, model.context_length) == (128, (8, 8), 248)


# -- refused --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "config, error, message",
    [
        (tiny({"attentional_pool": True, "attn_pooler_heads": 2}), ValueError, "attentional_pool"),
        (tiny({"pool_type": "none"}), ValueError, "pool_type .* 'none'"),
        (tiny({"patch_dropout": 0.5}), ValueError, "patch_dropout"),
        (tiny({"image_size": (32, 40)}), ValueError, "square"),
        (tiny({"layers": (1, 1, 1, 1)}), TypeError, "ModifiedResNet"),
        (tiny(text={"pool_type": "last"}), ValueError, "'last'"),
        (tiny(text={"vocab_size": 1000}), ValueError, "vocabulary of 1000"),
        (tiny(text={"no_causal_mask": True}, custom_text=True), ValueError, "causal"),
        (tiny(text={"embed_cls": True}, custom_text=True), ValueError, "class token"),
        (tiny(multimodal_cfg={}), ValueError, "multimodal_cfg"),
    ],
)
def test_unfit_towers_are_named(config, error, message):
    with pytest.raises(error, match=message):
        FastGoalModel.create(config)


def test_other_modules_are_named():
    with pytest.raises(TypeError, match="Linear"):
        FastGoalModel(torch.nn.Linear(2, 2))


def test_a_context_that_can_not_be_reached():
    with pytest.raises(ValueError, match=r"77 .* to 248"):
        FastGoalModel.create(tiny(), context_length=300)


@pytest.mark.parametrize("shape", [(2, 3, 32, 40), (2, 1, 32, 32), (3, 32, 32)])
def test_wrong_images(shape):
    with pytest.raises(ValueError, match=r"images must have shape \(N, 3, 32, 32\)"):
        build().image_tokens(torch.zeros(shape))


@pytest.mark.parametrize("name", ["images", "local_images"])
def test_mixed_image_sizes(name):
    model = build()
    batch = make_batch(model)
    batch = batch._replace(**{name: torch.zeros(len(batch.images), 3, 48, 48)})
    with pytest.raises(ValueError, match=rf"^{name} must have shape \(N, 3, 32, 32\).*image_size"):
        model(batch)


@pytest.mark.parametrize("shape", [(2, 249), (5,)])
def test_wrong_texts(shape):
    with pytest.raises(ValueError, match=r"texts must have shape .* 248"):
        build().text_tokens(torch.zeros(shape, dtype=torch.long))
