"""What evaluations count, as pure functions, each with the level that knowing nothing reaches.

Gives: Result, label_ranks, top_k, first_hit_ranks, chance_recall, confusion, iou, miou, best_constant, bootstrap ...
Used by: every evaluation task.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from torch import Tensor

# Shapes: N images, C classes, Q queries, M candidates, P (query, candidate) pairs that belong together, D features.


SCORES_AT_ONCE = 2**25
"""Similarities (queries x candidates) that exist at a time: 128 MiB of float32."""


@dataclass(frozen=True)
class Result:
    """Scores in [0, 1] by name, the score of knowing nothing for the same names, and plain data about both.

    In details, where a metric is a mean over items (pictures, captions): `items`, the value of each; `groups`, which
    items belong together (captions of one picture), if not each stands alone; `interval`, the 95% interval of the mean.
    """

    metrics: dict[str, float]
    chance: dict[str, float] = field(default_factory=dict)
    details: dict[str, Any] = field(default_factory=dict)


# ---------------------------------------------------------------- classification


def label_ranks(scores: Tensor, labels: Tensor) -> Tensor:
    """Place of the right class, 0 the best: scores [N, C], labels [N] -> int64 [N].

    Among equal scores the lower class index comes first, so a model that always says the same scores 1/C on a balanced
    set. A score that is not a number ranks before the right class, and a right class without a number is last.
    """
    target = scores.gather(1, labels[:, None])
    earlier = torch.arange(scores.shape[1], device=scores.device) < labels[:, None]
    return (~(scores <= target) | ((scores == target) & earlier)).sum(1)


def top_k(scores: Tensor, labels: Tensor, k: int) -> float:
    """Share of rows of scores [N, C] whose label [N] is among the k best classes; ties as in `label_ranks`."""
    return (label_ranks(scores, labels) < k).double().mean().item()


def per_class_accuracy(correct: Tensor, labels: Tensor, classes: int) -> Tensor:
    """correct bool [N], labels [N] -> share of right answers a class, float64 [C]; NaN for a class without images."""
    total = torch.bincount(labels, minlength=classes)
    return torch.bincount(labels, weights=correct.double(), minlength=classes) / total


# ---------------------------------------------------------------- retrieval


def first_hit_ranks(
    queries: Tensor, candidates: Tensor, pairs: Tensor, copies: Tensor | None = None, chunk: int = 1024
) -> Tensor:
    """How many wrong candidates come before the first right one: int64 [Q]; recall@k is the share below k.

    queries [Q, D], candidates [M, D]; pairs int64 [P, 2] lists every right (query, candidate), each query at least
    once. `copies` [M] says how often a candidate stands in the list (equal captions are one row here). A wrong
    candidate with the same score as the right one comes first, so a constant model finds nothing; so does one whose
    score is not a number. Works on up to `chunk` rows at a time, fewer where M is large: never more than
    SCORES_AT_ONCE scores exist (or M).
    """
    chunk = max(1, min(chunk, SCORES_AT_ONCE // len(candidates)))
    pairs = pairs[pairs[:, 0].argsort(stable=True)]
    rows, columns = pairs.unbind(1)
    starts = torch.searchsorted(rows.contiguous(), torch.arange(len(queries) + 1, device=rows.device)).tolist()
    if any(a == b for a, b in pairwise(starts)):
        raise ValueError("retrieval: a query has no candidate that belongs to it.")
    # few candidates stand more than once: all are counted as one, which is quick, and those add what is missing
    repeated = torch.empty(0, dtype=torch.int64) if copies is None else (copies > 1).nonzero()[:, 0]
    missing = torch.empty(0) if copies is None else (copies[repeated] - 1)
    repeated, missing = repeated.to(candidates.device), missing.to(candidates.device)
    ranks = torch.empty(len(queries), dtype=torch.int64)
    for first in range(0, len(queries), chunk):
        scores = queries[first : first + chunk] @ candidates.T
        part = slice(starts[first], starts[first + len(scores)])
        row, column = rows[part] - first, columns[part]
        right = scores[row, column]
        best = torch.full_like(scores[:, 0], -torch.inf).scatter_reduce(0, row, right, "amax")
        before = ~(scores < best[:, None])
        before[row, column] = False
        found = torch.count_nonzero(before, 1) + (before[:, repeated] * missing).sum(1).long()
        ranks[first : first + len(scores)] = found.cpu()
    return ranks


def chance_recall(right: Tensor, total: int, k: int) -> float:
    """Recall@k of a random order of `total` candidates: right [Q] of them belong to each query; exact, mean over Q."""
    missed = torch.ones(len(right), dtype=torch.float64)
    for i in range(min(k, total)):
        missed *= (total - right.double() - i).clamp(min=0) / (total - i)
    return (1 - missed).mean().item()


# ---------------------------------------------------------------- segmentation


def confusion(truth: Tensor, prediction: Tensor, classes: int, void: int | None = None) -> Tensor:
    """Pixel counts int64 [C, C], rows the truth, columns the prediction; sum them over images.

    truth and prediction are of one shape; pixels whose truth is `void` are left out. Raises ValueError for a value
    that is no class.
    """
    if truth.shape != prediction.shape:
        raise ValueError(f"masks {list(truth.shape)} and predictions {list(prediction.shape)} differ in size.")
    kept = torch.ones_like(truth, dtype=torch.bool) if void is None else truth != void
    t, p = truth[kept].long(), prediction[kept].long()
    for name, values in (("the mask", t), ("the prediction", p)):
        if values.numel() and (values.min() < 0 or values.max() >= classes):
            raise ValueError(f"{name} holds a value outside the classes 0 to {classes - 1}.")
    return torch.bincount(t * classes + p, minlength=classes * classes).view(classes, classes)


def iou(counts: Tensor) -> Tensor:
    """Intersection over union a class, float64 [C], from `confusion`; NaN for a class neither true nor predicted."""
    hit = counts.diagonal().double()
    return hit / (counts.sum(0) + counts.sum(1) - hit)


def miou(counts: Tensor) -> float:
    """Mean of `iou` over the classes with a union. ValueError if nothing was labelled."""
    if not counts.sum():
        raise ValueError("segmentation: no pixel of the set is labelled; are the masks all void?")
    return iou(counts).nanmean().item()


def pixel_accuracy(counts: Tensor) -> float:
    return (counts.diagonal().sum() / counts.sum()).item()


def best_constant(counts: Tensor) -> tuple[float, float]:
    """(mIoU, pixel accuracy) of the best prediction that is the same class everywhere: what knowing nothing reaches."""
    truth = counts.sum(1).double()
    share = (truth.max() / truth.sum()).item()
    return share / int((truth > 0).sum()), share


# ---------------------------------------------------------------- intervals


def bootstrap(
    values: Tensor, groups: Tensor | None = None, draws: int = 1000, level: float = 0.95, seed: int = 0
) -> tuple[float, float]:
    """Percentile interval of the mean of values [N] over `draws` resamplings, deterministic.

    `groups` int [N]: values of one group (the captions of one image) are not independent, so they are drawn together.
    """
    v = values.double().cpu().numpy()
    g = np.arange(len(v)) if groups is None else np.unique(groups.cpu().numpy(), return_inverse=True)[1]
    sums, counts = np.bincount(g, weights=v), np.bincount(g)
    rng = np.random.default_rng(seed)
    means = np.empty(draws)
    for i in range(draws):
        drawn = rng.integers(len(sums), size=len(sums))
        means[i] = sums[drawn].sum() / counts[drawn].sum()
    low, high = np.quantile(means, [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)
