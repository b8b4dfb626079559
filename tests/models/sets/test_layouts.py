"""Every layout, made up in little: which rows are read, which captions, and what is left out."""

import json
import shutil

import pytest
from PIL import Image

from fastgoal_models.retrieval import LONG_TEXT_KS, SHORT_TEXT_KS
from fastgoal_models.sets import SETS, SetError, read_set


def picture(path):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (4, 4), (200, 30, 30)).save(path)


def write_json(path, value):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(value), "utf-8")


def write_lines(path, *rows):
    path.parent.mkdir(parents=True, exist_ok=True)
    lines = [row if isinstance(row, bytes) else json.dumps(row).encode() for row in rows]
    path.write_bytes(b"\n".join(lines) + b"\n")


def read(found):
    return [(item.id, item.image.name, *item.captions) for item in found.images]


# -- the layouts, two or three usable pictures each ------------------------------------------------


def docci(root):
    rows = [("qual_test", 0), ("train", 0), ("test", 0), ("test", 1), ("qual_dev", 0)]
    write_lines(
        root / "docci_descriptions.jsonlines",
        *(
            {
                "example_id": f"{split}_{n:05}",
                "split": split,
                "image_file": f"{split}_{n:05}.jpg",
                "description": f"{split} {n}.",
            }
            for split, n in rows
        ),
    )
    for split, n in rows:
        picture(root / "images" / f"{split}_{n:05}.jpg")


def dci(root):
    base = root / "densely_captioned_images"
    for number, extra in ((1, "More."), (2, ""), (3, "Yet more.")):
        write_json(
            base / "annotations" / f"{number}-data.json",
            {
                "image": f"sa_{number}.jpg",
                "short_caption": f"Short {number}.",
                "extra_caption": extra,
                "mask_data": {},
            },
        )
        picture(base / "photos" / f"sa_{number}.jpg")
    splits = {"train": ["3-data.json"], "valid": [], "test": ["1-data.json", "2-data.json"]}
    write_json(base / "splits.json", splits)


def dci_goal_test(root):
    dci(root)
    write_json(root / "DCI_test.json", [{"image": "sa_2.jpg", "caption": "Two."}])


def urban1k(root):
    for number in (10, 2, 1):
        picture(root / "image" / f"{number}.jpg")
        (root / "caption").mkdir(exist_ok=True)
        (root / "caption" / f"{number}.txt").write_text(f"Café {number}.\n", "utf-8")


def sharegpt4v(root):
    def row(n):
        return {
            "id": f"sa_{n}",
            "image": f"sam/images/sa_{n}.jpg",
            "conversations": [
                {"from": "human", "value": "<image>\nTell."},
                {"from": "gpt", "value": f"The image {n}.\n\nIt is red."},
            ],
        }

    write_json(root / "share-captioner_coco_lcs_sam_1246k_1107.json", [row(n) for n in range(3)])
    for n in range(3):
        picture(root / "sam" / "images" / f"sa_{n}.jpg")


def iiw(root):
    write_lines(
        root / "DOCCI_Test" / "data.jsonl",
        {"image": "test_00731", "IIW": "A toilet.", "DOCCI": "No."},
    )
    write_lines(
        root / "IIW-400" / "data.jsonl",
        {"image/key": "aar_test_04600", "IIW": "A thistle.", "IIW-P5B": "No."},
        {"image/key": "aar_test_04601", "IIW": "A wall."},
    )
    write_lines(root / "DCI_Test" / "data.jsonl", {"image": "sa_1545038.jpg", "IIW": "A balcony."})
    picture(root / "docci" / "test_00731.jpg")
    picture(root / "docci_aar" / "images_aar" / "aar_train_04600.jpg")
    picture(root / "docci_aar" / "images_aar" / "aar_test_04601.jpg")
    picture(root / "dci" / "sa_1545038.jpg")


def coco(root):
    images = [{"id": n, "file_name": f"{n:012}.jpg"} for n in (9, 5)]
    captions = [{"image_id": 5, "id": n, "caption": f"Five {n}."} for n in range(7)]
    captions.insert(3, {"image_id": 9, "id": 100, "caption": "Nine. "})
    write_json(
        root / "annotations" / "captions_val2017.json",
        {"info": {}, "images": images, "annotations": captions},
    )
    for image in images:
        picture(root / "val2017" / image["file_name"])


