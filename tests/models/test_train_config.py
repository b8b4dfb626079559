"""`fastgoal train fast-goal`: its options saved and read back, presets, and what they lead to."""

import json
import re
from pathlib import Path

import pytest
import torch
import yaml
from PIL import Image
from typer.testing import CliRunner

from fastgoal_models import train_command
from fastgoal_models.checkpoints import complete_checkpoints, latest_checkpoint, load_checkpoint
from fastgoal_models.cli import app
from fastgoal_models.cli.train_fast_goal import Preset
from fastgoal_models.errors import ConfigError
from fastgoal_models.fast_goal_training import RECIPES, FastGoalTrainConfig
from fastgoal_models.loading import load_model
from fastgoal_models.train_command import METHOD

TINY = {
    "embed_dim": 16,
    "vision_cfg": {
        "image_size": 32, "layers": 2, "width": 32, "head_width": 16, "patch_size": 16
    },
    "text_cfg": {"context_length": 24, "width": 8, "heads": 2, "layers": 2},
}  # fmt: skip
GIVEN = {"data": Path("pairs.jsonl"), "out": Path("run")}


def run(*arguments: object):
    return CliRunner().invoke(
        app, ["train", "fast-goal", *map(str, arguments)], env={"COLUMNS": "300"}
    )


def said(found) -> str:
    return re.sub(r"\x1b\[[0-9;]*m", "", found.output)


@pytest.fixture
def arguments(tmp_path) -> list[object]:
    """A run of two steps over four small pictures; two captions have more than 24 tokens."""
    folder = tmp_path / "data"
    folder.mkdir()
    rows = []
    for number in range(4):
        generator = torch.Generator().manual_seed(number)
        pixels = torch.randint(0, 256, (20, 30, 3), generator=generator, dtype=torch.uint8)
        Image.fromarray(pixels.numpy()).save(folder / f"{number}.png")
        caption = (
            f"Noise number {number}. Its colours are random. " + "It shows nothing. " * 3 * number
        )
        rows.append({"id": str(number), "image": f"{number}.png", "caption": caption})
    data = folder / "pairs.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    model = tmp_path / "tiny.json"
    model.write_text(json.dumps(TINY))
    return [
        "--data", data, "--model", model, "--out", tmp_path / "out", "--context-length", 24,
        "--batch-size", 2, "--steps", 2, "--lr", 1e-3, "--device", "cpu",
    ]  # fmt: skip


def config_of(out: Path) -> dict:
    return yaml.safe_load((out / "config.yaml").read_text())


def weights_of(out: Path) -> dict[str, torch.Tensor]:
    return load_checkpoint(latest_checkpoint(out / "checkpoints")).weights


def same(one: dict, two: dict) -> bool:
    return one.keys() == two.keys() and all(torch.equal(one[name], two[name]) for name in one)


def test_random_weights_are_said_on_a_line_of_their_own(arguments):
    found = run(*arguments)
    assert found.exit_code == 0, found.output
    said_so = [line for line in said(found).splitlines() if "weights are random" in line]
    assert said_so[0].startswith("The weights are random: which pairs")
    assert said_so[1].startswith("The weights are random: this trains from nothing. --pretrained")


# -- resolving ------------------------------------------------------------------------------------


def test_defaults():
    options, config = METHOD.resolve(GIVEN)
    assert (options.model, options.pretrained, options.pairs) == ("ViT-B-16", None, "best")
    assert config == FastGoalTrainConfig(out=Path("run"), epochs=10)


def test_the_presets_of_the_command_are_the_recipes():
    assert {preset.value for preset in Preset} == set(RECIPES)


@pytest.mark.parametrize(
    "preset, model, batch_size",
    [
        ("fast-goal-b16", "ViT-B-16", 256),
        ("fast-goal-l14", "ViT-L-14", 256),
        ("goal-b16", "ViT-B-16", 16),
    ],
)
def test_named_recipes(preset, model, batch_size):
    options, config = METHOD.resolve(GIVEN | {"preset": preset})
    assert (options.model, options.pretrained, options.context_length) == (model, "openai", None)
    assert config == FastGoalTrainConfig.published(Path("run"), batch_size=batch_size)
    options, config = METHOD.resolve(
        GIVEN | {"preset": preset, "model": "ViT-B-32", "lr": 1e-4, "steps": 7}
    )
    assert (options.model, options.pretrained) == ("ViT-B-32", "openai")
    assert config == FastGoalTrainConfig.published(
        Path("run"), batch_size=batch_size, learning_rate=1e-4, steps=7
    )


