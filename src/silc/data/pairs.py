"""Image-text pairs: opens what the user names, and mixes sources into one endless, keyed, stateless stream.

Gives: `open_source`, `Source`, `shuffled`, `Mixture`, `Bad`.
Used by: data/loader, train/loop, plan, doctor.
"""

from __future__ import annotations

import os
import re
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from pathlib import PurePosixPath
from typing import Any, TypedDict, TypeVar, overload

import numpy as np

from silc.config import DataConfig
from silc.data.images import BadSample
from silc.data.shards import Shards
from silc.data.store import Source, canonical, expand, filesystem, listing
from silc.data.tables import SUFFIXES, Folder, open_table

__all__ = ["Bad", "Mixture", "Source", "open_source", "shuffled"]

T = TypeVar("T")

ATTEMPTS = 16
"""Samples that are tried for one place of the stream before the run is stopped."""
BLOCK = 1024
SHARE_UNIT = 1 << 40
MASK = (1 << 64) - 1
EXPLAINED = ("no image", "no caption", "missing file")


class Bad(TypedDict):
    """A sample that was left out: its place in the stream, its name, its source, and why."""

    position: int
    id: str
    source: str
    cause: str


# ---------------------------------------------------------------- opening


def open_source(location: str, cfg: DataConfig, captioned: bool = True) -> Source:
    """Open image-text pairs.

    `location`: a folder (with captions.* or metadata.* table, with *.tar shards, or with images and same-stem .txt),
    a .csv, .tsv, .jsonl or .parquet table, or tar shards with brace ranges; local or any fsspec URL; unless
    `captioned`, also a folder of images alone.
    Raises ValueError, in one sentence, when nothing usable is there.
    """
    _refuse_shell(location)
    urls = [canonical(url) for url in expand(location)]
    kind = PurePosixPath(urls[0]).suffix.lower()
    if kind == ".tar":
        return Shards(location, urls, cfg.text_key)
    if len(urls) > 1:
        raise ValueError(f"data: {location}: a range in braces is for .tar shards; name tables one by one.")
    if kind in SUFFIXES:
        return open_table(location, urls[0], cfg)
    return _open_folder(location, urls[0], cfg, captioned)


def _refuse_shell(location: str) -> None:
    if not location.strip():
        raise ValueError("data: an empty name in --data.sources.")
    piped = any(part.strip().lower().startswith("pipe:") for part in location.split("::"))
    if piped or (re.search(r"[|;`\n]|\$\(|&&", location) and not os.path.exists(location)):
        raise ValueError(f"data: {location!r} looks like a shell command; silc runs none: give a path or a URL.")


def _open_folder(location: str, url: str, cfg: DataConfig, captioned: bool) -> Source:
    fs, path = filesystem(location)
    if fs.isfile(path):
        hint = " Compressed tar files cannot be read by offset: unpack them to .tar." if ".t" in location else ""
        raise ValueError(f"data: {location} is neither a folder, a table ({', '.join(SUFFIXES)}) nor a .tar.{hint}")
    if not fs.isdir(path):
        raise ValueError(f"data: {location} does not exist; correct --data.sources.")
    root = url.rstrip("/")
    files = list(listing(root, deep=False))
    for stem in ("captions", "metadata"):
        tables = [file for file in files if file in [stem + kind for kind in SUFFIXES]]
        if len(tables) > 1:
            raise ValueError(f"data: {location} holds {' and '.join(tables)}; name the one to use.")
        if tables:
            return open_table(f"{location.rstrip('/')}/{tables[0]}", f"{root}/{tables[0]}", cfg)
    tars = [file for file in files if file.endswith(".tar")]
    if tars:
        return Shards(location, [f"{root}/{file}" for file in tars], cfg.text_key)
    return Folder(location, root, captioned)


# ---------------------------------------------------------------- order


def _mix(x: Any) -> Any:
    """A 64-bit mixing function (the finaliser of SplitMix64), on Python integers or uint64 arrays."""
    x = (x + 0x9E3779B97F4A7C15) & MASK
    x = ((x ^ (x >> 30)) * 0xBF58476D1CE4E5B9) & MASK
    x = ((x ^ (x >> 27)) * 0x94D049BB133111EB) & MASK
    return x ^ (x >> 31)


def keyed(seed: int, *words: Any) -> Any:
    """A 64-bit number that depends on all its arguments."""
    made: Any = _mix(seed & MASK)
    for word in words:
        made = _mix(made ^ word)
    return made


def _permute(x: Any, key: Any, bits: int) -> Any:
    """A keyed bijection of [0, 2^bits): a Feistel network whose halves may differ by one bit."""
    low = bits // 2
    left, right = x >> low, x & ((1 << low) - 1)
    for turn in range(0, 8, 2):
        left = left ^ (_mix((key + right + (turn << 56)) & MASK) & ((1 << (bits - low)) - 1))
        right = right ^ (_mix((key + left + ((turn + 1) << 56)) & MASK) & ((1 << low) - 1))
    return (left << low) | right


@overload
def shuffled(position: int, n: int, seed: int) -> int: ...
@overload
def shuffled(position: np.ndarray, n: int, seed: int) -> np.ndarray: ...


