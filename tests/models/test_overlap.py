"""Test images that were trained on: what is compared how, and through which stages of training."""

import json
import tarfile
from pathlib import Path

import pytest

from fastgoal_models import write_glit
from fastgoal_models.errors import ConfigError
from fastgoal_models.evaluation import caption_set
from fastgoal_models.overlap import Overlap, compare, training_images
from fastgoal_models.sets import CaptionedImage, CaptionSet
from fastgoal_models.stages import stages_of
from tests.models.small_models import coloured_records
from tests.models.tuned_run import fastgoal, train, tuned_run


@pytest.fixture
def records(tmp_path):
    return coloured_records(tmp_path)


@pytest.fixture
def captioned(records):
    return caption_set(records, "x")


def lines(path: Path, *images: str) -> Path:
    path.parent.mkdir(exist_ok=True)
    path.write_text("".join(json.dumps({"image": name, "caption": "x"}) + "\n" for name in images))
    return path


def shard(path: Path, **files: Path) -> Path:
    """A shard with these pictures, by their names in it."""
    with tarfile.open(path, "w") as tar:
        for name, file in files.items():
            tar.add(file, f"some/{name}.png")
    return path


def found_in(captioned: CaptionSet, annotations: Path) -> Overlap:
    return compare(captioned, training_images(annotations)[0])


def test_content_decides_where_both_files_are_here(records, captioned, tmp_path):
    data = lines(tmp_path / "far" / "train.jsonl", "another name.png", "green.jpg", "blue.png")
    (tmp_path / "far" / "another name.png").write_bytes(records[0].image.read_bytes())
    (tmp_path / "far" / "green.jpg").write_bytes(b"another camera's picture")
    assert found_in(captioned, data) == Overlap(
        by_content=2,
        by_name=1,
        same_content=("red",),
        same_name=("blue",),  # which is not here
        same_name_other_content=("green",),
    )
    # Other bytes of the same size, too.
    size = records[1].image.stat().st_size
    (tmp_path / "far" / "green.jpg").write_bytes(b"x" * size)
    assert found_in(captioned, data).same_name_other_content == ("green",)
    assert compare(captioned, []) == Overlap()


def test_pictures_in_shards_are_compared_by_content(records, captioned, tmp_path):
    numbered = shard(tmp_path / "part-0.tar", **{"000012": records[2].image})
    assert found_in(captioned, numbered) == Overlap(by_content=1, same_content=("blue",))
    other = tmp_path / "other.png"
    other.write_bytes(records[1].image.read_bytes()[:-1] + b"?")
    differing = found_in(captioned, shard(tmp_path / "part-1.tar", red=other))
    assert differing == Overlap(by_content=1, same_name_other_content=("red",))
    both = found_in(captioned, tmp_path / "part-*.tar")
    assert (both.by_content, both.same_content) == (2, ("blue",))


def test_a_mere_number_is_no_name(records, tmp_path):
    (tmp_path / "12.png").write_bytes(records[2].image.read_bytes() + b"x")
    (tmp_path / "1234567.png").write_bytes(records[2].image.read_bytes() + b"x")
    tested = CaptionSet(
        "x", [CaptionedImage(n, tmp_path / f"{n}.png", ("x",)) for n in ("12", "1234567")]
    )
    data = lines(tmp_path / "far" / "t.jsonl", "12.png", "1234567.png", "0" * 5000 + ".png")
    assert found_in(tested, data) == Overlap(
        by_name=1, not_compared=2, compared_in_part=2, same_name=("1234567",)
    )
    # Without a number among those that are gone, only the numbered test image is left alone.
    named = found_in(tested, lines(tmp_path / "far" / "t.jsonl", "sa_1.png"))
    assert named == Overlap(by_name=1, compared_in_part=1)


