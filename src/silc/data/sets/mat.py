"""One matrix out of a MATLAB 5 file, without SciPy.

Gives: `read_matrix`.
Used by: data/sets/pascal, for the labels of Pascal Context as published.
"""

from __future__ import annotations

import struct
import zlib
from pathlib import Path

import numpy as np

MATRIX, COMPRESSED = 14, 15
NUMBERS = {1: "i1", 2: "u1", 3: "i2", 4: "u2", 5: "i4", 6: "u4", 7: "f4", 9: "f8", 12: "i8", 13: "u8"}
LARGEST = 1 << 28
"""Bytes that a compressed variable may unfold to."""


def read_matrix(path: Path, name: str) -> np.ndarray:
    """int64 [H,W] of the real numeric variable `name`. ValueError if the file is damaged or has no such matrix."""
    try:
        data = path.read_bytes()
        if len(data) < 128 or data[126:128] not in (b"IM", b"MI"):
            raise ValueError("not a MATLAB 5 file")
        order = "<" if data[126:128] == b"IM" else ">"
        at, found = 128, []
        while at + 8 <= len(data):
            kind, body, at = _element(data, at, order)
            if kind == COMPRESSED:
                unfolded = zlib.decompressobj().decompress(body, LARGEST)
                kind, body, _ = _element(unfolded, 0, order)
            if kind == MATRIX:
                label, values = _matrix(body, order, name)
                if values is not None:
                    return values
                found.append(label)
        raise ValueError(f"it holds {', '.join(found) or 'no variable'}, not {name}")
    except (ValueError, OSError, struct.error, zlib.error, KeyError) as error:
        raise ValueError(f"{path} cannot be read as a MATLAB file ({error}).") from None


def _element(data: bytes, at: int, order: str) -> tuple[int, bytes, int]:
    """(type, content, where the next element begins). Small elements keep size, type and content in 8 bytes."""
    (tag,) = struct.unpack_from(f"{order}I", data, at)
    if tag >> 16:
        length, kind, start, after = tag >> 16, tag & 0xFFFF, at + 4, at + 8
    else:
        kind, (length,), start = tag, struct.unpack_from(f"{order}I", data, at + 4), at + 8
        after = start + length + (0 if kind == COMPRESSED else -length % 8)
    if start + length > len(data):
        raise ValueError("it is truncated")
    return kind, data[start : start + length], after


def _matrix(body: bytes, order: str, wanted: str) -> tuple[str, np.ndarray | None]:
    _, _, at = _element(body, 0, order)
    _, sides, at = _element(body, at, order)
    _, label, at = _element(body, at, order)
    name = label.decode("latin-1")
    if name != wanted:
        return name, None
    kind, content, _ = _element(body, at, order)
    shape = np.frombuffer(sides, f"{order}i4")
    values = np.frombuffer(content, f"{order}{NUMBERS[kind]}")
    if len(shape) != 2 or values.size != int(shape[0]) * int(shape[1]):
        raise ValueError(f"{name} is no matrix")
    return name, values.reshape(shape[::-1]).T.astype(np.int64)
