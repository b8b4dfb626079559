"""The contrastive losses when every process of a group holds a part of the batch.

Each process calls with its own features and gets its own loss, as in open_clip: averaged over the
processes (as DDP averages gradients), losses and gradients are those of the whole batch. All
processes must hold equally many images and equally many texts.

The exchanges are autograd functions whose backward sends gradients the other way; where a tower is
frozen nothing is sent back. A frozen tower must be frozen on every process, or they wait for each
other forever.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import torch.distributed as dist
from torch import Tensor, nn

from .checks import check_choice
from .functional import contrastive, text_conditioned

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup  # absent where torch is built without distributed

EXCHANGES = ("bidir", "shift", "reduce", "gather")


def check_group(caller: str, rank: int, world_size: int, group: ProcessGroup | None = None) -> None:
    """The process group exists and this is its process `rank` of `world_size`.

    Raises:
        RuntimeError: torch.distributed is not initialised.
        ValueError: the group has another size, or this process another rank.
    """
    if not (dist.is_available() and dist.is_initialized()):
        raise RuntimeError(
            f"{caller}: world_size={world_size} needs a process group. "
            "Fix: call torch.distributed.init_process_group first"
        )
    have = dist.get_rank(group), dist.get_world_size(group)
    if have != (rank, world_size):
        raise ValueError(
            f"{caller}: rank={rank}, world_size={world_size}, but the process group says "
            f"rank={have[0]}, world_size={have[1]}"
        )


class _AllGather(torch.autograd.Function):
    """Every process's rows, in rank order; the backward adds up what all of them want of ours."""

    @staticmethod
    def forward(ctx, rows: Tensor, group: ProcessGroup | None) -> Tensor:
        ctx.group, ctx.num_rows = group, len(rows)
        everyone = rows.new_empty(dist.get_world_size(group) * len(rows), *rows.shape[1:])
        dist.all_gather_into_tensor(everyone, rows.contiguous(), group=group)
        return everyone

    @staticmethod
    def backward(ctx, *grads):
        grad = grads[0].contiguous()
        if grad.device.type == "cpu":  # gloo can not reduce_scatter in every torch we support
            grad = grad.clone()  # the engine may hand the same tensor to others
            dist.all_reduce(grad, group=ctx.group)
            first = dist.get_rank(ctx.group) * ctx.num_rows
            return grad[first : first + ctx.num_rows], None
        own = grad.new_empty(ctx.num_rows, *grad.shape[1:])
        dist.reduce_scatter_tensor(own, grad, group=ctx.group)
        return own, None


def gather(rows: Tensor, group: ProcessGroup | None = None, *, with_grad: bool = True) -> Tensor:
    """The (N, ...) rows of every process, (world_size * N, ...), in rank order.

    Args:
        rows: this process's rows; equally many on every process.
        group: the process group; default: all processes.
        with_grad: differentiate through the exchange: a process's rows get the sum of the gradients
            that all processes have for them. Else the result is a constant.
    """
    if with_grad:
        return _AllGather.apply(rows, group)
    with torch.no_grad():
        return _AllGather.apply(rows.detach(), group)


class _Exchange(torch.autograd.Function):
    """Sends each tensor to its first rank and receives one like it from its second."""

    @staticmethod
    def forward(ctx, routes: tuple[tuple[int, int], ...], group: ProcessGroup | None, *tensors):
        ctx.routes, ctx.group = routes, group

        def peer(rank: int) -> int:
            return rank if group is None else dist.get_global_rank(group, rank)

        received = [torch.empty_like(t, memory_format=torch.contiguous_format) for t in tensors]
        operations = []
        for (to, source), tensor, buffer in zip(routes, tensors, received, strict=True):
            operations.append(dist.P2POp(dist.isend, tensor.contiguous(), peer(to), group))
            operations.append(dist.P2POp(dist.irecv, buffer, peer(source), group))
        for request in dist.batch_isend_irecv(operations):
            request.wait()
        return tuple(received)

    @staticmethod
    def backward(ctx, *grads):
        back = tuple((source, to) for to, source in ctx.routes)
        return None, None, *_Exchange.apply(back, ctx.group, *grads)


