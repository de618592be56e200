"""Diagnostics of the picture features alone: k nearest neighbours and a linear probe.

Gives: Config, run.
Used by: eval/run, which finds it by these two names.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from silc.data.labelled import open_classification
from silc.eval.embed import Features, pools
from silc.eval.linear import best_l2, every_fifth, open_splits
from silc.eval.metrics import Result, bootstrap
from silc.model.silc import Silc


@dataclass(frozen=True)
class Config:
    neighbours: tuple[int, ...] = (10, 20)
    """Nearest training pictures that vote."""
    temperature: float = 0.07
    """A neighbour's vote weighs exp(cosine / temperature)."""
    l2: tuple[float, ...] = (1e-5, 1e-4, 1e-3, 1e-2, 1e-1, 1.0)
    """Strengths tried for the linear probe, on every fifth training picture of a class."""
    steps: int = 200
    """L-BFGS iterations of the linear probe at most."""
    split: str | None = None
    """What is scored; None: the set's customary one, else the first of test, val. train is learned from."""
    kind: str | None = None
    """Which layout, where a folder can be read in several ways."""
    batch: int = 128


def run(model: Silc, folder: Path | str, cfg: Config, features: Features | None = None) -> Result:
    """Accuracy of both on the scored split, learned on the training split; chance is 1/C. Nothing in it is random.

    ValueError for a set that is not as `open_splits` and `open_classification` want it.
    """
    train, test = open_splits(open_classification, folder, cfg.split, cfg.kind)
    features = features or Features(model)
    x = features.images(train, cfg.batch, f"probe {train.name}", pooled=True).to(model.device)
    tested = features.images(test, cfg.batch, f"probe {test.name}", pooled=True).to(model.device)
    labels = torch.tensor(train.labels, device=model.device)
    truth = torch.tensor(test.labels, device=model.device)
    classes = len(train.classes)
    found = {
        f"knn{k}": vote(x, labels, tested, classes, k, cfg.temperature) for k in cfg.neighbours
    }
    linear, l2, tried = best_l2(x, labels, classes, every_fifth(labels), cfg.l2, cfg.steps)
    found["linear"] = linear(tested).argmax(1)
    hits = {name: (guess == truth).double().cpu() for name, guess in found.items()}
    return Result(
        {name: hit.mean().item() for name, hit in hits.items()},
        dict.fromkeys(hits, 1 / classes),
        {"set": test.name, "split": test.split, "count": len(test), "train": len(train),
         "classes": [names[0] for names in train.classes],
         "features": "pooled" if pools(model) else "embedding",
         "protocol": {"knn": {"temperature": cfg.temperature, "similarity": "cosine"},
                      "linear": {"l2": l2, "l2_held_out": tried, "steps": cfg.steps, "standardised": True}},
         "interval": {name: bootstrap(hit) for name, hit in hits.items()},
         "items": {name: hit.tolist() for name, hit in hits.items()}},
    )


def vote(
    x: Tensor, labels: Tensor, tested: Tensor, classes: int, k: int, temperature: float, chunk: int = 1024
) -> Tensor:
    """The class with the most weight among the k nearest of x [N, D] for each of tested [M, D]: int64 [M].

    As DINO (arXiv 2104.14294) evaluates. `chunk` rows at a time; never more than chunk x N similarities exist.
    """
    x, found = F.normalize(x, dim=1), []
    for part in F.normalize(tested, dim=1).split(chunk):
        near = (part @ x.T).topk(min(k, len(x)))
        votes = part.new_zeros(len(part), classes)
        # the best neighbour weighs 1: exp(1 / temperature) of a small temperature would be infinite
        weight = ((near.values - near.values[:, :1]) / temperature).exp()
        found.append(votes.scatter_add_(1, labels[near.indices], weight).argmax(1))
    return torch.cat(found)
