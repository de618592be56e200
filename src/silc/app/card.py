"""The report card of an evaluation: card.html, one file with scores, examples, mistakes and what made them.

Gives: build.
Used by: the command line, after `silc eval ... --out FOLDER`.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from silc.app.grids import mask_colours
from silc.app.pages import template
from silc.app.results import Outcome, read
from silc.app.runs import duration, interval, is_share, metric_name, number, primary, score, set_names, span, times
from silc.app.thumbs import data_uri, painted, thumb, view
from silc.data.labelled import Masked, open_masked
from silc.eval.metrics import confusion, iou

QUERIES, PICTURES, CONFUSED, PAIRS, MASKS, CLASSES = 6, 12, 8, 6, 4, 10
"""How much of each is shown: queries, classified pictures, classes of the confusion, pairs, masks, classes by IoU."""
LEGEND, SPECK = 14, 0.004
"""Classes in a legend at most; one on a smaller share of both masks is left out."""
EVEN = (0.05, 0.1, 0.2, 0.3, 0.5, 0.75, 1.0)
"""Where the bars of the tiles may end."""


def build(folder: Path, title: str = "") -> Path:
    """Write card.html into a folder of results and return its path. It needs no network, no script, no other file.

    Pictures come from the sets; where those are gone, the page goes without. ValueError as `results.read`.
    """
    told = read(folder)
    missing = [(name, f"not found: {where}") for name, where in told.about.get("skipped", {}).items()]
    missing += list(told.about.get("failed", {}).items())
    html = template("card.html").render(
        title=title or _title(told), about=told.about.get("suite_about", ""), tiles=_tiles(told), missing=missing,
        groups=[_rows(name, one) for name, one in told.sets.items()], facts=_facts(told),
        chapters=[_chapter(name, one) for name, one in told.sets.items()])
    path = told.folder / "card.html"
    path.write_text(html, encoding="utf-8")
    return path


def _title(told: Outcome) -> str:
    return Path(str(told.about.get("model", ""))).name or told.label


# ---------------------------------------------------------------- scores


def _rows(name: str, one: Mapping[str, Any]) -> list[dict[str, Any]]:
    """A row a metric, ready to print."""
    label, task = set_names(name, {})
    found = []
    for key, value in one["metrics"].items():
        value, chance = number(value), number(one["chance"].get(key))
        share = is_share(key, [value, chance])
        ends = interval(one["details"], key)
        found.append({
            "set": name, "label": label, "task": task, "metric": metric_name(key), "key": key, "value": value,
            "text": score(value, share), "chance": score(chance, share) if chance is not None else "",
            "times": times(value, chance) if chance else "", "span": span(ends, share), "ends": ends,
            "level": chance, "share": share, "constant": task.startswith("seg") or name.startswith("dense"),
        })
    return found


def _tiles(told: Outcome) -> dict[str, Any]:
    """The metrics that stand for each set, and where their common bars end."""
    tiles = []
    for name, one in told.sets.items():
        every = name.partition("/")[0] in ("fewshot", "probe")
        keys = list(one["metrics"])[:4] if every else primary([{"chance": {}, **one}])
        rows = [row for row in _rows(name, one) if row["key"] in keys and row["share"] and row["value"] is not None]
        if rows:
            tiles.append({"id": _anchor(name), "label": rows[0]["label"], "task": rows[0]["task"], "rows": rows})
    reached = [max(row["value"], row["level"] or 0, row["ends"][1] if row["ends"] else 0)
               for tile in tiles for row in tile["rows"]]
    # the number of columns that leaves the last line fullest
    columns = max((4, 3), key=lambda n: ((len(tiles) - 1) % n + 1) / n)
    top = next((end for end in EVEN if end >= max(reached, default=1)), 1.0)
    return {"list": tiles, "columns": min(columns, max(len(tiles), 2)), "top": top}


def _anchor(name: str) -> str:
    return "".join(c if c.isalnum() else "-" for c in name)


def _facts(told: Outcome) -> list[tuple[str, str]]:
    about = told.about
    versions = " · ".join(f"{key} {value}" for key, value in about.get("versions", {}).items())
    first = next(iter(told.sets.values()))["details"].get("preprocess") or {}
    seen = f"{first['size']} px, {first['resize']}, {first['interpolation']}" if "size" in first else ""
    facts = [("Model", about.get("model")), ("Checkpoint", f"sha256 {about['sha256']}" if "sha256" in about else ""),
             ("Input", seen), ("Suite", about.get("suite")), ("Data", about.get("data")),
             ("Device", about.get("device")), ("Written", about.get("written")), ("Versions", versions)]
    return [(label, str(text)) for label, text in facts if text]


# ---------------------------------------------------------------- one set


def _chapter(name: str, one: Mapping[str, Any]) -> dict[str, Any]:
    label, task = set_names(name, {})
    details = one["details"]
    count, split, seconds = details.get("count"), details.get("split"), number(details.get("seconds"))
    templates = details.get("templates") or []
    protocol = details.get("protocol") or {}
    facts = [f"{count:,} pictures" if isinstance(count, int) else "", f"split {split}" if split else "",
             f"{details['captions']:,} captions" if isinstance(details.get("captions"), int) else "",
             f"{len(details['classes'])} classes" if isinstance(details.get("classes"), list) else "",
             f"protocol {protocol['name']}" if isinstance(protocol.get("name"), str) else "",
             f"{len(templates)} template{'s' * (len(templates) != 1)}" if templates else "",
             duration(seconds) if seconds is not None else ""]
    return {
        "id": _anchor(name), "label": label, "task": task, "facts": [fact for fact in facts if fact],
        "protocol": [(key, _said(value)) for key, value in protocol.items() if value not in ("", None, [], {})],
        "templates": templates, "folder": details.get("folder", ""),
        "retrieval": _retrieval(details), "classified": _classified(details), "masks": _masks(details),
        "classes": _by_class(details), "pixels": _confused_pixels(details),
    }


def _said(value: Any) -> str:
    if isinstance(value, Mapping):
        return ", ".join(f"{key} {_said(one)}" for key, one in value.items())
    return ", ".join(map(_said, value)) if isinstance(value, list) else str(value)


def _spread(things: Sequence[Any], wanted: int) -> list[Any]:
    """Evenly spaced, so that nothing is picked."""
    return [things[i * len(things) // wanted] for i in range(wanted)] if len(things) > wanted else list(things)


def _retrieval(details: Mapping[str, Any]) -> dict[str, Any] | None:
    """Some texts with the pictures found for them, and some pictures with the texts."""
    near = details.get("neighbours")
    if not isinstance(near, dict):
        return None
    texts = [{"text": query["text"], "right": any(hit["right"] for hit in query["found"]),
              "found": [{**hit, "src": thumb(hit["path"])} for hit in query["found"]]}
             for query in _spread(near.get("text_to_image", []), QUERIES)]
    pictures = [{**query, "src": thumb(query["path"])} for query in _spread(near.get("image_to_text", []), QUERIES)]
    return {"texts": texts, "pictures": pictures}


def _classified(details: Mapping[str, Any]) -> dict[str, Any] | None:
    """Some pictures with their answers, the surest mistakes, and which classes are confused."""
    answers, names = details.get("predictions"), details.get("classes")
    if not answers or not names:
        return None
    def shown(one: Mapping[str, Any]) -> dict[str, Any]:
        return {"src": thumb(one["path"]), "said": names[one["top"][0]], "is": names[one["label"]],
                "right": one["top"][0] == one["label"], "cosine": one["cosine"][0]}

    wrong = sorted((one for one in answers if one["top"][0] != one["label"]), key=_margin, reverse=True)
    return {"some": [shown(one) for one in _spread(answers, PICTURES)],
            "worst": [shown(one) for one in wrong[:PICTURES]], "confused": _confused(answers, names)}


def _margin(one: Mapping[str, Any]) -> float:
    """By how much the wrong answer is ahead of the right one, or of the last that is listed."""
    place = one["top"].index(one["label"]) if one["label"] in one["top"] else -1
    return float(one["cosine"][0] - one["cosine"][place])


def _confused(answers: Sequence[Mapping[str, Any]], names: Sequence[str]) -> dict[str, Any] | None:
    """The pairs of classes that are confused most often, with pictures, and a table of the classes in them."""
    pairs = Counter((one["label"], one["top"][0]) for one in answers)
    total = Counter(one["label"] for one in answers)
    often = [pair for pair, count in pairs.most_common() if pair[0] != pair[1] and count > 1]
    if not often:
        return None
    told = [{"is": names[true], "said": names[said], "count": pairs[true, said], "of": total[true],
             "src": [thumb(one["path"]) for one in answers if (one["label"], one["top"][0]) == (true, said)][:3]}
            for true, said in often[:PAIRS]]
    return {"pairs": told, **_matrix(often, pairs, total, names, str)}


def _confused_pixels(details: Mapping[str, Any]) -> dict[str, Any] | None:
    """The same table of a segmentation, in percent of each class's pixels."""
    listed, by_class = details.get("confusion"), details.get("per_class")
    if not isinstance(listed, dict) or not by_class:
        return None
    pairs = {(true, said): count for true, said, count in listed["most"]}
    total = {c: one["pixels"] for c, one in enumerate(by_class)}
    often = [pair for pair in pairs if pair[0] != pair[1]]
    return {"pairs": [], **_matrix(often, pairs, total, [_first(one["class"]) for one in by_class], None)}


