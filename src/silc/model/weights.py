"""Released weights: the name maps between silc and Hugging Face transformers, in both directions.

Gives: describe (from families.py), from_transformers, to_transformers, strip_prefixes, LoadReport.
Used by: predict.py and train/pretrain.py to open weights; export/transformers.py to write them.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from silc.config import ImageTowerConfig, ModelConfig
from silc.model.families import SWITCHES, Family, describe, family_of
from silc.model.layers import resize_grid
from silc.model.silc import Silc

# ---------------------------------------------------------------- names: theirs -> ours, {} is the number of the block


def _pairs(layers: dict[str, str]) -> dict[str, str]:
    """Names of layers -> names of their weights and biases."""
    return {f"{theirs}.{kind}": f"{ours}.{kind}" for theirs, ours in layers.items() for kind in ("weight", "bias")}


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
TOWERS = {
    "vision_model.embeddings.patch_embedding.weight": "image.patch.weight",
    "text_model.embeddings.token_embedding.weight": "text.token.weight",
    "text_model.embeddings.position_embedding.weight": "text.position",
    "logit_scale": "logit_scale",
    **_pairs({"vision_model.post_layernorm": "image.norm", "text_model.final_layer_norm": "text.norm"}),
    **_pairs({f"vision_model.encoder.layers.{{}}.{a}": f"image.blocks.{{}}.{b}" for a, b in BLOCK.items()}),
    **_pairs({f"text_model.encoder.layers.{{}}.{a}": f"text.blocks.{{}}.{b}" for a, b in BLOCK.items()}),
}
POSITION = "vision_model.embeddings.position_embedding.weight"
# Several names of ours are stacked along the first axis into one tensor of theirs.
CLIP = {
    "vision_model.embeddings.class_embedding": "image.cls",
    POSITION: "image.cls_position image.position",
    "visual_projection.weight": "image.proj.weight",
    "text_projection.weight": "text.proj.weight",
    **_pairs({"vision_model.pre_layrnorm": "image.pre_norm"}),
}
MAP_HEAD = {
    "vision_model.head.attention.out_proj": "image.head.attention.out",
    "vision_model.head.layernorm": "image.head.norm",
    "vision_model.head.mlp.fc1": "image.head.mlp.up",
    "vision_model.head.mlp.fc2": "image.head.mlp.down",
}
SIGLIP = {
    "vision_model.embeddings.patch_embedding.bias": "image.patch.bias",
    POSITION: "image.position",
    "vision_model.head.probe": "image.head.probe",
    **{
        f"vision_model.head.attention.in_proj_{kind}": " ".join(f"image.head.attention.{x}.{kind}" for x in "qkv")
        for kind in ("weight", "bias")
    },
    **_pairs(MAP_HEAD),
    **_pairs({"text_model.head": "text.proj"}),
    "logit_bias": "logit_bias",
}
NAMES: dict[Family, dict[str, str]] = {"clip": TOWERS | CLIP, "siglip": TOWERS | SIGLIP, "siglip2": TOWERS | SIGLIP}
WRAPPERS = {"module", "_orig_mod", "_fsdp_wrapped_module", "_fpw_module", "_checkpoint_wrapped_module"}

# ---------------------------------------------------------------- tensors


@dataclass
class LoadReport:
    """What became of every tensor; `str()` is a table. Names are ours, except `ignored`, which are the file's."""

    source: str
    loaded: list[str] = field(default_factory=list)
    """Taken from the file, `resized` ones included."""
    new: list[str] = field(default_factory=list)
    """Not in the file: keep their initial values."""
    resized: list[str] = field(default_factory=list)
    """As `image.position 14x14 -> 16x16`."""
    ignored: list[str] = field(default_factory=list)
    """In the file, but not in the model."""

    @property
    def share(self) -> float:
        """Share of the two towers' tensors that the file had, 0 to 1."""
        found, lacking = (sum(_tower_of(n) != "other" for n in names) for names in (self.loaded, self.new))
        return found / max(found + lacking, 1)

    def __str__(self) -> str:
        total = len(self.loaded) + len(self.new)
        lines = [f"Loaded {len(self.loaded)}/{total} tensors from {self.source}.", "  part    loaded   new  resized"]
        for part in ("image", "text", "other"):
            counts = [sum(_tower_of(n) == part for n in names) for names in (self.loaded, self.new, self.resized)]
            lines.append("  {:6}  {:6}  {:4}  {:7}".format(part, *counts))
        for title, names in (("New", self.new), ("Resized", self.resized), ("Ignored", self.ignored)):
            if names:
                more = f" and {len(names) - 8} more" if len(names) > 8 else ""
                lines.append(f"{title}: {', '.join(names[:8])}{more}.")
        return "\n".join(lines)


def _tower_of(name: str) -> str:
    part = name.split(".")[0]
    return part if part in ("image", "text") else "other"


