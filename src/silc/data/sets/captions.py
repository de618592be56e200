"""Caption sets: COCO's JSON, Karpathy's splits, CLIP_benchmark tars, tables, and an index file.

Gives: `READERS`.
Used by: data/labelled.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from silc.data.sets import tars
from silc.data.sets.common import Captioned
from silc.data.sets.files import Reader, first_existing, json_object, pick, rows_of, text_of, unsplit

TABLES = ("captions.jsonl", "captions.csv")
INDEX = "index.jsonl"
COCO = re.compile(r"captions_(.+)\.json")
KARPATHY = ("dataset_coco.json", "dataset_flickr30k.json", "dataset_flickr8k.json", "dataset.json")
PHOTOGRAPHS = ("", "images", "flickr30k-images", "flickr30k_images", "Images", "Flicker8k_Dataset")
"""Where people keep the pictures that Karpathy's files name."""


def _captions(value: Any, place: str) -> list[str]:
    texts = [value] if isinstance(value, str) else value
    if not isinstance(texts, list) or not texts or not all(isinstance(t, str) and t.strip() for t in texts):
        raise ValueError(f"{place}: the row has no `caption`: a text or a list of texts, none of them empty.")
    return texts


def _present(paths: Iterable[Path], said: Path) -> list[Path]:
    made = list(paths)
    for path in made:
        if not path.is_file():
            raise ValueError(f"{said} names the image {path}, which does not exist.")
    return made


# ---------------------------------------------------------------- tables


def _table(path: Path) -> Path | None:
    if path.is_file():
        return path if path.suffix in (".jsonl", ".csv") and path.name != INDEX else None
    return first_existing(*(path / name for name in TABLES))


def open_table(location: Path, split: str | None, kind: str | None) -> Captioned:
    """Rows with `image`, a path relative to the file, and `caption`, a text or (JSON) a list of texts.

    Rows of the same image are joined; a column `split` divides the set.
    """
    path = _table(location)
    assert path is not None
    rows = []
    for place, row in rows_of(path, ("image", "caption")):
        image = row.get("image")
        if not isinstance(image, str) or not image:
            raise ValueError(f"{place}: the row has no `image`.")
        rows.append((place, image, _captions(row.get("caption"), place), str(row.get("split") or "")))
    if not rows:
        raise ValueError(f"{path} has no rows; each needs `image` and `caption`.")
    divided = any(row[3] for row in rows)
    name, chosen = unsplit(path.parent, None if divided else split)
    if divided:
        chosen = pick(path, {row[3] for row in rows}, split)
    captions: dict[str, list[str]] = {}
    for place, image, texts, where in rows:
        if divided and where != chosen:
            continue
        if image not in captions and not (path.parent / image).is_file():
            raise ValueError(f"{place}: the image {path.parent / image} does not exist.")
        captions.setdefault(image, []).extend(texts)
    name = name if path.stem == "captions" else path.stem
    return Captioned(name, [path.parent / image for image in captions], list(captions.values()), chosen)


def _index(path: Path) -> Path | None:
    index = path / INDEX if path.is_dir() else path
    return index if index.name == INDEX and index.exists() else None


def open_index(location: Path, split: str | None, kind: str | None) -> Captioned:
    """`index.jsonl`, a row an image with `image`, `captions` and `split`; rows without captions are for other tasks."""
    index = _index(location)
    assert index is not None
    rows = [(place, row) for place, row in rows_of(index, ()) if row.get("captions")]
    if not rows:
        raise ValueError(f"{index} has no row with `captions`.")
    chosen = pick(index, {str(row.get("split", "")) for _, row in rows}, split)
    rows = [(place, row) for place, row in rows if str(row.get("split", "")) == chosen]
    captions = [_captions(row["captions"], place) for place, row in rows]
    paths = _present((index.parent / str(row.get("image")) for _, row in rows), index)
    return Captioned(index.parent.resolve().name, paths, captions, chosen)


# ---------------------------------------------------------------- COCO


def _json_file(path: Path) -> bool:
    return path.is_file() and path.suffix == ".json"


def _says_sentences(path: Path) -> bool:
    """Karpathy's files and COCO's begin differently; neither is parsed to tell."""
    with path.open("rb") as file:
        return b'"sentences"' in file.read(1 << 16)


