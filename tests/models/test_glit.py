"""GLIT files: every kind of bad input, whole writes, and the training data made of them."""

import json
import os
import sys
import warnings
from dataclasses import replace

import numpy as np
import open_clip
import pytest
import torch
import torch.nn.functional as F
from PIL import EpsImagePlugin, Image
from torch.utils.data import DataLoader

from fastgoal_models import (
    FastGoalDataset,
    GlitError,
    GlitRecord,
    LocalPair,
    SkipReport,
    collate,
    read_glit,
    write_glit,
)
from fastgoal_models.pictures import crop_region, decode_image, image_tensor, load_image
from fastgoal_models.skips import Unusable

TOKENIZER = open_clip.SimpleTokenizer(context_length=248)
CAPTION = "A red cat sleeps. It lies on 2.5 blue rugs! The wall is green."
SENTENCES = ["A red cat sleeps.", "It lies on 2.5 blue rugs!", "The wall is green."]
PAIR = {"sentence": 1, "box": [10, 5, 30, 25], "region": "centre", "score": 0.3}


def picture(width=40, height=30, seed=0):
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(pixels)


@pytest.fixture
def folder(tmp_path):
    """A data folder with a picture, and one more outside of it."""
    root = tmp_path / "data"
    (root / "images").mkdir(parents=True)
    picture().save(root / "images" / "cat.png")
    picture().save(tmp_path / "outside.png")
    return root


def line(**changes):
    row = {"id": "cat", "image": "images/cat.png", "caption": CAPTION, "pairs": [PAIR]} | changes
    return json.dumps({key: value for key, value in row.items() if value is not None})


def write_lines(folder, *lines):
    path = folder / "glit.jsonl"
    path.write_bytes(b"\n".join(x if isinstance(x, bytes) else x.encode() for x in lines) + b"\n")
    return path


def test_a_record(folder):
    records, report = read_glit(write_lines(folder, line(licence="CC0", width=40, height=30)))
    assert records == [
        GlitRecord(
            id="cat",
            image=(folder / "images" / "cat.png").resolve(),
            width=40,
            height=30,
            caption=CAPTION,
            sentences=tuple(SENTENCES),
            pairs=(LocalPair(1, (10.0, 5.0, 30.0, 25.0), "centre", 0.3),),
            extra={"licence": "CC0"},
        )
    ]
    assert str(report) == "1 records read, none skipped"


def test_only_image_and_caption_are_needed(folder):
    records, _ = read_glit(write_lines(folder, line(id=None, pairs=None), "", "  "))
    assert (records[0].id, records[0].pairs) == ("images/cat.png", ())


def test_utf8_with_and_without_a_mark(folder):
    text = line(caption="Ein schönes Kätzchen 🐈.", pairs=None)
    raw = json.dumps(json.loads(text), ensure_ascii=False).encode()
    for start in (b"", b"\xef\xbb\xbf"):
        records, _ = read_glit(write_lines(folder, start + raw))
        assert records[0].caption == "Ein schönes Kätzchen 🐈."


def test_another_root(folder, tmp_path):
    path = tmp_path / "glit.jsonl"
    path.write_text(line() + "\n")
    assert len(read_glit(path, root=folder)[0]) == 1
    assert read_glit(path)[1].counts == {"image is missing": 1}


