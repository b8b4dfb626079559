"""The losses over several processes (gloo, on the CPU) against one process that holds everything.

pytest starts this file once per rank as a script of its own; the ranks compute every case and
write losses and gradients to files, which the tests compare with plain PyTorch.
"""

from __future__ import annotations

import itertools
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F

from fastgoal_kernels import distributed, reference, text_conditioned_sigmoid_loss
from fastgoal_kernels.modules import (
    ClipLoss,
    HierarchicalAlignmentLoss,
    SigLipLoss,
    TextConditionedPool,
)

WORLD = 3  # an odd ring; ranks 0 and 1 also form a group of two, an even one
IMAGES, CAPTIONS, DIM = 5, 2, 4
TIMEOUT = 400  # seconds: most of it is three interpreters importing torch
SCALE, BIAS = 6.0, -1.5

CLIP_CASES = [
    {"local_loss": local_loss, "gather_with_grad": with_grad, "backend": backend}
    for local_loss, with_grad, backend in itertools.product(
        (False, True), (False, True), ("torch", "reference")
    )
]
SIGMOID_CASES = [
    {"exchange": exchange, "captions_per_image": k, "average_over": over}
    for exchange, (k, over) in itertools.product(
        distributed.EXCHANGES, ((1, "images"), (CAPTIONS, "texts"))
    )
]
FROZEN = ("none", "image", "text")
POOLED = ("all", "sample", "masked")
SHARDED = ("text_conditioned_sigmoid_loss", "HierarchicalAlignmentLoss", "over ranks")
CAN_SHARD = hasattr(torch.cpu.Stream, "record_event")  # else this torch has FSDP2 on CUDA only


def features(rank: int, frozen: str, captions: int = 1) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(rank)
    image = torch.randn(IMAGES, DIM, dtype=torch.float64, generator=generator)
    text = torch.randn(IMAGES * captions, DIM, dtype=torch.float64, generator=generator)
    return image.requires_grad_(frozen != "image"), text.requires_grad_(frozen != "text")


def results(loss, image, text, scale, bias) -> list[torch.Tensor | None]:
    loss.backward()
    return [loss.detach(), image.grad, text.grad, scale.grad, bias.grad]


def scalars() -> tuple[torch.Tensor, torch.Tensor]:
    values = torch.tensor([SCALE, BIAS], dtype=torch.float64)
    return values[0].clone().requires_grad_(), values[1].clone().requires_grad_()


def make_pool() -> TextConditionedPool:
    pool = TextConditionedPool(DIM, 2).double()
    generator = torch.Generator().manual_seed(100)
    with torch.no_grad():
        for parameter in pool.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator))
    return pool


def pooled_batch(rank: int, frozen: str = "none") -> tuple[torch.Tensor, torch.Tensor]:
    """Tokens (IMAGES, 3, DIM) and the features of CAPTIONS captions each."""
    generator = torch.Generator().manual_seed(10 + rank)
    tokens = torch.randn(IMAGES, 3, DIM, dtype=torch.float64, generator=generator)
    text = torch.randn(IMAGES * CAPTIONS, DIM, dtype=torch.float64, generator=generator)
    return tokens.requires_grad_(frozen != "image"), text.requires_grad_(frozen != "text")


def pooled_options(rank: int, case: str) -> dict:
    """Keywords of the loss of the whole batch; a rank's share of what differs by rank."""
    generator = torch.Generator().manual_seed(20 + rank)
    options: dict = {"captions_per_image": CAPTIONS}
    if case == "sample":
        offsets = torch.randint(CAPTIONS, (IMAGES, IMAGES - 1), generator=generator)
        options |= {"negatives": "sample", "negative_offsets": offsets}
    if case == "masked":
        options["image_mask"] = torch.rand(IMAGES, 3, generator=generator) < 0.7
    return options


