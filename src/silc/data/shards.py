"""Tar shards as img2dataset and webdataset write them, read by offset from an index made once.

Gives: `Shards` (a `Source`), `scan` (the index of one tar).
Used by: data/pairs.
"""

from __future__ import annotations

import hashlib
import json
import os
import sys
import tarfile
import time
import zipfile
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path, PurePosixPath
from typing import IO, Any, NamedTuple

import numpy as np
from fsspec.implementations.local import LocalFileSystem

from silc.data.images import BadSample
from silc.data.store import IMAGES, MAX_BYTES, Packer, Source, Strings, as_captions, filesystem, is_local, read_image

MAX_TEXT = 1 << 20
SLOTS = {**dict.fromkeys(IMAGES, 0), "txt": 1, "json": 2}
INDEX_VERSION = 1


# ---------------------------------------------------------------- tar index


class Index(NamedTuple):
    """What one shard holds. `ranges` int64 [n, 3, 2]: (offset, size) of image, txt, json; size -1 where absent."""

    ranges: np.ndarray
    keys: Strings
    kinds: list[str]
    ignored: int
    cause: str


def scan(file: IO[bytes], size: int) -> Index:
    """Index a tar from its headers; nothing is unpacked. A damaged one is indexed as far as it is whole."""
    groups: dict[str, list[list[int]]] = {}
    order: list[tuple[str, list[list[int]]]] = []
    kinds: set[str] = set()
    ignored, cause, reached = 0, "", -1
    try:
        with tarfile.open(fileobj=file, mode="r:") as tar:
            for member in tar:
                end = member.offset_data + member.size
                # An offset that does not grow is a forged header, on which tarfile would run for ever.
                if member.size < 0 or member.offset_data <= reached or (member.isreg() and end > size):
                    cause = "truncated shard"
                    break
                reached = member.offset_data
                folder, _, base = member.name.rpartition("/")
                stem, _, kind = base.partition(".")
                kind = kind.lower()
                if not member.isreg():
                    continue
                if not stem or kind not in SLOTS or member.issparse():
                    ignored += 1
                    kinds.add(kind)
                    continue
                kinds.add(kind)
                key, slot = f"{folder}/{stem}" if folder else stem, SLOTS[kind]
                if key not in groups or groups[key][slot][1] >= 0:
                    groups[key] = [[0, -1], [0, -1], [0, -1]]
                    order.append((key, groups[key]))
                groups[key][slot][:] = [member.offset_data, member.size]
            else:
                file.seek(tar.offset)
                cause = "" if file.read(512) == bytes(512) else "truncated shard"
    except (tarfile.TarError, ValueError, EOFError, OverflowError):
        cause = "truncated shard" if order else "not a tar file"
    ranges = np.array([slots for _, slots in order], np.int64).reshape(-1, 3, 2)
    return Index(ranges, Packer(key for key, _ in order).strings(), sorted(kinds), ignored, cause)


def _cache_path(url: str, info: dict[str, Any]) -> Path:
    when = next((str(info[k]) for k in ("mtime", "LastModified", "last_modified", "ETag", "created") if k in info), "")
    mark = hashlib.sha256(f"{INDEX_VERSION}\n{url}\n{info.get('size')}\n{when}".encode("utf-8", "surrogatepass"))
    base = os.environ.get("SILC_CACHE") or Path.home() / ".cache" / "silc"
    return Path(base) / "shards" / f"{mark.hexdigest()[:40]}.npz"


def _load_index(path: Path) -> Index | None:
    try:
        with np.load(path, allow_pickle=False) as kept:
            keys = Strings(kept["blob"], kept["offsets"])
            return Index(kept["ranges"], keys, kept["kinds"].tolist(), int(kept["ignored"]), str(kept["cause"]))
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile):
        return None


def _save_index(path: Path, index: Index) -> None:
    part = path.with_suffix(f".{os.getpid()}.tmp")
    arrays: dict[str, Any] = {"ranges": index.ranges, "blob": index.keys.blob, "offsets": index.keys.offsets}
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with part.open("wb") as file:
            np.savez(file, kinds=np.array(index.kinds, "U"), ignored=index.ignored, cause=index.cause, **arrays)
        os.replace(part, path)
    except OSError:  # a read-only or full home only means that the next run scans again
        part.unlink(missing_ok=True)


def index_shard(url: str) -> Index | None:
    """The index of one shard, from the cache if the file is unchanged; None if there is no such file."""
    fs, path = filesystem(url)
    try:
        info = fs.info(path)
    except FileNotFoundError:
        return None
    cache = _cache_path(url, info)
    index = _load_index(cache)
    if index is None:
        # Large blocks: a request for each header would cost more than the bytes between them.
        options = {} if isinstance(fs, LocalFileSystem) else {"block_size": 8 << 20, "cache_type": "readahead"}
        with fs.open(path, "rb", **options) as file:
            index = scan(file, int(info["size"]))
        _save_index(cache, index)
    return index