def clip_contrastive_loss(
    image_features: Tensor,
    text_features: Tensor,
    logit_scale: Tensor | float,
    logit_bias: Tensor | float | None = None,
    *,
    local_loss: bool = False,
    gather_with_grad: bool = False,
    group: ProcessGroup | None = None,
    backend: str | None = None,
) -> Tensor:
    """This process's CLIP loss against the features of the whole group.

    The four modes of open_clip's `ClipLoss`, with the same losses and the same gradients:

    - `local_loss=False`: every process computes the loss of the whole batch.
    - `local_loss=True`: its own rows of both logit matrices only, a world_size-th of the work.
    - `gather_with_grad=True`: gradients flow to the features of every process. With it both kinds
      of loss give, averaged over the processes, the gradient of the single-process loss.
    - `gather_with_grad=False`: other processes' features are constants; own features too where
      `local_loss` takes them from the gathered ones.

    Args:
        image_features: (N, D) of this process, usually of unit length; N the same everywhere.
        text_features: (N, D).
        logit_scale: the multiplier itself.
        logit_bias: added to every logit.
        local_loss: see above.
        gather_with_grad: see above.
        group: the process group; default: all processes.
        backend: as everywhere.

    Returns:
        0-dim float32 (float64 for float64 features), this process's loss.

    Raises:
        ValueError, TypeError: as `fastgoal_kernels.clip_contrastive_loss`.
    """
    contrastive.check_features(image_features, text_features, logit_scale, logit_bias)
    all_images = gather(image_features, group, with_grad=gather_with_grad)
    all_texts = gather(text_features, group, with_grad=gather_with_grad)
    first = dist.get_rank(group) * len(image_features)
    if local_loss:
        images, texts = (
            contrastive.row_cross_entropy(
                own, everyone, logit_scale, logit_bias, first_target=first, backend=backend
            )
            for own, everyone in ((image_features, all_texts), (text_features, all_images))
        )
        return (images + texts) / 2
    if not gather_with_grad:
        last = first + len(image_features)
        all_images = torch.cat([all_images[:first], image_features, all_images[last:]])
        all_texts = torch.cat([all_texts[:first], text_features, all_texts[last:]])
    return contrastive.clip_contrastive_loss(
        all_images, all_texts, logit_scale, logit_bias, backend=backend
    )


def sigmoid_contrastive_loss(
    image_features: Tensor,
    text_features: Tensor,
    logit_scale: Tensor | float,
    logit_bias: Tensor | float,
    *,
    captions_per_image: int = 1,
    average_over: str = "images",
    exchange: str = "bidir",
    group: ProcessGroup | None = None,
    backend: str | None = None,
) -> Tensor:
    """This process's images against every process's texts, with the sigmoid loss.

    Own texts hold the positives; the texts of the other processes are negatives throughout. The
    way they travel changes neither loss nor gradients:

    - "bidir": round a ring in both directions, two blocks of texts at a time;
    - "shift": round a ring in one direction, one block at a time;
    - "gather" (and "reduce", open_clip's name for one broadcast after the other): all at once, in
      one block of world_size - 1 times the texts, with the fewest and largest products.

    Args:
        image_features: (I, D) of this process; I the same everywhere.
        text_features: (J, D) of this process; J the same everywhere.
        logit_scale: the multiplier itself.
        logit_bias: added to every logit.
        captions_per_image: K; own text j belongs to own image floor(j / K).
        average_over: "images" (open_clip) or "texts": this process's count of them divides.
        exchange: one of the names above.
        group: the process group; default: all processes.
        backend: as everywhere.

    Returns:
        0-dim float32 (float64 for float64 features), this process's loss.

    Raises:
        ValueError, TypeError: as `fastgoal_kernels.sigmoid_contrastive_loss`; an unknown exchange.
    """
    check_choice("exchange", exchange, EXCHANGES)

    def block(texts: Tensor, negative_only: bool) -> Tensor:
        return contrastive.sigmoid_contrastive_loss(
            image_features, texts, logit_scale, logit_bias, captions_per_image=captions_per_image,
            negative_only=negative_only, average_over=average_over, backend=backend,
        )  # fmt: skip

    loss = block(text_features, negative_only=False)
    rank, world_size = dist.get_rank(group), dist.get_world_size(group)
    if world_size == 1:
        return loss
    if exchange in ("gather", "reduce"):
        blocks = gather(text_features, group).split(len(text_features))
        others = torch.cat(blocks[:rank] + blocks[rank + 1 :])
        # The block was divided by all of its texts, of which one process's share is meant.
        shares = world_size - 1 if average_over == "texts" else 1
        return loss + shares * block(others, negative_only=True)

    right, left = (rank + 1) % world_size, (rank - 1) % world_size
    to_right, to_left = (right, left), (left, right)
    if exchange == "shift":
        rounds, routes = world_size - 1, (to_right,)
    else:
        rounds, routes = (world_size - 1) // 2, (to_right, to_left)
    travelling = (text_features,) * len(routes)
    for _ in range(rounds):
        travelling = _Exchange.apply(routes, group, *travelling)
        for texts in travelling:
            loss = loss + block(texts, negative_only=True)
    if exchange == "bidir" and world_size % 2 == 0:  # the process opposite on the ring
        (texts,) = _Exchange.apply((to_right,), group, travelling[0])
        loss = loss + block(texts, negative_only=True)
    return loss


