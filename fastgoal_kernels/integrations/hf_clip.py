"""Hugging Face's CLIP and SigLIP models with our losses inside.

>>> from fastgoal_kernels import patch_hf_clip
>>> patch_hf_clip()
>>> loss = model(**inputs, return_loss=True).loss

With `return_loss=True` the loss is computed from the model's normalised embeddings. Without it
nothing changes. The table below lists the models: those whose loss is exactly CLIP's or SigLIP's of
the two embeddings that they return. Not among them are CLAP (two scales), X-CLIP (a caption's
embedding depends on the video), FLAVA and BridgeTower (several losses at once) and OWL-ViT (a
detector; older releases may return other embeddings than the loss's).

What is saved, and what is not: these models return `logits_per_image` and `logits_per_text`, so
one matrix of logits (images x texts) is still computed, and lives, with what autograd keeps of it,
as long as the output object does. The copies that the original loss adds (log-softmax both ways,
or the sign matrix and its terms) and their gradients are gone; keep only `.loss` of the output, and
nothing of that size is left when the backward begins. Who does not want the logits at all calls
`clip_contrastive_loss` on `get_image_features` and `get_text_features`.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from typing import Any

from torch import Tensor

from ..functional.contrastive import clip_contrastive_loss, sigmoid_contrastive_loss
from .patching import Method, Patch, PatchSet


def _embeddings(outputs: Any) -> tuple[Tensor, Tensor]:
    """Images', texts'. The towers of a model that is spread over devices may end on two of them."""
    images, texts = outputs.image_embeds.to(outputs.text_embeds.device), outputs.text_embeds
    if len(images) != len(texts):
        # Our sigmoid loss has a meaning for this, these models' has not.
        raise ValueError(
            f"return_loss=True needs one text per image; got {len(images)} images "
            f"and {len(texts)} texts"
        )
    return images, texts


def _clip_loss(model: Any, outputs: Any) -> Tensor:
    return clip_contrastive_loss(*_embeddings(outputs), model.logit_scale.exp())


def _align_loss(model: Any, outputs: Any) -> Tensor:
    scale = model.temperature.reciprocal()
    return clip_contrastive_loss(*_embeddings(outputs), scale, label_smoothing=0.1)


def _tips_loss(model: Any, outputs: Any) -> Tensor:
    return clip_contrastive_loss(*_embeddings(outputs), model.temperature.reciprocal())


def _siglip_loss(model: Any, outputs: Any) -> Tensor:
    scale, bias = model.logit_scale.exp(), model.logit_bias
    return sigmoid_contrastive_loss(*_embeddings(outputs), scale, bias)


def _with_loss(loss: Callable[[Any, Any], Tensor]) -> Callable[[Method], Method]:
    """Turns a model's forward into one whose loss is `loss(model, outputs)`."""

    def replace(original: Method) -> Method:
        signature = inspect.signature(original)
        # Trainers look for `return_loss` in the signature, so it has to stay visible.
        names = list(signature.parameters)
        position = names.index("return_loss") - 1  # without self

        @functools.wraps(original)
        def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
            wanted = args[position] if len(args) > position else kwargs.get("return_loss")
            if not wanted:
                return original(self, *args, **kwargs)
            kwargs.update(zip(names[1 : len(args) + 1], args, strict=True))
            as_dict = kwargs.pop("return_dict", None)
            outputs = original(self, **{**kwargs, "return_loss": False, "return_dict": True})
            if "image_embeds" in outputs and "text_embeds" in outputs:  # TIPSv2 takes one of them
                outputs = type(outputs)(**{**outputs, "loss": loss(self, outputs)})
            if as_dict is None:
                as_dict = getattr(self.config, "return_dict", True)
            return outputs if as_dict else outputs.to_tuple()

        return forward

    return replace


_LOSSES = (
    # package of transformers.models, class, its loss
    ("clip", "CLIPModel", _clip_loss),
    ("siglip", "SiglipModel", _siglip_loss),
    ("siglip2", "Siglip2Model", _siglip_loss),
    ("align", "AlignModel", _align_loss),
    ("altclip", "AltCLIPModel", _clip_loss),
    ("blip", "BlipModel", _clip_loss),
    ("chinese_clip", "ChineseCLIPModel", _clip_loss),
    ("clipseg", "CLIPSegModel", _clip_loss),
    ("groupvit", "GroupViTModel", _clip_loss),
    ("metaclip_2", "MetaClip2Model", _clip_loss),
    ("tipsv2", "Tipsv2Model", _tips_loss),
    ("vision_text_dual_encoder", "VisionTextDualEncoderModel", _clip_loss),
)

_PATCHES = PatchSet(
    "transformers",
    tuple(
        Patch(f"transformers.models.{name}.modeling_{name}", owner, "forward", _with_loss(loss))
        for name, owner, loss in _LOSSES
    ),
)


def patch_hf_clip() -> None:
    """Make the losses of Hugging Face's CLIP and SigLIP models ours, for the whole process.

    Twice is once. Models that the installed release lacks are passed over. The loss is float32 also
    where the model is of half precision. An unequal number of images and texts is a ValueError.

    Raises:
        ImportError: transformers is not installed.
    """
    _PATCHES.apply()


def unpatch_hf_clip() -> None:
    """Give the models their own forward back, exactly; without a patch it does nothing."""
    _PATCHES.undo()
