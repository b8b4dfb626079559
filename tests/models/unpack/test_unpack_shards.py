"""`fastgoal unpack` of shards: what becomes of each sample, and of a folder that is there."""

import io
import json
import re
import tarfile
from pathlib import Path

import pytest
from PIL import Image
from typer.testing import CliRunner

from fastgoal_models import parts, read_glit
from fastgoal_models.cli import app
from fastgoal_models.errors import ConfigError
from fastgoal_models.sets import read_set
from fastgoal_models.unpack import Columns, UnpackError, UnpackOptions, folder, unpack
from tests.models.small_models import CONFIG


def picture(colour, kind="PNG"):
    file = io.BytesIO()
    Image.new("RGB", (48, 32), colour).save(file, kind)
    return file.getvalue()


def write_shard(path: Path, files) -> Path:
    """Files by name, or as (name, contents) where a name comes again; a dict becomes JSON."""
    with tarfile.open(path, "w") as tar:
        for name, data in files.items() if isinstance(files, dict) else files:
            data = json.dumps(data).encode() if isinstance(data, dict) else data
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return path


def rows_in(out: Path) -> list[dict]:
    return [json.loads(line) for line in (out / "captions.jsonl").read_text("utf-8").splitlines()]


def files_in(out: Path) -> dict[str, bytes]:
    return {p.relative_to(out).as_posix(): p.read_bytes() for p in out.rglob("*") if p.is_file()}


def fastgoal(*words: object) -> tuple[int, str]:
    found = CliRunner().invoke(app, [str(word) for word in words], env={"COLUMNS": "500"})
    return found.exit_code, re.sub(r"\x1b\[[0-9;]*m", "", found.output)


def colours(tmp_path: Path, number=23, a_shard=9) -> str:
    """Plain pictures in shards, one sample in seven of them broken."""
    for start in range(0, number, a_shard):
        files = {}
        for at in range(start, min(start + a_shard, number)):
            data = picture((at, 0, 0))
            files[f"{at:04}.png"] = data[:40] if at % 7 == 3 else data
            files[f"{at:04}.json"] = {"caption": f"Red number {at}. It is plain."}
        write_shard(tmp_path / f"part-{start // a_shard}.tar", files)
    return str(tmp_path / "part-*.tar")


def test_samples_of_every_kind(tmp_path):
    glit = {
        "id": 7, "image": "else/where.png", "width": 48, "height": 32,
        "caption": "A red one. It is plain.", "sentences": ["A red one.", "It is plain."],
        "pairs": [{"sentence": 1, "box": [0, 0, 24, 16], "region": "upper left", "score": 0.5}],
        "source": {"set": "mine"},
    }  # fmt: skip
    red, green, blue = picture("red"), picture("green", "JPEG"), picture("blue", "WEBP")
    shard = write_shard(
        tmp_path / "a.tar",
        {
            "sa_1.jpg": red, "sa_1.json": glit,  # a PNG, whatever it is called
            "sa_2.txt": "\ufeffÉn grøn.\n".encode(), "sa_2.jpeg": green,
            "sub/3.webp": blue, "sub/3.txt": b"not this", "sub/3.json": {"caption": "A blue one."},
        },
    )  # fmt: skip
    found = unpack(str(shard), tmp_path / "out")
    assert str(found.report) == "3 records read, none skipped"
    assert rows_in(tmp_path / "out") == [
        {**glit, "id": "7", "image": "images/00000/sa_1.png"},
        {"id": "a.tar/sa_2", "image": "images/00000/sa_2.jpg", "caption": "Én grøn."},
        {"id": "a.tar/sub/3", "image": "images/00000/3.webp", "caption": "A blue one."},
    ]
    wanted = {"sa_1.png": red, "sa_2.jpg": green, "3.webp": blue}
    there = {p.name: p.read_bytes() for p in (tmp_path / "out" / "images" / "00000").iterdir()}
    assert there == wanted
    records, report = read_glit(tmp_path / "out" / "captions.jsonl")
    assert report.read == 3 and records[0].pairs[0].score == 0.5
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == [
        "captions.jsonl", "captions.jsonl.provenance.json", "images",
    ]  # fmt: skip