def test_files_that_name_images_and_those_that_name_none(captioned, tmp_path):
    far = tmp_path / "far"
    data = lines(far / "train.jsonl", "gone/red.jpg", "gone/green.jpg", "gone/red.jpg")
    data.write_text(data.read_text() + "no json\n" + json.dumps({"caption": "no image"}))
    assert found_in(captioned, data) == Overlap(by_name=2, same_name=("red", "green"))
    with tarfile.open(far / "empty.tar", "w") as tar:  # an empty picture has no content
        tar.addfile(tarfile.TarInfo("some/blue.png"))
        tar.addfile(tarfile.TarInfo("some/blue.json"))
    assert found_in(captioned, far / "empty.tar") == Overlap(by_name=1, same_name=("blue",))
    (far / "empty.jsonl").write_text("no json\n")
    with pytest.raises(ConfigError, match="nothing was compared"):
        training_images(far / "empty.jsonl")
    with pytest.raises(ConfigError, match="no such file"):
        training_images(far / "nowhere.jsonl")
    (far / "none.tar").write_bytes(b"")
    with pytest.raises(ConfigError, match=r"shard is broken: none\.tar"):
        training_images(far / "none.tar")


def test_a_broken_shard_is_read_up_to_there(records, captioned, tmp_path):
    """As training does, which ended in no traceback, either."""
    whole = shard(tmp_path / "part-0.tar", a=records[0].image, b=records[1].image)
    (tmp_path / "part-1.tar").write_bytes(b"")
    with tarfile.open(whole) as tar:
        second = tar.getmembers()[1]
    whole.write_bytes(whole.read_bytes()[: second.offset_data + 9])
    images, report = training_images(tmp_path / "part-*.tar")
    assert report.counts == {"shard is broken": 2}
    found = compare(captioned, images)
    # Of the second its size is known, and not its bytes, which end early.
    assert found == Overlap(by_content=1, by_name=1, same_content=("red",))


# -- stages ---------------------------------------------------------------------------------------


def run(folder: Path, name: str, text: str) -> None:
    (folder / name / "checkpoints" / "step-1").mkdir(parents=True)
    (folder / name / "config.yaml").write_text(text)


def data_of(*names: str) -> list[str]:
    return [str(stage.data) for stage in stages_of(*names)[0]]