def test_published_says_nothing_of_the_model():
    options, config = METHOD.resolve(GIVEN | {"preset": "published"})
    assert (options.model, options.pretrained) == ("ViT-B-16", None)
    assert config == FastGoalTrainConfig.published(Path("run"))


@pytest.mark.parametrize("preset", list(RECIPES))
def test_saved_and_read_back(tmp_path, preset):
    given = {
        "data": Path("a folder/pairs: 1.jsonl"), "out": tmp_path, "preset": preset, "lora": 4,
        "root": Path("ünï"), "strict": True, "steps": 5, "lr": 3e-7, "keep": None,
        "pairs": "weighted", "max_logit_scale": None, "betas": (0.8, 0.9), "warmup": 100,
    }  # fmt: skip
    resolved = METHOD.resolve(given)
    assert METHOD.save(*resolved) == tmp_path / "config.yaml"
    assert METHOD.resolve({}, tmp_path / "config.yaml") == resolved
    as_json = tmp_path / "config.json"
    as_json.write_text(json.dumps(config_of(tmp_path)))
    assert METHOD.resolve({}, as_json) == resolved


def write(path: Path, text: str) -> Path:
    path.write_text(text)
    return path


def test_who_wins(tmp_path):
    file = write(
        tmp_path / "a.yaml",
        "preset: published\nbatch-size: 8\nlr: 5e-6\nepochs: 3\nmodel: ViT-B-32\nroot: images\n",
    )
    options, config = METHOD.resolve(GIVEN, file)
    wanted = {"batch_size": 8, "learning_rate": 5e-6, "epochs": 3}
    assert config == FastGoalTrainConfig.published(Path("run"), **wanted)
    assert (options.model, options.root) == ("ViT-B-32", Path("images"))
    # What is typed wins, and --steps takes the place of the file's epochs.
    _, config = METHOD.resolve(GIVEN | {"steps": 4, "batch_size": 2}, file)
    assert (config.steps, config.epochs, config.batch_size) == (4, None, 2)
    # So does a preset that is typed, where it says something.
    options, config = METHOD.resolve(GIVEN | {"preset": "goal-b16"}, file)
    assert (config.batch_size, config.epochs, options.model) == (16, 10, "ViT-B-16")
    assert (options.preset, options.root) == ("goal-b16", Path("images"))
    # The file's own is only what lies below it.
    file = write(tmp_path / "b.yaml", "preset: goal-b16\nsteps: 9\n")
    _, config = METHOD.resolve(GIVEN, file)
    assert (config.steps, config.epochs, config.batch_size) == (9, None, 16)


@pytest.mark.parametrize(
    "text, words",
    [
        ("batchsize: 3", "unknown option 'batchsize'. Did you mean batch_size?"),
        ("zzz: 3", "unknown option 'zzz'"),
        ("batch_size: many", "batch_size can not be 'many'. Fix: a whole number"),
        ("batch_size: 2.5", "batch_size can not be 2.5"),
        ("batch_size: true", "batch_size can not be True"),
        ("batch_size: null", "batch_size can not be None"),
        ("lr: fast", "lr can not be 'fast'. Fix: a number"),
        ("betas: [0.9]", r"betas can not be \[0.9\]. Fix: a list of 2 numbers"),
        ("strict: 1", "strict can not be 1. Fix: true or false"),
        ("data: 5", "data can not be 5. Fix: a path"),
        ("lora: high", "a whole number or null"),
        ("model: 16", "model can not be 16. Fix: text"),
        ("preset: best", "--preset must be one of default, published"),
        ("precision: fp64", "precision must be one of"),
        ("steps: 3\nepochs: 4", "steps or epochs"),
        ("- steps", "must hold options"),
        ("", "must hold options"),
        ("a: [", "is not YAML"),
    ],
)
def test_files_that_make_no_sense(tmp_path, text, words):
    file = write(tmp_path / "a.yaml", text)
    with pytest.raises(ConfigError, match=words):
        METHOD.resolve(GIVEN, file)


def test_data_and_out_are_needed(tmp_path):
    with pytest.raises(ConfigError, match="--data and --out missing"):
        METHOD.resolve({})
    file = write(tmp_path / "a.yaml", "data: a.jsonl\n")
    with pytest.raises(ConfigError, match="--out missing"):
        METHOD.resolve({}, file)
    found = run("--out", tmp_path / "out")
    assert found.exit_code == 2 and "--data missing" in said(found)