def split_file(path, names):
    rows = [
        {
            "filename": name,
            "filepath": "val2014",
            "split": split,
            "sentences": [{"raw": f"{split} {n}."} for n in range(6)],
        }
        for name, split in names
    ]
    write_json(path, {"dataset": "made up", "images": rows})


def coco_karpathy(root):
    split_file(root / "dataset_coco.json", [("a.jpg", "restval"), ("b.jpg", "test")])
    picture(root / "val2014" / "b.jpg")


def flickr30k(root):
    split_file(root / "dataset_flickr30k.json", [("1.jpg", "test"), ("2.jpg", "train")])
    picture(root / "flickr30k-images" / "1.jpg")


def flickr30k_all(root):
    lines = ["1.jpg#0\tOne .", "2.jpg#0\tTwo , #1 .", "1.jpg#1\tAlso one .", "2.jpg Two"]
    root.mkdir(exist_ok=True)
    (root / "results_20130124.token").write_bytes("\n".join(lines).encode() + b"\n3.jpg#0\t\xff")
    for n in (1, 2):
        picture(root / "flickr30k-images" / f"{n}.jpg")


def jsonl(root):
    write_lines(
        root / "captions.jsonl",
        {"image": "images/cat.png", "caption": "A cat."},
        {"image": "images/dog.png", "captions": ["A dog.", "A brown dog."], "id": "dog"},
    )
    picture(root / "images" / "cat.png")
    picture(root / "images" / "dog.png")


SHARED = [
    (f"sam/images/sa_{n}.jpg", f"sa_{n}.jpg", f"The image {n}.\n\nIt is red.") for n in range(3)
]
TEST = [f"test {n}." for n in range(5)]
# name: (what makes it, id and file and captions of what is read)
MADE = {
    "docci": (
        docci,
        [
            ("test_00000", "test_00000.jpg", "test 0."),
            ("test_00001", "test_00001.jpg", "test 1."),
        ],
    ),
    "docci-goal": (
        docci,
        [
            ("qual_test_00000", "qual_test_00000.jpg", "qual_test 0."),
            ("test_00000", "test_00000.jpg", "test 0."),
            ("test_00001", "test_00001.jpg", "test 1."),
        ],
    ),
    "dci": (
        dci,
        [
            ("sa_3", "sa_3.jpg", "Short 3.\nYet more."),
            ("sa_1", "sa_1.jpg", "Short 1.\nMore."),
            ("sa_2", "sa_2.jpg", "Short 2."),
        ],
    ),
    "dci-goal": (dci, [("sa_3", "sa_3.jpg", "Yet more."), ("sa_1", "sa_1.jpg", "More.")]),
    "dci-goal-test": (dci_goal_test, [("sa_2", "sa_2.jpg", "Two.")]),
    "urban1k": (urban1k, [(f"{n}", f"{n}.jpg", f"Café {n}.") for n in (1, 2, 10)]),
    "sharegpt4v-1k": (sharegpt4v, SHARED),
    "sharegpt4v-10k": (sharegpt4v, SHARED),
    "iiw": (
        iiw,
        [
            ("test_00731", "test_00731.jpg", "A toilet."),
            ("aar_test_04600", "aar_train_04600.jpg", "A thistle."),
            ("aar_test_04601", "aar_test_04601.jpg", "A wall."),
            ("sa_1545038", "sa_1545038.jpg", "A balcony."),
        ],
    ),
    "coco": (
        coco,
        [
            ("9", "000000000009.jpg", "Nine."),
            ("5", "000000000005.jpg", *(f"Five {n}." for n in range(5))),
        ],
    ),
    "coco-karpathy": (coco_karpathy, [("b.jpg", "b.jpg", *TEST)]),
    "flickr30k": (flickr30k, [("1.jpg", "1.jpg", *TEST)]),
    "flickr30k-all": (
        flickr30k_all,
        [("1.jpg", "1.jpg", "One .", "Also one ."), ("2.jpg", "2.jpg", "Two , #1 .")],
    ),
    "jsonl": (
        jsonl,
        [
            ("images/cat.png", "cat.png", "A cat."),
            ("dog", "dog.png", "A dog.", "A brown dog."),
        ],
    ),
}


def test_every_set_is_made_up_here():
    assert MADE.keys() == SETS.keys()


@pytest.mark.parametrize("name", SETS)
def test_rows_and_captions(name, tmp_path):
    make, wanted = MADE[name]
    make(tmp_path)
    found = read_set(name, tmp_path)
    assert read(found) == wanted
    assert (found.name, found.report.read) == (name, len(wanted))
    assert found.num_captions == sum(len(item) - 2 for item in wanted)
    assert all(item.image.is_absolute() and item.image.is_file() for item in found.images)


