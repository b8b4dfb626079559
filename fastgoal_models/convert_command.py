"""`fastgoal convert`: a CLIP's weights file from Hugging Face's layout to open_clip's and back."""

from __future__ import annotations

import json
import shlex
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NoReturn

import open_clip
from open_clip.model import CLIPTextCfg, CLIPVisionCfg
from rich.console import Console
from rich.markup import escape

from .atomic_files import write_text_atomically
from .checkpoints import save_tensors_atomically
from .errors import ConfigError
from .hf_checkpoints import (
    ClipSettings,
    ClipSizes,
    hf_config,
    hf_from_open_clip,
    layout_of,
    open_clip_from_hf,
    settings_from_hf,
    sizes_of,
)
from .trained import Trained, load_weights

_LAYOUTS = {"open-clip": "open_clip", "hf": "Hugging Face"}


@dataclass(frozen=True)
class ConvertOptions:
    """The options of `fastgoal convert`."""

    source: Path
    target: Path
    to: str  # "open-clip" or "hf"
    model: str | None = None
    force: bool = False


def run_convert(options: ConvertOptions, console: Console) -> None:
    """Convert, and say what was found. Raises what a user can mend (see `cli`)."""
    weights_file, config_file = _target_files(options)
    source = load_weights(options.source, "SOURCE")
    weights = source.weights
    if layout_of(weights) == options.to:
        other = "hf" if options.to == "open-clip" else "open-clip"
        raise ConfigError(
            f"{options.source} has {_LAYOUTS[options.to]}'s layout already. Fix: --to {other}"
        )
    if options.to == "hf":
        converted = hf_from_open_clip(weights)
        sizes = sizes_of(open_clip_from_hf(converted))
        settings = _settings_of_open_clip(options.model, source.notes, sizes)
    else:
        converted = open_clip_from_hf(weights)
        sizes = sizes_of(converted)
        settings = _settings_of_hf(options.source)
    config = None
    if config_file is not None:
        config = hf_config(sizes, settings or _refuse_without_settings(sizes))

    found = _what_was_found(source, options.to, sizes, settings)
    console.print(escape(found), highlight=False, soft_wrap=True)
    weights_file.parent.mkdir(parents=True, exist_ok=True)
    # Some releases of transformers refuse a file that does not name its format.
    save_tensors_atomically(converted, weights_file, {"format": "pt"})
    if config_file is not None:
        write_text_atomically(config_file, json.dumps(config, indent=2) + "\n")
    how = _how_to_load(options, sizes, settings)
    console.print(escape(f"Wrote {options.target}. {how}"), highlight=False, soft_wrap=True)


def _target_files(options: ConvertOptions) -> tuple[Path, Path | None]:
    """The files to write, weights and config.json, neither of which may exist."""
    if options.target.suffix == ".safetensors":
        files = options.target, None
    elif options.to == "hf":
        files = options.target / "model.safetensors", options.target / "config.json"
    else:
        raise ConfigError(f"the target must be a .safetensors file, not {options.target}")
    there = [str(path) for path in files if path is not None and path.exists()]
    if there and not options.force:
        raise ConfigError(f"{' and '.join(there)} exists already. Fix: --force replaces it")
    return files


def _settings_of_hf(source: Path) -> ClipSettings | None:
    config = _json_beside(source, "config.json")
    return settings_from_hf(config) if config.get("model_type") == "clip" else None


def _settings_of_open_clip(
    asked: str | None, notes: Mapping[str, Any], sizes: ClipSizes
) -> ClipSettings | None:
    """Those of --model, or of the model that `fastgoal train` noted with its weights."""
    if asked is not None:
        return _settings_of_model(asked, sizes)
    model, tag = notes.get("model"), notes.get("pretrained")
    try:
        if isinstance(notes.get("architecture"), dict):
            return _settings_of_config(notes["architecture"], "the model of this run", sizes)
        settings = _settings_of_model(str(model), sizes)
    except ConfigError:
        return None
    if tag and open_clip.get_pretrained_cfg(model, tag).get("quick_gelu"):
        settings = replace(settings, activation="quick_gelu")  # as training took it from the tag
    return settings


def _settings_of_model(model: str, sizes: ClipSizes) -> ClipSettings:
    if model.endswith(".json"):
        config = _json_beside(Path(model), Path(model).name)
    else:
        config = open_clip.get_model_config(model)
    if not config:
        raise ConfigError(f"open_clip has no model {model!r}, nor is it a JSON file with one")
    return _settings_of_config(config, model, sizes)


def _settings_of_config(config: Mapping[str, Any], model: str, sizes: ClipSizes) -> ClipSettings:
    plain = _plain_clip(config)
    if plain is None:
        raise ConfigError(f"{model} is more than a CLIP, and Hugging Face's has no such parts")
    have, settings = plain
    if replace(have, text_positions=sizes.text_positions) != sizes:
        raise ConfigError(f"these are not the weights of {model}: they have {sizes}, not {have}")
    return settings


