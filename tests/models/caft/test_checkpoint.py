"""A published checkpoint's names and shapes, strictly, in every wrapping, and what is refused."""

from __future__ import annotations

import pickle
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from fastgoal_models.caft import Caft
from fastgoal_models.checkpoints import CheckpointError

NAMES = Path(__file__).resolve().parents[4] / "shared" / "data" / "caft_b_state_dict.tsv"


def small(kind: str = "sfcn") -> Caft:
    torch.manual_seed(0)
    return Caft.create("caft-xs", superpixels=kind)


def random_weights(shapes: dict[str, tuple[int, ...]]) -> dict[str, Tensor]:
    """Small numbers; variances positive, counters whole."""
    weights = {}
    for name, shape in shapes.items():
        if name.endswith("num_batches_tracked"):
            weights[name] = torch.tensor(100)
        elif name.endswith("running_var"):
            weights[name] = 0.5 + torch.rand(shape)
        else:
            weights[name] = 0.02 * torch.randn(shape)
    return weights


@pytest.mark.slow
@pytest.mark.skipif(not NAMES.is_file(), reason="the list of published names is not here")
def test_the_published_names_load_and_run(tmp_path):
    torch.manual_seed(1)
    rows = [line.split("\t")[:2] for line in NAMES.read_text().splitlines()[1:]]
    shapes = {
        name: () if shape == "scalar" else tuple(int(n) for n in shape.split("x"))
        for name, shape in rows
    }
    assert len(shapes) == 485
    weights = random_weights(shapes)
    torch.save({"module." + name: tensor for name, tensor in weights.items()}, tmp_path / "b.pt")
    model = Caft.from_checkpoint(tmp_path / "b.pt").eval()
    loaded = model.state_dict()
    assert loaded.keys() == weights.keys()
    assert all(torch.equal(loaded[name], tensor) for name, tensor in weights.items())
    with torch.no_grad():
        image = model.encode_image(torch.randn(2, 3, 224, 224), with_hierarchy=True)
        text = model.encode_text(model.tokenizer(["a cat.", "a dog."] * 4).view(1, 8, 77))
    assert image.fine_tokens.shape == (2, 64, 512)
    assert image.fine_features.shape == image.whole_features.shape == (2, 512)
    assert [tuple(x.shape) for x in image.hierarchy.assignments] == [
        (2, 196, 64), (2, 64, 32), (2, 32, 16),
    ]  # fmt: skip
    assert text.part_features.shape == (1, 8, 512) and text.whole_features.shape == (1, 512)
    for tensor in (*image[:3], *text):
        assert tensor.isfinite().all()

    key = "visual.pools.1.pool_block.fc1.1.weight"
    weights[key.replace("fc1", "fc3")] = weights.pop(key)
    torch.save(weights, tmp_path / "renamed.pt")
    with pytest.raises(CheckpointError, match=r"1 missing: visual\.pools\.1.*fc1\.1\.weight;"):
        Caft.from_checkpoint(tmp_path / "renamed.pt")


@pytest.mark.parametrize("wrap", ["plain", "state_dict", "model", "safetensors"])
def test_every_wrapping_loads(wrap, tmp_path):
    weights = {f"module.{name}": x.clone() for name, x in small().state_dict().items()}
    path = tmp_path / ("w.safetensors" if wrap == "safetensors" else "w.pt")
    if wrap == "safetensors":
        save_file(weights, path)
    else:
        file = weights if wrap == "plain" else {"epoch": 3, wrap: weights, "name": "run"}
        torch.save(file, path)
    model = Caft.from_checkpoint(path, "caft-xs")
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, weights[f"module.{name}"])
    assert model.visual.published


def test_other_superpixels_leave_the_network_out(tmp_path):
    torch.save(small().state_dict(), tmp_path / "w.pt")
    model = Caft.from_checkpoint(tmp_path / "w.pt", "caft-xs", superpixels="slic")
    assert not any("superpixel_generator" in name for name in model.state_dict())


def test_what_does_not_fit_is_named(tmp_path):
    weights = small().state_dict()
    del weights["logit_bias"]
    weights["image_post.proj"] = torch.zeros(3, 4)
    weights["extra"] = torch.zeros(1)
    torch.save(weights, tmp_path / "w.pt")
    with pytest.raises(CheckpointError) as error:
        Caft.from_checkpoint(tmp_path / "w.pt", "caft-xs")
    assert "1 missing: logit_bias" in str(error.value)
    assert "1 not known: extra" in str(error.value)
    assert "image_post.proj (3, 4) instead of (128, 128)" in str(error.value)


class _Harmful:
    def __reduce__(self):
        return (Path.touch, (Path("harmed"),))


def test_nothing_a_file_says_is_run(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "w.pt").write_bytes(pickle.dumps({"state_dict": _Harmful()}))
    torch.save({"state_dict": _Harmful()}, tmp_path / "zip.pt")
    for name in ("w.pt", "zip.pt"):
        with pytest.raises(CheckpointError, match="can not be read as weights alone"):
            Caft.from_checkpoint(tmp_path / name, "caft-xs")
    assert not (tmp_path / "harmed").exists()
    with pytest.raises(CheckpointError, match="there is no file"):
        Caft.from_checkpoint(tmp_path / "none.pt", "caft-xs")
    torch.save([1, 2], tmp_path / "list.pt")
    with pytest.raises(CheckpointError, match="holds no state dict"):
        Caft.from_checkpoint(tmp_path / "list.pt", "caft-xs")