def _coco_files(path: Path) -> dict[str, Path]:
    if _json_file(path):
        match = COCO.fullmatch(path.name)
        return {} if _says_sentences(path) else {match[1] if match else path.stem: path}
    found = [*path.glob("captions_*.json"), *(path / "annotations").glob("captions_*.json")]
    return {match[1]: file for file in found if (match := COCO.fullmatch(file.name))}


def open_coco(location: Path, split: str | None, kind: str | None) -> Captioned:
    """`annotations/captions_val2017.json`, pictures in `val2017/`, `images/val2017/` or `images/`."""
    files = _coco_files(location)
    chosen = pick(location, files, split)
    file = files[chosen]
    data = json_object(text_of(file), str(file))
    names: dict[Any, str] = {}
    captions: dict[Any, list[str]] = {}
    try:
        for image in data["images"]:
            names[image["id"]] = image["file_name"]
        for row in data["annotations"]:
            captions.setdefault(row["image_id"], []).append(row["caption"].strip())
    except (KeyError, TypeError, AttributeError):
        raise ValueError(f"{file} is no COCO caption file: it needs `images` with id and file_name and `annotations` "
                         "with image_id and caption.") from None  # fmt: skip
    for stranger in (key for key in captions if key not in names):
        raise ValueError(f"{file} has a caption for image {stranger}, which it does not list.")
    kept = [key for key in names if key in captions]
    if not kept:
        raise ValueError(f"{file} holds no captions.")
    root = file.parent.parent if file.parent.name == "annotations" else file.parent
    places = [root / chosen, root / "images" / chosen, root / "images", root]
    folder = next((p for p in places if (p / names[kept[0]]).is_file()), places[0])
    return Captioned("coco-captions", _present((folder / names[key] for key in kept), file),
                     [captions[key] for key in kept], chosen)  # fmt: skip


def _karpathy_file(path: Path) -> Path | None:
    if _json_file(path):
        return path if _says_sentences(path) else None
    return first_existing(*(path / name for name in KARPATHY), *(path / "annotations" / name for name in KARPATHY))


def _photograph(root: Path, part: Path, name: str) -> Path:
    places = [root / base / sub / name for base in PHOTOGRAPHS for sub in dict.fromkeys((part, Path()))]
    return next((place for place in places if place.is_file()), places[0])


def open_karpathy(location: Path, split: str | None, kind: str | None) -> Captioned:
    """`dataset_coco.json` or `dataset_flickr30k.json` of Karpathy and Li; without a split, their `test`.

    Pictures lie beside the file as it names them (`val2014/NAME`), or in `images/`, `flickr30k-images/` and the like.
    """
    file = _karpathy_file(location)
    assert file is not None
    data = json_object(text_of(file), str(file))
    try:
        images = [(str(row["split"]), Path(row.get("filepath", "")), str(row["filename"]),
                   [sentence["raw"].strip() for sentence in row["sentences"]]) for row in data["images"]]  # fmt: skip
    except (KeyError, TypeError, AttributeError):
        raise ValueError(f"{file} is no split file of Karpathy: each of its `images` needs filename, split and "
                         "sentences with raw.") from None  # fmt: skip
    chosen = pick(file, {image[0] for image in images}, split)
    images = [image for image in images if image[0] == chosen]
    root = file.parent.parent if file.parent.name == "annotations" else file.parent
    paths = [_photograph(root, part, name) for _, part, name, _ in images]
    captions = [texts for _, _, _, texts in images]
    for path, texts in zip(paths, captions):
        if not any(texts):
            raise ValueError(f"{file} gives {path.name} no caption.")
    return Captioned(str(data.get("dataset") or file.stem), _present(paths, file), captions, chosen)


READERS = (
    Reader(("table",), "captions.jsonl or captions.csv with image and caption", lambda p: bool(_table(p)), open_table),
    Reader(("index",), "index.jsonl with image, captions and split", lambda p: bool(_index(p)), open_index),
    Reader(("coco",), "annotations/captions_SPLIT.json", lambda p: bool(_coco_files(p)), open_coco),
    Reader(("karpathy",), "dataset_coco.json or dataset_flickr30k.json", lambda p: bool(_karpathy_file(p)),
           open_karpathy),
    Reader(("clip-benchmark",), tars.LAYOUT, tars.mine, tars.open_captioned),
)  # fmt: skip
