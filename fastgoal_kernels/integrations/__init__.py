"""One-line patches for trainers that exist: their own classes, with our losses inside."""

from .hf_clip import patch_hf_clip, unpatch_hf_clip
from .open_clip import patch_open_clip, unpatch_open_clip
from .sentence_transformers import patch_sentence_transformers, unpatch_sentence_transformers

__all__ = [
    "patch_hf_clip",
    "patch_open_clip",
    "patch_sentence_transformers",
    "unpatch_hf_clip",
    "unpatch_open_clip",
    "unpatch_sentence_transformers",
]