def make_bad_images(folder):
    images = folder / "images"
    images.joinpath("empty.png").touch()
    images.joinpath("text.jpg").write_text("not a picture")
    picture(300, 200).save(images / "whole.jpg")
    whole = (images / "whole.jpg").read_bytes()
    images.joinpath("cut.jpg").write_bytes(whole[: len(whole) // 2])
    picture(400, 400).save(images / "large.png")


BAD_LINES = {
    "not JSON": ('{"image": "images/cat.png", "cap', "line is not JSON"),
    "endless JSON": ("[" * 100_000, "line is not JSON"),
    "a list": ("[1, 2]", "line is not an object with an image"),
    "no image": (line(image=None), "line is not an object with an image"),
    "image of a wrong type": (line(image=3), "line is not an object with an image"),
    "not UTF-8": (line().encode()[:-2] + b"\xff}", "line is not UTF-8"),
    "no caption": (line(caption=None), "caption is empty"),
    "empty caption": (line(caption=""), "caption is empty"),
    "blank caption": (line(caption=" \n\t\u00a0"), "caption is empty"),
    "caption of a wrong type": (line(caption=["A cat."]), "caption is empty"),
    "blank captions": (line(caption=None, captions=["", " "]), "caption is empty"),
    "captions of a wrong type": (line(captions="A cat."), "captions are not a list of texts"),
    "a caption of a wrong type": (line(captions=["A", None]), "captions are not a list of texts"),
    "half a surrogate in captions": (
        line(captions=["A \ud83d cat."]),
        "caption is not valid Unicode",
    ),
    "half a surrogate": (line(caption="A \ud83d cat."), "caption is not valid Unicode"),
    "other sentences": (line(sentences=SENTENCES[:2]), "sentences do not make up the caption"),
    "a cut word": (
        line(sentences=[CAPTION[:3], CAPTION[3:]], pairs=None),
        "sentences do not make up the caption",
    ),
    "an empty sentence": (
        line(sentences=[*SENTENCES, " "]),
        "sentences do not make up the caption",
    ),
    "sentences of a wrong type": (line(sentences=CAPTION), "sentences do not make up the caption"),
    "missing image": (line(image="images/dog.png"), "image is missing"),
    "a folder": (line(image="images"), "image is missing"),
    "a zero byte": (line(image="images/\x00.png"), "image is missing"),
    "an endless name": (line(image="a" * 5000), "image is missing"),
    "zero bytes": (line(image="images/empty.png"), "image is empty (zero bytes)"),
    "not a picture": (line(image="images/text.jpg"), "image is corrupt"),
    "cut short": (line(image="images/cut.jpg"), "image is corrupt"),
    "up": (line(image="../outside.png"), "image leaves the data folder"),
    "up and down": (line(image="images/../../outside.png"), "image leaves the data folder"),
    "absolute": (line(image="/etc/passwd"), "image leaves the data folder"),
    "absolute elsewhere": (line(image="C:\\cat.png"), "image leaves the data folder"),
    "a share": (line(image="\\\\host\\cat.png"), "image leaves the data folder"),
    "another size": (line(width=41, height=30), "boxes are for a picture of another size"),
}
for name, change in {
    "no such sentence": {"sentence": 3},
    "a negative sentence": {"sentence": -1},
    "sentence of a wrong type": {"sentence": "It lies"},
    "three corners": {"box": [1, 2, 3]},
    "an empty box": {"box": [10, 5, 10, 25]},
    "a box turned round": {"box": [30, 5, 10, 25]},
    "a box beside the picture": {"box": [41, 5, 50, 25]},
    "not a number": {"box": [float("nan"), 5, 30, 25]},
    "box of a wrong type": {"box": "centre"},
}.items():
    BAD_LINES[name] = (
        line(pairs=[PAIR | change]),
        "local pair names no sentence or no part of the picture",
    )
BAD_LINES["pairs of a wrong type"] = (line(pairs={"a": 1}), BAD_LINES["three corners"][1])


@pytest.mark.parametrize("name", BAD_LINES)
def test_bad_lines(folder, name):
    make_bad_images(folder)
    bad, reason = BAD_LINES[name]
    path = write_lines(folder, line(id="first"), bad, line(id="last"))
    records, report = read_glit(path)
    assert [record.id for record in records] == ["first", "last"]
    assert report.counts == {reason: 1}
    assert report.names[reason][0].startswith("line 2")
    with pytest.raises(GlitError) as error:
        read_glit(path, strict=True)
    assert str(path) in str(error.value)
    assert "line 2" in str(error.value)
    assert reason in str(error.value)


@pytest.mark.skipif(sys.platform == "win32", reason="links need rights there")
def test_links_may_not_leave_the_folder(folder, tmp_path):
    (folder / "images" / "link.png").symlink_to(tmp_path / "outside.png")
    (folder / "away").symlink_to(tmp_path)
    (folder / "images" / "within.png").symlink_to(folder / "images" / "cat.png")
    (folder / "images" / "circle.png").symlink_to(folder / "images" / "circle.png")
    path = write_lines(
        folder,
        line(id="a", image="images/link.png"),
        line(id="b", image="away/outside.png"),
        line(id="c", image="images/within.png"),
        line(id="d", image="images/circle.png"),
    )
    records, report = read_glit(path)
    assert [record.id for record in records] == ["c"]
    assert report.counts == {"image leaves the data folder": 2, "image is missing": 1}


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="no named pipes here")
def test_a_pipe_is_not_waited_for(folder):
    os.mkfifo(folder / "images" / "pipe.png")
    path = write_lines(folder, line(image="images/pipe.png"))
    assert read_glit(path)[1].counts == {"image is missing": 1}


@pytest.mark.parametrize("limit", [40 * 30 - 1, 500])  # Pillow warns at once, refuses at twice
def test_decompression_bombs(folder, monkeypatch, limit):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", limit)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", Image.DecompressionBombWarning)
        _, report = read_glit(write_lines(folder, line()))
        assert report.counts == {f"image has more than {limit:,} pixels": 1}
        with pytest.raises(GlitError, match="pixels"):
            load_image(folder / "images" / "cat.png")