def test_paths_that_lead_nowhere_are_named_with_their_option(arguments, tmp_path):
    gone = tmp_path / "gone"
    for option in ("--data", "--config", "--eval-data"):
        for path, words in ((gone, "there is no file"), (tmp_path, f"{tmp_path} is a folder")):
            found = run(*arguments, option, path)
            assert found.exit_code == 2 and "Errno" not in said(found)
            assert f"error: {option}: {words}" in said(found), said(found)


# -- the command ----------------------------------------------------------------------------------


def test_a_run_writes_its_options_and_a_second_one_repeats_it(arguments, tmp_path):
    first = run(*arguments, "--pairs", "uniform")
    assert first.exit_code == 0 and "have one local pair to draw from" not in said(first)
    out = tmp_path / "out"
    saved = config_of(out)
    assert saved["learning_rate"] == 1e-3 and saved["steps"] == 2 and saved["epochs"] is None
    assert saved["pairs"] == "uniform" and saved["top_k"] == 3 and saved["weight_decay"] == 0.05
    assert saved["data"] == str(tmp_path / "data" / "pairs.jsonl")
    again = run("--config", out / "config.yaml", "--out", tmp_path / "again")
    assert again.exit_code == 0, again.output
    assert same(weights_of(tmp_path / "again"), weights_of(out))
    assert config_of(tmp_path / "again") == saved | {"out": str(tmp_path / "again")}
    other = run("--config", out / "config.yaml", "--out", tmp_path / "other", "--seed", 1)
    assert other.exit_code == 0
    assert config_of(tmp_path / "other")["seed"] == 1
    resumed = run("--config", out / "config.yaml", "--resume", "--num-workers", 1)
    assert resumed.exit_code == 0 and "2 of 2 steps done" in said(resumed)
    assert config_of(out)["num_workers"] == 1


def test_a_refused_run_leaves_the_old_options_alone(arguments, tmp_path):
    assert run(*arguments).exit_code == 0
    before = (tmp_path / "out/config.yaml").read_bytes()
    for more in (["--seed", 1], ["--seed", 1, "--resume"], ["--pairs", "uniform", "--resume"]):
        assert run(*arguments, *more).exit_code == 2
        assert (tmp_path / "out/config.yaml").read_bytes() == before


def test_a_batch_that_nobody_named_is_no_larger_than_the_data(arguments, tmp_path):
    place = arguments.index("--batch-size")
    unnamed = [*arguments[:place], *arguments[place + 2 :]]
    found = run(*unnamed)
    assert found.exit_code == 0 and "4 records do not fill a batch of 32: it is 4" in said(found)
    saved = config_of(tmp_path / "out")
    assert saved["batch_size"] == 4 and not saved["fit_batch"]
    assert run(*unnamed, "--resume").exit_code == 0
    # Captions in chunks are more than the records, or fewer: they are counted first.
    chunked = run(*unnamed, "--long-captions", "chunk", "--out", tmp_path / "chunked")
    assert chunked.exit_code == 0 and "7 records do not fill a batch of 32" in said(chunked)
    # A preset's is nobody's choice either; what a file or a person says is.
    options, _ = METHOD.resolve(GIVEN | {"preset": "published"})
    assert options.fit_batch
    file = write(tmp_path / "a.yaml", "batch_size: 8\npreset: published\n")
    assert not METHOD.resolve(GIVEN, file)[0].fit_batch
    assert METHOD.resolve(GIVEN | {"preset": "goal-b16"}, file)[0].fit_batch


def test_a_named_batch_that_does_not_fit_is_refused_before_the_model_is_built(
    arguments, tmp_path, monkeypatch
):
    monkeypatch.setattr(train_command, "load_fast_goal", lambda *_, **__: pytest.fail("builds"))
    found = run(*arguments, "--batch-size", 9)
    assert found.exit_code == 2
    assert "4 usable records do not fill one batch of 9. Fix: a batch size of at most 4" in said(
        found
    )
    assert not (tmp_path / "out").exists()


