"""Patched open_clip and transformers train as unpatched, and come back exactly.

For open_clip's distributed options pytest starts this file as a script of its own, which imports
open_clip once and forks the ranks.
"""

from __future__ import annotations

import argparse
import inspect
import itertools
import os
import subprocess
import sys
from pathlib import Path
from unittest import mock

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F

from fastgoal_kernels import distributed, integrations, modules
from fastgoal_kernels.integrations import hf_clip
from fastgoal_kernels.integrations.patching import Patch, PatchSet

STEPS, BATCH, VOCABULARY, CONTEXT, PIXELS = 20, 6, 64, 8, 16


@pytest.fixture(autouse=True)
def nothing_stays_patched():
    yield
    integrations.unpatch_open_clip()
    integrations.unpatch_hf_clip()


def batches() -> list[tuple[torch.Tensor, torch.Tensor]]:
    generator = torch.Generator().manual_seed(5)
    return [
        (
            torch.randn(BATCH, 3, PIXELS, PIXELS, generator=generator),
            torch.randint(1, VOCABULARY, (BATCH, CONTEXT), generator=generator),
        )
        for _ in range(STEPS)
    ]


def train(model: torch.nn.Module, loss_of) -> list[float]:
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    losses = []
    for images, texts in batches():
        loss = loss_of(model, images, texts)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


def assert_same_training(patched: list[float], plain: list[float]) -> None:
    # Float32 sums in another order, through 20 steps of feedback.
    assert patched == pytest.approx(plain, rel=1e-5)
    assert max(plain) - min(plain) > 1e-2, "nothing was learned, so nothing was compared"


# ---------------------------------------------------------------------------------------------
# open_clip
# ---------------------------------------------------------------------------------------------


def open_clip_arguments(**changes) -> argparse.Namespace:
    options = {
        "distill": False, "model": "tiny", "siglip": False, "local_loss": False,
        "gather_with_grad": False, "rank": 0, "world_size": 1, "horovod": False,
        "loss_dist_impl": None, "coca_caption_loss_weight": 2.0,
        "coca_contrastive_loss_weight": 1.0,
    }  # fmt: skip
    return argparse.Namespace(**options | changes)


def train_open_clip(**changes) -> list[float]:
    import open_clip

    torch.manual_seed(0)
    model = open_clip.CLIP(
        embed_dim=16,
        vision_cfg={"layers": 1, "width": 32, "head_width": 16, "patch_size": 8,
                    "image_size": PIXELS},
        text_cfg={"layers": 1, "width": 32, "heads": 2, "context_length": CONTEXT,
                  "vocab_size": VOCABULARY},
        init_logit_bias=-10 if changes.get("siglip") else None,
        output_dict=True,
    )  # fmt: skip
    loss = open_clip.create_loss(open_clip_arguments(**changes))

    def step(model, images, texts):
        return loss(**model(images, texts), output_dict=True)["contrastive_loss"]

    return train(model, step)


@pytest.mark.parametrize("siglip", [False, True])
def test_open_clip_trains_alike(siglip):
    pytest.importorskip("open_clip")
    plain = train_open_clip(siglip=siglip)
    integrations.patch_open_clip()
    ours = "sigmoid_contrastive_loss" if siglip else "clip_contrastive_loss"
    with mock.patch.object(modules, ours, wraps=getattr(modules, ours)) as spy:
        patched = train_open_clip(siglip=siglip)
    assert spy.call_count == STEPS
    assert_same_training(patched, plain)


def test_open_clip_is_patched_once_and_restored():
    open_clip = pytest.importorskip("open_clip")
    classes = (open_clip.loss.ClipLoss, open_clip.loss.SigLipLoss)
    ours = (modules.ClipLoss, modules.SigLipLoss)
    originals = [vars(cls)["forward"] for cls in classes]
    existing = open_clip.create_loss(open_clip_arguments())
    for _ in range(2):
        integrations.patch_open_clip()
        assert [cls.forward for cls in classes] == [cls.forward for cls in ours]
    assert type(existing).forward is modules.ClipLoss.forward  # instances made before change too
    for _ in range(2):
        integrations.unpatch_open_clip()
        assert [vars(cls)["forward"] for cls in classes] == originals


