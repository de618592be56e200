"""`silc search`: what was found in a folder, as a table, as a page of thumbnails, and as JSON.

Gives: search.
Used by: the command line.
"""

from __future__ import annotations

import json
import os
from collections import Counter
from collections.abc import Sequence
from datetime import datetime
from pathlib import Path
from typing import Any
from urllib.parse import quote

from silc.app.index_file import shown
from silc.app.pages import template
from silc.app.searching import BATCH, Hit, Index, folder_of_pictures
from silc.app.thumbs import data_uri, read_picture, view
from silc.data.store import IMAGES
from silc.opening import load
from silc.parallel import pick_device


def search(
    target: str, folder: Path, queries: Sequence[str], top: int = 10, out: Path | None = None,
    cache: Path | None = None, device: str = "auto", batch: int = BATCH,
) -> list[list[Hit]]:  # fmt: skip
    """Print for each query a table of its best pictures; with `out`, write search.html and results.json there.

    A query that is a file is a picture to search by. ValueError for no query, an empty one, a picture that does not
    exist, a `top` or `batch` below 1, a folder that is none, all before a model is opened; and as `load` and `Index`.
    """
    asked = _asked(queries)
    for name, value in (("--top", top), ("--batch", batch)):
        if value < 1:
            raise ValueError(f"{name} must be 1 or more.")
    folder_of_pictures(folder)
    index = Index.of(load(target).to(pick_device(device)), folder, cache, batch)
    found = index.ask(index.vectors(asked), top)
    for query, hits in zip(asked, found):
        print(shown(str(query)))
        for hit in hits:
            print(f"  {hit.cosine:7.4f}  {shown(str(folder / hit.path))}")
    if out is not None:
        out.mkdir(parents=True, exist_ok=True)
        about = _about(index, target)
        _write_json(out / "results.json", about, asked, found)
        _write_page(out / "search.html", index, about, asked, found)
    return found


def _asked(queries: Sequence[str]) -> list[str | Path]:
    """Words as they are, pictures as paths."""
    if not queries:
        raise ValueError('say what to look for: silc search FOLDER "a red apple" --model MODEL')
    if not all(text.strip() for text in queries):
        raise ValueError("a query is empty: say what to look for.")
    found: list[str | Path] = []
    for text in queries:
        # a file without an ending may be called as some word is
        ending = Path(text).suffix.lower().lstrip(".")
        if ending and os.path.isfile(text):
            found.append(Path(text))
        elif ending in IMAGES:
            raise ValueError(f"{text} does not exist; with such an ending, a query is a picture to search by.")
        else:
            found.append(text)
    return found


def _about(index: Index, target: str) -> dict[str, Any]:
    return {
        "folder": str(index.root), "model": target, "fingerprint": index.fingerprint, "pictures": len(index.paths),
        "left_out": dict(Counter(index.bad.values()).most_common()),
        "written": datetime.now().astimezone().strftime("%Y-%m-%d %H:%M %z"),
    }  # fmt: skip


def _write_json(path: Path, about: dict[str, Any], asked: Sequence[str | Path], found: Sequence[list[Hit]]) -> None:
    answers = [
        {"query": str(query), "kind": "picture" if isinstance(query, Path) else "words",
         "hits": [{"path": hit.path, "cosine": hit.cosine} for hit in hits]}
        for query, hits in zip(asked, found)
    ]  # fmt: skip
    text = json.dumps({**about, "queries": answers}, indent=1, ensure_ascii=False) + "\n"
    # bytes of a file's name that are no text become JSON's own escapes
    path.write_bytes(text.encode("utf-8", "backslashreplace"))


def _write_page(
    path: Path, index: Index, about: dict[str, Any], asked: Sequence[str | Path], found: Sequence[list[Hit]]
) -> None:
    thumbs: dict[Path, dict[str, Any]] = {}

    def shown_picture(file: Path) -> dict[str, Any]:
        if file not in thumbs:  # many queries find the same pictures
            thumbs[file] = _thumb(file)
        return thumbs[file]

    answers = [
        {"text": shown(query.name if isinstance(query, Path) else query),
         "picture": shown_picture(query) if isinstance(query, Path) else None,
         "hits": [{"path": shown(hit.path), "cosine": hit.cosine, "href": _link(index.root / hit.path, path.parent),
                   **shown_picture(index.root / hit.path)} for hit in hits]}
        for query, hits in zip(asked, found)
    ]  # fmt: skip
    left_out = ", ".join(f"{count} {cause}" for cause, count in about["left_out"].items())
    page = template("search.html").render(
        answers=answers, folder=shown(index.root.name), pictures=len(index.paths), model=shown(about["model"]),
        left_out=left_out, written=about["written"],
    )  # fmt: skip
    path.write_text(page, encoding="utf-8")


def _thumb(file: Path) -> dict[str, Any]:
    """The picture as a data URI, empty where it is no longer there, and its width over its height."""
    pixels = read_picture(str(file))
    if pixels is None:
        return {"src": "", "aspect": 1.0}
    small = view(pixels)
    return {"src": data_uri(small), "aspect": small.width / small.height}


def _link(file: Path, page: Path) -> str:
    """From the page to the file, so that both may be moved together; quoted, so that no name is taken for a URL."""
    return quote(os.fsencode(os.path.relpath(file, page.resolve())))
