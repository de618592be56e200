"""A larger drawn corpus: tens of thousands of named vector drawings in many styles, composed into captioned scenes.

Gives: `build` -> `Corpus`, in the layout of the quickstart's.
Used by: experiments. The drawings are a file of named SVGs (.jsonl or .jsonl.xz) that silc does not ship; each row
holds `style`, `colour` (is it in colour?), `text` (its name), `lic` (its licence) and `svg`. Needs silc[quickstart].
"""

from __future__ import annotations

import hashlib
import io
import json
import lzma
import os
import re
import time
import zipfile
from collections import Counter, defaultdict
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from silc.data.drawings import Concept, Say, Sprites, share, spread, visible
from silc.data.emoji import (
    Choice,
    Corpus,
    encode,
    once,
    picker,
    segment_classes,
    single,
    write_captioned,
    write_classes,
    write_masked,
    write_record,
    write_training,
)
from silc.data.scenes import TRAINING, draw_scene

FORMAT = 2
"""Raise when what is built changes."""
HELD_STYLES = ("fluent-emoji-flat", "fluent-emoji")
"""One family of drawings that training never sees, over names that it knows from others."""
PER_CLASS, CLASSES = 3, 200
"""Pictures a class, and classes, of the zero-shot sets."""
SHOTS = 10
"""Pictures a class that few-shot classification may learn from, one a style."""
SCENES, SEGMENT_SCENES, SEGMENT_CLASSES = 1000, 300, 30
MASKED_SCENES, MASKED_CLASSES = 600, 60
"""Of the set with masks that a head for segmentation is trained on; none of its classes is one of the others."""
NAME = re.compile(r"[a-z][a-z'-]*( [a-z][a-z'-]*){0,2}")
"""One to three words; clip art is often called by a sentence or a file name."""
NOT_THINGS = re.compile(
    r"skin tone|^flag|flag$|keycap|button|letter|o'clock|thirty"
    r"|\b(solid|duotone|outline|add|remove|edit|settings|arrow|chart|file)\b"
)
NOT_FREE = re.compile(r"\bNC\b|noncommercial", re.IGNORECASE)

Drawing = tuple[str, str, str]
"""Name, style, SVG."""


def build(
    source: Path,
    cache: Path,
    seed: int = 0,
    scenes: int = 60_000,
    size: int = 96,
    limit: int | None = None,
    styles: int = 1,
    say: Say = print,
    processes: int = 2,
) -> Corpus:
    """Build, or find complete in `cache`, training shards and evaluation sets from the drawings in `source`.

    Split by name: 10% of the names are in no training scene in any style (`concepts`), and the styles of HELD_STYLES in
    none under any name (`style`, `segment`; few-shot learns from other styles). `masks/train` is no evaluation set: it
    is for training a head, from drawings that training knows, but for the classes of `segment`. A drawing for
    evaluation that looks like one for training is left out.
    `styles` leaves out names that training knows in fewer styles; `limit` keeps that many names (for tests).
    ValueError for a source that cannot be read.
    """
    cache.mkdir(parents=True, exist_ok=True)
    try:
        content = hashlib.sha256(source.read_bytes()).hexdigest()[:16]
    except OSError as error:
        raise ValueError(f"{source} cannot be read ({error.strerror}): give the file of named drawings.") from None
    wanted = {"format": FORMAT, "seed": seed, "scenes": scenes, "size": size, "limit": limit, "styles": styles,
              "source": content}  # fmt: skip
    fill = partial(_fill, source=source, cache=cache, wanted=wanted, say=say, processes=processes)
    return once(cache, "vectors", wanted, fill, say)


def _fill(
    out: Path, source: Path, cache: Path, wanted: dict[str, Any], say: Say, processes: int
) -> dict[str, Any]:
    seconds, start = {}, time.perf_counter()
    archive, styles, facts = _rendered(source, cache, wanted, say, processes)
    seconds["drawings"] = time.perf_counter() - start
    concepts = {name: Concept(name, name, "heldout" if heldout(name) else "train") for name in styles}
    training: list[Choice] = [
        (concept, known)
        for concept in concepts.values()
        if concept.split == "train" and (known := tuple(s for s in styles[concept.name] if s not in HELD_STYLES))
    ]
    start = time.perf_counter()
    shards = write_training(out / "train", archive, training, wanted, say, processes)
    seconds["scenes"] = time.perf_counter() - start
    start = time.perf_counter()
    counts = _write_evals(out, Sprites(archive), list(concepts.values()), styles, training, wanted)
    seconds["evaluation sets"] = time.perf_counter() - start
    say(f"Wrote evaluation sets: {', '.join(f'{name} {n}' for name, n in counts.items())}")
    sizes = {"scenes": wanted["scenes"], "shards": shards, "names": len(concepts), "names_trained_on": len(training)}
    return write_record(out, {"parameters": wanted, **facts, "counts": sizes | counts}, seconds)


