"""Which records a step reads: a function of the seed and the step's number."""

from __future__ import annotations

import random
from collections.abc import Iterator
from typing import Any, Protocol, cast

import torch
from torch.utils.data import DataLoader, Sampler

from .config import TrainConfig
from .interrupts import ignore_interrupts


class Records(Protocol):
    """A map-style dataset whose items `collate` takes; item i must always be the same.

    One whose items change from epoch to epoch has a method `at(epoch, index)` as well, which is
    then called instead, and whose result must depend on nothing else.
    """

    def __len__(self) -> int: ...

    def __getitem__(self, index: int, /) -> Any: ...


class BatchOrder(Sampler[list[int]]):
    """The record numbers of steps `start + 1` to `stop`: a function of the seed and the step alone.

    Each epoch is cut from its own permutation, drawn from (seed, epoch); nothing needs to be
    replayed or stored to start in the middle.
    """

    def __init__(self, records: int, batch_size: int, seed: int, start: int, stop: int) -> None:
        self.records, self.batch_size, self.seed = records, batch_size, seed
        self.steps = range(start, stop)

    def __len__(self) -> int:
        return len(self.steps)

    def __iter__(self) -> Iterator[list[int]]:
        per_epoch = self.records // self.batch_size
        epoch, order = -1, []
        for step in self.steps:
            if step // per_epoch != epoch:
                epoch = step // per_epoch
                # Mixed through a string, so that (seed, epoch) and (seed + 1, epoch - 1) differ.
                generator = torch.Generator()
                generator.manual_seed(random.Random(f"{self.seed}/{epoch}").getrandbits(63))
                order = torch.randperm(self.records, generator=generator).tolist()
            first = step % per_epoch * self.batch_size
            yield order[first : first + self.batch_size]


def loader(
    dataset: Records, config: TrainConfig, done: int, total: int, device: torch.device
) -> DataLoader[Any]:
    order = BatchOrder(len(dataset), config.batch_size, config.seed, done, total)
    changes = hasattr(dataset, "at")
    return DataLoader(
        # Typed as its own Dataset, it takes anything with items.
        cast(Any, _ByEpoch(dataset) if changes else dataset),
        batch_sampler=cast(Any, _WithEpoch(order) if changes else order),
        collate_fn=config.collate,
        num_workers=config.num_workers,
        pin_memory=device.type == "cuda",
        # Of its own: the loader draws a seed when it starts, which a resumed run does once more.
        generator=torch.Generator(),
        worker_init_fn=ignore_interrupts,
    )


class _WithEpoch(Sampler[list[tuple[int, int]]]):
    """A BatchOrder whose record numbers come with their epoch."""

    def __init__(self, order: BatchOrder) -> None:
        self.order = order

    def __len__(self) -> int:
        return len(self.order)

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        per_epoch = self.order.records // self.order.batch_size
        for step, numbers in zip(self.order.steps, self.order, strict=True):
            yield [(step // per_epoch, number) for number in numbers]


class _ByEpoch:
    """A dataset with `at`, as a loader sees it that asks for (epoch, number)."""

    def __init__(self, dataset: Any) -> None:
        self.dataset = dataset

    def __getitem__(self, key: tuple[int, int]) -> Any:
        return self.dataset.at(*key)