def _matrix(
    often: Sequence[tuple[int, int]], pairs: Mapping[tuple[int, int], int], total: Mapping[int, int],
    names: Sequence[str], write: Callable[[int], str] | None,
) -> dict[str, Any]:
    """Rows the truth, columns the answer, for the classes of the first pairs; `write` None: percent of the class."""
    order = list(dict.fromkeys(c for pair in often for c in pair))[:CONFUSED]

    def text(count: int, of: int) -> str:
        return "" if not count else write(count) if write else f"{100 * count / of:.0f}" if count > 0.005 * of else ""

    table = []
    for true in order:
        of = max(total[true], 1)
        counts = [pairs.get((true, said), 0) for said in order]
        cells = [{"text": text(count, of), "share": count / of, "right": true == said}
                 for count, said in zip(counts, order)]
        table.append({"name": names[true], "cells": cells, "rest": text(max(0, of - sum(counts)), of)})
    return {"table": table, "names": [names[c] for c in order], "percent": write is None}


def _by_class(details: Mapping[str, Any]) -> dict[str, Any] | None:
    """IoU of the best and the worst classes that occur."""
    found = [one for one in details.get("per_class") or [] if isinstance(one, dict) and one.get("pixels")]
    if not found:
        return None
    order = sorted(((float(one["iou"] or 0), _first(one["class"])) for one in found), key=lambda one: -one[0])
    top = order[0][0] or 1.0
    bars = [{"name": name, "at": 100 * value / top, "text": score(value, True)} for value, name in order]
    few = len(bars) <= 2 * CLASSES
    return {"best": bars if few else bars[:CLASSES], "worst": [] if few else bars[-CLASSES:], "count": len(bars)}


