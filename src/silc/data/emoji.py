"""The embedded corpus of the quickstart: emoji in two drawing styles, composed into captioned scenes.

Gives: `build` -> `Corpus` (training shards, five evaluation sets), `training_scene`, `segment_classes`.
Used by: quickstart. The art comes from pip packages and is rendered on the user's machine; none is shipped.
"""

from __future__ import annotations

import hashlib
import io
import json
import os
import re
import shutil
import tarfile
import time
import unicodedata
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from silc.data.drawings import (
    FORMAT,
    Concept,
    Say,
    Sprites,
    find_concepts,
    load_drawings,
    render,
    spread,
    trim,
    versions,
)
from silc.data.scenes import HELD_OUT, Cutout, Pick, Pixels, Scene, compose, cutout, draw_scene, draw_white, phrase

LICENCES = {
    "twemoji": "Twemoji graphics, CC-BY-4.0",
    "openmoji": "OpenMoji, the open-source emoji and icon project, CC-BY-SA-4.0; so is every picture that contains it",
}
TEMPLATES = ("{}", "a picture of {}", "{} on a white background")
"""As the training captions say it; class names carry their article (`an apple`)."""
SHARD = 1000
MIN_SIZE = 32
VOID = 255
"""Mask value of the backgrounds, which have no class."""
SEGMENT_SCENES, SEGMENT_CLASSES = 200, 20
MIN_COVERAGE = 0.45
"""Share of its box that a class of the segmentation set must fill: thin drawings make masks of edges."""
ABSTRACT = re.compile(
    r"face|flag|button|symbol|sign|arrow|square|circle|heart|moon|hand|finger|keycap|clock|thirty|diamond|suit|dash|head|loop|zzz"
    r"|thought|speech|mark|exclamation|triangle|chart|chains|thumbs|\b(man|men|woman|women|person|people|boy|girl|child|baby)\b"
    r"|\b(couple|star|worker|fist|elf|fairy|mage|poo|detective|artist|student|teacher|judge|guard|cook|prince|princess|pilot)\b"
    r"|\b(singer|scientist|farmer|vampire|zombie|genie|ninja|superhero|mechanic|angel|dancer|astronaut|claus|briefs|kiss)\b"
)
"""Not used as segmentation classes: people, faces, symbols and other drawings that look much alike."""

Choice = tuple[Concept, tuple[str, ...]]
"""A concept and the styles it may be drawn in."""


@dataclass(frozen=True)
class Corpus:
    """What `build` made. `evals` is named as evaluation sets are: `task/label`."""

    folder: Path
    shards: str
    evals: dict[str, Path]
    counts: dict[str, int]
    seconds: dict[str, float]
    reused: bool


def build(
    cache: Path,
    seed: int = 0,
    scenes: int = 24000,
    size: int = 96,
    say: Say = print,
    limit: int | None = None,
    processes: int = 2,
) -> Corpus:
    """Build, or find complete in `cache`, the training shards and evaluation sets.

    `scenes` pictures of `size` pixels, each with three or four captions under the key `captions`; scene i depends on
    (seed, i) alone. `limit` keeps that many concepts (for tests). A half-written or damaged cache is built again.
    Raises ValueError when the packages of the extra `quickstart` are missing, or for too few scenes or pixels.
    """
    if scenes < 1 or size < MIN_SIZE:
        raise ValueError(f"The corpus needs at least 1 scene of at least {MIN_SIZE} pixels, not {scenes} of {size}.")
    wanted = {"format": FORMAT, "seed": seed, "scenes": scenes, "size": size, "limit": limit, "packages": versions()}
    return once(Path(cache), "emoji", wanted, partial(_fill, cache=Path(cache), wanted=wanted, say=say,
                                                      processes=processes), say)  # fmt: skip


