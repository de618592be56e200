"""Zero-shot segmentation of a set with masks, by a named protocol.

Gives: Config, run.
Used by: eval/run, which finds it by these two names.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from silc.data.images import normalise
from silc.data.labelled import Masked, open_masked
from silc.eval.embed import Progress, evaluating
from silc.eval.metrics import Result, best_constant, confusion, iou, miou, pixel_accuracy
from silc.eval.prompts import TEMPLATES, ClassEmbeddings, class_embeddings
from silc.eval.protocols import Protocol, encode, fit, foreground, label_map, protocol
from silc.model.silc import Silc


@dataclass(frozen=True)
class Config:
    protocol: str = "whole-image"
    templates: tuple[str, ...] = ()
    """Prompts with one `{}`; empty: the protocol's, else a short default list."""
    batch: int = 8
    """Views that go through the model at a time; pictures of one size share a batch."""
    pictures: Path | None = None
    """Where predicted label maps (PNG of class indices) of some pictures go; None writes none."""
    examples: int = 24


def run(model: Silc, folder: Path | str, cfg: Config) -> Result:
    """mIoU over the classes that occur (in truth or prediction) and pixel accuracy, at the masks' own resolution.

    Chance is the best constant prediction. Void pixels are left out. ValueError for a set that is not as `open_masked`
    wants it, an unknown protocol, or a set whose masks are all void.
    """
    data, how = open_masked(folder), protocol(cfg.protocol)
    templates = list(cfg.templates or how.templates or TEMPLATES)
    named = foreground(data.classes, data.background, how)
    skipped = len(data.classes) - len(named)
    names = class_embeddings(model, named, templates)
    names = dataclasses.replace(names, owner=names.owner + skipped, classes=len(data.classes))
    counts = torch.zeros(len(data.classes), len(data.classes), dtype=torch.int64)
    kept = {i * len(data) // cfg.examples for i in range(cfg.examples)} if cfg.pictures else set()
    examples: list[dict[str, Any]] = []
    progress = Progress(f"segment {data.name}", len(data))
    for index, truth, label in _predictions(model, data, names, how, how.background if skipped else None, cfg.batch):
        counts += confusion(truth, label, len(data.classes), data.void)
        if cfg.pictures and index in kept:
            path = _write(label, cfg.pictures / f"{index:05d}-{data.paths[index].stem}.png")
            examples.append({"index": index, "image": str(data.paths[index]), "mask": str(data.mask_paths[index]),
                             "prediction": str(path)})
        progress.add(1)
    constant = best_constant(counts) if counts.sum() else (0.0, 0.0)
    return Result(
        {"miou": miou(counts), "pixel_accuracy": pixel_accuracy(counts)},
        {"miou": constant[0], "pixel_accuracy": constant[1]},
        {"set": data.name, "count": len(data), "templates": templates, "protocol": dataclasses.asdict(how),
         "background": _rule(data, how), "void": data.void, "palette": data.palette,
         "per_class": _per_class(data, counts), "pictures": sorted(examples, key=lambda e: e["index"])},
    )


def _predictions(
    model: Silc, data: Masked, names: ClassEmbeddings, how: Protocol, threshold: float | None, batch: int
) -> Iterator[tuple[int, Tensor, Tensor]]:
    """(index, truth [h, w], prediction [h, w]) of every picture, in no particular order."""
    cfg, scale = model.config.preprocess, float(model.scale.detach())
    for indices, pixels, truths in _same_size(model, data, how, batch):
        with evaluating(model):
            dense = encode(model, normalise(pixels.to(model.device), cfg.mean, cfg.std), how, batch)
            labels = [
                label_map(one, names, truth.shape[0], truth.shape[1], threshold, scale).cpu()
                for one, truth in zip(dense, truths)
            ]
        yield from zip(indices, truths, labels)


def _same_size(
    model: Silc, data: Masked, how: Protocol, batch: int
) -> Iterator[tuple[list[int], Tensor, list[Tensor]]]:
    """Batches of pictures that the model sees at one size: indices, uint8 [B, 3, H, W], masks. Bounded memory."""
    def read(index: int) -> tuple[int, Tensor, Tensor]:
        return index, fit(data.image(index), how, model.config), data.mask(index)

    waiting: dict[tuple[int, ...], list[tuple[int, Tensor, Tensor]]] = {}
    with ThreadPoolExecutor(4) as pool:
        for start in range(0, len(data), 4 * batch):
            for item in pool.map(read, range(start, min(start + 4 * batch, len(data)))):
                group = waiting.setdefault(tuple(item[1].shape), [])
                group.append(item)
                # one size is full, or many rare sizes together hold too much: the fullest goes
                if len(group) == batch or sum(map(len, waiting.values())) >= 8 * batch:
                    yield _stack(waiting.pop(max(waiting, key=lambda size: len(waiting[size]))))
    for group in waiting.values():
        yield _stack(group)


def _stack(group: list[tuple[int, Tensor, Tensor]]) -> tuple[list[int], Tensor, list[Tensor]]:
    return [i for i, _, _ in group], torch.stack([p for _, p, _ in group]), [m for _, _, m in group]


def _rule(data: Masked, how: Protocol) -> str:
    if not data.background:
        return "the set has none"
    return "by its names" if how.background is None else f"best foreground probability below {how.background:g}"


def _per_class(data: Masked, counts: Tensor) -> list[dict[str, Any]]:
    """IoU (None where the class neither occurs nor is predicted) and true pixels of each class."""
    return [
        {"class": group[0], "iou": None if value != value else value, "pixels": pixels}
        for group, value, pixels in zip(data.classes, iou(counts).tolist(), counts.sum(1).tolist())
    ]


def _write(label: Tensor, path: Path) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    indices = label.numpy()
    Image.fromarray(indices.astype("uint8" if indices.max() < 256 else "uint16")).save(path)
    return path
