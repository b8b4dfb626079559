"""Every public loss in every surrounding that PyTorch has for a training step.

One small training step per loss: two linear towers, the loss and its scale. What surrounds it may
change how it is run, but not its loss and not one gradient; where PyTorch asks for a derivative
that the operators do not have, the answer is an error that says what serves instead.
"""

from __future__ import annotations

import ast
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch._dynamo.testing
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.utils.checkpoint import checkpoint

import fastgoal_kernels
from fastgoal_kernels import (
    ClipLoss,
    FastGoalLoss,
    HierarchicalAlignmentLoss,
    MaxSimLoss,
    SigLipLoss,
    TextConditionedPool,
    TextConditionedSigmoidLoss,
    TokenSimilarityLoss,
    clip_contrastive_loss,
    maxsim_contrastive_loss,
    sigmoid_contrastive_loss,
    text_conditioned_sigmoid_loss,
    token_similarity_loss,
    use_backend,
)
from fastgoal_kernels.ops.maxsim import maxsim, maxsim_backward
from fastgoal_kernels.ops.normalize import l2_normalize_backward
from fastgoal_kernels.ops.score_loss import score_loss, score_loss_backward

DEVICES = ["cpu"] + (["cuda"] if torch.cuda.is_available() else [])
DIM = 8


# ---------------------------------------------------------------------------------------------
# The losses, each in a training step
# ---------------------------------------------------------------------------------------------


def unit(x: Tensor) -> Tensor:
    return F.normalize(x, dim=-1)


def feature(tokens: Tensor) -> Tensor:
    """(N, tokens, D) -> (N, D), as a tower's global feature."""
    return unit(tokens.mean(dim=1))


def captions(words: Tensor) -> Tensor:
    """(N, 2 * words, D) -> (2 * N, D): two part captions an image."""
    return words.unflatten(1, (2, -1)).mean(dim=2).flatten(0, 1)


def fast_goal(step: Step, v: Tensor, t: Tensor) -> Tensor:
    local = feature(v[:, :2]), feature(t[:, :2])
    pooled = v[:, 1:3].mean(dim=1), t[:, 1:3].mean(dim=1)
    return FastGoalLoss()(feature(v), feature(t), *local, *pooled, step.scale)


def hierarchical(step: Step, v: Tensor, t: Tensor) -> Tensor:
    whole = v[:, 0], t.mean(dim=1)
    return HierarchicalAlignmentLoss(2)(
        step.pool, v, v.mean(dim=1), captions(t), *whole, step.scale, step.bias, 7.0, step.bias
    )


# By the name of what they call. A step has image tokens v (N, 5, D), text tokens t (N, 4, D), the
# scale, the bias and a pool.
LOSSES: dict[str, Callable[[Step, Tensor, Tensor], Tensor]] = {
    "clip_contrastive_loss": lambda step, v, t: clip_contrastive_loss(
        v.mean(dim=1), t.mean(dim=1), step.scale, step.bias, label_smoothing=0.1, normalize=True
    ),
    "sigmoid_contrastive_loss": lambda step, v, t: sigmoid_contrastive_loss(
        v.mean(dim=1), captions(t), step.scale, step.bias, captions_per_image=2, normalize=True
    ),
    "maxsim_contrastive_loss": lambda step, v, t: maxsim_contrastive_loss(
        v, t, step.scale, step.bias, objective="sigmoid", direction="text_to_image", recompute=True
    ),
    "text_conditioned_sigmoid_loss": lambda step, v, t: text_conditioned_sigmoid_loss(
        step.pool, v, captions(t), step.scale, step.bias, captions_per_image=2
    ),
    "token_similarity_loss": lambda step, v, t: token_similarity_loss(
        v.mean(dim=1), t.mean(dim=1), mode="matrix"
    ),
    "ClipLoss": lambda step, v, t: ClipLoss()(feature(v), feature(t), step.scale),
    "SigLipLoss": lambda step, v, t: SigLipLoss()(feature(v), feature(t), step.scale, step.bias),
    "MaxSimLoss": lambda step, v, t: MaxSimLoss(normalize=True)(v, t, step.scale),
    "TextConditionedSigmoidLoss": lambda step, v, t: TextConditionedSigmoidLoss(1)(
        step.pool, v, feature(t), step.scale, step.bias
    ),
    "TokenSimilarityLoss": lambda step, v, t: TokenSimilarityLoss()(v.mean(dim=1), t.mean(dim=1)),
    "FastGoalLoss": fast_goal,
    "HierarchicalAlignmentLoss": hierarchical,
}