@pytest.mark.parametrize("name", SETS)
def test_ks(name):
    short = name.startswith(("coco", "flickr"))
    assert SETS[name].ks == (SHORT_TEXT_KS if short else LONG_TEXT_KS)


def test_a_set_that_is_not_complete_says_so(tmp_path, monkeypatch):
    docci(tmp_path)
    note = read_set("docci", tmp_path).note
    assert note is not None and "5,000 images" in note and "2 and 2 were read" in note
    jsonl(tmp_path)
    assert read_set("jsonl", tmp_path).note is None
    # A complete one, of this little world.
    layout = SETS["docci"]
    monkeypatch.setitem(SETS, "docci", type(layout)(**{**vars(layout), "counts": (2, 2)}))
    assert read_set("docci", tmp_path).note is None


# -- other places ----------------------------------------------------------------------------------


def test_other_places_of_the_same_files(tmp_path):
    def moved(make, name, *moves):
        root = tmp_path / name
        root.mkdir()
        make(root)
        for old, new in moves:
            (root / new).parent.mkdir(parents=True, exist_ok=True)
            shutil.move(root / old, root / new)
        assert read(read_set(name, root)) == MADE[name][1]

    old = "docci_descriptions.jsonlines"
    moved(docci, "docci", (old, "annotations/docci_descriptions.jsonline"))
    moved(urban1k, "urban1k", ("image", "images"))
    moved(coco, "coco", ("val2017", "images/val2017"))
    moved(coco_karpathy, "coco-karpathy", ("dataset_coco.json", "annotations/dataset_coco.json"))
    old = "share-captioner_coco_lcs_sam_1246k_1107.json"
    moved(sharegpt4v, "sharegpt4v-10k", (old, "share4v_sam_10k.json"))
    moved(
        iiw,
        "iiw",
        ("DCI_Test", "DCI_TEST"),
        ("docci/test_00731.jpg", "docci/images/test_00731.jpg"),
        ("dci/sa_1545038.jpg", "dci/densely_captioned_images/photos/sa_1545038.jpg"),
    )
    moved(flickr30k, "flickr30k", ("flickr30k-images/1.jpg", "1.jpg"), ("flickr30k-images", "x"))


def test_dci_from_its_inner_folder(tmp_path):
    dci(tmp_path)
    assert read(read_set("dci", tmp_path / "densely_captioned_images")) == MADE["dci"][1]


def test_flickr30k_as_a_list(tmp_path):
    row = {"image": "flickr30k-images/1.jpg", "caption": ["One.", "Two."]}
    write_json(tmp_path / "flickr30k_test.json", [row])
    picture(tmp_path / "flickr30k-images" / "1.jpg")
    assert read(read_set("flickr30k", tmp_path)) == [("1.jpg", "1.jpg", "One.", "Two.")]


def test_a_jsonl_by_its_own_name(tmp_path):
    jsonl(tmp_path)
    (tmp_path / "captions.jsonl").rename(tmp_path / "mine.jsonl")
    assert read(read_set("jsonl", tmp_path / "mine.jsonl")) == MADE["jsonl"][1]


def test_a_linked_folder_of_images(tmp_path):
    root, far = tmp_path / "root", tmp_path / "far"
    root.mkdir()
    docci(root)
    (root / "images").rename(far)
    (root / "images").symlink_to(far, target_is_directory=True)
    assert read(read_set("docci", root)) == MADE["docci"][1]


# -- what is left out ------------------------------------------------------------------------------