def test_open_clips_other_losses_still_work():
    open_clip = pytest.importorskip("open_clip")
    image, text = torch.randn(4, 8), torch.randn(4, 8)
    words, labels = torch.randn(4, 5, 9), torch.randint(1, 9, (4, 5))
    coca = open_clip.create_loss(open_clip_arguments(model="coca_tiny"))
    distill = open_clip.create_loss(open_clip_arguments(distill=True))

    def losses():
        scale = torch.tensor(3.0)
        teacher = (text, image, scale)
        return [*coca(image, text, words, labels, scale), *distill(image, text, scale, *teacher)]

    plain = losses()
    integrations.patch_open_clip()
    with mock.patch.object(
        modules, "clip_contrastive_loss", wraps=modules.clip_contrastive_loss
    ) as spy:
        torch.testing.assert_close(losses(), plain)
    assert spy.call_count == 1  # CoCaLoss; DistillClipLoss needs the logits and keeps its own


@pytest.mark.parametrize("name", ["ClipLoss", "SigLipLoss"])
@pytest.mark.parametrize("method", ["__init__", "forward"])
def test_the_modules_have_open_clips_signatures(name, method):
    open_clip = pytest.importorskip("open_clip")

    def arguments(cls):
        parameters = inspect.signature(vars(cls)[method]).parameters.values()
        return [(p.name, p.kind, p.default) for p in parameters]

    assert arguments(getattr(modules, name)) == arguments(getattr(open_clip.loss, name))


@pytest.mark.parametrize("siglip", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_open_clip_with_a_bias_in_every_precision(siglip, dtype):
    """As in pure_bf16, where features, scale and bias are all of half precision."""
    open_clip = pytest.importorskip("open_clip")
    generator = torch.Generator().manual_seed(2)
    features = (F.normalize(torch.randn(7, 8, generator=generator), dim=-1) for _ in range(2))
    inputs = [x.to(dtype).requires_grad_() for x in (*features, torch.tensor(9.0))]
    inputs.append(torch.tensor(-3.0, dtype=dtype, requires_grad=True))
    exact = [x.detach().double().requires_grad_() for x in inputs]
    loss = open_clip.create_loss(open_clip_arguments(siglip=siglip))
    plain = loss(*exact, output_dict=True)
    integrations.patch_open_clip()
    ours = loss(*inputs, output_dict=True)
    assert list(ours) == list(plain) == ["contrastive_loss"]
    assert torch.equal(loss(*inputs), ours["contrastive_loss"])
    for losses in (plain, ours):
        losses["contrastive_loss"].backward()
    loss = ours["contrastive_loss"]
    assert loss.dtype == torch.float32
    # Products of half precision are exact in float32, so that only its sums differ.
    torch.testing.assert_close(loss.double(), plain["contrastive_loss"], rtol=1e-6, atol=0)
    for got, want in zip(inputs, exact, strict=True):
        assert got.grad.dtype == dtype
        # Two units in the last place; a softmax has no gradient for a bias, only rounding errors.
        bounds = {"rtol": 2 * torch.finfo(dtype).eps, "atol": 1e-6}
        torch.testing.assert_close(got.grad.double(), want.grad, **bounds)


RANKS = 4  # the "bidir" ring then has a round both ways and the rank opposite
DISTRIBUTED = [
    *(
        {"local_loss": local_loss, "gather_with_grad": with_grad}
        for local_loss, with_grad in itertools.product((False, True), repeat=2)
    ),
    {"model": "coca_tiny", "local_loss": True, "gather_with_grad": True},
    *({"siglip": True, "loss_dist_impl": name} for name in (None, *distributed.EXCHANGES)),
]


def distributed_results(rank: int, options: dict) -> list[torch.Tensor]:
    """Loss and gradients of one rank, of what open_clip's classes compute now."""
    import open_clip

    generator = torch.Generator().manual_seed(rank)
    values = [torch.randn(5, 4, dtype=torch.float64, generator=generator) for _ in range(2)]
    values += [torch.tensor(x, dtype=torch.float64) for x in (6.0, -1.5)]
    image, text, scale, bias = (x.requires_grad_() for x in values)
    loss = open_clip.create_loss(open_clip_arguments(rank=rank, world_size=RANKS, **options))
    inputs = {"image_features": image, "text_features": text, "logit_scale": scale}
    if "model" in options:
        logits = torch.randn(5, 3, 9, dtype=torch.float64, generator=generator)
        inputs |= {"logits": logits, "labels": torch.ones(5, 3, dtype=torch.int64)}
    else:
        inputs["logit_bias"] = bias
    total = sum(loss(**inputs, output_dict=True).values())
    total.backward()
    return [total.detach(), *(x.grad for x in (image, text, scale, bias) if x.grad is not None)]


def run_rank(rank: int, folder: Path) -> None:
    try:
        rendezvous = f"file://{folder / 'rendezvous'}"
        dist.init_process_group("gloo", init_method=rendezvous, rank=rank, world_size=RANKS)
    except RuntimeError as error:  # no usable network interface, for instance
        (folder / "unavailable").write_text(str(error))
        return
    results = [[distributed_results(rank, options)] for options in DISTRIBUTED]
    integrations.patch_open_clip()
    for pair, options in zip(results, DISTRIBUTED, strict=True):
        pair.append(distributed_results(rank, options))
    torch.save(results, folder / f"{rank}.pt")
    dist.barrier()
    dist.destroy_process_group()


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="forks, and gloo's interface is named")
def test_open_clips_distributed_options(tmp_path):
    pytest.importorskip("open_clip")
    search = os.pathsep.join(sys.path)
    done = subprocess.run(
        [sys.executable, __file__, str(tmp_path)],
        env=os.environ
        | {"PYTHONPATH": search, "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"},
        capture_output=True, text=True, timeout=400,
    )  # fmt: skip
    if (tmp_path / "unavailable").exists():
        pytest.skip("gloo can not start here: " + (tmp_path / "unavailable").read_text())
    assert done.returncode == 0, done.stderr
    for rank in range(RANKS):
        results = torch.load(tmp_path / f"{rank}.pt")
        for options, (plain, ours) in zip(DISTRIBUTED, results, strict=True):
            for got, want in zip(ours, plain, strict=True):
                # float64, other orders of summation
                torch.testing.assert_close(
                    got, want, rtol=1e-11, atol=1e-12, msg=lambda text, o=options: f"{o}: {text}"
                )


