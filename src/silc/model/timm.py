"""timm's ViTs with attention pooling, SigLIP's image towers: their settings by name, their names of tensors -> ours.

Gives: from_timm, TRUNK and FORMS (names), TOWERS (settings of the registered models), known.
Used by: open_clip.py, whose SigLIPs have these as image towers; adapters.py; whoever opens weights.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from silc.config import Activation, ImageTowerConfig, ModelConfig, PreprocessConfig, TextTowerConfig
from silc.model.layout import ROW, LoadReport, at_size, fill, pairs, tower
from silc.model.silc import Silc
from silc.plain import from_dict, nearest

# ---------------------------------------------------------------- names

BLOCK = {
    "norm1": "norm1",
    "attn.qkv": "attention.q attention.k attention.v",
    "attn.proj": "attention.out",
    "norm2": "norm2",
    "mlp.fc1": "mlp.up",
    "mlp.fc2": "mlp.down",
}
TRUNK = {
    "pos_embed": "position",
    "attn_pool.latent": "head.probe",
    **pairs({"patch_embed.proj": "patch", "norm": "norm", "attn_pool.q": "head.attention.q"}),
    **pairs({"attn_pool.kv": "head.attention.k head.attention.v", "attn_pool.proj": "head.attention.out"}),
    **pairs({"attn_pool.norm": "head.norm", "attn_pool.mlp.fc1": "head.mlp.up", "attn_pool.mlp.fc2": "head.mlp.down"}),
    **pairs({f"blocks.{{}}.{a}": " ".join(f"blocks.{{}}.{b}" for b in ours.split()) for a, ours in BLOCK.items()}),
}
FORMS = {"pos_embed": ROW, "attn_pool.latent": ROW}

# ---------------------------------------------------------------- settings

SIZES = {"base": (768, 12, 12, 4.0), "large": (1024, 24, 16, 4.0), "so400m": (1152, 27, 16, 3.7362)}
SIZES |= {"giantopt": (1536, 40, 16, 4.0)}
# The activation is part of what a name means. Some SigLIPs were trained with the tanh form and have the exact one here.
VARIANTS: list[tuple[str, int, tuple[int, ...], Activation]] = [
    ("base", 32, (256,), "gelu_tanh"),
    ("base", 16, (224, 256, 384, 512), "gelu"),
    ("large", 16, (256, 384), "gelu"),
    ("large", 16, (512,), "gelu_tanh"),
    ("so400m", 14, (224, 378, 384), "gelu"),
    ("so400m", 16, (256, 384, 512), "gelu_tanh"),
    ("giantopt", 16, (256, 384), "gelu_tanh"),
]


def _tower(size: str, patch: int, side: int, act: Activation) -> ImageTowerConfig:
    width, depth, heads, ratio = SIZES[size]
    return ImageTowerConfig(side // patch * patch, patch, width, depth, heads, int(width * ratio), act=act)


TOWERS = {
    f"vit_{size}_patch{patch}_siglip_{side}": _tower(size, patch, side, act)
    for size, patch, sides, act in VARIANTS
    for side in sides
}
"""Registered models with attention pooling and nothing that silc lacks."""
ARGUMENTS = {"embed_dim": "width", "depth": "depth", "num_heads": "heads", "patch_size": "patch", "act_layer": "act"}
FIXED = {"global_pool": "map", "class_token": False, "in_chans": 3}
WITHOUT_EFFECT = {"num_classes", "dynamic_img_size", "dynamic_img_pad", "weight_init", "drop_rate", "pos_drop_rate"}
WITHOUT_EFFECT |= {"patch_drop_rate", "proj_drop_rate", "attn_drop_rate", "drop_path_rate"}
CROPS = {"squash": "squash", "center": "crop"}
IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


def from_timm(
    config: dict[str, Any], tensors: Mapping[str, Tensor], minimum: float = 0.9, image_size: int | None = None
) -> tuple[Silc, LoadReport]:
    """An image tower alone, from the `config.json` of timm's Hub layout and its tensors; a tiny text tower is new.

    `minimum` is the least share of the image tower's tensors that must be there. `crop_pct` is left aside: `center`
    cuts the middle square of the whole picture. ValueError names a model or setting that silc does not have.
    """
    model = Silc(at_size(describe(config), image_size)).eval()
    layout = tower(TRUNK, model.config.image.depth, "", "image.", FORMS)
    return model, fill(model, layout, tensors, f"timm {config['architecture']}", minimum)


def known(name: str) -> ImageTowerConfig:
    """Settings of a registered model, with or without the tag of its weights. ValueError for an unknown one."""
    plain = name.partition(".")[0]
    if plain not in TOWERS:
        raise ValueError(f"silc does not know timm's {name!r}: of its models it has SigLIP's with attention pooling."
                         + nearest(plain, TOWERS))
    return TOWERS[plain]


def describe(config: dict[str, Any]) -> ModelConfig:
    """Our settings of a timm `config.json`."""
    if "architecture" not in config:
        raise ValueError("the config has no architecture, so it is none of timm's.")
    stated, arguments = config.get("pretrained_cfg", config), dict(config.get("model_args") or {})
    image = known(config["architecture"])
    for key, value in FIXED.items():
        if arguments.pop(key, value) != value:
            raise ValueError(f"the config has {key} = {config['model_args'][key]!r}, but silc needs {value!r}.")
    side = arguments.pop("img_size", (stated.get("input_size") or [3, image.image_size])[-1])
    ratio = arguments.pop("mlp_ratio", image.mlp / image.width)
    if strange := sorted(set(arguments) - set(ARGUMENTS) - WITHOUT_EFFECT):
        raise ValueError(f"the config has model_args {', '.join(strange)}, which silc's image tower does not know.")
    read = {ours: arguments[theirs] for theirs, ours in ARGUMENTS.items() if theirs in arguments}
    width, patch = read.get("width", image.width), read.get("patch", image.patch)
    read |= {"image_size": _side(side) // patch * patch, "mlp": int(width * ratio)}
    image = from_dict(ImageTowerConfig, {**vars(image), **read}, "model_args.")
    mode = stated.get("crop_mode") or "center"
    if mode not in CROPS:
        raise ValueError(f"the config has crop_mode = {mode!r}; silc has {' and '.join(CROPS)}.")
    seen = {"size": image.image_size, "resize": CROPS[mode], "interpolation": stated.get("interpolation") or "bicubic"}
    seen |= {"mean": stated.get("mean") or IMAGENET_MEAN, "std": stated.get("std") or IMAGENET_STD}
    text = TextTowerConfig(vocab=2, length=1, width=8, depth=1, heads=1, mlp=8)
    return ModelConfig(image, text, from_dict(PreprocessConfig, seen, "pretrained_cfg."), image.width)


def _side(value: Any) -> int:
    sides = set(value) if isinstance(value, list | tuple) else {value}
    side = sides.pop()
    if sides or not isinstance(side, int):
        raise ValueError(f"the config has img_size = {value!r}, but silc needs one whole number (pictures are square).")
    return side
