"""Few-shot classification: ridge regression on the frozen features of a few pictures a class.

Gives: Config, run.
Used by: eval/run, which finds it by these two names.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from silc.data.labelled import Labelled, open_classification
from silc.eval.embed import Features, pools
from silc.eval.linear import open_splits, ridge
from silc.eval.metrics import Result, bootstrap
from silc.model.silc import Silc


@dataclass(frozen=True)
class Config:
    shots: tuple[int, ...] = (1, 5, 10)
    seeds: int = 3
    """Draws of the support pictures; the score is their mean."""
    l2: float = 1024.0
    split: str | None = None
    """What is scored; None: the set's customary one, else the first of test, val. train is learned from."""
    kind: str | None = None
    """Which layout, where a folder can be read in several ways."""
    batch: int = 128


def run(model: Silc, folder: Path | str, cfg: Config, features: Features | None = None) -> Result:
    """Accuracy with k training pictures of each class to learn from, mean over the seeds; chance is 1/C.

    The linear regression of big_vision's few-shot evaluation (see `ridge`) on the pooled features. Intervals resample
    the test pictures; how far the seeds lie apart is in details. ValueError for a set that is not as `open_splits` and
    `open_classification` want it, or a class without training pictures.
    """
    train, test = open_splits(open_classification, folder, cfg.split, cfg.kind)
    classes, total = len(train.classes), len(train)
    sizes = torch.bincount(torch.tensor(train.labels), minlength=classes)
    if not sizes.all():
        empty = train.classes[int(sizes.argmin())][0]
        raise ValueError(f"{folder}: the class {empty!r} has no pictures in {train.split}.")
    train, drawn = needed(train, cfg)
    features = features or Features(model)
    x = features.images(train, cfg.batch, f"fewshot {train.name}", pooled=True).to(model.device)
    tested = features.images(test, cfg.batch, f"fewshot {test.name}", pooled=True).to(model.device)
    labels, truth = (torch.tensor(data.labels, device=model.device) for data in (train, test))
    hits = {k: torch.zeros(cfg.seeds, len(test), dtype=torch.float64) for k in cfg.shots}
    for seed, order in enumerate(drawn):
        for k in cfg.shots:
            support = torch.cat([own[:k] for own in order]).to(model.device)
            scores = ridge(x[support], labels[support], classes, cfg.l2)(tested)
            hits[k][seed] = (scores.argmax(1) == truth).double().cpu()
    by_seed = {f"shot{k}": found.mean(1) for k, found in hits.items()}
    return Result(
        {name: found.mean().item() for name, found in by_seed.items()},
        dict.fromkeys(by_seed, 1 / classes),
        {"set": test.name, "split": test.split, "count": len(test), "train": total,
         "classes": [names[0] for names in train.classes],
         "features": "pooled" if pools(model) else "embedding",
         "protocol": {"name": "big_vision fewshot_lsr", "l2": cfg.l2, "bias": 100, "targets": [-1, 1]},
         "seeds": {name: found.tolist() for name, found in by_seed.items()},
         "spread": {name: found.std(correction=0).item() for name, found in by_seed.items()},
         "support": {f"shot{k}": int(sizes.clamp(max=k).sum()) for k in cfg.shots},
         "interval": {f"shot{k}": bootstrap(found.mean(0)) for k, found in hits.items()},
         "items": {f"shot{k}": found.mean(0).tolist() for k, found in hits.items()}},
    )


def permuted(labels: Tensor, classes: int, seed: int) -> list[Tensor]:
    """Indices of each class in the order in which they are drawn: the first of 5 shots is the one of 1 shot."""
    rng = np.random.default_rng(seed)
    return [torch.from_numpy(rng.permutation(np.flatnonzero(labels.numpy() == c))) for c in range(classes)]


def needed(train: Labelled, cfg: Config) -> tuple[Labelled, list[list[Tensor]]]:
    """The training pictures to embed, and for each seed the drawn ones of each class, as their indices.

    All pictures, so that other tasks find their features; only those that are drawn if most are not (ImageNet: 30,000
    of 1.3 million).
    """
    labels, most = torch.tensor(train.labels), max(cfg.shots)
    drawn = [[own[:most] for own in permuted(labels, len(train.classes), seed)] for seed in range(cfg.seeds)]
    kept = torch.cat([own for order in drawn for own in order]).unique()
    if 2 * len(kept) >= len(train):
        return train, drawn
    spans = None if train.spans is None else [train.spans[i] for i in kept]
    some = dataclasses.replace(
        train, paths=[train.paths[i] for i in kept], labels=labels[kept].tolist(), spans=spans
    )
    return some, [[torch.searchsorted(kept, own) for own in order] for order in drawn]
