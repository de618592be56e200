"""big_vision's two-tower checkpoints (`.npz`), the form in which SigLIP was first released: to ours, and back.

Gives: from_big_vision, to_big_vision, layout.
Used by: whoever opens weights or writes them for big_vision.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

from silc.config import ImageTowerConfig, ModelConfig, PreprocessConfig, TextTowerConfig
from silc.model.families import SWITCHES
from silc.model.layout import ROW, TRANSPOSED, Form, Layout, LoadReport, at_size, demand, fill, pairs, pour, tower
from silc.model.silc import Silc

ROOTS = ("img", "txt", "t", "b")
ATTENTION = "MultiHeadDotProductAttention_0"
PROJECTIONS = {f"{ATTENTION}/{theirs}": f"attention.{theirs[0]}" for theirs in ("query", "key", "value")}
MLP = {"MlpBlock_0/Dense_0": "mlp.up", "MlpBlock_0/Dense_1": "mlp.down"}
DENSE = {**PROJECTIONS, f"{ATTENTION}/out": "attention.out", **MLP}
FIXED = {**SWITCHES["siglip"][0], "act": "gelu_tanh", "norm_eps": 1e-6}
FIXED_TEXT = {**SWITCHES["siglip"][1], "act": "gelu_tanh", "norm_eps": 1e-6}


def _dense(layers: Mapping[str, str]) -> dict[str, str]:
    return pairs(layers, ("kernel", "bias"), "/")


def _norms(layers: Mapping[str, str]) -> dict[str, str]:
    return pairs(layers, ("scale", "bias"), "/")


def _encoder(name: str) -> dict[str, str]:
    block = f"{name}/encoderblock_{{}}/"
    norms = {f"{block}LayerNorm_{i}": f"blocks.{{}}.norm{i + 1}" for i in range(2)} | {f"{name}/encoder_norm": "norm"}
    return _dense({block + theirs: f"blocks.{{}}.{ours}" for theirs, ours in DENSE.items()}) | _norms(norms)


IMAGE = {"pos_embedding": "position", **_dense({"embedding": "patch"}), **_encoder("Transformer")}
IMAGE |= {"MAPHead_0/probe": "head.probe", **_norms({"MAPHead_0/LayerNorm_0": "head.norm"})}
IMAGE |= _dense({f"MAPHead_0/{theirs}": f"head.{ours}" for theirs, ours in DENSE.items()})
TEXT = {"Embed_0/embedding": "token.weight", "pos_embedding": "position", **_encoder("Encoder_0")}
TEXT |= _dense({"head": "proj"})


def from_big_vision(
    arrays: Mapping[str, np.ndarray], image_size: int | None = None, minimum: float = 0.9
) -> tuple[Silc, LoadReport]:
    """The two towers of a checkpoint's arrays, in fp32; blocks one by one or stacked (`scan`), bfloat16 or not.

    Sizes and heads are read from the shapes. What these do not tell is as in SigLIP: activation, epsilon, reading the
    last token, pictures squashed to [-1, 1]. ValueError where a name or shape is not such a model's.
    """
    prefix = "params/" if any(name.startswith("params/") for name in arrays) else ""
    ours = {name for name in arrays if name.removeprefix(prefix).partition("/")[0] in ROOTS and name.startswith(prefix)}
    found = _unstacked({name.removeprefix(prefix): _tensor(arrays[name]) for name in arrays if name in ours})
    if "txt/Encoder_0/pos_embedding" in found:  # the oldest checkpoints add two tables
        found["txt/pos_embedding"] = found["txt/pos_embedding"] + found.pop("txt/Encoder_0/pos_embedding")
    model = Silc(at_size(_describe(found), image_size)).eval()
    report = fill(model, layout(model.config), found, "big_vision", minimum)
    report.ignored += [name for name in arrays if name not in ours]
    return model, report


def to_big_vision(model: Silc) -> dict[str, np.ndarray]:
    """The weights under the names and in the shapes of a two-tower SigLIP; `from_big_vision` gives the same bits back.

    ValueError names the setting that SigLIP does not have.
    """
    demand(model.config, "big_vision's SigLIP", FIXED, FIXED_TEXT)
    return {name: tensor.cpu().numpy() for name, tensor in pour(model, layout(model.config)).items()}


def layout(config: ModelConfig) -> Layout:
    ends = {"t": "logit_scale"} if config.bias_init is None else {"t": "logit_scale", "b": "logit_bias"}
    return {
        **tower(IMAGE, config.image.depth, "img/", "image.", _forms(IMAGE, config.image.heads)),
        **tower(TEXT, config.text.depth, "txt/", "text.", _forms(TEXT, config.text.heads)),
        **tower(ends, 1, "", ""),
    }


def _forms(table: Mapping[str, str], heads: int) -> dict[str, Form]:
    forms = {name: TRANSPOSED for name in table if name.endswith("/kernel")}
    split = Form(lambda x: x.unflatten(0, (heads, -1)).movedim(-1, 0), lambda x: x.movedim(0, -1))
    bias = Form(lambda x: x.unflatten(0, (heads, -1)), lambda x: x)
    merge = Form(lambda x: x.unflatten(1, (heads, -1)).movedim(0, -1), lambda x: x.movedim(-1, 0))
    for name in table:
        layer, _, kind = name.rpartition("/")
        if layer.endswith(tuple(PROJECTIONS)):
            forms[name] = split if kind == "kernel" else bias  # [width, heads, d] and [heads, d]
        if layer.endswith(f"{ATTENTION}/out") and kind == "kernel":
            forms[name] = merge  # [heads, d, width]
    forms |= {name: ROW for name in ("pos_embedding", "MAPHead_0/probe") if name in table}
    if "embedding/kernel" in table:
        forms["embedding/kernel"] = Form(lambda x: x.permute(2, 3, 1, 0), lambda x: x.permute(3, 2, 0, 1))
    return forms


def _tensor(array: np.ndarray) -> Tensor:
    if array.dtype.kind == "V" and array.dtype.itemsize == 2:  # NumPy has no bfloat16 and keeps its bytes
        return torch.from_numpy(np.ascontiguousarray(array).view(np.int16)).view(torch.bfloat16)
    if array.dtype.kind not in "fiu":
        raise ValueError(f"the checkpoint holds an array of {array.dtype}, which are no numbers.")
    return torch.from_numpy(np.array(array))


def _unstacked(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Blocks that lie stacked along a first axis, as `scan` leaves them, one by one."""
    single: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        before, stacked, after = name.partition("/encoderblock/")
        if stacked:
            single |= {f"{before}/encoderblock_{i}/{after}": part for i, part in enumerate(tensor)}
        else:
            single[name] = tensor
    return single


