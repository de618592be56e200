"""A diagnostic of the patch features: one linear layer from patch to class, learned on masks.

Gives: Config, run.
Used by: eval/run, which finds it by these two names.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from silc.config import PreprocessConfig
from silc.data.images import normalise
from silc.data.labelled import Masked, open_masked
from silc.eval.embed import Progress, evaluating, image_batches
from silc.eval.linear import Linear, best_l2, open_splits
from silc.eval.metrics import Result, best_constant, confusion, iou, miou, pixel_accuracy
from silc.model.silc import Silc
from silc.model.towers import Readout

# Shapes: B pictures, D features, C classes, gh x gw patches, h x w label map.

PIXELS_AT_ONCE = 2**25
"""Scores (classes x pixels) that exist at a time: 128 MiB of float32."""


@dataclass(frozen=True)
class Config:
    size: int = 0
    """Both sides of the picture as the model sees it, a multiple of the patch; 0: the model's own size."""
    readout: Readout = "auto"
    """Which patch features; see `ImageTower.dense`."""
    patches: int = 200_000
    """Training patches that are kept, drawn evenly from all pictures; bounds memory."""
    l2: tuple[float, ...] = (1e-5, 1e-4, 1e-3, 1e-2, 1e-1)
    """Strengths tried, on the last fifth of the training pictures."""
    steps: int = 100
    """L-BFGS iterations at most."""
    split: str | None = None
    """What is scored; None: the set's customary one, else the first of test, val. train is learned from."""
    kind: str | None = None
    """Which layout, where a folder can be read in several ways."""
    batch: int = 16


def run(model: Silc, folder: Path | str, cfg: Config) -> Result:
    """mIoU and pixel accuracy at the masks' own resolution, of a linear layer learned on the training split.

    Features are standardised; a patch's label is the mask at its centre, void is left out, scores are brought to the
    mask's size (bilinear). Chance is the best constant prediction. ValueError for a set that is not as `open_splits`
    and `open_masked` want it.
    """
    train, test = open_splits(open_masked, folder, cfg.split, cfg.kind)
    classes = len(train.classes)
    x, labels, owner = gather_patches(model, train, cfg)
    # whole pictures, and the last ones: neighbouring frames of a film are nearly the same
    held = owner >= len(train) - len(train) // 5
    linear, l2, tried = best_l2(x, labels, classes, held, cfg.l2, cfg.steps)
    counts = torch.zeros(classes, classes, dtype=torch.int64)
    for index, dense in patch_features(model, test, cfg, f"dense probe {test.name}"):
        truth = test.mask(index)
        counts += confusion(truth, label_map(linear, dense, truth.shape[0], truth.shape[1]).cpu(), classes, test.void)
    constant = best_constant(counts) if counts.sum() else (0.0, 0.0)
    return Result(
        {"miou": miou(counts), "pixel_accuracy": pixel_accuracy(counts)},
        {"miou": constant[0], "pixel_accuracy": constant[1]},
        {"set": test.name, "split": test.split, "count": len(test), "train": len(train), "patches": len(x),
         "void": test.void,
         "protocol": {"name": "dense probe", "size": size_of(model, cfg), "resize": "squash", "readout": cfg.readout,
                      "l2": l2, "l2_held_out": tried, "steps": cfg.steps, "standardised": True},
         "per_class": [
             {"class": names[0], "iou": None if value != value else value, "pixels": pixels}
             for names, value, pixels in zip(test.classes, iou(counts).tolist(), counts.sum(1).tolist())
         ]},
    )


def size_of(model: Silc, cfg: Config) -> int:
    size, patch = cfg.size or model.config.preprocess.size, model.config.image.patch
    if size % patch:
        raise ValueError(f"dense probe: a size of {size} px is no multiple of the model's patch, {patch} px.")
    return size


def patch_features(model: Silc, data: Masked, cfg: Config, label: str) -> Iterator[tuple[int, Tensor]]:
    """(index, [D, gh, gw] on the model's device) of every picture, both sides brought to the model's size."""
    known = model.config.preprocess
    how: PreprocessConfig = dataclasses.replace(known, size=size_of(model, cfg), resize="squash")
    progress, index = Progress(label, len(data)), 0
    for pixels, mask in image_batches(data, how, cfg.batch):
        with evaluating(model):
            dense = model.encode_dense(normalise(pixels.to(model.device), known.mean, known.std), cfg.readout).float()
        for one in dense[: int(mask.sum())]:
            yield index, one
            index += 1
        progress.add(int(mask.sum()))


def gather_patches(model: Silc, data: Masked, cfg: Config) -> tuple[Tensor, Tensor, Tensor]:
    """Training patches: features [N, D], labels [N], and which picture each is from [N]; at most `patches` of them.

    A large set gives few patches of each picture, drawn with a fixed seed, and always at least one.
    """
    quota, rng = max(1, cfg.patches // len(data)), np.random.default_rng(0)
    found: list[Tensor] = []
    labels: list[Tensor] = []
    for index, dense in patch_features(model, data, cfg, f"dense probe {data.name}"):
        mask = data.mask(index)[None, None].double()
        target = F.interpolate(mask, dense.shape[-2:], mode="nearest-exact").long().flatten()
        kept = (target != data.void).nonzero()[:, 0] if data.void is not None else torch.arange(len(target))
        if len(kept) > quota:
            kept = kept[torch.from_numpy(np.sort(rng.choice(len(kept), quota, replace=False)))]
        found.append(dense.flatten(1).T[kept.to(dense.device)].clone())
        labels.append(target[kept])
    owner = torch.arange(len(data)).repeat_interleave(torch.tensor([len(part) for part in labels]))
    if not len(owner):
        raise ValueError(f"dense probe: no patch of {data.name} is labelled; are the masks all void?")
    device = found[0].device
    return torch.cat(found), torch.cat(labels).to(device), owner.to(device)


def label_map(linear: Linear, dense: Tensor, height: int, width: int) -> Tensor:
    """The best class at every pixel, [D, gh, gw] -> int64 [height, width]; some classes at a time."""
    scores = linear(dense.flatten(1).T).T.unflatten(1, dense.shape[1:])
    best = scores.new_full((height, width), -torch.inf)
    label = torch.zeros((height, width), dtype=torch.int64, device=scores.device)
    step, first = max(1, PIXELS_AT_ONCE // (height * width)), 0
    for part in scores.split(step):
        values, index = F.interpolate(part[None], (height, width), mode="bilinear", align_corners=False)[0].max(0)
        label = torch.where(values > best, index + first, label)
        best, first = torch.maximum(best, values), first + len(part)
    return label
