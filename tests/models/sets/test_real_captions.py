"""Real captions, with made-up pictures: the complete sets, counted."""

import json
import os
from pathlib import Path

import pytest
from PIL import Image

from fastgoal_models.sets import read_set

REAL_CAPTIONS = Path(__file__).parents[3].parent / "shared" / "data" / "captions"

pytestmark = pytest.mark.skipif(
    not REAL_CAPTIONS.is_dir(), reason="no ../shared/data/captions beside this checkout"
)


def rows(name):
    return json.loads((REAL_CAPTIONS / name).read_text("utf-8"))


def pictures(folder, names):
    """One picture under many names."""
    folder.mkdir(parents=True)
    first = folder / "first.png"
    Image.new("RGB", (4, 4)).save(first)
    for name in names:
        os.link(first, folder / name)
    first.unlink()


def check(found, images, captions=None):
    assert (len(found.images), found.num_captions) == (images, captions or images)
    assert found.note is None and found.report.skipped == 0


def test_docci(tmp_path):
    given = rows("docci_test.json")
    pictures(tmp_path / "images", [row["image"] for row in given])
    with (tmp_path / "docci_descriptions.jsonlines").open("w", encoding="utf-8") as file:
        for row in given:
            stem = row["image"].removesuffix(".jpg")
            file.write(
                json.dumps(
                    {
                        "example_id": stem,
                        "split": stem.rpartition("_")[0],
                        "image_file": row["image"],
                        "description": row["caption"],
                    }
                )
                + "\n"
            )
    check(read_set("docci", tmp_path), 5000)
    found = read_set("docci-goal", tmp_path)
    check(found, 5100)
    assert [item.captions for item in found.images] == [(row["caption"].strip(),) for row in given]


def test_dci_of_goal(tmp_path):
    given = rows("dci_test.json")
    pictures(tmp_path / "photos", [row["image"] for row in given])
    (tmp_path / "DCI_test.json").write_bytes((REAL_CAPTIONS / "dci_test.json").read_bytes())
    check(read_set("dci-goal-test", tmp_path), 1999)


def test_urban1k(tmp_path):
    given = rows("urban1k_test.json")
    pictures(tmp_path / "image", [row["image"] for row in given])
    (tmp_path / "caption").mkdir()
    for row in given:
        path = tmp_path / "caption" / row["image"].replace(".jpg", ".txt")
        path.write_text(row["caption"], encoding="utf-8")
    found = read_set("urban1k", tmp_path)
    check(found, 1000)
    assert {item.image.name: item.captions[0] for item in found.images} == {
        row["image"]: row["caption"] for row in given
    }


def test_image_in_words(tmp_path):
    # The file at hand is cut into sentences; the pictures and their order are those of the set.
    names = list(dict.fromkeys(row["image"] for row in rows("iiw_test_finegrained.json")))
    folders = {"docci": "DOCCI_Test", "docci_aar": "IIW-400", "dci": "DCI_Test"}
    for folder, split in folders.items():
        own = [n.partition("/")[2] for n in names if n.startswith(f"{folder}/")]
        pictures(tmp_path / folder, own)
        key = "image/key" if folder == "docci_aar" else "image"
        (tmp_path / split).mkdir()
        lines = (json.dumps({key: name.removesuffix(".jpg"), "IIW": "Told."}) for name in own)
        (tmp_path / split / "data.jsonl").write_text("\n".join(lines))
    check(read_set("iiw", tmp_path), 612)


def test_flickr30k(tmp_path):
    # The validation split, of 1,014 pictures, in the form of the test split.
    given = rows("flickr30k_val.json")
    pictures(tmp_path / "flickr30k-images", [Path(row["image"]).name for row in given])
    (tmp_path / "flickr30k_test.json").write_text(json.dumps(given[:1000]))
    check(read_set("flickr30k", tmp_path), 1000, 5000)
