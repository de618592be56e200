"""Folders of results, their report card and their comparison: what is written is what was found, and reads back so.

Gives: tests of silc.app.results, silc.app.card, silc.app.thumbs and silc.app.compare.
Used by: pytest.
"""

from __future__ import annotations

import base64
import io
import json
import re
import shutil
import tarfile
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from known import NAMES, Arbitrary, Oracle, save, solid, write_splits
from PIL import Image

from silc.app import card, compare, results
from silc.app.compare import Difference
from silc.app.thumbs import SIDE, thumb
from silc.eval.metrics import Result
from silc.eval.run import evaluate
from silc.eval.segment import Config as Segment

EVIL = "<script>alert('cat')</script>"


def write_masks(folder: Path) -> Path:
    """Five pictures, left half one colour and right half another, with their masks and a void corner."""
    for i in range(5):
        left, right = i % 4, (i + 1) % 4
        pixels = np.concatenate([solid(left, 32, 24), solid(right, 32, 24)], 1)
        mask = np.concatenate([np.full((32, 24), left), np.full((32, 24), right)], 1).astype(np.uint8)
        mask[:4, :4] = 255
        save(folder / "images" / f"{i}.png", pixels)
        (folder / "masks").mkdir(exist_ok=True)
        Image.fromarray(mask).save(folder / "masks" / f"{i}.png")
    (folder / "classes.json").write_text(json.dumps({"classes": NAMES[:4], "void": 255}))
    return folder