def _describe(found: Mapping[str, Tensor]) -> ModelConfig:
    def shape(name: str, *letters: str) -> tuple[int, ...]:
        if name not in found or found[name].dim() != len(letters):
            got = list(found[name].shape) if name in found else "not there"
            raise ValueError(f"{name} is {got}, but big_vision's two towers have it as [{', '.join(letters)}].")
        return tuple(found[name].shape)

    def sizes(block: str) -> dict[str, Any]:
        width, heads, _ = shape(f"{block}_0/{ATTENTION}/query/kernel", "width", "heads", "d")
        _, mlp = shape(f"{block}_0/MlpBlock_0/Dense_0/kernel", "width", "hidden")
        depth = sum(f"{block}_{i}/LayerNorm_0/scale" in found for i in range(len(found)))
        return {"width": width, "depth": depth, "heads": heads, "mlp": mlp}

    shape("img/MAPHead_0/probe", "1", "1", "width")
    patch = shape("img/embedding/kernel", "patch", "patch", "3", "width")[0]
    _, cells, _ = shape("img/pos_embedding", "1", "patches", "width")
    vocab, _ = shape("txt/Embed_0/embedding", "vocabulary", "width")
    _, length, _ = shape("txt/pos_embedding", "1", "length", "width")
    embed_dim = shape("txt/head/kernel", "width", "shared")[1]
    size = math.isqrt(cells) * patch
    return ModelConfig(
        image=ImageTowerConfig(size, patch, **sizes("img/Transformer/encoderblock"), **FIXED),
        text=TextTowerConfig(vocab, length, **sizes("txt/Encoder_0/encoderblock"), eos_id=1, pad_id=1, **FIXED_TEXT),
        preprocess=PreprocessConfig(size, "squash", "bilinear"),
        embed_dim=embed_dim,
        scale_init=10.0,
        bias_init=-10.0 if "b" in found else None,
    )
