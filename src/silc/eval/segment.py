"""Zero-shot segmentation of a set with masks, by a named protocol.

Gives: Config, run, Tally (what is counted), intervals.
Used by: eval/run, which finds it by the first two names.
"""

from __future__ import annotations

import dataclasses
import heapq
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from silc.data.images import normalise
from silc.data.labelled import Masked, open_masked
from silc.eval.embed import Features, Progress, agree, evaluating
from silc.eval.metrics import Result, best_constant, confusion, iou, miou, pixel_accuracy
from silc.eval.prompts import TEMPLATES, ClassEmbeddings, class_embeddings, resolve_templates
from silc.eval.protocols import Protocol, encode, fit, foreground, label_map, probability_scale, protocol
from silc.eval.trained import at_size, best, look
from silc.model.silc import Silc
from silc.parallel import World, gather

# Shapes: N pictures, C classes, h x w label map.

ALONE = World(0, 1, torch.device("cpu"))
CONFUSIONS = 5000
"""Pairs of classes that a result lists, the most frequent first."""


@dataclass(frozen=True)
class Config:
    protocol: str = "auto"
    """How a picture becomes a label map, see eval/protocols: catseg (`auto` for a model with such a head), whole-image
    (`auto` for others), tcl, tips, maskclip, sclip or clearclip."""
    templates: tuple[str, ...] = ()
    """Prompts with one `{}`, names of lists that ship, or files; empty: the protocol's, else a short default list."""
    split: str | None = None
    """Of the set; None: the customary one."""
    kind: str | None = None
    """Layout, where a folder can be read in several ways: `voc20` rather than `voc21`; see `open_masked`."""
    batch: int = 8
    """Views that go through the model at a time; pictures of one size share a batch."""
    pictures: Path | None = None
    """Where predicted label maps (PNG of class indices) of some pictures go; None writes none."""
    examples: int = 24
    worst: int = 8
    """Pictures with the lowest mIoU of their own, which are listed and written, too."""


def run(model: Silc, folder: Path | str, cfg: Config, features: Features | None = None) -> Result:
    """mIoU over the classes that occur (in truth or prediction) and pixel accuracy, at the masks' own resolution.

    Chance is the best constant prediction. Void pixels are left out; classes that come in no mask but are predicted
    count as 0. Intervals: bootstrap over pictures. ValueError for a set that is not as `open_masked` wants it, an
    unknown protocol or template, or a set whose masks are all void. The processes of `features.world`
    each take every size-th picture; all get the result, and the leader writes its own pictures.
    """
    world = features.world if features and features.world else ALONE
    data = open_masked(folder, cfg.split, cfg.kind)
    how = protocol(cfg.protocol, data.name, model)
    how = at_size(how, model) if how.merge == "sigmoid" else how
    templates = resolve_templates(cfg.templates) if cfg.templates else list(how.templates or TEMPLATES)
    how = dataclasses.replace(how, templates=tuple(templates), scale=probability_scale(how, model))
    named = foreground(data.classes, data.background, how)
    skipped = len(data.classes) - len(named)
    names = class_embeddings(model, named, templates)
    names = dataclasses.replace(names, owner=names.owner + skipped, classes=len(data.classes))
    tally = Tally(len(data.classes), data.void)
    shown = Shown(data, cfg if world.leads else dataclasses.replace(cfg, pictures=None))
    mine = list(range(world.rank, len(data), world.size))
    progress, failed = Progress(f"segment {data.name}", len(mine) if world.leads else 0), ""
    try:
        for index, truth, label in _predictions(model, data, mine, names, how, cfg.batch):
            shown.add(index, label, tally.add(index, truth, label))
            if world.leads:
                progress.add(1)
    except ValueError as error:  # told to all, so that none waits for this one's share
        if world.size == 1:
            raise
        failed = str(error)
    if world.size > 1:
        agree(failed, world)
        tally.merge(world)
    counts = tally.counts
    constant = best_constant(counts) if counts.sum() else (0.0, 0.0)
    scores = {"miou": miou(counts), "pixel_accuracy": pixel_accuracy(counts)}
    return Result(
        scores,
        {"miou": constant[0], "pixel_accuracy": constant[1]},
        {"set": data.name, "split": data.split, "count": len(data), "templates": templates,
         "protocol": dataclasses.asdict(how), "background": _rule(data, how), "void": data.void,
         "palette": data.palette, "interval": intervals(tally), "per_class": _per_class(data, counts),
         "confusion": _confusion(counts), "picture_miou": [tally.mious.get(i) for i in range(len(data))],
         "worst": shown.worst(), "pictures": shown.examples()},
    )


# ---------------------------------------------------------------- counting


