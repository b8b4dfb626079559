"""The gradient cache against one big batch: losses, dropout, autocast, DDP, memory, errors."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable, Iterator
from typing import Any, ClassVar, NamedTuple

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from fastgoal_kernels import (
    FastGoalLoss,
    HierarchicalAlignmentLoss,
    MaxSimLoss,
    TextConditionedPool,
    cached_backward,
    clip_contrastive_loss,
    gradient_cache,
    maxsim_contrastive_loss,
    pack_tokens,
    sigmoid_contrastive_loss,
    text_conditioned_sigmoid_loss,
)

DEVICES = ["cpu"] + (["cuda"] if torch.cuda.is_available() else [])
ITEMS, CAPTIONS, TOKENS, WIDTH, DIM = 10, 2, 3, 7, 8
CHUNKS = [1, 4, 5, 10, 16]  # 4 does not divide the items, 10 and 16 are the plain step


class Towers(nn.Module):
    """An image and a text encoder of token rows, and the scalars of a CLIP."""

    def __init__(self, dropout: float = 0.0):
        super().__init__()
        self.image = nn.Sequential(
            nn.Linear(WIDTH, 16), nn.GELU(), nn.Dropout(dropout), nn.Linear(16, DIM)
        )
        self.text = nn.Sequential(
            nn.Linear(WIDTH, 16), nn.LayerNorm(16), nn.Dropout(dropout), nn.Linear(16, DIM)
        )
        self.pool = TextConditionedPool(DIM, 2)
        self.log_scale = nn.Parameter(torch.tensor(1.2))
        self.bias = nn.Parameter(torch.tensor(-3.0))

    def encode_image(self, images: Tensor) -> dict[str, Tensor]:
        tokens = self.image(images)
        return {"tokens": tokens, "feature": F.normalize(tokens.mean(1), dim=-1)}

    def encode_text(self, texts: Tensor) -> dict[str, Tensor]:
        """Texts (items, K, tokens, width)."""
        tokens = self.text(texts)
        return {"tokens": tokens, "feature": F.normalize(tokens.mean(2), dim=-1)}

    def forward(self, batch: Batch) -> dict[str, Any]:
        return {
            "image": self.encode_image(batch.images),
            "text": self.encode_text(batch.texts),
            "mask": batch.mask,
            "scale_and_bias": (self.log_scale.exp(), self.bias),
            "nothing": None,
        }


class Batch(NamedTuple):
    images: Tensor
    """(items, tokens, width)"""
    texts: Tensor
    """(items, K, tokens, width)"""
    mask: Tensor
    """(items, K, tokens) bool: the real words"""


def make(
    items: int = ITEMS, dropout: float = 0.0, dtype=torch.float64, device: str = "cpu"
) -> tuple[Towers, Batch]:
    generator = torch.Generator().manual_seed(5)

    def randn(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64).to(device, dtype)

    torch.manual_seed(6)
    towers = Towers(dropout).to(torch.float64)
    mask = torch.rand(items, CAPTIONS, TOKENS, generator=generator) < 0.7
    mask[..., 0] = True
    batch = Batch(
        randn(items, TOKENS, WIDTH), randn(items, CAPTIONS, TOKENS, WIDTH), mask.to(device)
    )
    return towers.to(device, dtype), batch


def gradients(module: nn.Module) -> dict[str, Tensor | None]:
    return {name: parameter.grad for name, parameter in module.named_parameters()}


def assert_same_gradients(module: nn.Module, other: nn.Module, tolerance: float = 1e-12) -> None:
    """By default for float64: sums of some hundred terms of size 1, in another order."""
    expected = gradients(other)
    for name, got in gradients(module).items():
        want = expected[name]
        assert (got is None) == (want is None), name
        if got is not None and want is not None:
            torch.testing.assert_close(got, want, rtol=tolerance, atol=tolerance, msg=name)


# ---------------------------------------------------------------------------------------------
# Every loss of the library
# ---------------------------------------------------------------------------------------------


def clip(towers: Towers, out: dict[str, Any]) -> Tensor:
    scale, bias = out["scale_and_bias"]
    text = out["text"]["feature"][:, 0]
    return clip_contrastive_loss(out["image"]["feature"], text, scale, bias, label_smoothing=0.1)


def sigmoid(towers: Towers, out: dict[str, Any]) -> Tensor:
    texts = out["text"]["feature"].flatten(0, 1)
    return sigmoid_contrastive_loss(
        out["image"]["feature"], texts, *out["scale_and_bias"], captions_per_image=CAPTIONS
    )


def maxsim(towers: Towers, out: dict[str, Any]) -> Tensor:
    """Both directions, padded captions with their mask."""
    scale, bias = out["scale_and_bias"]
    words, mask = out["text"]["tokens"][:, 1], out["mask"][:, 1]
    loss = MaxSimLoss(normalize=True)
    return loss(out["image"]["tokens"], words, scale, bias, text_mask=mask)


def maxsim_ragged(towers: Towers, out: dict[str, Any]) -> Tensor:
    """One direction, K captions, packed within the loss."""
    words, offsets, longest = pack_tokens(
        out["text"]["tokens"].flatten(0, 1), out["mask"].flatten(0, 1)
    )
    return maxsim_contrastive_loss(
        out["image"]["tokens"], words, *out["scale_and_bias"], text_offsets=offsets,
        max_text_tokens=longest, objective="sigmoid", direction="image_to_text",
        captions_per_image=CAPTIONS, normalize=True,
    )  # fmt: skip


def text_conditioned(towers: Towers, out: dict[str, Any]) -> Tensor:
    """The pool's parameters are the loss's own; its negatives are drawn at random."""
    return text_conditioned_sigmoid_loss(
        towers.pool, out["image"]["tokens"], out["text"]["feature"].flatten(0, 1),
        *out["scale_and_bias"], captions_per_image=CAPTIONS, negatives="sample",
    )  # fmt: skip


def hierarchical(towers: Towers, out: dict[str, Any]) -> dict[str, Tensor]:
    image, text = out["image"], out["text"]
    parts = text["feature"].flatten(0, 1)
    whole = text["tokens"].mean((1, 2))
    scale, bias = out["scale_and_bias"]
    return HierarchicalAlignmentLoss(CAPTIONS)(
        towers.pool, image["tokens"], image["feature"], parts, image["tokens"][:, 0], whole,
        scale, bias, scale + 1, bias / 2, output_dict=True,
    )  # fmt: skip


def fast_goal(towers: Towers, out: dict[str, Any]) -> dict[str, Tensor]:
    image, text = out["image"], out["text"]
    features = (image["feature"], text["feature"][:, 0])
    local = (F.normalize(image["tokens"][:, 0], dim=-1), text["feature"][:, 1])
    pooled = (image["tokens"][:, 1], text["tokens"][:, 0, 1])
    loss = FastGoalLoss()
    return loss(*features, *local, *pooled, out["scale_and_bias"][0], output_dict=True)


LOSSES = [clip, sigmoid, maxsim, maxsim_ragged, text_conditioned, hierarchical, fast_goal]


def one_batch(
    towers: Towers, batch: Batch, loss: Callable[[Towers, dict[str, Any]], Any]
) -> Tensor | dict[str, Tensor]:
    value = loss(towers, towers(batch))
    total = sum(value.values()) if isinstance(value, dict) else value
    assert isinstance(total, Tensor)
    total.backward()
    return value


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("chunk_size", CHUNKS)
@pytest.mark.parametrize("loss", LOSSES)
def test_equals_one_big_batch(loss, chunk_size, device):
    towers, batch = make(device=device)
    other, _ = make(device=device)
    for parameter in (*towers.parameters(), *other.parameters()):
        parameter.grad = torch.ones_like(parameter)  # gradients are added to what is there
    torch.manual_seed(7)
    expected = one_batch(other, batch, loss)
    torch.manual_seed(7)
    got = cached_backward(towers, batch, lambda out: loss(towers, out), chunk_size=chunk_size)
    assert type(got) is type(expected)
    if not isinstance(got, dict):
        got, expected = {"loss": got}, {"loss": expected}
    assert got.keys() == expected.keys()
    for name, part in got.items():
        assert not part.requires_grad and part.shape == ()
        torch.testing.assert_close(part, expected[name].detach(), rtol=1e-12, atol=1e-12)
    assert_same_gradients(towers, other)


@pytest.mark.parametrize("device", DEVICES)
def test_float32_is_as_exact_as_one_big_batch(device):
    """Both are compared with float64; sums of chunks may not be worse than one long sum.

    Chunks add up a weight's gradient in other groups, so that single roundings differ, but not
    their number: a factor of two, and one more unit in the last place, is all that is allowed.
    """

    def error(towers: Towers) -> float:
        got, want = (
            torch.cat([g.double().flatten() for g in gradients(m).values() if g is not None])
            for m in (towers, exact)
        )
        return float((got - want).norm() / want.norm())

    exact, batch = make(items=64, device=device)
    one_batch(exact, batch, maxsim)
    whole, batch32 = make(items=64, dtype=torch.float32, device=device)
    one_batch(whole, batch32, maxsim)
    cached, _ = make(items=64, dtype=torch.float32, device=device)
    cached_backward(cached, batch32, lambda out: maxsim(cached, out), chunk_size=7)
    assert error(cached) <= 2 * error(whole) + torch.finfo(torch.float32).eps


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("chunk_size", [3, (3, 7), (64, 1)])
def test_towers_chunked_apart(chunk_size, device):
    """The captions of all images are items of their own there: another length, another size."""
    towers, batch = make(device=device)
    other, _ = make(device=device)
    texts = batch.texts.flatten(0, 1)

    def loss(image: dict[str, Tensor], text: Tensor) -> Tensor:
        return sigmoid_contrastive_loss(
            image["feature"], text, towers.log_scale.exp(), towers.bias, captions_per_image=CAPTIONS
        )

    expected = one_batch(other, batch, sigmoid)
    got = cached_backward(
        [towers.encode_image, lambda chunk: towers.encode_text(chunk[:, None])["feature"][:, 0]],
        [batch.images, texts],
        loss,
        chunk_size=chunk_size,
    )
    torch.testing.assert_close(got, expected.detach(), rtol=1e-12, atol=1e-12)
    assert_same_gradients(towers, other)


def test_an_empty_batch_is_one_empty_chunk():
    towers, batch = make(items=0)
    loss = cached_backward(towers, batch, lambda out: sigmoid(towers, out), chunk_size=4)
    assert loss == 0
    assert all(not g.any() for g in gradients(towers.image).values() if g is not None)


def test_a_leaf_among_the_inputs_gets_its_gradient():
    towers, batch = make()
    images, wanted = (batch.images.clone().requires_grad_() for _ in range(2))
    one_batch(make()[0], batch._replace(images=wanted), clip)
    cached_backward(
        towers, batch._replace(images=images), lambda out: clip(towers, out), chunk_size=4
    )
    torch.testing.assert_close(images.grad, wanted.grad, rtol=1e-12, atol=1e-12)


# ---------------------------------------------------------------------------------------------
# Random numbers
# ---------------------------------------------------------------------------------------------


def chunks_with_a_graph(towers: Towers, batch: Batch, chunk_size: int, loss) -> Tensor:
    """All activations at once: the big batch, with the masks that dropout draws chunk by chunk."""
    outputs = []
    for start in range(0, len(batch.images), chunk_size):
        outputs.append(towers(Batch(*(x[start : start + chunk_size] for x in batch))))
    joined = {
        key: {name: torch.cat([out[key][name] for out in outputs]) for name in outputs[0][key]}
        for key in ("image", "text")
    }
    scalars = outputs[0]["scale_and_bias"]
    value = loss(towers, joined | {"scale_and_bias": scalars, "mask": batch.mask})
    value.backward()
    return value.detach()


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("chunk_size", [4, 16])
def test_dropout_is_replayed(chunk_size, device):
    """The loss draws random numbers too, after the chunks; so does whoever comes next."""
    towers, batch = make(dropout=0.5, device=device)
    other, _ = make(dropout=0.5, device=device)
    torch.manual_seed(8)
    expected = chunks_with_a_graph(other, batch, chunk_size, text_conditioned)
    expected_next = torch.rand(3, device=device), torch.rand(3)
    torch.manual_seed(8)
    got = cached_backward(
        towers, batch, lambda out: text_conditioned(towers, out), chunk_size=chunk_size
    )
    got_next = torch.rand(3, device=device), torch.rand(3)
    torch.testing.assert_close(got, expected, rtol=1e-12, atol=1e-12)
    assert_same_gradients(towers, other)
    for after, expected_after in zip(got_next, expected_next, strict=True):
        assert torch.equal(after, expected_after)


def test_dropout_without_the_replay_is_another_gradient(monkeypatch):
    monkeypatch.setattr(gradient_cache, "_set_random_states", lambda states: None)
    with pytest.raises(AssertionError):
        test_dropout_is_replayed(4, "cpu")


# ---------------------------------------------------------------------------------------------
# What runs how often
# ---------------------------------------------------------------------------------------------


class Counted:
    """An encoder that counts its calls, and those with a graph."""

    def __init__(self, encode: Callable[[Any], Any]):
        self.encode, self.calls, self.with_graph = encode, 0, 0

    def __call__(self, chunk: Any) -> Any:
        self.calls += 1
        self.with_graph += torch.is_grad_enabled()
        return self.encode(chunk)


@pytest.mark.parametrize(("chunk_size", "chunks"), [(4, 3), (10, 1)])
def test_the_last_chunk_keeps_its_graph(chunk_size, chunks):
    towers, batch = make()
    encode = Counted(towers)
    cached_backward(encode, batch, lambda out: clip(towers, out), chunk_size=chunk_size)
    assert (encode.calls, encode.with_graph) == (2 * chunks - 1, chunks)


@pytest.mark.parametrize("frozen", ["image", "text"])
def test_a_frozen_tower_runs_once(frozen):
    towers, batch = make()
    other, _ = make()
    for module in (towers, other):
        getattr(module, frozen).requires_grad_(False)
    image = Counted(lambda chunk: towers.encode_image(chunk)["feature"])
    text = Counted(lambda chunk: towers.encode_text(chunk)["feature"][:, 0])
    seen = []

    def loss(images: Tensor, texts: Tensor) -> Tensor:
        seen.extend([images.requires_grad, texts.requires_grad])
        return clip_contrastive_loss(
            images, texts, towers.log_scale.exp(), towers.bias, label_smoothing=0.1
        )

    cached_backward((image, text), (batch.images, batch.texts), loss, chunk_size=4)
    one_batch(other, batch, clip)
    assert_same_gradients(towers, other)
    assert seen == [frozen != "image", frozen != "text"]  # no gradient work for it in the loss
    once, twice = (image, text) if frozen == "image" else (text, image)
    assert once.calls == 3
    # The last tower's last chunk keeps its graph.
    assert twice.calls == (5 if frozen == "image" else 6)


def test_with_only_a_scalar_to_learn_one_chunk_runs_again():
    towers, batch = make()
    towers.requires_grad_(False)
    towers.log_scale.requires_grad_()
    encode = Counted(towers)
    cached_backward(encode, batch, lambda out: clip(towers, out), chunk_size=4)
    assert encode.calls == 4
    other, _ = make()
    one_batch(other, batch, clip)
    torch.testing.assert_close(towers.log_scale.grad, other.log_scale.grad, rtol=1e-12, atol=0)


def test_outputs_that_the_loss_does_not_use():
    """The text tower has no part in the loss: no gradient, not one of zeros."""
    towers, batch = make()
    cached_backward(towers, batch, lambda out: out["image"]["tokens"].square().sum(), chunk_size=4)
    assert all(g is None for g in gradients(towers.text).values())
    assert all(g is not None for g in gradients(towers.image).values())


# ---------------------------------------------------------------------------------------------
# Memory
# ---------------------------------------------------------------------------------------------


class SavedBytes:
    """What graphs hold for their backward: bytes now and at most, weights left out."""

    def __init__(self, module: nn.Module):
        self.now = self.most = 0
        self.weights = {parameter.untyped_storage().data_ptr() for parameter in module.parameters()}

    def __enter__(self) -> SavedBytes:
        self.hooks = torch.autograd.graph.saved_tensors_hooks(self._pack, lambda saved: saved[0])
        self.hooks.__enter__()
        return self

    def __exit__(self, *error) -> None:
        self.hooks.__exit__(*error)

    def _pack(self, tensor: Tensor) -> Any:
        class Saved(list):
            pass

        saved = Saved([tensor.detach()])  # with its graph, an output would hold itself
        if tensor.untyped_storage().data_ptr() not in self.weights:
            self.now += tensor.nbytes
            self.most = max(self.now, self.most)
            weakref.finalize(saved, self._drop, tensor.nbytes)
        return saved

    def _drop(self, size: int) -> None:
        self.now -= size


def most_saved(towers: Towers, call: Callable[[], Any]) -> int:
    gc.collect()
    with SavedBytes(towers) as saved:
        call()
    gc.collect()
    assert saved.now == 0
    return saved.most


@pytest.mark.parametrize("apart", [False, True])
def test_the_activations_of_one_chunk_are_alive(apart):
    """The loss saves nothing here (an inner product), so only activations count."""
    items, chunk_size = 64, 4
    towers, batch = make(items=items)
    chunk = Batch(*(x[:chunk_size] for x in batch))

    def loss(images: dict[str, Tensor], texts: dict[str, Tensor]) -> Tensor:
        return (images["feature"].sum(0) + texts["feature"].sum((0, 1))).sum()

    def plain(part: Batch) -> None:
        out = towers(part)
        loss(out["image"], out["text"]).backward()

    def cached() -> None:
        if apart:
            encoders = (towers.encode_image, towers.encode_text)
            inputs = (batch.images, batch.texts)
            cached_backward(encoders, inputs, loss, chunk_size=chunk_size)
        else:
            both = lambda out: loss(out["image"], out["text"])  # noqa: E731
            cached_backward(towers, batch, both, chunk_size=chunk_size)

    one_chunk = most_saved(towers, lambda: plain(chunk))
    assert most_saved(towers, lambda: plain(batch)) > 10 * one_chunk
    got = most_saved(towers, cached)
    assert got <= one_chunk
    if apart:  # one tower's chunk at a time
        text_chunk = most_saved(
            towers, lambda: towers.encode_text(chunk.texts)["feature"].sum().backward()
        )
        assert got <= text_chunk < one_chunk


# ---------------------------------------------------------------------------------------------
# Autocast, gradient scaler, compilation, checkpointing
# ---------------------------------------------------------------------------------------------


class Watched(torch.autograd.Function):
    """Passes its input on and notes whether autocast is on in the forward and in the backward."""

    seen: ClassVar[list[tuple[str, bool]]] = []

    @staticmethod
    def forward(ctx, x: Tensor) -> Tensor:
        Watched.seen.append(("forward", torch.is_autocast_enabled(x.device.type)))
        return x.view_as(x)

    @staticmethod
    def backward(ctx, *grads):
        Watched.seen.append(("backward", torch.is_autocast_enabled(grads[0].device.type)))
        return grads[0]


@pytest.mark.parametrize("device", DEVICES)
def test_surrounding_autocast_covers_both_passes_and_the_loss(device):
    """Compared with chunks that keep their graphs, which round as often.

    Each chunk there gets weights of its own (no cache), else bfloat16 would add up the chunks'
    gradients. What is left is the order of float32 sums: 1e-5 of gradients of size 1 or less.
    """
    chunk_size = 4
    towers, batch = make(dtype=torch.float32, device=device)
    other, _ = make(dtype=torch.float32, device=device)
    with torch.autocast(device, torch.bfloat16, cache_enabled=False):
        outputs = []
        for start in range(0, ITEMS, chunk_size):
            outputs.append(other(Batch(*(x[start : start + chunk_size] for x in batch))))
        joined: dict[str, Any] = {
            key: {name: torch.cat([out[key][name] for out in outputs]) for name in outputs[0][key]}
            for key in ("image", "text")
        }
        expected = text_conditioned_all(other, joined)
    expected.backward()

    Watched.seen.clear()
    dtypes = []

    def encode(chunk: Batch) -> dict[str, Any]:
        out = towers(chunk)
        dtypes.append(out["image"]["tokens"].dtype)
        tokens = Watched.apply(out["image"]["tokens"])
        return {"image": {"tokens": tokens}, "text": out["text"]}

    with torch.autocast(device, torch.bfloat16):
        with torch.no_grad():
            towers(batch)  # leaves weights without a graph in an old PyTorch's cache
        loss = cached_backward(
            encode, batch, lambda out: text_conditioned_all(towers, out), chunk_size=chunk_size
        )
        assert torch.is_autocast_enabled(device)
    assert dtypes == [torch.bfloat16] * 5
    assert Watched.seen.count(("forward", True)) == 5
    assert Watched.seen.count(("backward", False)) == 3 and len(Watched.seen) == 8
    torch.testing.assert_close(loss, expected.detach(), rtol=1e-5, atol=1e-5)
    assert all(g is not None for g in gradients(towers.image).values())
    assert_same_gradients(towers, other, 1e-5)


def text_conditioned_all(towers: Towers, out: dict[str, Any]) -> Tensor:
    texts = out["text"]["feature"].flatten(0, 1)
    return text_conditioned_sigmoid_loss(
        towers.pool, out["image"]["tokens"], texts, 3.0, -1.0, captions_per_image=CAPTIONS
    )


@pytest.mark.parametrize("device", DEVICES)
def test_the_scaler_scales_gradients_and_not_the_returned_loss(device):
    """By a power of two, which no rounding notices."""
    towers, batch = make(dtype=torch.float32, device=device)
    other, _ = make(dtype=torch.float32, device=device)
    plain = cached_backward(other, batch, lambda out: hierarchical(other, out), chunk_size=4)
    scaler = torch.amp.GradScaler(device, init_scale=1024.0)
    scaled = cached_backward(
        towers, batch, lambda out: hierarchical(towers, out), chunk_size=4, scaler=scaler
    )
    assert isinstance(plain, dict) and isinstance(scaled, dict)
    assert all(torch.equal(scaled[name], part) for name, part in plain.items())
    optimizer = torch.optim.SGD(towers.parameters(), lr=1.0)
    for parameter in other.parameters():
        assert parameter.grad is not None
        parameter.grad *= 1024
    assert_same_gradients(towers, other, 0)
    before = towers.log_scale.detach().clone()
    scaler.step(optimizer)
    scaler.update()
    assert other.log_scale.grad is not None
    # Two more roundings, of the step itself.
    torch.testing.assert_close(before - towers.log_scale, other.log_scale.grad / 1024)


def test_compiled_encoder():
    towers, batch = make(dropout=0.5)
    other, _ = make(dropout=0.5)
    torch.manual_seed(9)
    expected = chunks_with_a_graph(other, batch, 5, clip)
    torch.manual_seed(9)
    compiled = torch.compile(towers, backend="aot_eager")
    got = cached_backward(compiled, batch, lambda out: clip(towers, out), chunk_size=5)
    torch.testing.assert_close(got, expected, rtol=1e-12, atol=1e-12)
    assert_same_gradients(towers, other)


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_activation_checkpointing(use_reentrant):
    from torch.utils.checkpoint import checkpoint

    towers, batch = make(dropout=0.5)
    other, _ = make(dropout=0.5)
    image = towers.image
    torch.manual_seed(10)
    expected = chunks_with_a_graph(other, batch, 4, clip)

    def encode(chunk: Batch) -> Any:
        images = chunk.images.clone().requires_grad_()  # reentrant checkpoints ask for it
        tokens = checkpoint(image, images, use_reentrant=use_reentrant)
        assert isinstance(tokens, Tensor)
        return towers(chunk._replace(images=tokens))

    towers.image = nn.Identity()
    torch.manual_seed(10)
    got = cached_backward(encode, batch, lambda out: clip(towers, out), chunk_size=4)
    towers.image = image
    torch.testing.assert_close(got, expected, rtol=1e-12, atol=1e-12)
    assert_same_gradients(towers, other)


# ---------------------------------------------------------------------------------------------
# DistributedDataParallel
# ---------------------------------------------------------------------------------------------


@pytest.fixture
def one_process(tmp_path) -> Iterator[None]:
    if not (dist.is_available() and dist.is_gloo_available()):
        pytest.skip("this torch has no gloo")
    try:
        rendezvous = f"file://{tmp_path / 'rendezvous'}"
        dist.init_process_group("gloo", init_method=rendezvous, rank=0, world_size=1)
    except RuntimeError as error:  # no usable network interface, for instance
        pytest.skip(f"gloo can not start here: {error}")
    yield
    dist.destroy_process_group()


def exchange_that_doubles(_, bucket):  # DDP reads annotations, and would not take strings
    """In the all-reduce's place: a gradient that was exchanged once is twice its size."""
    future = torch.futures.Future()
    future.set_result(bucket.buffer() * 2)
    return future