def _first(names: Any) -> str:
    return str(names[0] if isinstance(names, list) else names)


# ---------------------------------------------------------------- masks


def _masks(details: Mapping[str, Any]) -> dict[str, Any] | None:
    """Predicted and true masks over pictures: some evenly spaced, then the worst of the rest that were kept."""
    kept, settings = details.get("pictures"), details.get("settings") or {}
    if not kept:
        return None
    try:
        data = open_masked(details["folder"], settings.get("split"), settings.get("kind"))
    except ValueError:  # moved or deleted since
        return None
    if len(data) != details.get("count") or len(data.classes) != len(details.get("per_class") or data.classes):
        return None
    some = _spread([one for one in kept if one["prediction"]], MASKS)
    worst = [one for one in details.get("worst") or [] if one["prediction"]]
    fresh = [one for one in worst if all(one["index"] != other["index"] for other in some)]
    try:
        return {"some": [_overlay(data, one) for one in some], "worst": [_overlay(data, one) for one in fresh[:MASKS]]}
    except OSError:
        return None


def _overlay(data: Masked, one: Mapping[str, Any]) -> dict[str, Any]:
    index = one["index"]
    pixels, truth, colours = data.image(index), data.mask(index), mask_colours(len(data.classes), data.palette)
    with Image.open(one["prediction"], formats=["PNG"]) as picture:
        label = torch.from_numpy(np.asarray(picture).astype(np.int64))
    found = iou(confusion(truth, label, len(data.classes), data.void)).nanmean().item()
    shares = [np.bincount(mask.numpy().ravel(), minlength=len(colours))[: len(colours)] / mask.numel()
              for mask in (truth, label)]
    present = [c for c in np.argsort(-(shares[0] + 1e-6 * shares[1]), kind="stable")
               if max(shares[0][c], shares[1][c]) > SPECK]
    legend = [{"name": data.classes[c][0], "colour": "#" + "".join(f"{round(255 * v):02x}" for v in colours[c]),
               "true": f"{100 * shares[0][c]:.0f}", "said": f"{100 * shares[1][c]:.0f}"} for c in present[:LEGEND]]
    return {"picture": data_uri(view(pixels)), "said": data_uri(painted(pixels, label, colours)),
            "true": data_uri(painted(pixels, truth, colours)), "legend": legend,
            "more": len(present) - len(legend), "iou": score(None if found != found else found, True),
            "name": data.paths[index].name, "void": bool(shares[0].sum() < 0.995)}