def pool_loss(name: str, pool: TextConditionedPool, group, *batch: torch.Tensor) -> torch.Tensor:
    """A loss that takes a pool, by its name in SHARDED."""
    tokens, text = batch
    if name == "HierarchicalAlignmentLoss":
        whole = tokens[:, 0], tokens[:, 1], SCALE, BIAS, SCALE, BIAS
        return HierarchicalAlignmentLoss(CAPTIONS)(pool, tokens, tokens[:, 2], text, *whole)
    options: dict = {"captions_per_image": CAPTIONS}
    if name == "over ranks":
        return distributed.text_conditioned_sigmoid_loss(
            pool, tokens, text, SCALE, BIAS, group=group, **options
        )
    return text_conditioned_sigmoid_loss(pool, tokens, text, SCALE, BIAS, **options)


# ---------------------------------------------------------------------------------------------
# One rank
# ---------------------------------------------------------------------------------------------


def run_rank(rank: int, folder: Path) -> None:
    try:
        rendezvous = f"file://{folder / 'rendezvous'}"
        dist.init_process_group("gloo", init_method=rendezvous, rank=rank, world_size=WORLD)
    except RuntimeError as error:  # no usable network interface, for instance
        (folder / "unavailable").write_text(str(error))
        return
    pair = dist.new_group([0, 1])
    out = {}
    for size, group in ((WORLD, None), (2, pair)):
        if rank >= size:
            continue
        for frozen in FROZEN:
            for number, case in enumerate(CLIP_CASES):
                inputs = (*features(rank, frozen), *scalars())
                loss = distributed.clip_contrastive_loss(*inputs, **case, group=group)
                out["clip", size, frozen, number] = results(loss, *inputs)
            for number, case in enumerate(SIGMOID_CASES):
                inputs = (*features(rank, frozen, case["captions_per_image"]), *scalars())
                loss = distributed.sigmoid_contrastive_loss(*inputs, **case, group=group)
                out["sigmoid", size, frozen, number] = results(loss, *inputs)
            for case in POOLED:
                pool, inputs = make_pool(), (*pooled_batch(rank, frozen), *scalars())
                loss = distributed.text_conditioned_sigmoid_loss(
                    pool, *inputs, **pooled_options(rank, case), group=group
                )
                found = results(loss, *inputs) + [p.grad for p in pool.parameters()]
                out["pooled", size, frozen, case] = found
        if size == 2 and CAN_SHARD:
            out |= run_sharded(rank, group)
    image, text = features(rank, "none")
    clip = ClipLoss(local_loss=True, gather_with_grad=True, rank=rank, world_size=WORLD)
    siglip = SigLipLoss(rank=rank, world_size=WORLD, dist_impl="shift")
    out["modules"] = [
        clip(image, text, SCALE).detach(),
        siglip(image, text, SCALE, BIAS, output_dict=True)["contrastive_loss"].detach(),
    ]
    try:
        ClipLoss(rank=rank, world_size=WORLD + 1)(image, text, SCALE)
    except ValueError as error:
        out["wrong size"] = str(error)
    torch.save(out, folder / f"{rank}.pt")
    dist.barrier()
    dist.destroy_process_group()


def run_sharded(rank: int, group) -> dict:
    """A pool that FSDP2 shards on its own, before and after its methods are registered."""
    from torch.distributed.device_mesh import DeviceMesh
    from torch.distributed.fsdp import fully_shard, register_fsdp_forward_method

    out: dict = {}
    for name in SHARDED:
        pool, batch = make_pool(), pooled_batch(rank)
        fully_shard(pool, mesh=DeviceMesh.from_group(group, "cpu"))
        try:
            pool_loss(name, pool, group, *batch)
        except ValueError as error:
            out["refused", name] = str(error)
        register_fsdp_forward_method(pool, "sigmoid_loss")
        loss = pool_loss(name, pool, group, *batch)
        loss.backward()
        grads = [x.grad for x in batch] + [p.grad.full_tensor() for p in pool.parameters()]
        out["sharded", name] = [loss.detach(), *grads]
        register_fsdp_forward_method(pool, "scores")
        out["sharded", "scores", name] = pool.scores(*batch).detach()
    return out


# ---------------------------------------------------------------------------------------------
# What it must equal, in one process
# ---------------------------------------------------------------------------------------------