def doubling(module: nn.Module) -> DistributedDataParallel:
    ddp = DistributedDataParallel(module)
    ddp.register_comm_hook(None, exchange_that_doubles)
    return ddp


def double_gradients(module: nn.Module) -> None:
    for parameter in module.parameters():
        assert parameter.grad is not None
        parameter.grad *= 2


@pytest.mark.parametrize("known", ["as encode", "as module", "beside its own module"])
@pytest.mark.parametrize("chunk_size", [4, 16])
def test_ddp_exchanges_every_gradient_once(one_process, chunk_size, known):
    """Also the scale's, which is an output, and the pool's, which only the loss uses."""
    towers, batch = make()
    ddp = doubling(towers)
    encode, module = {
        "as encode": (ddp, None),
        "as module": (lambda chunk: ddp(chunk), ddp),
        "beside its own module": (ddp, towers),
    }[known]
    for _ in range(3):  # the second step rebuilds DDP's buckets, and complains of an unfinished one
        other, _ = make()
        one_batch(other, batch, hierarchical)
        double_gradients(other)
        ddp.zero_grad()
        cached_backward(
            encode,
            batch,
            lambda out: hierarchical(towers, out),
            chunk_size=chunk_size,
            module=module,
        )
        assert_same_gradients(towers, other)
    assert ddp.require_backward_grad_sync


