"""The verbs that evaluate, as a user calls them: suites, the folder they leave, comparison, and every mistake.

Gives: tests of silc.cli's eval, compare and heatmap, of silc.app.evaluation and silc.eval.suites.
Used by: pytest.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from known import write_splits
from PIL import Image
from test_card import write_captions, write_masks

from silc.cli import main
from silc.config import ImageTowerConfig, ModelConfig, PreprocessConfig, TextTowerConfig
from silc.data.labelled import open_captioned, open_classification, open_masked
from silc.data.tokenizer import byte_tokenizer
from silc.eval import suites
from silc.eval.run import find_tasks, fingerprint
from silc.model.silc import Silc
from silc.opening import load

SETS: dict[str, Any] = {
    "zeroshot/splits": {"folder": "splits", "split": "test", "templates": ["a {}."]},
    "fewshot/splits": {"folder": "splits", "shots": [1, 2]},
    "retrieval/captions": "captions",
    "segment/masks": {"folder": "masks", "protocol": "whole-image", "batch": 2},
    "zeroshot/pets": "pets",
}


def write_model(folder: Path, seed: int) -> Path:
    torch.manual_seed(seed)
    tokenizer = byte_tokenizer(24)
    Silc(ModelConfig(
        image=ImageTowerConfig(image_size=32, patch=8, width=16, depth=1, heads=2, mlp=16),
        text=TextTowerConfig(vocab=tokenizer.vocab, length=24, width=16, depth=1, heads=2, mlp=16),
        preprocess=PreprocessConfig(size=32), embed_dim=16,
    )).save(folder)
    tokenizer.save(folder)
    return folder


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two models, a data root, and a suite of the user's own."""
    folder = tmp_path_factory.mktemp("place")
    for seed, name in enumerate("ab"):
        write_model(folder / name, seed)
    write_splits(folder / "data" / "splits")
    write_captions(folder / "data" / "captions")
    write_masks(folder / "data" / "masks")
    (folder / "mine.json").write_text(json.dumps({"about": "Mine.", "sets": SETS}))
    return folder


def silc(*args: str | Path) -> None:
    main([str(arg) for arg in args])


def fails(capsys: pytest.CaptureFixture[str], *args: str | Path) -> str:
    """The one sentence on stderr of a command that fails."""
    with pytest.raises(SystemExit) as end:
        silc(*args)
    assert end.value.code not in (0, None)
    text = capsys.readouterr().err.strip()
    assert text.startswith("silc: ") and "\n" not in text and "Traceback" not in text
    return text


# ---------------------------------------------------------------- what they do


def test_a_suite_from_one_command_and_two_models_compared(place: Path, tmp_path: Path,
                                                          capsys: pytest.CaptureFixture[str]) -> None:
    for name in "ab":
        silc("eval", place / name, "--suite", place / "mine.json", "--data", place / "data", "--out", tmp_path / name)
    told = capsys.readouterr().out
    assert "| fewshot/splits | shot2 |" in told and "card.html" in told
    summary = json.loads((tmp_path / "a" / "results.json").read_text())
    assert list(summary["sets"]) == list(SETS)[:4] and summary["suite"] == "mine" and summary["suite_about"] == "Mine."
    assert summary["skipped"] == {"zeroshot/pets": str(place / "data" / "pets")}
    assert summary["sha256"] == fingerprint(load(place / "a")) and summary["device"] and summary["written"]
    one = json.loads((tmp_path / "a" / "zeroshot-splits.json").read_text())
    assert one["details"]["templates"] == ["a {}."] and one["details"]["settings"]["split"] == "test"
    assert one["about"]["sha256"] == summary["sha256"] and one["versions"]["torch"]
    card = (tmp_path / "a" / "card.html").read_text()
    assert card.count("data:image/webp") > 40 and str(place / "data" / "pets") in card
    silc("compare", tmp_path / "a", tmp_path / "b", "--out", tmp_path)
    told = capsys.readouterr().out
    assert "shot2" in told and ("within noise" in told or "better by" in told)
    assert json.loads((tmp_path / "compare.json").read_text())["names"] == ["a", "b"]
    silc("compare", tmp_path / "a", tmp_path / "a" / ".." / "b", "--sets", "retrieval/captions")
    assert "shot2" not in capsys.readouterr().out


