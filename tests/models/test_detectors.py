"""Detectors: boxes from a file, from transformers and from torchvision, and which are kept."""

import json
import math
import sys

import numpy as np
import pytest
import torch
from PIL import Image

from fastgoal_models.detectors import (
    BoxFile,
    Detection,
    TorchvisionDetector,
    TransformersDetector,
    create_detector,
)
from fastgoal_models.errors import ConfigError
from fastgoal_models.flism import RegionRules
from fastgoal_models.options import tensors_digest

CPU = torch.device("cpu")


def picture(width, height, seed=0):
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(pixels)


# -- boxes of a file ------------------------------------------------------------------------------


def box_file(folder, *rows):
    path = folder / "boxes.jsonl"
    lines = (row if isinstance(row, bytes) else json.dumps(row).encode() for row in rows)
    path.write_bytes(b"\n".join(lines) + b"\n")
    return path


CAT = {"box": [1, 2, 3.5, 4], "label": "cat", "score": 0.6}
DOG = {"box": [5, 6, 7, 8], "label": "dog", "score": 0.9}


def test_boxes_of_a_file_come_best_first(tmp_path):
    path = box_file(
        tmp_path,
        {"image": "a/b.jpg", "boxes": [CAT, DOG]},
        b"",
        {"image": "c.jpg", "boxes": [{"box": [0, 0, 1, 1]}]},
    )
    cat, dog = Detection((1, 2, 3.5, 4), "cat", 0.6), Detection((5, 6, 7, 8), "dog", 0.9)
    bare = Detection((0, 0, 1, 1), "box", 1.0)
    images, names = [picture(9, 9)] * 3, ["c.jpg", "unknown.jpg", "a/b.jpg"]
    assert BoxFile(path).detect(images, names) == [[bare], [], [dog, cat]]
    assert BoxFile(path, 0.7).detect(images, names) == [[bare], [], [dog]]


def test_however_a_picture_is_written_it_is_the_file_that_counts(tmp_path):
    root = tmp_path / "data"
    (root / "real").mkdir(parents=True)
    (root / "real" / "p.png").touch()
    (root / "link.png").symlink_to(root / "real" / "p.png")
    (root / "folder").symlink_to(root / "real")
    cat = [Detection((1, 2, 3.5, 4), "cat", 0.6)]
    written = ["real/p.png", "./real/p.png", "real/../real//p.png", "link.png", "folder/p.png"]
    for image in [*written, str(root / "real" / "p.png")]:
        boxes = BoxFile(box_file(tmp_path, {"image": image, "boxes": [CAT]}), root=root)
        for name in [*written, str(root / "link.png")]:
            assert boxes.detect([picture(9, 9)], [name]) == [cat]
        assert (boxes.pictures, boxes.missing, boxes.unmatched()) == (6, 0, None)


def test_a_picture_may_have_several_lines(tmp_path):
    path = box_file(tmp_path, *({"image": "a.jpg", "boxes": [box]} for box in (CAT, DOG)))
    assert [d.label for d in BoxFile(path).detect([picture(9, 9)], ["a.jpg"])[0]] == ["dog", "cat"]


def test_pictures_that_no_line_names_are_counted(tmp_path):
    boxes = BoxFile(box_file(tmp_path, {"image": "a.jpg", "boxes": []}))
    boxes.detect([picture(9, 9)] * 2, ["a.jpg", "b.jpg"])
    boxes.detect([picture(9, 9)], ["c.jpg"])
    assert boxes.unmatched() == (
        f"2 of 3 pictures have no boxes in {boxes.path}: it names for example {tmp_path}/a.jpg, "
        f"and not {tmp_path}/b.jpg"
    )


def test_a_box_files_identity_changes_with_its_boxes(tmp_path):
    first = BoxFile(box_file(tmp_path, {"image": "a.jpg", "boxes": [CAT]}))
    same = BoxFile(first.path)
    other_score = BoxFile(first.path, 0.5)
    other = BoxFile(box_file(tmp_path, {"image": "a.jpg", "boxes": [DOG]}))
    assert first.identity() == same.identity()
    assert len({d.identity() for d in (first, other_score, other)}) == 3


@pytest.mark.parametrize(
    "bad",
    [
        b"{",
        b"\xff",
        b"[]",
        b'"text"',
        b"[" * 100_000,
        {"boxes": []},
        {"image": "a.jpg"},
        {"image": ["a.jpg"], "boxes": []},
        {"image": "a.jpg", "boxes": 3},
        {"image": "a.jpg", "boxes": [[1, 2, 3, 4]]},
        {"image": "a.jpg", "boxes": [{"box": [1, 2, 3]}]},
        {"image": "a.jpg", "boxes": [{"box": ["left", 2, 3, 4]}]},
        {"image": "a.jpg", "boxes": [CAT | {"score": None}]},
    ],
)
def test_a_bad_line_is_named(tmp_path, bad):
    path = box_file(tmp_path, {"image": "good.jpg", "boxes": []}, bad)
    with pytest.raises(ConfigError, match=r"boxes\.jsonl, line 2 is not an object with image"):
        BoxFile(path)