# Losses of plain PyTorch alone, which has every derivative: by mode, and by where the tensors are.
PLAIN = {
    "cpu": ("token_similarity_loss", "TokenSimilarityLoss"),
    "cuda": ("token_similarity_loss",),
}


class Step(nn.Module):
    """Towers and the loss called `name`: what a trainer wraps, compiles and shards."""

    def __init__(self, name: str) -> None:
        super().__init__()
        self.loss = LOSSES[name]
        self.image_tower, self.text_tower = nn.Linear(6, DIM), nn.Linear(7, DIM)
        self.pool = TextConditionedPool(DIM, 2)
        # One element and not none at all: FSDP2 does not shard 0-dim parameters.
        self.log_scale = nn.Parameter(torch.tensor([1.5]))
        self.bias = nn.Parameter(torch.tensor([-1.0]))

    @property
    def scale(self) -> Tensor:
        return self.log_scale.exp()

    def forward(self, images: Tensor, texts: Tensor) -> Tensor:
        return self.loss(self, self.image_tower(images), self.text_tower(texts))


def make_step(name: str, device: str) -> Step:
    torch.manual_seed(0)
    return Step(name).to(device)


def make_batch(device: str, batch: int = 6, seed: int = 1) -> tuple[Tensor, Tensor]:
    random = torch.Generator().manual_seed(seed)
    shapes = (batch, 5, 6), (batch, 4, 7)
    images, texts = (torch.randn(shape, generator=random).to(device) for shape in shapes)
    return images, texts


def gradients(step: Step) -> dict[str, Tensor]:
    """Of the parameters that have one, whole ones also where they are sharded."""
    found = {name: p.grad for name, p in step.named_parameters() if p.grad is not None}
    return {n: g.full_tensor() if hasattr(g, "full_tensor") else g for n, g in found.items()}


def run(step: Step, *batch: Tensor, loss: Callable[..., Tensor] | None = None) -> dict[str, Tensor]:
    """The loss, and the gradients of everything that has one."""
    step.zero_grad()
    value = (step if loss is None else loss)(*batch)
    value.backward()
    return {"loss": value.detach()} | {k: g.clone() for k, g in gradients(step).items()}


def assert_equal_bits(one: dict[str, Tensor], other: dict[str, Tensor]) -> None:
    assert one.keys() == other.keys()
    for name in one:
        assert torch.equal(one[name], other[name]), name


def assert_close(one: dict[str, Tensor], other: dict[str, Tensor]) -> None:
    """Equal up to a few float32 roundings, where sums may be taken in another order."""
    assert one.keys() == other.keys()
    for name in one:
        torch.testing.assert_close(one[name], other[name], msg=lambda m, name=name: f"{name}: {m}")


every_loss = pytest.mark.parametrize("name", LOSSES)
every_device = pytest.mark.parametrize("device", DEVICES)


def test_every_public_loss_is_here():
    public = {name for name in fastgoal_kernels.__all__ if name.lower().endswith("loss")}
    assert public == set(LOSSES)


@every_device
@every_loss
def test_steps_are_the_references(name, device):
    """What the other tests compare with is right itself."""
    step, batch = make_step(name, device), make_batch(device)
    ours = run(step, *batch)
    with use_backend("reference"):
        assert_close(ours, run(step, *batch))
    assert len(ours) >= 5
    assert all(float(x.abs().max()) > 0 for key, x in ours.items() if key != "bias")


# ---------------------------------------------------------------------------------------------
# Compilation, autocast, loss scaling, checkpointing, sharding
# ---------------------------------------------------------------------------------------------


