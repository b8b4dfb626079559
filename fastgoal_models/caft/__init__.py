"""CAFT: a fine-to-coarse image encoder, a part-and-whole text encoder, their alignment."""

from .config import CaftConfig
from .model import Caft, CaftImage, CaftText
from .vision import Hierarchy

__all__ = ["Caft", "CaftConfig", "CaftImage", "CaftText", "Hierarchy"]