def test_captions_by_choice(tmp_path):
    row = {"raw_caption": "raw", "longSV_captions": ["One.", " ", "Two."], "longIB_captions": None}
    source = str(write_shard(tmp_path / "a.tar", {"1.png": picture("red"), "1.json": row}))

    def row_with(*keys):
        out = tmp_path / "-".join(keys)
        unpack(source, out, UnpackOptions(Columns(captions=keys)))
        (row,) = rows_in(out)
        return {key: value for key, value in row.items() if key not in ("id", "image")}

    assert row_with("raw_caption") == {
        "caption": "raw", "longSV_captions": ["One.", " ", "Two."], "longIB_captions": None
    }  # fmt: skip
    assert row_with("longSV_captions", "raw_caption", "longIB_captions") == {
        "caption": "One.", "captions": ["One.", "Two.", "raw"]
    }  # fmt: skip
    several = read_set("jsonl", tmp_path / "longSV_captions-raw_caption-longIB_captions")
    assert several.images[0].captions == ("One.", "Two.", "raw")


def test_what_can_not_be_used_is_counted(tmp_path):
    png = picture("red")
    good = {"caption": "A red one."}
    write_shard(
        tmp_path / "a.tar",
        {
            "01.png": png, "01.json": good | {"id": "same"},
            "02.png": png, "02.json": good | {"id": "same"},
            "03.json": good,
            "04.png": b"", "04.json": good,
            "05.png": png[:50], "05.json": good,
            "06.png": b"not a picture", "06.json": good,
            "07.png": png, "07.json": b"\xff",
            "08.png": png, "08.json": b"[" * 100_000,
            "09.png": png, "09.json": b"[]",
            "10.png": png, "10.json": {"else": 1},
            "11.png": png, "11.json": {"caption": 3},
            "12.png": png, "12.json": {"caption": ["a", {}]},
            "13.png": png, "13.json": {"caption": " \u200b\n"},
            "14.png": png, "14.txt": b"caf\xe9",
            "15.png": png,
            "16.png": png, "16.json": b'{"caption": "half \\ud800"}',
            "17.png": png, "17.json": good | {"note": "\ud800"},
            "18.png": png, "18.json": good | {"id": ["a"]},
            "19\udcff.png": png, "19\udcff.json": good,
            "20.png": png, "20.json": good,
        },
    )  # fmt: skip
    whole = write_shard(tmp_path / "b.tar", {"1.png": png, "1.json": good}).read_bytes()
    (tmp_path / "b.tar").write_bytes(whole[: 512 + len(png)])  # within the first file's padding
    found = unpack(str(tmp_path / "?.tar"), tmp_path / "out")
    assert [row["id"] for row in rows_in(tmp_path / "out")] == ["same", "a.tar/20"]
    assert found.report.counts == {
        "shard is broken": 1, "id appears twice": 1, "sample has no image": 1,
        "image is empty (zero bytes)": 1, "image is corrupt": 2, "line is not UTF-8": 1,
        "line is not JSON": 1, "line is not an object": 1, "caption is missing": 3,
        "caption is not text": 2, "caption is empty": 1, "caption is not UTF-8": 1,
        "text is not valid Unicode": 3, "id is not text": 1,
    }  # fmt: skip
    assert found.report.names["text is not valid Unicode"][2] == "a.tar/19\\udcff"
    notes = json.loads((tmp_path / "out" / "captions.jsonl.provenance.json").read_text())
    assert notes["skipped"] == found.report.counts
    assert len(list((tmp_path / "out" / "images").rglob("*.png"))) == 2


def test_no_name_leaves_the_folder_or_meets_another(tmp_path):
    names = [
        "../../evil", "/etc/evil2", "a/../../evil", "~", "dir/Cat", "dir/cat", "CAT", "0006",
        "con", "COM1", "ſ", "Ka\u0308tzchen", "x" * 180, "-dash", "a\\b", "a b", "0010", "last",
    ]  # fmt: skip
    files = []
    for at, name in enumerate(names):
        row = {"caption": f"Number {at}.", "id": f"../../{name}{at}", "image": "/etc/passwd"}
        files += [(f"{name}.png", picture((at, 0, 0))), (f"{name}.json", row)]
    out = tmp_path / "deep" / "er" / "out"
    found = unpack(str(write_shard(tmp_path / "a.tar", files)), out)
    assert found.report.read == len(names) and found.report.skipped == 0
    before = {tmp_path / "a.tar", *(p for p in out.rglob("*") if p.is_file())}
    assert {p for p in tmp_path.rglob("*") if p.is_file()} == before
    rows = rows_in(out)
    assert [Path(row["image"]).stem for row in rows] == [
        "evil", "evil2", "0002", "0003", "Cat", "0005", "0006", "0007",
        "0008", "0009", "0010", "0011", "0012", "0013", "0014", "0015", "0016", "last",
    ]  # fmt: skip
    for at, row in enumerate(rows):
        assert (out / row["image"]).read_bytes() == picture((at, 0, 0))
        assert re.fullmatch(r"images/00000/[\w-]+\.png", row["image"])
    records, report = read_glit(out / "captions.jsonl")
    assert report.skipped == 0 and records[0].id == "../../../../evil0"


