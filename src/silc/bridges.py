"""A silc model where other tools expect one of open_clip: in scripts written for it, and in CLIP_benchmark.

Gives: as_open_clip -> (model, preprocess, tokenizer), as open_clip.create_model_and_transforms and get_tokenizer do;
load_silc and register, by which CLIP_benchmark knows `--model_type silc`.
Used by: anyone in Python; and as a program, which is CLIP_benchmark's own command line with that type added:

    python -m silc.bridges eval --model_type silc --model silc --pretrained runs/mine --dataset cifar10
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn

from silc.config import PreprocessConfig
from silc.data.images import normalise, preprocess
from silc.model.silc import Silc
from silc.opening import load
from silc.predict import as_image


class OpenClipLike(nn.Module):
    """The methods and attributes of open_clip's CLIP that scripts use. D is the width of the shared space."""

    def __init__(self, model: Silc) -> None:
        super().__init__()
        self.model = model
        self.logit_scale, self.logit_bias = model.logit_scale, model.logit_bias
        self.context_length = model.config.text.length
        size = model.config.preprocess.size
        self.visual = SimpleNamespace(image_size=(size, size), output_dim=model.config.embed_dim)

    def encode_image(self, image: Tensor, normalize: bool = False) -> Tensor:
        """[B, 3, H, W] as `preprocess` gives -> [B, D]."""
        features = self.model.image([image])[0].pooled
        return F.normalize(features, dim=-1) if normalize else features

    def encode_text(self, text: Tensor, normalize: bool = False) -> Tensor:
        """Ids [B, length] as the tokenizer gives -> [B, D]."""
        features: Tensor = self.model.text(text)
        return F.normalize(features, dim=-1) if normalize else features

    def get_logits(self, image: Tensor, text: Tensor) -> tuple[Tensor, Tensor]:
        logits = self.model.logits(self.encode_image(image, normalize=True), self.encode_text(text, normalize=True))
        return logits, logits.T

    def forward(self, image: Tensor, text: Tensor) -> tuple[Tensor, ...]:
        """(image embeddings, text embeddings, scale[, bias]), embeddings of unit length."""
        features = self.encode_image(image, normalize=True), self.encode_text(text, normalize=True)
        scale = self.logit_scale.exp().reshape(())
        return (*features, scale) if self.logit_bias is None else (*features, scale, self.logit_bias.reshape(()))


@dataclass(frozen=True)
class Preprocess:
    """A Pillow picture -> float32 [3, S, S] as the model was trained on; can be sent to worker processes."""

    config: PreprocessConfig

    def __call__(self, picture: Image.Image) -> Tensor:
        return normalise(preprocess(as_image(picture), self.config), self.config.mean, self.config.std)


@dataclass(frozen=True)
class Tokenize:
    """A text or several -> ids [B, length]. Length and padding are the model's, whatever `context_length` says."""

    model: Silc

    def __call__(self, texts: str | Sequence[str], context_length: int | None = None) -> Tensor:
        return self.model.token_ids([texts] if isinstance(texts, str) else list(texts)).cpu()


def as_open_clip(model: Silc) -> tuple[OpenClipLike, Preprocess, Tokenize]:
    """A silc model as open_clip's functions would give it: (model, preprocess of evaluation, tokenizer)."""
    return OpenClipLike(model).eval(), Preprocess(model.config.preprocess), Tokenize(model)


def load_silc(
    model_name: str, pretrained: str, cache_dir: str | None = None, device: str | torch.device = "cpu"
) -> tuple[OpenClipLike, Preprocess, Tokenize]:
    """What CLIP_benchmark calls: `pretrained` is anything that silc.load opens; `model_name` only names the row."""
    return as_open_clip(load(Path(pretrained) if Path(pretrained).exists() else pretrained).to(device))


def register() -> None:
    """Make `--model_type silc` known to CLIP_benchmark, in this process. ValueError if it is not installed."""
    try:
        from clip_benchmark import models
    except ImportError as error:
        raise ValueError(f"CLIP_benchmark is not here ({error}): pip install clip-benchmark") from None
    if "silc" not in models.TYPE2FUNC:
        models.TYPE2FUNC["silc"] = load_silc
        models.MODEL_TYPES.append("silc")


if __name__ == "__main__":
    register()
    from clip_benchmark.cli import main

    main()