def test_how_many_checkpoints_stay(arguments, tmp_path):
    arguments = [*arguments, "--steps", 4, "--save-every", 1]
    for words, steps in (
        ([], [3, 4]),
        (["--keep", 3], [2, 3, 4]),
        (["--keep", "all"], [1, 2, 3, 4]),
    ):
        out = tmp_path / "-".join(["run", *map(str, words)])
        found = run(*arguments, "--out", out, *words)
        assert found.exit_code == 0, found.output
        assert [load_checkpoint(x).step for x in complete_checkpoints(out / "checkpoints")] == steps
    assert config_of(out)["keep"] is None
    # A file's is kept where nothing is typed.
    assert METHOD.resolve({}, out / "config.yaml")[1].keep is None
    for wrong in ("0", "some"):
        found = run(*arguments, "--keep", wrong)
        assert found.exit_code == 2 and "neither a number from 1 nor all" in said(found)


def test_the_precision_that_is_shown_is_the_one_that_is_used(arguments, monkeypatch):
    seen = []
    encode = FastGoalTrainConfig.encode

    def note(config, model, batch):
        seen.append(torch.is_autocast_enabled("cpu") and torch.get_autocast_dtype("cpu"))
        return encode(config, model, batch)

    monkeypatch.setattr(FastGoalTrainConfig, "encode", note)
    for precision, shown, dtype in (
        ("fp16", "fp16", torch.float16),
        ("bf16", "bf16", torch.bfloat16),
        ("auto", "float32", False),
    ):
        found = run(*arguments, "--precision", precision, "--out", arguments[5] / precision)
        assert found.exit_code == 0 and f"cpu, {shown}\n" in said(found), found.output
        assert seen[-1] == dtype


def test_locked_towers(arguments, tmp_path):
    found = run(*arguments, "--unlocked-image-blocks", 0, "--unlocked-text-blocks", 1)
    assert found.exit_code == 0, found.output
    assert re.search(r"[\d,]+ of [\d,]+ parameters train", said(found))
    start = run(*arguments[:4], "--out", tmp_path / "start", *arguments[6:], "--lr", 0)
    assert start.exit_code == 0
    before, after = weights_of(tmp_path / "start"), weights_of(tmp_path / "out")
    for name in before:
        trains = name.startswith(("clip.transformer.resblocks.1.", "clip.ln_final."))
        trains |= name in ("clip.text_projection", "clip.logit_scale")
        assert torch.equal(before[name], after[name]) != trains, name
    refused = run(*arguments, "--unlocked-image-blocks", 1, "--resume")
    assert refused.exit_code == 2
    assert "unlocked_image_blocks was 0, is now 1" in said(refused)
    assert "unlocked_text_blocks was 1, is now None" in said(refused)
    both = run(*arguments, "--unlocked-image-blocks", 0, "--unlocked-text-blocks", 0)
    assert both.exit_code == 2 and "only the logit scale" in said(both)


def test_lora_from_end_to_end(arguments, tmp_path):
    pytest.importorskip("peft")
    out = tmp_path / "out"
    arguments = [*arguments, "--lora", 2]
    refused = run(*arguments, "--unlocked-text-blocks", 1)
    assert refused.exit_code == 2 and "leave --unlocked-image-blocks" in said(refused)
    found = run(*arguments, "--save-every", 1)
    assert found.exit_code == 0, found.output
    assert "parameters train" in said(found)
    loaded = load_model(str(out)).model
    saved = weights_of(out)
    assert same(dict(loaded.state_dict()), saved)
    assert not any("lora" in name or "base_layer" in name for name in saved)
    resumed = run("--config", out / "config.yaml", "--resume")
    assert resumed.exit_code == 0 and same(weights_of(out), saved)
    other = run(*arguments[:-1], 3, "--resume")
    assert other.exit_code == 2 and "lora was 2, is now 3" in said(other)
    stage_two = run(
        *arguments[:4], "--out", tmp_path / "next", *arguments[6:-2],
        "--pretrained", latest_checkpoint(out / "checkpoints") / "model.safetensors",
    )  # fmt: skip
    assert stage_two.exit_code == 0, stage_two.output


def test_long_captions_are_counted(arguments, tmp_path):
    cut = run(*arguments)
    assert cut.exit_code == 0, cut.output
    assert "2 of 4 captions are longer than 24 tokens: they lose their end" in said(cut)
    refused = run(*arguments, "--long-captions", "chunk", "--resume")
    assert refused.exit_code == 2
    chunked = run(*arguments, "--long-captions", "chunk", "--out", tmp_path / "chunked")
    assert chunked.exit_code == 0, chunked.output
    wanted = "2 of 4 captions are longer than 24 tokens: 5 runs of whole sentences take their place"
    assert wanted in said(chunked)
    assert (
        load_checkpoint(latest_checkpoint(tmp_path / "chunked/checkpoints")).config["records"] == 7
    )
