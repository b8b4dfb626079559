"""open_clip's `ClipLoss` and `SigLipLoss` with our losses inside.

>>> from fastgoal_kernels import patch_open_clip
>>> patch_open_clip()
>>> loss = open_clip.create_loss(args)        # as before; so are the trainer and its flags

The two forward methods are replaced, so that `create_loss`, loss objects that exist already and
subclasses that call them (`CoCaLoss`) change alike. `DistillClipLoss` compares whole matrices of
logits with a teacher's and keeps its own code.
"""

from __future__ import annotations

from ..modules import ClipLoss, SigLipLoss
from .patching import Patch, PatchSet

_PATCHES = PatchSet(
    "open_clip",
    (
        Patch("open_clip.loss", "ClipLoss", "forward", lambda original: ClipLoss.forward),
        Patch("open_clip.loss", "SigLipLoss", "forward", lambda original: SigLipLoss.forward),
    ),
)


def patch_open_clip() -> None:
    """Make open_clip's contrastive losses ours, for the whole process. Twice is once.

    Same arguments, same loss and gradients, on one process or several; the loss is float32 where
    the features are of half precision. `use_horovod` is refused, by name, when the loss is called.
    Before open_clip 3 the fourth argument of ClipLoss was `output_dict`: name it, as trainers do.

    Raises:
        ImportError: open_clip is not installed.
    """
    _PATCHES.apply()


def unpatch_open_clip() -> None:
    """Give open_clip its own losses back, exactly; without a patch it does nothing."""
    _PATCHES.undo()
