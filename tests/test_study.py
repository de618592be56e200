"""Studies: a small one is run through the command, cut off, gone on with; its figures are held to arithmetic by hand.

Gives: declared grids, running and resuming, analysis against hand-computed cases, the page.
Used by: pytest. Runs skip where resvg is not installed.
"""

from __future__ import annotations

import json
import math
import os
import random
import shutil
import signal
import statistics
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch
from test_photographs import write_classes as write_photographs
from test_vectors import write as write_drawings
from torch.utils.flop_counter import FlopCounterMode

from silc import recipes
from silc.cli import main
from silc.config import Config
from silc.data.emoji import Corpus
from silc.parallel import World
from silc.plain import from_dict, to_dict
from silc.plan import flops_per_sample
from silc.study import declared
from silc.study.analysis import apart, gain, gain_at_equal_flops, rows, series, slope, student_t, together
from silc.study.cells import Job
from silc.study.declared import Arm, Cell, Study, config_of, merged
from silc.study.page import write
from silc.study.running import read_records
from silc.study.tables import markdown, tables
from silc.train.loop import build

MODEL = {
    "image": {"image_size": 32, "patch": 8, "width": 32, "depth": 2, "heads": 2, "mlp": 64, "proj": "linear"},
    "text": {"vocab": 384, "length": 16, "width": 32, "depth": 1, "heads": 2, "mlp": 64},
    "preprocess": {"size": 32}, "embed_dim": 32,
}  # fmt: skip
COMMON = {
    "model": MODEL,
    "objective": {"prototypes": {"count": 64, "hidden": 32, "bottleneck": 16}, "momentum": 0.99, "momentum_batch": 32},
    "views": {"global_size": 32, "local_size": 16, "flip": False, "photometric": "none"},
    "data": {"text_key": "captions", "workers": 0},
    "train": {"batch": 32, "save_every": 4, "log_every": 2, "threads": 1},
}
HEAD = {
    "model": {"catseg": {"width": 16, "window": 2, "heads": 2, "decoder": [8, 4], "guides": [16, 8],
                         "guide_widths": [4, 2], "classes": 8}},
    "init": {"image_size": 32}, "train": {"batch": 4, "samples": 8},
}  # fmt: skip


def small(**changes: Any) -> dict[str, Any]:
    given = {
        "name": "small", "question": "Does it run?", "arms": {"clip": {"recipe": "clip"}, "silc": {"recipe": "silc",
        "change": {"views": {"locals": 2}}}}, "samples": [128, 256], "seeds": [[0], [0, 1]], "common": COMMON,
        "corpus": {"scenes": 80, "size": 48, "styles": 1, "limit": None}, "parts": {"all of it": ["silc", "clip"]},
    }  # fmt: skip
    return given | changes


# ---------------------------------------------------------------- declared


@pytest.mark.parametrize("name", declared.names())
def test_every_arm_of_every_study_is_a_config_and_its_cells_are_told_apart(name: str, tmp_path: Path) -> None:
    study = declared.get(name)
    corpus = Corpus(tmp_path, "scenes.tar", {}, {}, {}, False)
    cells = study.cells()
    assert len({cell.key for cell in cells}) == len(cells)
    assert len(cells) == len(study.arms) * sum(map(len, study.seeds)) + sum(len(s) for *_, s in study.further)
    for cell in cells[: len(study.arms)]:
        config = config_of(study, cell, corpus, tmp_path, "MODEL" if study.begins else "")
        assert config.steps * config.train.batch == cell.samples and config.views.flip is False
    for arms in study.parts.values():
        assert set(arms) <= set(study.arms)


def test_the_main_study_asks_what_the_paper_leaves_open() -> None:
    study = declared.get("main")
    named = {"clip", "siglip", "views-only", "silc", "silc-s", "silc-head", "silc-1g", "siglip2-style", "tips-style"}
    assert named <= set(study.arms) and study.arms["silc-head"].change["objective"]["teacher"] == "head"
    assert len(study.samples) >= 4 and all(b == 2 * a for a, b in zip(study.samples, study.samples[1:]))
    assert sorted(map(len, study.seeds))[-2:] == [3, 3] and len(study.seeds[1]) == len(study.seeds[2]) == 3
    assert declared.get("search").tuning and not study.tuning, "what is tuned on is not what is reported"


