"""What outlives a search: which pictures a folder held, and how a model saw them, in one file of the user's cache.

Gives: scan (the pictures of a folder), File, Known, Kept (reads and writes the file), fingerprint, shown.
Used by: app/searching, app/search_command.
"""

from __future__ import annotations

import hashlib
import os
import stat
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from silc.data.store import IMAGES, Packer, Strings
from silc.eval.embed import settings
from silc.eval.run import fingerprint as weights
from silc.model.silc import Silc

FORMAT = "1"
"""Of the file and of how pictures are read: what another one wrote is made anew."""
STALE = 3600.0
"""Seconds after which a half-written file is taken for that of a killed run."""


class File(NamedTuple):
    """A picture as the disk knows it; size and time of change, in nanoseconds, tell whether it is still the same."""

    path: str
    size: int
    changed: int


@dataclass(frozen=True)
class Known:
    """N files with what each of them was found to be: `causes` [N], empty for a sound picture, and `features`, float16
    [G, D], of the sound ones in their order."""

    files: list[File]
    causes: list[str]
    features: Tensor


def scan(root: Path) -> list[File]:
    """The picture files in `root` and below it, sorted by path.

    Links to files are followed, links to folders are not, so that no loop is walked. What is hidden is left out. A
    folder that may not be read is told on stderr.
    """

    def told(error: OSError) -> None:
        print(f"{shown(str(error.filename))} cannot be read ({error.strerror}).", file=sys.stderr)

    found = []
    for folder, below, names in os.walk(root, onerror=told):
        below[:] = [name for name in below if not name.startswith(".")]
        part = Path(folder).relative_to(root)
        for name in names:
            if name.startswith(".") or name.rpartition(".")[2].lower() not in IMAGES:
                continue
            try:
                about = os.stat(os.path.join(folder, name))
            except OSError:  # a link to nothing: reading it says so
                found.append(File((part / name).as_posix(), -1, -1))
                continue
            if stat.S_ISREG(about.st_mode):  # reading a pipe would wait for ever
                found.append(File((part / name).as_posix(), about.st_size, about.st_mtime_ns))
    return sorted(found)


def fingerprint(model: Silc) -> str:
    """Of all that shapes a model's features: weights, architecture, preprocessing."""
    return hashlib.sha256(f"{weights(model)} {settings(model)}".encode()).hexdigest()


def shown(path: str) -> str:
    """As a screen can bear it: the name of a file may hold line breaks, control characters, bytes that are no text."""
    return "".join(letter if letter.isprintable() else "\N{REPLACEMENT CHARACTER}" for letter in path)


class Kept:
    """The file of one folder and one model."""

    def __init__(self, root: Path, fingerprint: str, cache: Path | None) -> None:
        """`cache`: the folder of such files; None: $XDG_CACHE_HOME/silc/search, else ~/.cache/silc/search."""
        self.name = hashlib.sha256(os.fsencode(root) + b"\0" + fingerprint.encode()).hexdigest()[:32]
        self.about = {"library": "silc", "format": FORMAT, "index": self.name, "folder": shown(str(root))}
        self.path: Path | None = (cache or _default()) / f"{self.name}.safetensors"

    def read(self) -> Known | None:
        """What an earlier run left; None where there is nothing, or nothing to be relied on, which is told on stderr.

        The features stay in the file until they are asked for.
        """
        if self.path is None or not self.path.exists():
            return None
        try:
            with safe_open(self.path, "pt") as file:
                told = file.metadata() or {}
                if any(told.get(key) != self.about[key] for key in ("library", "format", "index")):
                    raise ValueError
                return _unpacked({name: file.get_tensor(name) for name in file.keys()})  # noqa: SIM118 - no mapping
        except (OSError, SafetensorError, ValueError, KeyError, IndexError):
            print(f"{self.path} is damaged or of another version: the folder is embedded anew.", file=sys.stderr)
            return None

    def write(self, known: Known) -> None:
        """Replace the file, whole or not at all. Where that cannot be done, it is told once and not tried again."""
        if self.path is None:
            return
        part = self.path.with_suffix(f".{os.getpid()}.part")
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            for old in self.path.parent.glob(f"{self.name}.*.part"):
                if time.time() - old.stat().st_mtime > STALE:
                    old.unlink()
            try:
                save_file(_packed(known), part, self.about)
                with part.open("rb") as file:  # on the disk before it takes the place of the one that is
                    os.fsync(file.fileno())
                os.replace(part, self.path)
            finally:
                part.unlink(missing_ok=True)
        except (OSError, SafetensorError) as error:
            told = getattr(error, "strerror", None) or error
            print(f"what was embedded cannot be kept in {self.path} ({told}).", file=sys.stderr)
            self.path = None


def _default() -> Path:
    base = os.environ.get("XDG_CACHE_HOME", "")
    try:
        return (Path(base) if os.path.isabs(base) else Path.home() / ".cache") / "silc" / "search"
    except RuntimeError:
        raise ValueError("there is no home folder to keep the index in: give a folder by --cache.") from None


def _packed(known: Known) -> dict[str, Tensor]:
    return {
        "features": known.features.contiguous(),
        "stamps": torch.tensor([file[1:] for file in known.files], dtype=torch.int64).view(-1, 2),
        **_strings("paths", [file.path for file in known.files]),
        **_strings("causes", known.causes),
    }


def _strings(name: str, items: Sequence[str]) -> dict[str, Tensor]:
    """As bytes and where each begins: a header's JSON would not hold a million paths."""
    packed = Packer(items).strings()
    return {name: torch.from_numpy(packed.blob.copy()), f"{name}_at": torch.from_numpy(packed.offsets)}


def _unpacked(tensors: dict[str, Tensor]) -> Known:
    """ValueError or KeyError for tensors that do not fit together."""
    paths, causes = (_listed(tensors[name], tensors[f"{name}_at"]) for name in ("paths", "causes"))
    stamps, features = tensors["stamps"], tensors["features"]
    sound = sum(not cause for cause in causes)
    fits = stamps.shape == (len(paths), 2) and stamps.dtype == torch.int64 and len(causes) == len(paths)
    if not fits or features.dtype != torch.float16 or features.ndim != 2 or len(features) != sound:
        raise ValueError
    files = [File(path, size, changed) for path, (size, changed) in zip(paths, stamps.tolist())]
    return Known(files, causes, features)


def _listed(blob: Tensor, offsets: Tensor) -> list[str]:
    at = offsets.numpy()
    if blob.dtype != torch.uint8 or at.dtype != np.int64 or at.ndim != 1 or not len(at) or at[0] != 0:
        raise ValueError
    if at[-1] != len(blob) or (np.diff(at) < 0).any():
        raise ValueError
    strings = Strings(blob.numpy(), at)
    return [strings[row] for row in range(len(strings))]