def index_shards(urls: list[str]) -> list[Index]:
    """Indices of all shards, with a progress line on stderr if it takes long. ValueError names missing shards."""
    begun, told, made = time.monotonic(), 0.0, []
    with ThreadPoolExecutor(1 if is_local(urls[0]) else 8) as pool:
        for done, index in enumerate(pool.map(index_shard, urls), 1):
            made.append(index)
            passed = time.monotonic() - begun
            if passed > told + 2:
                told = passed
                print(f"indexing shards (once): {done}/{len(urls)}", file=sys.stderr, flush=True)
    missing = [url for url, index in zip(urls, made) if index is None]
    if missing:
        more = f" and {len(missing) - 1} more of {len(urls)} shards" if len(missing) > 1 else ""
        raise ValueError(f"data: {missing[0]}{more} does not exist; correct --data.sources.")
    return [index for index in made if index is not None]


# ---------------------------------------------------------------- tar shards


class Shards(Source):
    """Pairs in tar shards as img2dataset and webdataset write them, read by offset; other members are never read."""

    def __init__(self, name: str, urls: list[str], text_key: str) -> None:
        """Index the shards. ValueError for missing shards, and when no image or no caption is in any of them."""
        indices = index_shards(urls)
        self.name, self.urls, self.text_key = name, urls, text_key
        self.keys = [index.keys for index in indices]
        self.starts = np.cumsum([0, *(len(keys) for keys in self.keys)])
        self.ranges = np.concatenate([index.ranges for index in indices])
        self.ignored = sum(index.ignored for index in indices)
        self.kinds = sorted({kind for index in indices for kind in index.kinds})
        self.damage = [{"id": url, "cause": index.cause} for url, index in zip(urls, indices) if index.cause]
        has = np.any(self.ranges[:, :, 1] >= 0, axis=0).tolist()
        if not has[0] or not any(has[1:]):
            causes = sorted({item["cause"] for item in self.damage})
            why = f" ({', '.join(causes)})" if causes else ""
            raise ValueError(f"data: no {'caption' if has[0] else 'image'} in {name}{why}; {self._kinds()}.")

    def __len__(self) -> int:
        return len(self.ranges)

    def _kinds(self) -> str:
        found = ", ".join(kind or "(no extension)" for kind in self.kinds) or "none"
        return f"members found: {found}; expected an image ({', '.join(IMAGES)}) and a txt or json of the same name"

    def _at(self, index: int) -> tuple[int, int]:
        shard = int(np.searchsorted(self.starts, index, side="right")) - 1
        return shard, int(index - self.starts[shard])

    def ident(self, index: int) -> str:
        shard, row = self._at(index)
        return f"{PurePosixPath(self.urls[shard]).name}:{self.keys[shard][row]}"

    def _slots(self, index: int, slots: Iterable[int]) -> dict[int, bytes]:
        """Contents of those members that exist, in one read where they are neighbours."""
        spans = {slot: (int(at), int(size)) for slot in slots for at, size in [self.ranges[index, slot]] if size >= 0}
        if any(size > (MAX_TEXT if slot else MAX_BYTES) for slot, (_, size) in spans.items()):
            raise BadSample("too large")
        url = self.urls[self._at(index)[0]]
        low = min((at for at, _ in spans.values()), default=0)
        high = max((at + size for at, size in spans.values()), default=0)
        if high - low > sum(size for _, size in spans.values()) + (1 << 16):
            made = {slot: read_image(url, at, at + size) for slot, (at, size) in spans.items()}
        else:
            block = read_image(url, low, high) if spans else b""
            made = {slot: block[at - low : at - low + size] for slot, (at, size) in spans.items()}
        if any(len(made[slot]) < size for slot, (_, size) in spans.items()):
            raise BadSample("truncated")
        return made

    def _text_slots(self, index: int) -> list[int]:
        """Members to take the caption from: txt, but the json where a key of it was asked for or there is no txt."""
        txt, meta = self.ranges[index, 1:, 1] >= 0
        return [2] if meta and (self.text_key != "caption" or not txt) else [1] if txt else []

    def _texts(self, parts: dict[int, bytes]) -> list[str]:
        texts: list[str] = []
        if 2 in parts:
            meta = _json(parts[2])
            texts = as_captions(meta.get(self.text_key))
        elif 1 in parts:
            texts = as_captions(parts[1].decode("utf-8", "replace"))
        if not texts:
            raise BadSample("no caption")
        return texts

    def captions(self, index: int) -> list[str]:
        return self._texts(self._slots(index, self._text_slots(index)))

    def read(self, index: int) -> tuple[bytes, list[str], str]:
        if self.ranges[index, 0, 1] < 0:
            raise BadSample("no image")
        parts = self._slots(index, [0, *self._text_slots(index)])
        return parts[0], self._texts(parts), self.ident(index)

    def found(self, index: int) -> str:
        if self._text_slots(index) != [2]:
            return self._kinds()
        try:
            names = ", ".join(sorted(_json(self._slots(index, [2])[2]))) or "none"
        except BadSample as error:
            names = f"none ({error.cause})"
        return f"{self._kinds()}; keys of the json: {names}; looked for {self.text_key!r}, set by --data.text-key"


def _json(data: bytes) -> dict[str, Any]:
    try:
        meta = json.loads(data)
    except (ValueError, RecursionError):
        raise BadSample("broken json") from None
    return meta if isinstance(meta, dict) else {}