def test_rows_that_can_not_be_used(tmp_path):
    root = tmp_path / "data"
    picture(tmp_path / "outside.png")
    for name in "abcdefg":
        picture(root / f"{name}.png")
    (root / "link.png").symlink_to(tmp_path / "outside.png")
    write_lines(
        root / "captions.jsonl",
        b"\xef\xbb\xbf" + json.dumps({"image": "a.png", "caption": " A. "}).encode(),
        b"",
        {"image": "../outside.png", "caption": "Out."},
        {"image": str(tmp_path / "outside.png"), "caption": "Out."},
        {"image": "C:\\outside.png", "caption": "Out."},
        {"image": "link.png", "caption": "Out."},
        {"image": "none.png", "caption": "None."},
        {"image": "x" * 5000, "caption": "None."},
        {"image": "zero\0byte.png", "caption": "None."},
        {"image": "", "caption": "None."},
        {"image": 7, "caption": "None."},
        {"image": "b.png", "caption": 7},
        {"image": "b.png"},
        {"image": "c.png", "caption": " \n"},
        {"image": "c.png", "captions": []},
        {"image": "d.png", "captions": "not a list"},
        {"image": "d.png", "captions": ["A text.", None]},
        {"image": "e.png", "captions": ["", "One is left."]},
        {"image": "f.png", "caption": "Half a pair \ud800."},
        {"image": "f.png", "caption": "Again.", "id": "a.png"},
        {"image": "g.png", "caption": "G.", "id": ["g"]},
        {"image": "g.png", "caption": "G.", "id": 7},
        b'{"image": "a.png", "caption": "\xff"}',
        b'{"image": "a.png"',
        b'["a.png"]',
        b"[" * 100_000,
    )
    found = read_set("jsonl", root)
    assert read(found) == [
        ("a.png", "a.png", "A."),
        ("e.png", "e.png", "One is left."),
        ("7", "g.png", "G."),
    ]
    assert found.report.read == 3
    assert found.report.counts == {
        "image leaves the data folder": 4,
        "image is missing": 3,
        "image is not named": 2,
        "caption is not text": 3,
        "caption is empty": 2,
        "captions are not a list": 1,
        "caption is not valid Unicode": 1,
        "id appears twice": 1,
        "id is not text": 1,
        "line is not UTF-8": 1,
        "line is not JSON": 2,
        "line is not an object": 1,
    }
    names = found.report.names
    assert names["image leaves the data folder"][0] == "../outside.png"
    assert names["line is not UTF-8"] == ["captions.jsonl line 23"]


# A picture outside of the data, once by `..` and once by its whole path.
@pytest.fixture(params=["..", "absolute"])
def outside(request, tmp_path):
    picture(tmp_path / "outside.jpg")
    return "../../../outside.jpg" if request.param == ".." else str(tmp_path / "outside.jpg")


def leave_docci(root, outside):
    docci(root)
    path = root / "docci_descriptions.jsonlines"
    path.write_text(path.read_text().replace('"test_00000.jpg"', json.dumps(outside)))


def leave_dci(root, outside):
    dci(root)
    path = root / "densely_captioned_images" / "annotations" / "1-data.json"
    path.write_text(path.read_text().replace("sa_1.jpg", outside))


def leave_dci_goal_test(root, outside):
    dci_goal_test(root)
    rows = [{"image": name, "caption": "A."} for name in (outside, "sa_1.jpg")]
    write_json(root / "DCI_test.json", rows)


def leave_sharegpt4v(root, outside):
    sharegpt4v(root)
    path = root / "share-captioner_coco_lcs_sam_1246k_1107.json"
    path.write_text(path.read_text().replace("sam/images/sa_1.jpg", outside))


def leave_iiw(root, outside):
    iiw(root)
    write_lines(root / "DCI_Test" / "data.jsonl", {"image": outside, "IIW": "Out."})


def leave_coco(root, outside):
    coco(root)
    path = root / "annotations" / "captions_val2017.json"
    path.write_text(path.read_text().replace("000000000009.jpg", outside))


def leave_coco_karpathy(root, outside):
    coco_karpathy(root)
    split_file(root / "dataset_coco.json", [(outside, "test"), ("b.jpg", "test")])


def leave_flickr30k(root, outside):
    flickr30k(root)
    split_file(root / "dataset_flickr30k.json", [(outside, "test"), ("1.jpg", "test")])


def leave_flickr30k_all(root, outside):
    flickr30k_all(root)
    lines = f"{outside}#0\tOut .\n1.jpg#0\tOne .\n"
    (root / "results_20130124.token").write_text(lines)


LEAVE = {
    "docci": leave_docci,
    "docci-goal": leave_docci,
    "dci": leave_dci,
    "dci-goal": leave_dci,
    "dci-goal-test": leave_dci_goal_test,
    "sharegpt4v-1k": leave_sharegpt4v,
    "iiw": leave_iiw,
    "coco": leave_coco,
    "coco-karpathy": leave_coco_karpathy,
    "flickr30k": leave_flickr30k,
    "flickr30k-all": leave_flickr30k_all,
}