def test_patched_open_clip_refuses_horovod_by_name():
    open_clip = pytest.importorskip("open_clip")
    loss = open_clip.create_loss(open_clip_arguments(horovod=True, world_size=2))
    integrations.patch_open_clip()
    with pytest.raises(NotImplementedError, match="use_horovod"):
        loss(torch.randn(4, 8), torch.randn(4, 8), 3.0)


# ---------------------------------------------------------------------------------------------
# transformers
# ---------------------------------------------------------------------------------------------

TOWER = {"hidden_size": 32, "intermediate_size": 40, "num_hidden_layers": 1,
         "num_attention_heads": 2, "projection_dim": 16}  # fmt: skip
TEXT = TOWER | {"vocab_size": VOCABULARY, "max_position_embeddings": CONTEXT, "bos_token_id": 0,
                "eos_token_id": VOCABULARY - 1, "pad_token_id": 1}  # fmt: skip
VISION = TOWER | {"image_size": PIXELS, "patch_size": 8}
ROBERTA = TEXT | {"max_position_embeddings": CONTEXT + 2, "project_dim": 16}
HF_TOWERS = {
    "CLIP": (TEXT, VISION),
    "Siglip": (TEXT | {"projection_size": 32}, VISION),
    "Siglip2": (TEXT | {"projection_size": 32}, TOWER | {"num_patches": 4, "patch_size": 8}),
    "Align": (TEXT, {"image_size": PIXELS, "hidden_dim": 16, "width_coefficient": 1.0,
                     "depth_coefficient": 1.0, "kernel_sizes": [3], "in_channels": [32],
                     "out_channels": [16], "depthwise_padding": [], "strides": [1],
                     "num_block_repeats": [1], "expand_ratios": [1]}),
    "AltCLIP": (ROBERTA, VISION),
    "Blip": (TEXT | {"encoder_hidden_size": 32, "sep_token_id": 2}, VISION),
    "ChineseCLIP": (TEXT, VISION),
    "CLIPSeg": (TEXT, VISION),
    "GroupViT": (TEXT, VISION | {"depths": [1, 1, 1], "num_hidden_layers": 3,
                                 "num_group_tokens": [4, 2, 0], "num_output_groups": [4, 2, 0]}),
    "MetaClip2": (TEXT, VISION),
    "Tipsv2": (TEXT, VISION),
    "VisionTextDualEncoder": (TEXT, VISION),
}  # fmt: skip