# ---------------------------------------------------------------- drawings


def read(source: Path, limit: int | None, styles: int = 1) -> tuple[list[Drawing], dict[str, int]]:
    """The drawings in colour that may be used commercially and are called by a few words, one a name and style; and how
    many there are of each licence. Names that fewer than so many `styles` of training draw are left out."""
    seen: dict[tuple[str, str], tuple[str, str]] = {}
    opened = lzma.open if source.suffix == ".xz" else open
    try:
        with opened(source, "rt", encoding="utf-8") as rows:
            for row in map(json.loads, rows):
                name = row["text"].strip().lower()
                thing = NAME.fullmatch(name) and not NOT_THINGS.search(name)
                if thing and row["colour"] and not NOT_FREE.search(row["lic"]):
                    seen.setdefault((name, row["style"]), (row["svg"], row["lic"]))
    except (OSError, ValueError, KeyError, TypeError, AttributeError, lzma.LZMAError) as error:
        raise ValueError(f"{source} is no file of named drawings ({error}).") from None
    known = Counter(name for name, style in seen if style not in HELD_STYLES)
    enough = {name for name, _ in seen if styles < 2 or known[name] >= styles}
    names = sorted(enough, key=lambda name: share("limit", name))
    kept = set(names[:limit])
    drawings = [(name, style, svg) for (name, style), (svg, _) in sorted(seen.items()) if name in kept]
    return drawings, dict(Counter(licence for (name, _), (_, licence) in seen.items() if name in kept))


def _rendered(
    source: Path, cache: Path, wanted: dict[str, Any], say: Say, processes: int
) -> tuple[Path, dict[str, tuple[str, ...]], dict[str, Any]]:
    """The archive of all drawings, rendered unless `cache` holds it; the styles of each name; licences and what was
    left out."""
    about = json.dumps([FORMAT, *(wanted[key] for key in ("source", "size", "limit", "styles"))])
    archive = cache / f"vectors-{wanted['size']}px-{hashlib.sha256(about.encode()).hexdigest()[:10]}.zip"
    if not archive.exists():
        drawings, licences = read(source, wanted["limit"], wanted["styles"])
        say(f"Rendering {len(drawings)} drawings")
        chunks = [[svg for *_, svg in drawings[i : i + 256]] for i in range(0, len(drawings), 256)]
        pictures = [png for part in spread(partial(_render, size=wanted["size"]), chunks, processes) for png in part]
        drawn = {(name, style): png for (name, style, _), png in zip(drawings, pictures) if png}
        kept, facts = _distinct(drawn)
        part = archive.with_name(f".{archive.name}-{os.getpid()}")
        with zipfile.ZipFile(part, "w") as out:
            for name, style in kept:
                out.writestr(f"{style}/{name}.png", drawn[name, style])
            out.writestr("about.json", json.dumps({"kept": kept, "facts": facts | {"licences": licences}}))
        os.replace(part, archive)
    with zipfile.ZipFile(archive) as held:
        told = json.loads(held.read("about.json"))
    styles: dict[str, list[str]] = defaultdict(list)
    for name, style in told["kept"]:
        styles[name].append(style)
    return archive, {name: tuple(found) for name, found in styles.items()}, told["facts"]


def _render(svgs: list[str], size: int) -> list[bytes]:
    """PNGs with alpha that fit `size`; nothing for a drawing that cannot be rendered or shows nothing."""
    import resvg_py

    made = []
    for svg in svgs:
        try:
            png = bytes(resvg_py.svg_to_bytes(svg_string=svg, width=size, skip_system_fonts=True))
            made.append(png if visible(png) else b"")
        except ValueError:
            made.append(b"")
    return made


def heldout(name: str) -> bool:
    return share("vectors", name) < 0.1


def _distinct(drawn: dict[tuple[str, str], bytes]) -> tuple[list[tuple[str, str]], dict[str, int]]:
    """Training's drawings, and of the others those that look like none of them and like no other.

    Two look alike if their 12 x 12 thumbnails on white, in 8 levels a channel, are the same."""
    evaluated = {key for key in drawn if heldout(key[0]) or key[1] in HELD_STYLES}
    looks = {_look(png) for key, png in drawn.items() if key not in evaluated}
    kept = [key for key in drawn if key not in evaluated]
    for key in sorted(evaluated):
        if (look := _look(drawn[key])) not in looks:
            looks.add(look)
            kept.append(key)
    return sorted(kept), {"rendered": len(drawn), "near_duplicates_left_out": len(drawn) - len(kept)}


