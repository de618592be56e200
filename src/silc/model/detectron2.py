"""CAT-Seg's published checkpoints (CLIP B/16 and L/14 with heads, as its detectron2 trainer wrote them) -> ours.

Gives: from_catseg, is_catseg, describe, layout.
Used by: whoever opens weights.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from typing import Any

from torch import Tensor

from silc.config import CatSegConfig, ImageTowerConfig, ModelConfig, PreprocessConfig, TextTowerConfig
from silc.model import open_clip
from silc.model.families import CLIP_END
from silc.model.layout import Form, Layout, LoadReport, Place, fill, pairs, strip_prefixes
from silc.model.silc import Silc

PREDICTOR = "sem_seg_head.predictor."
CLIP, HEAD = PREDICTOR + "clip_model.", PREDICTOR + "transformer."
ALONE = Form(lambda x: x[None, None], lambda x: x)
FUSED = "attn.in_proj_weight"

# Within the head, `{}` a layer.
SWIN = {"norm1": "norm1", "attn.q": "q", "attn.k": "k", "attn.v": "v", "attn.proj": "out", "norm2": "norm2"}
SWIN |= {"mlp.fc1": "up", "mlp.fc2": "down"}
CLASSES = {"norm1": "norm1", "attention.q": "q", "attention.k": "k", "attention.v": "v", "norm2": "norm2"}
CLASSES |= {"MLP.0": "up", "MLP.2": "down"}
UP = {"conv.double_conv.1": "norm1", "conv.double_conv.4": "norm2", "up": "enlarge"}
LAYERS = {
    f"swin_block.block_{j + 1}.{theirs}": f"spatial.{{}}.{j}.{ours}" for j in range(2) for theirs, ours in SWIN.items()
}
LAYERS |= {f"attention.{theirs}": f"over_classes.{{}}.{ours}" for theirs, ours in CLASSES.items()}
LAYERS["swin_block.guidance_norm"] = "picture_norms.{}"
ONCE = {"conv1": "embed", "guidance_projection.0": "picture", "text_guidance_projection.0": "text", "head": "head"}
ONCE |= {f"decoder_guidance_projection.{j}.0": f"guides.{j}" for j in range(2)}
ONCE |= {f"decoder{j + 1}.{theirs}": f"stages.{j}.{ours}" for j in range(2) for theirs, ours in UP.items()}


def is_catseg(tensors: Mapping[str, Tensor]) -> bool:
    return any(CLIP in name for name in tensors)


def from_catseg(tensors: Mapping[str, Tensor], minimum: float = 0.9) -> tuple[Silc, LoadReport]:
    """The model in such a file; its settings are read off the shapes. ValueError for a tensor that does not fit, and
    for a file of the older version, whose head had an image tower of its own."""
    theirs = strip_prefixes(tensors)
    try:
        config = describe(theirs)
    except (KeyError, ValueError, IndexError) as error:
        raise ValueError(f"this is no checkpoint of CAT-Seg's CVPR 2024 version on a CLIP ViT ({error} is missing or "
                         "of another form).") from None
    model = Silc(config).eval()
    report = fill(model, layout(config), theirs, "CAT-Seg", minimum)
    if lacking := [name for name in report.new if name.startswith("catseg.")]:
        raise ValueError(f"its head lacks {len(lacking)} tensors, such as {lacking[0]}.")
    return model, report


def describe(theirs: Mapping[str, Tensor]) -> ModelConfig:
    """Our settings of its tensors; what they do not tell (activation, heads, mean and std) is OpenAI's CLIP."""
    width, _, patch, _ = theirs[CLIP + "visual.conv1.weight"].shape
    words, embed_dim = theirs[CLIP + "text_projection"].shape
    vocab, length = len(theirs[CLIP + "token_embedding.weight"]), len(theirs[CLIP + "positional_embedding"])
    windows, inside, _ = theirs[HEAD + "layers.0.swin_block.block_2.attn_mask"].shape
    window = math.isqrt(inside)
    side = math.isqrt(windows) * window * patch
    image = ImageTowerConfig(
        side, patch, width, _depth(theirs, CLIP + "visual.transformer.resblocks."), width // 64, 4 * width, "cls",
        "quick_gelu", 1e-5, True, False, "linear", "bicubic",
    )  # fmt: skip
    text = TextTowerConfig(
        vocab, length, words, _depth(theirs, CLIP + "transformer.resblocks."), words // 64, 4 * words, "quick_gelu",
        1e-5, True, "eos", min(vocab - 1, CLIP_END), 0, "linear",
    )  # fmt: skip
    widths = {j: theirs[f"{HEAD}decoder{j}.up.weight"].shape for j in (1, 2)}
    decoder = tuple(theirs[f"{HEAD}decoder{j}.conv.double_conv.0.weight"].shape[0] for j in (1, 2))
    guides = [theirs[f"{HEAD}decoder_guidance_projection.{j}.0.weight"].shape for j in (0, 1)]
    head: dict[str, Any] = {"width": widths[1][0], "layers": _depth(theirs, HEAD + "layers."), "window": window,
                            "decoder": decoder, "guides": (guides[0][1], guides[1][1]),
                            "guide_widths": (guides[0][0], guides[1][0])}  # fmt: skip
    seen = PreprocessConfig(side, "crop", "bicubic", open_clip.CLIP_MEAN, open_clip.CLIP_STD)
    return ModelConfig(image, text, seen, embed_dim, 1 / 0.07, None, CatSegConfig(**head))


def _depth(theirs: Mapping[str, Tensor], prefix: str) -> int:
    return 1 + max(int(found[1]) for name in theirs if (found := re.match(re.escape(prefix) + r"(\d+)\.", name)))


def layout(config: ModelConfig) -> Layout:
    """Names of theirs -> places in our model."""
    places: Layout = {}
    for name, (ours, form) in open_clip.layout(config, "").items():
        if name.endswith(FUSED):  # queries, keys and values apart, so that two of them can train
            for x, own in zip("qkv", ours):
                places[f"{CLIP}{name.removesuffix(FUSED)}attn.{x}_proj_weight"] = Place([own])
        else:
            places[CLIP + name] = Place(ours, form)
    head = pairs(ONCE) | {f"decoder{j + 1}.conv.double_conv.{k}.weight": f"stages.{j}.{ours}.weight"
                          for j in range(2) for k, ours in ((0, "mix"), (3, "refine"))}  # fmt: skip
    places |= {HEAD + name: Place([f"catseg.{target}"]) for name, target in head.items()}
    for i in range(config.catseg.layers):
        layer = pairs({theirs: ours.format(i) for theirs, ours in LAYERS.items()})
        places |= {f"{HEAD}layers.{i}.{name}": Place([f"catseg.{target}"]) for name, target in layer.items()}
        for name, target in (("padding_tokens", "pad"), ("padding_guidance", "pad_guidance")):
            places[f"{HEAD}layers.{i}.attention.{name}"] = Place([f"catseg.over_classes.{i}.{target}"], ALONE)
    finer = pairs({f"upsample{j + 1}": f"catseg.finer.{j}" for j in range(2)})
    return places | {name: Place([target]) for name, target in finer.items()}
