"""The modules: names, parts that add up to the loss, and what each is made of."""

from __future__ import annotations

import inspect

import pytest
import torch
import torch._dynamo.testing
import torch.distributed as dist
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from fastgoal_kernels import (
    PoolWeights,
    modules,
    reference,
    text_conditioned_loss_from_weights,
    text_conditioned_topk,
)
from fastgoal_kernels.functional.maxsim import maxsim_contrastive_loss
from fastgoal_kernels.functional.text_conditioned import text_conditioned_sigmoid_loss
from fastgoal_kernels.modules import (
    FastGoalLoss,
    HierarchicalAlignmentLoss,
    MaxSimLoss,
    TextConditionedPool,
    TextConditionedSigmoidLoss,
    TokenSimilarityLoss,
)

DEVICES = ["cpu"] + (["cuda"] if torch.cuda.is_available() else [])

# Float64 sums of at most a thousand terms of size one, in another order.
EXACT = {"rtol": 1e-11, "atol": 1e-11}


def randn(*shape: int, device: str = "cpu", grad: bool = True) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64).to(device).requires_grad_(grad)


def assert_same_with_gradients(one: Tensor, other: Tensor, inputs: list[Tensor]) -> None:
    torch.testing.assert_close(one, other, **EXACT)
    gradients = (torch.autograd.grad(loss, inputs, materialize_grads=True) for loss in (one, other))
    for a, b in zip(*gradients, strict=True):
        torch.testing.assert_close(a, b, **EXACT)


# ---------------------------------------------------------------------------------------------
# TextConditionedPool
# ---------------------------------------------------------------------------------------------


class PublishedBlock(nn.Module):
    """The pooling block of the published code, restated: what a checkpoint or a trainer holds."""

    def __init__(self, dim: int, heads: int):
        super().__init__()
        self.attn = nn.MultiheadAttention(dim, heads, batch_first=True, add_zero_attn=True)
        self.ln_q, self.ln_k, self.ln_v = (nn.LayerNorm(dim) for _ in range(3))

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return self.attn(self.ln_q(q), self.ln_k(k), self.ln_v(v), need_weights=False)[0]


def test_pool_has_the_published_names_and_shapes():
    shapes = {name: tuple(x.shape) for name, x in TextConditionedPool(8, 2).state_dict().items()}
    assert shapes == {
        "attn.in_proj_weight": (24, 8), "attn.in_proj_bias": (24,),
        "attn.out_proj.weight": (8, 8), "attn.out_proj.bias": (8,),
        "ln_q.weight": (8,), "ln_q.bias": (8,), "ln_k.weight": (8,), "ln_k.bias": (8,),
        "ln_v.weight": (8,), "ln_v.bias": (8,),
    }  # fmt: skip


def test_pool_starts_as_the_published_block_starts():
    torch.manual_seed(0)
    published = PublishedBlock(8, 2)
    torch.manual_seed(0)
    pool = TextConditionedPool(8, 2)
    for name, tensor in published.state_dict().items():
        assert torch.equal(pool.state_dict()[name], tensor), name


@pytest.mark.parametrize("device", DEVICES)
def test_pool_is_a_drop_in_for_the_published_block(device):
    published = PublishedBlock(8, 2).to(device).double()
    pool = TextConditionedPool(8, 2).to(device).double()
    pool.load_state_dict(published.state_dict(), strict=True)
    query, tokens = randn(3, 4, 8, device=device), randn(3, 5, 8, device=device)
    torch.testing.assert_close(pool(query, tokens, tokens), published(query, tokens, tokens))
    # The same pooling, in the blocks of the operators: caption q of image i is text i * 4 + q.
    index = torch.arange(12, device=device).view(3, 4)
    scores = pool.scores(tokens, query.flatten(0, 1), text_index=index)
    expected = torch.cosine_similarity(published(query, tokens, tokens), query, dim=-1)
    torch.testing.assert_close(scores, expected, **EXACT)
    # A trainer that still holds the published block can pass it to the loss as it is.
    arguments = tokens, query.flatten(0, 1), 3.0, -1.0
    losses = [
        text_conditioned_sigmoid_loss(x, *arguments, captions_per_image=4)
        for x in (pool, published)
    ]
    assert torch.equal(*losses)