def shuffled(position: int | np.ndarray, n: int, seed: int) -> int | np.ndarray:
    """Which of n samples stands at `position` of an endless stream: each once in every n places, in a new order each.

    A function of its arguments alone, so a stream resumes at any place without state, and needs O(1) memory.
    Positions at or above 0; an integer gives an integer, an array an int64 array.
    """
    bits = max(2, (n - 1).bit_length())
    if isinstance(position, np.ndarray):
        at = position.astype(np.uint64).reshape(-1)
        key = keyed(seed, at // n)
        x = _permute(at % n, key, bits)
        while (outside := x >= n).any():  # cycle walking keeps the bijection within [0, n)
            x[outside] = _permute(x[outside], key[outside], bits)
        return x.astype(np.int64).reshape(position.shape)
    lone_key = keyed(seed, position // n)
    lone = _permute(position % n, lone_key, bits)
    while lone >= n:
        lone = _permute(lone, lone_key, bits)
    return int(lone)


# ---------------------------------------------------------------- mixture


class Mixture:
    """Several sources as one endless stream. What stands at a position depends on (sources, weights, seed) alone."""

    def __init__(self, sources: Sequence[Source], weights: Sequence[float], seed: int) -> None:
        """Without `weights`, every sample once in each pass over all of them; with, each source has its share.

        Raises ValueError for no source, a weight that is not positive, or a number of weights unlike that of sources.
        """
        if not sources:
            raise ValueError("data: no pairs to train on; name them with --data.sources.")
        if weights and len(weights) != len(sources):
            raise ValueError(f"data: {len(weights)} --data.weights for {len(sources)} --data.sources; give one each.")
        if any(not 0 < weight < float("inf") for weight in weights):
            raise ValueError(f"data: --data.weights must be above 0, not {min(weights)}; leave the source out instead.")
        self.sources, self.seed = list(sources), seed
        self.ends = np.cumsum([len(source) for source in sources])
        self.shares = _shares(weights)
        # A block holds at least one of each, or the carried remainder could ask to take one back.
        rarest = SHARE_UNIT // min(self.shares) + 1 if self.shares else 1
        self.block = max(BLOCK, 1 << (rarest - 1).bit_length())

    def __len__(self) -> int:
        """Samples in all sources."""
        return int(self.ends[-1])

    def _counts(self, blocks: int) -> list[int]:
        """Samples of each source in the first `blocks` blocks: exact shares, rounded by largest remainder."""
        ideal = [share * blocks * self.block for share in self.shares]
        counts = [part // SHARE_UNIT for part in ideal]
        short = blocks * self.block - sum(counts)
        for number in sorted(range(len(ideal)), key=lambda i: -(ideal[i] % SHARE_UNIT))[:short]:
            counts[number] += 1
        return counts

    def locate(self, position: int) -> tuple[int, int]:
        """(source, index in it) at a position of the stream."""
        if not self.shares:
            index = shuffled(position, len(self), self.seed)
            number = int(np.searchsorted(self.ends, index, side="right"))
            return number, index - (int(self.ends[number - 1]) if number else 0)
        # Slots of a block are ordered by source, and the block visits its slots in keyed order.
        slot = shuffled(position, self.block, keyed(self.seed, 1))
        done = self._counts(position // self.block)
        after = self._counts(position // self.block + 1)
        number = 0
        while slot >= after[number] - done[number]:
            slot -= after[number] - done[number]
            number += 1
        return number, shuffled(done[number] + slot, len(self.sources[number]), keyed(self.seed, 2, number))

    def read(self, position: int, usable: Callable[[bytes, list[str], str], T]) -> tuple[T, str, list[Bad]]:
        """What `usable(image file, captions, id)` makes of the sample at a position, its id, and what was left out.

        Where reading or `usable` raises BadSample, another sample takes the place: a function of seed, position and
        attempt, so that a resumed stream is the same. ValueError if 16 in a row are bad.
        """
        bad: list[Bad] = []
        number, index = self.locate(position)
        for attempt in range(1, ATTEMPTS + 1):
            source = self.sources[number]
            try:
                data, captions, ident = source.read(index)
                return usable(data, captions, ident), ident, bad
            except BadSample as error:
                bad.append(Bad(position=position, id=source.ident(index), source=source.name, cause=error.cause))
            if attempt < ATTEMPTS:
                number, index = self.locate(keyed(self.seed, 3, position, attempt) >> 24)
        raise ValueError(_explain(bad, self.sources[number], index))

    def captions(self, limit: int) -> Iterator[str]:
        """All captions of up to `limit` samples spread over the mixture; samples without one are passed over."""
        for position in range(min(limit, len(self))):
            number, index = self.locate(position)
            try:
                yield from self.sources[number].captions(index)
            except BadSample:
                continue

    @property
    def damage(self) -> list[Bad]:
        """What the sources found broken on opening, such as truncated shards; its position is -1."""
        found = ((source, item) for source in self.sources for item in source.damage)
        return [Bad(position=-1, id=item["id"], source=source.name, cause=item["cause"]) for source, item in found]


def _shares(weights: Sequence[float]) -> list[int]:
    """Weights as whole parts of SHARE_UNIT, so that counting is exact; the largest takes what rounding leaves."""
    total = sum(weights)
    shares = [max(1, round(weight / total * SHARE_UNIT)) for weight in weights]
    if shares:
        shares[shares.index(max(shares))] += SHARE_UNIT - sum(shares)
    return shares


def _explain(bad: list[Bad], source: Source, index: int) -> str:
    causes = Counter(item["cause"] for item in bad)
    told = ", ".join(f"{count} x {cause}" for cause, count in causes.most_common())
    text = f"data: {len(bad)} samples in a row could not be used: {told}; the last is {bad[-1]['id']} of {source.name}"
    return f"{text}; {source.found(index)}." if bad[-1]["cause"] in EXPLAINED else f"{text}."
