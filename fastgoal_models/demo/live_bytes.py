"""The peak of live tensor bytes: how much memory a computation needs beyond what it was given."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class LiveBytes(TorchDispatchMode):
    """Follows every tensor storage made while it is active; `peak` is the most that lived at once.

    Views share their storage and count once. Inside this library's own custom operators it looks
    too: their buffers are what the comparison is about.
    """

    def __init__(self) -> None:
        super().__init__()
        self.peak = 0
        # Each with a way to ask whether it is gone, and its size.
        self._live: dict[int, tuple[Callable[[], bool], int]] = {}

    def ignore(self, tensors: Iterable[Tensor]) -> None:
        """Do not count these: they were there before."""
        for tensor in tensors:
            storage = tensor.untyped_storage()
            self._live[storage._cdata] = (StorageWeakRef(storage).expired, 0)

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        if func.namespace == "fastgoal":
            # A mode is switched off while it handles an operator. Switched on again here, with the
            # operator sent straight to its kernel, it sees the kernel's own calls.
            device = next(
                leaf.device.type for leaf in tree_leaves(args) if isinstance(leaf, Tensor)
            )
            key = torch._C.DispatchKey.CUDA if device == "cuda" else torch._C.DispatchKey.CPU
            with self:
                result = func.redispatch(torch._C.DispatchKeySet(key), *args, **kwargs)
        else:
            result = func(*args, **kwargs)
        self._note(result)
        return result

    def _note(self, result: Any) -> None:
        for key in [key for key, (gone, _) in self._live.items() if gone()]:
            del self._live[key]
        for leaf in tree_leaves(result):
            if isinstance(leaf, Tensor) and leaf.is_mkldnn:
                # In a layout of oneDNN's own, which shows no storage and has no views.
                reference = weakref.ref(leaf)
                size = leaf.numel() * leaf.element_size()
                self._live[id(leaf)] = (lambda reference=reference: reference() is None, size)
            elif isinstance(leaf, Tensor):
                storage = leaf.untyped_storage()
                entry = (StorageWeakRef(storage).expired, storage.nbytes())
                self._live.setdefault(storage._cdata, entry)
        self.peak = max(self.peak, sum(size for _, size in self._live.values()))


def extra_peak_bytes(loss: Callable[[], Tensor], inputs: Iterable[Tensor]) -> int:
    """Peak of live tensor bytes of `loss()` and its backward, beyond inputs and their gradients.

    Args:
        loss: computes a scalar from `inputs`, which require gradients and have none yet.
        inputs: the leaves; their gradients are freed again afterwards.
    """
    inputs = list(inputs)
    with LiveBytes() as live:
        live.ignore(inputs)
        loss().backward()
    gradients = sum(x.grad.untyped_storage().nbytes() for x in inputs if x.grad is not None)
    for x in inputs:
        x.grad = None
    return max(live.peak - gradients, 0)
