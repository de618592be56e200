"""Released weights: the name maps between silc and Hugging Face transformers, in both directions.

Gives: describe (from families.py), from_transformers, to_transformers, LoadReport (from layout.py).
Used by: whoever opens weights; export/transformers.py to write them.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from silc.config import ModelConfig
from silc.model.families import SWITCHES, Family, describe, family_of
from silc.model.layout import (
    ROW,
    SAME,
    SCALAR,
    Form,
    Layout,
    LoadReport,
    Place,
    at_size,
    demand,
    fill,
    pairs,
    pour,
    tower,
)
from silc.model.silc import Silc

BLOCK = {
    "layer_norm1": "norm1",
    "layer_norm2": "norm2",
    "self_attn.q_proj": "attention.q",
    "self_attn.k_proj": "attention.k",
    "self_attn.v_proj": "attention.v",
    "self_attn.out_proj": "attention.out",
    "mlp.fc1": "mlp.up",
    "mlp.fc2": "mlp.down",
}
BLOCKS = pairs({f"encoder.layers.{{}}.{theirs}": f"blocks.{{}}.{ours}" for theirs, ours in BLOCK.items()})
POSITION = "embeddings.position_embedding.weight"
IMAGE = {"embeddings.patch_embedding.weight": "patch.weight", **pairs({"post_layernorm": "norm"}), **BLOCKS}
CLIP_IMAGE = IMAGE | {
    "embeddings.class_embedding": "cls",
    POSITION: "cls_position position",
    **pairs({"pre_layrnorm": "pre_norm"}),
}
SIGLIP_IMAGE = IMAGE | {
    "embeddings.patch_embedding.bias": "patch.bias",
    POSITION: "position",
    "head.probe": "head.probe",
    **pairs({"head.attention.in_proj": "head.attention.q head.attention.k head.attention.v"}, dot="_"),
    **pairs({"head.attention.out_proj": "head.attention.out", "head.layernorm": "head.norm"}),
    **pairs({"head.mlp.fc1": "head.mlp.up", "head.mlp.fc2": "head.mlp.down"}),
}
TEXT = {
    "embeddings.token_embedding.weight": "token.weight",
    POSITION: "position",
    **pairs({"final_layer_norm": "norm"}),
    **BLOCKS,
}


def from_transformers(
    hf_config: dict[str, Any],
    tensors: Mapping[str, Tensor],
    preprocessor: dict[str, Any] | None = None,
    minimum: float = 0.9,
    image_size: int | None = None,
) -> tuple[Silc, LoadReport]:
    """Build the model that `hf_config` describes, for pictures of `image_size` pixels where given, and fill it, in
    fp32, from their state dict.

    A position table of another grid than the model's is resized. ValueError for a tensor of another shape than the
    config says, and when less than `minimum` of the towers' tensors are there.
    """
    family = family_of(hf_config)
    model = Silc(at_size(describe(hf_config, preprocessor), image_size)).eval()
    return model, fill(model, layout(model.config, family), tensors, f"transformers {family}", minimum)


def to_transformers(model: Silc, family: Family | None = None) -> dict[str, Tensor]:
    """The weights under the names and in the shapes of transformers; `from_transformers` gives the same bits back.

    family: by default CLIP or SigLIP, whichever the towers are. A SigLIP model without a logit bias gets a zero one.
    ValueError names the switch that the family does not have.
    """
    config = model.config
    family = family or ("clip" if config.image.pool == "cls" else "siglip")
    demand(config, f"transformers' {family}", *SWITCHES[family])
    if family == "clip" and model.logit_bias is not None:
        raise ValueError("transformers' clip has no logit bias: a model trained with the sigmoid loss does not fit.")
    names = layout(config, family)
    if family != "clip" and model.logit_bias is None:
        del names["logit_bias"]
        return {**pour(model, names), "logit_bias": torch.zeros(1)}
    return pour(model, names)


def layout(config: ModelConfig, family: Family) -> Layout:
    patch, clip = config.image.patch, family == "clip"
    image_forms = {"embeddings.class_embedding": SCALAR, "head.probe": ROW}
    if family == "siglip2":  # a linear layer over (row, column, channel)
        image_forms["embeddings.patch_embedding.weight"] = Form(
            lambda x: x.permute(0, 2, 3, 1).flatten(1), lambda x: x.unflatten(1, (patch, patch, 3)).permute(0, 3, 1, 2))
    places = {
        **tower(CLIP_IMAGE if clip else SIGLIP_IMAGE, config.image.depth, "vision_model.", "image.", image_forms),
        **tower(TEXT, config.text.depth, "text_model.", "text."),
        "logit_scale": Place(["logit_scale"], SCALAR if clip else SAME),
    }
    if clip:
        ends = {"visual_projection.weight": "image.proj.weight", "text_projection.weight": "text.proj.weight"}
    else:
        ends = {**pairs({"text_model.head": "text.proj"}), "logit_bias": "logit_bias"}
    return places | tower(ends, 1, "", "")