def _look(png: bytes) -> bytes:
    picture = Image.open(io.BytesIO(png)).convert("RGBA").resize((12, 12), Image.Resampling.BOX)
    on_white = Image.alpha_composite(Image.new("RGBA", (12, 12), "white"), picture).convert("RGB")
    return (np.asarray(on_white) // 32).tobytes()


# ---------------------------------------------------------------- evaluation sets


def _write_evals(
    out: Path, sprites: Sprites, concepts: list[Concept], styles: dict[str, tuple[str, ...]], training: list[Choice],
    wanted: dict[str, Any],
) -> dict[str, int]:  # fmt: skip
    """Write all sets and return how many pictures each has."""
    rng, size = np.random.default_rng([wanted["seed"], 1, FORMAT]), wanted["size"]

    def pictures(names: list[str], held: tuple[bool, ...], most: int = PER_CLASS) -> list[tuple[str, str, bytes]]:
        chosen = {n: [s for s in styles[n] if (s in HELD_STYLES) in held][:most] for n in names}
        return [(n, s, encode(single(rng, sprites((n, s)), size), "PNG")) for n, found in chosen.items() for s in found]

    # names drawn in several styles are names of things; a name of one icon may be anything
    known = {c.name for c, found in training if len(found) > 2}
    both = [c for c in concepts if c.name in known and set(styles[c.name]) & set(HELD_STYLES)]
    unseen = [c.name for c in concepts if c.split == "heldout" and len(styles[c.name]) > 2]
    shown = _some([c.name for c in both])
    sets = {
        "zeroshot-style": pictures(shown, (True,)),
        "zeroshot-concepts": pictures(_some(unseen), (True, False)),
        "fewshot-style/train": pictures(shown, (False,), SHOTS),
        "fewshot-style/test": pictures(shown, (True,)),
    }
    sets = {name: rows for name, rows in sets.items() if rows}
    for name, rows in sets.items():
        write_classes(out / name, rows)
    counts = {name.removesuffix("/test"): len(rows) for name, rows in sets.items() if not name.endswith("/train")}
    pick, seeds = picker(training), [(wanted["seed"], i, 2, FORMAT) for i in range(SCENES)]
    scenes = [draw_scene(np.random.default_rng(seed), size, pick, sprites) for seed in seeds]
    rows = [(f"{i:04d}", scene.captions[-1], encode(scene.image, "PNG")) for i, scene in enumerate(scenes)]
    write_captioned(out / "retrieval-scenes", rows)
    style_of = {c.name: next(s for s in HELD_STYLES if s in styles[c.name]) for c in both}
    return counts | {"retrieval-scenes": SCENES} | _write_segments(out, sprites, training, both, style_of, wanted)


def _some(names: list[str]) -> list[str]:
    return sorted(sorted(names, key=lambda name: share("evaluated", name))[:CLASSES])


def _write_segments(
    out: Path, sprites: Sprites, training: list[Choice], concepts: list[Concept], style_of: dict[str, str],
    wanted: dict[str, Any],
) -> dict[str, int]:  # fmt: skip
    """Scenes of held-out drawings over held-out backgrounds, at the training size: one set to choose settings by, one
    to report. And one of training's drawings and backgrounds with other classes, for a head to learn from."""
    style = HELD_STYLES[0]
    options = [c for c in concepts if style_of[c.name] == style]
    classes = segment_classes(options, style, sprites, SEGMENT_CLASSES)
    pick = picker([(c, (style,)) for c in classes])
    found = {"segment-tuning": SEGMENT_SCENES, "segment-scenes": SEGMENT_SCENES, "masks-train": MASKED_SCENES}
    seeds = {name: [(wanted["seed"], i, 3 + number, FORMAT) for i in range(count)]
             for number, (name, count) in enumerate(found.items())}  # fmt: skip
    for name in ("segment-tuning", "segment-scenes"):
        write_masked(out / name, classes, pick, sprites, wanted["size"], seeds[name])
    others = [(c, known) for c, known in training if c not in classes]
    first = sorted(others, key=lambda choice: share("masked", choice[0].name))[:MASKED_CLASSES]
    first.sort(key=lambda choice: choice[0].name)
    if len(first) < 3:  # a scene of three needs them
        del found["masks-train"]
        return found
    write_masked(out / "masks-train", [c for c, _ in first], picker(first), sprites, wanted["size"],
                 seeds["masks-train"], TRAINING)  # fmt: skip
    return found
