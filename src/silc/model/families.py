"""The families of Hugging Face transformers that silc reads: from their config.json to our settings.

Gives: Family, SWITCHES, family_of, describe.
Used by: weights.py, which moves the tensors; export/transformers.py through it.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, Literal, get_args

from silc.config import Activation, ImageTowerConfig, ModelConfig, PositionResize, PreprocessConfig, TextTowerConfig
from silc.plain import from_dict, nearest

Family = Literal["clip", "siglip", "siglip2"]
"""Classes of transformers: CLIPModel, SiglipModel (also SigLIP 2 at fixed resolution), Siglip2Model (NaFlex)."""

# Switches of our towers (image, text) that each family fixes.
_CLIP: tuple[dict[str, Any], dict[str, Any]] = (
    {"pool": "cls", "pre_norm": True, "patch_bias": False, "proj": "linear"},
    {"causal": True, "pool": "eos", "proj": "linear"},
)
_SIGLIP: tuple[dict[str, Any], dict[str, Any]] = (
    {"pool": "map", "pre_norm": False, "patch_bias": True, "proj": "none"},
    {"causal": False, "pool": "last", "proj": "affine"},
)
SWITCHES: dict[Family, tuple[dict[str, Any], dict[str, Any]]] = {"clip": _CLIP, "siglip": _SIGLIP, "siglip2": _SIGLIP}
RESIZE: dict[Family, PositionResize] = {"clip": "bicubic", "siglip": "bicubic", "siglip2": "bilinear-antialias"}

# A config.json lists only what differs from the defaults of its class, so those are part of the format.
_BASE: dict[str, Any] = {"hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12}
_BASE |= {"num_attention_heads": 12, "num_channels": 3, "pad_token_id": 1, "eos_token_id": 49407}
_CLIP_BASE = _BASE | {"hidden_act": "quick_gelu", "layer_norm_eps": 1e-5}
_SIGLIP_BASE = _BASE | {"hidden_act": "gelu_pytorch_tanh", "layer_norm_eps": 1e-6}
_CLIP_TEXT = {"hidden_size": 512, "intermediate_size": 2048, "num_attention_heads": 8}
_CLIP_TEXT |= {"vocab_size": 49408, "max_position_embeddings": 77}
_SIGLIP_TEXT = _SIGLIP_BASE | {"vocab_size": 32000, "max_position_embeddings": 64}
_SIGLIP_IMAGE = _SIGLIP_BASE | {"patch_size": 16, "image_size": 224, "vision_use_head": True}
DEFAULTS: dict[Family, tuple[dict[str, Any], dict[str, Any]]] = {
    "clip": (_CLIP_BASE | {"patch_size": 32, "image_size": 224}, _CLIP_BASE | _CLIP_TEXT),
    "siglip": (_SIGLIP_IMAGE, _SIGLIP_TEXT),
    "siglip2": (_SIGLIP_IMAGE | {"num_patches": 256}, _SIGLIP_TEXT),
}
ACTIVATIONS: dict[str, Activation] = {
    "gelu": "gelu",
    "gelu_pytorch_tanh": "gelu_tanh",
    "gelu_new": "gelu_tanh",
    "quick_gelu": "quick_gelu",
}
CLIP_END = 49407


def describe(hf_config: dict[str, Any], preprocessor: dict[str, Any] | None = None) -> ModelConfig:
    """Our settings of a transformers `config.json`, and of its `preprocessor_config.json` where given.

    The image size is cut to a multiple of the patch, which is what their patch convolution does. ValueError for a
    family or a switch that silc does not have.
    """
    family = family_of(hf_config)
    vision, text = _part(hf_config, family, 0), _part(hf_config, family, 1)
    if not vision.get("vision_use_head", True):
        raise ValueError("the config has vision_use_head = false: without its pooling head it has no image embedding.")
    patch = _whole(vision, "patch_size")
    grid = math.isqrt(_whole(vision, "num_patches")) if family == "siglip2" else _whole(vision, "image_size") // patch
    image = ImageTowerConfig(
        image_size=grid * patch, patch=patch, position_resize=RESIZE[family], **_tower(vision), **SWITCHES[family][0])
    if family == "clip":
        embed_dim = _whole({"projection_dim": 512, **hf_config}, "projection_dim")
        scale, bias = math.exp(hf_config.get("logit_scale_init_value", 2.6592)), None
    else:
        embed_dim = text.get("projection_size") or _whole(text, "hidden_size")
        scale, bias = 10.0, -10.0
        if embed_dim != image.width:
            raise ValueError(f"the config has texts of {embed_dim} but images of {image.width} numbers: not a SigLIP.")
    return ModelConfig(
        image=image,
        text=TextTowerConfig(
            vocab=_whole(text, "vocab_size"),
            length=_whole(text, "max_position_embeddings"),
            eos_id=_end_token(text, family),
            pad_id=text["pad_token_id"],
            **_tower(text),
            **SWITCHES[family][1],
        ),
        preprocess=_preprocess(family, image.image_size, preprocessor),
        embed_dim=embed_dim,
        scale_init=scale,
        bias_init=bias,
    )


def family_of(hf_config: dict[str, Any]) -> Family:
    """The family that a config names as its `model_type`. ValueError for any other."""
    kind = str(hf_config.get("model_type"))
    for family in get_args(Family):
        if kind == family:
            return family
    raise ValueError(f"the config has model_type {kind!r}, which silc cannot load." + nearest(kind, get_args(Family)))


def _part(hf_config: dict[str, Any], family: Family, index: int) -> dict[str, Any]:
    name = ("vision_config", "text_config")[index]
    stated = [hf_config.get(key) or {} for key in (name, f"{name}_dict")]  # the second is in old files, and wins there
    return DEFAULTS[family][index] | {k: v for part in stated for k, v in part.items() if v is not None}


def _whole(settings: Mapping[str, Any], key: str) -> int:
    value = settings[key]
    if isinstance(value, list | tuple) and len(set(value)) == 1:
        value = value[0]
    if not isinstance(value, int) or value <= 0:
        raise ValueError(f"the config has {key} = {value!r}, but silc needs one whole number (pictures are square).")
    return value


def _tower(part: dict[str, Any]) -> dict[str, Any]:
    """The settings that image and text towers share."""
    act = str(part["hidden_act"])
    if act not in ACTIVATIONS:
        raise ValueError(f"the config has hidden_act = {act!r}, which silc does not have." + nearest(act, ACTIVATIONS))
    if part["num_channels"] != 3:
        raise ValueError(f"the config has num_channels = {part['num_channels']}: silc takes RGB pictures only.")
    sizes = {"width": "hidden_size", "depth": "num_hidden_layers", "heads": "num_attention_heads"}
    sizes |= {"mlp": "intermediate_size"}
    whole = {ours: _whole(part, theirs) for ours, theirs in sizes.items()}
    return {**whole, "act": ACTIVATIONS[act], "norm_eps": float(part["layer_norm_eps"])}


def _end_token(text: dict[str, Any], family: Family) -> int:
    end = text["eos_token_id"]
    if not isinstance(end, int):
        raise ValueError(f"the config has eos_token_id = {end!r}, but silc needs a single end token.")
    if family == "clip" and end == 2:
        # Configs of the first CLIP conversions state a wrong 2; transformers then reads the highest id of each text,
        # which is CLIP's end token (the last of its vocabulary; rows after it are padding of the table).
        return min(_whole(text, "vocab_size") - 1, CLIP_END)
    if family != "clip" and end == CLIP_END:
        return 1  # SigLIP configs inherit CLIP's number, but both of its vocabularies end texts with 1
    return end


def _preprocess(family: Family, size: int, stated: dict[str, Any] | None) -> PreprocessConfig:
    if family == "clip":
        mean, std = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
        usual = PreprocessConfig(size, "crop", "bicubic", mean, std)
    else:
        usual = PreprocessConfig(size, "squash", "bicubic" if family == "siglip" else "bilinear")
    if stated is None:
        return usual
    crop = stated.get("do_center_crop", usual.resize == "crop")
    resample = stated.get("resample")
    if resample not in (None, 2, 3):
        raise ValueError(f"the preprocessor config has resample = {resample!r}; silc has 2 (bilinear) and 3 (bicubic).")
    said = {
        "size": size,
        "resize": "crop" if crop else "squash",
        "interpolation": {None: usual.interpolation, 2: "bilinear", 3: "bicubic"}[resample],
        "mean": stated.get("image_mean") or usual.mean,
        "std": stated.get("image_std") or usual.std,
    }
    return from_dict(PreprocessConfig, said, "preprocess.")