def test_changes_are_merged_deep_and_an_arm_says_what_it_mistakes(tmp_path: Path) -> None:
    found = merged({"a": {"b": 1, "c": 2}, "d": 3}, {"a": {"b": 4}}, {"d": {"e": 5}})
    assert found == {"a": {"b": 4, "c": 2}, "d": {"e": 5}}
    given = {"a": {"b": 1}}
    merged(given, {"a": {"b": 2}})
    assert given == {"a": {"b": 1}}
    study = Study("s", "?", {"clip": Arm("clip", {"views": {"localz": 1}})}, (64,), ((0,),))
    with pytest.raises(ValueError, match=r"study s, arm clip: config: unknown key 'views\.localz'.*locals"):
        config_of(study, Cell("clip", 64, 0), Corpus(tmp_path, "", {}, {}, {}, False), tmp_path)
    with pytest.raises(ValueError, match=r"no study 'mian'.*'main'"):
        declared.get("mian")
    with pytest.raises(ValueError, match=r"no arm is called 'clop'.*'clip'"):
        Study("s", "?", {"clip": Arm("clip")}, (64,), ((0,),), baseline="clop")
    with pytest.raises(ValueError, match="a tuple of seeds for each"):
        Study("s", "?", {"clip": Arm("clip")}, (64, 128), ((0,),))
    with pytest.raises(ValueError, match=r"no arm is called 'clop'.*'clip'"):
        Study("s", "?", {"clip": Arm("clip")}, (64,), ((0,),), further=(("clop", 64, (1,)),))


def test_a_study_in_a_file_reads_as_it_was_declared(tmp_path: Path) -> None:
    study = declared.get("main")
    file = tmp_path / "study.json"
    file.write_text(json.dumps(to_dict(study)))
    assert json.dumps(to_dict(declared.get(str(file)))) == file.read_text()


# ---------------------------------------------------------------- running