def test_pool_without_the_zero_key():
    pool = TextConditionedPool(8, 2, add_zero_attn=False).double()
    tokens, text = randn(3, 5, 8), randn(4, 8)
    pooled = torch.stack([pool(text[None], one[None], one[None])[0] for one in tokens])
    expected = torch.cosine_similarity(pooled, text, dim=-1)
    torch.testing.assert_close(pool.scores(tokens, text), expected, **EXACT)


def test_pool_rejects_heads_that_do_not_divide():
    with pytest.raises(ValueError, match="3 heads for 8"):
        TextConditionedPool(8, 3)


@pytest.fixture
def one_process():
    """A process group of this process alone, on a port that the system picks."""
    store = dist.TCPStore("localhost", 0, 1, is_master=True)
    backend = "nccl" if torch.cuda.is_available() else "gloo"
    dist.init_process_group(backend, store=store, rank=0, world_size=1)
    yield "cuda" if backend == "nccl" else "cpu"
    dist.destroy_process_group()


class Step(nn.Module):
    """A training step whose pool is part of the module that FSDP2 shards."""

    def __init__(self) -> None:
        super().__init__()
        self.pool = TextConditionedPool(8, 2)

    def forward(self, tokens: Tensor, text: Tensor) -> Tensor:
        return text_conditioned_sigmoid_loss(
            self.pool, tokens, text, 3.0, -1.0, captions_per_image=2
        )