# -- what a user asked for ------------------------------------------------------------------------


@pytest.mark.parametrize(
    "spec, said",
    [
        ("yolos", "detector 'yolos' is not known. Fix: transformers:NAME_OR_FOLDER"),
        ("keras:retinanet", "is not known"),
        ("", "is not known"),
        ("torchvision:no_such_model=a.pth", "one of .*ssdlite320_mobilenet_v3_large"),
        ("torchvision:ssdlite320_mobilenet_v3_large", "and a weights file"),
        ("torchvision:ssdlite320_mobilenet_v3_large=no/such.pth", "there is no no/such.pth"),
        ("no/such/boxes.jsonl", "detector no/such/boxes.jsonl: there is no file"),
    ],
)
def test_what_can_not_be_had_is_refused(spec, said):
    with pytest.raises(ConfigError, match=said):
        create_detector(spec, CPU)


def test_without_transformers_the_extra_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "transformers", None)  # its import raises ImportError
    with pytest.raises(ConfigError, match=r"needs transformers.*Fix: pip install '\.\[hf\]'"):
        create_detector("transformers:yolos", CPU)


def test_all_boxes_of_a_file_are_kept_unless_a_score_is_asked_for(tmp_path):
    low = CAT | {"score": -3}
    path = str(box_file(tmp_path, {"image": "a", "boxes": [low, DOG]}))
    for least_score, labels in ((None, ["dog", "cat"]), (0.7, ["dog"])):
        found = create_detector(path, CPU, least_score)
        assert isinstance(found, BoxFile)
        assert [d.label for d in found.detect([picture(9, 9)], ["a"])[0]] == labels


# -- transformers ---------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def yolos(tmp_path_factory):
    """A folder with a tiny YOLOS; its weights are random, and its boxes apart from each other."""
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = transformers.YolosConfig(
        hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=64,
        image_size=[64, 96], patch_size=16, num_detection_tokens=6, num_labels=3,
        use_mid_position_embeddings=False, id2label={0: "cat", 1: "dog", 2: "tree"},
    )  # fmt: skip
    model = transformers.YolosForObjectDetection(config)
    with torch.no_grad():
        model.vit.embeddings.detection_tokens.normal_()
        for layer in (model.bbox_predictor.layers[-1], model.class_labels_classifier.layers[-1]):
            layer.weight.normal_(std=3)
    folder = tmp_path_factory.mktemp("yolos")
    model.save_pretrained(folder)
    processor = transformers.YolosImageProcessor(size={"shortest_edge": 64, "longest_edge": 96})
    processor.save_pretrained(folder)
    return folder


def test_transformers_boxes_are_in_pixels_and_best_first(yolos):
    detector = create_detector(f"transformers:{yolos}", CPU, 0.0)
    assert isinstance(detector, TransformersDetector)
    image = picture(140, 100)
    found = detector.detect([image], ["a"])[0]
    assert len(found) == 6
    scores = [d.score for d in found]
    assert scores == sorted(scores, reverse=True) and len(set(scores)) > 1
    assert {d.label for d in found} <= {"cat", "dog", "tree"}
    assert max(d.box[2] for d in found) > 70  # pixels, not shares
    with torch.no_grad():
        raw = detector.model(**detector.processor(images=image, return_tensors="pt"))
    x, y, w, h = raw.pred_boxes[0].unbind(-1)
    boxes = torch.stack([x - w / 2, y - h / 2, x + w / 2, y + h / 2], -1) * torch.tensor(
        [140, 100, 140, 100]
    )
    by_hand = sorted(boxes.tolist())
    torch.testing.assert_close(torch.tensor(sorted(d.box for d in found)), torch.tensor(by_hand))
    least = TransformersDetector(str(yolos), CPU, scores[2])
    assert least.detect([image], ["a"])[0] == found[:2]


def test_transformers_boxes_do_not_depend_on_the_other_pictures(yolos):
    detector = TransformersDetector(str(yolos), CPU, 0.0)
    sizes = [(140, 100), (100, 140), (90, 90), (140, 100), (300, 60)]
    images = [picture(*size, seed) for seed, size in enumerate(sizes)]
    together = detector.detect(images, ["x"] * len(images))
    for image, found in zip(images, together, strict=True):
        alone = detector.detect([image], ["x"])[0]
        assert [d.label for d in alone] == [d.label for d in found]
        for a, b in zip(alone, found, strict=True):
            assert a.box == pytest.approx(b.box, abs=1e-3)
    assert detector.detect([], []) == []


def test_transformers_weights_in_half_precision(yolos, tmp_path):
    transformers = pytest.importorskip("transformers")
    model = transformers.YolosForObjectDetection.from_pretrained(yolos)
    model.half().save_pretrained(tmp_path)
    transformers.YolosImageProcessor.from_pretrained(yolos).save_pretrained(tmp_path)
    found = TransformersDetector(str(tmp_path), CPU, 0.0).detect([picture(140, 100)], ["a"])
    assert len(found[0]) == 6


def test_transformers_boxes_score_half_at_least_by_default(yolos):
    found = create_detector(f"transformers:{yolos}", CPU)
    assert isinstance(found, TransformersDetector) and found.least_score == 0.5