def _json_beside(source: Path, name: str) -> dict[str, Any]:
    path = (source if source.is_dir() else source.parent) / name
    try:
        content = json.loads(path.read_text("utf-8"))
    except (OSError, ValueError):
        return {}
    return content if isinstance(content, dict) else {}


def _plain_clip(config: Mapping[str, Any]) -> tuple[ClipSizes, ClipSettings] | None:
    """What a configuration of open_clip's says; None where it is more than CLIP of other sizes."""
    try:
        vision, text = CLIPVisionCfg(**config["vision_cfg"]), CLIPTextCfg(**config["text_cfg"])
    except (KeyError, TypeError):
        return None
    sized = {"layers", "width", "head_width", "mlp_ratio", "patch_size", "image_size"}
    worded = {"context_length", "vocab_size", "width", "heads", "layers", "mlp_ratio"}
    known = {"embed_dim", "vision_cfg", "text_cfg", "quick_gelu", "custom_text", "preprocess_cfg"}
    is_plain = (
        isinstance(vision.layers, int)
        and config.keys() <= known
        and config["vision_cfg"].keys() <= sized
        and config["text_cfg"].keys() <= worded
    )
    if not is_plain:
        return None
    sizes = ClipSizes(
        image_width=vision.width,
        image_layers=vision.layers,
        image_mlp_width=int(vision.width * vision.mlp_ratio),
        patch_size=vision.patch_size,
        image_size=vision.image_size,
        text_width=text.width,
        text_layers=text.layers,
        text_mlp_width=int(text.width * text.mlp_ratio),
        text_positions=text.context_length,
        vocabulary=text.vocab_size,
        embed_dim=config["embed_dim"],
    )
    activation = "quick_gelu" if config.get("quick_gelu") else "gelu"
    return sizes, ClipSettings(vision.width // vision.head_width, text.heads, activation)


def _models_like(sizes: ClipSizes, settings: ClipSettings | None) -> list[str]:
    """open_clip's models of these sizes, of texts of any length; of these settings, if known."""
    found = []
    for name in open_clip.list_models():
        plain = _plain_clip(open_clip.get_model_config(name))
        if plain is None or replace(plain[0], text_positions=sizes.text_positions) != sizes:
            continue
        if settings is None or plain[1] == settings:
            found.append(name)
    return found


def _refuse_without_settings(sizes: ClipSizes) -> NoReturn:
    like = _models_like(sizes, None)
    raise ConfigError(
        "config.json has to name the heads and the activation, which the weights do not tell. Fix: "
        f"--model {' or '.join(like) or 'FILE.json'}, the open_clip model they are of. OpenAI's "
        "weights, and what is trained from them, are of a ...-quickgelu"
    )


def _what_was_found(
    source: Trained, to: str, sizes: ClipSizes, settings: ClipSettings | None
) -> str:
    weights = source.weights
    dtypes = sorted({str(tensor.dtype).removeprefix("torch.") for tensor in weights.values()})
    layout = _LAYOUTS["open-clip" if to == "hf" else "hf"]
    unknown = "not in the weights, and no configuration beside them"
    pictures = source.notes.get("architecture", {}).get("preprocess_cfg")
    return "\n".join(
        [
            f"{source.name}: a CLIP in {layout}'s layout, {len(weights)} tensors, "
            f"{' and '.join(dtypes)}",
            f"  images      {sizes.image_width} wide, {sizes.image_layers} layers, "
            f"{sizes.image_size} pixels in patches of {sizes.patch_size}",
            f"  texts       {sizes.text_width} wide, {sizes.text_layers} layers, "
            f"{sizes.text_positions} positions, {sizes.vocabulary} tokens",
            f"  features    {sizes.embed_dim}",
            f"  activation  {settings.activation if settings else unknown}",
            # Which no file that is written here says: Hugging Face keeps it with its processors.
            *([f"  pictures    not as CLIP's: {pictures}"] if pictures else []),
        ]
    )


def _how_to_load(options: ConvertOptions, sizes: ClipSizes, settings: ClipSettings | None) -> str:
    target = str(options.target)
    if options.to == "hf":
        if options.target.suffix != ".safetensors":
            return f"To load it:\n  transformers.CLIPModel.from_pretrained({target!r})"
        return "It is the state dict of a transformers.CLIPModel with these sizes."
    names = _models_like(sizes, settings)
    if not names:
        return "open_clip has no model with these sizes built in: load it with a configuration."
    known = (77, 248)  # training stretches the one to the other
    tokens = f" --context-length {sizes.text_positions}" * (sizes.text_positions not in known)
    length = f", force_context_length={sizes.text_positions}" * (sizes.text_positions != 77)
    ways = [
        f"  fastgoal train fast-goal --model {name} "
        f"--pretrained {shlex.quote(target)}{tokens} ...\n"
        f"  open_clip.create_model({name!r}, pretrained={target!r}{length})"
        for name in names
    ]
    which = (
        "To load it:"
        if settings
        else "To load it, with ...-quickgelu if the weights are OpenAI's or trained from them:"
    )
    return "\n".join([which, *ways])
