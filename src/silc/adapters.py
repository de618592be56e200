"""Models of other libraries, as they are in memory, behind the interface that every evaluation task uses.

Gives: from_transformers (CLIP, SigLIP, SigLIP 2), from_open_clip (its ViTs, and SigLIP's through timm), Adapter.
Used by: anyone in Python who wants to score the model they have: `silc.eval.run.evaluate(from_open_clip(...), sets)`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from silc.config import Activation, ImageTowerConfig, ModelConfig, PreprocessConfig, TextTowerConfig
from silc.model import layout, open_clip, timm, weights
from silc.model.families import family_of
from silc.model.silc import Silc
from silc.model.towers import ImageTower, Readout
from silc.plain import from_dict

PROBE = torch.linspace(-3, 3, 13)
"""Where an activation is looked at to tell which one it is."""


class Adapter(Silc):
    """A `Silc` to every task, whose embeddings another library computes.

    Images and texts go through the library's own forward. Dense features need the inside of the last block, so they
    come from our image tower filled with a copy of the live weights: made at the first call, again whenever those
    have changed, and refused if its image embedding is not the library's.
    """

    def __init__(self, model: nn.Module, config: ModelConfig) -> None:
        nn.Module.__init__(self)
        self.model: Any = model
        self.config = config
        self.tokenizer: Callable[[list[str]], Tensor] | None = None
        self._copy: tuple[object, ImageTower] | None = None

    @property
    def scale(self) -> Tensor:
        scale: Tensor = self.model.logit_scale.exp().reshape(1)
        return scale

    @property
    def bias(self) -> Tensor | None:
        bias = getattr(self.model, "logit_bias", None)
        return None if bias is None else bias.reshape(1) + 0

    @property
    def device(self) -> torch.device:
        return self._like.device

    @property
    def _like(self) -> Tensor:
        return next(p for p in self.model.parameters() if p.is_floating_point())

    def encode_image(self, pixels: Tensor) -> Tensor:
        return F.normalize(self._image(pixels.to(self._like)).float(), dim=-1)

    def encode_pooled(self, pixels: Tensor) -> Tensor:
        """What probes read: the image embedding before normalisation; of a CLIP of transformers before projection."""
        return self._image(pixels.to(self._like)).float()

    def project(self, pooled: Tensor) -> Tensor:
        """What `encode_pooled` gave -> what `encode_image` gives."""
        return F.normalize(pooled, dim=-1)

    def encode_text(self, texts: Sequence[str] | Tensor) -> Tensor:
        return F.normalize(self._text(self.token_ids(texts)).float(), dim=-1)

    def encode_dense(self, pixels: Tensor, readout: Readout = "auto") -> Tensor:
        """As `Silc.encode_dense`, without gradients. ValueError if the image tower is none of ours."""
        with torch.no_grad():
            return F.normalize(self._tower().dense(pixels.float(), readout).float(), dim=1)

    def save(self, folder: Path, extra: dict[str, Any] | None = None) -> None:
        raise ValueError("this model belongs to another library: save it there, and open the folder with silc.load.")

    def _tower(self) -> ImageTower:
        parameters = list(self.model.parameters())
        state = tuple((p.data_ptr(), p.device, 0 if p.is_inference() else p._version) for p in parameters)
        if self._copy is None or self._copy[0] != state:
            # a task runs in inference mode, whose tensors could not be used outside of it later
            with torch.inference_mode(False), torch.no_grad():
                tower = self._build().to(self.device).eval()
                self._check(tower)
            self._copy = (state, tower)
        return self._copy[1]

    def _check(self, tower: ImageTower) -> None:
        size, training = self.config.image.image_size, self.model.training
        picture = torch.randn(1, 3, size, size, generator=torch.Generator().manual_seed(0)).to(self.device)
        self.model.eval()
        theirs, ours = self.encode_image(picture), F.normalize(tower([picture])[0].pooled, dim=-1)
        self.model.train(training)
        exact = self._like.dtype in (torch.float32, torch.float64)
        if not (theirs - ours).norm() < (1e-3 if exact else 5e-2):
            raise ValueError("no dense features: silc's image tower with this model's weights gives other embeddings "
                             "than the model itself, so something in it is unlike a plain CLIP or SigLIP.")

    def _image(self, pixels: Tensor) -> Tensor:
        raise NotImplementedError

    def _text(self, ids: Tensor) -> Tensor:
        raise NotImplementedError

    def _build(self) -> ImageTower:
        raise NotImplementedError


# ---------------------------------------------------------------- transformers


def from_transformers(model: nn.Module, processor: Any) -> Silc:
    """A CLIPModel, SiglipModel or Siglip2Model of transformers with its processor (`image_processor`, `tokenizer`).

    Pictures are resized, cropped and normalised as the image processor's settings say, a SigLIP 2 of flexible
    resolution at its square size. ValueError for another kind of model.
    """
    return _Transformers(model, processor)


class _Transformers(Adapter):
    def __init__(self, model: Any, processor: Any) -> None:
        self.described = model.config.to_dict() if hasattr(model, "config") else {}
        self.family = family_of(self.described)
        super().__init__(model, weights.describe(self.described, processor.image_processor.to_dict()))
        length = self.config.text.length

        def tokenize(texts: list[str]) -> Tensor:
            settings = {"padding": "max_length", "truncation": True, "max_length": length, "return_tensors": "pt"}
            ids: Tensor = processor.tokenizer(texts, **settings)["input_ids"]
            return ids

        self.tokenizer = tokenize

    def _image(self, pixels: Tensor) -> Tensor:
        patch, size = self.config.image.patch, self.config.image.image_size
        if self.family != "siglip2":
            grown = {} if pixels.shape[-2:] == (size, size) else {"interpolate_pos_encoding": True}
            return _pooled(self.model.get_image_features(pixel_values=pixels, **grown))
        rows, columns = (side // patch for side in pixels.shape[-2:])
        cut = pixels.unfold(2, patch, patch).unfold(3, patch, patch)  # [B, 3, rows, columns, patch, patch]
        patches = cut.permute(0, 2, 3, 4, 5, 1).flatten(3).flatten(1, 2)
        seen = torch.ones(patches.shape[:2], dtype=torch.long, device=pixels.device)
        shapes = torch.tensor([[rows, columns]] * len(pixels), device=pixels.device)
        found = self.model.get_image_features(
            pixel_values=patches, pixel_attention_mask=seen, spatial_shapes=shapes)
        return _pooled(found)

    def _text(self, ids: Tensor) -> Tensor:
        # no mask: CLIP never looks behind its end token, and SigLIP was trained to see its padding
        return _pooled(self.model.get_text_features(input_ids=ids))

    def encode_pooled(self, pixels: Tensor) -> Tensor:
        if self.family != "clip":
            return super().encode_pooled(pixels)
        found: Tensor = self.model.vision_model(pixel_values=pixels.to(self._like)).pooler_output.float()
        return found

    def project(self, pooled: Tensor) -> Tensor:
        return super().project(self.model.visual_projection(pooled.to(self._like)).float()
                               if self.family == "clip" else pooled)

    def _build(self) -> ImageTower:
        return weights.from_transformers(self.described, self.model.state_dict())[0].image


def _pooled(found: Any) -> Tensor:
    """Up to version 4 the features themselves, since 5 an output that holds them."""
    features: Tensor = found if isinstance(found, Tensor) else found.pooler_output
    return features


# ---------------------------------------------------------------- open_clip


def from_open_clip(model: nn.Module, preprocess: Any, tokenizer: Callable[[list[str]], Tensor]) -> Silc:
    """A model of open_clip with what `create_model_and_transforms` and `get_tokenizer` give for it.

    `preprocess` is the transform of evaluation, read for its size, crop, interpolation, mean and std. Any image tower
    gives image embeddings; dense features are there for its ViTs with a CLS token and for timm's with attention
    pooling (SigLIP), elsewhere a ValueError. One too for a transform that silc has no equal of.
    """
    return _OpenClip(model, preprocess, tokenizer)


class _OpenClip(Adapter):
    def __init__(self, model: Any, preprocess: Any, tokenizer: Callable[[list[str]], Tensor]) -> None:
        seen = _read_transform(preprocess)
        trunk = getattr(model.visual, "trunk", model.visual)
        reader = next((read for has, read in READERS if all(hasattr(trunk, name) for name in has)), None)
        self.read = reader(trunk, seen.size) if reader else None
        image = self.read[0] if self.read else ImageTowerConfig(image_size=seen.size, patch=seen.size)
        length = int(getattr(model, "context_length", 77))
        super().__init__(model, ModelConfig(image=image, text=TextTowerConfig(length=length), preprocess=seen))
        self.trunk = [trunk]  # in a list, else its weights would be counted twice
        self.tokenizer = tokenizer

    def _image(self, pixels: Tensor) -> Tensor:
        features: Tensor = self.model.encode_image(pixels)
        return features

    def _text(self, ids: Tensor) -> Tensor:
        features: Tensor = self.model.encode_text(ids)
        return features

    def _build(self) -> ImageTower:
        if self.read is None:
            raise ValueError(f"no dense features: silc does not know image towers like {type(self.trunk[0]).__name__}.")
        config, names, forms = self.read
        state = self.trunk[0].state_dict()
        tower = ImageTower(config, state["proj"].shape[1] if "proj" in state else config.width)
        placed = layout.tower(names, config.depth, "", "image.", forms)
        report = layout.fill(nn.ModuleDict({"image": tower}), placed, state, "open_clip", minimum=0.0)
        if report.new:
            missing = ", ".join(name.removeprefix("image.") for name in report.new[:4])
            raise ValueError(f"no dense features: the image tower has nothing for {missing}.")
        if report.ignored:
            raise ValueError(f"no dense features: silc's image tower has no place for {', '.join(report.ignored[:4])}.")
        return tower


Reader = tuple[ImageTowerConfig, dict[str, str], dict[str, layout.Form]]
"""Settings, its names -> ours, and the form of some."""


def _vision_transformer(trunk: Any, size: int) -> Reader:
    """open_clip's own ViT."""
    blocks = trunk.transformer.resblocks
    first, depth, pre_norm = blocks[0], len(blocks), isinstance(trunk.ln_pre, nn.LayerNorm)
    config = ImageTowerConfig(
        image_size=size, patch=trunk.conv1.kernel_size[0], width=trunk.conv1.out_channels, depth=depth,
        heads=first.attn.num_heads, mlp=first.mlp.c_fc.out_features, act=_activation(first.mlp.gelu),
        norm_eps=first.ln_1.eps, pool="cls", pre_norm=pre_norm, patch_bias=trunk.conv1.bias is not None, proj="linear")
    return config, open_clip.image_names(pre_norm), open_clip.FORMS


