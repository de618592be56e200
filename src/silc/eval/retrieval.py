"""Image-text retrieval, both ways, with any number of captions an image.

Gives: Config, run.
Used by: eval/run, which finds it by these two names.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from silc.data.labelled import Captioned, open_captioned
from silc.eval.embed import Features, embed_texts
from silc.eval.metrics import Result, bootstrap, chance_recall, first_hit_ranks
from silc.model.silc import Silc


@dataclass(frozen=True)
class Config:
    ks: tuple[int, ...] = (1, 5, 10)
    split: str | None = None
    """None: the set's customary one, else the first of test, val, train."""
    kind: str | None = None
    """Which layout, where a folder can be read in several ways."""
    batch: int = 128
    chunk: int = 1024
    """Queries compared with all candidates at a time; bounds memory."""
    examples: int = 24
    """Queries each way whose nearest candidates are kept for the report."""
    listed: int = 5
    """Nearest candidates that are kept for each of them."""


@dataclass(frozen=True)
class Relation:
    """Which caption belongs to which image. Equal captions are one text: any image that has it is a right answer.

    texts: the distinct captions; pairs int64 [P, 2]: distinct (image, text); instances int64 [I, 2]: (image, text) of
    every caption as listed, repeats included; copies int64 [T]: how often each text is listed.
    """

    texts: list[str]
    pairs: Tensor
    instances: Tensor
    copies: Tensor


def relate(captions: list[list[str]]) -> Relation:
    number: dict[str, int] = {}
    listed = [(i, number.setdefault(text, len(number))) for i, own in enumerate(captions) for text in own]
    instances = torch.tensor(listed, dtype=torch.int64).view(-1, 2)
    copies = torch.bincount(instances[:, 1], minlength=len(number))
    return Relation(list(number), instances.unique(dim=0), instances, copies)


def run(model: Silc, folder: Path | str, cfg: Config, features: Features | None = None) -> Result:
    """Recall at k: is a right answer among the k nearest? image_to_text: any of the image's captions; text_to_image:
    any image that has the caption. Chance is exact for the number of candidates and right answers.

    Intervals resample images, whose captions are not independent. ValueError for a set that is not as `open_captioned`
    wants it.
    """
    data = open_captioned(folder, cfg.split, cfg.kind)
    known = relate(data.captions)
    images = (features or Features(model)).images(data, cfg.batch, f"retrieval {data.name}").to(model.device)
    texts = embed_texts(model, known.texts, cfg.batch, f"retrieval {data.name}").to(model.device)
    pairs, copies = known.pairs.to(model.device), known.copies.to(model.device)
    to_text = first_hit_ranks(images, texts, pairs, copies, cfg.chunk)
    to_image = first_hit_ranks(texts, images, pairs.flip(1), None, cfg.chunk)[known.instances[:, 1]]
    owner, text = known.pairs.unbind(1)
    image_has = torch.zeros(len(data), dtype=torch.int64).index_add_(0, owner, known.copies[text])
    text_has = torch.bincount(text, minlength=len(known.texts))[known.instances[:, 1]]
    ways = {
        "text_to_image": (to_image, text_has, len(data), known.instances[:, 0]),
        "image_to_text": (to_text, image_has, len(known.instances), torch.arange(len(data))),
    }
    metrics, chance, interval, items = {}, {}, {}, {}
    for way, (ranks, right, total, image) in ways.items():
        for k in cfg.ks:
            hits = (ranks < k).double()
            metrics[f"{way}_r{k}"] = hits.mean().item()
            chance[f"{way}_r{k}"] = chance_recall(right, total, k)
            interval[f"{way}_r{k}"] = bootstrap(hits, image)
            items[f"{way}_r{k}"] = hits.int().tolist()
    return Result(metrics, chance, {
        "set": data.name, "split": data.split, "count": len(data), "captions": len(known.instances),
        "distinct_captions": len(known.texts), "interval": interval, "items": items,
        "groups": {name: ways[name.rpartition("_")[0]][3].tolist() for name in items},
        "neighbours": _neighbours(data, known, images, texts, cfg),
    })


def _neighbours(data: Captioned, known: Relation, images: Tensor, texts: Tensor, cfg: Config) -> dict[str, Any]:
    """For some queries spread over the set: what was found, best first, and whether it is right."""
    right = set(map(tuple, known.pairs.tolist()))
    some_texts = _spread(len(texts), cfg.examples)
    some_images = _spread(len(images), cfg.examples)
    found_images = _nearest(texts[some_texts], images, cfg.listed)
    found_texts = _nearest(images[some_images], texts, cfg.listed)
    return {
        "text_to_image": [
            {"text": known.texts[t],
             "found": [{"path": data.ident(i), "cosine": c, "right": (i, t) in right} for i, c in found]}
            for t, found in zip(some_texts, found_images)
        ],
        "image_to_text": [
            {"path": data.ident(i),
             "found": [{"text": known.texts[t], "cosine": c, "right": (i, t) in right} for t, c in found]}
            for i, found in zip(some_images, found_texts)
        ],
    }


def _spread(total: int, wanted: int) -> list[int]:
    """Up to `wanted` indices, evenly spread over range(total), the same every time."""
    return sorted({i * total // wanted for i in range(wanted)}) if total > wanted else list(range(total))


def _nearest(queries: Tensor, candidates: Tensor, listed: int) -> list[list[tuple[int, float]]]:
    best = (queries @ candidates.T).topk(min(listed, len(candidates)))
    rows = zip(best.indices.tolist(), best.values.tolist())
    return [[(i, round(v, 5)) for i, v in zip(indices, values)] for indices, values in rows]
