"""The superpixel network of CAFT: which of nine cells each pixel belongs to.

A fully convolutional U-shaped network (arXiv 2003.12929, "Superpixel Segmentation with Fully
Convolutional Networks"), frozen. Parameter names are those of a CAFT checkpoint, three coarser
predictions included, which only its own training reads.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

_WIDTHS = (16, 32, 64, 128, 256)


def _conv(inputs: int, outputs: int, stride: int = 1) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(inputs, outputs, 3, stride, padding=1, bias=False),
        nn.BatchNorm2d(outputs),
        nn.LeakyReLU(0.1),
    )


def _deconv(inputs: int, outputs: int) -> nn.Sequential:
    return nn.Sequential(
        nn.ConvTranspose2d(inputs, outputs, 4, stride=2, padding=1), nn.LeakyReLU(0.1)
    )


class Sfcn(nn.Module):
    """Images (N, 3, H, W), H and W divisible by 16 -> logits (N, 9, H, W) of the cells around.

    Cells are 16 pixels wide. Channel 3 (dy + 1) + (dx + 1) stands for the cell dy rows below and
    dx columns beside the pixel's own. Pixels are RGB in [0, 1] minus (0.411, 0.432, 0.45).
    """

    def __init__(self) -> None:
        super().__init__()
        inputs = 3
        for level, width in enumerate(_WIDTHS):
            self.add_module(f"conv{level}a", _conv(inputs, width, 1 if level == 0 else 2))
            self.add_module(f"conv{level}b", _conv(width, width))
            inputs = width
        for level in (3, 2, 1, 0):
            width = _WIDTHS[level]
            self.add_module(f"deconv{level}", _deconv(_WIDTHS[level + 1], width))
            self.add_module(f"conv{level}_1", _conv(2 * width, width))
            self.add_module(f"pred_mask{level}", nn.Conv2d(width, 9, 3, padding=1))

    def forward(self, images: Tensor) -> Tensor:
        parts: Any = self
        skips = []
        x = images
        for level in range(len(_WIDTHS)):
            x = parts.get_submodule(f"conv{level}b")(parts.get_submodule(f"conv{level}a")(x))
            skips.append(x)
        for level in (3, 2, 1, 0):
            upwards = parts.get_submodule(f"deconv{level}")(x)
            x = parts.get_submodule(f"conv{level}_1")(torch.cat([skips[level], upwards], dim=1))
        return parts.get_submodule("pred_mask0")(x)
