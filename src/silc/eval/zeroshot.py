"""Zero-shot classification of a folder of classes.

Gives: Config, run.
Used by: eval/run, which finds it by these two names.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from silc.data.labelled import Labelled, open_classification
from silc.eval.embed import Features
from silc.eval.metrics import Result, bootstrap, label_ranks, per_class_accuracy
from silc.eval.prompts import canonicalize, class_embeddings, resolve_templates
from silc.model.silc import Silc
from silc.plain import nearest


@dataclass(frozen=True)
class Protocol:
    """How class names become prompts. Accuracies of different protocols cannot be compared."""

    name: str
    templates: str
    """The list that is used where the settings (and, unless `fixed`, the set) bring none."""
    fixed: bool = False
    """The set's own templates do not count."""
    first_name: bool = False
    """Of a class with several names, only the first counts; otherwise the most similar one."""
    canonical: bool = False
    """Names and templates in lower case, without punctuation."""


PROTOCOLS = (
    Protocol("plain", "simple"),
    Protocol("openai", "clip80"),
    Protocol("big_vision", "clip_paper", fixed=True, first_name=True, canonical=True),
)


@dataclass(frozen=True)
class Config:
    protocol: str = "plain"
    """plain, openai (CLIP's 80 templates) or big_vision (81 templates, first names, canonical form)."""
    templates: tuple[str, ...] = ()
    """Prompts with one `{}`, names of lists that ship (clip80, clip_paper, tcl9, simple), or files; empty: the set's
    templates.txt, else the protocol's."""
    first_name: bool = False
    """Only the first name of each class counts, whatever the protocol."""
    split: str | None = None
    """None: the set's customary one, else the first of test, val, train."""
    kind: str | None = None
    """Which layout, where a folder can be read in several ways."""
    batch: int = 128
    listed: int = 5
    """Best classes that are listed for each picture."""


def run(model: Silc, folder: Path | str, cfg: Config, features: Features | None = None) -> Result:
    """Top-1, top-5 (with more than five classes) and mean per-class accuracy; chance is k/C.

    ValueError if the set is not as `open_classification` wants it, or for an unknown protocol or template.
    """
    data, how = open_classification(folder, cfg.split, cfg.kind), protocol(cfg)
    names, templates, source = prompts_of(data, how, cfg)
    classes = class_embeddings(model, names, templates)
    images = (features or Features(model)).images(data, cfg.batch, f"zeroshot {data.name}")
    scores = classes.scores(images.to(classes.vectors.device)).cpu()
    labels = torch.tensor(data.labels)
    ranks, count = label_ranks(scores, labels), len(data.classes)
    by_class = per_class_accuracy(ranks < 1, labels, count)
    metrics, chance, interval, items = {}, {}, {}, {}
    for k in (1, 5) if count > 5 else (1,):
        hits = (ranks < k).double()
        metrics[f"top{k}"], chance[f"top{k}"] = hits.mean().item(), k / count
        interval[f"top{k}"], items[f"top{k}"] = bootstrap(hits), hits.int().tolist()
    metrics["mean_class_accuracy"], chance["mean_class_accuracy"] = by_class.nanmean().item(), 1 / count
    largest = torch.bincount(labels, minlength=count).max().item() / len(data)
    return Result(metrics, chance, {
        "set": data.name, "split": data.split, "count": len(data), "classes": [group[0] for group in names],
        "protocol": {"name": how.name, "first_name": how.first_name, "canonical": how.canonical},
        "templates": templates, "templates_from": source,
        "interval": interval, "items": items, "largest_class": largest,
        "per_class": [None if v != v else v for v in by_class.tolist()],
        "predictions": _predictions(data, scores, cfg.listed),
    })


def protocol(cfg: Config) -> Protocol:
    """The protocol of that name, with what the settings change about it."""
    for known in PROTOCOLS:
        if known.name == cfg.protocol:
            return dataclasses.replace(known, first_name=known.first_name or cfg.first_name)
    names = [known.name for known in PROTOCOLS]
    raise ValueError(f"there is no classification protocol {cfg.protocol!r}." + nearest(cfg.protocol, names))


def prompts_of(data: Labelled, how: Protocol, cfg: Config) -> tuple[list[list[str]], list[str], str]:
    """Names of each class, templates, and where the templates are from."""
    if cfg.templates:
        templates, source = resolve_templates(cfg.templates), "settings: " + ", ".join(cfg.templates)
    elif data.templates and not how.fixed:
        templates, source = list(data.templates), "the set"
    else:
        templates, source = resolve_templates([how.templates]), f"protocol: {how.templates}"
    names = [[group[0].split(",")[0]] if how.first_name else list(group) for group in data.classes]
    if how.canonical:
        templates = [canonicalize(template) for template in templates]
        names = [[canonicalize(name, ",") for name in group] for group in names]
        for before, after in zip(data.classes, names):
            if not all(after):
                raise ValueError(f"protocol {how.name}: without punctuation nothing is left of {before[0]!r}.")
    return names, templates, source


def _predictions(data: Labelled, scores: torch.Tensor, listed: int) -> list[dict[str, Any]]:
    """For each picture its path, its class and the best classes with their cosines, best first."""
    # a stable sort keeps the lower class first among equals, as the ranks do
    best = scores.sort(dim=1, descending=True, stable=True)
    values, indices = best.values[:, :listed].tolist(), best.indices[:, :listed].tolist()
    return [
        {"path": data.ident(i), "label": label, "top": top, "cosine": [round(v, 5) for v in cosine]}
        for i, (label, top, cosine) in enumerate(zip(data.labels, indices, values))
    ]
