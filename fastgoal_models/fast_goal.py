"""FAST-GOAL (arXiv 2605.26615) on an open_clip ViT: one encoder pass, tokens of the last layer."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import open_clip
import torch
import torch.nn.functional as F
from open_clip.factory import load_state_dict
from open_clip.model import resize_pos_embed, set_model_preprocess_cfg
from open_clip.transformer import TextTransformer, VisionTransformer
from torch import Tensor, nn

from fastgoal_kernels import region_mean, span_mean

from .pooled_token import pooled_token
from .positional import KEPT_POSITIONS, stretch_positional_embedding
from .preprocessing import Normalisation, preprocess_of, unlike_clip

DEMO_CONFIG = Path(__file__).with_name("configs") / "demo.json"
"""A CLIP small enough to train on two CPU cores, in open_clip's JSON layout; no weights."""

_CLIP_VOCABULARY = 49408


class FastGoalBatch(NamedTuple):
    """What one training step needs. N images of S × S pixels, captions of L tokens."""

    images: Tensor
    """(N, 3, S, S) float32, normalised"""
    texts: Tensor
    """(N, L) int64, start and end tokens included"""
    local_images: Tensor
    """(N, 3, S, S) float32, the matched regions cut out"""
    local_texts: Tensor
    """(N, L) int64, the matched sentences alone"""
    boxes: Tensor
    """(N, 4) float32, x1 y1 x2 y2 of the regions in pixels of the original images"""
    image_sizes: Tensor
    """(N, 2) int64, width and height of the original images"""
    spans: Tensor
    """(N, 2) int64, half-open ranges of the matched sentences' tokens within `texts`"""
    lengths: Tensor
    """(N,) int64, tokens of each caption with start and end, at most L"""

    def to(self, device: torch.device | str, non_blocking: bool = False) -> FastGoalBatch:
        """The same batch on another device."""
        return FastGoalBatch(*(x.to(device, non_blocking=non_blocking) for x in self))