@pytest.mark.parametrize("name", LEAVE)
def test_images_outside_are_named(name, tmp_path, outside):
    root = tmp_path / "data"
    root.mkdir()
    LEAVE[name](root, outside)
    found = read_set(name, root)
    assert found.report.counts == {"image leaves the data folder": 1}
    (named,) = found.report.names["image leaves the data folder"]
    assert "outside" in named
    assert all(item.image.is_relative_to(root.resolve()) for item in found.images)
    assert found.note is not None


def test_dci_annotations(tmp_path):
    dci(tmp_path)
    base = tmp_path / "densely_captioned_images"
    write_json(tmp_path / "outside.json", {"image": "sa_1.jpg", "short_caption": "A."})
    write_json(base / "annotations" / "list.json", [])
    write_json(base / "annotations" / "nothing.json", {})
    write_json(base / "annotations" / "no_extra.json", {"image": "sa_2.jpg", "short_caption": "A."})
    (base / "annotations" / "cut.json").write_text('{"image": ')
    files = ["../../outside.json", str(tmp_path / "outside.json"), "none.json", 5]
    files += ["list.json", "nothing.json", "no_extra.json", "cut.json", "1-data.json"]
    write_json(base / "splits.json", {"test": files})
    found = read_set("dci", tmp_path)
    assert [item.id for item in found.images] == ["sa_1"]
    assert found.report.counts == {
        "annotation is missing or leaves its folder": 4,
        "annotation is not an object": 1,
        "image is not named": 1,
        "caption is not text": 1,
        "annotation is not JSON": 1,
    }


def test_urban1k_without_partners(tmp_path):
    urban1k(tmp_path)
    (tmp_path / "image" / "2.jpg").unlink()
    (tmp_path / "caption" / "1.txt").unlink()
    picture(tmp_path / "image" / "3.jpg")
    (tmp_path / "caption" / "3.txt").write_bytes(b"\xff\xfe\xff")
    (tmp_path / "caption" / "._10.txt").write_bytes(b"a Mac's own")
    found = read_set("urban1k", tmp_path)
    assert read(found) == [("10", "10.jpg", "Café 10.")]
    assert found.report.names == {
        "caption is missing or leaves its folder": ["1.txt"],
        "image is missing": ["2 (2.jpg)"],
        "caption is not UTF-8": ["3.txt"],
    }


def test_flickr30k_lines(tmp_path):
    flickr30k_all(tmp_path)
    assert read_set("flickr30k-all", tmp_path).report.names == {
        "line is not NAME#N, a tab and a caption": ["line 4"],
        "line is not UTF-8": ["line 5"],
    }


def test_coco_rows(tmp_path):
    coco(tmp_path)
    path = tmp_path / "annotations" / "captions_val2017.json"
    data = json.loads(path.read_text())
    data["annotations"] += [{"id": 8, "caption": "Lost."}, "text"]
    data["images"] += [{"file_name": "no_id.jpg"}, {"id": 1, "file_name": "000000000005.jpg"}, 3]
    write_json(path, data)
    found = read_set("coco", tmp_path)
    assert [item.id for item in found.images] == ["9", "5"]
    assert found.report.counts == {
        "caption names no image": 1,
        "row is not an object": 2,
        "image has no id": 1,
        "caption is empty": 1,
    }