def text_conditioned_sigmoid_loss(
    pool: nn.Module,
    image_tokens: Tensor,
    text_features: Tensor,
    logit_scale: Tensor | float,
    logit_bias: Tensor | float,
    *,
    captions_per_image: int,
    negatives: str = "all",
    negative_offsets: Tensor | None = None,
    image_mask: Tensor | None = None,
    generator: torch.Generator | None = None,
    group: ProcessGroup | None = None,
    backend: str | None = None,
) -> Tensor:
    """This process's images against every process's captions, pooled by caption (FLAIR, CAFT).

    Own captions hold the positives; those of the other processes are negatives throughout. With
    negatives="all" the mean of the processes' losses is `fastgoal_kernels`'s
    `text_conditioned_sigmoid_loss` of the whole batch. With "sample" image i meets, of the captions
    of another process, those which that one drew for its own image i, as in the published ring.

    Captions travel all at once: their features are small beside what a block of pairs costs.

    Args:
        pool: the same on every process.
        image_tokens: (N, L, D) of this process; N the same everywhere.
        text_features: (N * K, D) of this process.
        logit_scale: the multiplier itself.
        logit_bias: added to every logit.
        captions_per_image: K.
        negatives: "all" or "sample".
        negative_offsets: (N, N - 1) of this process, for "sample"; default: drawn.
        image_mask: (N, L) bool, True = a real token.
        generator: draws the offsets.
        group: the process group; default: all processes.
        backend: as everywhere.

    Returns:
        0-dim float32 (float64 for float64 features), this process's loss.

    Raises:
        ValueError, TypeError: as `fastgoal_kernels.text_conditioned_sigmoid_loss`.
    """
    if negatives == "sample" and negative_offsets is None:
        negative_offsets = text_conditioned.draw_offsets(
            image_tokens, captions_per_image, generator
        )

    def block(texts: Tensor, offsets: Tensor | None, negative_only: bool) -> Tensor:
        return text_conditioned.text_conditioned_sigmoid_loss(
            pool, image_tokens, texts, logit_scale, logit_bias,
            captions_per_image=captions_per_image, negatives=negatives, negative_offsets=offsets,
            negative_only=negative_only, image_mask=image_mask, backend=backend,
        )  # fmt: skip

    loss = block(text_features, negative_offsets, negative_only=False)
    rank, world_size = dist.get_rank(group), dist.get_world_size(group)
    texts = gather(text_features, group).chunk(world_size)
    offsets: list[Tensor | None] = [None] * world_size
    if negative_offsets is not None:
        offsets = list(gather(negative_offsets, group, with_grad=False).chunk(world_size))
    for other in range(world_size):
        if other != rank:
            loss = loss + block(texts[other], offsets[other], negative_only=True)
    return loss