@pytest.mark.skipif(
    not torch.cuda.is_available() and not hasattr(torch.cpu.Stream, "record_event"),
    reason="this torch has FSDP2 on CUDA only",
)
@pytest.mark.parametrize("where", ["root", "scores", "loss", "pool and root"])
def test_sharded_weights_train(one_process, where):
    """FSDP2: as part of a sharded module, or sharded itself with its methods among its forwards."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard, register_fsdp_forward_method

    device = one_process
    mesh = init_device_mesh(device, (1,))
    whole, sharded = Step().to(device), Step().to(device)
    sharded.load_state_dict(whole.state_dict())
    tokens, text = torch.randn(3, 5, 8, device=device), torch.randn(6, 8, device=device)
    if where == "root":
        fully_shard(sharded, mesh=mesh)
        losses = [step(tokens, text) for step in (whole, sharded)]
    else:
        fully_shard(sharded.pool, mesh=mesh)
        if where == "pool and root":  # as an automatic wrapping does it
            fully_shard(sharded, mesh=mesh)
        register_fsdp_forward_method(sharded.pool, "sigmoid_loss")
        register_fsdp_forward_method(sharded.pool, "scores")
        if where == "scores":
            losses = [step.pool.scores(tokens, text).sum() for step in (whole, sharded)]
        else:
            losses = [step(tokens, text) for step in (whole, sharded)]
    torch.testing.assert_close(*losses)
    for loss in losses:
        loss.backward()
    for (name, a), b in zip(whole.named_parameters(), sharded.parameters(), strict=True):
        assert a.grad is not None and b.grad is not None, name
        torch.testing.assert_close(a.grad, b.grad.full_tensor(), msg=name)  # type: ignore[attr-defined]


def test_adapted_weights_of_a_subclass_are_those_that_score_and_train():
    """`weights` is where a subclass changes them; or they are given as they are, with no module."""

    class Doubled(TextConditionedPool):
        def weights(self) -> PoolWeights:
            weights = super().weights()
            return weights._replace(out_proj_bias=2 * weights.out_proj_bias)

    torch.manual_seed(4)
    pool, by_hand = Doubled(6, 2).double(), TextConditionedPool(6, 2).double()
    nn.init.normal_(pool.attn.out_proj.bias)
    by_hand.load_state_dict(pool.state_dict())
    with torch.no_grad():
        by_hand.attn.out_proj.bias.mul_(2)
    tokens, text = randn(3, 4, 6), randn(6, 6)
    assert torch.equal(pool.scores(tokens, text), by_hand.scores(tokens, text))
    ours, wanted = (
        text_conditioned_sigmoid_loss(x, tokens, text, 3.0, -1.0, captions_per_image=2)
        for x in (pool, by_hand)
    )
    assert torch.equal(ours, wanted)
    given = text_conditioned_loss_from_weights(
        tokens, text, pool.weights(), 2, 3.0, -1.0, captions_per_image=2
    )
    assert torch.equal(given, wanted)
    best = (text_conditioned_topk(x, tokens, text, 2) for x in (pool, by_hand))
    for ours, wanted in zip(*map(tree_leaves, best), strict=True):
        assert torch.equal(ours, wanted)


# ---------------------------------------------------------------------------------------------
# Losses
# ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("objective", ["softmax", "sigmoid"])
def test_maxsim_loss_passes_everything_on(objective):
    torch.manual_seed(0)
    captions = 1 if objective == "softmax" else 2
    loss = MaxSimLoss(objective, "text_to_image", captions, normalize=True, recompute=True)
    images, texts = randn(3, 4, 6), randn(3 * captions, 5, 6)
    keywords = {
        "image_mask": torch.rand(3, 4) < 0.7, "text_mask": torch.rand(3 * captions, 5) < 0.7,
        "pair_mask": torch.rand(3, 3 * captions) < 0.7,
    }  # fmt: skip
    expected = maxsim_contrastive_loss(
        images, texts, 4.0, -1.0, **keywords, objective=objective, direction="text_to_image",
        captions_per_image=captions, normalize=True, backend="reference",
    )  # fmt: skip
    assert_same_with_gradients(
        loss(images, texts, 4.0, -1.0, **keywords), expected, [images, texts]
    )
    parts = loss(images, texts, 4.0, -1.0, **keywords, output_dict=True)
    assert list(parts) == ["maxsim_loss"]
    assert parts["maxsim_loss"].item() == pytest.approx(expected.item())


def test_maxsim_loss_takes_ragged_captions():
    images, texts = randn(3, 4, 6), randn(7, 6)
    offsets = torch.tensor([0, 2, 6, 7])
    got = MaxSimLoss()(images, texts, 4.0, text_offsets=offsets, max_text_tokens=4)
    expected = reference.maxsim_contrastive_loss(images, texts, 4.0, text_offsets=offsets)
    assert_same_with_gradients(got, expected, [images, texts])


@pytest.mark.parametrize("negatives", ["all", "sample"])
def test_text_conditioned_loss_passes_everything_on(negatives):
    pool = TextConditionedPool(6, 2).double()
    tokens, text = randn(3, 4, 6), randn(6, 6)
    keywords: dict = {"image_mask": torch.rand(3, 4) < 0.7, "negative_only": True}
    if negatives == "sample":
        keywords["negative_offsets"] = torch.tensor([[0, 1], [1, 0], [1, 1]])
    got = TextConditionedSigmoidLoss(2, negatives)(pool, tokens, text, 4.0, -1.0, **keywords)
    expected = reference.text_conditioned_sigmoid_loss(
        tokens, text, pool.weights(), 2, 4.0, -1.0, captions_per_image=2, **keywords
    )
    assert_same_with_gradients(got, expected, [tokens, text, *pool.parameters()])


def test_token_similarity_module():
    pooled, local = randn(3, 4), randn(3, 4)
    for mode in ("diagonal", "matrix"):
        got = TokenSimilarityLoss(mode)(pooled, local)
        expected = reference.token_similarity_loss(pooled, local, mode=mode)
        assert_same_with_gradients(got, expected, [pooled, local])
    parts = TokenSimilarityLoss()(pooled, local, output_dict=True)
    assert list(parts) == ["token_similarity_loss"]


def unit(x: Tensor) -> Tensor:
    return x / x.norm(dim=-1, keepdim=True)


@pytest.mark.parametrize("device", DEVICES)
def test_fast_goal_loss_is_the_published_sum(device):
    """Restated with cross_entropy and cosine_similarity, and no function of this library."""
    torch.manual_seed(1)
    features = [randn(5, 8, device=device) for _ in range(6)]
    scale = torch.tensor(9.0, dtype=torch.float64, device=device, requires_grad=True)

    def arguments() -> list[Tensor]:
        return [*(unit(x) for x in features[:4]), *features[4:]]

    def clip(a: Tensor, b: Tensor) -> Tensor:
        target = torch.arange(len(a), device=a.device)
        logits = scale * a @ b.T
        cross_entropy = nn.functional.cross_entropy
        return (cross_entropy(logits, target) + cross_entropy(logits.T, target)) / 2

    def tsl(a: Tensor, b: Tensor) -> Tensor:
        return (torch.cosine_similarity(a, b) - 1).square().mean()

    def published() -> list[Tensor]:
        image, text, local_image, local_text, region, span = arguments()
        tsl_terms = tsl(region, local_image), tsl(span, local_text)
        return [clip(image, text), clip(local_image, local_text), *tsl_terms]

    whole, local, region_tsl, span_tsl = published()
    expected = 1.0 * whole + 0.5 * local + (region_tsl + span_tsl)
    loss = FastGoalLoss()(*arguments(), scale)
    assert_same_with_gradients(loss, expected, [*features, scale])
    parts = FastGoalLoss(2.0, 3.0, 5.0)(*arguments(), scale, output_dict=True)
    assert list(parts) == ["global_loss", "local_loss", "region_tsl_loss", "span_tsl_loss"]
    for part, weight, term in zip(parts.values(), (2, 3, 5, 5), published(), strict=True):
        torch.testing.assert_close(part, weight * term, **EXACT)


def hierarchical_arguments(batch: int, captions: int = 3, device: str = "cpu") -> list[Tensor]:
    shapes = [(batch, 5, 6), (batch, 6), (batch * captions, 6), (batch, 6), (batch, 6)]
    scalars = [torch.tensor(x, dtype=torch.float64, device=device, requires_grad=True)
               for x in (14.0, -10.0, 7.0, -3.0)]  # fmt: skip
    return [*(randn(*s, device=device) for s in shapes), *scalars]


@pytest.mark.parametrize("device", DEVICES)
def test_hierarchical_alignment_loss_is_its_three_terms(device):
    torch.manual_seed(2)
    pool = TextConditionedPool(6, 2).to(device).double()
    arguments = hierarchical_arguments(4, device=device)
    tokens, fine, part, whole_image, whole_text, scale, bias, whole_scale, whole_bias = arguments

    def sigmoid(a: Tensor, b: Tensor, scale: Tensor, bias: Tensor, captions: int) -> Tensor:
        sign = -torch.ones(len(a), len(b), dtype=a.dtype, device=a.device)
        for i in range(len(a)):
            sign[i, i * captions : (i + 1) * captions] = 1
        logits = scale * unit(a) @ unit(b).T + bias
        return -nn.functional.logsigmoid(sign * logits).sum() / len(b)

    expected = {
        "text_conditioned_loss": reference.text_conditioned_sigmoid_loss(
            tokens, part, pool.weights(), 2, scale, bias, captions_per_image=3
        ),
        "fine_loss": sigmoid(fine, part, scale, bias, 3),
        "whole_loss": sigmoid(whole_image, whole_text, whole_scale, whole_bias, 1),
    }
    loss = HierarchicalAlignmentLoss(3)
    parts = loss(pool, *arguments, output_dict=True)
    assert list(parts) == list(expected)
    for name, part_loss in parts.items():
        torch.testing.assert_close(part_loss, expected[name], **EXACT)
    assert_same_with_gradients(
        loss(pool, *arguments), sum(expected.values()), [*arguments, *pool.parameters()]
    )


def test_hierarchical_alignment_loss_samples_when_asked():
    pool = TextConditionedPool(6, 2).double()
    tokens, _, part, *_, scale, bias, _, _ = arguments = hierarchical_arguments(4)
    torch.manual_seed(3)
    got = HierarchicalAlignmentLoss(3, "sample")(pool, *arguments, output_dict=True)
    torch.manual_seed(3)
    expected = text_conditioned_sigmoid_loss(
        pool, tokens, part, scale, bias, captions_per_image=3, negatives="sample"
    )
    assert torch.equal(got["text_conditioned_loss"], expected)


def test_hierarchical_alignment_loss_hands_on_what_is_the_pools():
    pool = TextConditionedPool(6, 2).double()
    tokens, _, part, *_, scale, bias, _, _ = arguments = hierarchical_arguments(4)
    mask = torch.tensor([[1, 1, 0, 1, 0]] * 4) > 0
    offsets = torch.randint(3, (4, 3), generator=torch.Generator().manual_seed(5))
    expected = reference.text_conditioned_sigmoid_loss(
        tokens, part, pool.weights(), 2, scale, bias, captions_per_image=3, image_mask=mask,
        negative_offsets=offsets,
    )  # fmt: skip
    loss = HierarchicalAlignmentLoss(3, "sample")
    for given in (
        {"negative_offsets": offsets}, {"generator": torch.Generator().manual_seed(5)}
    ):  # fmt: skip
        parts = loss(pool, *arguments, output_dict=True, image_mask=mask, **given)
        torch.testing.assert_close(parts["text_conditioned_loss"], expected, **EXACT)


@pytest.mark.parametrize("device", DEVICES)
def test_losses_compile_whole_and_once(device):
    pool = TextConditionedPool(6, 2).to(device).double()
    hierarchical = HierarchicalAlignmentLoss(3)

    def step(*arguments: Tensor) -> Tensor:
        return hierarchical(pool, *arguments)

    torch._dynamo.reset()
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(step, backend=counter, fullgraph=True)
    counts = []
    for batch in (3, 4, 6):  # the second makes the sizes dynamic, the third may change nothing
        arguments = hierarchical_arguments(batch, device=device)
        inputs = [*arguments, *pool.parameters()]
        assert_same_with_gradients(compiled(*arguments), step(*arguments), inputs)
        counts.append(counter.frame_count)
    assert counts[1] == counts[2], counts


@pytest.mark.parametrize("device", DEVICES)
def test_losses_under_autocast_are_float32(device):
    pool = TextConditionedPool(6, 2).to(device)
    arguments = [x.detach().float() for x in hierarchical_arguments(3, device=device)]
    with torch.autocast(device, torch.bfloat16):
        parts = HierarchicalAlignmentLoss(3)(pool, *arguments, output_dict=True)
        parts |= FastGoalLoss()(*[arguments[1]] * 6, 10.0, output_dict=True)
        parts |= MaxSimLoss()(arguments[0], arguments[0], 10.0, output_dict=True)
    assert all(x.dtype == torch.float32 and x.isfinite() for x in parts.values())


def test_bad_construction_is_named():
    with pytest.raises(ValueError, match="captions_per_image"):
        HierarchicalAlignmentLoss(0)
    with pytest.raises(ValueError, match="negatives must be one of"):
        TextConditionedSigmoidLoss(2, "hard")
    with pytest.raises(ValueError, match="mode must be one of"):
        TokenSimilarityLoss("rows")
    with pytest.raises(ValueError, match="objective must be one of"):
        MaxSimLoss("hinge")
    with pytest.raises(ValueError, match="direction must be one of"):
        MaxSimLoss(direction="sideways")
    with pytest.raises(ValueError, match="objective='softmax' has one caption"):
        MaxSimLoss(captions_per_image=2)


def test_every_module_is_documented():
    for name, item in vars(modules).items():
        if inspect.isclass(item) and item.__module__ == modules.__name__:
            assert item.__doc__ and "Args:" in item.__doc__, name
            assert item.forward.__doc__, name