class Tower(nn.Module):
    """One of the towers by itself, with the pool beside it where it is the image's."""

    def __init__(self, towers: Towers, name: str):
        super().__init__()
        self.encoder = getattr(towers, name)
        if name == "image":
            self.pool = towers.pool

    def forward(self, chunk: Tensor) -> Tensor:
        tokens = self.encoder(chunk)
        return tokens if tokens.ndim == 3 else F.normalize(tokens.mean(2), dim=-1)


def all_captions(towers: Towers, out: dict[str, Any]) -> Tensor:
    tokens, texts = out["image"]["tokens"], out["text"]["feature"].flatten(0, 1)
    return text_conditioned_sigmoid_loss(
        towers.pool, tokens, texts, 3.0, -1.0, captions_per_image=CAPTIONS
    )


@pytest.mark.parametrize("frozen", [False, True])
def test_ddp_towers_apart(one_process, frozen):
    """A frozen encoder whose DDP module holds the loss's pool must still exchange the pool's."""
    towers, batch = make()
    towers.image.requires_grad_(not frozen)
    image, text = (doubling(Tower(towers, name)) for name in ("image", "text"))
    for _ in range(3):
        other, _ = make()
        other.image.requires_grad_(not frozen)
        one_batch(other, batch, all_captions)
        for module in (other.image, other.text, other.pool):
            if not (frozen and module is other.image):
                double_gradients(module)
        towers.zero_grad()
        cached_backward(
            (image, text),
            (batch.images, batch.texts),
            lambda a, b: all_captions(towers, {"image": {"tokens": a}, "text": {"feature": b}}),
            chunk_size=4,
        )
        assert_same_gradients(towers, other)


