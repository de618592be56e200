"""Student and teacher, and what passes between them in one step.

Gives: Student (model and heads, one forward call), Teacher (EMA), Anchor, Hyper, Views, Output.
Used by: train/pretrain.py.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from silc.config import ObjectiveConfig
from silc.model.prototypes import Projected, PrototypeHead
from silc.model.silc import Silc
from silc.model.towers import ImageTower

# Shapes: B local pairs, P >= B pictures (pairs first, then those without a caption), V views aligned with the text,
# S views that learn, G/L global/local views, N patches (H of them predicted), K prototypes of width d, D shared space,
# W width of the image tower.


@dataclass(frozen=True)
class Hyper:
    """What changes from step to step."""

    distill: float
    """Weight of the term now; 0 before its start."""
    masked: float
    momentum: float
    """EMA momentum; 0 (teacher = student) until a term that needs the teacher begins."""
    anchor: float = 0.0
    frozen: bool = False
    """Do the towers stand still, so that only heads learn?"""

    @property
    def needs_teacher(self) -> bool:
        return self.distill > 0 or self.masked > 0


class Views(NamedTuple):
    """Normalised pixels of one batch; the crop axis comes first."""

    original: Tensor | None
    """[B, 3, S, S]: the whole picture, as evaluation sees it."""
    globals: Tensor | None
    locals: Tensor | None
    mask: Tensor | None
    """[P, N]: patches of the first global view hidden from the student."""
    judged: Tensor | None
    """[P, H]: those patches whose prediction counts; None: all of them."""


class Output(NamedTuple):
    """Everything the losses need from one call of the student."""

    image: Tensor
    """[V, B, D] unit length: the views aligned with the text."""
    text: Tensor
    scale: Tensor
    bias: Tensor | None
    views: Projected | None
    """Features [S, P, d] of the views that learn from the teacher."""
    patches: Projected | None
    """Features [P, H, d] of the masked view's patches that count."""
    features: Tensor | None
    """[G, P, D] pooled global views, detached, for a head-only teacher."""
    tokens: Tensor | None
    """[P, H, W] patch tokens of the first global view, unmasked and detached, likewise."""


class Student(nn.Module):
    """The model and its heads; one forward call for all resolutions and the text (one gather under sharding)."""

    def __init__(self, model: Silc, config: ObjectiveConfig) -> None:
        super().__init__()
        self.model, self.config = model, config
        width = model.config.image.width
        self.view_head: PrototypeHead | None = None
        self.patch_head: PrototypeHead | None = None
        if config.distill.weight > 0:
            self.view_head = PrototypeHead(model.config.embed_dim, config.prototypes)
        if config.masked.weight > 0:
            self.patch_head = PrototypeHead(width, config.prototypes)
            self.mask_token = nn.Parameter(torch.zeros(width))

    def forward(self, views: Views, text: Tensor, hyper: Hyper) -> Output:
        c, names = self.config, []
        groups: list[Tensor] = []
        masks: list[Tensor | None] = []
        lends = c.teacher == "head" and hyper.needs_teacher
        wanted = views.globals
        if wanted is not None and not (lends or (c.global_to_global and hyper.distill > 0)):
            # nothing but the text reads them: those without one need not be encoded
            wanted = wanted[:, : len(text)] if aligned("globals", c) else None
        rows: dict[str, int] = {}
        for name, pixels in (("original", views.original), ("globals", wanted), ("locals", views.locals)):
            if pixels is not None:
                groups.append(pixels.flatten(0, -4))
                masks.append(None)
                names.append(name)
                rows[name] = pixels.shape[-4]
        if hyper.masked > 0 and views.globals is not None:
            groups.append(views.globals[0])
            masks.append(views.mask)
            names.append("masked")
        token = self.mask_token if hyper.masked > 0 else None
        with torch.set_grad_enabled(torch.is_grad_enabled() and not hyper.frozen):
            encoded = dict(zip(names, self.model.image(groups, masks, token)))
            words, scale, bias = self.model.text(text), self.model.scale, self.model.bias
        pooled = {n: encoded[n].pooled.unflatten(0, (-1, rows[n])) for n in rows}
        with_text = [n for n in ("original", "globals") if n in pooled and aligned(n, c)]
        learned = [n for n in ("globals", "locals") if n in pooled and (n == "locals" or c.global_to_global)]
        return Output(
            image=F.normalize(torch.cat([pooled[n][:, : len(text)] for n in with_text]).float(), dim=-1),
            text=F.normalize(words.float(), dim=-1),
            scale=scale,
            bias=bias,
            views=self.view_head(torch.cat([pooled[n] for n in learned])) if self.view_head and hyper.distill else None,
            patches=self.patch_head(chosen(encoded["masked"].tokens, views.judged))
            if self.patch_head and hyper.masked
            else None,
            # a head-only teacher reads the student's own features; sharded modules must not return views
            features=pooled["globals"].detach().clone() if lends else None,
            tokens=chosen(encoded["globals"].tokens[: len(encoded["masked"].tokens)].detach().clone(), views.judged)
            if lends and hyper.masked > 0
            else None,
        )