def test_sharegpt4v_rows(tmp_path, monkeypatch):
    path = tmp_path / "share-captioner_coco_lcs_sam_1246k_1107.json"
    monkeypatch.setattr("fastgoal_models.sets.sharegpt4v._CHUNK", 50)  # rows are cut in two
    picture(tmp_path / "a.jpg")
    rows = [
        {"image": "a.jpg"},
        {"image": "a.jpg", "conversations": [{"value": "Tell."}]},
        {"image": "a.jpg", "conversations": ["Tell.", "It is a."]},
        "text",
        {"image": "a.jpg", "conversations": [{"value": "Tell."}, {"value": 'A "[,]" é.'}]},
    ]
    write_json(path, rows + [{"image": f"{n}.jpg"} for n in range(2000)])
    found = read_set("sharegpt4v-1k", tmp_path)
    assert read(found) == [("a.jpg", "a.jpg", 'A "[,]" é.')]
    assert found.report.counts == {"row has no image or no answer": 999}
    # The rest of the file is not even read, …
    text = path.read_text()
    path.write_text(text[: len(text) // 2 + 5000])
    assert read(read_set("sharegpt4v-1k", tmp_path)) == read(found)
    # … but what is wanted of it is whole.
    for damaged in (text[:-1], text[:3000], "[", "", "{}", '[{"image": ?}]', "[" * 100_000):
        path.write_text(damaged)
        with pytest.raises(SetError, match=f"{path.name} is not a JSON list"):
            read_set("sharegpt4v-10k", tmp_path)


# -- errors ----------------------------------------------------------------------------------------


def test_an_unknown_name(tmp_path):
    with pytest.raises(SetError, match=r'"dogci" is not a known set.*docci, docci-goal, dci'):
        read_set("dogci", tmp_path)


# What each set asks for first, and where its message sends people.
MISSING = [
    ("docci", "docci_descriptions.jsonlines", "google.github.io/docci"),
    ("docci", "images", "google.github.io/docci"),
    ("dci", "densely_captioned_images/splits.json", "github.com/facebookresearch/DCI"),
    ("dci-goal", "densely_captioned_images/annotations", "sa_000138.tar"),
    ("dci", "densely_captioned_images/photos", "segment-anything"),
    ("dci-goal-test", "DCI_test.json", "github.com/PerceptualAI-Lab/GOAL"),
    ("urban1k", "image", "huggingface.co/datasets/BeichenZhang/Urban1k"),
    ("urban1k", "caption", "huggingface.co/datasets/BeichenZhang/Urban1k"),
    ("sharegpt4v-1k", "share-captioner_coco_lcs_sam_1246k_1107.json", "Lin-Chen/ShareGPT4V"),
    ("iiw", "DOCCI_Test/data.jsonl", "github.com/google/imageinwords"),
    ("iiw", "docci_aar", "docci_images_aar.tar.gz"),
    ("coco", "annotations/captions_val2017.json", "cocodataset.org"),
    ("coco", "val2017", "cocodataset.org"),
    ("coco-karpathy", "dataset_coco.json", "caption_datasets.zip"),
    ("flickr30k", "dataset_flickr30k.json", "caption_datasets.zip"),
    ("flickr30k-all", "results_20130124.token", "DenotationGraph"),
    ("jsonl", "captions.jsonl", "your own pictures"),
]


@pytest.mark.parametrize("name, missing, source", MISSING)
def test_a_missing_file_is_named_with_its_source(name, missing, source, tmp_path):
    MADE[name][0](tmp_path)
    path = tmp_path / missing
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink()
    with pytest.raises(SetError) as raised:
        read_set(name, tmp_path)
    message = str(raised.value)
    assert f"{path} is missing" in message and source in message
    assert message.startswith(SETS[name].title) and SETS[name].holds in message


@pytest.mark.parametrize("name", SETS)
def test_a_folder_that_is_not_there(name, tmp_path):
    with pytest.raises(SetError, match="is missing"):
        read_set(name, tmp_path / "nowhere")


DAMAGED = [
    ("dci", "densely_captioned_images/splits.json"),
    ("dci-goal-test", "DCI_test.json"),
    ("coco", "annotations/captions_val2017.json"),
    ("coco-karpathy", "dataset_coco.json"),
    ("flickr30k", "dataset_flickr30k.json"),
]


@pytest.mark.parametrize("name, file", DAMAGED)
@pytest.mark.parametrize("data", [b"", b"{", b"\xff\xfe\xff", b"[" * 100_000, b"7", b'{"test": 1}'])
def test_a_damaged_file_is_named(name, file, data, tmp_path):
    MADE[name][0](tmp_path)
    (tmp_path / file).write_bytes(data)
    with pytest.raises(SetError, match=rf"{file.rpartition('/')[2]} (is|does) not"):
        read_set(name, tmp_path)


@pytest.mark.parametrize("name, file", [*DAMAGED, ("jsonl", "captions.jsonl")])
def test_a_folder_in_the_place_of_a_file(name, file, tmp_path):
    (tmp_path / file).mkdir(parents=True)
    for folder in ("val2014", "val2017", "photos", "annotations", "flickr30k-images"):
        (tmp_path / folder).mkdir(exist_ok=True)
    file = tmp_path / (file.rpartition("/")[2] if name == "dci" else file)
    file.mkdir(exist_ok=True)
    with pytest.raises(SetError, match="can not be read"):
        read_set(name, tmp_path)


def test_no_row_that_can_be_used(tmp_path):
    docci(tmp_path)
    shutil.rmtree(tmp_path / "images")
    (tmp_path / "images").mkdir()
    with pytest.raises(SetError) as raised:
        read_set("docci", tmp_path)
    message = str(raised.value)
    assert "2 × image is missing: test_00000 (test_00000.jpg)" in message
    assert "google.github.io/docci" in message