def test_one_ddp_module_in_two_towers_is_refused(one_process):
    towers, batch = make()
    ddp = DistributedDataParallel(towers)
    with pytest.raises(ValueError, match="need a DistributedDataParallel module each"):
        cached_backward(
            (lambda x: ddp(x), lambda x: ddp(x)), (batch, batch), clip,
            chunk_size=2, module=(ddp, ddp),
        )  # fmt: skip


# ---------------------------------------------------------------------------------------------
# Misuse
# ---------------------------------------------------------------------------------------------


class WithBatchNorm(nn.Module):
    def __init__(self, **options: Any):
        super().__init__()
        self.linear = nn.Linear(4, 4)
        self.norm = nn.BatchNorm1d(4, **options)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(self.linear(x))


def test_batch_norm_is_refused_in_training_mode():
    module, x = WithBatchNorm(), torch.randn(6, 4)
    with pytest.raises(ValueError, match="module's norm is batch norm in training mode"):
        cached_backward(module, x, torch.sum, chunk_size=2)
    with pytest.raises(ValueError, match="module's norm is batch norm in training mode"):
        cached_backward(lambda chunk: module(chunk), x, torch.sum, chunk_size=2, module=module)
    assert module.norm.num_batches_tracked == 0
    module.norm.eval()
    cached_backward(module, x, torch.sum, chunk_size=2)
    assert module.linear.weight.grad is not None
    # Without running statistics it takes the batch's own in eval mode too.
    with pytest.raises(ValueError, match="batch norm"):
        cached_backward(WithBatchNorm(track_running_stats=False).eval(), x, torch.sum, chunk_size=2)