def hf_model(name: str) -> torch.nn.Module:
    import transformers

    if not hasattr(transformers, f"{name}Model"):
        pytest.skip(f"this release of transformers has no {name}Model")
    config_class = getattr(transformers, f"{name}Config")
    text, vision = HF_TOWERS[name]
    if name == "VisionTextDualEncoder":
        towers = transformers.ViTConfig(**vision), transformers.BertConfig(**text)
        config = config_class.from_vision_text_configs(*towers)
    else:
        config = config_class(text_config=text, vision_config=vision)
    config.projection_dim = 16
    torch.manual_seed(0)  # the weights, and after them the dropout
    return getattr(transformers, f"{name}Model")(config)


def hf_outputs(model, images, texts):
    inputs = {"input_ids": texts, "pixel_values": images}
    if type(model).__name__ == "Siglip2Model":  # takes patches, row by row
        patches = images.unflatten(3, (2, 8)).unflatten(2, (2, 8)).permute(0, 2, 4, 3, 5, 1)
        inputs["pixel_values"] = patches.flatten(3).flatten(1, 2)
        inputs["pixel_attention_mask"] = torch.ones(len(images), 4, dtype=torch.int64)
        inputs["spatial_shapes"] = torch.full((len(images), 2), 2)
    return model(**inputs, return_loss=True)


def hf_step(model, images, texts):
    return hf_outputs(model, images, texts).loss.squeeze()


def all_gradients(model: torch.nn.Module) -> torch.Tensor:
    return torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])


def relative_error(got: torch.Tensor, want: torch.Tensor) -> float:
    return float((got.double() - want.double()).norm() / want.double().norm())


@pytest.fixture
def default_dtype(dtype):
    """transformers 4 makes its causal masks in this one, whatever the model's."""
    torch.set_default_dtype(dtype)
    yield
    torch.set_default_dtype(torch.float32)


@pytest.mark.parametrize(
    "name, dtype",
    [(name, torch.float32) for name in ("CLIP", "Siglip", "Siglip2")]
    # Some of the others magnify rounding: GroupViT's groups are chosen, so that the smallest error
    # may be another path, and random BERTs give all texts nearly the same embedding.
    + [(name, torch.float64) for name in HF_TOWERS],
)
def test_transformers_trains_alike(name, dtype, default_dtype):
    pytest.importorskip("transformers")

    def step(model, images, texts):
        return hf_step(model, images.to(dtype), texts)

    plain_model = hf_model(name).to(dtype)
    plain = train(plain_model, step)
    integrations.patch_hf_clip()
    ours = "sigmoid_contrastive_loss" if name.startswith("Sig") else "clip_contrastive_loss"
    with mock.patch.object(hf_clip, ours, wraps=getattr(hf_clip, ours)) as spy:
        patched_model = hf_model(name).to(dtype)
        patched = train(patched_model, step)
    assert spy.call_count == STEPS
    assert_same_training(patched, plain)
    # Those of the 20th step, behind the rounding of all steps before it.
    tolerance = 1e-5 if dtype == torch.float32 else 1e-10
    assert relative_error(all_gradients(patched_model), all_gradients(plain_model)) < tolerance


def test_every_patched_model_is_tested():
    assert {owner for _, owner, _ in hf_clip._LOSSES} == {f"{name}Model" for name in HF_TOWERS}


