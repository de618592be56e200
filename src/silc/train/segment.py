"""The segmentation task: both towers and a CAT-Seg head against masks (arXiv 2303.11797).

Gives: Segment (forward_backward, after_step).
Used by: train/loop.py, in which it takes the place of the pretraining task.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from silc import losses
from silc.config import Config
from silc.data.images import normalise
from silc.data.views import photometric
from silc.model.layers import Attention
from silc.model.silc import Silc
from silc.parallel import World, average_gradients

# Shapes: B local pictures, T classes, S x S crops.


class Student(nn.Module):
    """The model with its head; one forward call for crops and classes (one gather under sharding)."""

    def __init__(self, model: Silc) -> None:
        super().__init__()
        self.model = model

    def forward(self, pixels: Tensor, tokens: Tensor) -> Tensor:
        """[B, 3, S, S] and prompts [T, length] -> logits [B, T, h, w]."""
        return self.model.segment(pixels, self.model.text(tokens))


class Segment(nn.Module):
    """Which weights train, and one step; everything here is in the checkpoint."""

    has_teacher = False

    def __init__(self, config: Config, model: Silc, world: World) -> None:
        super().__init__()
        self.config, self.world = config, world
        if config.views.locals or config.views.globals != 1:
            raise ValueError("segmentation trains on one crop a picture: --views.globals 1 --views.locals 0.")
        if config.init.freeze > 0:
            raise ValueError("--init.freeze is for pretraining; for frozen towers say --segment.tune none.")
        if config.views.global_size != config.model.image.image_size:
            raise ValueError(f"--views.global-size {config.views.global_size}: the head is built for crops of the "
                             f"model's image size, {config.model.image.image_size} px (--init.image-size).")
        if not config.init.lora:
            model.requires_grad_(config.segment.tune == "all")
            if config.segment.tune == "qv":
                for layer in model.modules():
                    if isinstance(layer, Attention):
                        layer.q.weight.requires_grad_()
                        layer.v.weight.requires_grad_()
        for never in (model.logit_scale, model.logit_bias):  # the head reads cosines
            if never is not None:
                never.requires_grad_(False)
        assert model.catseg is not None
        model.catseg.requires_grad_()
        self.student = Student(model)

    @property
    def model(self) -> Silc:
        return self.student.model

    def parts(self) -> list[tuple[nn.Module, list[nn.Module]]]:
        """The modules that are called as one, each with its towers, whose blocks are compiled and sharded apart."""
        return [(self.student, [self.model.image, self.model.text])]

    def forward_backward(self, batch: dict[str, Any], step: int) -> dict[str, Tensor]:
        """Gradient of one step into the student. Returns the loss and the share of pixels whose class scores best."""
        pixels, labels, micro = self.pixels(batch), batch["labels"].long(), self.config.train.accumulate
        found = []
        for part, truth in zip(pixels.chunk(micro), labels.chunk(micro)):
            with torch.autocast(self.world.device.type, torch.bfloat16, enabled=self.in_bf16):
                logits = self.student(part, batch["tokens"])
            loss = losses.per_pixel(logits, truth)
            (loss / micro).backward()
            found.append(torch.stack([loss.detach(), _right(logits.detach(), truth)]))
        average_gradients(self.student, self.world)
        loss, right = torch.stack(found).mean(0)
        return {"loss": loss, "pixel_accuracy": right}

    @torch.no_grad()
    def pixels(self, batch: dict[str, Any]) -> Tensor:
        p, crops = self.model.config.preprocess, batch["globals"]
        if "photo" in batch:
            return photometric(crops, batch["photo"], p.mean, p.std)[0]
        return normalise(crops[0], p.mean, p.std)

    def after_step(self, step: int) -> None:
        """Nothing follows the optimiser here."""

    @property
    def in_bf16(self) -> bool:
        """Are matrices multiplied in bf16?"""
        asked = self.config.train.precision
        return asked == "bf16" or (asked == "auto" and self.world.device.type == "cuda")


def _right(logits: Tensor, labels: Tensor) -> Tensor:
    """Share of labelled pixels, looked at once a logit, whose class has the highest one."""
    rows, columns = (
        ((torch.arange(n, device=labels.device) + 0.5) * side / n).long()
        for n, side in zip(logits.shape[-2:], labels.shape[-2:])
    )
    seen = labels[:, rows][:, :, columns]
    return ((logits.argmax(1) == seen).sum() / (seen >= 0).sum().clamp(min=1)).float()