def test_ids_seen_before(folder):
    records, report = read_glit(
        write_lines(folder, line(), line(caption="B.", pairs=None), line(id="dog"))
    )
    assert [record.id for record in records] == ["cat", "dog"]
    assert records[0].caption == CAPTION
    assert report.names == {"id appears twice": ["cat"]}


def test_an_id_that_is_null_is_none(folder):
    rows = [json.loads(line(image=f"images/{name}.png", id=None)) for name in ("cat", "dog")]
    picture().save(folder / "images" / "dog.png")
    records, report = read_glit(write_lines(folder, *(json.dumps(r | {"id": None}) for r in rows)))
    assert [record.id for record in records] == ["images/cat.png", "images/dog.png"]
    assert report.skipped == 0


def test_several_captions(folder):
    both = ["A cat.", " ", "It is red."]
    records, report = read_glit(
        write_lines(
            folder,
            line(id="own", captions=both),
            line(id="first", captions=[*both], caption=None, pairs=None),
            line(id="null", pairs=None).replace("}", ', "captions": null}'),
        )
    )
    assert report.skipped == 0
    assert [record.caption for record in records] == [CAPTION, "A cat.", CAPTION]
    assert [record.captions for record in records] == [("A cat.", "It is red.")] * 2 + [()]
    assert records[1].sentences == ("A cat.",) and records[1].extra == {}
    path = write_glit(records, folder / "again.jsonl")
    assert read_glit(path)[0] == records
    assert ["captions" in json.loads(row) for row in path.read_text().splitlines()] == [1, 1, 0]


def test_an_id_of_a_skipped_record_is_free(folder):
    records, _ = read_glit(write_lines(folder, line(caption=""), line()))
    assert [record.id for record in records] == ["cat"]


def test_without_verification_only_headers_are_read(folder):
    make_bad_images(folder)
    path = write_lines(folder, line(image="images/cut.jpg"))
    records, report = read_glit(path, verify_images=False)
    assert (len(records), report.skipped) == (1, 0)
    assert (records[0].width, records[0].height) == (300, 200)


def test_the_report_counts_and_names_the_first():
    report = SkipReport(read=7)
    for number in range(5):
        report.add("image is missing", f"line {number}")
    report.add("caption is empty", "line 9")
    assert report.skipped == 6
    assert str(report).splitlines() == [
        "7 records read, 6 skipped:",
        "  5 × image is missing: line 0, line 1, line 2, …",
        "  1 × caption is empty: line 9",
    ]


def test_many_lines_keep_their_order(folder):
    path = write_lines(folder, *(line(id=str(i)) for i in range(100)))
    assert [record.id for record in read_glit(path)[0]] == [str(i) for i in range(100)]


# -- pictures -------------------------------------------------------------------------------------