def test_every_stage_counts_and_circles_end(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    run(tmp_path, "glit", "data: glit.jsonl\nroot: far\nmodel: ViT-B-16\npretrained: openai\n")
    run(tmp_path, "dci", "data: dci.jsonl\nroot: null\nmodel: glit/checkpoints/step-1\n")
    run(tmp_path, "last", "data: last.jsonl\nmodel: ViT-B-16\npretrained: dci/w.safetensors\n")
    (tmp_path / "dci" / "w.safetensors").write_bytes(b"")
    stages, unknown = stages_of("last")
    assert [(str(s.data), s.root) for s in stages] == [
        ("last.jsonl", None), ("dci.jsonl", None), ("glit.jsonl", Path("far"))
    ]  # fmt: skip
    assert stages[1].note == tmp_path / "dci" / "config.yaml" and unknown == []
    assert data_of("ViT-B-16", "dci/w.safetensors") == ["dci.jsonl", "glit.jsonl"]
    run(tmp_path, "a", "data: a.jsonl\ncheckpoint: b\nmodel: caft-xs\n")
    run(tmp_path, "b", "data: b.jsonl\ncheckpoint: a\nmodel: caft-xs\n")
    assert data_of("a") == ["a.jsonl", "b.jsonl"] and stages_of("b")[1] == []


def test_a_stage_that_can_not_be_read_is_named(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    run(tmp_path, "second", "data: b.jsonl\nmodel: first\n")
    for start in ("first", "x/model.safetensors"):
        option = "model" if start == "first" else "pretrained"
        (tmp_path / "second/config.yaml").write_text(f"data: b.jsonl\n{option}: {start}\n")
        stages, (gap,) = stages_of("second")
        assert len(stages) == 1 and gap.startswith(f"{start}, from which the run of ")
    for broken in ("data: [", "- data", "out: run"):
        (tmp_path / "second/config.yaml").write_text(broken)
        stages, (gap,) = stages_of("second")
        assert stages == [] and "can not be read, or names no data" in gap
    assert stages_of("ViT-B-16", "openai", None) == stages_of("gone") == ([], [])


# -- the command ----------------------------------------------------------------------------------


@pytest.fixture
def tuned(records, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return tuned_run(records)


def overlaps(tmp_path: Path) -> list[dict | None]:
    return [m["overlap"] for m in json.loads((tmp_path / "e.json").read_text())["models"]]


def test_what_a_run_was_trained_on_is_known(tuned, tmp_path):
    for model in ("run", "run/checkpoints/step-00000001"):
        done = fastgoal(*tuned, model)
        assert done.exit_code == 0, done.output
        assert f"trained on trained.jsonl, says {tmp_path / 'run/config.yaml'}" in done.output
        assert "2 test images are among the training images: red, green" in done.output
        (found,) = overlaps(tmp_path)
        assert found is not None and found["same_content"] == ["red", "green"]
        assert found["training_data"] == ["trained.jsonl"] and found["by_content"] == 2
    named = fastgoal(*tuned, "run", "--trained-on", "data.jsonl")
    assert "3 test images are among" in named.output and "says" not in named.output
    lone = json.loads((tmp_path / "data.jsonl").read_text().splitlines()[2])
    (tmp_path / "lone.jsonl").write_text(json.dumps(lone))
    done = fastgoal(*tuned, "run", "--data", "lone.jsonl")
    assert "no test image is among the training images" in done.output
    assert "compared with 2 training images: 2 byte for byte" in done.output
    (tmp_path / "trained.jsonl").unlink()
    done = fastgoal(*tuned, "run")
    assert done.exit_code == 0 and done.output.count("Fix: --trained-on FILE") == 1
    assert "among the training images" not in done.output


def test_the_first_of_two_stages_counts_and_so_does_the_run_before(records, tuned, tmp_path):
    write_glit([*records[2:], *records[:1]], tmp_path / "second.jsonl")
    train("second.jsonl", "run2", "run")
    done = fastgoal(*tuned, "run2", "--before", "run")
    assert done.exit_code == 0, done.output
    before, after = overlaps(tmp_path)
    assert before is not None and before["same_content"] == ["red", "green"]
    assert after is not None and after["same_content"] == ["red", "green", "blue"]
    assert "run, step 1: 2 test images are among the training images: red" in done.output
    (tmp_path / "run").rename(tmp_path / "moved")
    done = fastgoal(*tuned, "run2")
    assert "run, from which the run of" in done.output and "is not here" in done.output
    assert done.output.count("there is not known") == 1 and "red, blue" in done.output


def test_none_is_never_said_of_what_could_not_be_compared(records, tuned, tmp_path):
    write_glit(records[2:], tmp_path / "data.jsonl")
    numbers = lines(tmp_path / "far" / "numbers.jsonl", "1.png", "2.png")
    done = fastgoal(*tuned, "model.json", "--trained-on", numbers)
    assert "2 not at all, as they are not here and are called by numbers" in done.output
    assert "whether test images were trained on is not known" in done.output
    assert "no test image" not in done.output
    named = lines(tmp_path / "far" / "named.jsonl", "a.png")
    done = fastgoal(*tuned, "model.json", "--trained-on", numbers, "--trained-on", named)
    assert "1 of 1 test images could not be compared with all of them" in done.output
    assert "found among the training images that could be compared" in done.output
    done = fastgoal(*tuned, "model.json", "--trained-on", named)
    assert "1 by name alone" in done.output and "no test image is among" in done.output


def test_a_broken_shard_of_a_run_is_said_aloud(records, tuned, tmp_path):
    shard(tmp_path / "part-0.tar", **{"0001": records[0].image})
    (tmp_path / "part-1.tar").write_bytes(b"")
    config = tmp_path / "run" / "config.yaml"
    config.write_text(config.read_text().replace("trained.jsonl", "part-*.tar"))
    done = fastgoal(*tuned, "run")
    assert done.exit_code == 0, done.output
    assert "part-*.tar: 1 × shard is broken: part-1.tar" in done.output
    assert "1 test images are among the training images: red" in done.output
    write_glit(records[2:], tmp_path / "data.jsonl")
    done = fastgoal(*tuned, "run")
    assert "no test image was found among the training images that could be" in done.output
