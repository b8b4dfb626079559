"""The sets of captioned images that people evaluate on, each in its own official layout."""

from .base import CaptionedImage, CaptionSet, Layout, SetError
from .registry import SETS, read_set

__all__ = ["SETS", "CaptionSet", "CaptionedImage", "Layout", "SetError", "read_set"]