def strip_prefixes(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Drop what DDP, torch.compile, FSDP and activation checkpointing add to names, anywhere and in any nesting.

    ValueError when two tensors end up with one name.
    """
    stripped: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        plain = ".".join(piece for piece in name.split(".") if piece not in WRAPPERS)
        if plain in stripped:
            raise ValueError(f"two tensors of the file are named {plain!r} once wrappers are stripped ({name!r}).")
        stripped[plain] = tensor
    return stripped


def from_transformers(
    hf_config: dict[str, Any],
    tensors: Mapping[str, Tensor],
    preprocessor: dict[str, Any] | None = None,
    minimum: float = 0.9,
) -> tuple[Silc, LoadReport]:
    """Build the model that `hf_config` describes and fill it, in fp32, from their state dict.

    A position table of another grid than the config's is resized. ValueError for a tensor of another shape than the
    config says, and when less than `minimum` of the towers' tensors are there.
    """
    family = family_of(hf_config)
    model = Silc(describe(hf_config, preprocessor)).eval()
    own, template, theirs = model.state_dict(), to_transformers(model, family), strip_prefixes(tensors)
    names = _names(model.config, family)
    report = LoadReport(f"transformers {family}", ignored=[name for name in theirs if name not in names])
    for name, ours in names.items():
        if name not in theirs:
            report.new += ours
            continue
        wanted, tensor = template[name].shape, theirs[name]
        if name == POSITION and tensor.dim() == 2 and tensor.shape != wanted:
            tensor = _resize_position(tensor, model.config.image, report)
        if tensor.shape != wanted or not tensor.is_floating_point():
            got = f"{tuple(tensor.shape)} {str(tensor.dtype).removeprefix('torch.')}"
            raise ValueError(f"tensor {name} is {got}, but the config asks for {tuple(wanted)} in floating point.")
        for part, target in zip(_split(family, name, tensor, [own[o] for o in ours]), ours):
            own[target].copy_(part)
            report.loaded.append(target)
    if report.share < minimum:
        examples = f"the file has names like {next(iter(theirs), 'none')!r}, expected {next(iter(names))!r}"
        raise ValueError(f"only {report.share:.0%} of the towers' tensors were found: {examples}.")
    return model, report


def to_transformers(model: Silc, family: Family | None = None) -> dict[str, Tensor]:
    """The weights under the names and in the shapes of transformers; `from_transformers` gives the same bits back.

    family: by default CLIP or SigLIP, whichever the towers are. A SigLIP model without a logit bias gets a zero one.
    ValueError names the switch that the family does not have.
    """
    config = model.config
    family = family or ("clip" if config.image.pool == "cls" else "siglip")
    for room, tower, switches in zip(("image", "text"), (config.image, config.text), SWITCHES[family]):
        for key, value in switches.items():
            if getattr(tower, key) != value:
                raise ValueError(f"transformers' {family} has {room}.{key} = {value}, not {getattr(tower, key)}.")
    state = model.state_dict()
    if family == "clip" and model.logit_bias is not None:
        raise ValueError("transformers' clip has no logit bias: a model trained with the sigmoid loss does not fit.")
    if family != "clip":
        state.setdefault("logit_bias", torch.zeros(1))
    return {name: _join(family, name, [state[o] for o in ours]) for name, ours in _names(config, family).items()}


def _names(config: ModelConfig, family: Family) -> dict[str, list[str]]:
    """The table with the block numbers filled in."""
    depths = {"vision_model": config.image.depth, "text_model": config.text.depth}
    return {
        theirs.format(i): [name.format(i) for name in ours.split()]
        for theirs, ours in NAMES[family].items()
        for i in range(depths[theirs.split(".")[0]] if "{}" in theirs else 1)
    }


def _join(family: Family, name: str, parts: list[Tensor]) -> Tensor:
    """Our tensors -> their one."""
    joined = torch.cat([p.flatten(0, 1) if p.dim() == 3 else p for p in parts])
    if family == "siglip2" and name.endswith("patch_embedding.weight"):
        return joined.permute(0, 2, 3, 1).flatten(1)  # a linear layer over (row, column, channel)
    if name.endswith("class_embedding") or (family == "clip" and name == "logit_scale"):
        return joined[0]
    return joined[None] if name.endswith("head.probe") else joined


def _split(family: Family, name: str, tensor: Tensor, like: list[Tensor]) -> list[Tensor]:
    """The inverse of `_join`: the same numbers in the same order, cut differently (but for one permuted kernel)."""
    if family == "siglip2" and name.endswith("patch_embedding.weight"):
        _, channels, height, width = like[0].shape
        tensor = tensor.unflatten(1, (height, width, channels)).permute(0, 3, 1, 2)
    return [part.view(t.shape) for part, t in zip(tensor.reshape(-1).split([t.numel() for t in like]), like)]


def _resize_position(table: Tensor, image: ImageTowerConfig, report: LoadReport) -> Tensor:
    extra = 1 if image.pool == "cls" else 0
    side = math.isqrt(max(len(table) - extra, 0))
    if side * side + extra != len(table) or side == 0:
        raise ValueError(f"tensor {POSITION} has {len(table)} rows, which is not a square grid.")
    report.resized.append(f"image.position {side}x{side} -> {image.grid}x{image.grid}")
    grid = resize_grid(table[extra:].unflatten(0, (side, side)), image.grid, image.grid)
    return torch.cat([table[:extra], grid.flatten(0, 1)])