def once(cache: Path, name: str, wanted: dict[str, Any], fill: Callable[[Path], dict[str, Any]], say: Say) -> Corpus:
    """The corpus of these parameters: found complete in `cache`, or made by `fill(folder)`, whole or not at all."""
    key = hashlib.sha256(json.dumps(wanted, sort_keys=True).encode()).hexdigest()[:10]
    folder = cache / f"{name}-{wanted['size']}px-{key}"
    record = _complete(folder, wanted)
    if record:
        say(f"Reusing {folder}")
        return _corpus(folder, record, reused=True)
    building = cache / f".{folder.name}-{os.getpid()}"
    shutil.rmtree(building, ignore_errors=True)
    building.mkdir(parents=True)
    try:
        record = fill(building)
        # A broken folder of the same name makes way; a complete one that another process put there meanwhile stays.
        if not _complete(folder, wanted):
            shutil.rmtree(folder, ignore_errors=True)
            os.replace(building, folder)
    finally:
        shutil.rmtree(building, ignore_errors=True)
    return _corpus(folder, record, reused=False)


def _fill(out: Path, cache: Path, wanted: dict[str, Any], say: Say, processes: int) -> dict[str, Any]:
    """Write everything into `out`, `corpus.json` last, and return its content."""
    count, size = wanted["scenes"], wanted["size"]
    seconds: dict[str, float] = {}
    start = time.perf_counter()
    archive, concepts = load_drawings(cache, size, wanted["limit"], say, processes)
    seconds["drawings"] = time.perf_counter() - start

    start = time.perf_counter()
    shards = write_training(out / "train", archive, training_choices(concepts), wanted, say, processes)
    seconds["scenes"] = time.perf_counter() - start

    start = time.perf_counter()
    counts = _write_evals(out, Sprites(archive), concepts, wanted)
    seconds["evaluation sets"] = time.perf_counter() - start
    say(f"Wrote evaluation sets: {', '.join(f'{name} {n}' for name, n in counts.items())}")
    splits = {s: sorted(c.name for c in concepts if c.split == s) for s in ("train", "xstyle", "heldout")}
    sizes = {"scenes": count, "shards": shards, **{s: len(names) for s, names in splits.items()}, **counts}
    about = {"parameters": wanted, "licences": LICENCES, "counts": sizes, "splits": splits}
    return write_record(out, about, seconds)


def write_record(out: Path, about: dict[str, Any], seconds: dict[str, float]) -> dict[str, Any]:
    """Write `corpus.json`, by which a whole corpus is known, and return its content."""
    files = {str(p.relative_to(out)): p.stat().st_size for p in sorted(out.rglob("*")) if p.is_file()}
    record = about | {"seconds": {name: round(value, 2) for name, value in seconds.items()}, "files": files}
    (out / "corpus.json").write_text(json.dumps(record, indent=1) + "\n")
    return record


def _complete(folder: Path, wanted: dict[str, Any]) -> dict[str, Any] | None:
    """The content of `corpus.json` if it belongs to `wanted` and every file it lists is there in full."""
    try:
        record: dict[str, Any] = json.loads((folder / "corpus.json").read_text())
        whole = all((folder / name).stat().st_size == size for name, size in record["files"].items())
        return record if whole and record["parameters"] == wanted else None
    except (OSError, ValueError, KeyError):
        return None


def _corpus(folder: Path, record: dict[str, Any], reused: bool) -> Corpus:
    shards = folder / "train" / f"scenes-{{00000..{record['counts']['shards'] - 1:05d}}}.tar"
    evals = {name.replace("-", "/", 1): folder / name for name in record["counts"] if "-" in name}
    return Corpus(folder, str(shards), evals, record["counts"], record["seconds"], reused)


# ---------------------------------------------------------------- training scenes


def training_choices(concepts: list[Concept]) -> list[Choice]:
    """What training may draw: the split is made here, before anything is composed."""
    styles: dict[str, tuple[str, ...]] = {"train": ("twemoji", "openmoji"), "xstyle": ("twemoji",)}
    return [(concept, styles[concept.split]) for concept in concepts if concept.split in styles]