@every_device
@every_loss
def test_a_step_compiles_whole_and_new_batch_sizes_compile_nothing(name, device):
    torch._dynamo.reset()
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    step = make_step(name, device)
    compiled = torch.compile(step, fullgraph=True, backend=counter)
    frames = []
    for batch_size in (5, 6, 9):
        batch = make_batch(device, batch_size)
        assert_close(run(step, *batch, loss=compiled), run(step, *batch))
        frames.append(counter.frame_count)
    # The second size makes the batch dynamic.
    assert frames[1] == frames[-1] <= 2, frames


@every_device
@every_loss
def test_autocast(name, device):
    step, batch = make_step(name, device), make_batch(device)

    def inside(*batch: Tensor) -> Tensor:
        with torch.autocast(device, torch.bfloat16):
            return step(*batch)

    ours = run(step, *batch, loss=inside)
    assert all(x.dtype == torch.float32 for x in ours.values())
    with use_backend("reference"):
        eager = run(step, *batch, loss=inside)
    # Both compute in float32 from features in bfloat16, whose gradients they then round: 2^-9 each,
    # several times over on the way through the tower.
    for key, expected in eager.items():
        assert (ours[key] - expected).norm() <= 2.0**-7 * expected.norm() + 1e-5, key


@every_loss
def test_a_step_of_shapes_alone(name):
    """On the meta device: as tools do that want to know sizes before there is memory for them."""
    step, batch = make_step(name, "cpu").to("meta"), make_batch("meta")
    ours = run(step, *batch)
    expected = run(make_step(name, "cpu"), *make_batch("cpu"))
    assert {k: (x.shape, x.dtype) for k, x in ours.items()} == {
        k: (x.shape, x.dtype) for k, x in expected.items()
    }
    assert all(x.is_meta for x in ours.values())


@every_device
@every_loss
@pytest.mark.parametrize("half", [False, True])
def test_a_scaled_loss_gives_the_same_gradients(name, device, half):
    """Powers of two change no digit of a gradient, and grad_filter_eps knows nothing of them."""
    step, batch = make_step(name, device), make_batch(device)

    def inside(*batch: Tensor) -> Tensor:
        with torch.autocast(device, torch.bfloat16, enabled=half):
            return step(*batch)

    plain = run(step, *batch, loss=inside)
    optimizer = torch.optim.SGD(step.parameters(), lr=0.1)
    scaler = torch.amp.GradScaler(device, init_scale=2.0**16)
    step.zero_grad()
    loss = inside(*batch)
    scaler.scale(loss).backward()
    scaler.unscale_(optimizer)
    assert_equal_bits({"loss": loss.detach()} | gradients(step), plain)


@every_device
@every_loss
@pytest.mark.parametrize("use_reentrant", [False, True])
@pytest.mark.parametrize("what", ["towers", "loss", "step"])
def test_activation_checkpointing_changes_no_bit(name, device, what, use_reentrant):
    step = make_step(name, device)
    # The reentrant kind finds out from the inputs alone whether there will be a backward.
    batch = tuple(x.requires_grad_() for x in make_batch(device))

    def again(function: Callable[..., Any], *inputs: Any) -> Any:
        return checkpoint(function, *inputs, use_reentrant=use_reentrant)

    def checkpointed(images: Tensor, texts: Tensor) -> Tensor:
        if what == "step":
            return again(step, images, texts)
        if what == "towers":
            return step.loss(step, again(step.image_tower, images), again(step.text_tower, texts))
        return again(step.loss, step, step.image_tower(images), step.text_tower(texts))

    assert_equal_bits(run(step, *batch, loss=checkpointed), run(step, *batch))


@pytest.fixture
def one_process():
    """A process group of this process alone, on a port that the system picks."""
    store = dist.TCPStore("localhost", 0, 1, is_master=True)
    backend = "nccl" if torch.cuda.is_available() else "gloo"
    dist.init_process_group(backend, store=store, rank=0, world_size=1)
    yield "cuda" if backend == "nccl" else "cpu"
    dist.destroy_process_group()


