"""Choosing a tile: the default, the fastest, what is remembered; and compiling ahead.

Times are made up: a test machine need not have a GPU, and no test asserts one.
"""

from __future__ import annotations

import importlib
import json

import pytest
import torch

from fastgoal_kernels import (
    TextConditionedPool,
    clip_contrastive_loss,
    maxsim_contrastive_loss,
    sigmoid_contrastive_loss,
    text_conditioned_sigmoid_loss,
    warmup,
)

pytest.importorskip("triton")

from fastgoal_kernels.ops import (
    feature_loss_triton,
    maxsim_forward_triton,
    text_conditioned_triton,
    tiles_triton,
    tuning,
)
from fastgoal_kernels.ops.tiles_triton import Config

TABLE = [Config(128, 256, 64, 8, 3), Config(64, 64, 64, 4, 3), Config(32, 32, 32, 4, 2)]
CUDA = torch.device("cuda")


@pytest.fixture
def tuned(monkeypatch, tmp_path):
    """Tuning asked for on a made-up device; `times` says how long each tile takes."""
    times = {TABLE[0]: 3.0, TABLE[1]: 1.0, TABLE[2]: 2.0}
    launched: list[Config] = []

    def milliseconds(run):
        run()
        return times[launched[-1]]

    monkeypatch.setattr(tuning, "_ASKED", True)
    monkeypatch.setattr(tuning, "_FOLDER", tmp_path / "cache")
    monkeypatch.setattr(tuning, "_chosen", {})
    monkeypatch.setattr(tuning, "_milliseconds", milliseconds)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "made-up")
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    return times, launched


def choose(launched, kind=("bf16", 512), table=TABLE, device=CUDA):
    return tuning.choose_config("rows", kind, table, launched.append, device)


def test_the_default_unless_asked():
    launched: list[Config] = []
    assert choose(launched) == TABLE[0]
    assert not launched


def test_the_fastest_is_kept_and_remembered(tuned, monkeypatch):
    times, launched = tuned
    assert choose(launched) == TABLE[1]
    assert launched == TABLE
    assert choose(launched) == TABLE[1]
    assert launched == TABLE  # known: not measured again

    monkeypatch.setattr(tuning, "_chosen", {})  # another process
    times[TABLE[2]] = 0.5
    assert choose(launched) == TABLE[1]
    assert launched == TABLE
    assert choose(launched, kind=("bf16", 768)) == TABLE[2]  # another kind
    assert len(json.loads(tuning._path().read_text())) == 2


def test_a_tile_that_does_not_fit_is_left_out(tuned):
    from triton.runtime.errors import OutOfResources

    _, launched = tuned

    def launch(config: Config) -> None:
        if config == TABLE[1]:
            raise OutOfResources(300_000, 232_448, "shared memory")
        launched.append(config)

    assert tuning.choose_config("rows", (), TABLE, launch, CUDA) == TABLE[2]


@pytest.mark.parametrize("text", ["", "{", "[1]", '{"x": 1}'])
def test_a_broken_file_costs_a_measurement_and_no_more(tuned, text):
    _, launched = tuned
    tuning._FOLDER.mkdir()
    tuning._path().write_text(text)
    assert choose(launched) == TABLE[1]
    assert tuning._read()


def test_a_remembered_tile_that_is_no_longer_offered_is_measured_again(tuned):
    _, launched = tuned
    assert choose(launched) == TABLE[1]
    tuning._chosen.clear()
    assert choose(launched, table=[TABLE[0], TABLE[2]]) == TABLE[2]


def test_nothing_is_measured_while_a_graph_is_recorded(tuned, monkeypatch):
    _, launched = tuned
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    assert choose(launched) == TABLE[0]
    assert not launched and not tuning._chosen


def test_an_unwritable_folder_is_no_reason_to_stop(tuned, monkeypatch, tmp_path):
    _, launched = tuned
    (tmp_path / "file").write_text("")
    monkeypatch.setattr(tuning, "_FOLDER", tmp_path / "file" / "cache")
    assert choose(launched) == TABLE[1]


def test_sizes_up_to_a_power_of_two_are_one_kind():
    assert [tuning.size_class(n) for n in (0, 1, 2, 3, 4, 5, 1024, 1025)] == [
        0, 0, 1, 2, 2, 3, 10, 11,
    ]  # fmt: skip


@pytest.mark.parametrize("both", [False, True])
def test_every_architecture_has_tiles_that_fit_its_shared_memory(both):
    """Operands of all stages; the compile report reads what the compiler really takes."""
    kilobytes = {80: 163, 86: 99, 89: 99, 90: 227, 100: 227, 103: 227, 120: 99}
    for arch, limit in kilobytes.items():
        for tile in maxsim_forward_triton.tiles(torch.bfloat16, "ieee", both, arch):
            operands = 2 * (tile.block_m + tile.block_n) * tile.block_d * tile.num_stages
            assert operands <= limit * 1024, (arch, tile)


