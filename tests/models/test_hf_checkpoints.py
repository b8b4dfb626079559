"""Hugging Face's CLIP weights as open_clip's and back: same features, same bits, safe files."""

from __future__ import annotations

import json
import re
from pathlib import Path

import open_clip
import pytest
import torch
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

from fastgoal_models.checkpoints import save_checkpoint
from fastgoal_models.cli import app
from fastgoal_models.fast_goal import FastGoalModel
from fastgoal_models.hf_checkpoints import (
    ClipSettings,
    HfCheckpointError,
    hf_config,
    hf_from_open_clip,
    layout_of,
    open_clip_from_hf,
    read_weights,
    settings_from_hf,
    sizes_of,
)

VOCABULARY, PIXELS = 49408, 32
# Nothing equal that need not be: widths, heads, layers and MLPs of both towers, and the features.
TINY = {
    "embed_dim": 24,
    "vision_cfg": {"image_size": PIXELS, "patch_size": 8, "layers": 3, "width": 32,
                   "head_width": 16, "mlp_ratio": 2.0},
    "text_cfg": {"context_length": 77, "vocab_size": VOCABULARY, "layers": 2, "width": 40,
                 "heads": 5},
}  # fmt: skip
SETTINGS = ClipSettings(image_heads=2, text_heads=5, activation="quick_gelu")


def tiny_config(positions: int = 77, quick_gelu: bool = True) -> dict:
    text = TINY["text_cfg"] | {"context_length": positions}
    return TINY | {"text_cfg": text, "quick_gelu": quick_gelu}


def tiny_open_clip(positions: int = 77, quick_gelu: bool = True, seed: int = 0) -> open_clip.CLIP:
    model = open_clip.CLIP(**tiny_config(positions, quick_gelu)).eval()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        # Biases, norms and the scale too: as they start, one could be taken for another.
        for parameter in model.parameters():
            parameter += 0.3 * torch.randn(parameter.shape, generator=generator)
    return model


@pytest.fixture(scope="module")
def open_clip_weights() -> dict[str, torch.Tensor]:
    return tiny_open_clip().state_dict()


def tiny_hf(positions: int = 77, activation: str = "quick_gelu"):
    transformers = pytest.importorskip("transformers")
    weights = tiny_open_clip(positions).state_dict()
    settings = ClipSettings(SETTINGS.image_heads, SETTINGS.text_heads, activation)
    model = transformers.CLIPModel(
        transformers.CLIPConfig(**hf_config(sizes_of(weights), settings))
    ).eval()
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.3 * torch.randn(parameter.shape, generator=generator)
    return model


