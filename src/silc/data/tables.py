"""Pairs of image files and captions: rows of a CSV, TSV, JSONL or Parquet table, or images with same-stem .txt.

Gives: `Table` and `Folder` (each a `Source`), `open_table`, `SUFFIXES`.
Used by: data/pairs.
"""

from __future__ import annotations

import csv
import hashlib
import io
import itertools
import json
import os
from array import array
from collections.abc import Iterable, Iterator
from typing import IO, Any

import numpy as np

from silc.config import DataConfig
from silc.data.images import BadSample
from silc.data.store import IMAGES, Packer, Source, as_captions, filesystem, is_local, listing, read_image, read_range

SUFFIXES = (".csv", ".tsv", ".jsonl", ".parquet")
PEEK = 100
"""Lines of a .jsonl that are looked at to learn its keys: a key may be absent from some of them."""
MAX_CELL = 1 << 24


class Damaged(Exception):
    """A table that cannot be read on; the message says where."""


class Table(Source):
    """Images named by the rows of a table; paths and captions stay in memory, packed."""

    def __init__(self, name: str, root: str, columns: str, pairs: Iterable[tuple[str, list[str]]]) -> None:
        """`pairs` are (path below `root`, captions); rows of one image are joined, in order of first appearance.

        Raises ValueError if there is no row, no caption, or if the images are addresses on the web.
        """
        paths, texts, marks, owners = Packer(), Packer(), array("Q"), array("q")
        for row, (path, captions) in enumerate(pairs):
            mark = path or f"\n{row}"
            digest = hashlib.blake2b(mark.encode("utf-8", "surrogatepass"), digest_size=8).digest()
            marks.append(int.from_bytes(digest, "little"))
            paths.add(path)
            for caption in captions:
                texts.add(caption)
                owners.append(row)
        if not marks:
            raise ValueError(f"data: {name} has no rows.")
        if not owners:
            raise ValueError(f"data: no captions in {name}: the column is empty in all {len(marks)} rows ({columns}).")
        self.name, self.root, self.columns, self.damage = name, root, columns, []
        self.paths, self.texts = paths.strings(), texts.strings()
        first, group = _groups(np.array(marks, np.uint64))
        self.rows = first
        owner = group[np.array(owners, np.int64)]
        self.order = np.argsort(owner, kind="stable")
        self.starts = np.concatenate([[0], np.cumsum(np.bincount(owner, minlength=len(first)))])
        start = self.ident(0)
        if "://" in start and self._url(start) is None:
            raise ValueError(
                f"data: {name} names its images by address ({start}); silc does not download. "
                "Fetch them first, for example with img2dataset, and give its shards."
            )

    def __len__(self) -> int:
        return len(self.rows)

    def ident(self, index: int) -> str:
        return self.paths[int(self.rows[index])]

    def captions(self, index: int) -> list[str]:
        chosen = self.order[self.starts[index] : self.starts[index + 1]]
        if not len(chosen):
            raise BadSample("no caption")
        return [self.texts[int(i)] for i in chosen]

    def _url(self, path: str) -> str | None:
        """Where an image lies; None for an address on another file system, which rows of a table must not choose."""
        if "://" in path:
            protocol = path.partition("://")[0]
            return path if self.root.startswith(f"{protocol}://") else None
        return os.path.join(self.root, path) if is_local(self.root) else f"{self.root}/{path.lstrip('/')}"

    def read(self, index: int) -> tuple[bytes, list[str], str]:
        ident = self.ident(index)
        captions = self.captions(index)
        url = self._url(ident) if ident else None
        if url is None:
            raise BadSample("image is an address" if ident else "no image")
        return read_image(url), captions, ident

    def found(self, index: int) -> str:
        return f"{self.columns}; images are looked for in {self.root}"