def test_pictures_are_turned_upright(folder):
    image = Image.new("RGB", (40, 20), "blue")
    image.paste("red", (0, 0, 10, 20))  # the left end
    exif = Image.Exif()
    exif[0x0112] = 6  # to be shown after a quarter turn to the right: the left end comes up
    image.save(folder / "turned.png", exif=exif)
    records, _ = read_glit(write_lines(folder, line(image="turned.png", pairs=None)))
    assert (records[0].width, records[0].height) == (20, 40)
    upright = load_image(folder / "turned.png")
    assert upright.size == (20, 40)
    assert upright.getpixel((10, 2)) == (255, 0, 0)
    assert upright.getpixel((10, 30)) == (0, 0, 255)


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGBA", "CMYK", "I;16", "I"])
def test_every_mode_becomes_rgb(tmp_path, mode):
    grey = np.tile(np.linspace(0, 255, 32, dtype=np.uint8), (8, 1))
    path = tmp_path / ("picture.tif" if mode in ("CMYK", "I") else "picture.png")
    if mode.startswith("I"):
        wide = grey.astype(np.uint16) * 257
        Image.fromarray(wide if mode == "I;16" else wide.astype(np.int32)).save(path)
    else:
        image = Image.fromarray(grey).convert("RGB")
        (image.quantize(256) if mode == "P" else image.convert(mode)).save(path)
    image = load_image(path)
    assert (image.mode, image.size) == ("RGB", (32, 8))
    found = np.asarray(image)[..., 0].astype(int)
    if mode != "1":  # which is dithered
        assert np.abs(found - grey).max() <= 2  # quantised and inked colours are rounded


def test_crops_hold_what_a_box_touches():
    image = picture(40, 30)
    assert crop_region(image, (10.2, 5.9, 29.5, 25)).size == (20, 20)
    assert crop_region(image, (-5, -5, 100, 100)).size == (40, 30)
    assert crop_region(image, (3.1, 3.1, 3.2, 3.2)).size == (1, 1)
    assert crop_region(image, (39.9, 29.9, 60, 60)).size == (1, 1)
    crop = crop_region(image, (10, 5, 30, 25))
    assert np.array_equal(np.asarray(crop), np.asarray(image)[5:25, 10:30])


def levels(pixels: torch.Tensor) -> torch.Tensor:
    """What was normalised, 0 to 255."""
    mean, std = (
        torch.tensor(of_clip)[:, None, None]
        for of_clip in (open_clip.OPENAI_DATASET_MEAN, open_clip.OPENAI_DATASET_STD)
    )
    found = (pixels * std + mean) * 255
    torch.testing.assert_close(found, found.round(), rtol=0, atol=1e-3)
    return found.round()


def test_postscript_is_no_picture(tmp_path, monkeypatch):
    """Pillow would have Ghostscript run it, and a set may hold anything under any name."""
    path = tmp_path / "program.jpg"
    picture(8, 8).save(path, "EPS")
    run = []
    monkeypatch.setattr(EpsImagePlugin, "Ghostscript", lambda *a, **k: run.append(a))
    with pytest.raises(GlitError, match=r"no picture in a known format.*: image is corrupt"):
        load_image(path)
    assert not run


def test_a_broken_picture_has_the_same_words_each_time():
    words = []
    for _ in range(2):
        with pytest.raises(Unusable) as caught:
            decode_image(b"not a picture", "cat.jpg")
        words.append(str(caught.value))
    assert words == ["cat.jpg (no picture in a known format): image is corrupt"] * 2


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "PPM"])
def test_formats(tmp_path, kind):
    path = tmp_path / "picture"
    Image.new("RGB", (8, 6), "red").save(path, kind)
    image = load_image(path)
    assert image.size == (8, 6) and image.getpixel((4, 3))[0] > 250