def inputs(positions: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Random pictures, and captions of all lengths with CLIP's start and end tokens."""
    generator = torch.Generator().manual_seed(2)
    images = torch.randn(5, 3, PIXELS, PIXELS, generator=generator)
    texts = torch.zeros(5, positions, dtype=torch.int64)
    for row, length in zip(texts, (2, 3, 20, positions // 2, positions), strict=True):
        row[:length] = torch.randint(1, VOCABULARY - 2, (length,), generator=generator)
        row[0], row[length - 1] = VOCABULARY - 2, VOCABULARY - 1
    return images, texts


def open_clip_features(model, positions: int):
    images, texts = inputs(positions)
    with torch.no_grad():
        return model(images, texts)[:3]


def hf_features(model, positions: int):
    images, texts = inputs(positions)
    with torch.no_grad():
        outputs = model(input_ids=texts, pixel_values=images)
    return outputs.image_embeds, outputs.text_embeds, model.logit_scale.exp()


def assert_same_features(got, want) -> None:
    # Unit vectors in float32 through three layers, with attention and norms computed another way.
    for one, other in zip(got, want, strict=True):
        assert (one - other).norm() / other.norm() < 1e-5


# ---------------------------------------------------------------------------------------------
# The two layouts
# ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("positions", [77, 248])
@pytest.mark.parametrize("activation", ["quick_gelu", "gelu"])
def test_hf_weights_give_the_same_features_in_open_clip(positions, activation):
    hf = tiny_hf(positions, activation)
    model = tiny_open_clip(positions, activation == "quick_gelu", seed=9)
    model.load_state_dict(open_clip_from_hf(hf.state_dict()))
    assert_same_features(open_clip_features(model, positions), hf_features(hf, positions))


@pytest.mark.parametrize("positions", [77, 248])
def test_open_clip_weights_give_the_same_features_in_hf(positions):
    model, hf = tiny_open_clip(positions), tiny_hf(positions)
    hf.load_state_dict(hf_from_open_clip(model.state_dict()))
    assert_same_features(hf_features(hf, positions), open_clip_features(model, positions))


def test_the_comparison_would_see_the_wrong_activation():
    hf = tiny_hf(activation="gelu")
    model = tiny_open_clip(quick_gelu=True)
    model.load_state_dict(open_clip_from_hf(hf.state_dict()))
    with pytest.raises(AssertionError):
        assert_same_features(open_clip_features(model, 77), hf_features(hf, 77))


def assert_same_bits(got, want) -> None:
    assert got.keys() == want.keys()
    for name, tensor in want.items():
        assert got[name].dtype == tensor.dtype and torch.equal(got[name], tensor), name


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_there_and_back_is_the_same_bits(dtype, open_clip_weights):
    weights = {name: tensor.to(dtype) for name, tensor in open_clip_weights.items()}
    in_hf = hf_from_open_clip(weights)
    assert_same_bits(open_clip_from_hf(in_hf), weights)
    assert_same_bits(hf_from_open_clip(open_clip_from_hf(in_hf)), in_hf)


@pytest.mark.parametrize("name", ["ViT-B-16-quickgelu", "ViT-L-14-quickgelu", "ViT-H-14"])
@pytest.mark.parametrize("positions", [77, 248])
def test_published_models_have_all_names_and_shapes(name, positions):
    transformers = pytest.importorskip("transformers")
    config = open_clip.get_model_config(name)
    config["text_cfg"]["context_length"] = positions
    width, head_width = config["vision_cfg"]["width"], config["vision_cfg"].get("head_width", 64)
    settings = ClipSettings(width // head_width, config["text_cfg"]["heads"], "quick_gelu")
    with torch.device("meta"):
        want = open_clip.CLIP(**config).state_dict()
        sizes = sizes_of(want)
        in_hf = transformers.CLIPModel(transformers.CLIPConfig(**hf_config(sizes, settings)))
    in_hf = in_hf.state_dict()
    assert sizes.text_positions == positions and sizes.image_size == 224
    for got, expected in ((open_clip_from_hf(in_hf), want), (hf_from_open_clip(want), in_hf)):
        assert {n: x.shape for n, x in got.items()} == {n: x.shape for n, x in expected.items()}


def test_position_ids_of_older_releases_are_left_out(open_clip_weights):
    in_hf = hf_from_open_clip(open_clip_weights)
    for tower, count in (("text", 77), ("vision", 17)):
        in_hf[f"{tower}_model.embeddings.position_ids"] = torch.arange(count)[None]
    assert_same_bits(open_clip_from_hf(in_hf), open_clip_weights)


@pytest.mark.parametrize("prefix", ["module.", "module._orig_mod.", "clip.", "module.clip."])
def test_prefixes_of_wrappers_are_taken_off(prefix, open_clip_weights):
    in_hf = hf_from_open_clip(open_clip_weights)
    wrapped = {prefix + name: tensor for name, tensor in in_hf.items()}
    assert layout_of(wrapped) == "hf"
    assert_same_bits(open_clip_from_hf(wrapped), open_clip_weights)
    wrapped = {prefix + name: tensor for name, tensor in open_clip_weights.items()}
    assert layout_of(wrapped) == "open-clip"
    assert_same_bits(hf_from_open_clip(wrapped), in_hf)


def test_a_text_tower_of_its_own_is_the_same(open_clip_weights):
    model = open_clip.CustomTextCLIP(**tiny_config())
    plain = open_clip.CLIP(**tiny_config())
    converted = hf_from_open_clip(model.state_dict())
    plain.load_state_dict(open_clip_from_hf(converted))
    model.eval(), plain.eval()
    assert_same_features(open_clip_features(plain, 77), open_clip_features(model, 77))


def test_converted_weights_can_be_saved(tmp_path, open_clip_weights):
    # safetensors is particular about views: q, k and v are pieces of one tensor.
    save_file(hf_from_open_clip(open_clip_weights), tmp_path / "hf.safetensors")
    save_file(
        open_clip_from_hf(load_file(tmp_path / "hf.safetensors")), tmp_path / "oc.safetensors"
    )
    assert_same_bits(load_file(tmp_path / "oc.safetensors"), open_clip_weights)


def test_missing_and_unexpected_names_are_listed(open_clip_weights):
    in_hf = hf_from_open_clip(open_clip_weights)
    del in_hf["vision_model.encoder.layers.1.self_attn.k_proj.bias"]
    in_hf["classifier.weight"] = torch.zeros(1)
    with pytest.raises(HfCheckpointError) as raised:
        open_clip_from_hf(in_hf)
    assert "1 missing: vision_model.encoder.layers.1.self_attn.k_proj.bias" in str(raised.value)
    assert "1 unexpected: classifier.weight" in str(raised.value)

    weights = dict(open_clip_weights) | {"logit_bias": torch.zeros(())}
    del weights["visual.proj"]
    with pytest.raises(HfCheckpointError, match=r"1 missing: visual\.proj; 1 unexpected: logit_b"):
        hf_from_open_clip(weights)


def test_long_lists_of_names_are_shortened(open_clip_weights):
    in_hf = hf_from_open_clip(open_clip_weights)
    text_alone = {name: x for name, x in in_hf.items() if not name.startswith("vision_model")}
    with pytest.raises(HfCheckpointError, match=r"7 missing: .*vision_model\.pre_layrnorm\.weight"):
        open_clip_from_hf(text_alone)
    with pytest.raises(HfCheckpointError, match=r"and 3 more; 73 unexpected: .*, and 63 more"):
        open_clip_from_hf(open_clip_weights)


def test_neither_layout_is_said_to_be_neither():
    assert layout_of({"fc.weight": 0}) is None


@pytest.mark.parametrize("acts, named", [(("gelu_new",) * 2, "gelu_new"), (("gelu", "relu"), "r")])
def test_activations_that_open_clip_lacks_are_named(acts, named):
    config = {"text_config": {"hidden_act": acts[0]}, "vision_config": {"hidden_act": acts[1]}}
    with pytest.raises(HfCheckpointError, match=named):
        settings_from_hf(config)


def test_what_a_hf_config_leaves_out_is_its_default():
    transformers = pytest.importorskip("transformers")
    default = transformers.CLIPConfig()
    want = ClipSettings(
        default.vision_config.num_attention_heads,
        default.text_config.num_attention_heads,
        default.text_config.hidden_act,
    )
    assert settings_from_hf({"model_type": "clip", "text_config": None}) == want


# ---------------------------------------------------------------------------------------------
# Files
# ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("suffix", [".bin", ".pt", ".pth", ".safetensors"])
def test_every_kind_of_file_is_read(tmp_path, suffix, open_clip_weights):
    path = tmp_path / f"weights{suffix}"
    (save_file if suffix == ".safetensors" else torch.save)(open_clip_weights, path)
    assert_same_bits(read_weights(path), open_clip_weights)


@pytest.mark.parametrize("key", ["state_dict", "model_state_dict", "model"])
def test_a_training_checkpoint_is_read(tmp_path, key, open_clip_weights):
    optimizer = {"state": {0: {"step": torch.ones(())}}, "param_groups": [{"lr": 1e-3}]}
    content = {"epoch": 3, "name": "run", "optimizer": optimizer, key: open_clip_weights}
    torch.save(content, tmp_path / "epoch_3.pt")
    assert_same_bits(read_weights(tmp_path / "epoch_3.pt"), open_clip_weights)


def test_the_weights_of_a_folder_are_found(tmp_path, open_clip_weights):
    torch.save(open_clip_weights, tmp_path / "pytorch_model.bin")
    assert_same_bits(read_weights(tmp_path), open_clip_weights)
    with pytest.raises(FileNotFoundError, match=r"model\.safetensors, pytorch_model\.bin"):
        read_weights(_empty(tmp_path / "empty"))
    with pytest.raises(FileNotFoundError):
        read_weights(tmp_path / "no-such-file.pt")


def _empty(folder: Path) -> Path:
    folder.mkdir()
    return folder


class Trap:
    """Unpickled by a careless reader, it leaves a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


def test_no_code_of_a_file_is_run(tmp_path, open_clip_weights):
    torch.save({"state_dict": open_clip_weights, "trap": Trap(tmp_path / "run")}, tmp_path / "a.pt")
    with pytest.raises(HfCheckpointError, match="could run code"):
        read_weights(tmp_path / "a.pt")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("name", ["weights.safetensors", "weights.pt"])
def test_a_damaged_file_is_named(tmp_path, name, open_clip_weights):
    path = tmp_path / name
    (save_file if name.endswith("s") else torch.save)(open_clip_weights, path)
    path.write_bytes(path.read_bytes()[:1000])
    with pytest.raises(HfCheckpointError, match=re.escape(str(path))):
        read_weights(path)


@pytest.mark.parametrize("content", [{"epoch": 1, "lr": 0.1}, [torch.ones(2)], {}])
def test_a_file_without_a_state_dict_is_refused(tmp_path, content):
    torch.save(content, tmp_path / "a.pt")
    with pytest.raises(HfCheckpointError, match="holds no state dict"):
        read_weights(tmp_path / "a.pt")


# ---------------------------------------------------------------------------------------------
# fastgoal convert
# ---------------------------------------------------------------------------------------------


def convert(*arguments: object):
    done = CliRunner().invoke(app, ["convert", *map(str, arguments)], env={"COLUMNS": "300"})
    text = re.sub(r"\x1b\[[0-9;]*m", "", done.output)
    assert done.exception is None or isinstance(done.exception, SystemExit), done.exception
    return done.exit_code, text


@pytest.fixture
def built_in(tmp_path):
    """The tiny models, as open_clip's own for the time of a test; their JSON files' folder."""
    folder = _empty(tmp_path / "configs")
    for quick_gelu in (True, False):
        path = folder / f"tiny{'-quickgelu' * quick_gelu}.json"
        path.write_text(json.dumps(tiny_config(quick_gelu=quick_gelu)))
    before = set(open_clip.list_models())
    open_clip.add_model_config(folder)
    yield folder
    for name in set(open_clip.list_models()) - before:
        open_clip.factory._MODEL_CONFIGS.pop(name)


@pytest.mark.parametrize("positions", [77, 248])
def test_convert_to_open_clip_and_load_it_everywhere(tmp_path, built_in, positions):
    hf = tiny_hf(positions)
    hf.save_pretrained(tmp_path / "goal")
    target = tmp_path / "out" / "goal.safetensors"
    code, text = convert(tmp_path / "goal", target, "--to", "open-clip")
    assert code == 0, text
    for fact in ("32 wide, 3 layers, 32 pixels in patches of 8", "40 wide, 2 layers",
                 f"{positions} positions", "49408 tokens", "features    24", "float32",
                 "activation  quick_gelu", "--model tiny-quickgelu --pretrained"):  # fmt: skip
        assert fact in text
    assert "--model tiny " not in text
    # The line it prints, and what `fastgoal train --model tiny-quickgelu --pretrained` does.
    line = re.search(r"open_clip\.create_model\(.*\)", text)[0]
    model = eval(line, {"open_clip": open_clip}).eval()
    assert_same_features(open_clip_features(model, positions), hf_features(hf, positions))
    trained = FastGoalModel.create("tiny-quickgelu", target, context_length=248).eval()
    image, words, _ = hf_features(hf, positions)
    images, texts = inputs(positions)
    with torch.no_grad():
        assert_same_features([trained.encode_image(images)], [image])
        if positions == 248:  # 77 are stretched, which moves all but the first 20
            assert_same_features([trained.encode_text(texts)], [words])


def test_convert_from_training_to_hf(tmp_path, built_in):
    transformers = pytest.importorskip("transformers")
    model = FastGoalModel(tiny_open_clip(248), 248)
    run = {"model": "tiny-quickgelu", "pretrained": None}
    checkpoint = save_checkpoint(tmp_path / "checkpoints", 3, model.state_dict(), {}, run)
    code, text = convert(checkpoint, tmp_path / "hf", "--to", "hf")
    assert code == 0 and "CLIPModel.from_pretrained" in text, text
    hf = transformers.CLIPModel.from_pretrained(tmp_path / "hf").eval()
    assert_same_features(hf_features(hf, 248), open_clip_features(model.clip, 248))
    # And back: nothing was lost.
    code, text = convert(tmp_path / "hf", tmp_path / "back.safetensors", "--to", "open-clip")
    assert code == 0, text
    assert_same_bits(load_file(tmp_path / "back.safetensors"), dict(model.clip.state_dict()))


def test_convert_takes_the_activation_of_the_pretrained_tag(tmp_path, built_in, monkeypatch):
    run = {"model": "tiny", "pretrained": "openai"}
    weights = tiny_open_clip().state_dict()
    checkpoint = save_checkpoint(tmp_path / "checkpoints", 3, weights, {}, run)
    monkeypatch.setattr(open_clip, "get_pretrained_cfg", lambda *_: {"quick_gelu": True})
    convert(checkpoint, tmp_path / "hf", "--to", "hf")
    config = json.loads((tmp_path / "hf" / "config.json").read_text())
    assert settings_from_hf(config) == SETTINGS


def test_convert_asks_for_what_the_weights_do_not_tell(tmp_path, built_in):
    torch.save(tiny_open_clip().state_dict(), tmp_path / "a.pt")
    code, text = convert(tmp_path / "a.pt", tmp_path / "hf", "--to", "hf")
    assert code == 2 and "--model tiny or tiny-quickgelu" in text
    assert not (tmp_path / "hf").exists()
    model = built_in / "tiny-quickgelu.json"
    for asked in (model, "tiny-quickgelu"):
        code, text = convert(tmp_path / "a.pt", tmp_path / "hf", "--to", "hf", "--model", asked,
                             "--force")  # fmt: skip
        assert code == 0, text
        config = json.loads((tmp_path / "hf" / "config.json").read_text())
        assert settings_from_hf(config) == SETTINGS
    # A file of weights alone needs neither.
    assert convert(tmp_path / "a.pt", tmp_path / "hf.safetensors", "--to", "hf")[0] == 0


@pytest.mark.parametrize(
    "model, named",
    [
        ("ViT-B-16", "these are not the weights of ViT-B-16"),
        ("no-such-model", "open_clip has no model 'no-such-model'"),
        ("no-such-file.json", "open_clip has no model"),
        ("coca_ViT-B-32", "more than a CLIP"),
        ("RN50", "more than a CLIP"),
    ],
)
def test_convert_refuses_another_model(tmp_path, model, named):
    torch.save(tiny_open_clip().state_dict(), tmp_path / "a.pt")
    code, text = convert(tmp_path / "a.pt", tmp_path / "hf", "--to", "hf", "--model", model)
    assert code == 2 and named in text


def test_convert_without_a_config_says_what_is_not_known(tmp_path, built_in, open_clip_weights):
    torch.save(hf_from_open_clip(open_clip_weights), tmp_path / "goal.pth")
    code, text = convert(tmp_path / "goal.pth", tmp_path / "a.safetensors", "--to", "open-clip")
    assert code == 0 and "activation  not in the weights" in text
    assert "--model tiny --pretrained" in text and "--model tiny-quickgelu --pretrained" in text
    assert_same_bits(load_file(tmp_path / "a.safetensors"), open_clip_weights)


def test_convert_overwrites_only_when_told_to(tmp_path, open_clip_weights):
    torch.save(hf_from_open_clip(open_clip_weights), tmp_path / "goal.pth")
    target = tmp_path / "a.safetensors"
    target.write_text("precious")
    code, text = convert(tmp_path / "goal.pth", target, "--to", "open-clip")
    assert code == 2 and "--force" in text and target.read_text() == "precious"
    assert convert(tmp_path / "goal.pth", target, "--to", "open-clip", "--force")[0] == 0
    assert_same_bits(load_file(target), open_clip_weights)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.safetensors", "goal.pth"]


def test_convert_says_what_is_wrong_with_its_arguments(tmp_path, open_clip_weights):
    torch.save(open_clip_weights, tmp_path / "a.pt")
    torch.save({"fc.weight": torch.ones(2)}, tmp_path / "b.pt")
    for source, target, to, named in (
        ("a.pt", "x.safetensors", "open-clip", "open_clip's layout already. Fix: --to hf"),
        ("a.pt", "x.pt", "open-clip", "must be a .safetensors file"),
        ("b.pt", "x.safetensors", "open-clip", "unexpected: fc.weight"),
        ("b.pt", "x.safetensors", "hf", "unexpected: fc.weight"),
        ("none.pt", "x.safetensors", "hf", "SOURCE: there is no file"),
    ):
        code, text = convert(tmp_path / source, tmp_path / target, "--to", to)
        assert code == 2 and named in text, text
        assert not (tmp_path / target).exists()