class Tally:
    """Confusion of the whole set, and of each picture what its share in any mIoU needs: intersection and union of the
    classes that occur in it. A picture has few of them, so N x C numbers are never held."""

    def __init__(self, classes: int, void: int | None) -> None:
        self.void = void
        self.counts = torch.zeros(classes, classes, dtype=torch.int64)
        self.indices: list[int] = []
        self.found: list[np.ndarray] = []
        """int64 [4, k] a picture: class, intersection, union, true pixels."""
        self.mious: dict[int, float | None] = {}

    def add(self, index: int, truth: Tensor, label: Tensor) -> float | None:
        """Counts a picture; its own mIoU, None if none of its pixels is labelled."""
        one = confusion(truth, label, len(self.counts), self.void)
        self.counts += one
        hit, true = one.diagonal(), one.sum(1)
        union = true + one.sum(0) - hit
        seen = union.nonzero()[:, 0]
        self.keep(index, torch.stack([seen, hit[seen], union[seen], true[seen]]).numpy())
        return self.mious[index]

    def merge(self, world: World) -> None:
        """Every process's pictures, in all of them."""
        # one row a class that occurs in a picture, after one row a picture that says how many follow
        both = zip(self.indices, self.found)
        rows = [np.concatenate([[[index, found.shape[1], -1, -1]], found.T]) for index, found in both]
        mine = torch.from_numpy(np.concatenate([np.zeros((0, 4), np.int64), *rows]))
        lengths = gather(torch.tensor([len(mine)], device=world.device), world).tolist()
        padded = torch.cat([mine, mine.new_zeros(max(lengths) - len(mine), 4)]).to(world.device)
        everybody = gather(padded, world).cpu().unflatten(0, (world.size, -1))
        self.counts = gather(self.counts[None].to(world.device), world).sum(0).cpu()
        self.indices, self.found, self.mious = [], [], {}
        for part, length in zip(everybody.numpy(), lengths):
            at = 0
            while at < length:
                index, classes = int(part[at, 0]), int(part[at, 1])
                self.keep(index, part[at + 1 : at + 1 + classes].T)
                at += 1 + classes

    def keep(self, index: int, found: np.ndarray) -> None:
        self.indices.append(index)
        self.found.append(found)
        own = (found[1] / found[2]).mean() if found.shape[1] else None
        self.mious[index] = None if own is None else round(float(own), 5)

    def dense(self, order: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Intersection [n, C], union [n, C] and true pixels [n] of some pictures, as float64."""
        hit, union = np.zeros((2, len(order), len(self.counts)))
        true = np.zeros(len(order))
        for row, i in enumerate(order):
            classes, h, u, t = self.found[i]
            hit[row, classes], union[row, classes], true[row] = h, u, t.sum()
        return hit, union, true


def intervals(
    tally: Tally, draws: int = 1000, level: float = 0.95, seed: int = 0, numbers: int = 2**22
) -> dict[str, tuple[float, float]]:
    """Percentile intervals of mIoU and pixel accuracy over resampled sets of as many pictures; deterministic.

    About `numbers` float64 exist at a time. Pictures count in the order of the set, whatever order they came in.
    """
    order, total, classes = np.argsort(tally.indices), len(tally.indices), len(tally.counts)
    rng, found = np.random.default_rng(seed), []
    some, rows = max(1, numbers // total), max(1, numbers // classes)
    for first in range(0, draws, some):
        weights = rng.multinomial(total, np.full(total, 1 / total), size=min(some, draws - first)).astype(float)
        hit, union, true = np.zeros((len(weights), classes)), np.zeros((len(weights), classes)), np.zeros(len(weights))
        for start in range(0, total, rows):
            part = weights[:, start : start + rows]
            for into, values in zip((hit, union, true), tally.dense(order[start : start + rows])):
                into += part @ values
        with np.errstate(invalid="ignore", divide="ignore"):
            share, seen = np.nan_to_num(hit / union), union > 0
            found.append(np.stack([share.sum(1) / seen.sum(1), hit.sum(1) / true]))
    bounds = np.nanquantile(np.concatenate(found, axis=1), [(1 - level) / 2, (1 + level) / 2], axis=1).T.tolist()
    return {name: (low, high) for name, (low, high) in zip(("miou", "pixel_accuracy"), bounds)}


class Shown:
    """Which pictures a report shows: some evenly over the set, and those that score lowest."""

    def __init__(self, data: Masked, cfg: Config) -> None:
        self.data, self.cfg = data, cfg
        self.even = {i * len(data) // cfg.examples for i in range(cfg.examples)} if cfg.pictures else set()
        self.kept: dict[int, Path] = {}
        self.heap: list[tuple[float, int, np.ndarray | None]] = []

    def add(self, index: int, label: Tensor, score: float | None) -> None:
        small = label.numpy().astype("uint8" if len(self.data.classes) <= 256 else "uint16")
        if self.cfg.pictures and index in self.even:
            self.kept[index] = self.write(index, small)
        if score is not None and score < 1 and self.cfg.worst:
            heapq.heappush(self.heap, (-score, -index, small if self.cfg.pictures else None))
            if len(self.heap) > self.cfg.worst:
                heapq.heappop(self.heap)

    def write(self, index: int, label: np.ndarray) -> Path:
        assert self.cfg.pictures is not None
        path = self.cfg.pictures / f"{index:05d}-{self.data.paths[index].stem}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(label).save(path)
        return path

    def entry(self, index: int, path: Path | None) -> dict[str, Any]:
        return {"index": index, "image": self.data.ident(index), "mask": str(self.data.mask_paths[index]),
                "prediction": None if path is None else str(path)}

    def examples(self) -> list[dict[str, Any]]:
        return [self.entry(index, path) for index, path in sorted(self.kept.items())]

    def worst(self) -> list[dict[str, Any]]:
        """Lowest mIoU first."""
        found = []
        for minus_score, minus_index, label in sorted(self.heap, reverse=True, key=lambda item: item[:2]):
            path = self.kept.get(-minus_index) or (None if label is None else self.write(-minus_index, label))
            found.append(self.entry(-minus_index, path) | {"miou": -minus_score})
        return found


# ---------------------------------------------------------------- predicting


def _predictions(
    model: Silc, data: Masked, wanted: list[int], names: ClassEmbeddings, how: Protocol, batch: int
) -> Iterator[tuple[int, Tensor, Tensor]]:
    """(index, truth [h, w], prediction [h, w]) of every wanted picture, in no particular order."""
    cfg, scale = model.config.preprocess, probability_scale(how, model)
    by_names = data.background and how.background is None
    threshold = (how.floor or None) if by_names else how.background if data.background else None
    area = how.area if by_names else 0.0
    for indices, pixels, truths in _same_size(model, data, wanted, how, batch):
        with evaluating(model):
            seen = normalise(pixels.to(model.device), cfg.mean, cfg.std)
            if how.merge == "sigmoid":
                labels = [best(one, names, truth.shape[0], truth.shape[1]).cpu()
                          for one, truth in zip(look(model, seen, how, names.vectors), truths)]
            else:
                labels = [label_map(one, names, truth.shape[0], truth.shape[1], threshold, scale, area).cpu()
                          for one, truth in zip(encode(model, seen, how, batch), truths)]
        yield from zip(indices, truths, labels)


def _same_size(
    model: Silc, data: Masked, wanted: list[int], how: Protocol, batch: int
) -> Iterator[tuple[list[int], Tensor, list[Tensor]]]:
    """Batches of pictures that the model sees at one size: indices, uint8 [B, 3, H, W], masks. Bounded memory."""
    def read(index: int) -> tuple[int, Tensor, Tensor]:
        return index, fit(data.image(index), how, model.config), data.mask(index)

    waiting: dict[tuple[int, ...], list[tuple[int, Tensor, Tensor]]] = {}
    with ThreadPoolExecutor(4) as pool:
        for start in range(0, len(wanted), 4 * batch):
            for item in pool.map(read, wanted[start : start + 4 * batch]):
                group = waiting.setdefault(tuple(item[1].shape), [])
                group.append(item)
                # one size is full, or many rare sizes together hold too much: the fullest goes
                if len(group) == batch or sum(map(len, waiting.values())) >= 8 * batch:
                    yield _stack(waiting.pop(max(waiting, key=lambda size: len(waiting[size]))))
    for group in waiting.values():
        yield _stack(group)


def _stack(group: list[tuple[int, Tensor, Tensor]]) -> tuple[list[int], Tensor, list[Tensor]]:
    return [i for i, _, _ in group], torch.stack([p for _, p, _ in group]), [m for _, _, m in group]


# ---------------------------------------------------------------- telling


def _rule(data: Masked, how: Protocol) -> str:
    if not data.background:
        return "the set has none"
    if how.background_names:
        return f"by the names of {len(how.background_names)} classes of Pascal Context that are not in the set"
    if how.background is not None:
        return f"best foreground probability below {how.background:g}"
    floor = f", or best probability below {how.floor:g}" if how.floor else ""
    return "by its names" + floor + (f"; classes with at most {how.area:g} of the foreground out" if how.area else "")


def _per_class(data: Masked, counts: Tensor) -> list[dict[str, Any]]:
    """IoU (None where the class neither occurs nor is predicted), accuracy (None where it does not occur), true and
    predicted pixels of each class."""
    true, predicted = counts.sum(1), counts.sum(0)
    share = counts.diagonal().double() / true
    columns = (iou(counts).tolist(), share.tolist(), true.tolist(), predicted.tolist())
    return [
        {"class": group[0], "iou": None if union != union else union, "accuracy": None if hit != hit else hit,
         "pixels": pixels, "predicted": said}
        for group, union, hit, pixels, said in zip(data.classes, *columns)
    ]


def _confusion(counts: Tensor) -> dict[str, Any]:
    """The most frequent [true class, predicted class, pixels], right ones too, and how many pixels are not listed."""
    flat = counts.flatten()
    best = flat.argsort(descending=True, stable=True)[: min(CONFUSIONS, int((flat > 0).sum()))]
    rows = torch.stack([best // len(counts), best % len(counts), flat[best]], dim=1)
    return {"most": rows.tolist(), "pixels_left_out": int(flat.sum() - flat[best].sum())}
