"""A model as open_clip has it, in the layout of its Hub folders.

Gives: write (the folder), as_folder (of a checkpoint), peer (that folder as open_clip opens it).
Used by: app/exporting.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from silc.data.tokenizer import Tokenizer
from silc.export.check import Peer, unusable
from silc.export.transformers import write_tokenizer
from silc.model.layout import strip_prefixes
from silc.model.open_clip import to_open_clip
from silc.model.silc import Silc
from silc.tensors import save_tensors


def write(model: Silc, folder: Path) -> None:
    """open_clip_config.json, open_clip_model.safetensors, the tokenizer's files. ValueError names what cannot be
    expressed."""
    config, tensors = to_open_clip(model)
    folder.mkdir(parents=True, exist_ok=True)
    if isinstance(model.tokenizer, Tokenizer):
        write_tokenizer(model.tokenizer, folder, "CLIPProcessor")
        # without a name open_clip takes CLIP's own byte pairs; with any it looks beside the weights of a `local-dir:`
        config["model_cfg"]["text_cfg"]["hf_tokenizer_name"] = "."
    (folder / "open_clip_config.json").write_text(json.dumps(config, indent=2) + "\n")
    save_tensors(tensors, folder / "open_clip_model.safetensors", {"format": "pt"})


def as_folder(settings: Mapping[str, Any], tensors: Mapping[str, Tensor], folder: Path) -> None:
    """A checkpoint of open_clip, as it is, where `peer` finds it: its own settings, the names without wrappers."""
    whole = settings if "model_cfg" in settings else {"model_cfg": settings}
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "open_clip_config.json").write_text(json.dumps(whole) + "\n")
    save_tensors(strip_prefixes(tensors), folder / "open_clip_model.safetensors", {"format": "pt"})


def peer(folder: Path) -> Peer:
    """The model in `folder` by open_clip's own factory. ValueError if open_clip is missing."""
    try:
        import open_clip
    except (ImportError, RuntimeError) as error:
        raise unusable("open_clip", "pip install open_clip_torch", error) from None
    model, _, transform = open_clip.create_model_and_transforms(f"local-dir:{folder}")
    tokenizer = open_clip.get_tokenizer(f"local-dir:{folder}")
    model.eval()

    def logits(pixels: Tensor, texts: list[str]) -> Tensor:
        found: Tensor = model.get_logits(pixels, ids(texts))[0]
        return found

    def ids(texts: list[str]) -> Tensor:
        found: Tensor = tokenizer(texts)
        return found

    return Peer(
        "open_clip",
        image=model.encode_image,
        text=lambda texts: model.encode_text(ids(texts)),
        logits=logits,
        dense=lambda pixels: _dense(model.visual, pixels),
        pixels=transform,
    )


def _dense(visual: Any, pixels: Tensor) -> Tensor:
    """Every patch in the space of the text, by open_clip's (or timm's) layers: see export/transformers._dense."""
    if hasattr(visual, "trunk"):
        trunk = visual.trunk
        tokens, pool = trunk.forward_features(pixels), trunk.attn_pool
        value = pool.kv(tokens).chunk(2, -1)[1]
        x = pool.proj(value)
        x = visual.head(x + pool.mlp(pool.norm(x)))
        patch = trunk.patch_embed.patch_size[0]
    else:
        x, last = _before_last(visual, pixels), visual.transformer.resblocks[-1]
        width = x.shape[-1]
        value = F.linear(last.ln_1(x), last.attn.in_proj_weight[2 * width :], last.attn.in_proj_bias[2 * width :])
        x = x + last.attn.out_proj(value)
        x = visual.ln_post(x + last.mlp(last.ln_2(x)))[:, 1:] @ visual.proj
        patch = visual.conv1.kernel_size[0]
    return x.transpose(1, 2).unflatten(2, [side // patch for side in pixels.shape[-2:]])


def _before_last(visual: Any, pixels: Tensor) -> Tensor:
    """What enters the last block, [B, 1 + N, width]."""
    seen: list[Tensor] = []
    hook = visual.transformer.resblocks[-1].register_forward_pre_hook(lambda module, given: seen.append(given[0]))
    with torch.no_grad():
        visual(pixels)
    hook.remove()
    x = seen[0]
    return x if visual.transformer.batch_first else x.transpose(0, 1)