def write_captions(folder: Path) -> Path:
    rows = []
    for i, name in enumerate(NAMES[:6]):
        save(folder / f"{i}.png", solid(i))
        rows.append({"image": f"{i}.png", "caption": [name, f"{EVIL} {name}"]})
    (folder / "captions.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def found(model: Any, data: Path, pictures: Path) -> dict[str, Result]:
    sets = {"zeroshot/splits": data / "splits" / "test", "fewshot/splits": data / "splits",
            "retrieval/captions": data / "captions", "segment/masks": data / "masks"}
    return evaluate(model, sets, pictures, {"segment": Segment(examples=3, batch=2)})


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("data")
    write_splits(folder / "splits")
    write_captions(folder / "captions")
    write_masks(folder / "masks")
    return folder


@pytest.fixture(scope="module")
def folders(data: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Results of a perfect model and of an arbitrary one."""
    made = []
    for name, model in (("oracle", Oracle()), ("arbitrary", Arbitrary())):
        folder = tmp_path_factory.mktemp("results") / name
        about = {"model": f"runs/{name}", "sha256": "ab" * 32, "suite": "mine", "suite_about": "A & B."}
        results.save(found(model, data, folder / "pictures"), folder, about, {"zeroshot/pets": "/data/pets"},
                     {"segment/broken": "no masks."})
        card.build(folder)
        made.append(folder)
    return made[0], made[1]


# ---------------------------------------------------------------- folders


def test_results_tell_what_was_measured_on_what(folders: tuple[Path, Path], data: Path) -> None:
    summary = json.loads((folders[0] / "results.json").read_text())
    assert summary["sha256"] == "ab" * 32 and {"silc", "torch", "python"} <= set(summary["versions"])
    assert summary["skipped"] == {"zeroshot/pets": "/data/pets"} and summary["failed"]["segment/broken"] == "no masks."
    one = summary["sets"]["zeroshot/splits"]
    assert one["count"] == 18 and one["split"] == "test" and one["metrics"]["top1"] == 1.0
    assert one["templates"] and one["protocol"]["name"] == "plain" and one["preprocess"]["size"] == 32
    assert (folders[0] / one["file"]).is_file() and one["folder"] == str(data / "splits" / "test")
    text = (folders[0] / "results.md").read_text()
    assert "| zeroshot/splits | top1 | 100.00 |" in text and "- zeroshot/pets: skipped, no /data/pets" in text


def test_items_come_back_as_they_were(folders: tuple[Path, Path], data: Path, tmp_path: Path) -> None:
    before = found(Arbitrary(), data, tmp_path)
    after = results.read(folders[1]).sets
    for name in ("zeroshot/splits", "retrieval/captions", "fewshot/splits"):
        stored = results.items(after[name]["details"])
        assert set(before[name].metrics) <= set(stored)
        for metric, value in before[name].metrics.items():
            items, owner = stored[metric]
            assert items.mean() == pytest.approx(value, abs=1e-6) and len(items) == len(owner)
    both = results.items(after["retrieval/captions"]["details"])
    assert both["text_to_image_r1"][1].tolist() == [0, 0, 1, 1, 2, 2, 3, 3, 4, 4, 5, 5]
    assert both["image_to_text_r1"][1].tolist() == list(range(6))
    assert len(results.items(after["segment/masks"]["details"])["picture_miou"][0]) == 5
    assert isinstance(after["zeroshot/splits"]["details"]["items"]["top1"], str), "a digit an item"


@pytest.mark.parametrize(("spoil", "message"), [
    ("empty", "holds no results.json"), ("json", "not valid JSON"), ("none", "lists no set"),
    ("gone", "cannot be read"), ("hollow", "has no metrics"),
])
def test_a_folder_that_is_none_is_one_sentence(folders: tuple[Path, Path], tmp_path: Path, spoil: str,
                                               message: str) -> None:
    folder = tmp_path / "copy"
    shutil.copytree(folders[0], folder)
    if spoil == "empty":
        (folder / "results.json").unlink()
    if spoil == "json":
        (folder / "results.json").write_text("{")
    if spoil == "none":
        (folder / "results.json").write_text('{"sets": {}}')
    if spoil == "gone":
        (folder / "segment-masks.json").unlink()
    if spoil == "hollow":
        (folder / "segment-masks.json").write_text("{}")
    with pytest.raises(ValueError, match=message):
        results.read(folder)


# ---------------------------------------------------------------- the card


class Page(HTMLParser):
    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.words: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, text: str) -> None:
        self.words.append(text)


def test_the_card_is_one_file_that_needs_nothing(folders: tuple[Path, Path]) -> None:
    text = (folders[0] / "card.html").read_text()
    page = Page(text)
    assert not {"script", "link"} & {tag for tag, a in page.tags if tag != "link" or a.get("rel") != "icon"}
    for _, attributes in page.tags:
        for name in ("src", "href"):
            value = attributes.get(name)
            assert value is None or value.startswith(("data:", "#")), value
    assert not re.search(r"url\(|@import|https?://", text)
    anchors = {f"#{a['id']}" for _, a in page.tags if a.get("id")}
    assert {a["href"] for tag, a in page.tags if tag == "a"} <= anchors


def test_the_card_shows_scores_pictures_and_what_is_missing(folders: tuple[Path, Path]) -> None:
    page = Page((folders[1] / "card.html").read_text())
    words = " ".join(" ".join(page.words).split())
    pictures = [a["src"] for tag, a in page.tags if tag == "img"]
    # 12 answers, mistakes, pairs; 6 x 5 + 6 of retrieval; 3 masks of three pictures at least
    assert len(pictures) > 12 + 36 + 9 and all(src and src.startswith("data:image/webp") for src in pictures)
    for wanted in ("splits zero-shot classification", "few-shot", "mIoU", "A & B.", "zeroshot/pets",
                   "not found: /data/pets", "no masks.", "sha256 abab", "Most often confused",
                   "Surest mistakes", "18 pictures"):
        assert wanted in words, wanted
    assert EVIL in words, "as text, not as a tag"
    perfect = " ".join(Page((folders[0] / "card.html").read_text()).words)
    assert "Surest mistakes" not in perfect and "100.0%" in perfect


def test_a_card_without_the_pictures_still_tells(folders: tuple[Path, Path], data: Path, tmp_path: Path) -> None:
    copied = tmp_path / "data"
    shutil.copytree(data, copied)
    folder = tmp_path / "out"
    results.save(found(Arbitrary(), copied, tmp_path / "pictures"), folder, {"model": "m"})
    shutil.rmtree(copied)
    page = Page(card.build(folder).read_text())
    assert "no picture" in page.words and not [tag for tag, _ in page.tags if tag == "img"]


def test_thumbnails_are_squares_also_of_what_lies_in_a_tar(tmp_path: Path) -> None:
    pixels = np.concatenate([solid(1, 40, 20), solid(3, 40, 40), solid(1, 40, 20)], 1)
    save(tmp_path / "a" / "s01.png", pixels)
    with tarfile.open(tmp_path / "0.tar", "w") as tar:
        tar.add(tmp_path / "a" / "s01.png", "s01.png")
    for path in (tmp_path / "a" / "s01.png", tmp_path / "0.tar" / "s01"):
        data = thumb(str(path)).partition("base64,")[2]
        with Image.open(io.BytesIO(base64.b64decode(data))) as picture:
            assert picture.size == (SIDE, SIDE)
            assert np.abs(np.asarray(picture.convert("RGB")).astype(int) - (30, 30, 230)).max() < 40, "the middle"
    assert thumb(str(tmp_path / "0.tar" / "none")) == thumb(str(tmp_path / "none.png")) == ""


# ---------------------------------------------------------------- comparison


def fake(folder: Path, hits: list[int], **details: Any) -> Path:
    """Results of one made-up set with these items."""
    plain = {"set": "x", "split": "test", "count": len(hits), "templates": ["{}"], "protocol": {"name": "plain"}}
    given = {**plain, "items": {"top1": hits}, "interval": {"top1": (0.2, 0.4)}, **details}
    score = sum(hits) / len(hits)
    result = Result({"top1": score}, {"top1": 0.1}, {k: v for k, v in given.items() if v is not None})
    results.save({"zeroshot/x": result}, folder, {"model": folder.name})
    return folder


def test_what_is_equal_item_by_item_is_within_noise_and_what_is_not_is_not(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    a = (rng.random(400) < 0.5).astype(int)
    better = np.maximum(a, rng.random(400) < 0.1)
    one, two = fake(tmp_path / "a", a.tolist()), fake(tmp_path / "b", better.tolist())
    difference = compare.compare([one, two]).rows[0].differences[0]
    assert difference.kind == "paired" and difference.value == pytest.approx((better - a).mean())
    # the normal interval of the mean of paired differences
    half = 1.96 * (better - a).std() / 20
    assert difference.low == pytest.approx(difference.value - half, abs=0.006)
    assert difference.high == pytest.approx(difference.value + half, abs=0.006)
    assert difference.says("a", "b").startswith(f"b better by {100 * difference.value:.2f} [")
    assert compare.compare([two, one]).rows[0].differences[0].says("b", "a").startswith("b better by")
    noisy = fake(tmp_path / "c", a[rng.permutation(400)].tolist())
    assert "within noise" in compare.terminal(compare.compare([one, noisy]))


def test_captions_of_one_picture_are_drawn_together(tmp_path: Path) -> None:
    hits = [1, 1, 1, 1, 0, 0, 0, 0] * 10
    groups = [i // 4 for i in range(80)]
    alone = compare.compare([fake(tmp_path / "a", [0] * 80), fake(tmp_path / "b", hits)]).rows[0].differences[0]
    together = compare.compare([fake(tmp_path / "c", [0] * 80, groups={"top1": groups}),
                                fake(tmp_path / "d", hits, groups={"top1": groups})]).rows[0].differences[0]
    assert None not in (alone.low, alone.high, together.low, together.high)
    assert together.high - together.low > 1.6 * (alone.high - alone.low)  # type: ignore[operator]


def test_without_items_the_intervals_decide_and_without_those_nothing(tmp_path: Path) -> None:
    one = fake(tmp_path / "a", [1, 0] * 10, items=None)
    two = fake(tmp_path / "b", [1, 1] * 10, items=None, interval={"top1": (0.95, 1.0)})
    difference = compare.compare([one, two]).rows[0].differences[0]
    half = (0.1**2 + 0.025**2) ** 0.5
    assert difference.kind == "unpaired" and difference.low == pytest.approx(0.5 - half)
    three = fake(tmp_path / "c", [1, 1] * 10, items=None, interval=None)
    assert compare.compare([one, three]).rows[0].differences[0] == Difference(0.5, None, None, "none")
    assert "no interval is known" in compare.markdown(compare.compare([one, three]))


@pytest.mark.parametrize(("change", "message"), [
    ({"split": "val"}, "its split is test in a but val in b"),
    ({"count": 3}, "its count is 4 in a but 3 in b"),
    ({"templates": ["a {}."]}, "its templates is"),
    ({"protocol": {"name": "tcl"}}, "its protocol name is plain in a but tcl in b"),
    ({"protocol": {"name": "plain", "window": 448}}, "its protocol window is None in a but 448 in b"),
])
def test_what_was_not_measured_alike_is_not_compared(tmp_path: Path, change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message) as error:
        compare.compare([fake(tmp_path / "a", [1, 0, 1, 1]), fake(tmp_path / "b", [1, 0, 1, 1], **change)])
    assert "\n" not in str(error.value)


def test_what_was_fitted_to_the_model_is_no_difference_of_protocol(tmp_path: Path) -> None:
    linear = [{"linear": {"l2": l2, "l2_held_out": [l2], "steps": 9}, "scale": l2} for l2 in (0.1, 1.0)]
    one, two = (fake(tmp_path / str(i), [1, 0], protocol=how) for i, how in enumerate(linear))
    assert compare.compare([one, two]).rows
    linear[1]["linear"]["steps"] = 10  # type: ignore[index]
    with pytest.raises(ValueError, match="protocol steps is 9 in 0 but 10"):
        compare.compare([one, fake(tmp_path / "2", [1, 0], protocol=linear[1])])


def test_comparing_real_results(folders: tuple[Path, Path], tmp_path: Path) -> None:
    told = compare.compare(folders)
    rows = {(row.set, row.metric): row for row in told.rows}
    assert rows["zeroshot/splits", "top1"].scores[0] == 1.0
    for key in (("zeroshot/splits", "top1"), ("zeroshot/splits", "mean_class_accuracy"),
                ("segment/masks", "picture_miou"), ("retrieval/captions", "text_to_image_r1")):
        difference = rows[key].differences[0]
        assert difference.kind == "paired" and difference.says(*told.names).startswith("oracle better")
    assert rows["segment/masks", "miou"].differences[0].kind == "unpaired"
    compare.write(told, tmp_path)
    data = json.loads((tmp_path / "compare.json").read_text())
    assert data["names"] == ["oracle", "arbitrary"] and data["rows"][0]["differences"][0]["says"]
    table = (tmp_path / "compare.md").read_text().splitlines()
    assert table[0].startswith("| set | metric | oracle | arbitrary |") and len(set(map(len, table[:1]))) == 1
    assert compare.compare(folders, ["retrieval/captions"]).rows[0].set == "retrieval/captions"


def test_several_runs_and_sets_that_only_some_have(folders: tuple[Path, Path], tmp_path: Path) -> None:
    smaller = tmp_path / "arbitrary"
    shutil.copytree(folders[1], smaller)
    summary = json.loads((smaller / "results.json").read_text())
    del summary["sets"]["segment/masks"]
    (smaller / "results.json").write_text(json.dumps(summary))
    told = compare.compare([*folders, smaller])
    assert len(set(told.names)) == 3 and all(name.endswith("arbitrary") for name in told.names[1:])
    assert told.alone == {"segment/masks": told.names[:2]} and all(len(row.differences) == 2 for row in told.rows)
    assert f"{told.names[1]} against {told.names[0]}" in compare.terminal(told)
    with pytest.raises(ValueError, match="Perhaps you meant 'segment/masks'"):
        compare.compare(folders, ["segment/mask"])
    with pytest.raises(ValueError, match="no set in common"):
        compare.compare([fake(tmp_path / "x", [1]), folders[0]])
    with pytest.raises(ValueError, match="same folder"):
        compare.compare([folders[0], folders[0]])
    with pytest.raises(ValueError, match="two folders"):
        compare.compare(folders[:1])


def test_a_run_is_compared_by_its_evaluation(folders: tuple[Path, Path], tmp_path: Path) -> None:
    shutil.copytree(folders[0], tmp_path / "run" / "eval")
    assert results.read(tmp_path / "run").folder == tmp_path / "run" / "eval"
    assert torch.tensor(results.items({"items": {"a": "101"}})["a"][0]).tolist() == [1, 0, 1]