def test_transformers_identity_is_that_of_the_weights(yolos):
    detector = TransformersDetector(str(yolos), CPU)
    same = TransformersDetector(str(yolos), CPU)
    assert detector.identity() == same.identity()
    assert TransformersDetector(str(yolos), CPU, 0.1).identity() != same.identity()
    with torch.no_grad():
        detector.model.vit.embeddings.detection_tokens[0, 0, 0] += 1
    assert detector.identity() != same.identity()


def test_a_folder_without_a_detector_is_refused(tmp_path):
    pytest.importorskip("transformers")
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(ConfigError, match="can not be loaded"):
        create_detector(f"transformers:{tmp_path}", CPU)


# -- torchvision ----------------------------------------------------------------------------------

SSD = "ssdlite320_mobilenet_v3_large"


@pytest.fixture(scope="module")
def ssd(tmp_path_factory):
    detection = pytest.importorskip("torchvision.models.detection")
    torch.manual_seed(0)
    model = getattr(detection, SSD)(weights=None, weights_backbone=None)
    path = tmp_path_factory.mktemp("ssd") / "weights.pth"
    torch.save(model.state_dict(), path)
    return path


def test_torchvision_boxes(ssd):
    detector = create_detector(f"torchvision:{SSD}={ssd}", CPU, 0.0)
    assert isinstance(detector, TorchvisionDetector)
    images = [picture(160, 120), picture(60, 90, seed=1)]
    found = detector.detect(images, ["a", "b"])
    for image, some in zip(images, found, strict=True):
        scores = [d.score for d in some]
        assert scores == sorted(scores, reverse=True) and len(scores) > 10
        x2, y2 = max(d.box[2] for d in some), max(d.box[3] for d in some)
        assert image.width / 2 < x2 <= image.width and image.height / 2 < y2 <= image.height
        assert all(isinstance(d.label, str) for d in some)
    least = found[0][5].score
    surer = TorchvisionDetector(f"{SSD}={ssd}", CPU, least)
    assert surer.detect(images, ["a", "b"])[0] == [d for d in found[0] if d.score >= least]
    assert detector._label(17) == "cat" and detector._label(1000) == "1000"
    weights = tensors_digest(detector.model.state_dict())
    assert detector.identity().startswith(f"torchvision:{SSD}, {weights}")


def test_other_weights_are_refused(tmp_path):
    path = tmp_path / "other.pth"
    torch.save({"weight": torch.zeros(1)}, path)
    with pytest.raises(ConfigError, match=rf"other\.pth holds no weights of {SSD}"):
        create_detector(f"torchvision:{SSD}={path}", CPU)


# -- which regions are looked at ------------------------------------------------------------------


def found(*boxes):
    return [
        Detection(tuple(map(float, box)), str(at), 1 - at / 100) for at, box in enumerate(boxes)
    ]


def names(rules, *boxes, size=(80, 40)):
    return [region.name for region in rules.regions(*size, found(*boxes))]


FIXED = ["upper left", "upper right", "lower left", "lower right", "centre"]


def test_fixed_regions_come_first_and_are_not_counted():
    boxes = [(0, 0, 9, 9), (1, 1, 9, 9), (2, 2, 9, 9)]
    assert names(RegionRules(), *boxes) == [*FIXED, "0", "1", "2"]
    assert names(RegionRules(most=2), *boxes) == [*FIXED, "0", "1"]
    assert names(RegionRules(fixed=False, most=2), *boxes) == ["0", "1"]
    assert names(RegionRules(most=0), *boxes) == FIXED
    assert names(RegionRules(fixed=False)) == []


def test_boxes_are_cut_to_the_picture_and_keep_their_score():
    rules = RegionRules(fixed=False)
    (region,) = rules.regions(80, 40, [Detection((-5, -math.inf, 90, 41), "cat", 0.7)])
    assert region == ("cat", (0, 0, 80, 40), 0.7)


def test_boxes_that_are_no_part_of_the_picture_are_dropped():
    nan = math.nan
    bad = [(3, 3, 3, 9), (9, 3, 3, 9), (80, 0, 90, 9), (-9, 0, 0, 9), (0, 41, 9, 50)]
    bad += [(nan, 0, 9, 9), (0, nan, 9, 9), (0, 0, nan, 9), (0, 0, 9, nan)]
    assert names(RegionRules(fixed=False), *bad) == []
    # And do not count among the most.
    assert names(RegionRules(fixed=False, most=1), *bad, (0, 0, 9, 9)) == [str(len(bad))]


def test_the_least_area_is_a_share_of_the_picture_after_cutting():
    rules = RegionRules(fixed=False, least_area=0.25)  # of 80 x 40: 800 pixels
    assert names(rules, (0, 0, 40, 20), (0, 0, 40, 19.9), (-40, 0, 20, 20)) == ["0"]


@pytest.mark.parametrize("wrong", [{"most": -1}, {"least_area": 1.1}, {"least_area": math.nan}])
def test_rules_that_make_no_sense_are_refused(wrong):
    with pytest.raises(ConfigError, match=next(iter(wrong))):
        RegionRules(**wrong)