def test_transformers_trainer_trains_alike(tmp_path):
    transformers = pytest.importorskip("transformers")
    pytest.importorskip("accelerate")
    data = [
        {"pixel_values": image, "input_ids": text, "id": 0}
        for images, texts in batches()
        for image, text in zip(images, texts, strict=True)
    ]

    def collate(items):
        columns = {name: torch.stack([item[name] for item in items]) for name in items[0]}
        return columns | {"return_loss": True}

    class Recorder(transformers.Trainer):
        def compute_loss(self, *args, **kwargs):
            loss = super().compute_loss(*args, **kwargs)
            if isinstance(loss, torch.Tensor):  # in evaluation the outputs come with it
                losses.append(loss.item())
            return loss

    def run() -> float:
        # SGD: Adam makes full steps of gradients that are all rounding error (a key's bias has no
        # other), and two such runs part.
        arguments = transformers.TrainingArguments(
            output_dir=str(tmp_path), max_steps=STEPS, per_device_train_batch_size=BATCH,
            optim="sgd", learning_rate=1e-2, use_cpu=True, report_to="none", save_strategy="no",
            disable_tqdm=True, seed=0,
        )  # fmt: skip
        trainer = Recorder(
            hf_model("CLIP"), arguments, train_dataset=data, data_collator=collate,
            eval_dataset=data[: 2 * BATCH],
        )  # fmt: skip
        trainer.train()
        return trainer.evaluate()["eval_loss"]

    losses: list[float] = []
    plain_eval, plain = run(), losses
    losses = []
    integrations.patch_hf_clip()
    with mock.patch.object(
        hf_clip, "clip_contrastive_loss", wraps=hf_clip.clip_contrastive_loss
    ) as spy:
        patched_eval, patched = run(), losses
    assert len(patched) == STEPS and spy.call_count > STEPS  # each step, and the evaluation
    assert_same_training(patched, plain)
    assert patched_eval == pytest.approx(plain_eval, rel=1e-5)


@pytest.mark.parametrize("name", ["CLIP", "Siglip"])
def test_transformers_under_autocast_is_no_less_exact(name):
    """Of the towers' bf16 embeddings, theirs rounds the logits to bf16 and ours does not."""
    pytest.importorskip("transformers")
    images, texts = batches()[0]

    def loss_and_gradients(exact: bool = False) -> tuple[torch.Tensor, torch.Tensor]:
        model = hf_model(name)
        with torch.autocast("cpu", torch.bfloat16):
            outputs = hf_outputs(model, images, texts)
            # What both losses multiply: autocast takes the embeddings in bf16.
            pair = [outputs.text_embeds.bfloat16(), outputs.image_embeds.bfloat16()]
        loss = outputs.loss.squeeze()
        if exact:
            logits = pair[0].double() @ pair[1].double().T * model.logit_scale.double().exp()
            if name == "CLIP":
                target = torch.arange(BATCH)
                loss = sum(torch.nn.functional.cross_entropy(z, target) for z in (logits, logits.T))
                loss = loss / 2
            else:
                logits = (logits + model.logit_bias.double()) * (2 * torch.eye(BATCH) - 1)
                loss = -torch.nn.functional.logsigmoid(logits).sum() / BATCH
        loss.backward()
        return loss.detach(), all_gradients(model)

    exact = loss_and_gradients(exact=True)
    plain = loss_and_gradients()
    integrations.patch_hf_clip()
    patched = loss_and_gradients()
    assert patched[0].dtype == torch.float32
    for got, theirs, want in zip(patched, plain, exact, strict=True):
        # 1.1: the contract's bound. 1e-3: bf16 gradients through the towers, whose own rounding
        # (2^-9) an error of the loss can hide in.
        assert relative_error(got, want) <= max(1.1 * relative_error(theirs, want), 1e-3)


def test_transformers_compiles_in_one_graph():
    pytest.importorskip("transformers")
    images, texts = batches()[0]
    integrations.patch_hf_clip()
    model, compiled = (
        hf_model("CLIP"),
        torch.compile(hf_model("CLIP"), backend="aot_eager", fullgraph=True),
    )
    losses = [hf_step(m, images, texts) for m in (model, compiled)]
    for loss in losses:
        loss.backward()
    torch.testing.assert_close(losses[1], losses[0])
    assert relative_error(all_gradients(compiled), all_gradients(model)) < 1e-5


@pytest.mark.parametrize("name", ["CLIP", "Siglip"])
def test_transformers_refuses_images_without_their_text(name):
    pytest.importorskip("transformers")
    images, texts = batches()[0]
    integrations.patch_hf_clip()
    with pytest.raises(ValueError, match="6 images and 5 texts"):
        hf_step(hf_model(name), images, texts[:5])