def test_the_same_model_is_within_noise_of_itself(place: Path, tmp_path: Path,
                                                  capsys: pytest.CaptureFixture[str]) -> None:
    for name in ("one", "two"):
        silc("eval", place / "a", "--sets", "zeroshot", place / "data" / "splits", "--out", tmp_path / name,
             "--cache", tmp_path / "cache")
    assert list((tmp_path / "cache").rglob("*.npy")), "features are kept"
    silc("compare", tmp_path / "one", tmp_path / "two")
    assert "within noise: +0.00 [+0.00, +0.00]" in capsys.readouterr().out


def test_single_sets_go_beside_a_suite_and_before_it(place: Path, tmp_path: Path) -> None:
    suite = tmp_path / "small.json"
    suite.write_text(json.dumps({"sets": {"zeroshot/x": {"folder": "splits", "split": "train"},
                                          "zeroshot/y": "nowhere"}}))
    test = place / "data" / "splits" / "test"
    silc("eval", place / "a", "--suite", suite, "--data", place / "data", "--out", tmp_path / "out",
         "--sets", "zeroshot/x", test, "zeroshot/y", test, "retrieval", place / "data" / "captions")
    summary = json.loads((tmp_path / "out" / "results.json").read_text())
    assert set(summary["sets"]) == {"zeroshot/x", "zeroshot/y", "retrieval"} and not summary["skipped"]
    assert summary["sets"]["zeroshot/x"]["split"] == "test"