def _timm(trunk: Any, size: int) -> Reader:
    """timm's ViT with attention pooling, as open_clip uses for SigLIP."""
    first, depth, patch = trunk.blocks[0], len(trunk.blocks), trunk.patch_embed.proj
    config = ImageTowerConfig(
        image_size=size, patch=patch.kernel_size[0], width=patch.out_channels, depth=depth,
        heads=first.attn.num_heads, mlp=first.mlp.fc1.out_features, act=_activation(first.mlp.act),
        norm_eps=first.norm1.eps, pool="map", pre_norm=False, patch_bias=patch.bias is not None, proj="none")
    return config, timm.TRUNK, timm.FORMS


READERS: tuple[tuple[tuple[str, ...], Callable[[Any, int], Reader]], ...] = (
    (("conv1", "class_embedding", "transformer", "ln_post", "proj"), _vision_transformer),
    (("patch_embed", "blocks", "norm", "attn_pool"), _timm),
)


def _activation(module: Callable[[Tensor], Tensor]) -> Activation:
    """Which of ours it is, by what it does; the nearest, and `_check` has the last word."""
    found = module(PROBE)
    known: dict[Activation, Tensor] = {"gelu": F.gelu(PROBE), "gelu_tanh": F.gelu(PROBE, approximate="tanh"),
                                       "quick_gelu": PROBE * torch.sigmoid(1.702 * PROBE)}
    return min(known, key=lambda name: float((known[name] - found).abs().max()))