def expected_clip(size: int, frozen: str, local_loss: bool, gather_with_grad: bool):
    """open_clip's four modes written out: what each rank takes for a constant differs."""
    towers = [features(rank, frozen) for rank in range(size)]
    scale_and_bias = [scalars() for _ in range(size)]
    losses = []
    for rank, (image, text) in enumerate(towers):
        scale, bias = scale_and_bias[rank]

        def everyone(side: int, own: int = rank) -> torch.Tensor:
            keeps_own = not local_loss
            return torch.cat([
                pair[side]
                if gather_with_grad or (keeps_own and other == own)
                else pair[side].detach()
                for other, pair in enumerate(towers)
            ])  # fmt: skip

        images, texts = everyone(0), everyone(1)
        targets = torch.arange(len(images))
        if local_loss:
            targets = targets[rank * IMAGES : (rank + 1) * IMAGES]
            rows, columns = image @ texts.T, text @ images.T
        else:
            rows, columns = images @ texts.T, texts @ images.T
        rows = F.cross_entropy(scale * rows + bias, targets)
        losses.append((rows + F.cross_entropy(scale * columns + bias, targets)) / 2)
    sum(losses).backward()  # every rank's backward, with the gradients it sends to the others
    return towers, scale_and_bias, losses


def expected_sigmoid(size: int, frozen: str, captions: int, average_over: str):
    towers = [features(rank, frozen, captions) for rank in range(size)]
    scale_and_bias = [scalars() for _ in range(size)]
    losses = []
    for rank, (image, text) in enumerate(towers):
        scale, bias = scale_and_bias[rank]
        logits = scale * image @ torch.cat([text for _, text in towers]).T + bias
        owner = torch.arange(logits.shape[1]) // captions - rank * IMAGES
        sign = torch.where(torch.arange(IMAGES)[:, None] == owner, 1.0, -1.0)
        count = len(image) if average_over == "images" else len(text)
        losses.append(-F.logsigmoid(sign * logits).sum() / count)
    sum(losses).backward()
    return towers, scale_and_bias, losses


def start_ranks(folder: Path) -> None:
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path), "OMP_NUM_THREADS": "1"}
    if sys.platform == "linux":  # else gloo looks up the host's name, which need not resolve
        environment["GLOO_SOCKET_IFNAME"] = "lo"
    processes = [
        subprocess.Popen(
            [sys.executable, __file__, str(rank), str(folder)],
            env=environment, stderr=subprocess.PIPE, text=True,
        )
        for rank in range(WORLD)
    ]  # fmt: skip
    try:
        errors = [process.communicate(timeout=TIMEOUT)[1] for process in processes]
        if any(process.returncode for process in processes):
            (folder / "failed").write_text("\n".join(errors))
    except subprocess.TimeoutExpired:
        (folder / "failed").write_text(f"the ranks took more than {TIMEOUT} s")
    finally:
        for process in processes:
            process.kill()
        (folder / "done").touch()


@pytest.fixture(scope="module")
def ranks(tmp_path_factory) -> list[dict]:
    """What every rank computed. Of several pytest workers one starts the ranks, the others wait."""
    if not (dist.is_available() and dist.is_gloo_available()):
        pytest.skip("this torch has no gloo")
    shared = tmp_path_factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:
        shared = shared.parent
    folder = shared / "ranks"
    try:
        folder.mkdir()
    except FileExistsError:
        limit = time.monotonic() + 2 * TIMEOUT
        while not (folder / "done").exists() and time.monotonic() < limit:
            time.sleep(0.1)
    else:
        start_ranks(folder)
    if (folder / "unavailable").exists():
        pytest.skip("gloo can not start here: " + (folder / "unavailable").read_text())
    assert not (folder / "failed").exists(), (folder / "failed").read_text()
    return [torch.load(folder / f"{rank}.pt") for rank in range(WORLD)]