LINEAR = nn.Linear(4, 2)
X = torch.ones(5, 4)


def call(encode: Any = LINEAR, inputs: Any = X, loss: Any = torch.sum, **options: Any) -> None:
    cached_backward(encode, inputs, loss, **({"chunk_size": 2} | options))


@pytest.mark.parametrize(
    ("wrong", "error", "message"),
    [
        ({"chunk_size": 0}, ValueError, "chunk_size must be at least 1; got 0"),
        ({"chunk_size": -2}, ValueError, "chunk_size must be at least 1"),
        ({"chunk_size": 2.0}, TypeError, "chunk_size must be an int; got 2.0"),
        ({"chunk_size": (2, 2)}, TypeError, "chunk_size must be an int"),
        ({"chunk_size": True}, TypeError, "chunk_size must be an int"),
        ({"encode": "model"}, TypeError, "encode must be callable, not str"),
        ({"module": "model"}, TypeError, "module must be the nn.Module that encode runs"),
        # inputs
        (
            {"inputs": {"image": X, "text": X[:3]}},
            ValueError,
            r"inputs must have the same first dimension.*inputs\['image'\] \(5, 4\), "
            r"inputs\['text'\] \(3, 4\).*Fix: K captions",
        ),
        ({"inputs": (X, ["a dog"])}, TypeError, r"inputs\[1\]\[0\] must be a tensor, not str.*Fix"),
        ({"inputs": (X, torch.tensor(1.0))}, ValueError, r"inputs\[1\] is 0-dim.*Fix"),
        ({"inputs": (None, [])}, ValueError, "inputs must hold a tensor"),
        ({"inputs": LINEAR(X)}, RuntimeError, "inputs is part of a graph.*Fix"),
        # outputs
        (
            {"encode": lambda x: {"image": LINEAR(x)[:1]}},
            ValueError,
            r"encode\(...\)\['image'\] \(1, 2\) must have the chunk's 2 items as its first "
            "dimension, or be 0-dim. Fix",
        ),
        (
            {"encode": lambda x: LINEAR(x).flatten()},
            ValueError,
            r"encode\(...\) \(4,\) must have the chunk's 2 items",
        ),
        (
            {"encode": lambda x: (LINEAR(x), 3)},
            TypeError,
            r"encode\(...\)\[1\] must be a tensor, not int. Fix",
        ),
        (
            {"encode": lambda x: LINEAR(x)[..., : len(x)]},
            ValueError,
            r"encode\(...\) is torch.float32 \(1, 1\) for items 4 to 4.*\(5, 2\). Fix: pad",
        ),
        (
            {"encode": lambda x: LINEAR(x) if len(x) == 2 else LINEAR(x)[0, 0]},
            ValueError,
            r"encode\(...\) is torch.float32 \(\) for items 4 to 4",
        ),
        (
            {"encode": lambda x: LINEAR(x) if len(x) == 2 else LINEAR(x).double()},
            ValueError,
            r"encode\(...\) is torch.float64 \(1, 2\) for items 4 to 4",
        ),
        (
            {"encode": lambda x: LINEAR(x) if len(x) == 2 else None},
            ValueError,
            r"encode\(...\) is None for some chunks",
        ),
        (
            {"encode": lambda x: LINEAR(x) if len(x) == 2 else (LINEAR(x),)},
            ValueError,
            "encode must return the same structure for every chunk.*items 4 to 4",
        ),
        (
            {"encode": lambda x: (LINEAR(x), LINEAR(x).sum())},
            ValueError,
            r"encode\(...\)\[1\] is 0-dim and must be the same in every chunk.*Fix",
        ),
        # loss
        ({"loss": lambda out: out}, TypeError, r"loss must return a 0-dim tensor.*shape \(5, 2\)"),
        ({"loss": lambda out: {"a": 1.0}}, TypeError, r"loss\(...\)\['a'\] is float"),
        ({"loss": lambda out: {}}, ValueError, "loss returned an empty dict"),
        ({"loss": lambda out: out.detach().sum()}, RuntimeError, "requires a gradient. Fix"),
        (
            {"encode": torch.no_grad()(lambda x: LINEAR(x))},
            RuntimeError,
            "requires a gradient. Fix",
        ),
        # towers
        (
            {"encode": (LINEAR, LINEAR), "inputs": X},
            ValueError,
            "inputs must be a tuple with one entry for each function in encode; got 2 functions",
        ),
        ({"encode": (LINEAR, LINEAR), "inputs": (X,)}, ValueError, "2 functions, inputs 1"),
        ({"encode": (), "inputs": ()}, ValueError, "inputs must be a tuple with one entry"),
        (
            {"encode": (LINEAR, LINEAR), "inputs": (X, X), "chunk_size": (2, 2, 2)},
            ValueError,
            "chunk_size must have one entry for each of the 2 functions in encode; got 3",
        ),
        (
            {"encode": (LINEAR, LINEAR), "inputs": (X, X), "module": LINEAR},
            ValueError,
            "module must be a tuple with one module or None for each of the 2",
        ),
        (
            {"encode": (LINEAR, lambda x: 1), "inputs": (X, X)},
            TypeError,
            r"encode\[1\]\(...\) must be a tensor, not int",
        ),
        (
            {"encode": (LINEAR, LINEAR), "inputs": (X, (X, X[:2]))},
            ValueError,
            r"inputs\[1\] must have the same first dimension",
        ),
    ],
)
def test_errors_name_the_argument_and_the_fix(wrong, error, message):
    LINEAR.zero_grad()
    with pytest.raises(error, match=message):
        call(**wrong)
    assert all(g is None for g in gradients(LINEAR).values())


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_no_grad_around_it_is_an_error(mode):
    with mode(), pytest.raises(RuntimeError, match=r"called under torch\.no_grad"):
        call()


