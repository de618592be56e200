"""The folder that an evaluation leaves: results.json, one JSON a set, results.md; written here and read back.

Gives: save, read, Outcome, items.
Used by: the command line (`eval`), app/card, app/compare.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from silc.eval.metrics import Result
from silc.eval.run import file_name, table, versions, write
from silc.plain import read_json

SUMMARY = "results.json"
TOLD = ("set", "split", "count", "templates", "protocol", "preprocess", "folder")
"""Of a set's details, what the summary repeats."""


@dataclass(frozen=True)
class Outcome:
    """What a folder of results tells: results.json, and every set's own JSON by its name."""

    folder: Path
    about: dict[str, Any]
    sets: dict[str, dict[str, Any]]

    @property
    def label(self) -> str:
        """How a page or a table calls it."""
        return self.folder.resolve().name


def save(
    results: Mapping[str, Result], folder: Path, about: Mapping[str, Any],
    skipped: Mapping[str, str] | None = None, failed: Mapping[str, str] | None = None,
) -> Path:
    """Write results.json, a JSON a set and results.md into `folder`; returns results.json.

    about: model, checkpoint hash, suite, ...; skipped: set -> where it was expected; failed: set -> why. What an
    earlier evaluation wrote of the same sets is replaced, of others it stays but is no longer listed.
    """
    packed = {name: replace(one, details=_packed(one.details)) for name, one in results.items()}
    paths = write(packed, folder, about)
    sets = {
        name: {"file": path.name, "metrics": one.metrics, "chance": one.chance,
               "interval": one.details.get("interval", {}),
               **{key: one.details[key] for key in TOLD if key in one.details}}
        for path, (name, one) in zip(paths, results.items())
    }
    summary = {**about, "versions": versions(), "sets": sets, "skipped": dict(skipped or {}),
               "failed": dict(failed or {})}
    path = folder / SUMMARY
    path.write_text(json.dumps(summary, indent=1, ensure_ascii=False, default=str) + "\n", encoding="utf-8")
    notes = [f"- {name}: skipped, no {where}" for name, where in (skipped or {}).items()]
    notes += [f"- {name}: failed, {why}" for name, why in (failed or {}).items()]
    text = table(results) + ("\n" + "\n".join(notes) + "\n" if notes else "")
    (folder / "results.md").write_text(text, encoding="utf-8")
    return path


def read(folder: Path) -> Outcome:
    """A folder that `save` wrote, or a run whose `eval` is one. ValueError says what it lacks."""
    places = [place for place in (folder, folder / "eval") if (place / SUMMARY).is_file()]
    if not places:
        raise ValueError(f"{folder} holds no {SUMMARY}: give a folder that `silc eval MODEL ... --out FOLDER` wrote.")
    place = places[0]
    about = read_json(place / SUMMARY)
    listed = about.get("sets")
    if not isinstance(listed, dict) or not listed:
        raise ValueError(f"{place / SUMMARY} lists no set: was it written by `silc eval`?")
    sets = {}
    for name, one in listed.items():
        # the name is made anew, not believed: a file from elsewhere may say anything
        sets[name] = read_json(place / f"{file_name(name)}.json")
        if not isinstance(sets[name].get("metrics"), dict) or not isinstance(sets[name].get("details"), dict):
            raise ValueError(f"{place / file_name(name)}.json has no metrics and details: evaluate {name} again.")
        sets[name] = {"chance": {}, **one, **sets[name]}
    return Outcome(place, {key: value for key, value in about.items() if key != "sets"}, sets)


def items(details: Mapping[str, Any]) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """By metric, as far as they are stored: the outcome of every item, float64 [N], and the picture it belongs to [N].

    Of a segmentation, whose mIoU is no mean over pictures, each picture's own mIoU as `picture_miou`.
    """
    stored, groups = details.get("items"), details.get("groups")
    found = {name: _unpacked(values) for name, values in stored.items()} if isinstance(stored, dict) else {}
    owner = {name: np.array(list(map(int, text.split()))) for name, text in groups.items()} if groups else {}
    labels = [one["label"] for one in details.get("predictions") or []]
    if "top1" in found and len(labels) == len(found["top1"]):
        sizes = np.bincount(labels)
        # weighted so that their mean is the mean over classes
        found["mean_class_accuracy"] = found["top1"] * len(labels) / (sizes[labels] * (sizes > 0).sum())
    own = [(i, value) for i, value in enumerate(details.get("picture_miou") or []) if value is not None]
    if own:
        owner["picture_miou"], found["picture_miou"] = (np.array(column, float) for column in zip(*own))
    return {name: (values, owner.get(name, np.arange(len(values)))) for name, values in found.items()}


def _packed(details: dict[str, Any]) -> dict[str, Any]:
    """Items as digits and groups as one text: as lists they would take a line an item."""
    stored, groups = details.get("items"), details.get("groups")
    packed = {"items": {name: _digits(values) for name, values in stored.items()}} if stored else {}
    if groups:
        packed["groups"] = {name: " ".join(map(str, of)) for name, of in groups.items() if of != [*range(len(of))]}
    return {**details, **packed}


def _digits(values: Sequence[float]) -> str | list[float]:
    whole = all(value in (0, 1) for value in values)
    return "".join(str(int(value)) for value in values) if whole else [round(value, 6) for value in values]


def _unpacked(values: str | Sequence[float]) -> np.ndarray:
    return np.array([float(value) for value in values], np.float64)