def _groups(marks: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Rows with equal marks: the first row of each group, in order, and the group of every row."""
    _, first, inverse = np.unique(marks, return_index=True, return_inverse=True)
    order = np.argsort(first)
    rank = np.empty_like(order)
    rank[order] = np.arange(len(order))
    return first[order], rank[inverse]


class Folder(Source):
    """Images at any depth of a folder, each with its caption in a .txt of the same stem, or, asked for so, alone."""

    def __init__(self, name: str, root: str, captioned: bool = True) -> None:
        """List the folder; captions are read when asked for. ValueError without images or without any caption.

        Unless `captioned`, every image has the caption "" and none is looked for."""
        names, has = Packer(), array("b")
        for _, group in itertools.groupby(listing(root, deep=True), key=lambda path: path.rpartition("/")[0]):
            files = list(group)
            stems = {file[:-4] for file in files if file.endswith(".txt")}
            for file in files:
                stem, dot, kind = file.rpartition(".")
                if dot and kind.lower() in IMAGES and not file.rpartition("/")[2].startswith("."):
                    names.add(file)
                    has.append(stem in stems)
        self.name, self.root, self.damage = name, root, []
        self.names, self.has, self.captioned = names.strings(), np.array(has, bool), captioned
        if not len(self.names) or (captioned and not self.has.any()):
            what = "captions" if len(self.names) else "images, tables or tar shards"
            raise ValueError(
                f"data: no {what} in {name}; it may hold captions.csv, .jsonl or .parquet, *.tar shards, "
                f"or images ({', '.join(IMAGES)}) each with a .txt of the same stem."
            )

    def __len__(self) -> int:
        return len(self.names)

    def ident(self, index: int) -> str:
        return self.names[index]

    def captions(self, index: int) -> list[str]:
        if not self.captioned:
            return [""]
        if not self.has[index]:
            raise BadSample("no caption")
        try:
            data = read_range(f"{self.root}/{self.names[index].rpartition('.')[0]}.txt")
        except OSError:
            raise BadSample("unreadable file") from None
        texts = as_captions(data.decode("utf-8-sig", "replace"))
        if not texts:
            raise BadSample("no caption")
        return texts

    def read(self, index: int) -> tuple[bytes, list[str], str]:
        captions, name = self.captions(index), self.names[index]
        return read_image(f"{self.root}/{name}"), captions, name

    def found(self, index: int) -> str:
        return f"{int(self.has.sum())} of {len(self)} images have a .txt of the same stem"


# ---------------------------------------------------------------- rows of a table


def open_table(name: str, url: str, cfg: DataConfig) -> Table:
    """A table of image paths, relative to its own folder, and captions.

    Columns are `cfg.image_key` and `cfg.text_key`; a file named metadata.* may also use `file_name` and `text`, as
    the imagefolder layout of Hugging Face does. Raises ValueError for a missing file, column, or a damaged table.
    """
    kind = os.path.splitext(url)[1].lower()
    fs, path = filesystem(url)
    if not fs.isfile(path):
        raise ValueError(f"data: {name} does not exist; correct --data.sources.")
    with fs.open(path, "rb") as file:
        try:
            if kind == ".parquet":
                columns, cells = _parquet(file)
            else:
                columns, cells = _jsonl(file) if kind == ".jsonl" else _csv(file, "\t" if kind == ".tsv" else ",")
            image, text = _columns(name, columns, cfg)
            pairs = ((_path(a), as_captions(b)) for a, b in cells(image, text))
            return Table(name, url.rpartition("/")[0], f"columns {image!r} and {text!r} of {', '.join(columns)}", pairs)
        except UnicodeDecodeError as error:
            raise ValueError(f"data: {name} is not UTF-8 text ({error.reason} at byte {error.start}).") from None
        except (csv.Error, Damaged) as error:
            raise ValueError(f"data: {name} is not a readable table: {error}.") from None


def _path(value: Any) -> str:
    return value.strip() if isinstance(value, str) else ""


def _columns(name: str, columns: list[str], cfg: DataConfig) -> tuple[str, str]:
    made = []
    metadata = name.replace("\\", "/").rpartition("/")[2].startswith("metadata.")
    for key, also in ((cfg.image_key, "file_name"), (cfg.text_key, "text")):
        if key not in columns and not (metadata and also in columns):
            raise ValueError(
                f"data: {name} has no column {key!r}; it has: {', '.join(columns) or 'none'}. "
                f"Name the image column with --data.image-key and the caption column with --data.text-key."
            )
        made.append(key if key in columns else also)
    return made[0], made[1]


def _csv(file: IO[bytes], delimiter: str) -> tuple[list[str], Any]:
    csv.field_size_limit(MAX_CELL)
    reader = csv.reader(io.TextIOWrapper(file, "utf-8-sig", newline=""), delimiter=delimiter)
    columns = next(reader, [])

    def cells(image: str, text: str) -> Iterator[tuple[Any, Any]]:
        at, said = columns.index(image), columns.index(text)
        for row in reader:
            if row:
                yield row[at] if at < len(row) else None, _listed(row[said]) if said < len(row) else None

    return columns, cells


def _listed(cell: str) -> Any:
    """A cell that holds a JSON list of captions as that list, any other as it is."""
    if cell.lstrip().startswith('["'):
        try:
            return json.loads(cell)
        except ValueError:
            return cell
    return cell


def _jsonl(file: IO[bytes]) -> tuple[list[str], Any]:
    def parsed() -> Iterator[dict[str, Any]]:
        for number, line in enumerate(io.TextIOWrapper(file, "utf-8-sig"), 1):
            if line.strip():
                try:
                    row = json.loads(line)
                except (ValueError, RecursionError):
                    row = None
                if not isinstance(row, dict):
                    raise Damaged(f"line {number} is no JSON object")
                yield row

    rest = parsed()
    head = list(itertools.islice(rest, PEEK))
    columns = list(dict.fromkeys(key for row in head for key in row))
    return columns, lambda image, text: ((r.get(image), r.get(text)) for r in itertools.chain(head, rest))


def _parquet(file: IO[bytes]) -> tuple[list[str], Any]:
    try:
        import pyarrow as pa
        import pyarrow.parquet as pq
    except ImportError:
        raise ValueError('a .parquet table needs pyarrow: pip install "silc[parquet]".') from None
    try:
        table = pq.ParquetFile(file)
    except (pa.ArrowException, OSError) as error:
        raise Damaged(f"not a Parquet file ({error})") from None

    def cells(image: str, text: str) -> Iterator[tuple[Any, Any]]:
        kind = table.schema_arrow.field(image).type
        if pa.types.is_struct(kind) or pa.types.is_binary(kind):
            raise ValueError(f"data: column {image!r} holds images, not paths; write them as files or tar shards.")
        try:
            for batch in table.iter_batches(columns=[image, text]):
                yield from zip(batch.column(image).to_pylist(), batch.column(text).to_pylist())
        except (pa.ArrowException, OSError) as error:
            raise Damaged(f"its Parquet data break off ({error})") from None

    return list(table.schema_arrow.names), cells