class FastGoalModel(nn.Module):
    """A CLIP with patch and word tokens, ready for `fastgoal_kernels.FastGoalLoss`.

    Works on open_clip's `CLIP` and `CustomTextCLIP` with the built-in `VisionTransformer` and text
    transformer. `clip` stays an ordinary open_clip model (its own `encode_image` and `encode_text`
    give the same features), whose text positions are stretched in place to `context_length`
    (`stretch_positional_embedding`); positions of that length already are left alone.

    Attributes: `clip`; `tokenizer`, CLIP's BPE with this context; `context_length`; `image_size`,
    the side S in pixels; `grid_size`, patches down and across; `preprocess`, open_clip's
    `PreprocessCfg` of its pictures, and `normalisation`, the mean and std of it.

    Raises TypeError or ValueError, naming it, for a tower whose tokens do not fit the method;
    ValueError for a `preprocess_cfg` that makes no sense.
    """

    def __init__(self, clip: open_clip.CLIP, context_length: int = 248) -> None:
        super().__init__()
        _check_towers(clip)
        self.clip = clip
        self.context_length = context_length
        self.tokenizer = _tokenizer(context_length)
        self.preprocess = preprocess_of(getattr(clip.visual, "preprocess_cfg", {}), self.image_size)
        _stretch_text(clip, context_length)

    @classmethod
    def create(
        cls,
        model: str | Mapping[str, Any] | Path,
        pretrained: str | Path | None = None,
        context_length: int = 248,
        image_size: int | None = None,
    ) -> FastGoalModel:
        """Build from an open_clip name, or a configuration in open_clip's JSON layout (dict, file).

        `pretrained` is one of open_clip's tags for that name, or a weights file of this
        architecture: plain CLIP weights, which are stretched, or weights of the context length
        itself, which are not. Without it the weights are random. QuickGELU is used where a tag's
        weights were trained with it, and pictures are normalised as a tag says, or the
        configuration's `preprocess_cfg`, else as CLIP's. Image positions are interpolated for
        another `image_size`.
        """
        weights = None
        if pretrained is not None and Path(pretrained).is_file():
            weights = _clip_weights(Path(pretrained))
        clip: Any
        if isinstance(model, str) and not model.endswith(".json"):
            tag = str(pretrained) if pretrained is not None and weights is None else None
            tag_config = open_clip.get_pretrained_cfg(model, tag) if tag else {}
            _check_family(model, open_clip.get_model_config(model) or {})
            clip = open_clip.create_model(
                model,
                pretrained=tag,
                force_image_size=image_size,
                force_quick_gelu=bool(tag_config.get("quick_gelu", False)),
            )
        elif pretrained is not None and weights is None:
            raise FileNotFoundError(f"no weights file {str(pretrained)!r}")
        else:
            if isinstance(model, (str, Path)):
                model = json.loads(Path(model).read_text("utf-8"))
            clip = _from_config(model, image_size)
        if weights is not None:
            _load_weights(clip, weights, context_length)
        return cls(clip, context_length)

    @property
    def image_size(self) -> int:
        """The side of the square input in pixels, S."""
        return self._visual.image_size[0]

    @property
    def normalisation(self) -> Normalisation:
        """What its pictures are normalised by."""
        return Normalisation(self.preprocess.mean, self.preprocess.std)

    def extra_repr(self) -> str:
        # What features depend on is what the repr tells: an index is of one of them.
        unlike = unlike_clip(self.preprocess)
        return f"preprocess={unlike}" if unlike else ""

    @property
    def grid_size(self) -> tuple[int, int]:
        """Patches down and across."""
        return self._visual.grid_size

    @property
    def _visual(self) -> Any:
        return self.clip.visual

    @property
    def _text(self) -> Any:
        return _text_tower(self.clip)

    def image_tokens(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Images (N, 3, S, S) -> features (N, E), not normalised, and patch tokens (N, h·w, W).

        The tokens are the last layer's, before `ln_post`, row by row and without the class token.
        """
        visual = self._visual
        x = visual.transformer(self._embed_image(images))
        patches = x[:, 1:]
        if visual.pool_type == "tok":
            return self.project_patches(x[:, 0]), patches
        if visual.final_ln_after_pool:
            return self.project_patches(patches.mean(dim=1)), patches
        return visual.ln_post(patches).mean(dim=1) @ visual.proj, patches

    def text_tokens(self, texts: Tensor) -> tuple[Tensor, Tensor]:
        """Texts (N, L) -> features (N, E), not normalised, and word tokens (N, L, W).

        The tokens are the last layer's, before `ln_final`; L is at most the context length. The
        features are those of the end token: the highest id of a row.
        """
        words = self._text.transformer(*self._embed_text(texts))
        pooled = words[torch.arange(len(words), device=words.device), texts.argmax(dim=1)]
        return self.project_words(pooled), words

    def project_patches(self, tokens: Tensor) -> Tensor:
        """The image tower's own last step, `ln_post` and projection: (…, W) -> (…, E)."""
        visual = self._visual
        return visual.ln_post(tokens) @ visual.proj

    def project_words(self, tokens: Tensor) -> Tensor:
        """The text tower's own last step, `ln_final` and projection: (…, W) -> (…, E)."""
        text = self._text
        x = text.ln_final(tokens)
        if text.text_projection is None:
            return x
        if isinstance(text.text_projection, nn.Linear):
            return text.text_projection(x)
        return x @ text.text_projection

    def encode_image(self, images: Tensor, normalize: bool = True) -> Tensor:
        """Images (N, 3, S, S) -> features (N, E): those of `image_tokens`."""
        visual = self._visual
        if visual.pool_type == "tok":
            x = self._embed_image(images)
            first = torch.zeros(len(x), dtype=torch.int64, device=x.device)
            features = self.project_patches(pooled_token(visual.transformer, x, first))
        else:
            features, _ = self.image_tokens(images)
        return F.normalize(features, dim=-1) if normalize else features

    def encode_text(self, texts: Tensor, normalize: bool = True) -> Tensor:
        """Texts (N, L) -> features (N, E): those of `text_tokens`."""
        x, causal = self._embed_text(texts)
        end = texts.argmax(dim=1)
        features = self.project_words(pooled_token(self._text.transformer, x, end, causal))
        return F.normalize(features, dim=-1) if normalize else features

    def _embed_image(self, images: Tensor) -> Tensor:
        """Images (N, 3, S, S) -> what enters the first block (N, 1 + h·w, W)."""
        self._check_images("images", images)
        visual = self._visual
        x = visual.conv1(images).flatten(2).transpose(1, 2)
        start = visual.class_embedding.to(x.dtype).expand(len(x), 1, -1)
        x = torch.cat([start, x], dim=1) + visual.positional_embedding.to(x.dtype)
        return visual.ln_pre(x)

    def _check_images(self, name: str, images: Tensor) -> None:
        if images.ndim != 4 or tuple(images.shape[1:]) != (3, *self._visual.image_size):
            raise ValueError(
                f"{name} must have shape (N, 3, {self.image_size}, {self.image_size}); got "
                f"{tuple(images.shape)}. Fix: resize them all, by "
                "fastgoal_models.pictures.image_tensor, or create the model with another image_size"
            )

    def _embed_text(self, texts: Tensor) -> tuple[Tensor, Tensor]:
        """Texts (N, L) -> what enters the first block (N, L, W), and the causal mask (L, L)."""
        text = self._text
        if texts.ndim != 2 or texts.shape[1] > self.context_length:
            raise ValueError(
                f"texts must have shape (N, at most {self.context_length}); "
                f"got {tuple(texts.shape)}"
            )
        length = texts.shape[1]
        dtype = text.transformer.get_cast_dtype()
        x = text.token_embedding(texts).to(dtype) + text.positional_embedding[:length].to(dtype)
        return x, text.attn_mask[:length, :length]

    def forward(self, batch: FastGoalBatch) -> dict[str, Tensor]:
        """The arguments of `FastGoalLoss.forward`, by name; each tower runs once.

        Whole and local features are L2-normalised (N, E); `region_features` and `span_features`
        are the pooled tokens, projected as equation 13's patch and word features, not normalised;
        `logit_scale` is the multiplier itself.

        Raises ValueError for pictures of other sizes than the tower's: one size a model.
        """
        count = len(batch.images)
        self._check_images("images", batch.images)
        self._check_images("local_images", batch.local_images)
        image_features, patches = self.image_tokens(torch.cat([batch.images, batch.local_images]))
        text_features, words = self.text_tokens(_stack_texts(batch.texts, batch.local_texts))
        regions = region_mean(
            patches[:count], batch.boxes, batch.image_sizes, self.grid_size, self.image_size
        )
        spans = span_mean(words[:count], batch.spans, lengths=batch.lengths)
        image_features = F.normalize(image_features, dim=-1)
        text_features = F.normalize(text_features, dim=-1)
        return {
            "image_features": image_features[:count],
            "text_features": text_features[:count],
            "local_image_features": image_features[count:],
            "local_text_features": text_features[count:],
            "region_features": self.project_patches(regions),
            "span_features": self.project_words(spans),
            "logit_scale": self.clip.logit_scale.exp(),
        }

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Recompute the layers' activations in the backward instead of keeping them."""
        self.clip.set_grad_checkpointing(enable)


def _stack_texts(texts: Tensor, local_texts: Tensor) -> Tensor:
    """Both along the batch, the narrower padded with zeros, which come after the end token."""
    width = max(texts.shape[1], local_texts.shape[1])
    rows = [F.pad(x, (0, width - x.shape[1])) for x in (texts, local_texts)]
    return torch.cat(rows)


@cache
def _tokenizer(context_length: int) -> open_clip.SimpleTokenizer:
    # Reading the merges takes longer than building a small model.
    return open_clip.SimpleTokenizer(context_length=context_length)


def _text_tower(clip: nn.Module) -> Any:
    # CLIP holds the parts of its text tower itself, CustomTextCLIP a module of them.
    return clip.text if isinstance(clip, open_clip.CustomTextCLIP) else clip


def _check_family(name: str, config: Mapping[str, Any]) -> None:
    """Raises ValueError for a model whose towers or tokenizer are not open_clip's own.

    From the configuration: weights of gigabytes are not downloaded first.
    """
    vision, text = config.get("vision_cfg") or {}, config.get("text_cfg") or {}
    foreign = {
        "an image tower of timm's, whose patch tokens are not read here": vision.get(
            "timm_model_name"
        ),
        "a text tower of Hugging Face's": text.get("hf_model_name"),
        "a tokenizer of its own, where captions are cut by CLIP's": text.get("hf_tokenizer_name"),
    }
    found = [f"{what} ({which})" for what, which in foreign.items() if which]
    if found:
        raise ValueError(
            f"{name} has {' and '.join(found)}. Fix: a model with open_clip's own ViT and CLIP's "
            "tokenizer, e.g. ViT-B-16 or ViT-L-14"
        )


def _check_towers(clip: Any) -> None:
    if not isinstance(clip, (open_clip.CLIP, open_clip.CustomTextCLIP)):
        raise TypeError(
            f"clip must be open_clip's CLIP or CustomTextCLIP, not {type(clip).__name__}"
        )
    visual = clip.visual
    if not isinstance(visual, VisionTransformer):
        raise TypeError(
            f"the image tower must be open_clip's VisionTransformer, not {type(visual).__name__}: "
            "its patch tokens are needed"
        )
    if visual.attn_pool is not None:
        raise ValueError(
            "the image tower uses attentional_pool: its patches have no projection of their own"
        )
    if visual.pool_type not in ("tok", "avg"):
        raise ValueError(
            f"the image tower's pool_type must be 'tok' or 'avg', not {visual.pool_type!r}"
        )
    if not isinstance(visual.patch_dropout, nn.Identity):
        raise ValueError(
            "the image tower uses patch_dropout: a region's patches may be missing. "
            "Fix: build the model with patch_dropout 0"
        )
    if visual.image_size[0] != visual.image_size[1]:
        raise ValueError(f"the image tower's input must be square, not {visual.image_size}")
    text = _text_tower(clip)
    if isinstance(clip, open_clip.CustomTextCLIP) and not isinstance(text, TextTransformer):
        raise TypeError(
            f"the text tower must be open_clip's TextTransformer, not {type(text).__name__}"
        )
    if text.attn_mask is None or getattr(text, "cls_emb", None) is not None:
        raise ValueError(
            "the text tower must be causal and without a class token: features are its end token's"
        )
    pool_type = clip.text_pool_type if isinstance(clip, open_clip.CLIP) else text.pool_type
    if pool_type != "argmax":
        raise ValueError(
            f"the text tower's pool_type must be 'argmax' (end token), not {pool_type!r}"
        )
    if text.vocab_size != _CLIP_VOCABULARY:
        raise ValueError(
            f"the text tower has a vocabulary of {text.vocab_size}; CLIP's byte-pair tokenizer "
            f"needs {_CLIP_VOCABULARY}"
        )


def _stretch_text(clip: Any, context_length: int) -> None:
    """Give the text tower `context_length` positions and a causal mask of that size, in place."""
    text = _text_tower(clip)
    positions: nn.Parameter = text.positional_embedding
    if len(positions) == context_length:
        return
    stretched = stretch_positional_embedding(positions.detach(), context_length)
    text.positional_embedding = nn.Parameter(stretched, requires_grad=positions.requires_grad)
    mask = text.attn_mask.new_full((context_length, context_length), -torch.inf)
    text.attn_mask = mask.triu(1)
    for module in (text, clip):
        module.context_length = context_length
    if hasattr(text, "num_pos"):
        text.num_pos = context_length


def _from_config(config: Any, image_size: int | None) -> nn.Module:
    settings = dict(config)
    _check_family("the configuration", settings)
    custom_text = settings.pop("custom_text", False)
    preprocess = settings.pop("preprocess_cfg", {})
    for not_ours in ("model_cfg", "multimodal_cfg"):
        if not_ours in settings:
            raise ValueError(f"the configuration's {not_ours!r} is not that of a plain CLIP")
    if image_size is not None:
        settings["vision_cfg"] = dict(settings["vision_cfg"]) | {"image_size": image_size}
    clip: Any = (open_clip.CustomTextCLIP if custom_text else open_clip.CLIP)(**settings)
    side = settings["vision_cfg"].get("image_size", 224)
    set_model_preprocess_cfg(clip, asdict(preprocess_of(preprocess, side)))  # as open_clip's own
    return clip


def _clip_weights(path: Path) -> dict[str, Tensor]:
    """A weights file's tensors under CLIP's own names, also when a FastGoalModel wrote it.

    Long-CLIP keeps its first 20 positions in one table and the others in a second.
    """
    weights: Any = load_state_dict(str(path), weights_only=True)
    weights = {name.removeprefix("clip."): tensor for name, tensor in weights.items()}
    trained = weights.pop("positional_embedding_res", None)
    if trained is not None:
        kept = weights["positional_embedding"][:KEPT_POSITIONS]
        weights["positional_embedding"] = torch.cat([kept, trained[KEPT_POSITIONS:]])
    return weights


def text_positions_in(path: Path) -> int | None:
    """How many text positions a weights file has; None where it has none under CLIP's names."""
    weights = _clip_weights(path)
    names = ("positional_embedding", "text.positional_embedding")
    return next((len(weights[name]) for name in names if name in weights), None)


def _load_weights(clip: nn.Module, weights: dict[str, Tensor], context_length: int) -> None:
    """Load into `clip`, whose positions are stretched first where those of `weights` are.

    open_clip's own loader would squeeze 248 positions into 77 by interpolation without a word.
    """
    name = "text.positional_embedding" if hasattr(clip, "text") else "positional_embedding"
    if name in weights and len(weights[name]) == context_length:
        _stretch_text(clip, context_length)
    resize_pos_embed(weights, clip)
    clip.load_state_dict(weights)