class Broken(Exception):
    pass


@pytest.mark.parametrize("at", [0, 1, 2, "loss"])
def test_an_error_before_the_backward_leaves_gradients_alone(at):
    towers, batch = make()
    for parameter in towers.parameters():
        parameter.grad = torch.ones_like(parameter)
    calls = []

    def encode(chunk: Batch) -> Any:
        calls.append(chunk)
        if len(calls) - 1 == at:
            raise Broken
        return towers(chunk)

    def loss(out: dict[str, Any]) -> Tensor:
        if at == "loss":
            raise Broken
        return clip(towers, out)

    with pytest.raises(Broken):
        cached_backward(encode, batch, loss, chunk_size=4)
    assert all(
        torch.equal(g, torch.ones_like(g)) for g in gradients(towers).values() if g is not None
    )


def test_an_error_in_the_second_pass_restores_all_but_the_gradients(one_process):
    towers, batch = make(dropout=0.5)
    ddp = doubling(towers)
    calls = []

    def encode(chunk: Batch) -> Any:
        calls.append(chunk)
        if len(calls) == 5:  # three chunks, then the second and the first once more
            raise Broken
        return ddp(chunk)

    ends: list[Tensor] = []

    def loss(out: dict[str, Any]) -> Tensor:
        value = hierarchical(towers, out)
        ends.append(torch.get_rng_state())
        return sum(value.values())

    with pytest.raises(Broken):
        cached_backward(encode, batch, loss, chunk_size=4, module=ddp)
    assert torch.equal(torch.get_rng_state(), ends[0])
    assert ddp.require_backward_grad_sync
    assert not any(parameter._backward_hooks for parameter in towers.parameters())
    # After zero_grad the next step is right: nothing is left of the broken one.
    towers.eval(), ddp.zero_grad()
    other, _ = make()
    one_batch(other, batch, hierarchical)
    double_gradients(other)
    cached_backward(ddp, batch, lambda out: hierarchical(towers, out), chunk_size=4)
    assert_same_gradients(towers, other)
