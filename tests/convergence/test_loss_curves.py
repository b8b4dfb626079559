"""A model trained with our losses learns what it learns with the eager ones, step by step.

Two trainings that differ in rounding alone drift apart, because every step starts where the last
one ended. How far, is measured: the eager loss is trained again with a difference that means
nothing, and our curve has to stay as close to the eager one as such controls do.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import open_clip
import pytest
import torch
from torch import Tensor

from fastgoal_kernels import (
    ClipLoss,
    FastGoalLoss,
    SigLipLoss,
    maxsim_contrastive_loss,
    use_backend,
)
from fastgoal_models import FastGoalBatch, FastGoalModel

DEVICES = ["cpu"] + (["cuda"] if torch.cuda.is_available() else [])

STEPS = 200
PAIRS, BATCH = 32, 16
CONTEXT, IMAGE = 12, 16
MODEL = {
    "embed_dim": 16,
    "init_logit_scale": math.log(5),
    "init_logit_bias": -3.0,
    "vision_cfg": dict(image_size=IMAGE, patch_size=8, width=32, head_width=16, layers=1),
    "text_cfg": dict(context_length=CONTEXT, width=32, heads=2, layers=1),
}

# At every step our curve may be this many times as far from the eager one as the farther of two
# controls has been until then. All three are noise of one size, grown by one feedback: over four
# seeds and four losses ours was at most as far as the controls, once twice as far.
TIMES_THE_CONTROLS = 8
# Until noise has grown, a control can agree to the bit by luck, and a mean of 2 * 16 rounded terms
# be a few units in its last place off.
FLOOR = 4 * 2.0**-23
# And no farther than this, whatever the controls do. They end at 1e-6 to 5e-6 (SigLIP's, from other
# seeds, at up to 4e-5); a tower's gradient that is 0.1 % wrong leads 3e-4 away, or farther.
AT_MOST = 5e-5


# ---------------------------------------------------------------------------------------------
# A small CLIP, and 32 images with captions to be told apart
# ---------------------------------------------------------------------------------------------


def make_model(device: str) -> FastGoalModel:
    torch.manual_seed(0)
    model = FastGoalModel.create(MODEL, context_length=CONTEXT)
    # The vocabulary is nearly all of a model this small: it stays fixed, for speed. open_clip
    # starts it so near 0 that the first hundreds of steps would only learn to see the words.
    model.clip.token_embedding.weight.requires_grad_(False).normal_()
    with torch.no_grad():
        model.clip.positional_embedding.normal_(std=0.1)
    return model.to(device)


def make_data(device: str) -> FastGoalBatch:
    random = torch.Generator().manual_seed(1)
    images = torch.randn(PAIRS, 3, IMAGE, IMAGE, generator=random)
    texts = torch.randint(1, 49000, (PAIRS, CONTEXT), generator=random)
    lengths = torch.randint(8, CONTEXT + 1, (PAIRS,), generator=random)
    sentences = torch.zeros_like(texts)
    for text, sentence, length in zip(texts, sentences, lengths.tolist(), strict=True):
        text[0], text[length - 1], text[length:] = 49406, 49407, 0
        sentence[: length - 4] = text[2 : length - 2]  # some of its words, as a text of its own
        sentence[0], sentence[length - 4] = 49406, 49407
    halves = torch.tensor([[0, 0, 20, 40], [20, 0, 40, 40], [0, 0, 40, 20], [0, 20, 40, 40]])
    return FastGoalBatch(
        images=images,
        texts=texts,
        local_images=images + 0.3 * torch.randn(images.shape, generator=random),
        local_texts=sentences,
        boxes=halves[torch.randint(4, (PAIRS,), generator=random)].float(),
        image_sizes=torch.full((PAIRS, 2), 40),
        spans=torch.stack([torch.full_like(lengths, 2), lengths - 2], dim=1),
        lengths=lengths,
    ).to(device)


# ---------------------------------------------------------------------------------------------
# What is trained, and with which loss
# ---------------------------------------------------------------------------------------------

Arguments = dict[str, Any]


def features(model: FastGoalModel, batch: FastGoalBatch) -> Arguments:
    return {
        "image_features": model.encode_image(batch.images),
        "text_features": model.encode_text(batch.texts),
        "logit_scale": model.clip.logit_scale.exp(),
    }


def features_and_bias(model: FastGoalModel, batch: FastGoalBatch) -> Arguments:
    return features(model, batch) | {"logit_bias": model.clip.logit_bias}


def tokens(model: FastGoalModel, batch: FastGoalBatch) -> Arguments:
    position = torch.arange(CONTEXT, device=batch.lengths.device)
    return {
        "image_tokens": model.project_patches(model.image_tokens(batch.images)[1]),
        "text_tokens": model.project_words(model.text_tokens(batch.texts)[1]),
        "logit_scale": model.clip.logit_scale.exp(),
        "text_mask": position < batch.lengths[:, None],
    }


def maxsim(**arguments: Any) -> Tensor:
    return maxsim_contrastive_loss(**arguments, direction="both", normalize=True)


class Task(NamedTuple):
    """The eager side is run under use_backend("reference"), ours on the backend of its choice."""

    arguments: Callable[[FastGoalModel, FastGoalBatch], Arguments]
    eager: Callable[..., Tensor]
    ours: Callable[..., Tensor]


TASKS = {
    "CLIP": Task(features, open_clip.ClipLoss(), ClipLoss()),
    "SigLIP": Task(features_and_bias, open_clip.loss.SigLipLoss(), SigLipLoss()),
    "MaxSim": Task(tokens, maxsim, maxsim),
    "FAST-GOAL": Task(FastGoalModel.forward, FastGoalLoss(), FastGoalLoss()),
}
# The two arguments whose gradients a faulty loss gets wrong by 0.1 %.
FAULTY = {
    "CLIP": ("image_features", "text_features"),
    "SigLIP": ("image_features", "text_features"),
    "MaxSim": ("image_tokens", "text_tokens"),
    "FAST-GOAL": ("region_features", "local_text_features"),
}


def train(
    task: Task,
    loss: Callable[..., Tensor],
    device: str,
    steps: int = STEPS,
    *,
    one_ulp_away: bool = False,
    other_order: bool = False,
    fault: tuple[str, float] | None = None,
) -> Tensor:
    """The loss of every step, (steps,) float64.

    one_ulp_away: the weights start a unit in the last place from where they would.
    other_order: every batch is the same one back to front, so that sums over it round otherwise.
    fault: an argument of the loss, and by what its gradient is multiplied.
    """
    model, data = make_model(device), make_data(device)
    weights = [p for p in model.parameters() if p.requires_grad]
    if one_ulp_away:
        with torch.no_grad():
            for weight in weights:
                weight *= 1 + torch.randn_like(weight).sign() * 2.0**-23
    # Not Adam: it divides a gradient by its own size, and so hides one of a wrong size. The rate is
    # one at which the training is stable: at ten times it the controls end up anywhere.
    optimizer = torch.optim.SGD(weights, lr=0.003, momentum=0.9)
    order = torch.Generator().manual_seed(2)
    losses = []
    for _ in range(steps):
        chosen = torch.randperm(PAIRS, generator=order)[:BATCH].to(device)
        chosen = chosen.flip(0) if other_order else chosen
        arguments = task.arguments(model, FastGoalBatch(*(x[chosen] for x in data)))
        if fault is not None:
            name, factor = fault
            arguments[name].register_hook(lambda gradient, factor=factor: factor * gradient)
        value = loss(**arguments)
        optimizer.zero_grad()
        value.backward()
        optimizer.step()
        losses.append(value.detach())
    return torch.stack(losses).double().cpu()


def eager_curve_and_noise(task: Task, device: str) -> tuple[Tensor, Tensor]:
    """The eager curve, and how far a control of it has been away up to each step."""
    with use_backend("reference"):
        curve = train(task, task.eager, device)
        controls = [
            train(task, task.eager, device, one_ulp_away=True),
            train(task, task.eager, device, other_order=True),
        ]
    away = torch.stack([(control - curve).abs() for control in controls]).amax(dim=0)
    return curve, away.cummax(dim=0).values


def assert_same_curve(ours: Tensor, eager: Tensor, noise: Tensor) -> None:
    allowed = TIMES_THE_CONTROLS * noise + FLOOR * eager.abs().clamp_min(1)
    away = (ours - eager).abs()
    beyond = (away > allowed.clamp_max(AT_MOST)).nonzero().flatten()
    if len(beyond):
        at = int(beyond[0])
        raise AssertionError(
            f"step {at} of {len(ours)}: the loss is {ours[at]:.9g}, eager's {eager[at]:.9g}, "
            f"{away[at]:.1e} apart where {allowed[at]:.1e} is noise"
        )


def leaves_the_curve(ours: Tensor, eager: Tensor, noise: Tensor) -> str | None:
    """Where, and how far, our losses are from the eager ones by more than noise; None: nowhere."""
    allowed = TIMES_THE_CONTROLS * noise + FLOOR * eager.abs().clamp_min(1)
    allowed = allowed.clamp_max(AT_MOST)
    away = (ours - eager).abs()
    for step in (~(away <= allowed)).nonzero().flatten().tolist():  # NaN is away, too
        return (
            f"step {step} of {len(ours)}: our loss is {ours[step]:.9g}, eager's {eager[step]:.9g}, "
            f"{away[step]:.1e} apart where {allowed[step]:.1e} is noise"
        )
    return None


@pytest.mark.slow
@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("name", TASKS)
def test_the_curve_is_the_eager_losss(name, device):
    task = TASKS[name]
    eager, noise = eager_curve_and_noise(task, device)
    # A training that learns nothing, or that is all noise, would show nothing.
    assert eager[-20:].mean() < 0.3 * eager[0]
    assert noise[-1] < AT_MOST
    problem = leaves_the_curve(train(task, task.ours, device), eager, noise)
    assert problem is None, problem
    # And a loss that is a little wrong is found out, within a few steps.
    image, text = FAULTY[name]
    for fault in (("logit_scale", 0.0), (image, 1.001), (text, 0.999)):
        faulty = train(task, task.ours, device, 40, fault=fault)
        assert leaves_the_curve(faulty, eager[:40], noise[:40]), fault
