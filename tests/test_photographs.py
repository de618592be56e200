"""Photographs as training pairs: what looks like one for evaluation stays out, captions name the class, masks are none.

Gives: data/photographs on drawn pictures.
Used by: pytest.
"""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from conftest import COLOURS, SHAPES, draw
from PIL import Image

from silc.data.photographs import pairs


def noise(seed: int) -> Image.Image:
    small = np.random.default_rng(seed).integers(0, 256, (12, 12, 3), dtype=np.uint8)
    return Image.fromarray(small).resize((48, 40))


def write_classes(root: Path, each: int = 6) -> None:
    """`caltech101`, as the suite calls it, of drawn shapes over noise: train and test, a folder a class."""
    for row, colour in enumerate(COLOURS):
        for column, shape in enumerate(SHAPES):
            for split, shift in (("train", 0), ("test", 10_000)):
                folder = root / "caltech101" / split / f"{colour}_{shape}"
                folder.mkdir(parents=True)
                for i in range(each):
                    seed = shift + 100 * row + 10 * column + i
                    Image.blend(draw(colour, shape, 128, (48, 40)), noise(seed), 0.4).save(folder / f"{i}.png")


def read(table: Path) -> dict[str, list[str]]:
    return {row["image"]: row["captions"] for row in map(json.loads, table.read_text().splitlines())}


def test_a_photograph_that_looks_like_one_for_evaluation_is_left_out(tmp_path: Path) -> None:
    write_classes(tmp_path)
    train, test = tmp_path / "caltech101" / "train", tmp_path / "caltech101" / "test"
    alike = Image.open(test / "red_circle" / "0.png")
    alike.save(train / "blue_square" / "same.png")
    alike.resize((96, 80)).convert("RGB").save(train / "blue_square" / "larger.jpg", quality=80)
    Image.fromarray((np.asarray(alike) * 0.8 + 20).astype(np.uint8)).save(train / "blue_square" / "duller.webp")
    table, counts = pairs([train], [tmp_path / "caltech101"], tmp_path / "out")
    assert counts == {"photographs": 72, "near_duplicates_left_out": 3, "compared_with": 72}
    kept = read(table)
    assert not [name for name in kept if Path(name).stem in ("same", "larger", "duller")]
    assert all("/train/" in name and Path(name).is_absolute() for name in kept)
    before = table.read_bytes()
    pairs([train], [tmp_path / "caltech101"], tmp_path / "out")
    assert table.read_bytes() == before


def test_captions_name_the_class_and_masks_are_no_photographs(tmp_path: Path) -> None:
    for name in ("Faces_easy", "car_side", "airplanes", "umbrella", "masks"):
        (tmp_path / "train" / name).mkdir(parents=True)
        noise(len(name)).save(tmp_path / "train" / name / "a.png")
    table, counts = pairs([tmp_path / "train"], [], tmp_path / "out")
    first = {captions[0] for captions in read(table).values()}
    assert first == {"a photo of faces", "a photo of a car", "a photo of airplanes", "a photo of an umbrella"}
    assert counts == {"photographs": 4, "near_duplicates_left_out": 0, "compared_with": 0}


def test_no_photographs_are_told(tmp_path: Path) -> None:
    (tmp_path / "train").mkdir()
    with pytest.raises(ValueError, match=r"no photographs to train on below .*train"):
        pairs([tmp_path / "train"], [], tmp_path / "out")
