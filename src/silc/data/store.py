"""Bytes where they lie, on a disk or behind any fsspec URL, and what a source of pairs is.

Gives: `Source` (what every kind of pairs offers), `Strings`, `Packer`, `read_range`, `read_image`, `listing`, `expand`.
Used by: data/tables, data/shards, data/pairs.
"""

from __future__ import annotations

import itertools
import os
import re
import time
from array import array
from collections.abc import Iterable, Iterator
from typing import Any

import fsspec
import numpy as np
from fsspec.implementations.local import LocalFileSystem

from silc.data.images import BadSample

MAX_BYTES = 1 << 28
"""Largest image file that is read; what is larger is no photograph."""
IMAGES = ("jpg", "jpeg", "png", "webp")
ATTEMPTS = 3


class Source:
    """Image-text pairs in a fixed order."""

    name: str
    damage: list[dict[str, Any]]
    """What was found broken on opening: dicts of id and cause."""

    def __len__(self) -> int:
        raise NotImplementedError

    def ident(self, index: int) -> str:
        """Stable name of a pair, for lists of bad samples."""
        raise NotImplementedError

    def captions(self, index: int) -> list[str]:
        """The captions alone. Raises BadSample if there is none."""
        raise NotImplementedError

    def read(self, index: int) -> tuple[bytes, list[str], str]:
        """Image file, captions (at least one), id. Raises BadSample."""
        raise NotImplementedError

    def found(self, index: int) -> str:
        """What is there and what was looked for, to explain a missing image or caption."""
        raise NotImplementedError


class Strings:
    """n strings as one blob and n + 1 offsets: no Python object a row, so that forked workers share the pages."""

    def __init__(self, blob: np.ndarray, offsets: np.ndarray) -> None:
        self.blob, self.offsets = blob, offsets

    def __len__(self) -> int:
        return len(self.offsets) - 1

    def __getitem__(self, index: int) -> str:
        if not 0 <= index < len(self):
            raise IndexError(index)
        data = self.blob[self.offsets[index] : self.offsets[index + 1]].tobytes()
        return data.decode("utf-8", "surrogatepass")


class Packer:
    """Gathers strings one by one."""

    def __init__(self, items: Iterable[str] = ()) -> None:
        self.blob, self.offsets = bytearray(), array("q", [0])
        for item in items:
            self.add(item)

    def add(self, item: str) -> None:
        self.blob += item.encode("utf-8", "surrogatepass")
        self.offsets.append(len(self.blob))

    def strings(self) -> Strings:
        return Strings(np.frombuffer(bytes(self.blob), np.uint8), np.array(self.offsets, np.int64))


# ---------------------------------------------------------------- files


def is_local(url: str) -> bool:
    return "://" not in url and "::" not in url


def filesystem(location: str) -> tuple[Any, str]:
    """The fsspec file system of a location and the path in it. ValueError if fsspec does not know or lacks it."""
    try:
        fs, path = fsspec.core.url_to_fs(location)
    except (ImportError, ValueError) as error:
        raise ValueError(f"data: cannot open {location}: {error}.") from None
    return fs, path


def canonical(location: str) -> str:
    """Local locations as a plain path, remote ones as they are."""
    fs, path = filesystem(location)
    return path if isinstance(fs, LocalFileSystem) else location


def read_range(url: str, start: int = 0, end: int | None = None) -> bytes:
    """Bytes [start, end) of a file; fewer where it ends earlier.

    Raises FileNotFoundError, or OSError for everything else that goes wrong (remote reads are tried three times).
    """
    if is_local(url):
        if not os.path.isfile(url):
            raise FileNotFoundError(url)
        with open(url, "rb", buffering=0) as file:
            size = os.fstat(file.fileno()).st_size
            stop = min(size, start + MAX_BYTES + 1 if end is None else end)
            return os.pread(file.fileno(), max(0, stop - start), start)
    for attempt in range(ATTEMPTS):
        try:
            # The file system is looked up each time: fsspec renews its instances in a forked process.
            fs, path = fsspec.core.url_to_fs(url)
            return bytes(fs.cat_file(path, start=start or None, end=end))
        except FileNotFoundError:
            raise
        except Exception as error:  # every remote file system raises its own classes
            if attempt == ATTEMPTS - 1:
                raise OSError(f"{url}: {error}") from None
            time.sleep(0.2 * 4**attempt)
    raise AssertionError


def read_image(url: str, start: int = 0, end: int | None = None) -> bytes:
    """`read_range` with what goes wrong as BadSample."""
    try:
        data = read_range(url, start, end)
    except FileNotFoundError:
        raise BadSample("missing file") from None
    except OSError:
        raise BadSample("unreadable file") from None
    if len(data) > MAX_BYTES:
        raise BadSample("too large")
    return data


def listing(location: str, deep: bool) -> Iterator[str]:
    """Files of a folder relative to it, sorted folder by folder; `deep` descends."""
    if is_local(location):
        for folder, below, files in os.walk(location, followlinks=True):
            below[:] = sorted(below) if deep else []
            part = os.path.relpath(folder, location)
            yield from (name if part == "." else f"{part}/{name}" for name in sorted(files))
        return
    fs, root = filesystem(location)
    root = root.rstrip("/")
    paths = fs.find(root) if deep else fs.find(root, maxdepth=1)
    names = (path[len(root) + 1 :] if root else path for path in paths)
    yield from sorted(names, key=lambda name: name.rpartition("/")[::2])


def expand(location: str) -> list[str]:
    """`dir/name-{0000..0099}.tar` as 100 locations; a location without such a range as itself."""
    ranges = list(re.finditer(r"\{(\d+)\.\.(\d+)\}", location))
    counts = []
    for match in ranges:
        low, high = match.groups()
        if int(high) < int(low):
            raise ValueError(f"data: the range {match.group()} in {location} runs backwards.")
        counts.append([str(i).zfill(len(low)) for i in range(int(low), int(high) + 1)])
    pieces = re.split(r"\{\d+\.\.\d+\}", location)
    return ["".join(itertools.chain(*zip(pieces, (*chosen, "")))) for chosen in itertools.product(*counts)]


def as_captions(value: Any) -> list[str]:
    """A caption or list of captions as clean strings; empty ones and what is not text fall away."""
    values = value if isinstance(value, (list, tuple)) else [value]
    texts = (item.encode("utf-8", "ignore").decode().strip() for item in values if isinstance(item, str))
    return [text for text in texts if text]
