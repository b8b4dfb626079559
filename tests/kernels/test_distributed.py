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

from fastgoal_kernels import distributed
from fastgoal_kernels.modules import ClipLoss, SigLipLoss

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
