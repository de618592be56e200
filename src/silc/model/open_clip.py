"""open_clip: from its open_clip_config.json and tensors to ours, and back.

Gives: from_open_clip, to_open_clip; image_names and FORMS, its own ViT's.
Used by: whoever opens weights or writes them for open_clip; adapters.py.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from torch import Tensor

from silc.config import Activation, ImageTowerConfig, ModelConfig, PreprocessConfig, TextTowerConfig
from silc.model import timm
from silc.model.families import CLIP_END
from silc.model.layout import (
    SCALAR,
    TRANSPOSED,
    Layout,
    LoadReport,
    Place,
    at_size,
    demand,
    fill,
    pairs,
    pour,
    strip_prefixes,
    tower,
)
from silc.model.silc import Silc
from silc.plain import from_dict

# ---------------------------------------------------------------- names

BLOCK = {
    "ln_1": "norm1",
    "attn.out_proj": "attention.out",
    "ln_2": "norm2",
    "mlp.c_fc": "mlp.up",
    "mlp.c_proj": "mlp.down",
}
BLOCKS = {
    **pairs({f"transformer.resblocks.{{}}.{theirs}": f"blocks.{{}}.{ours}" for theirs, ours in BLOCK.items()}),
    **pairs({"transformer.resblocks.{}.attn.in_proj": " ".join(f"blocks.{{}}.attention.{x}" for x in "qkv")}, dot="_"),
}
IMAGE = {
    "class_embedding": "cls",
    "positional_embedding": "cls_position position",
    "conv1.weight": "patch.weight",
    **pairs({"ln_pre": "pre_norm", "ln_post": "norm"}),
    "proj": "proj.weight",
    **BLOCKS,
}
TEXT = {"token_embedding.weight": "token.weight", "positional_embedding": "position", **pairs({"ln_final": "norm"})}
TEXT |= BLOCKS
FORMS = {"class_embedding": SCALAR, "proj": TRANSPOSED, "text_projection": TRANSPOSED}
SWITCHES = {"pool": "cls", "patch_bias": False, "proj": "linear"}

# ---------------------------------------------------------------- settings

# What changes nothing of what a trained model computes; of every other setting that silc does not read, any value but
# nothing is an error.
WITHOUT_EFFECT = {"patch_dropout", "attn_pooler_queries", "attn_pooler_heads", "final_ln_after_pool", "output_tokens"}
WITHOUT_EFFECT |= {"pos_embed_type", "timm_model_pretrained", "timm_drop", "timm_drop_path", "hf_tokenizer_name"}
WITHOUT_EFFECT |= {"tokenizer_mode", "tokenizer_kwargs", "hf_model_pretrained", "hf_proj_type", "hf_pooler_type"}
WITHOUT_EFFECT |= {"cast_dtype", "output_dict", "nonscalar_logit_scale", "custom_text"}
MODEL = {"embed_dim", "vision_cfg", "text_cfg", "quick_gelu", "init_logit_scale", "init_logit_bias"}
VISION = {"layers", "width", "head_width", "mlp_ratio", "patch_size", "image_size", "no_ln_pre", "act_kwargs"}
VISION |= {"norm_kwargs", "pool_type", "timm_model_name", "timm_pool", "timm_proj", "timm_proj_bias"}
WORDS = {"context_length", "vocab_size", "width", "heads", "layers", "mlp_ratio", "pad_id", "eos_id", "no_causal_mask"}
WORDS |= {"pool_type", "proj_bias", "proj_type", "act_kwargs", "norm_kwargs"}
CLIP_MEAN, CLIP_STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
RESIZE = {"shortest": "crop", "squash": "squash"}


def from_open_clip(
    config: dict[str, Any], tensors: Mapping[str, Tensor], minimum: float = 0.9, image_size: int | None = None
) -> tuple[Silc, LoadReport]:
    """The model of an `open_clip_config.json`, filled in fp32 from its tensors: its own ViTs with a class token, and
    timm's SigLIP towers; its own text towers, under `text.` or not.

    `image_size` builds it for pictures of that size, the position table resized. ValueError names a setting that silc
    does not have, and a tensor that does not fit.
    """
    model, theirs = Silc(at_size(describe(config), image_size)).eval(), strip_prefixes(tensors)
    prefix = "text." if any(name.startswith("text.") for name in theirs) else ""
    return model, fill(model, layout(model.config, prefix), theirs, "open_clip", minimum)


def to_open_clip(model: Silc) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """(the content of `open_clip_config.json`, tensors); `from_open_clip` gives the same bits back.

    A class-token tower becomes open_clip's own ViT. A MAP-pooled one becomes timm's, which open_clip knows by name
    only, so its settings must be those of one of `timm.TOWERS`. ValueError names what cannot be expressed.
    """
    c, mapped = model.config, model.config.image.pool == "map"
    vision = _timm_settings(c) if mapped else _native_settings(c)
    quick = c.text.act == "quick_gelu"
    if not mapped and quick != (c.image.act == "quick_gelu"):
        raise ValueError(f"open_clip has quick_gelu in both towers or in none, not {c.image.act} and {c.text.act}.")
    described: dict[str, Any] = {"embed_dim": c.embed_dim, "vision_cfg": vision, "text_cfg": _text_settings(c.text)}
    described |= {"quick_gelu": quick, "custom_text": mapped, "init_logit_scale": math.log(c.scale_init)}
    if c.bias_init is not None:
        described["init_logit_bias"] = c.bias_init
    p, resize = c.preprocess, next(theirs for theirs, ours in RESIZE.items() if ours == c.preprocess.resize)
    seen = {"size": p.size, "mode": "RGB", "mean": list(p.mean), "std": list(p.std)}
    seen |= {"interpolation": p.interpolation, "resize_mode": resize}
    tensors = pour(model, layout(c, "text." if mapped else ""))
    return {"model_cfg": described, "preprocess_cfg": seen}, tensors


def image_names(pre_norm: bool) -> dict[str, str]:
    """Names of its own ViT -> ours, which has a norm before its first block or not."""
    return IMAGE if pre_norm else {theirs: ours for theirs, ours in IMAGE.items() if not theirs.startswith("ln_pre")}


def layout(config: ModelConfig, prefix: str) -> Layout:
    """prefix: of the names of the text tower, which has one where it is a part of its own (CustomTextCLIP)."""
    image, depth = config.image, config.image.depth
    if image.pool == "map":
        places = tower(timm.TRUNK, depth, "visual.trunk.", "image.", timm.FORMS)
        kinds = {"none": (), "linear": ("weight",), "affine": ("weight", "bias")}[image.proj]
        places |= {f"visual.head.proj.{kind}": Place([f"image.proj.{kind}"]) for kind in kinds}
    else:
        places = tower(image_names(image.pre_norm), depth, "visual.", "image.", FORMS)
    linear = config.text.proj == "linear"
    words = TEXT | ({"text_projection": "proj.weight"} if linear else pairs({"text_projection": "proj"}))
    places |= tower(words, config.text.depth, prefix, "text.", FORMS)
    scalars = ["logit_scale"] if config.bias_init is None else ["logit_scale", "logit_bias"]
    return places | {name: Place([name], SCALAR) for name in scalars}


# ---------------------------------------------------------------- theirs -> ours


def describe(config: dict[str, Any]) -> ModelConfig:
    """Our settings of an `open_clip_config.json`."""
    model = config.get("model_cfg")
    if not isinstance(model, dict) or not {"embed_dim", "vision_cfg", "text_cfg"} <= set(model):
        raise ValueError("the config is none of open_clip's: its model_cfg needs embed_dim, vision_cfg and text_cfg.")
    for where, part, read in (("model_cfg", model, MODEL), ("vision_cfg", model["vision_cfg"], VISION),
                              ("text_cfg", model["text_cfg"], WORDS)):
        for key in sorted(set(part) - read - WITHOUT_EFFECT):
            if part[key] and (key, part[key]) != ("block_type", "default"):
                raise ValueError(f"the config has {where}.{key} = {part[key]!r}, which silc does not have.")
    quick = bool(model.get("quick_gelu", False))
    read_image = _timm_tower if model["vision_cfg"].get("timm_model_name") else _native_tower
    image = read_image(model["vision_cfg"], quick)
    bias = model.get("init_logit_bias")
    return ModelConfig(
        image=image,
        text=_text_tower(model["text_cfg"], quick),
        preprocess=_preprocess(config.get("preprocess_cfg") or {}, image.image_size),
        embed_dim=model["embed_dim"],
        scale_init=math.exp(model.get("init_logit_scale", math.log(1 / 0.07))),
        bias_init=None if bias is None else float(bias),
    )


def _native_tower(vision: dict[str, Any], quick: bool) -> ImageTowerConfig:
    width, layers = vision.get("width", 768), vision.get("layers", 12)
    if not isinstance(layers, int):
        raise ValueError(f"the config has vision_cfg.layers = {layers!r}, a ResNet: silc has ViTs only.")
    _one_of(vision, "vision_cfg", "pool_type", ("tok",))
    patch = _square(vision, "patch_size", 16)
    return from_dict(ImageTowerConfig, {
        "image_size": _square(vision, "image_size", 224) // patch * patch,
        "patch": patch,
        "width": width,
        "depth": layers,
        "heads": width // vision.get("head_width", 64),
        "mlp": int(width * vision.get("mlp_ratio", 4.0)),
        "act": _activation(vision, "vision_cfg", quick),
        "norm_eps": _epsilon(vision, "vision_cfg"),
        "pre_norm": not vision.get("no_ln_pre", False),
        **SWITCHES,
    }, "vision_cfg.")


def _timm_tower(vision: dict[str, Any], quick: bool) -> ImageTowerConfig:
    image = timm.known(vision["timm_model_name"])
    _one_of({"timm_pool": "avg", **vision}, "vision_cfg", "timm_pool", ("map",))
    _one_of({"timm_proj": "linear", **vision}, "vision_cfg", "timm_proj", ("none", "linear"))
    if vision.get("timm_proj", "linear") == "none":
        return image
    return replace(image, proj="affine" if vision.get("timm_proj_bias", False) else "linear")


def _text_tower(text: dict[str, Any], quick: bool) -> TextTowerConfig:
    _one_of(text, "text_cfg", "pool_type", ("argmax", "eos", "last"))
    _one_of(text, "text_cfg", "proj_type", ("linear",))
    pool, vocab, width = text.get("pool_type", "argmax"), text.get("vocab_size", 49408), text.get("width", 512)
    # CLIP's texts are read at their highest id, which is its end token (rows of the table after it are padding)
    end = {"argmax": min(vocab - 1, CLIP_END), "eos": text.get("eos_id", 2), "last": text.get("eos_id", 1)}[pool]
    return from_dict(TextTowerConfig, {
        "vocab": vocab,
        "length": text.get("context_length", 77),
        "width": width,
        "depth": text.get("layers", 12),
        "heads": text.get("heads", 8),
        "mlp": int(width * text.get("mlp_ratio", 4.0)),
        "act": _activation(text, "text_cfg", quick),
        "norm_eps": _epsilon(text, "text_cfg"),
        "causal": not text.get("no_causal_mask", False),
        "pool": "last" if pool == "last" else "eos",
        "eos_id": end,
        "pad_id": text.get("pad_id", 1 if pool == "last" else 0),
        "proj": "affine" if text.get("proj_bias", False) else "linear",
    }, "text_cfg.")


def _one_of(part: Mapping[str, Any], where: str, key: str, allowed: tuple[str, ...]) -> None:
    if key in part and part[key] not in allowed:
        raise ValueError(f"the config has {where}.{key} = {part[key]!r}, but silc has {' and '.join(allowed)} only.")


def _square(vision: Mapping[str, Any], key: str, usual: int) -> int:
    value = vision.get(key, usual)
    sides = set(value) if isinstance(value, list | tuple) else {value}
    side = sides.pop()
    if sides or not isinstance(side, int) or side <= 0:
        raise ValueError(f"the config has vision_cfg.{key} = {value!r}, but silc needs one whole number.")
    return side


def _activation(part: Mapping[str, Any], where: str, quick: bool) -> Activation:
    stated = part.get("act_kwargs") or {}
    known: dict[str, Activation] = {"none": "gelu", "tanh": "gelu_tanh"}
    if (quick and stated) or set(stated) - {"approximate"} or stated.get("approximate", "none") not in known:
        raise ValueError(f"the config has {where}.act_kwargs = {stated!r}{' with quick_gelu' * quick}: no activation "
                         "that silc has.")
    return "quick_gelu" if quick else known[stated.get("approximate", "none")]


def _epsilon(part: Mapping[str, Any], where: str) -> float:
    stated = part.get("norm_kwargs") or {}
    if set(stated) - {"eps"}:
        raise ValueError(f"the config has {where}.norm_kwargs = {stated!r}, of which silc knows eps only.")
    return float(stated.get("eps", 1e-5))


def _preprocess(stated: Mapping[str, Any], size: int) -> PreprocessConfig:
    mode = stated.get("resize_mode") or "shortest"
    if mode not in RESIZE:
        raise ValueError(f"the config has preprocess_cfg.resize_mode = {mode!r}; silc has {' and '.join(RESIZE)}.")
    said = {"size": size, "resize": RESIZE[mode], "interpolation": stated.get("interpolation") or "bicubic"}
    said |= {"mean": stated.get("mean") or CLIP_MEAN, "std": stated.get("std") or CLIP_STD}
    return from_dict(PreprocessConfig, said, "preprocess_cfg.")


# ---------------------------------------------------------------- ours -> theirs


def _native_settings(config: ModelConfig) -> dict[str, Any]:
    demand(config, "open_clip's own ViT", SWITCHES, {})
    c = config.image
    sizes = {"image_size": c.image_size, "patch_size": c.patch, "width": c.width, "layers": c.depth}
    sizes |= {"head_width": c.width // c.heads, "no_ln_pre": not c.pre_norm}
    return {**sizes, **_shared(c)}


def _timm_settings(config: ModelConfig) -> dict[str, Any]:
    plain = replace(config.image, proj="none", position_resize="bicubic-antialias")
    name = next((name for name, known in timm.TOWERS.items() if known == plain), None)
    if name is None:
        own = f"{plain.image_size} px, patch {plain.patch}, depth {plain.depth}, width {plain.width}, mlp {plain.mlp}"
        raise ValueError("open_clip has MAP pooling in timm's SigLIP towers only, of which none is like this model's "
                         f"({own}, {plain.heads} heads, {plain.act}): export it to transformers instead.")
    vision: dict[str, Any] = {"image_size": plain.image_size, "timm_model_name": name, "timm_model_pretrained": False}
    if config.image.proj == "none":
        return vision | {"timm_pool": "map", "timm_proj": "none"}
    return vision | {"timm_pool": "map", "timm_proj": "linear", "timm_proj_bias": config.image.proj == "affine"}


def _text_settings(c: TextTowerConfig) -> dict[str, Any]:
    if c.pool == "mean":
        raise ValueError("open_clip's text towers have no mean pooling: export to another library.")
    highest = c.pool == "eos" and c.eos_id == min(c.vocab - 1, CLIP_END)
    sizes = {"context_length": c.length, "vocab_size": c.vocab, "width": c.width, "heads": c.heads, "layers": c.depth}
    ends = {"pool_type": "argmax" if highest else c.pool, "eos_id": c.eos_id, "pad_id": c.pad_id}
    wiring = {"no_causal_mask": not c.causal, "proj_bias": c.proj == "affine"}
    return {**sizes, **ends, **wiring, **_shared(c)}


def _shared(c: ImageTowerConfig | TextTowerConfig) -> dict[str, Any]:
    ratio = c.mlp / c.width
    exact = ratio if int(c.width * ratio) == c.mlp else (c.mlp + 0.5) / c.width  # they cut the product
    tanh = {"act_kwargs": {"approximate": "tanh"}} if c.act == "gelu_tanh" else {}
    return {"mlp_ratio": exact, "norm_kwargs": {"eps": c.norm_eps}, **tanh}