def chosen(tokens: Tensor, rows: Tensor | None) -> Tensor:
    """Of tokens [P, N, W] the rows [P, H], or all."""
    return tokens if rows is None else tokens.take_along_dim(rows[..., None], dim=1)


def aligned(name: str, config: ObjectiveConfig) -> bool:
    """Does the text loss read this group of views?"""
    return config.contrast_views == "both" or config.contrast_views == {"globals": "global"}.get(name, name)


class Teacher(nn.Module):
    """EMA of the student's image tower and heads, fp32, never with a gradient; or of the heads alone."""

    def __init__(self, student: Student) -> None:
        super().__init__()
        full = student.config.teacher == "full"
        self.image: ImageTower | None = copy.deepcopy(student.model.image) if full else None
        self.view_head: PrototypeHead | None = copy.deepcopy(student.view_head)
        self.patch_head: PrototypeHead | None = copy.deepcopy(student.patch_head)
        self.requires_grad_(False)

    def forward(self, views: Views, student: Output, hyper: Hyper) -> tuple[Projected | None, Projected | None]:
        """-> features of the views [G, P, d] and of patches [P, H, d], each None when its term is off."""
        tokens: Tensor | None
        if self.image is not None:
            assert views.globals is not None
            encoded = self.image([views.globals.flatten(0, 1)])[0]
            features = encoded.pooled.unflatten(0, views.globals.shape[:2])
            tokens = encoded.tokens[: views.globals.shape[1]]
            tokens = chosen(tokens, views.judged) if hyper.masked > 0 else tokens
        else:  # head-only EMA: the student's own features, at no cost
            assert student.features is not None
            features, tokens = student.features, student.tokens
        return (
            self.view_head(features) if self.view_head and hyper.distill else None,
            self.patch_head(tokens) if self.patch_head and hyper.masked else None,
        )


class Anchor(nn.Module):
    """The model that the run began with, never trained: where embeddings are to stay near."""

    def __init__(self, model: Silc) -> None:
        super().__init__()
        self.image, self.text = copy.deepcopy(model.image), copy.deepcopy(model.text)
        self.requires_grad_(False)

    def forward(self, views: Views, text: Tensor, config: ObjectiveConfig) -> tuple[Tensor, Tensor]:
        """-> what it makes of the views that the text is aligned with, [V, B, D], and of the texts, [B, D]."""
        named = (("original", views.original), ("globals", views.globals))
        groups = [pixels[..., : len(text), :, :, :] for n, pixels in named if pixels is not None and aligned(n, config)]
        pooled = [e.pooled.unflatten(0, (-1, len(text))) for e in self.image([g.flatten(0, -4) for g in groups])]
        return F.normalize(torch.cat(pooled).float(), dim=-1), F.normalize(self.text(text).float(), dim=-1)
