"""The model that comes with silc: it opens without a network, says what it is, and scores what its figures say.

Gives: opening by name, size, model card, figures measured again on real photographs.
Used by: pytest. The figures skip where there are no photographs.
"""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from conftest import draw
from PIL import Image

import silc
from silc.cli import main
from silc.eval.run import evaluate
from silc.opening import SMALL

FIGURES = Path(__file__).parents[1] / "docs" / "experiments" / "small" / "figures.json"


def test_it_opens_by_name_is_small_and_says_what_it_is() -> None:
    model = silc.load("small")
    assert sum(path.stat().st_size for path in SMALL.rglob("*")) < 60e6
    text = model.encode_text(["a dog", "an apple"])
    assert text.shape == (2, model.config.embed_dim)
    card = (SMALL / "README.md").read_text()
    for said in ("Caltech-101", "CC-BY-SA", "## Limits", "toy", "zeroshot/caltech101"):
        assert said in card, f"the model card does not say {said!r}"


def test_the_commands_take_it_by_name(tmp_path: Path) -> None:
    picture = tmp_path / "picture.png"
    draw("red", "circle", 200, (96, 64)).save(picture)
    main(["heatmap", "small", str(picture), "-t", "a red circle", "a tree", "--out", str(tmp_path / "map.png")])
    assert min(Image.open(tmp_path / "map.png").size) > 60
    main(["segment", str(picture), "a red circle, a tree", "--model", "small", "--out", str(tmp_path / "out")])
    labels = np.asarray(Image.open(tmp_path / "out" / "picture.labels.png"))
    assert labels.shape == (64, 96) and labels.max() <= 1


@pytest.mark.slow
def test_its_figures_are_what_it_scores(photographs: Path) -> None:
    told = json.loads(FIGURES.read_text())["scores"]
    found = evaluate(silc.load("small"), {"zeroshot/caltech101": photographs / "caltech101"})["zeroshot/caltech101"]
    score, chance = told["zeroshot/caltech101"]["top1"]
    assert found.metrics["top1"] == pytest.approx(score, abs=0.005) and score > 5 * chance
