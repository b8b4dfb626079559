"""Other people's datasets and shards as a folder of images with a `captions.jsonl`."""

from .command import UnpackOptions, unpack
from .folder import Unpacked, UnpackError
from .samples import Columns

__all__ = ["Columns", "UnpackError", "UnpackOptions", "Unpacked", "unpack"]