def picker(choices: list[Choice]) -> Pick:
    """Chooses objects of different bases: the concept first, then its style, so that every concept is as likely."""
    if len({concept.base for concept, _ in choices}) < 3:
        raise ValueError("A scene needs three different concepts to choose from; raise `limit`.")

    def pick(rng: np.random.Generator, count: int) -> list[Cutout]:
        chosen: dict[str, Cutout] = {}
        while len(chosen) < count:
            concept, styles = choices[int(rng.integers(len(choices)))]
            chosen.setdefault(concept.base, (concept.name, styles[int(rng.integers(len(styles)))]))
        return list(chosen.values())

    return pick


def training_scene(seed: int, index: int, size: int, choices: list[Choice], sprites: Sprites) -> Scene:
    return draw_scene(np.random.default_rng([seed, index]), size, picker(choices), sprites)


def write_training(
    folder: Path, archive: Path, choices: list[Choice], wanted: dict[str, Any], say: Say, processes: int
) -> int:
    """Compose `wanted["scenes"]` scenes into tar shards; return how many shards."""
    folder.mkdir()
    start, count = time.perf_counter(), wanted["scenes"]
    ranges = [range(first, min(first + SHARD, count)) for first in range(0, count, SHARD)]
    write = partial(write_shard, folder, archive, choices, wanted["seed"], wanted["size"])
    for done, stop in enumerate(spread(write, ranges, processes), 1):
        if done % 4 == 0 or done == len(ranges):
            say(f"Composed {stop} of {count} training scenes ({stop / (time.perf_counter() - start):.0f}/s)")
    return len(ranges)


def write_shard(folder: Path, archive: Path, choices: list[Choice], seed: int, size: int, span: range) -> int:
    """Write the scenes of `span` as one tar of `KEY.jpg` and `KEY.json`; return where the span stops."""
    sprites = Sprites(archive)
    with tarfile.open(folder / f"scenes-{span.start // SHARD:05d}.tar", "w", format=tarfile.USTAR_FORMAT) as out:
        for index in span:
            scene = training_scene(seed, index, size, choices, sprites)
            text = json.dumps({"captions": scene.captions, "objects": scene.objects}, ensure_ascii=False).encode()
            for suffix, data in (("jpg", encode(scene.image, "JPEG", quality=90, subsampling=0)), ("json", text)):
                member = tarfile.TarInfo(f"{index:07d}.{suffix}")
                member.size = len(data)
                out.addfile(member, io.BytesIO(data))
    return span.stop


def encode(pixels: Pixels, form: str, **options: Any) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, form, **options)
    return buffer.getvalue()


# ---------------------------------------------------------------- evaluation sets


def _write_evals(out: Path, sprites: Sprites, concepts: list[Concept], wanted: dict[str, Any]) -> dict[str, int]:
    """Write the five sets and return how many pictures each has."""
    heldout = [c.name for c in concepts if c.split == "heldout"]
    xstyle = [c.name for c in concepts if c.split == "xstyle"]
    rng = np.random.default_rng([wanted["seed"], 1, FORMAT])

    def pictures(names: list[str], *styles: str) -> list[tuple[str, str, bytes]]:
        return [(n, s, encode(single(rng, sprites((n, s)), wanted["size"]), "PNG")) for n in names for s in styles]

    sets = {
        "retrieval-concepts": pictures(heldout, "twemoji"),
        "zeroshot-concepts": pictures(heldout, "twemoji", "openmoji"),
        "retrieval-style": pictures(xstyle, "openmoji"),
        "zeroshot-style": pictures(xstyle, "openmoji"),
    }
    for name, rows in sets.items():
        if name.startswith("retrieval"):
            write_captioned(out / name, [(f"{slug(n)}_{s}", phrase(n), png) for n, s, png in rows])
        else:
            write_classes(out / name, rows)
    crossing = [c for c in concepts if c.split == "xstyle"]
    classes = segment_classes(crossing, "openmoji", sprites, SEGMENT_CLASSES)
    files, size = find_concepts(wanted["limit"]), 2 * wanted["size"]
    large = {(c.name, "openmoji"): trim(render(files[c]["openmoji"], size)) for c in classes}
    pick = picker([(c, ("openmoji",)) for c in classes])
    seeds = [(wanted["seed"], i, FORMAT) for i in range(SEGMENT_SCENES)]
    write_masked(out / "segment-scenes", classes, pick, large.__getitem__, size, seeds)
    return {**{name: len(rows) for name, rows in sets.items()}, "segment-scenes": SEGMENT_SCENES}