@pytest.mark.parametrize("size", [(40, 30), (300, 100), (7, 200), (640, 480)])
def test_tensors_are_open_clips_squash(size):
    image = picture(*size)
    theirs = open_clip.image_transform(
        32,
        is_train=False,
        resize_mode="squash",
        mean=open_clip.OPENAI_DATASET_MEAN,
        std=open_clip.OPENAI_DATASET_STD,
    )
    ours = image_tensor(image, 32)
    assert ours.is_contiguous() and ours.dtype == torch.float32
    # Bytes of Pillow there, of PyTorch here, which round between their two passes each its own way:
    # as near to what float64 gives, to a twentieth of a level.
    exact = torch.from_numpy(np.array(image, np.float64)).permute(2, 0, 1)[None]
    exact = F.interpolate(exact, (32, 32), mode="bicubic", antialias=True)[0].clamp(0, 255)
    off, theirs_off = (float((levels(x) - exact).abs().mean()) for x in (ours, theirs(image)))
    assert off < theirs_off + 0.05 < 0.4
    if min(size) > 32:  # enlarged noise overshoots, and is cut at 0 and 255 between the passes
        assert (levels(ours) - levels(theirs(image))).abs().max() <= 1


# -- writing --------------------------------------------------------------------------------------


def test_writing_goes_round(folder):
    rows = [line(id="a", licence="CC0"), line(id="b", caption="Kätzchen 🐈\nschlafen.", pairs=None)]
    records, _ = read_glit(write_lines(folder, *rows))
    path = write_glit(records, folder / "new" / ".." / "again.jsonl")
    assert read_glit(path) == (records, SkipReport(read=2))
    assert json.loads(path.read_text("utf-8").splitlines()[0])["image"] == "images/cat.png"
    assert sorted(x.name for x in folder.iterdir() if x.is_file()) == ["again.jsonl", "glit.jsonl"]


def test_a_failed_write_changes_nothing(folder):
    path = write_lines(folder, line())
    before = path.read_bytes()
    records, _ = read_glit(path)

    def broken():
        yield records[0]
        raise RuntimeError("power cut")

    with pytest.raises(RuntimeError, match="power cut"):
        write_glit(broken(), path)
    assert path.read_bytes() == before
    assert [x.name for x in folder.iterdir() if x.is_file()] == ["glit.jsonl"]


@pytest.mark.skipif(sys.platform == "win32", reason="open files can not be replaced there")
def test_a_new_file_takes_the_old_ones_place(folder):
    path = write_lines(folder, line())
    before = path.read_bytes()
    with path.open("rb") as reader:
        write_glit(read_glit(path)[0], path)
        assert reader.read() == before  # a reader sees one whole file or the other
    assert path.read_bytes() != before


def test_images_outside_can_not_be_written(folder, tmp_path):
    records, _ = read_glit(write_lines(folder, line()))
    away = replace(records[0], image=tmp_path / "outside.png")
    with pytest.raises(GlitError, match=r"cat: image .*outside\.png lies outside"):
        write_glit([away], folder / "new.jsonl")
    assert not (folder / "new.jsonl").exists()


# -- training data --------------------------------------------------------------------------------


class CountingTokenizer(open_clip.SimpleTokenizer):
    """Counts what is encoded."""

    def __init__(self):
        super().__init__(context_length=248)
        self.encoded = []

    def encode(self, text):
        self.encoded.append(text)
        return super().encode(text)


@pytest.fixture
def records(folder):
    picture(64, 20, seed=1).save(folder / "images" / "dog.png")
    dog = dict(
        id="dog",
        image="images/dog.png",
        caption="A dog. It barks.",
        pairs=[PAIR | {"sentence": 0, "box": [0.5, 0, 32, 10.5]}],
    )
    return read_glit(write_lines(folder, line(), line(**dog)))[0]


def test_items(records):
    dataset = FastGoalDataset(records, TOKENIZER, 32)
    assert len(dataset) == 2
    item = dataset[0]
    image = load_image(records[0].image)
    assert torch.equal(item.images, image_tensor(image, 32))
    assert torch.equal(item.local_images, image_tensor(image.crop((10, 5, 30, 25)), 32))
    assert torch.equal(item.texts, TOKENIZER(CAPTION)[0])
    assert torch.equal(item.local_texts, TOKENIZER(SENTENCES[1])[0])
    assert item.boxes.tolist() == [10, 5, 30, 25]
    assert item.image_sizes.tolist() == [40, 30]
    start, end = item.spans.tolist()
    assert torch.equal(item.texts[start:end], item.local_texts[1 : 1 + end - start])
    assert item.local_texts[1 + end - start] == TOKENIZER.eot_token_id
    assert item.lengths == (item.texts != 0).sum()