def test_an_old_compiler_gets_narrower_tiles(monkeypatch):
    wide, tall = Config(128, 256, 64, 8, 3), Config(128, 128, 64, 8, 3)
    monkeypatch.setattr(tiles_triton, "_MOST_COLUMNS", 256)
    assert tiles_triton.for_compiler([wide, tall]) == [wide, tall]
    monkeypatch.setattr(tiles_triton, "_MOST_COLUMNS", 128)
    assert tiles_triton.for_compiler([wide, tall]) == [tall]


def test_warmup_without_a_gpu_does_nothing_but_check():
    assert warmup(64, device="cpu") < 1.0
    with pytest.raises(ValueError, match="directions"):
        warmup(64, directions=("sideways",))
    with pytest.raises(ValueError, match="losses"):
        warmup(64, losses=("maxsim",))
    with pytest.raises(ValueError, match="dim must be an int >= 1; got 0"):
        warmup(0)
    with pytest.raises(ValueError, match="num_heads must divide dim; got 7 heads for 64"):
        warmup(64, losses=("text_conditioned_sigmoid_loss",), num_heads=7)


def test_warmup_calls_the_ops_as_they_want_to_be_called():
    """What a GPU would compile, run on the CPU: the arguments fit."""
    steps = importlib.import_module("fastgoal_kernels.warmup")
    cpu = torch.device("cpu")
    steps._one_pooling_step(16, 4, torch.float32, 5, cpu)
    steps._one_similarity_step(16, torch.float32, cpu)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("layout", ["padded", "masked", "ragged"])
def test_nothing_is_left_to_compile_after_warmup(layout):
    warmup(64, text_layouts=(layout,))
    kernels = [maxsim_forward_triton.maxsim_both_kernel]
    before = [sum(len(c[0]) for c in kernel.device_caches.values()) for kernel in kernels]
    image, text = (
        torch.randn(n, length, 64, device="cuda", dtype=torch.bfloat16).requires_grad_()
        for n, length in ((5, 49), (5, 77))
    )
    options: dict = {}
    if layout == "masked":
        options["text_mask"] = torch.ones(5, 77, dtype=torch.bool, device="cuda")
    if layout == "ragged":
        text = text.detach().flatten(0, 1).requires_grad_()
        options = dict(text_offsets=torch.arange(6, device="cuda") * 77, max_text_tokens=77)
    scale = torch.tensor(9.0, device="cuda", requires_grad=True)
    maxsim_contrastive_loss(image, text, scale, scale, **options).backward()
    after = [sum(len(c[0]) for c in kernel.device_caches.values()) for kernel in kernels]
    assert after == before


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_nothing_of_the_text_conditioned_loss_is_left_to_compile_after_warmup():
    warmup(64, losses=("text_conditioned_sigmoid_loss",), num_heads=2, max_image_tokens=49)
    kernels = [
        value for name, value in vars(text_conditioned_triton).items() if name.endswith("_kernel")
    ]
    before = [sum(len(c[0]) for c in kernel.device_caches.values()) for kernel in kernels]
    pool = TextConditionedPool(64, 2).cuda()
    image, text = (
        torch.randn(*shape, device="cuda", dtype=torch.bfloat16).requires_grad_()
        for shape in ((5, 49, 64), (15, 64))
    )
    scale = torch.tensor(9.0, device="cuda", requires_grad=True)
    for negatives in ("all", "sample"):
        text_conditioned_sigmoid_loss(
            pool, image, text, scale, scale, captions_per_image=3, negatives=negatives
        ).backward()
    after = [sum(len(c[0]) for c in kernel.device_caches.values()) for kernel in kernels]
    assert after == before


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("loss", [clip_contrastive_loss, sigmoid_contrastive_loss])
def test_nothing_of_a_feature_loss_is_left_to_compile_after_warmup(loss):
    warmup(64, losses=(loss.__name__,))
    kernels = [
        value for name, value in vars(feature_loss_triton).items() if name.endswith("_kernel")
    ]
    before = [sum(len(c[0]) for c in kernel.device_caches.values()) for kernel in kernels]
    image, text = (
        torch.randn(77, 64, device="cuda", dtype=torch.bfloat16).requires_grad_() for _ in range(2)
    )
    scale = torch.tensor(9.0, device="cuda", requires_grad=True)
    loss(image, text, scale, scale).backward()
    after = [sum(len(c[0]) for c in kernel.device_caches.values()) for kernel in kernels]
    assert after == before
