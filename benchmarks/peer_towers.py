"""The same weights in open_clip's towers: from the names of silc to those of open_clip.

Gives: open_clip_names (a state, or gradients, by its names), open_clip_model (a CLIP with silc's weights), stir.
Used by: inference.py, step.py, gpu_step.py.
"""

from __future__ import annotations

from collections.abc import Mapping
from types import ModuleType

import torch
from torch import Tensor, nn

from silc.model.silc import Silc

OUTER = {
    "image.patch.weight": "visual.conv1.weight",
    "image.pre_norm": "visual.ln_pre",
    "image.norm": "visual.ln_post",
    "text.token.weight": "token_embedding.weight",
    "text.position": "positional_embedding",
    "text.norm": "ln_final",
    "logit_scale": "logit_scale",
}
INNER = {
    "norm1": "ln_1",
    "norm2": "ln_2",
    "attention.out": "attn.out_proj",
    "mlp.up": "mlp.c_fc",
    "mlp.down": "mlp.c_proj",
}


def stir(model: nn.Module, seed: int = 0) -> nn.Module:
    """Noise on every parameter: a zero bias or a unit norm would hide a mistake of the names."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(torch.randn(p.shape, generator=generator) * 0.02)
    return model


def open_clip_names(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Tensors of a silc CLIP (class token, norm before the blocks, causal text) by the names of open_clip's `CLIP`.

    Every rule is linear, so it maps gradients too.
    """
    out = {"visual.class_embedding": state["image.cls"][0], "visual.proj": state["image.proj.weight"].T}
    grid = state["image.position"].flatten(0, 1)
    out["visual.positional_embedding"] = torch.cat([state["image.cls_position"], grid])
    out["text_projection"] = state["text.proj.weight"].T
    for ours, theirs in OUTER.items():
        out |= {theirs + name.removeprefix(ours): x for name, x in state.items() if name.startswith(ours)}
    out["positional_embedding"] = state["text.position"]
    out["logit_scale"] = state["logit_scale"][0]
    for tower, place in (("image", "visual.transformer"), ("text", "transformer")):
        depth = len({name.split(".")[2] for name in state if name.startswith(f"{tower}.blocks.")})
        for i in range(depth):
            mine, block = f"{tower}.blocks.{i}", f"{place}.resblocks.{i}"
            for kind in ("weight", "bias"):
                parts = [state[f"{mine}.attention.{n}.{kind}"] for n in "qkv"]
                out[f"{block}.attn.in_proj_{kind}"] = torch.cat(parts)
                out |= {f"{block}.{theirs}.{kind}": state[f"{mine}.{ours}.{kind}"] for ours, theirs in INNER.items()}
    return {name: x.contiguous() for name, x in out.items()}


def open_clip_model(open_clip: ModuleType, model: Silc) -> nn.Module:
    """open_clip's `CLIP` of the same sizes and activation, with the weights of `model`."""
    c, image, text = model.config, model.config.image, model.config.text
    vision_cfg = {
        "image_size": image.image_size,
        "layers": image.depth,
        "width": image.width,
        "patch_size": image.patch,
    }
    vision_cfg |= {"head_width": image.width // image.heads, "mlp_ratio": image.mlp / image.width}
    text_cfg = {"context_length": text.length, "vocab_size": text.vocab, "width": text.width, "heads": text.heads}
    text_cfg |= {"layers": text.depth, "mlp_ratio": text.mlp / text.width, "pool_type": "eos", "eos_id": text.eos_id}
    quick = {"quick_gelu": True, "gelu": False}[image.act]
    peer = open_clip.model.CLIP(c.embed_dim, vision_cfg, text_cfg, quick_gelu=quick)
    peer.load_state_dict(open_clip_names(model.state_dict()))
    return peer