def test_batches(records):
    dataset = FastGoalDataset(records, TOKENIZER, 32)
    batch = collate([dataset[0], dataset[1]])
    shapes = {name: (tuple(x.shape), x.dtype) for name, x in batch._asdict().items()}
    assert shapes == {
        "images": ((2, 3, 32, 32), torch.float32),
        "texts": ((2, 248), torch.int64),
        "local_images": ((2, 3, 32, 32), torch.float32),
        "local_texts": ((2, 248), torch.int64),
        "boxes": ((2, 4), torch.float32),
        "image_sizes": ((2, 2), torch.int64),
        "spans": ((2, 2), torch.int64),
        "lengths": ((2,), torch.int64),
    }
    assert all(torch.equal(a, b) for a, b in zip(batch.to("cpu"), batch, strict=True))


def test_items_are_always_the_same_also_in_workers(records):
    dataset = FastGoalDataset(records, TOKENIZER, 32)
    wanted = collate([dataset[0], dataset[1]])
    loader = DataLoader(dataset, batch_size=2, num_workers=1, collate_fn=collate)
    for batch in loader:
        assert all(torch.equal(a, b) for a, b in zip(batch, wanted, strict=True))


def test_each_caption_is_tokenised_once(records):
    tokenizer = CountingTokenizer()
    dataset = FastGoalDataset(records, tokenizer, 32)
    assert tokenizer.encoded == [CAPTION, "A dog. It barks."]
    for _ in range(2):
        collate([dataset[0], dataset[1]])
    assert len(tokenizer.encoded) == 2


def test_a_sentence_past_the_context_gives_way_to_the_next_pair(records):
    pairs = tuple(LocalPair(s, (0.0, 0.0, 20.0, 15.0), "upper left", 0.5 - s) for s in (2, 1, 0))
    long = replace(records[0], pairs=pairs)
    # "a red cat sleeps ." are 5 words, "it lies on 2.5 blue rugs !" 9 and "the wall is green ." 5
    with pytest.warns(UserWarning, match="1 of 1 captions are longer than 12 tokens"):
        dataset = FastGoalDataset([long], TOKENIZER, 32, context_length=12)
    assert dataset.truncated == 1
    assert dataset.pairs[0].sentence == 1
    item = dataset[0]
    assert torch.equal(item.texts, TOKENIZER(CAPTION, 12)[0])
    assert torch.equal(item.local_texts, TOKENIZER(SENTENCES[1], 12)[0])
    assert item.spans.tolist() == [6, 11]  # the end token stands at 11
    assert item.lengths == 12

    with pytest.warns(UserWarning, match="longer than"):
        dataset = FastGoalDataset([replace(long, pairs=pairs[:1])], TOKENIZER, 32, 12)
    item = dataset[0]  # no other pair: an empty span, for which span_mean has its rule
    assert item.spans.tolist() == [11, 11]
    assert torch.equal(item.local_texts, TOKENIZER(SENTENCES[2], 12)[0])


def test_captions_that_fit_warn_of_nothing(records):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert FastGoalDataset(records, TOKENIZER, 32).truncated == 0


def test_records_without_pairs_are_refused(records):
    unmatched = [replace(records[0], pairs=()), records[1]]
    with pytest.raises(GlitError, match=r"1 of 2 records have no local pair \(cat\).*match_pairs"):
        FastGoalDataset(unmatched, TOKENIZER, 32)
    with pytest.raises(GlitError, match="no records"):
        FastGoalDataset([], TOKENIZER, 32)


def test_a_picture_lost_since_is_named(records):
    dataset = FastGoalDataset(records, TOKENIZER, 32)
    records[0].image.unlink()
    with pytest.raises(GlitError, match=r"cat\.png: image is missing"):
        dataset[0]