def test_transformers_without_one_modality_has_no_loss():
    pytest.importorskip("transformers")
    integrations.patch_hf_clip()
    outputs = hf_model("Tipsv2")(input_ids=batches()[0][1], return_loss=True)
    assert outputs.loss is None and outputs.text_embeds is not None


def test_transformers_outputs_are_as_before():
    pytest.importorskip("transformers")
    model = hf_model("CLIP").eval()
    images, texts = batches()[0]

    def outputs():
        with torch.no_grad():
            positional = model(texts, images, None, None, True)
            as_tuple = model(texts, images, return_loss=True, return_dict=False)
            without_loss = model(input_ids=texts, pixel_values=images)
        return positional, as_tuple, without_loss

    plain = outputs()
    integrations.patch_hf_clip()
    for got, want in zip(outputs(), plain, strict=True):
        assert type(got) is type(want)
        if isinstance(want, tuple):
            assert len(got) == len(want)
            torch.testing.assert_close(got[:5], want[:5])
            continue
        assert list(got) == list(want)
        for key in ("loss", "logits_per_image", "logits_per_text", "image_embeds"):
            value = getattr(want, key)
            if value is None:
                assert getattr(got, key) is None
            else:
                torch.testing.assert_close(getattr(got, key), value)
    # Trainers decide by the signature whether a model can return its loss.
    assert "return_loss" in inspect.signature(type(model).forward).parameters


def test_transformers_is_patched_once_and_restored():
    transformers = pytest.importorskip("transformers")
    names = [owner for _, owner, _ in hf_clip._LOSSES if hasattr(transformers, owner)]
    classes = [getattr(transformers, name) for name in names]
    originals = [vars(cls)["forward"] for cls in classes]
    integrations.patch_hf_clip()
    patched = [cls.forward for cls in classes]
    assert all(now is not before for now, before in zip(patched, originals, strict=True))
    integrations.patch_hf_clip()
    assert [cls.forward for cls in classes] == patched
    for _ in range(2):
        integrations.unpatch_hf_clip()
        assert [vars(cls)["forward"] for cls in classes] == originals


# ---------------------------------------------------------------------------------------------
# The patching itself
# ---------------------------------------------------------------------------------------------


def test_a_package_that_is_missing_is_named():
    patches = PatchSet("no_such_package", (Patch("no_such_package.a", "A", "f", lambda f: f),))
    with pytest.raises(ImportError, match="no_such_package is not installed"):
        patches.apply()
    patches.undo()


def test_a_model_that_an_older_release_lacks_is_passed_over():
    patches = PatchSet(
        "json",
        (
            Patch("json.no_such_model.modeling", "Model", "forward", lambda f: f),
            Patch("json.decoder", "JSONDecoder", "decode", lambda f: print),
        ),
    )
    from json import JSONDecoder

    original = JSONDecoder.decode
    patches.apply()
    assert JSONDecoder.decode is print
    patches.undo()
    assert JSONDecoder.decode is original


def test_nothing_is_half_patched():
    patches = PatchSet(
        "json",
        (
            Patch("json.decoder", "JSONDecoder", "decode", lambda f: print),
            Patch("json.decoder", "JSONDecoder", "no_such_method", lambda f: print),
        ),
    )
    from json import JSONDecoder

    original = JSONDecoder.decode
    for _ in range(2):
        with pytest.raises(KeyError, match="no_such_method"):
            patches.apply()
        assert JSONDecoder.decode is original


def test_the_kernels_import_neither_open_clip_nor_transformers():
    code = (
        "import sys, fastgoal_kernels, fastgoal_kernels.integrations, fastgoal_kernels.distributed;"
        "found = {'open_clip', 'transformers', 'timm'} & set(sys.modules); assert not found, found"
    )
    search = f"import sys; sys.path[:] = {sys.path!r}; "
    done = subprocess.run([sys.executable, "-c", search + code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


if __name__ == "__main__":
    import open_clip  # noqa: F401 (before the fork, so that it is loaded once)

    torch.multiprocessing.start_processes(
        run_rank, (Path(sys.argv[1]),), nprocs=RANKS, start_method="fork"
    )
