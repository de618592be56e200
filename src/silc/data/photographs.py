"""Photographs in classes as training pairs, without those that look like one that models are scored on.

Gives: pairs.
Used by: study/running, experiments.
"""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
from PIL import Image

from silc.data.store import IMAGES

TEMPLATES = ("a photo of {}", "{}", "a picture of {}")
ALIKE = 0.99
"""Correlation of 16 x 16 grey thumbnails from which on two pictures count as one."""


def pairs(train: Sequence[Path], held: Sequence[Path], out: Path) -> tuple[Path, dict[str, int]]:
    """Write a table of pairs, OUT/photographs.jsonl, from folders with a folder a class, whose name is the caption.

    Left out are photographs that look like one below the folders `held`, those of `train` apart. Returns the table, and
    how many were kept, were left out, and were compared with. ValueError where there are none.
    """
    out.mkdir(parents=True, exist_ok=True)
    mine = _pictures(train)
    learnt = set(mine)
    scored = [path for path in _pictures(held) if path not in learnt]
    if not mine:
        raise ValueError(f"no photographs to train on below {', '.join(map(str, train)) or 'no folder'}.")
    nearest = (_looks(mine) @ _looks(scored).T).max(1) if scored else np.zeros(len(mine))
    kept = [path for path, near in zip(mine, nearest) if near < ALIKE]
    rows = [{"image": str(path.resolve()), "captions": [t.format(_phrase(path.parent.name)) for t in TEMPLATES]}
            for path in kept]  # fmt: skip
    (out / "photographs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return out / "photographs.jsonl", {"photographs": len(kept), "near_duplicates_left_out": len(mine) - len(kept),
                                       "compared_with": len(scored)}  # fmt: skip


def _pictures(folders: Sequence[Path]) -> list[Path]:
    """Sorted; masks are PNGs too, but no photographs."""
    found = {p for folder in folders for p in folder.rglob("*")
             if p.suffix.lower().lstrip(".") in IMAGES and "masks" not in p.parts}  # fmt: skip
    return sorted(found)


def _looks(paths: Sequence[Path]) -> np.ndarray:
    """[N, 256], unit length: grey thumbnails without their mean."""
    def look(path: Path) -> np.ndarray:
        with Image.open(path) as picture:
            return np.asarray(picture.convert("L").resize((16, 16), Image.Resampling.BOX), np.float32)

    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
        flat = np.stack(list(pool.map(look, paths))).reshape(len(paths), -1)
    flat -= flat.mean(1, keepdims=True)
    return flat / np.linalg.norm(flat, axis=1, keepdims=True).clip(1e-6)


def _phrase(name: str) -> str:
    """As Caltech-101 calls its classes: Faces_easy, car_side."""
    words = name.lower().replace("_", " ").removesuffix(" easy").removesuffix(" side")
    return words if words.endswith("s") else f"{'an' if words[0] in 'aeiou' else 'a'} {words}"
