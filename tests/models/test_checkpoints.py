"""Checkpoints: whole or not there, verified when read, and never code."""

import json
import pickle
from pathlib import Path

import pytest
import torch

from fastgoal_models.atomic_files import write_text_atomically
from fastgoal_models.checkpoints import (
    CheckpointError,
    _fingerprint,
    complete_checkpoints,
    latest_checkpoint,
    load_checkpoint,
    prune_checkpoints,
    save_checkpoint,
)

WEIGHTS = {"a": torch.arange(6.0).reshape(2, 3).T, "scale": torch.tensor(2.5)}
STATE = {"optimizer": {"step": torch.tensor(3.0), "betas": (0.9, 0.98)}, "random": [1, (2, None)]}
CONFIG = {"seed": 1, "lr": 1e-4, "name": "é"}


def save(folder: Path, step: int = 7) -> Path:
    return save_checkpoint(folder, step, WEIGHTS, STATE, CONFIG)


def test_what_was_saved_is_what_is_read(tmp_path):
    path = save(tmp_path / "checkpoints")
    found = load_checkpoint(path)
    assert (found.path, found.step, found.config) == (path, 7, CONFIG)
    assert found.weights.keys() == WEIGHTS.keys()
    for name, tensor in WEIGHTS.items():
        assert torch.equal(found.weights[name], tensor)
    assert found.state["random"] == STATE["random"]
    assert torch.equal(found.state["optimizer"]["step"], torch.tensor(3.0))


def test_tensors_that_share_memory_are_saved(tmp_path):
    shared = torch.arange(4.0)
    path = save_checkpoint(tmp_path, 1, {"x": shared, "y": shared[:2]}, {}, {})
    found = load_checkpoint(path).weights
    assert torch.equal(found["x"], shared) and torch.equal(found["y"], shared[:2])


def test_latest_is_by_step_and_ignores_what_is_not_whole(tmp_path):
    assert latest_checkpoint(tmp_path / "nowhere") is None
    for step in (9, 100, 20):
        save(tmp_path, step)
    (tmp_path / "step-00000300").mkdir()  # no manifest: somebody else's, or half copied
    (tmp_path / ".writing-step-00000400-abcd").mkdir()
    (tmp_path / "step-500.txt").write_text("")
    assert latest_checkpoint(tmp_path) == tmp_path / "step-00000100"
    assert [path.name for path in complete_checkpoints(tmp_path)] == [
        "step-00000009", "step-00000020", "step-00000100",
    ]  # fmt: skip


def test_keep_deletes_the_oldest(tmp_path):
    for step in (1, 2, 3):
        save(tmp_path, step)
        prune_checkpoints(tmp_path, 2)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step-00000002", "step-00000003"]


def test_saving_a_step_again_replaces_it(tmp_path):
    save(tmp_path, 5)
    save_checkpoint(tmp_path, 5, {"a": torch.zeros(2)}, {}, {})
    assert load_checkpoint(tmp_path / "step-00000005").weights.keys() == {"a"}
    assert len(list(tmp_path.iterdir())) == 1


def test_a_failed_save_leaves_nothing(tmp_path):
    with pytest.raises(TypeError):
        save_checkpoint(tmp_path, 1, WEIGHTS, STATE, {"not json": object()})
    assert list(tmp_path.iterdir()) == []


def test_leftovers_of_a_killed_process_are_swept_away(tmp_path):
    (tmp_path / ".writing-step-00000001-dead").mkdir()
    save(tmp_path, 2)
    assert [path.name for path in tmp_path.iterdir()] == ["step-00000002"]


@pytest.mark.parametrize("name", ["model.safetensors", "state.pt"])
@pytest.mark.parametrize("damage", ["flip", "cut", "remove"])
def test_a_damaged_file_is_refused_by_name(tmp_path, name, damage):
    older = save(tmp_path, 6)
    path = save(tmp_path, 7)
    data = bytearray((path / name).read_bytes())
    if damage == "flip":
        data[len(data) // 2] ^= 1
        (path / name).write_bytes(data)
    elif damage == "cut":
        (path / name).write_bytes(data[:-1])
    else:
        (path / name).unlink()
    with pytest.raises(CheckpointError, match=name) as refused:
        load_checkpoint(path)
    assert str(path) in str(refused.value)
    assert f"resume from {older} instead" in str(refused.value)


@pytest.mark.parametrize("text", ["", "{", "[]", '{"format": 1}', '{"format": 1, "step": "x"}'])
def test_a_damaged_manifest_is_refused(tmp_path, text):
    path = save(tmp_path)
    (path / "checkpoint.json").write_text(text)
    with pytest.raises(CheckpointError, match=r"checkpoint\.json"):
        load_checkpoint(path)


def test_another_format_is_refused(tmp_path):
    path = save(tmp_path)
    manifest = json.loads((path / "checkpoint.json").read_text())
    (path / "checkpoint.json").write_text(json.dumps(manifest | {"format": 99}))
    with pytest.raises(CheckpointError, match="format 99"):
        load_checkpoint(path)


def test_a_missing_folder_is_refused(tmp_path):
    with pytest.raises(CheckpointError, match="no checkpoint folder"):
        load_checkpoint(tmp_path / "step-00000001")


class _Touch:
    """Unpickling this creates a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


def test_code_in_a_checkpoint_does_not_run(tmp_path):
    """Even with a manifest that vouches for it."""
    path = save(tmp_path)
    proof = tmp_path / "code-ran"
    torch.save({"optimizer": _Touch(proof)}, path / "state.pt")
    assert pickle.loads(pickle.dumps(_Touch(proof))) is None and proof.exists()  # it would
    proof.unlink()
    other = save_checkpoint(tmp_path, 8, WEIGHTS, {}, CONFIG)
    (other / "state.pt").write_bytes((path / "state.pt").read_bytes())
    manifest = json.loads((other / "checkpoint.json").read_text())
    manifest["files"]["state.pt"] = _fingerprint(other / "state.pt")
    (other / "checkpoint.json").write_text(json.dumps(manifest))
    with pytest.raises(CheckpointError, match=r"state\.pt"):
        load_checkpoint(other)
    assert not proof.exists()


def test_text_is_replaced_in_one_step(tmp_path):
    path = tmp_path / "new" / "report.md"
    write_text_atomically(path, "one\n")
    write_text_atomically(path, "two\n")
    assert path.read_bytes() == b"two\n"
    assert [found.name for found in path.parent.iterdir()] == ["report.md"]