def _read_transform(transform: Any) -> PreprocessConfig:
    """The settings of a torchvision Compose of Resize, CenterCrop and Normalize, by the names of its parts."""
    parts = {type(part).__name__: part for part in getattr(transform, "transforms", [])}
    resize, crop, norm = (parts.get(name) for name in ("Resize", "CenterCrop", "Normalize"))
    if resize is None or norm is None:
        raise ValueError(f"preprocess needs a Resize and a Normalize, but has {', '.join(parts) or 'no transforms'}: "
                         "give the transform of evaluation that open_clip returns with the model.")
    pair = isinstance(resize.size, Sequence) and len(resize.size) == 2
    sides = {int(s) for s in (resize.size if isinstance(resize.size, Sequence) else [resize.size])}
    sides |= {int(s) for s in crop.size} if crop is not None else set()
    if len(sides) != 1 or (crop is None and not pair):
        raise ValueError(f"preprocess makes pictures of sides {sorted(sides)}; silc needs one square size.")
    return from_dict(PreprocessConfig, {
        "size": sides.pop(), "resize": "squash" if pair else "crop",
        "interpolation": getattr(resize.interpolation, "value", resize.interpolation),
        "mean": [float(v) for v in norm.mean], "std": [float(v) for v in norm.std]}, "preprocess.")
