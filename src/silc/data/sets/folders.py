"""Classification sets as class folders, ImageNet's synset folders, and tables of images and labels.

Gives: `READERS`.
Used by: data/labelled.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

from silc.data.sets import tars
from silc.data.sets.common import Labelled
from silc.data.sets.files import (
    SUFFIXES,
    TEST_FIRST,
    VAL_FIRST,
    Reader,
    check_classes,
    is_split,
    pick,
    pictures,
    rows_of,
    subfolders,
    templates_of,
    text_of,
    unsplit,
)
from silc.data.sets.names import class_list
from silc.plain import nearest

SYNSET = re.compile(r"n\d{8}")
TABLES = ("labels.jsonl", "labels.csv")


def _splits(folder: Path) -> list[str]:
    """Subfolders, if every one of them is named like a split and holds folders, not pictures."""
    found = subfolders(folder)
    divided = all(is_split(name) and subfolders(folder / name) and not pictures(folder / name) for name in found)
    return found if divided else []


def _chosen(folder: Path, split: str | None, order: tuple[str, ...]) -> tuple[Path, str, str]:
    """(folder of the class folders, name of the set, split)."""
    splits = _splits(folder)
    if not splits:
        return folder, *unsplit(folder, split)
    chosen = pick(folder, splits, split, order)
    return folder / chosen, folder.resolve().name, chosen


def _beside(folder: Path, name: str) -> Path:
    """A file that describes the set: in the folder of a split, or one above it."""
    above = folder.parent / name
    return above if is_split(folder.name) and above.exists() and not (folder / name).exists() else folder / name


def _gather(folder: Path, names: list[str]) -> tuple[list[Path], list[int]]:
    paths: list[Path] = []
    labels: list[int] = []
    for label, name in enumerate(names):
        found = pictures(folder / name)
        paths += found
        labels += [label] * len(found)
    if not paths:
        raise ValueError(f"{folder} holds no pictures; put them in its class folders as {', '.join(SUFFIXES)}.")
    return paths, labels


# ---------------------------------------------------------------- class folders


def open_folders(location: Path, split: str | None, kind: str | None) -> Labelled:
    """`[SPLIT/]CLASS/*.jpg`.

    `classes.txt`, if there, gives order and names: `folder<TAB>name, synonym` or just `folder` a line; without it the
    folders are sorted and named after themselves with `_` as a space. `templates.txt` holds a prompt with `{}` a line.
    """
    folder, name, chosen = _chosen(location, split, TEST_FIRST)
    found = subfolders(folder)
    listing = _beside(folder, "classes.txt")
    listed = listing.exists()
    names = dict(class_lines(listing)) if listed else {each: [each.replace("_", " ")] for each in found}
    if not names:
        raise ValueError(f"{listing if listed else folder} names no class; give each class a folder of pictures.")
    for missing in sorted(set(names) - set(found)):
        hint = nearest(missing, found) if found else ""
        raise ValueError(f"{listing} lists {missing!r}, but {folder} has no such folder.{hint}")
    for extra in sorted(set(found) - set(names)):
        raise ValueError(f"{folder / extra} is not listed in {listing.name}; add a line for it or move it away.")
    classes = list(names.values())
    check_classes(classes, listing if listed else folder)
    paths, labels = _gather(folder, list(names))
    return Labelled(name, classes, paths, labels, templates_of(_beside(folder, "templates.txt")), chosen)


def class_lines(path: Path) -> Iterator[tuple[str, list[str]]]:
    """(label, names) of each line `label<TAB>name, synonym` or `label`."""
    seen: set[str] = set()
    for number, line in enumerate(text_of(path).splitlines(), 1):
        label, tab, text = line.partition("\t")
        label = label.strip()
        if not label:
            continue
        if label in seen:
            raise ValueError(f"{path}, line {number}: {label!r} is listed twice.")
        seen.add(label)
        yield label, [name.strip() for name in text.split(",") if name.strip()] if tab else [label.replace("_", " ")]


# ---------------------------------------------------------------- ImageNet


def _is_imagenet(path: Path) -> bool:
    found = _splits(path)
    folder = path / found[0] if found else path
    names = subfolders(folder)
    return bool(names) and all(map(SYNSET.fullmatch, names)) and not _beside(folder, "classes.txt").exists()


def open_imagenet(location: Path, split: str | None, kind: str | None) -> Labelled:
    """`[SPLIT/]n01440764/*.JPEG`, with the names of the zero-shot benchmark for those synsets that are there.

    With fewer than 1,000 folders (ImageNet-A, -R, Imagenette) only their classes compete, as is the custom.
    """
    folder, name, chosen = _chosen(location, split, VAL_FIRST)
    shipped = class_list("imagenet")
    names = dict(zip(shipped.synsets, shipped.classes))
    found = set(subfolders(folder))
    for extra in sorted(found - set(names)):
        raise ValueError(f"{folder / extra} is no synset of ImageNet-1k; name all classes in a classes.txt.")
    synsets = [synset for synset in names if synset in found]
    paths, labels = _gather(folder, synsets)
    return Labelled(name, [names[synset] for synset in synsets], paths, labels,
                    templates_of(_beside(folder, "templates.txt")), chosen)  # fmt: skip


# ---------------------------------------------------------------- tables


def _table(path: Path) -> Path | None:
    if path.is_file():
        return path if path.suffix in (".csv", ".jsonl") else None
    return next((path / name for name in TABLES if (path / name).exists()), None)


def open_table(location: Path, split: str | None, kind: str | None) -> Labelled:
    """Rows with `image`, a path relative to the table, and `label`; a column `split` divides the set.

    `classes.txt` beside it gives order and names as for class folders; a label may also be the number of a line of it.
    Without it the labels are the names, sorted.
    """
    table = _table(location)
    assert table is not None
    rows = []
    for place, row in rows_of(table, ("image", "label")):
        image, label = row.get("image"), row.get("label")
        label = str(label) if isinstance(label, int) and not isinstance(label, bool) else label
        for column, cell in (("image", image), ("label", label)):
            if not isinstance(cell, str) or not cell.strip():
                raise ValueError(f"{place}: the row has no `{column}`.")
        rows.append((place, str(image), str(label).strip(), str(row.get("split") or "")))
    if not rows:
        raise ValueError(f"{table} has no rows; each needs `image` and `label`.")
    name, chosen = unsplit(table.parent, None if any(row[3] for row in rows) else split)
    if any(row[3] for row in rows):
        chosen = pick(table, {row[3] for row in rows}, split)
        rows = [row for row in rows if row[3] == chosen]
    names, numbers = _names_of(table.parent / "classes.txt", {label for _, _, label, _ in rows})
    paths, labels = [], []
    for place, image, label, _ in rows:
        if label not in numbers:
            raise ValueError(f"{place}: {label!r} is not a class of classes.txt." + nearest(label, numbers))
        if not (table.parent / image).is_file():
            raise ValueError(f"{place}: the image {table.parent / image} does not exist.")
        paths.append(table.parent / image)
        labels.append(numbers[label])
    return Labelled(name if table.stem == "labels" else table.stem, names, paths, labels,
                    templates_of(table.parent / "templates.txt"), chosen)  # fmt: skip


def _names_of(listing: Path, labels: set[str]) -> tuple[list[list[str]], dict[str, int]]:
    """Names of the classes, and the class of each label."""
    if not listing.exists():
        made = sorted(labels)
        classes = [[label.replace("_", " ")] for label in made]
        check_classes(classes, listing.parent)
        return classes, {label: i for i, label in enumerate(made)}
    lines = dict(class_lines(listing))
    check_classes(list(lines.values()), listing)
    by_number = not labels & set(lines) and all(label.isdecimal() for label in labels)
    keys = [str(i) for i in range(len(lines))] if by_number else list(lines)
    return list(lines.values()), {key: i for i, key in enumerate(keys)}


def _is_folders(path: Path) -> bool:
    plain = path.is_dir() and not (tars.mine(path) or _table(path) or _is_imagenet(path))
    return plain and bool(subfolders(path) or (path / "classes.txt").exists())


READERS = (
    Reader(("folders",), "class folders, CLASS/*.jpg or SPLIT/CLASS/*.jpg", _is_folders, open_folders),
    Reader(("imagenet",), "synset folders, [SPLIT/]n01440764/*.JPEG", _is_imagenet, open_imagenet),
    Reader(("clip-benchmark",), tars.LAYOUT, tars.mine, tars.open_labelled),
    Reader(("table",), "labels.csv or labels.jsonl with image and label", lambda p: bool(_table(p)), open_table),
)
