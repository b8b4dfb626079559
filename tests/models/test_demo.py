"""The demo from photographs to report, with few steps, and what its figures are made of."""

import functools
import json
import re
from pathlib import Path

import pytest
import torch
from PIL import Image
from rich.console import Console

import fastgoal_kernels
from fastgoal_models import FastGoalModel, GlitRecord, read_glit
from fastgoal_models.captions import tokenize_caption
from fastgoal_models.checkpoints import latest_checkpoint, load_checkpoint
from fastgoal_models.demo import live_bytes, maxsim_table, pictures
from fastgoal_models.demo.photographs import load_photographs
from fastgoal_models.demo.run import DemoOptions, run_demo
from fastgoal_models.demo.words import inside_and_outside, word_patch_cosines
from fastgoal_models.training import read_log

DEVICES = ["cpu"] + (["cuda"] if torch.cuda.is_available() else [])
SMALL = maxsim_table.Size(pairs=3, text_tokens=5, image_tokens=7, dim=8)


# -- the whole ------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def demo(tmp_path_factory):
    """A demo of two steps: its folder and what it printed."""
    out = tmp_path_factory.mktemp("demo") / "out"
    console = Console(record=True, width=200)
    with pytest.MonkeyPatch.context() as patch:
        # The real size takes seconds and hundreds of megabytes; the report does not care.
        quick = functools.partial(maxsim_table.compare, size=SMALL, runs=1)
        patch.setattr(maxsim_table, "compare", quick)
        options = DemoOptions(out=out, steps=2, device="cpu", command="fastgoal demo --steps 2")
        assert run_demo(options, console) == out / "report.md"
        yield out, console.export_text()


def test_the_screen_tells_what_happens(demo):
    _, text = demo
    assert "random weights" in text
    assert "step 2/2" in text and "steps/s" in text
    for part in ("loss", "global", "local", "region_tsl", "span_tsl"):
        assert part in text
    assert "not how well it generalises" in text
    assert "eager" in text and "fused" in text


