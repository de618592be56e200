"""Zero-shot classification of a folder of classes.

Gives: Config, run.
Used by: eval/run, which finds it by these two names.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from silc.data.labelled import Labelled, open_classification
from silc.eval.embed import embed_images
from silc.eval.metrics import Result, bootstrap, label_ranks, per_class_accuracy
from silc.eval.prompts import TEMPLATES, class_embeddings
from silc.model.silc import Silc


@dataclass(frozen=True)
class Config:
    templates: tuple[str, ...] = ()
    """Prompts with one `{}`; empty: the set's templates.txt, else a short default list."""
    batch: int = 128
    listed: int = 5
    """Best classes that are listed for each picture."""


def run(model: Silc, folder: Path | str, cfg: Config) -> Result:
    """Top-1, top-5 (with more than five classes) and mean per-class accuracy; chance is k/C.

    The class of the most similar name wins (several names a class are allowed). ValueError if the set is not as
    `open_classification` wants it.
    """
    data = open_classification(folder)
    templates = list(cfg.templates) or data.templates or list(TEMPLATES)
    classes = class_embeddings(model, data.classes, templates)
    features = embed_images(model, data, cfg.batch, f"zeroshot {data.name}")
    scores = classes.scores(features.to(classes.vectors.device)).cpu()
    labels = torch.tensor(data.labels)
    ranks, count = label_ranks(scores, labels), len(data.classes)
    by_class = per_class_accuracy(ranks < 1, labels, count)
    metrics, chance, interval = {}, {}, {}
    for k in (1, 5) if count > 5 else (1,):
        hits = (ranks < k).double()
        metrics[f"top{k}"], chance[f"top{k}"] = hits.mean().item(), k / count
        interval[f"top{k}"] = bootstrap(hits)
    metrics["mean_class_accuracy"], chance["mean_class_accuracy"] = by_class.nanmean().item(), 1 / count
    largest = torch.bincount(labels, minlength=count).max().item() / len(data)
    return Result(metrics, chance, {
        "set": data.name, "count": len(data), "classes": [names[0] for names in data.classes], "templates": templates,
        "interval": interval, "largest_class": largest,
        "per_class": [None if v != v else v for v in by_class.tolist()],
        "predictions": _predictions(data, scores, cfg.listed),
    })


def _predictions(data: Labelled, scores: torch.Tensor, listed: int) -> list[dict[str, Any]]:
    """For each picture its path, its class and the best classes with their cosines, best first."""
    # a stable sort keeps the lower class first among equals, as the ranks do
    best = scores.sort(dim=1, descending=True, stable=True)
    values, indices = best.values[:, :listed].tolist(), best.indices[:, :listed].tolist()
    return [
        {"path": str(path), "label": label, "top": top, "cosine": [round(v, 5) for v in cosine]}
        for path, label, top, cosine in zip(data.paths, data.labels, indices, values)
    ]
