"""The webdataset layout of CLIP_benchmark: numbered tars of pictures with .cls labels or .txt captions.

Gives: `mine`, `open_labelled`, `open_captioned`, `LAYOUT`.
Used by: data/sets/folders and data/sets/captions.
"""

from __future__ import annotations

import tarfile
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from silc.data.sets.common import Captioned, Labelled, Span
from silc.data.sets.files import lines_of, pick, subfolders, templates_of, text_of
from silc.data.store import IMAGES

LAYOUT = "CLIP_benchmark tars, SPLIT/nshards.txt and SPLIT/0.tar"
COUNT = "nshards.txt"
MAX_TEXT = 1 << 20


class Sample(NamedTuple):
    """One group of members of one stem. The picture is left where it is, the rest is small and read at once."""

    name: Path
    picture: Span
    texts: dict[str, bytes]


def mine(path: Path) -> bool:
    return path.is_dir() and ((path / COUNT).exists() or any((path / s / COUNT).exists() for s in subfolders(path)))


def _place(location: Path, split: str | None) -> tuple[Path, Path, str]:
    """(folder that describes the set, folder of the tars, split); `location` may be either of the two."""
    if (location / COUNT).exists():
        whole = location.resolve()
        pick(location, [whole.name], split)
        return location.parent, location, whole.name
    found = [name for name in subfolders(location) if (location / name / COUNT).exists()]
    chosen = pick(location, found, split)
    return location, location / chosen, chosen


def _kind(root: Path) -> str:
    stated = root / "dataset_type.txt"
    if stated.exists():
        return text_of(stated).strip().lower()
    return "classification" if (root / "classnames.txt").exists() else "retrieval"


def _shards(folder: Path) -> list[Path]:
    text = text_of(folder / COUNT).strip()
    if not text.isdecimal() or int(text) < 1:
        raise ValueError(f"{folder / COUNT} must hold the number of shards, not {text[:40]!r}.")
    shards = [folder / f"{i}.tar" for i in range(int(text))]
    for shard in shards:
        if not shard.is_file():
            raise ValueError(f"{shard} does not exist, but {COUNT} counts {len(shards)} shards.")
    return shards


def _samples(shard: Path, wanted: tuple[str, ...]) -> Iterator[Sample]:
    groups: dict[str, tuple[Span | None, dict[str, bytes]]] = {}
    total, reached = shard.stat().st_size, -1
    try:
        with tarfile.open(shard, mode="r:") as tar:
            for member in tar:
                # an offset that does not grow is a forged header, on which tarfile would run for ever
                if member.offset_data <= reached or (member.isreg() and member.offset_data + member.size > total):
                    raise tarfile.ReadError("it is truncated")
                reached = member.offset_data
                folder, _, base = member.name.rpartition("/")
                stem, _, kind = base.partition(".")
                key, kind = f"{folder}/{stem}" if folder else stem, kind.lower()
                if not member.isreg() or member.issparse() or kind not in (*IMAGES, *wanted):
                    continue
                span, texts = groups.setdefault(key, (None, {}))
                if kind in IMAGES:
                    groups[key] = (Span(shard, member.offset_data, member.offset_data + member.size), texts)
                elif member.size <= MAX_TEXT:
                    content = tar.extractfile(member)
                    texts[kind] = content.read() if content else b""
    except (tarfile.TarError, ValueError, EOFError, OverflowError) as error:
        raise ValueError(f"{shard} cannot be read as a tar ({error}).") from None
    for key, (span, texts) in groups.items():
        if span is not None:
            yield Sample(shard / key, span, texts)


def _read(folder: Path, kind: str) -> list[Sample]:
    samples = [sample for shard in _shards(folder) for sample in _samples(shard, (kind,))]
    if not samples:
        raise ValueError(f"{folder} holds tars without pictures ({', '.join(IMAGES)}).")
    for sample in samples:
        if kind not in sample.texts:
            raise ValueError(f"{sample.name} has a picture but no .{kind} in its tar.")
    return samples


def open_labelled(location: Path, split: str | None, kind: str | None) -> Labelled:
    """`SPLIT/N.tar` of pictures and .cls, `classnames.txt`, `zeroshot_classification_templates.txt`.

    Names may repeat, as they do in published lists. ValueError for a retrieval or multi-label set, a class number
    beyond the names, a broken tar.
    """
    root, folder, chosen = _place(location, split)
    what = _kind(root)
    if what != "classification":
        raise ValueError(f"{root} is a {what} set of CLIP_benchmark, not one for classification.")
    names = root / "classnames.txt"
    if not names.exists():
        raise ValueError(f"{names} does not exist; it names a class a line.")
    classes = [[name.replace("_", " ")] for name in lines_of(names)]
    if not classes:
        raise ValueError(f"{names} names no class.")
    samples = _read(folder, "cls")
    labels = []
    for sample in samples:
        text = sample.texts["cls"].decode("ascii", "replace").strip()
        if not text.isdecimal() or int(text) >= len(classes):
            raise ValueError(f"{sample.name}.cls holds {text[:40]!r}, but {names.name} names classes 0 to "
                             f"{len(classes) - 1}.")  # fmt: skip
        labels.append(int(text))
    templates = templates_of(root / "zeroshot_classification_templates.txt")
    return Labelled(root.resolve().name, classes, [s.name for s in samples], labels, templates, chosen,
                    [s.picture for s in samples])  # fmt: skip


def open_captioned(location: Path, split: str | None, kind: str | None) -> Captioned:
    """`SPLIT/N.tar` of pictures and .txt with a caption a line."""
    root, folder, chosen = _place(location, split)
    what = _kind(root)
    if what != "retrieval":
        raise ValueError(f"{root} is a {what} set of CLIP_benchmark, not one for retrieval.")
    samples = _read(folder, "txt")
    captions = []
    for sample in samples:
        lines = [line.strip() for line in sample.texts["txt"].decode("utf-8", "replace").splitlines()]
        captions.append([line for line in lines if line])
        if not captions[-1]:
            raise ValueError(f"{sample.name}.txt holds no caption.")
    return Captioned(root.resolve().name, [s.name for s in samples], captions, chosen, [s.picture for s in samples])