def test_a_broken_set_costs_only_itself(place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data = tmp_path / "data"
    shutil.copytree(place / "data", data)
    (data / "masks" / "masks" / "3.png").unlink()
    with pytest.raises(SystemExit) as end:
        silc("eval", place / "a", "--suite", place / "mine.json", "--data", data, "--out", tmp_path / "out")
    told = capsys.readouterr()
    assert end.value.code == 2 and "1 of 4 sets failed: segment/masks." in told.err and "shot1" in told.out
    summary = json.loads((tmp_path / "out" / "results.json").read_text())
    assert "has no mask" in summary["failed"]["segment/masks"] and len(summary["sets"]) == 3
    assert "has no mask" in (tmp_path / "out" / "card.html").read_text()


def test_heatmap(place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    picture = place / "data" / "captions" / "0.png"
    silc("heatmap", place / "a", picture, "-t", "black", "a red dog", "--out", tmp_path / "h.png", "--how", "tips")
    with Image.open(tmp_path / "h.png") as drawn:
        assert drawn.width > 3 * 160 and "wrote" in capsys.readouterr().out


# ---------------------------------------------------------------- what a user gets wrong


@pytest.mark.parametrize(("args", "message"), [
    (["--suite", "photograph", "--data", "DATA"], "no suite 'photograph'; silc has catseg, paper, photographs,"),
    (["--suite", "photograph", "--data", "DATA"], "Perhaps you meant 'photographs'"),
    (["--suite", "paper"], "needs --data ROOT"),
    (["--suite", "paper", "--data", "DATA/none"], "none is not a folder"),
    (["--suite", "paper", "--data", "DATA"], "holds no set of the suite paper; expected in it: imagenet, cifar100"),
    (["--suite", "none.json", "--data", "DATA"], "the suite none.json cannot be read"),
    (["--sets", "zerosho", "DATA/splits"], "no task 'zerosho'. Perhaps you meant 'zeroshot'"),
    (["--sets", "zeroshot", "DATA/none"], "none does not exist"),
    (["--sets", "zeroshot", "DATA/masks/masks"], "not laid out as pictures with classes"),
    ([], "nothing to evaluate"),
    (["--sets", "zeroshot", "DATA/splits", "--device", "tpu9"], "no device 'tpu9'"),
])
def test_each_mistake_is_one_sentence(place: Path, capsys: pytest.CaptureFixture[str], args: list[str],
                                      message: str) -> None:
    given = [arg.replace("DATA", str(place / "data")) for arg in args]
    assert message in fails(capsys, "eval", place / "a", *given)


@pytest.mark.parametrize(("data", "message"), [
    ("[]", "needs `sets`"), ("{", "not valid JSON"), ('{"sets": {}}', "needs `sets`"),
    ('{"sets": {"zeroshot": "x"}, "abuot": ""}', "unknown key 'abuot'. Perhaps you meant 'about'"),
    ('{"sets": {"zeroshto/x": "x"}}', "no task 'zeroshto'. Perhaps you meant 'zeroshot'"),
    ('{"sets": {"zeroshot/x": {"template": []}}}', "names no `folder`"),
    ('{"sets": {"zeroshot/x": {"folder": "x", "template": []}}}', "Perhaps you meant 'templates'"),
    ('{"sets": {"fewshot/x": {"folder": "x", "shots": ["1"]}}}', "shots must be int"),
])
def test_a_suite_is_checked_before_anything_runs(place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str],
                                                 data: str, message: str) -> None:
    (tmp_path / "s.json").write_text(data)
    assert message in fails(capsys, "eval", place / "a", "--suite", tmp_path / "s.json", "--data", place / "data")


def test_models_and_folders_that_are_none(place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    sets = ("--sets", "zeroshot", place / "data" / "splits")
    assert "does not exist" in fails(capsys, "eval", tmp_path / "none", *sets)
    assert "no config.json" in fails(capsys, "eval", tmp_path, *sets)
    (tmp_path / "config.json").write_text('{"model_type": "bert"}')
    assert "no model.safetensors" in fails(capsys, "eval", tmp_path, *sets)
    assert "at least two folders" in fails(capsys, "compare", tmp_path)
    assert "holds no results.json" in fails(capsys, "compare", tmp_path, tmp_path)
    assert "cannot be read" in fails(capsys, "heatmap", place / "a", tmp_path / "none.png", "-t", "x")
    picture = place / "data" / "captions" / "0.png"
    assert "Perhaps you meant 'tcl'" in fails(capsys, "heatmap", place / "a", picture, "-t", "x", "--how", "tlc")


def test_results_of_different_sets_of_pictures_are_refused(place: Path, tmp_path: Path,
                                                           capsys: pytest.CaptureFixture[str]) -> None:
    for split in ("train", "test"):
        silc("eval", place / "a", "--sets", "zeroshot", place / "data" / "splits" / split, "--out", tmp_path / split)
    capsys.readouterr()
    told = fails(capsys, "compare", tmp_path / "train", tmp_path / "test")
    assert "zeroshot cannot be compared: its split is train in train but test in test" in told


# ---------------------------------------------------------------- what ships


@pytest.mark.parametrize("name", suites.names())
def test_every_suite_that_ships_is_sound(name: str) -> None:
    suite = suites.open_suite(name, find_tasks())
    assert suite.about.endswith(".") and suite.sets


def test_the_sets_of_the_photographs_are_where_their_suite_says(photographs: Path) -> None:
    suite = suites.open_suite("photographs", find_tasks())
    found, configs, skipped = suites.locate(suite, photographs)
    assert not skipped
    opened = {"zeroshot": open_classification, "fewshot": open_classification, "retrieval": open_captioned,
              "segment": open_masked}
    counts = {name: len(opened[name.partition("/")[0]](path, configs[name].split, configs[name].kind))
              for name, path in found.items() if name.partition("/")[0] in opened}
    assert counts == {"zeroshot/caltech101": 1743, "fewshot/caltech101": 1743, "retrieval/coco128": 128,
                      "segment/coco128": 100, "segment/camvid": 233}