def assert_ranks_match(ranks, key, expected) -> None:
    for rank, (towers, scale_and_bias, loss) in enumerate(zip(*expected, strict=True)):
        want = [loss.detach(), *(x.grad for x in (*towers, *scale_and_bias))]
        for got, value in zip(ranks[rank][key], want, strict=True):
            # float64, other orders of summation; a frozen tower has no gradient on either side
            torch.testing.assert_close(got, value, rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize("frozen", FROZEN)
@pytest.mark.parametrize("size", [WORLD, 2])
@pytest.mark.parametrize("number", range(len(CLIP_CASES)), ids=lambda n: str(CLIP_CASES[n]))
def test_clip_loss_over_ranks(ranks, number, size, frozen):
    case = CLIP_CASES[number]
    expected = expected_clip(size, frozen, case["local_loss"], case["gather_with_grad"])
    assert_ranks_match(ranks, ("clip", size, frozen, number), expected)


@pytest.mark.parametrize("frozen", FROZEN)
@pytest.mark.parametrize("size", [WORLD, 2])
@pytest.mark.parametrize("number", range(len(SIGMOID_CASES)), ids=lambda n: str(SIGMOID_CASES[n]))
def test_sigmoid_loss_over_ranks(ranks, number, size, frozen):
    case = SIGMOID_CASES[number]
    expected = expected_sigmoid(size, frozen, case["captions_per_image"], case["average_over"])
    assert_ranks_match(ranks, ("sigmoid", size, frozen, number), expected)


@pytest.mark.parametrize("frozen", FROZEN)
@pytest.mark.parametrize("size", [WORLD, 2])
@pytest.mark.parametrize("case", ["all", "masked"])
def test_text_conditioned_loss_over_ranks_averages_to_that_of_the_whole_batch(
    ranks, case, size, frozen
):
    towers = [pooled_batch(rank, frozen) for rank in range(size)]
    tokens, text = (torch.cat(side) for side in zip(*towers, strict=True))
    options = [pooled_options(rank, case) for rank in range(size)]
    keywords = {"captions_per_image": CAPTIONS}
    if case == "masked":
        keywords["image_mask"] = torch.cat([x["image_mask"] for x in options])
    pool, (scale, bias) = make_pool(), scalars()
    whole = text_conditioned_sigmoid_loss(
        pool, tokens, text, scale, bias, **keywords, backend="reference"
    )
    whole.backward()
    found = [rank["pooled", size, frozen, case] for rank in ranks[:size]]
    exact = {"rtol": 1e-10, "atol": 1e-12}
    torch.testing.assert_close(sum(x[0] for x in found) / size, whole.detach(), **exact)
    for (image, text), got in zip(towers, found, strict=True):  # each rank's own rows
        for tensor, grad in zip((image, text), got[1:3], strict=True):
            expected = None if tensor.grad is None else tensor.grad * size
            torch.testing.assert_close(grad, expected, **exact)
    for place, shared in enumerate((scale, bias, *pool.parameters()), start=3):
        torch.testing.assert_close(sum(x[place] for x in found) / size, shared.grad, **exact)


@pytest.mark.parametrize("size", [WORLD, 2])
def test_sampled_text_conditioned_loss_over_ranks_is_the_published_ring(ranks, size):
    """Own columns with their positives, and the columns that each other rank drew, all negative."""
    towers = [pooled_batch(rank) for rank in range(size)]
    options = [pooled_options(rank, "sample") for rank in range(size)]
    pools, shared, losses = [make_pool() for _ in range(size)], [], []
    for rank, (tokens, _) in enumerate(towers):
        shared.append(scalars())
        losses.append(sum(
            reference.text_conditioned_sigmoid_loss(
                tokens, text, pools[rank].weights(), 2, *shared[rank],
                captions_per_image=CAPTIONS, negative_only=other != rank,
                negative_offsets=options[other]["negative_offsets"],
            )
            for other, (_, text) in enumerate(towers)
        ))  # fmt: skip
    sum(losses).backward()
    for rank in range(size):
        wanted = [losses[rank], *(x.grad for x in (*towers[rank], *shared[rank]))]
        wanted += [p.grad for p in pools[rank].parameters()]
        found = ranks[rank]["pooled", size, "none", "sample"]
        for got, value in zip(found, wanted, strict=True):
            torch.testing.assert_close(got, value.detach(), rtol=1e-10, atol=1e-12)


@pytest.mark.skipif(not CAN_SHARD, reason="this torch has FSDP2 on CUDA only")
@pytest.mark.parametrize("name", SHARDED)
def test_a_pool_sharded_on_its_own_trains_once_it_is_registered(ranks, name):
    """Every rank's loss of its own batch; the gradients of the pool are the ranks' mean."""
    towers, pool = [pooled_batch(rank) for rank in range(2)], make_pool()
    if name == "over ranks":  # the ranks' mean is the loss of the whole batch
        tokens, text = (torch.cat(side) for side in zip(*towers, strict=True))
        loss = text_conditioned_sigmoid_loss(
            pool, tokens, text, SCALE, BIAS, captions_per_image=CAPTIONS
        )
        losses = [loss, loss]
    else:
        losses = [pool_loss(name, pool, None, *batch) for batch in towers]
    (sum(losses) / 2).backward()
    found = [rank["sharded", name] for rank in ranks[:2]]
    torch.testing.assert_close(sum(x[0] for x in found) / 2, (sum(losses) / 2).detach())
    for batch, got in zip(towers, found, strict=True):
        for tensor, grad in zip(batch, got[1:3], strict=True):
            assert tensor.grad is not None
            torch.testing.assert_close(grad, 2 * tensor.grad, rtol=1e-10, atol=1e-12)
        for parameter, grad in zip(pool.parameters(), got[3:], strict=True):
            torch.testing.assert_close(grad, parameter.grad, rtol=1e-10, atol=1e-12)
    for rank, batch in enumerate(towers):
        message = ranks[rank]["refused", name]
        assert "weights.in_proj_weight is sharded (a DTensor). Fix: " in message
        assert 'register_fsdp_forward_method(pool, "sigmoid_loss")' in message
        scores = ranks[rank]["sharded", "scores", name]
        torch.testing.assert_close(scores, pool.scores(*batch).detach())


@pytest.mark.parametrize("local_loss", [False, True])
def test_averaged_over_ranks_it_is_the_single_process_loss(ranks, local_loss):
    """What DDP makes of the ranks' gradients is the gradient of the loss of the whole batch."""
    case = {"local_loss": local_loss, "gather_with_grad": True, "backend": "torch"}
    key = ("clip", WORLD, "none", CLIP_CASES.index(case))
    towers = [features(rank, "none") for rank in range(WORLD)]
    image, text = (torch.cat(side).detach().requires_grad_() for side in zip(*towers, strict=True))
    whole = ClipLoss()(image, text, SCALE, BIAS)
    whole.backward()
    losses, image_grads, text_grads = zip(*(rank[key][:3] for rank in ranks), strict=True)
    torch.testing.assert_close(torch.stack(losses).mean(), whole.detach())
    torch.testing.assert_close(torch.cat(image_grads) / WORLD, image.grad)
    torch.testing.assert_close(torch.cat(text_grads) / WORLD, text.grad)


def test_modules_over_ranks(ranks):
    towers = [features(rank, "none") for rank in range(WORLD)]
    image, text = (torch.cat(side).detach() for side in zip(*towers, strict=True))
    clip, siglip = (torch.stack(x).mean() for x in zip(*(r["modules"] for r in ranks), strict=True))
    torch.testing.assert_close(clip, ClipLoss()(image, text, SCALE))
    torch.testing.assert_close(siglip, SigLipLoss()(image, text, SCALE, BIAS))
    assert all("world_size=4, but the process group says" in r["wrong size"] for r in ranks)


# ---------------------------------------------------------------------------------------------
# One process
# ---------------------------------------------------------------------------------------------


def test_several_ranks_need_a_process_group():
    image, text = features(0, "none")
    for module in (ClipLoss(world_size=2), SigLipLoss(world_size=2)):
        with pytest.raises(RuntimeError, match=r"world_size=2 needs a process group.*Fix"):
            module(image, text, SCALE, BIAS)


def test_options_that_are_not_served_are_refused_by_name():
    with pytest.raises(NotImplementedError, match=r"use_horovod=True.* is not served.*Fix"):
        ClipLoss(use_horovod=True)
    with pytest.raises(ValueError, match=r"dist_impl must be one of .*; got 'ring'"):
        SigLipLoss(dist_impl="ring")


if __name__ == "__main__":
    run_rank(int(sys.argv[1]), Path(sys.argv[2]))
