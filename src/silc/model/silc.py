"""Silc: an image tower and a text tower in one space, with a temperature.

Gives: Silc (encode_image, encode_text, encode_dense, patch_text_map, segment, save, open).
Used by: everyone who holds a model; training reaches the towers through it.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from silc.config import ModelConfig
from silc.model.catseg import CatSeg
from silc.model.towers import ImageTower, Readout, TextTower
from silc.plain import from_dict, to_dict
from silc.tensors import save_tensors

CONFIG_NAME, WEIGHTS_NAME = "config.json", "model.safetensors"


class Silc(nn.Module):
    """Two towers in one space. Shapes: B batch, T texts, D = config.embed_dim, h x w the patch grid.

    `tokenizer` (texts -> ids) is attached by whoever loads the model; without one, `encode_text` takes ids only.
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        self.image = ImageTower(config.image, config.embed_dim)
        self.text = TextTower(config.text, config.embed_dim)
        # shape [1], not 0-D: sharded training refuses scalars
        self.logit_scale = nn.Parameter(torch.full((1,), math.log(config.scale_init)))
        self.logit_bias: nn.Parameter | None
        bias = None if config.bias_init is None else nn.Parameter(torch.full((1,), config.bias_init))
        self.register_parameter("logit_bias", bias)
        c = config
        has_head = c.catseg.layers > 0
        self.catseg = CatSeg(c.catseg, c.embed_dim, c.image.width, c.image.grid) if has_head else None
        self.tokenizer: Callable[[list[str]], Tensor] | None = None

    @property
    def scale(self) -> Tensor:
        """Inverse temperature exp(logit_scale), [1]."""
        return self.logit_scale.exp()

    @property
    def bias(self) -> Tensor | None:
        return None if self.logit_bias is None else self.logit_bias + 0

    @property
    def device(self) -> torch.device:
        return self.logit_scale.device

    def encode_image(self, pixels: Tensor) -> Tensor:
        """Normalised pixels [B, 3, H, W], H and W any multiples of the patch -> [B, D], unit length."""
        return F.normalize(self.image([pixels])[0].pooled.float(), dim=-1)

    def encode_pooled(self, pixels: Tensor) -> Tensor:
        """[B, 3, H, W] -> [B, width]: pooled, before projection and normalisation; what probes read (`pre_logits`)."""
        return self.image([pixels], project=False)[0].pooled.float()

    def project(self, pooled: Tensor) -> Tensor:
        """[B, width] of `encode_pooled` -> [B, D] of `encode_image`."""
        return F.normalize(self.image.proj(pooled).float(), dim=-1)

    def encode_text(self, texts: Sequence[str] | Tensor) -> Tensor:
        """Texts, or their ids [B, length] -> [B, D], unit length. Case, end token and padding are the tokenizer's."""
        return F.normalize(self.text(self.token_ids(texts)).float(), dim=-1)

    def token_ids(self, texts: Sequence[str] | Tensor) -> Tensor:
        if isinstance(texts, Tensor):
            return texts.to(self.device)
        if isinstance(texts, str):
            raise ValueError("encode_text takes a list of texts: pass [text] for a single one.")
        if self.tokenizer is None:
            raise ValueError("this model has no tokenizer: load it with silc.load(...), or pass token ids.")
        return self.tokenizer(list(texts)).to(self.device)

    def encode_dense(self, pixels: Tensor, readout: Readout = "auto") -> Tensor:
        """[B, 3, H, W] -> [B, D, h, w]: every patch in the space of the text, unit length over D.

        The read-out that fits the pooling is chosen by `auto`; see ImageTower.dense.
        """
        return F.normalize(self.image.dense(pixels, readout).float(), dim=1)

    def patch_text_map(self, pixels: Tensor, texts: Sequence[str] | Tensor, readout: Readout = "auto") -> Tensor:
        """Cosine of every pixel with every text: [B, 3, H, W] and T texts -> [B, T, H, W], bilinear between patches."""
        maps = torch.einsum("bdhw,td->bthw", self.encode_dense(pixels, readout), self.encode_text(texts))
        return F.interpolate(maps, pixels.shape[-2:], mode="bilinear", align_corners=False)

    def segment(self, pixels: Tensor, text: Tensor) -> Tensor:
        """Logits [B, T, 4h, 4w] of T classes from the CAT-Seg head: [B, 3, S, S] of the model's own size, text [T, D].

        Each is a class's own (a sigmoid, not a softmax). ValueError for a model without such a head."""
        if self.catseg is None:
            raise ValueError("this model has no head for segmentation: train one with `silc train catseg`.")
        dense, inner = self.image.dense_and_inner(pixels, "catseg")
        return self.catseg(dense, text, inner)

    def logits(self, image: Tensor, text: Tensor) -> Tensor:
        """Scaled (and, for sigmoid models, shifted) similarities [B, T] of unit-length embeddings."""
        logits = image @ text.T * self.scale
        return logits if self.bias is None else logits + self.bias

    def save(self, folder: Path, extra: dict[str, Any] | None = None) -> None:
        """Write config.json and model.safetensors, in which `open` finds everything it needs."""
        folder.mkdir(parents=True, exist_ok=True)
        described = {"library": "silc", "format": 1, "model": to_dict(self.config), **(extra or {})}
        (folder / CONFIG_NAME).write_text(json.dumps(described, indent=2) + "\n")
        save_tensors(self.state_dict(), folder / WEIGHTS_NAME)

    @classmethod
    def open(cls, folder: Path) -> Silc:
        """Read a folder written by `save`; strict. ValueError says what is missing or does not fit."""
        for name in (CONFIG_NAME, WEIGHTS_NAME):
            if not (folder / name).is_file():
                raise ValueError(f"{folder} is not a silc model: {name} is missing.")
        try:
            described = json.loads((folder / CONFIG_NAME).read_text())
            tensors = load_file(folder / WEIGHTS_NAME)
        except (json.JSONDecodeError, UnicodeDecodeError, SafetensorError) as error:
            raise ValueError(f"{folder} holds a damaged model ({error}).") from None
        if not isinstance(described, dict) or described.get("library") != "silc" or "model" not in described:
            raise ValueError(f"{folder / CONFIG_NAME} was not written by silc.")
        try:
            model = cls(from_dict(ModelConfig, described["model"]))
        except ValueError as error:
            raise ValueError(f"{folder / CONFIG_NAME}: {error}") from None
        try:
            model.load_state_dict(tensors)
        except RuntimeError as error:
            raise ValueError(f"{folder}: weights do not fit their config.json: {error}") from None
        return model.eval()