def single(rng: np.random.Generator, sprite: Image.Image, size: int) -> Pixels:
    """One drawing on white, as large as in the training scenes of one big object."""
    rgba = cutout(sprite, round(size * rng.uniform(0.8, 0.9)))
    return compose(draw_white(size)[0], [(rgba, (size - rgba.shape[0]) // 2, (size - rgba.shape[1]) // 2)])[0]


def slug(name: str) -> str:
    """A file name for any file system. Names differ in more than signs, except keycaps: spell those."""
    spelt = unicodedata.normalize("NFKD", name.replace("#", "hash").replace("*", "asterisk"))
    return re.sub(r"[^0-9A-Za-z-]+", "_", spelt.encode("ascii", "ignore").decode()).strip("_")


def write_captioned(folder: Path, rows: list[tuple[str, str, bytes]]) -> None:
    (folder / "images").mkdir(parents=True)
    lines = []
    for stem, caption, png in rows:
        path = f"images/{stem}.png"
        (folder / path).write_bytes(png)
        lines.append(json.dumps({"image": path, "caption": caption}, ensure_ascii=False) + "\n")
    (folder / "captions.jsonl").write_text("".join(lines), encoding="utf-8")


def write_classes(folder: Path, rows: list[tuple[str, str, bytes]]) -> None:
    for name, style, png in rows:
        (folder / slug(name)).mkdir(parents=True, exist_ok=True)
        (folder / slug(name) / f"{style}.png").write_bytes(png)
    listing = "".join(f"{slug(name)}\t{phrase(name)}\n" for name in dict.fromkeys(name for name, *_ in rows))
    (folder / "classes.txt").write_text(listing, encoding="utf-8")
    (folder / "templates.txt").write_text("".join(f"{t}\n" for t in TEMPLATES))


def segment_classes(concepts: list[Concept], style: str, sprites: Sprites, count: int) -> list[Concept]:
    """Concepts with short names that fill their box and, one by one, look least like those before."""
    options = [c for c in concepts if c.name.count(" ") < 2 and not ABSTRACT.search(phrase(c.name).lower())]
    small = {c: cutout(sprites((c.name, style)).resize((16, 16)), 16) for c in options}
    looks = {c: compose(draw_white(16)[0], [(rgba, 0, 0)])[0].astype(np.float32) for c, rgba in small.items()}
    options = [c for c in options if small[c][..., 3].mean() / 255 >= MIN_COVERAGE]
    chosen = options[:1]
    while len(chosen) < min(count, len(options)):
        others = [c for c in options if c not in chosen]
        nearest = [min(float(np.abs(looks[c] - looks[o]).mean()) for o in chosen) for c in others]
        chosen.append(others[int(np.argmax(nearest))])
    return sorted(chosen, key=lambda c: c.name)


def write_masked(
    folder: Path,
    classes: list[Concept],
    pick: Pick,
    sprite: Callable[[Cutout], Image.Image],
    size: int,
    seeds: Sequence[tuple[int, ...]],
    backgrounds: Sequence[str] = HELD_OUT,
) -> None:
    """A scene a seed, of `size` pixels; by default over background kinds that no training scene has."""
    index = {c.name: i for i, c in enumerate(classes)}
    for part in ("images", "masks"):
        (folder / part).mkdir(parents=True)
    for i, seed in enumerate(seeds):
        scene = draw_scene(np.random.default_rng(seed), size, pick, sprite, backgrounds)
        values = np.array([VOID] + [index[name] for name, _ in scene.objects], np.uint8)
        (folder / "images" / f"{i:04d}.png").write_bytes(encode(scene.image, "PNG"))
        (folder / "masks" / f"{i:04d}.png").write_bytes(encode(values[scene.mask], "PNG"))
    description = {"classes": [[phrase(c.name)] for c in classes], "background": False, "void": VOID, "palette": None}
    (folder / "classes.json").write_text(json.dumps(description, indent=1) + "\n")