def test_a_name_that_is_a_number_taken_before(tmp_path):
    files = [(f"{name}.{end}", data) for name in ("0001", "d/0001", "e/0001") for end, data in (
        ("png", picture("red")), ("txt", b"A red one.")
    )]  # fmt: skip
    unpack(str(write_shard(tmp_path / "a.tar", files)), tmp_path / "out")
    assert [Path(row["image"]).stem for row in rows_in(tmp_path / "out")] == [
        "0001", "0001-1", "0002",
    ]  # fmt: skip


@pytest.mark.parametrize("stop", [1, 4, 6, 10, 22])
def test_interrupted_it_goes_on(tmp_path, monkeypatch, stop):
    monkeypatch.setattr(folder, "PART", 4)
    monkeypatch.setattr(folder, "_AHEAD", 3)
    source = colours(tmp_path)
    wanted = unpack(source, tmp_path / "wanted")
    assert (wanted.report.read, wanted.report.counts) == (20, {"image is corrupt": 3})
    decode, calls = folder.decode_image, []

    def interrupted(*arguments):
        calls.append(1)
        if len(calls) == stop:
            raise KeyboardInterrupt
        return decode(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(folder, "decode_image", interrupted)
        assert fastgoal("unpack", source, "--out", tmp_path / "out") == (130, "Interrupted.\n")
    assert not (tmp_path / "out" / "captions.jsonl").exists()
    code, said = fastgoal("unpack", source, "--out", tmp_path / "out")
    assert code == 0 and str(wanted.report) in said
    done = 23 - (stop - 1) // 4 * 4  # whole parts are kept
    assert f"{done} samples in" in said
    assert files_in(tmp_path / "out") == files_in(tmp_path / "wanted")


def test_an_id_of_a_part_that_was_done_before(tmp_path, monkeypatch):
    monkeypatch.setattr(folder, "PART", 2)
    monkeypatch.setattr(folder, "_AHEAD", 1)
    files = {}
    for at, identity in enumerate(["a", "b", "c", "a"]):
        files[f"{at}.png"] = picture((at, 0, 0))
        files[f"{at}.json"] = {"id": identity, "caption": f"Number {at}."}
    source, decode = str(write_shard(tmp_path / "a.tar", files)), folder.decode_image

    def interrupted(data, name):
        if name == "a.tar/2":
            raise KeyboardInterrupt
        return decode(data, name)

    with monkeypatch.context() as patch:
        patch.setattr(folder, "decode_image", interrupted)
        with pytest.raises(KeyboardInterrupt):
            unpack(source, tmp_path / "out")
    again = unpack(source, tmp_path / "out")
    assert (again.samples, again.report.counts) == (2, {"id appears twice": 1})
    assert [row["id"] for row in rows_in(tmp_path / "out")] == ["a", "b", "c"]


def test_a_folder_of_something_else_is_refused(tmp_path, monkeypatch):
    source, out = colours(tmp_path), tmp_path / "out"
    assert unpack(source, out, UnpackOptions(limit=5)).report.read == 4
    there = files_in(out)
    again = unpack(source, out, UnpackOptions(limit=5))
    assert (again.samples, again.report.counts) == (0, {"image is corrupt": 1})
    with pytest.raises(UnpackError, match=r"another --limit \(there 5, here None\)\. Fix: "):
        unpack(source, out)
    with pytest.raises(UnpackError, match=r"--caption-column .*, --limit \(there 5, here 6\)"):
        unpack(source, out, UnpackOptions(Columns(captions=("caption", "caption")), limit=6))
    with pytest.raises(UnpackError, match=r"another SOURCE \(it is another, or has changed\)\. "):
        unpack(str(tmp_path / "part-[01].tar"), out, UnpackOptions(limit=5))
    assert files_in(out) == there
    (out / "captions.jsonl").unlink()  # to have it anew
    unpack(source, out, UnpackOptions(limit=5))
    assert files_in(out) == there

    # The same while it is not finished.
    half = tmp_path / "half"
    monkeypatch.setattr(folder, "_join", lambda *arguments: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        unpack(source, half)
    with pytest.raises(UnpackError, match="another --limit"):
        unpack(source, half, UnpackOptions(limit=5))

    own = tmp_path / "own"
    (own / "images").mkdir(parents=True)
    with pytest.raises(UnpackError, match="own holds images already, not of this command"):
        unpack(source, own)
    with pytest.raises(UnpackError, match="is a file"):
        unpack(source, tmp_path / "part-0.tar")


def test_nothing_usable_leaves_room_for_another_try(tmp_path, monkeypatch):
    row = {"caption": "", "longSV_captions": "A red one."}
    source = str(write_shard(tmp_path / "a.tar", {"1.png": picture("red"), "1.json": row}))
    with pytest.raises(UnpackError, match=r"no sample[^$]*1 × caption is empty: a\.tar/1"):
        unpack(source, tmp_path / "out")
    # Killed before all of that is taken away, no part is left for a run with other options.
    with monkeypatch.context() as patch:
        patch.setattr(parts.shutil, "rmtree", lambda *arguments, **options: None)
        with pytest.raises(UnpackError):
            unpack(source, tmp_path / "half")
    assert [path.name for path in (tmp_path / "half" / ".unpack").iterdir()] == ["run.json"]
    options = UnpackOptions(Columns(captions=("longSV_captions",)))
    assert unpack(source, tmp_path / "out", options).report.read == 1


@pytest.mark.parametrize(
    "words, message",
    [
        (["no-*.tar"], r"SOURCE: there is no shard .*no-\*\.tar\. Fix: .* in quotes"),
        (["a.tar.gz"], r"SOURCE .*plain tar files\. Fix: decompress them"),
        (["part-0.tar", "--split", "test"], r"--split is for datasets.* Fix: leave it out"),
        (["part-0.tar", "--keep-column", "url"], r"--keep-column is for datasets"),
        (
            ["part-0.tar", "--caption-column", "captoin"],
            r"--caption-column captoin: .* only caption",
        ),
        (["part-0.tar", "--id-column", "key"], r"--id-column key: .* Fix: name one of those"),
        (["no/such/folder"], r"SOURCE .*: there is no such folder\. Fix: "),
        (["part-0.tar", "--limit", "0"], r"--limit"),
    ],
)
def test_errors_name_the_argument_and_the_fix(tmp_path, words, message):
    colours(tmp_path)
    code, said = fastgoal("unpack", tmp_path / words[0], *words[1:], "--out", tmp_path / "out")
    assert code == 2 and re.search(message, said, re.DOTALL), said
    assert not (tmp_path / "out").exists()


def test_the_result_is_what_the_other_commands_read(tmp_path):
    source, out = colours(tmp_path), tmp_path / "out"
    code, said = fastgoal(
        "unpack", source, "--out", out, "--limit", 9, "--json", tmp_path / "told.json"
    )
    assert code == 0 and "8 records read, 1 skipped" in said and "captions.jsonl written" in said
    told = json.loads((tmp_path / "told.json").read_text())
    assert (told["read"], told["skipped"], told["samples"]) == (8, {"image is corrupt": 1}, 9)
    model = tmp_path / "model.json"
    model.write_text(json.dumps(CONFIG))
    jsonl = out / "captions.jsonl"
    code, said = fastgoal(
        "prepare",
        "--data",
        jsonl,
        "--out",
        out / "pairs.jsonl",
        "--model",
        model,
        "--device",
        "cpu",
    )
    assert code == 0 and "8 records read, none skipped" in said, said
    code, said = fastgoal(
        "train", "fast-goal", "--data", out / "pairs.jsonl", "--out", tmp_path / "run", "--model",
        model, "--context-length", 24, "--batch-size", 2, "--steps", 1, "--device", "cpu",
    )  # fmt: skip
    assert code == 0 and "8 records read, none skipped" in said, said
    code, said = fastgoal("eval", "--model", tmp_path / "run", "--data", jsonl, "--device", "cpu")
    assert code == 0 and "8 records read, none skipped" in said, said


def test_options_of_datasets_are_refused_in_python_too(tmp_path):
    with pytest.raises(ConfigError, match="--image-column"):
        unpack(colours(tmp_path), tmp_path / "out", UnpackOptions(Columns(image="jpg")))
