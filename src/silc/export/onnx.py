"""A model as two ONNX graphs: pictures to embedding and dense features, token ids to embeddings.

Gives: write (the folder), peer (that folder in onnxruntime).
Used by: app/exporting. Needs the extra `onnx`.
"""

from __future__ import annotations

import contextlib
import io
import json
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from silc.data.tokenizer import Tokenizer, load_tokenizer
from silc.export.check import Peer
from silc.export.transformers import write_tokenizer
from silc.model.silc import Silc
from silc.plain import to_dict

MISSING = 'ONNX export needs its packages ({error}): pip install "silc[onnx]".'


class ImageGraph(nn.Module):
    """Both readings of a picture; the blocks that they share run once."""

    def __init__(self, model: Silc) -> None:
        super().__init__()
        self.tower = model.image

    def forward(self, pixels: Tensor) -> tuple[Tensor, Tensor]:
        """[B, 3, H, W] normalised -> embedding [B, D] and dense [B, D, h, w], both of unit length over D."""
        tower, x = self.tower, self.tower.embed(pixels)
        batch, tokens, _ = x.shape
        shapes, blocks = ((batch, tokens),), list(tower.blocks)
        x = x.flatten(0, 1)
        cls = tower.config.pool == "cls"
        for block in blocks[:-1]:
            x = block(x, shapes)
        last: Any = blocks[-1]
        pooled = tower.norm(last(x, shapes))
        dense = tower.norm(last.value_path(x)) if cls else pooled  # the read-out `auto` of ImageTower.dense
        if tower.config.pool == "map":
            embedding, dense = tower.head(pooled, shapes)[0], tower.head.per_patch(dense)
        else:
            whole = pooled.unflatten(0, (batch, tokens))
            embedding = whole[:, 0] if cls else whole.mean(1)
        patches = tower.proj(dense).unflatten(0, (batch, tokens))[:, int(cls) :]
        grid = [side // tower.config.patch for side in pixels.shape[-2:]]
        maps = patches.transpose(1, 2).unflatten(2, grid)
        return F.normalize(tower.proj(embedding), dim=-1), F.normalize(maps, dim=1)


class TextGraph(nn.Module):
    def __init__(self, model: Silc) -> None:
        super().__init__()
        self.tower = model.text

    def forward(self, ids: Tensor) -> Tensor:
        """int64 [B, length] -> [B, D], unit length."""
        return F.normalize(self.tower(ids), dim=-1)


def write(model: Silc, folder: Path, size: tuple[int, int] | None = None) -> None:
    """image.onnx, text.onnx, silc.json (preprocessing, scale, bias, names), the tokenizer's files.

    The batch is free; height and width are `size`, or the model's own. ValueError if the packages are missing, or for a
    size that the patches do not divide."""
    side, patch = model.config.image.image_size, model.config.image.patch
    height, width = size or (side, side)
    if height % patch or width % patch or min(height, width) <= 0:
        raise ValueError(f"--size {height} {width} is not a multiple of the patch of {patch} px.")
    folder.mkdir(parents=True, exist_ok=True)
    pixels = torch.zeros(2, 3, height, width)
    _export(ImageGraph(model), pixels, folder / "image.onnx", ["pixels"], ["image_embedding", "dense"])
    ids = torch.zeros(2, model.config.text.length, dtype=torch.long)
    _export(TextGraph(model), ids, folder / "text.onnx", ["ids"], ["text_embedding"])
    bias = None if model.bias is None else model.bias.item()
    said = {"pixels": [3, height, width], "length": model.config.text.length, "embed_dim": model.config.embed_dim,
            "preprocess": to_dict(model.config.preprocess), "scale": model.scale.item(), "bias": bias}  # fmt: skip
    (folder / "silc.json").write_text(json.dumps(said, indent=2) + "\n")
    if isinstance(model.tokenizer, Tokenizer):
        write_tokenizer(model.tokenizer, folder, "CLIPProcessor")
        model.tokenizer.save(folder / "tokenizer")


def _export(graph: nn.Module, example: Tensor, file: Path, inputs: list[str], outputs: list[str]) -> None:
    free = {0: torch.export.Dim("batch", min=1)}
    quiet = contextlib.redirect_stdout(io.StringIO())
    try:
        with warnings.catch_warnings(action="ignore"), quiet, torch.no_grad():
            torch.onnx.export(graph.eval(), (example,), file, input_names=inputs, output_names=outputs,
                              dynamic_shapes=(free,), dynamo=True, external_data=False, verbose=False)  # fmt: skip
    except ImportError as error:
        raise ValueError(MISSING.format(error=error)) from None


def peer(folder: Path) -> Peer:
    """The graphs in onnxruntime. ValueError if it is missing."""
    try:
        import onnxruntime
    except ImportError as error:
        raise ValueError(MISSING.format(error=error)) from None
    said = json.loads((folder / "silc.json").read_text())
    image, text = (onnxruntime.InferenceSession(folder / f"{name}.onnx", providers=["CPUExecutionProvider"])
                   for name in ("image", "text"))  # fmt: skip
    tokenizer = load_tokenizer(folder / "tokenizer")

    def run(session: Any, name: str, given: np.ndarray, which: int) -> Tensor:
        return torch.from_numpy(session.run(None, {name: given})[which])

    def texts(captions: list[str]) -> Tensor:
        return run(text, "ids", tokenizer(captions).numpy(), 0)

    def logits(pixels: Tensor, captions: list[str]) -> Tensor:
        cosine = run(image, "pixels", pixels.numpy(), 0) @ texts(captions).T
        return cosine * said["scale"] + (said["bias"] or 0.0)

    return Peer(
        "onnxruntime",
        image=lambda pixels: run(image, "pixels", pixels.numpy(), 0),
        text=texts,
        logits=logits,
        dense=lambda pixels: run(image, "pixels", pixels.numpy(), 1),
        size=tuple(said["pixels"][1:]),
    )