def test_the_report_shows_every_picture_it_names(demo):
    out, _ = demo
    text = (out / "report.md").read_text()
    links = re.findall(r"!\[[^\]]+\]\(([^)]+)\)", text)
    photographs = load_photographs()
    sheets = -(-len(photographs) // (pictures.SHEET_COLUMNS * pictures.SHEET_ROWS))
    assert len(links) == 2 + sheets  # curves, sheets, heat map
    for link in links:
        with Image.open(out / link) as image:
            image.load()
            assert min(image.size) >= 400, link
            assert image.convert("L").getextrema() == (0, 255), link  # something is drawn


def test_the_report_says_what_it_must(demo):
    out, _ = demo
    text = (out / "report.md").read_text()
    count = len(load_photographs())
    for words in (
        f"{count} real photographs",
        "**random weights**",
        "nothing about how well it generalises",
        "*arbitrary*",
        "`fastgoal demo --steps 2`",
        f"torch {torch.__version__}",
        "| device | cpu |",
        "text → image",
        "eager, `amax`",
        "extra memory",
        "span TSL",
    ):
        assert words in text
    assert "nan" not in text.lower().replace("nanosecond", "")
    assert not any(line != line.rstrip() for line in text.splitlines())


def test_the_data_went_through_the_ordinary_reader(demo):
    out, _ = demo
    records, skipped = read_glit(out / "data" / "pairs.jsonl", strict=True)
    assert len(records) == len(load_photographs()) and skipped.skipped == 0
    assert all(len(record.pairs) == len(record.sentences) for record in records)


def test_the_losses_are_logged(demo):
    out, _ = demo
    assert [record.step for record in read_log(out)] == [1, 2]
    assert not list(out.rglob(".*"))


def test_a_second_run_replaces_the_first_and_repeats_it(demo):
    """Also the exactness of the whole: the same seed gives the same weights."""
    out, _ = demo
    before = load_checkpoint(latest_checkpoint(out / "checkpoints")).weights
    console = Console(record=True, width=200)
    run_demo(DemoOptions(out=out, steps=2, device="cpu"), console)
    assert "Replacing the earlier demo" in console.export_text()
    after = load_checkpoint(latest_checkpoint(out / "checkpoints")).weights
    for name, tensor in before.items():
        assert torch.equal(tensor, after[name]), name


# -- its figures ----------------------------------------------------------------------------------


@pytest.mark.parametrize("device", DEVICES)
def test_live_bytes_counts_what_lives_at_once(device):
    x = torch.zeros(1000, device=device)  # 4000 bytes
    with live_bytes.LiveBytes() as live:
        live.ignore([x])
        y = x + 1  # 4000
        z = y.view(10, 100)  # a view: nothing
        w = torch.cat([x, y])  # 12000
        del w
        u = z * 2  # 8000
        del y, z, u
        x.add_(1)  # in place: nothing
        v = x.repeat(2)  # 8000
    assert live.peak == 12000
    assert v.numel() == 2000


@torch.library.custom_op("fastgoal::test_scratch", mutates_args=())
def scratch(x: torch.Tensor) -> torch.Tensor:
    return x.repeat(10).view(10, -1).sum(dim=0)


@pytest.mark.parametrize("device", DEVICES)
def test_live_bytes_sees_into_our_operators(device):
    x = torch.zeros(1000, device=device)
    with live_bytes.LiveBytes() as live:
        live.ignore([x])
        scratch(x)
    assert live.peak == 4000 * 11


def test_extra_bytes_leave_out_the_gradients():
    x = torch.ones(1000, requires_grad=True)
    # x² saves x itself; its gradient is all that is made beyond the scalar and its ones.
    extra = live_bytes.extra_peak_bytes(lambda: x.square().sum(), [x])
    assert x.grad is None
    assert 4000 <= extra <= 4000 * 3  # the square, then 2x on the way to the gradient


@pytest.mark.parametrize("device", DEVICES)
def test_the_comparison_checks_before_it_times(device, monkeypatch):
    found = maxsim_table.compare(torch.device(device), size=SMALL, runs=2)
    names = [row.name for row in found.rows]
    assert names[:2] == ["eager, `max(dim)`", "eager, `amax`"] and names[2].startswith("fused")
    for row in found.rows:
        assert row.fastest <= row.seconds <= row.slowest
        assert row.extra_bytes > 0
    assert found.error < 1e-5
    wrong = lambda v, t: 1.01 * fastgoal_kernels.maxsim_contrastive_loss(v, t, 10.0)  # noqa: E731
    monkeypatch.setattr(maxsim_table, "fused_loss", wrong)
    with pytest.raises(RuntimeError, match="nothing was timed"):
        maxsim_table.compare(torch.device(device), size=SMALL, runs=1)


@pytest.mark.parametrize("reduce", ["max", "amax"])
def test_the_eager_loss_is_the_definition(reduce):
    generator = torch.Generator().manual_seed(0)
    v = torch.randn(4, 6, 8, generator=generator, dtype=torch.float64)
    t = torch.randn(4, 5, 8, generator=generator, dtype=torch.float64)
    expected = fastgoal_kernels.reference.maxsim_contrastive_loss(v, t, maxsim_table.LOGIT_SCALE)
    torch.testing.assert_close(maxsim_table.eager_loss(v, t, reduce), expected)


@pytest.fixture(scope="module")
def model() -> FastGoalModel:
    torch.manual_seed(0)
    config = {
        "embed_dim": 16,
        "vision_cfg": {
            "image_size": 48, "layers": 1, "width": 32, "head_width": 16, "patch_size": 16
        },
        "text_cfg": {"context_length": 24, "width": 16, "heads": 2, "layers": 1},
    }  # fmt: skip
    return FastGoalModel.create(config, context_length=24)


SENTENCES = ("A grey cat sleeps.", "Its hyperventilating, green-eyed friend doesn't.")


def test_words_are_whole_and_their_cosines_those_of_their_tokens(model):
    model.train()
    image = torch.randn(3, 48, 48, generator=torch.Generator().manual_seed(1))
    words, cosines = word_patch_cosines(model, image, SENTENCES, 0)
    assert model.training
    assert words == ["a", "grey", "cat", "sleeps"]
    assert cosines.shape == (4, 3, 3) and float(cosines.abs().max()) <= 1 + 1e-6
    caption = tokenize_caption(SENTENCES, model.tokenizer, 24)
    with torch.no_grad():
        _, patches = model.image_tokens(image[None])
        _, tokens = model.text_tokens(caption.tokens[None])
        cat = model.project_words(tokens[0, 3])  # start, a, grey, cat
        expected = torch.cosine_similarity(cat[None], model.project_patches(patches[0]))
    torch.testing.assert_close(cosines[2].flatten(), expected)


def test_words_of_several_tokens_are_joined(model):
    words, _ = word_patch_cosines(model, torch.zeros(3, 48, 48), SENTENCES, 1)
    assert words[:2] == ["its", "hyperventilating"]
    assert words[2:4] == ["green", "eyed"]


def test_a_sentence_past_the_context_is_refused(model):
    many = tuple(f"Sentence number {number} is here." for number in range(20))
    with pytest.raises(ValueError, match="past the context"):
        word_patch_cosines(model, torch.zeros(3, 48, 48), many, 19)


def test_inside_and_outside_of_a_box():
    cosines = torch.zeros(2, 4, 4)
    cosines[:, :2, 2:] = 1.0
    record = GlitRecord("x", Path("x.png"), 80, 40, "A picture.", ("A picture.",))
    assert inside_and_outside(cosines, (40.0, 0.0, 80.0, 20.0), record) == (1.0, 0.0)
    half = inside_and_outside(cosines, (0.0, 0.0, 80.0, 20.0), record)
    assert half == (0.5, 0.0)


def test_the_marker_is_json(demo):
    out, _ = demo
    assert json.loads((out / "fastgoal-demo.json").read_text())["steps"] == 2
