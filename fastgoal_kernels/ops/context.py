"""Where and how an op's own code runs, whatever surrounds the call."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor


@contextmanager
def on_device_of(tensor: Tensor) -> Iterator[None]:
    """The tensor's CUDA device current, and autocast off.

    Triton launches on the current device, which need not be the one the tensors are on. Dtypes are
    the public function's to choose; a backward that runs under autocast would choose again.
    """
    with torch.autocast(tensor.device.type, enabled=False):
        if tensor.is_cuda:
            with torch.cuda.device(tensor.device):
                yield
        else:
            yield