@pytest.mark.skipif(
    not torch.cuda.is_available() and not hasattr(torch.cpu.Stream, "record_event"),
    reason="this torch has FSDP2 on CUDA only",
)
@every_loss
def test_sharded_towers_and_pool_train(name, one_process):
    """Each tower by itself; pool, scale and bias with the step, whose forward reads them."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    mesh = init_device_mesh(one_process, (1,))
    step, batch = make_step(name, one_process), make_batch(one_process)
    expected = run(step, *batch)
    for module in (step.image_tower, step.text_tower, step):
        fully_shard(module, mesh=mesh)
    assert_close(run(step, *batch), expected)


# ---------------------------------------------------------------------------------------------
# CUDA graphs
# ---------------------------------------------------------------------------------------------


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="CUDA graphs want a CUDA device")
@every_loss
def test_a_captured_step_is_replayed_on_new_inputs(name):
    step, held = make_step(name, "cuda"), make_batch("cuda")
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):  # kernels are compiled and tuned before the capture
        for _ in range(3):
            run(step, *held)
    torch.cuda.current_stream().wait_stream(side)
    step.zero_grad()  # to None, so that a replay writes gradients and does not add to them
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        loss = step(*held)
        loss.backward()
    captured = {"loss": loss.detach()} | gradients(step)
    for seed in (2, 3):
        batch = make_batch("cuda", seed=seed)
        for buffer, new in zip(held, batch, strict=True):
            buffer.copy_(new)
        graph.replay()
        assert_close(captured, run(make_step(name, "cuda"), *batch))


# ---------------------------------------------------------------------------------------------
# Other derivatives: right, or refused in words that help
# ---------------------------------------------------------------------------------------------

Scalar = Callable[[Tensor, Tensor], Tensor]
Tensors = tuple[Tensor, ...]


def plain_gradients(f: Scalar, v: Tensor, t: Tensor) -> Tensors:
    v, t = v.clone().requires_grad_(), t.clone().requires_grad_()
    return torch.autograd.grad(f(v, t), (v, t))


def tangent(x: Tensor) -> Tensor:
    """Not x itself: along it a normalised feature does not change."""
    return x.roll(1, dims=0)


def directional(f: Scalar, v: Tensor, t: Tensor) -> Tensors:
    g_v, g_t = plain_gradients(f, v, t)
    return ((g_v * tangent(v)).sum() + (g_t * tangent(t)).sum(),)


def stacked(v: Tensor, t: Tensor) -> Tensors:
    return torch.stack([v, v + 0.1, 0.9 * v]), torch.stack([t, t - 0.1, 1.1 * t])


def one_by_one(function: Callable[[Tensor, Tensor], Tensors], v: Tensor, t: Tensor) -> Tensors:
    results = [function(*pair) for pair in zip(*stacked(v, t), strict=True)]
    return tuple(torch.stack(x) for x in zip(*results, strict=True))


def in_forward_mode(f: Scalar, v: Tensor, t: Tensor) -> Tensors:
    with forward_ad.dual_level():
        duals = (forward_ad.make_dual(x, tangent(x)) for x in (v, t))
        out, derivative = forward_ad.unpack_dual(f(*duals))
    return (torch.zeros_like(out) if derivative is None else derivative,)


def gradients_around_vmap(f: Scalar, v: Tensor, t: Tensor) -> Tensors:
    many = tuple(x.requires_grad_() for x in stacked(v, t))
    return torch.autograd.grad(torch.vmap(f)(*many).sum(), many)


def batched_gradients(f: Scalar, v: Tensor, t: Tensor) -> Tensors:
    v, t = v.clone().requires_grad_(), t.clone().requires_grad_()
    two = torch.tensor([1.0, 2.0], device=v.device)
    first = torch.autograd.grad(f(v, t), (v, t), two, is_grads_batched=True)
    return tuple(x[1] / 2 for x in first)


def gradient_with_graph(f: Scalar, v: Tensor, t: Tensor) -> Tensors:
    v, t = v.clone().requires_grad_(), t.clone().requires_grad_()
    return tuple(x.detach() for x in torch.autograd.grad(f(v, t), (v, t), create_graph=True))


def gradient_penalty(f: Scalar, v: Tensor, t: Tensor) -> Tensors:
    v, t = v.clone().requires_grad_(), t.clone().requires_grad_()
    gradient = torch.autograd.grad(f(v, t), (v, t), create_graph=True)
    return torch.autograd.grad(sum(g.square().sum() for g in gradient), (v, t))


def func_penalty(f: Scalar, v: Tensor, t: Tensor) -> Tensors:
    def penalty(v: Tensor, t: Tensor) -> Tensor:
        return sum(g.square().sum() for g in torch.func.grad(f, (0, 1))(v, t))

    return torch.func.grad(penalty, (0, 1))(v, t)


def reference_penalty(f: Scalar, v: Tensor, t: Tensor) -> Tensors:
    with use_backend("reference"):
        return gradient_penalty(f, v, t)


# How it is asked for, and the same by other means.
TRANSFORMS: dict[str, tuple[Callable[..., Tensors], Callable[..., Tensors]]] = {
    "create_graph": (gradient_with_graph, plain_gradients),
    "is_grads_batched": (batched_gradients, plain_gradients),
    "vmap": (
        lambda f, v, t: (torch.vmap(f)(*stacked(v, t)),),
        lambda f, v, t: one_by_one(lambda v, t: (f(v, t),), v, t),
    ),
    "gradients around vmap": (
        gradients_around_vmap,
        lambda f, v, t: one_by_one(lambda v, t: plain_gradients(f, v, t), v, t),
    ),
    "func.grad": (lambda f, v, t: torch.func.grad(f, (0, 1))(v, t), plain_gradients),
    "func.vjp": (
        lambda f, v, t: torch.func.vjp(f, v, t)[1](torch.ones((), device=v.device)),
        plain_gradients,
    ),
    "func.jacrev": (lambda f, v, t: torch.func.jacrev(f, (0, 1))(v, t), plain_gradients),
    "vmap of grad": (
        lambda f, v, t: torch.vmap(torch.func.grad(f, (0, 1)))(*stacked(v, t)),
        lambda f, v, t: one_by_one(lambda v, t: plain_gradients(f, v, t), v, t),
    ),
    "func.jvp": (
        lambda f, v, t: (torch.func.jvp(f, (v, t), (tangent(v), tangent(t)))[1],),
        directional,
    ),
    "func.jacfwd": (lambda f, v, t: torch.func.jacfwd(f, (0, 1))(v, t), plain_gradients),
    "forward_ad": (in_forward_mode, directional),
    "gradient penalty": (gradient_penalty, reference_penalty),
    "func.grad of a penalty": (func_penalty, reference_penalty),
}
SERVED = ("create_graph", "is_grads_batched", "vmap", "gradients around vmap")


def as_function(name: str, device: str) -> tuple[Scalar, Tensor, Tensor]:
    """A loss of tokens alone, the parameters of its step being constants."""
    step = make_step(name, device).requires_grad_(False)
    images, texts = make_batch(device)
    return (lambda v, t: step.loss(step, v, t)), step.image_tower(images), step.text_tower(texts)


@every_device
@every_loss
@pytest.mark.parametrize("transform", TRANSFORMS)
@pytest.mark.filterwarnings("ignore:There is a performance drop:UserWarning")
def test_a_derivative_is_right_or_refused_with_its_fix(name, device, transform):
    f, v, t = as_function(name, device)
    asked, expected = TRANSFORMS[transform]
    expected = expected(f, v, t)

    def answer_is_right() -> None:
        for got, want in zip(asked(f, v, t), expected, strict=True):
            # torch.func.jvp of 0.5 * x is float64 for a 0-dim float32 x.
            torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5, check_dtype=False)

    if transform in SERVED or name in PLAIN[device]:
        answer_is_right()
    else:
        with pytest.raises(RuntimeError, match=r"^fastgoal::.* Fix: backend='reference'"):
            asked(f, v, t)
    with use_backend("reference"):  # what the error proposes
        answer_is_right()


@every_device
@pytest.mark.parametrize("name", ["MaxSimLoss", "ClipLoss"])
def test_forward_mode_is_refused_where_it_is_compiled(name, device):
    """The refusal is part of the operator: a graph that holds it can not be wrong in silence."""
    torch._dynamo.reset()
    f, v, t = as_function(name, device)

    def jvp(v: Tensor, t: Tensor) -> Tensor:
        return torch.func.jvp(f, (v, t), (tangent(v), tangent(t)))[1]

    with pytest.raises(RuntimeError, match=r"fastgoal::.* has no forward mode"):
        torch.compile(jvp, backend="aot_eager", fullgraph=True)(v, t)


# ---------------------------------------------------------------------------------------------
# Every operator
# ---------------------------------------------------------------------------------------------


def operators() -> set[str]:
    """The names of the operators that importing the library has registered."""
    names = torch._C._dispatch_get_all_op_names()
    found = {name.removeprefix("fastgoal::") for name in names if name.startswith("fastgoal::")}
    return {name for name in found if not name.startswith("test_")}  # other tests' own


def test_every_operator_has_an_opcheck():
    """Some test function beside this one names both `opcheck` and the operator."""
    checked = set()
    for file in Path(__file__).parent.glob("test_*.py"):
        for function in ast.walk(ast.parse(file.read_text("utf-8"))):
            if isinstance(function, ast.FunctionDef):
                names = {x.id for x in ast.walk(function) if isinstance(x, ast.Name)}
                names |= {x.attr for x in ast.walk(function) if isinstance(x, ast.Attribute)}
                checked |= names if "opcheck" in names else set()
    assert len(operators()) > 10
    assert operators() <= checked, f"no opcheck of {sorted(operators() - checked)}"


def test_every_gradient_is_registered_the_same_way():
    """So that no derivative is wrong in silence: see ops/autograd_rules.py."""
    pairs = {name: f"{name}_backward" for name in operators() if f"{name}_backward" in operators()}
    assert len(pairs) > 4
    for name in (*pairs, *pairs.values()):
        has_kernel = torch._C._dispatch_has_kernel_for_dispatch_key
        assert has_kernel(f"fastgoal::{name}", "AutogradCPU"), name


@pytest.mark.parametrize(
    ("backend", "device"), [("torch", device) for device in DEVICES] + [("triton", "cuda")]
)
def test_opcheck_of_the_backward_operators(backend, device):
    """Of those that their forward's opcheck reaches through autograd only."""
    if device not in DEVICES:
        pytest.skip("no CUDA device")
    random = torch.Generator().manual_seed(3)

    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, generator=random).to(device)

    image, text, offsets = draw(3, 6, 5), draw(11, 5), torch.tensor([0, 4, 4, 11], device=device)
    mask = draw(3, 6) < 0.8
    layout = (image, text, mask, None, None, offsets, 6, 11)
    for direction in ("text_to_image", "image_to_text", "both"):
        *_, t2i, i2t = maxsim(*layout, direction, True, True, backend)
        upstream = (
            None if direction == "image_to_text" else draw(3, 3),
            None if direction == "text_to_image" else draw(3, 3),
        )
        for need in ((True, True), (True, False), (False, True)):
            arguments = (*upstream, t2i, i2t, *layout, True, *need, backend, False)
            torch.library.opcheck(maxsim_backward, arguments)
    for x in (image, image.transpose(0, 1), text[:0]):
        torch.library.opcheck(l2_normalize_backward, (torch.ones_like(x), x))
    rows, scale, bias = draw(4, 4), torch.tensor(2.0, device=device), torch.tensor(0.1).to(device)
    for objective in ("softmax", "sigmoid"):
        for columns in (None, draw(4, 4)):
            scores = (rows, columns, scale, bias, None)
            options = (objective, 1, 0.0, backend)
            _, row_lse, column_lse = score_loss(*scores, *options)
            arguments = (torch.ones_like(scale), *scores, row_lse, column_lse, *options)
            torch.library.opcheck(score_loss_backward, arguments)