@pytest.fixture(scope="module")
def ran(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A study of six runs, one of them with a head, run through the command."""
    pytest.importorskip("resvg_py", reason="resvg is not installed: pip install 'silc[quickstart]'")
    folder = tmp_path_factory.mktemp("study")
    write_drawings(folder)
    (folder / "small.json").write_text(json.dumps(small()))
    with patch("silc.data.vectors.SCENES", 60), patch("silc.data.vectors.SEGMENT_SCENES", 20):
        command(folder, "out", "--processes", "2")
    return folder


def command(folder: Path, out: str, *options: str) -> None:
    main(["study", str(folder / "small.json"), "--drawings", str(folder / "drawings.jsonl"), "--out", str(folder / out),
          *options])  # fmt: skip


@pytest.mark.slow
def test_a_study_runs_every_cell_scores_it_and_shows_it(ran: Path) -> None:
    records = read_records(ran / "out")
    keys = {(r["arm"], r["samples"], r["seed"]) for r in records}
    assert keys == {(a, n, s) for a in ("clip", "silc") for n, s in ((128, 0), (256, 0), (256, 1))}
    for record in records:
        tasks = {name.partition("/")[0] for name in record["scores"]}
        assert tasks == {"zeroshot", "fewshot", "retrieval", "segment"}
        assert record["flops"] == pytest.approx(record["flops_per_pair"] * record["samples"]) and record["seconds"] > 0
        assert bool(record["health"]) == (record["arm"] == "silc") and "segment/tuning" not in record["scores"]
        folder = ran / "out" / "runs" / f"{record['arm']}-{record['samples']}-s{record['seed']}"
        assert (folder / "export" / "model.safetensors").exists() and (folder / "log.txt").exists()
        assert not (folder / "checkpoints").exists()
        assert from_dict(Config, json.loads((folder / "config.json").read_text())).seed == record["seed"]
    for name in ("study.html", "results.md", "records.jsonl", "scores.parquet", "segment-scenes-miou.png"):
        assert (ran / "out" / name).stat().st_size > 100, name


@pytest.mark.slow
def test_what_is_done_is_not_done_again_and_raw_files_make_the_same_page(
    ran: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    import pyarrow.parquet

    before = {p: p.stat().st_mtime_ns for p in (ran / "out" / "runs").rglob("record.json")}
    command(ran, "out")
    assert "6 runs, 0 to do" in capsys.readouterr().out
    assert before == {p: p.stat().st_mtime_ns for p in (ran / "out" / "runs").rglob("record.json")}
    raw = ran / "out" / "records.jsonl"
    main(["study", str(ran / "small.json"), "--records", str(raw), "--out", str(ran / "again")])
    for name in ("results.md", "records.jsonl", "study.html"):
        assert (ran / "again" / name).read_bytes() == (ran / "out" / name).read_bytes(), name
    table = pyarrow.parquet.read_table(ran / "again" / "scores.parquet").to_pylist()
    records = {(r["arm"], r["samples"], r["seed"]): r for r in read_records(ran / "out")}
    for row in table:
        score = records[row["arm"], row["samples"], row["seed"]]["scores"][row["set"]][row["metric"]]
        assert row["value"] == score["value"]


@pytest.mark.slow
def test_a_set_that_is_new_is_scored_without_training_or_scoring_the_rest_again(
    ran: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = ran / "out" / "runs" / "clip-128-s0" / "record.json"
    before = file.read_text()
    whole = json.loads(before)
    study, cell = declared.get(str(ran / "small.json")), Cell("clip", 128, 0)
    job = Job(study, cell, config_of(study, cell, Corpus(ran, "", {}, {}, {}, False), file.parent), {}, "")
    scores = {name: found for name, found in whole["scores"].items() if name != "fewshot/style"}
    scores["retrieval/scenes"] = {"text_to_image_r1": {"value": 0.123}}
    file.write_text(json.dumps(whole | {"scores": scores, "asked": job.asked(scores)}))
    weights = (file.parent / "export" / "model.safetensors").stat().st_mtime_ns
    command(ran, "out")
    assert "6 runs, 1 to do" in capsys.readouterr().out
    again = json.loads(file.read_text())
    assert again["scores"]["fewshot/style"] == whole["scores"]["fewshot/style"] and again["asked"] == whole["asked"]
    assert again["scores"]["retrieval/scenes"] == scores["retrieval/scenes"], "kept as it was"
    assert (file.parent / "export" / "model.safetensors").stat().st_mtime_ns == weights
    file.write_text(before)


@pytest.mark.slow
def test_a_study_that_is_killed_goes_on_and_ends_as_if_nothing_had_happened(ran: Path, tmp_path: Path) -> None:
    given = small(arms={"silc": small()["arms"]["silc"]}, baseline="silc", samples=[256], seeds=[[1]], parts={})
    file = tmp_path / "small.json"
    file.write_text(json.dumps(given))
    words = [sys.executable, "-m", "silc", "study", str(file), "--drawings", str(ran / "drawings.jsonl"), "--out",
             str(tmp_path / "out")]  # fmt: skip
    process = subprocess.Popen(words, stdout=subprocess.DEVNULL)
    shutil.copytree(ran / "out" / "corpus", tmp_path / "out" / "corpus")
    saved = tmp_path / "out" / "runs" / "silc-256-s1" / "checkpoints"
    deadline = time.monotonic() + 120
    while not (saved.exists() and any(saved.iterdir())):
        assert process.poll() is None and time.monotonic() < deadline, "no checkpoint came"
        time.sleep(0.05)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    time.sleep(3)  # its run notices, saves and ends
    subprocess.run(words, check=True, stdout=subprocess.DEVNULL, timeout=300)
    resumed = read_records(tmp_path / "out")[0]
    whole = next(r for r in read_records(ran / "out") if (r["arm"], r["samples"], r["seed"]) == ("silc", 256, 1))
    assert resumed["scores"] == whole["scores"] and resumed["terms"] == whole["terms"]


@pytest.mark.slow
def test_a_head_is_trained_where_asked_and_a_failing_run_costs_only_itself(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("resvg_py", reason="resvg is not installed: pip install 'silc[quickstart]'")
    write_drawings(tmp_path)
    good = {"recipe": "clip"}
    bad = {"recipe": "clip", "change": {"objective": {"kind": "sigmoid"}}}
    (tmp_path / "small.json").write_text(json.dumps(
        small(arms={"bad": bad, "clip": good}, samples=[64], seeds=[[0]], parts={}, head=HEAD, head_samples=[64])
    ))  # fmt: skip
    with (
        patch("silc.data.vectors.SEGMENT_CLASSES", 6),
        patch("silc.data.vectors.SEGMENT_SCENES", 4),
        patch("silc.data.vectors.MASKED_SCENES", 8),
        pytest.raises(SystemExit) as ended,
    ):
        command(tmp_path, "out")
    assert ended.value.code == 1
    records = read_records(tmp_path / "out")
    assert [r["arm"] for r in records] == ["clip"] and 0 <= records[0]["scores"]["catseg/scenes"]["miou"]["value"] <= 1
    log = tmp_path / "out" / "runs" / "bad-64-s0.txt"
    assert "the sigmoid loss needs a bias" in log.read_text()
    told = capsys.readouterr()
    assert f"failed, see {log}" in told.out and f"{log} says why" in told.err


@pytest.mark.slow
def test_photographs_are_mixed_in_and_scored(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("resvg_py", reason="resvg is not installed: pip install 'silc[quickstart]'")
    write_drawings(tmp_path)
    write_photographs(tmp_path / "photographs")
    given = small(arms={"clip": {"recipe": "clip"}}, samples=[128], seeds=[[0]], parts={}, photographs=0.5,
                  further=[["clip", 64, [3]]])  # fmt: skip
    (tmp_path / "small.json").write_text(json.dumps(given))
    command(tmp_path, "out", "--photographs", str(tmp_path / "photographs"))
    counts = json.loads((tmp_path / "out" / "photographs.json").read_text())
    assert counts == {"photographs": 72, "near_duplicates_left_out": 0, "compared_with": 72}
    assert "72 photographs for training; 0 left out" in capsys.readouterr().out
    records = {(r["samples"], r["seed"]): r for r in read_records(tmp_path / "out")}
    assert set(records) == {(128, 0), (64, 3)}
    for record in records.values():
        assert {"zeroshot/caltech101", "fewshot/caltech101", "zeroshot/style"} <= set(record["scores"])
        assert record["scores"]["zeroshot/caltech101"]["top1"]["chance"] == pytest.approx(1 / 12, abs=1e-5)
    config = json.loads((tmp_path / "out" / "runs" / "clip-128-s0" / "config.json").read_text())
    assert config["data"]["weights"] == [0.5, 0.5] and config["data"]["sources"][1].endswith("photographs.jsonl")
    with pytest.raises(SystemExit):
        command(tmp_path, "out")
    assert "takes photographs: name their folder, --photographs" in capsys.readouterr().err


@pytest.mark.parametrize(("options", "message"), [
    (["--drawings", "x", "--photographs", "y"], "study main takes none: drop --photographs"),
    ([], "give --drawings FILE"), (["--drawings", "none.jsonl"], "none.jsonl cannot be read"),
    (["--records", "none.jsonl"], "no finished run"), (["--drawings", "x", "--processes", "0"], "at least one run"),
])  # fmt: skip
def test_mistakes_are_told_in_a_sentence(
    options: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["study", "main", "--out", str(tmp_path / "out"), *options])
    assert ended.value.code == 2 and message in capsys.readouterr().err


# ---------------------------------------------------------------- analysis


def record(arm: str, samples: int, seed: int, value: float, flops: float, **more: Any) -> dict[str, Any]:
    scores = {"segment/scenes": {"miou": {"value": value, "chance": 0.01, "interval": None}}}
    return {"arm": arm, "samples": samples, "seed": seed, "scores": scores, "flops": flops * samples, "seconds": 1.0,
            "images_per_s": 10.0, "health": {}, **more}  # fmt: skip


def both() -> list[dict[str, Any]]:
    """clip rises by 0.02 a doubling; silc costs twice as much a pair and lies 0.03 above, one seed 0.01 higher."""
    found = [record("clip", 100 * 2**i, 0, 0.10 + 0.02 * i, 1.0) for i in range(4)]
    return found + [record("silc", 100 * 2**i, s, 0.13 + 0.02 * i + 0.01 * s, 2.0) for i in range(3) for s in (0, 1)]


def test_gains_on_equal_samples_and_equal_flops_by_hand() -> None:
    found = series(rows(both()), "segment/scenes miou")
    equal_samples = gain(found["silc"], found["clip"], 200)
    assert equal_samples is not None and equal_samples.mean == pytest.approx(0.03), "the seed that both have"
    assert gain(found["silc"], found["clip"], 800) is None, "silc never went there"
    level = slope(apart(found["silc"], found["clip"]), (100, 200, 400))
    assert level is not None and level.mean == pytest.approx(0, abs=1e-12), "both rise alike"
    # twice the cost a pair: clip would see twice the pairs, one doubling, 0.02 more
    equal = gain_at_equal_flops(found["silc"], found["clip"], 200)
    assert equal is not None and equal.mean == pytest.approx(0.01 + 0.005)
    assert equal.half == pytest.approx(12.706 * statistics.stdev([0.01, 0.02]) / math.sqrt(2))
    assert gain_at_equal_flops(found["silc"], found["clip"], 400) is not None, "at the baseline's last duration"
    assert found["silc"].ends(100) == pytest.approx((0.13, 0.14)) and found["silc"].flops[100] == 200


def test_equal_flops_between_durations_and_seed_by_seed_by_hand() -> None:
    """clip at 100, 200 and 400 pairs with seeds that scatter; silc's 100 pairs cost as much as 2 ** 1.5 times that."""
    levels = {0: 0.10, 1: 0.13, 2: 0.12}
    clip = [record("clip", 100 * 2**i, s, levels[s] + 0.02 * i * (1 + s), 1.0) for i in range(3) for s in levels]
    silc = [record("silc", 100, s, value, 2**1.5) for s, value in ((0, 0.2), (1, 0.3), (2, 0.25), (3, 0.9))]
    found = series(rows(clip + silc), "segment/scenes miou")
    equal = gain_at_equal_flops(found["silc"], found["clip"], 100)
    # halfway between 200 and 400 pairs: 0.10 + 0.03, 0.13 + 0.06, 0.12 + 0.09; the fourth seed has no partner
    apart = [0.2 - 0.13, 0.3 - 0.19, 0.25 - 0.21]
    assert equal is not None and equal.mean == pytest.approx(statistics.mean(apart))
    assert equal.half == pytest.approx(4.303 * statistics.stdev(apart) / math.sqrt(3))
    alone = series(rows([r for r in clip + silc if r["arm"] == "silc" or r["seed"] == 0]), "segment/scenes miou")
    above = gain_at_equal_flops(alone["silc"], alone["clip"], 100)
    assert above is not None and above.mean == pytest.approx(statistics.mean([0.2, 0.3, 0.25, 0.9]) - 0.13)
    dear = series(rows([*clip, record("silc", 400, 0, 0.5, 4.0)]), "segment/scenes miou")
    assert gain_at_equal_flops(dear["silc"], dear["clip"], 400) is None, "clip was never trained so long"


def test_durations_together_seed_by_seed_by_hand() -> None:
    """Differences of 0.1 x seed, and 0.02 more at the longer duration; a fourth seed at one of them alone."""
    clip = [record("clip", n, s, 0.1, 1.0) for n in (100, 200, 400) for s in range(4)]
    silc = [record("silc", n, s, 0.1 + 0.1 * s + more, 2.0)
            for n, seeds, more in ((100, 4, 0.0), (200, 3, 0.02), (400, 2, 5.0)) for s in range(seeds)]  # fmt: skip
    found = series(rows(clip + silc), "segment/scenes miou")
    over = together(found["silc"], found["clip"], (100, 200, 400, 800))
    assert over is not None and over[0] == [100, 200], "at 400 there are two seeds"
    assert over[1].mean == pytest.approx(statistics.mean([0.01, 0.11, 0.21]))
    assert over[1].half == pytest.approx(4.303 * 0.1 / math.sqrt(3))
    assert together(found["silc"], found["clip"], (100, 400)) is None, "one duration is not several"


def test_slopes_and_students_t_against_scipys_formula() -> None:
    found = series(rows(both()), "segment/scenes miou")
    exact = slope(found["clip"], (100, 200, 400))
    assert exact is not None and exact.mean == pytest.approx(0.02) and exact.half == pytest.approx(0, abs=1e-12)
    assert slope(series(rows(both()[:1]), "segment/scenes miou")["clip"], (100,)) is None
    bent = series(rows([*both()[:3], record("clip", 800, 0, 0.9, 1.0)]), "segment/scenes miou")["clip"]
    assert slope(bent, (100, 200, 400)) == pytest.approx(exact), "cells beside the grid's durations do not count"
    one = student_t([0.5])
    assert one.half is None and one.sign == 0
    three = student_t([1.0, 2.0, 3.0])
    assert three.mean == 2 and three.half == pytest.approx(4.303 / math.sqrt(3)) and three.sign == 0
    assert student_t([2.0, 2.1, 1.9]).sign == 1 and student_t([-2.0, -2.1, -1.9]).sign == -1


def test_a_line_through_noise_is_what_numpy_fits() -> None:
    import numpy as np

    noise = random.Random(0)
    cells = [(64 * 2**i, seed, 0.1 + 0.03 * i + noise.gauss(0, 0.01)) for i in range(4) for seed in range(3)]
    records = [record("clip", samples, seed, value, 1.0) for samples, seed, value in cells]
    found = slope(series(rows(records), "segment/scenes miou")["clip"], {samples for samples, *_ in cells})
    x, y = np.log2([samples for samples, *_ in cells]), [value for *_, value in cells]
    (rise, _), covariance = np.polyfit(x, y, 1, cov=True)
    assert found is not None and found.mean == pytest.approx(rise)
    assert found.half == pytest.approx(2.228 * math.sqrt(covariance[0, 0]))


def test_the_tables_say_it_and_the_page_escapes_what_it_is_given(tmp_path: Path) -> None:
    arms = {"clip": Arm("clip"), "silc": Arm("silc", {}, "<script>alert(1)</script>")}
    study = Study("s", "Is <b>it</b> so?", arms, (100, 200, 400), ((0, 1),) * 3, scores=("segment/scenes miou",),
                  parts={"all": ("silc", "clip")})  # fmt: skip
    health = {"entropy": [0.5, 0.05], "prototype_use": [0.2, 0.3]}
    records = [r | ({"health": health} if r["arm"] == "silc" else {}) for r in both()]
    text = markdown(tables(study, records))
    assert "| silc | 200 | 2 | 15.5 (15.0 to 16.0) | 2.00 |" in text
    assert "| silc | +3.00 | +3.00 | +3.00 | – | +1.50 ± 6.35 | +1.50 ± 6.35 | +1.50 ± 6.35 |" in text
    assert "| silc | 6 | 0.05 to 0.50 | no | 0.20 |" in text
    page = write(study, records, tmp_path).read_text()
    assert "<script>" not in page and "&lt;b&gt;it&lt;/b&gt;" in page and "http" not in page.replace("data:image", "")


def test_recipes_that_studies_name_exist() -> None:
    for name in declared.names():
        for arm in declared.get(name).arms.values():
            recipes.get(arm.recipe)


@pytest.mark.parametrize("arm", declared.get("main").arms)
def test_the_flops_that_a_study_reports_are_those_that_pytorch_counts(arm: str, tmp_path: Path) -> None:
    study = declared.get("main")
    config = config_of(study, Cell(arm, study.samples[0], 0), Corpus(tmp_path, "", {}, {}, {}, False), tmp_path)
    o, v, model = config.objective, config.views, config.model
    begun = {name: replace(getattr(o, name), start=0.0) for name in ("distill", "masked")}
    config = replace(config, objective=replace(o, **begun), train=replace(config.train, batch=16, precision="fp32"))
    task, _ = build(config, World(0, 1, torch.device("cpu")))
    sides = {"globals": (v.globals, v.global_size), "locals": (v.locals, v.local_size)}
    batch = {n: torch.zeros(k, 16, 3, s, s, dtype=torch.uint8) for n, (k, s) in sides.items() if k}
    batch["image"] = torch.zeros(16, 3, model.preprocess.size, model.preprocess.size, dtype=torch.uint8)
    batch["tokens"] = torch.zeros(16, model.text.length, dtype=torch.long)
    with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        task.forward_backward(batch, 0)
    assert counter.get_total_flops() == pytest.approx(flops_per_sample(config).total * 16, rel=0.08)
