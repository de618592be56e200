"""Report and plots: right numbers, nothing escapes from data into the page, tolerant of a killed run, self-contained.

Gives: tests; run as a script it writes the made-up report to a folder to look at: `python tests/test_report.py FOLDER`.
Used by: pytest.
"""

from __future__ import annotations

import json
import math
import re
import sys
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote

import numpy as np
import pytest

from silc.app import grids, plots
from silc.app.report import Section, build
from silc.app.runs import duration, interval, metric_name, read_run, score, set_names, span, times
from silc.config import Config, ObjectiveConfig, PrototypeConfig, Term, TrainConfig, ViewsConfig
from silc.plain import save_json

EVIL = "<script>alert('cat')</script>"
SETS = {  # name: metrics as (start, end of the stronger run), chance
    "retrieval/style": {"text_to_image_r1": (0.009, 0.4123, 0.01), "text_to_image_r5": (0.05, 0.711, 0.05),
                        "image_to_text_r1": (0.011, 0.395, 0.01), "image_to_text_r5": (0.052, 0.702, 0.05)},
    "zeroshot/emoji": {"top1": (0.004, 0.318, 0.005), "top5": (0.026, 0.602, 0.025)},
    "segment/scenes": {"miou": (0.051, 0.372, 0.118), "pixel_accuracy": (0.2, 0.741, 0.55)},
}


def config(distilled: bool) -> Config:
    objective = ObjectiveConfig(distill=Term(1.0 if distilled else 0.0), prototypes=PrototypeConfig(count=4096))
    views = ViewsConfig(globals=1, global_size=64, locals=6 if distilled else 0, local_size=32)
    return Config(recipe="quickstart" if distilled else "quickstart_clip", objective=objective, views=views,
                  train=TrainConfig(batch=256, samples=256 * 2000), out="runs/x")


def train_line(step: int, distilled: bool, rng: np.random.Generator) -> dict:
    t, noise = step / 2000, rng.normal(0, 1, 8)
    contrast = 1.1 + 4.4 * math.exp(-4 * t) + 0.08 * noise[0] - 0.1 * distilled
    line = {"kind": "train", "step": step, "samples": step * 256, "seconds": step * 0.41, "contrast": contrast,
            "lr": 1e-3 * min(1, t / 0.05) * 0.5 * (1 + math.cos(math.pi * t)), "logit_scale": 14.3 + 40 * t,
            "grad_norm": 1.2 + 0.2 * noise[1] + math.exp(-9 * t), "images_per_s": 620 + 15 * noise[2],
            "wait": float(np.clip(0.03 + 0.015 * noise[3], 0, 1)), "memory_mb": 1400 + 60 * min(1, 5 * t)}
    if distilled:
        line |= {"distill": 5.4 + 2.8 * math.exp(-5 * t) + 0.06 * noise[4],
                 "teacher_entropy": 4.6 + 3.6 * math.exp(-7 * t) + 0.05 * noise[5],
                 "prototype_use": min(1.0, 0.25 + 0.5 * (1 - math.exp(-6 * t)) + 0.01 * noise[6])}
    return line | {"loss": contrast + line.get("distill", 0.0)}


def fake_run(folder: Path, distilled: bool, tail: str = "") -> Path:
    """A run of 2000 steps as the trainer writes it; `tail` ends metrics.jsonl as a kill would."""
    folder.mkdir(parents=True)
    save_json(folder / "config.json", config(distilled))
    (folder / "env.json").write_text(json.dumps({
        "command": ["silc", "train", folder.name], "python": "3.11.9", "torch": "2.13.0+cpu", "cpu": "Some CPU @ 2 GHz",
        "cpus": 2, "gpu": None, "git": "0123abc"}))
    rng, lines = np.random.default_rng(distilled), []
    for step in range(10, 2001, 10):
        lines.append(train_line(step, distilled, rng))
    for step in range(0, 2001, 250):
        rise = 1 - math.exp(-3.2 * step / 2000)
        for name, metrics in SETS.items():
            full = 1 - math.exp(-3.2)
            values = {k: a + (b * (1 if distilled else 0.78) - a) * rise / full for k, (a, b, _) in metrics.items()}
            # As evaluations tell it: means of hits have an interval, mIoU has none.
            spread = {k: 0.09 if k == "text_to_image_r1" else 0.02 for k in values if k not in ("miou", "top5")}
            lines.append({"kind": "eval", "step": step, "samples": step * 256, "set": name, "metrics": values,
                          "chance": {k: c for k, (_, _, c) in metrics.items()},
                          "interval": {k: [values[k] - d, values[k] + d] for k, d in spread.items()}})
    (folder / "metrics.jsonl").write_text("\n".join(map(json.dumps, lines)) + "\n" + tail)
    return folder


def drawing(rng: np.random.Generator, side: int = 64) -> tuple[np.ndarray, np.ndarray]:
    """A made-up scene [H,W,3] uint8 of a disc and a box, and its mask: 0 background, 1 disc, 2 box, 255 void."""
    y, x = np.mgrid[:side, :side] / side
    cx, cy = rng.uniform(0.25, 0.4), rng.uniform(0.3, 0.7)
    disc, box = (x - cx) ** 2 + (y - cy) ** 2 < 0.035, (abs(x - 0.75) < 0.14) & (abs(y - 1 + cy) < 0.16)
    mask = np.where(box, 2, np.where(disc, 1, 0))
    mask[:3] = 255
    image = np.full((side, side, 3), 236) + rng.integers(-8, 8, (side, side, 1))
    image[disc], image[box] = rng.integers(40, 220, 3), rng.integers(40, 220, 3)
    return image.astype(np.uint8), mask


def fake_sections(folder: Path, evil: str) -> list[Section]:
    rng = np.random.default_rng(0)
    found = [[(drawing(rng)[0], bool(j == i or (i, j) == (0, 2)), 0.31 - 0.02 * j) for j in range(6)] for i in range(3)]
    queries = ["a red disc beside a blue box", "costs $5 or $6 \\foo", "many small things " * 12]
    retrieval = grids.retrieval_grid(queries, found, folder / "found pictures.png")
    rows: list[grids.MapRow] = []
    for i in range(3):
        image, truth = drawing(rng, 64 + 16 * i)
        maps = [(text, (truth == c) * 0.25 + rng.normal(0, 0.03, truth.shape))
                for c, text in ((1, "a photo of a round disc"), (2, "box"), (0, "background"))]
        rows.append({"image": image.transpose(2, 0, 1) if i else image, "maps": maps, "truth": truth,
                     "prediction": np.argmax([maps[2][1], maps[0][1], maps[1][1]], 0),
                     "names": ["background", "disc", "box"], "palette": None})
    maps_path = grids.map_grid(rows, folder / "maps.png")
    return [Section("What it finds", "The six pictures nearest to each text, best first.\n\nA green frame and a tick "
                    "mark the right ones.", [(retrieval, "Text to picture, on drawings held out from training.")]),
            Section("Where it sees it", "Cosine of each patch with each text, and the mask that follows.",
                    [(maps_path, "No mask was ever shown in training.")],
                    (["Class", "IoU"], [["background", "71.3%"], [evil or "disc", "40.2%"], ["box", "35.9%"]]))]


def fake_report(folder: Path, evil: str = EVIL) -> Path:
    runs = {"SILC": fake_run(folder / "silc", True), f"CLIP {evil}".strip(): fake_run(folder / "clip", False)}
    return build(runs, folder / "out", fake_sections(folder / "drawn", evil),
                 [("reuse the corpus", 0.01), ("draw the corpus", 48.2), ("train SILC", 823.0),
                  (f"train CLIP {evil}".strip(), 611.5), ("evaluate", 57.0)],
                 f"SILC and CLIP on the same pairs {evil}".strip(),
                 [("Machine", "2 CPU cores"), ("Compute", "3.1e15 FLOPs")],
                 {"zeroshot/emoji": f"Held-out emoji {evil}".strip()}, "Two runs on made-up numbers.")


class Page(HTMLParser):
    """Tags with their attributes, and the cells of the results table as [row][cell] texts."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text: list[str] = []
        self.rows: list[list[str]] = []
        self.inside = self.cell = False
        self.feed(html)

    def handle_starttag(self, tag, attrs) -> None:
        self.tags.append((tag, dict(attrs)))
        self.inside |= dict(attrs).get("class") == "results"
        if self.inside and tag == "tr":
            self.rows.append([])
        if self.inside and tag in ("td", "th"):
            self.rows[-1].append("")
            self.cell = True

    def handle_endtag(self, tag) -> None:
        self.inside &= tag != "table"
        self.cell &= tag not in ("td", "th")

    def handle_data(self, data) -> None:
        self.text.append(data)
        if self.inside and self.cell:
            self.rows[-1][-1] = f"{self.rows[-1][-1]} {data.strip()}".strip()


@pytest.fixture(scope="module")
def report(tmp_path_factory) -> Path:
    return fake_report(tmp_path_factory.mktemp("report"))


@pytest.fixture(scope="module")
def page(report) -> Page:
    return Page(report.read_text())


def test_headline_numbers(page):
    rows = {row[0]: row[1:] for row in page.rows[1:]}
    # 0.4123 and 0.4123 * 0.78, each with 0.09 to either side; chance 0.01
    assert rows["text → image R@1"] == ["41.2% 32.2–50.2% 41×", "32.2% 23.2–41.2% 32×", "1.0%"]
    assert rows["top-1"] == ["31.8% 29.8–33.8% 64×", "24.8% 22.8–26.8% 50×", "0.5%"]
    assert rows["mIoU"] == ["37.2% 3.2×", "29.0% 2.5×", "best constant 11.8%"]
    assert page.rows[0] == ["Metric", "SILC", f"CLIP {EVIL}", "Chance"]
    assert [row for row in page.rows if len(row) == 1] == [
        ["style retrieval"], [f"Held-out emoji {EVIL} zero-shot classification"], ["scenes segmentation"]]
    assert len(page.rows) == 1 + len(SETS) + sum(map(len, SETS.values()))


def test_only_decided_differences_are_marked(page):
    """Overlapping intervals (text to image R@1), and scores without (mIoU, top-5), are not called a win."""
    best = [a["class"] for tag, a in page.tags if tag == "td" and "score" in (a.get("class") or "")]
    names = [row[0] for row in page.rows[1:] if len(row) > 1 for _ in range(2)]
    marked = [name for name, kind in zip(names, best) if "best" in kind]
    assert marked == ["text → image R@5", "image → text R@1", "image → text R@5", "top-1", "pixel accuracy"]
    assert best[names.index("top-1")] == "num score best"  # the first run's, which is higher


def test_without_intervals_no_difference_is_marked(tmp_path):
    runs = {"a": fake_run(tmp_path / "a", True), "b": fake_run(tmp_path / "b", False)}
    for folder in runs.values():
        path = folder / "metrics.jsonl"
        path.write_text("".join(json.dumps({k: v for k, v in json.loads(line).items() if k != "interval"}) + "\n"
                                for line in path.read_text().splitlines()))
    html = build(runs, tmp_path / "out", [], [], "t", []).read_text()
    assert "no difference is marked" in html and "score best" not in html and 'class="span"' not in html


def test_order_of_the_page(page):
    titles = [v for tag, a in page.tags if tag == "section" for v in [a["id"]]]
    assert titles == ["results", "section-1", "section-2", "learning", "loss", "teacher", "optimisation", "speed",
                      "time", "facts", "settings"]
    assert [a["href"][1:] for _, a in page.tags if (a.get("href") or "").startswith("#")] == titles


def test_phases_too_short_to_see_are_left_out(page):
    text = re.sub(r"\s+", " ", " ".join(page.text))
    assert "reuse the corpus" not in text and "draw the corpus" in text and "parts under 1% are not shown" in text


def test_data_cannot_become_markup(page):
    assert "script" not in {tag for tag, _ in page.tags}
    assert "".join(page.text).count(EVIL) >= 4  # heading, title, run, class: shown as text, character for character


def test_pictures_exist_and_have_dark_twins(report, page):
    shown = [a["src"] for tag, a in page.tags if tag == "img"]
    dark = [a["srcset"] for tag, a in page.tags if tag == "source"]
    assert len(shown) == len(dark) == len(set(shown)) >= 15
    for link in shown + dark:
        assert (report.parent / unquote(link)).read_bytes()[:4] == b"\x89PNG"
    assert all(a["alt"] and int(a["width"]) > 0 < int(a["height"]) for tag, a in page.tags if tag == "img")
    assert set(shown + dark) == {f"pictures/{p.name}" for p in (report.parent / "pictures").iterdir()}


def test_self_contained(report, page):
    links = [v for tag, a in page.tags for k, v in a.items() if k in ("src", "href", "srcset", "action", "data")]
    assert links and all(re.match(r"pictures/|#|data:,$", link) for link in links)
    assert not re.search(r"https?:|//\w|url\(|@import", report.read_text())
    anchors = {a["href"][1:] for _, a in page.tags if (a.get("href") or "").startswith("#")}
    assert anchors == {a["id"] for tag, a in page.tags if tag == "section"}


def test_facts_of_the_runs(page):
    text = re.sub(r"\s+", " ", " ".join(page.text))
    for fact in ("1 global × 64 px, 6 local × 32 px", "softmax + 1 × distill", "2,000 of 2,000", "13 min 40 s",
                 "objective.distill.weight", "2.13.0+cpu", "3.1e15 FLOPs", "25 min 40 s of wall time"):
        assert fact in text, fact
    assert "optim.betas" not in text  # equal in both runs


def test_killed_and_resumed_run(tmp_path):
    """A cut last line is left out; after a resume the clock starts anew and the repeated step counts once."""
    tail = "".join(json.dumps({"kind": "train", "step": s, "samples": s * 256, "seconds": t, "loss": 1.0}) + "\n"
                   for s, t in ((2000, 8.0), (2010, 12.0)))
    run = read_run("killed", fake_run(tmp_path / "run", True, tail + '{"kind": "train", "step": 2020, "sam'))
    assert run.unreadable == 1
    assert [line["step"] for line in run.train[-3:]] == [1990, 2000, 2010]
    assert run.seconds == pytest.approx(1990 * 0.41 + 12.0)
    assert run.series("loss")[1][-2:] == [1.0, 1.0]
    assert len(run.evals["zeroshot/emoji"]) == 9


def test_single_unfinished_run(tmp_path):
    folder = fake_run(tmp_path / "run", False)
    (folder / "env.json").unlink()
    nothing = {"kind": "eval", "step": 500, "samples": 128000, "set": "zeroshot/emoji",
               "metrics": {"top1": math.nan, "top5": None, "median_rank": 1.0}, "chance": {"top1": 0.005}}
    keep = [line for line in (folder / "metrics.jsonl").read_text().splitlines() if json.loads(line)["step"] <= 500]
    keep = [line.replace('"contrast"', '"pixel"') for line in [*keep, json.dumps(nothing)]]
    (folder / "metrics.jsonl").write_text("\n".join(keep) + '\n{"kind": "ev')
    html = build({"only": folder}, tmp_path / "out", [], [], "One run", []).read_text()
    assert "128k of 512k (unfinished)" in html and "train-loss.png" in html
    rows = {row[0]: row[1:] for row in Page(html).rows}
    assert (rows["top-1"], rows["top-5"], rows["median rank"]) == (["– –", "0.5%"], ["– –", "–"], ["1 –", "–"])
    assert "Where the time went" not in html and "Settings that differ" not in html and "Teacher" not in html


@pytest.mark.parametrize("missing", [".", "config.json", "metrics.jsonl"])
def test_missing_run_is_one_clear_error(tmp_path, missing):
    folder = tmp_path / "run"
    if missing != ".":
        (fake_run(folder, False) / missing).unlink()
    with pytest.raises(ValueError, match=r"does not exist, so there is no run 'SILC'") as error:
        build({"SILC": folder}, tmp_path / "out", [], [], "t", [])
    assert str(folder) in str(error.value) and not (tmp_path / "out").exists()


def test_missing_or_foreign_picture(tmp_path):
    folder = fake_run(tmp_path / "run", False)
    (tmp_path / "no.png").write_text("text")
    for name, words in (("gone.png", "does not exist"), ("no.png", "not a PNG")):
        with pytest.raises(ValueError, match=words):
            build({"a": folder}, tmp_path / "out", [Section("s", pictures=[(tmp_path / name, "")])], [], "t", [])


def test_missing_packages_name_the_extra(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(ValueError, match=r"matplotlib: pip install \"silc\[quickstart\]\""):
        plots.curves([plots.Line("a", [0, 1], [0, 1])], tmp_path / "a.png", title="a")
    monkeypatch.setitem(sys.modules, "jinja2", None)
    with pytest.raises(ValueError, match=r"jinja2: pip install"):
        build({"a": tmp_path}, tmp_path, [], [], "t", [])


@pytest.mark.parametrize("value, percent, text", [
    (0.4123, True, "41.2%"), (0.002, True, "0.2%"), (0.00123, True, "0.12%"), (0.00999, True, "1.0%"),
    (0, True, "0.0%"),
    (1, True, "100.0%"), (12.34567, False, "12.35"), (None, True, "–")])
def test_score(value, percent, text):
    assert score(value, percent) == text


@pytest.mark.parametrize("value, chance, text", [
    (0.5, 0.01, "50×"), (0.03, 0.01, "3.0×"), (0.996, 0.001, "1,000×"), (0.0998, 0.01, "10×"), (0.005, 0.01, "0.50×"),
    (0.0, 0.01, "0×"), (0.412, 0.01, "41×"), (0.5, 0, "–"), (0.5, None, "–"), (None, 0.1, "–")])
def test_times(value, chance, text):
    assert times(value, chance) == text


@pytest.mark.parametrize("ends, percent, text", [
    ((0.381, 0.4444), True, "38.1–44.4%"), ((0.0, 0.0049), True, "0.00–0.49%"), ((1.5, 22), False, "1.5–22"),
    (None, True, "")])
def test_span(ends, percent, text):
    assert span(ends, percent) == text


@pytest.mark.parametrize("given", [None, 5, {}, {"top1": None}, {"top1": [0.1]}, {"top1": [0.3, 0.2]},
                                   {"top1": [math.nan, 0.2]}, {"top1": ["a", "b"]}])
def test_nonsense_intervals_are_none(given):
    assert interval({"interval": given}, "top1") is None


def test_set_names():
    labels = {"segment/scenes": "Held-out scenes"}
    assert set_names("segment/scenes", labels) == ("Held-out scenes", "segmentation")
    assert set_names("zeroshot/pets", labels) == ("pets", "zero-shot classification")
    assert set_names("retrieval", labels) == ("retrieval", "retrieval")


@pytest.mark.parametrize("seconds, text", [
    (0.42, "0.4 s"), (48.2, "48 s"), (59.7, "1 min"), (61, "1 min 1 s"), (3599.7, "1 h"), (8054, "2 h 14 min"),
    (86399, "1 d"), (93600, "1 d 2 h")])
def test_duration(seconds, text):
    assert duration(seconds) == text


def test_metric_names():
    keys = {"image_to_text_r10": "image → text R@10", "top1": "top-1", "miou": "mIoU", "mean_class_accuracy":
            "mean class accuracy", "recall_at_5": "R@5"}
    assert {key: metric_name(key) for key in keys} == keys


def test_smooth_is_the_mean_of_known_neighbours():
    y = np.array([1.0, 2.0, np.nan, 4.0, 6.0])
    np.testing.assert_allclose(plots.smooth(y, 3), [1.5, 1.5, np.nan, 5.0, 5.0])
    np.testing.assert_allclose(plots.smooth(y, 1), y)


def test_mask_colours_differ_and_follow_the_palette():
    assert len({tuple(c) for c in grids.mask_colours(32).round(3)}) == 32
    np.testing.assert_allclose(grids.mask_colours(2, [[255, 0, 51], [0, 0, 0], [1, 1, 1]]), [[1, 0, 0.2], [0, 0, 0]])
    with pytest.raises(ValueError, match="2 colours for 3 classes"):
        grids.mask_colours(3, [[0, 0, 0], [1, 1, 1]])


def map_row(truth, prediction, names, palette=None) -> grids.MapRow:
    return {"image": np.zeros((*np.shape(truth), 3)), "maps": [], "truth": np.array(truth),
            "prediction": np.array(prediction), "names": names, "palette": palette}


def test_masks_are_painted_class_by_class():
    row = map_row([[0, 1], [255, 1]], [[0, 0], [255, -1]], ["a", "b"], [[255, 0, 0], [0, 255, 0]])
    painted = grids._paint(np.array([[0, 1], [255, -1]]), row, (0.5, 0.5, 0.5))
    np.testing.assert_allclose(painted, [[[1, 0, 0], [0, 1, 0]], [[0.5] * 3] * 2])


def test_classes_of_a_picture_get_the_colours_that_differ_most():
    """Of 100 classes, the true one, then predicted ones by size, take the first colours; the legend tells them so."""
    row = map_row([[90, 90], [255, 255]], [[17, 42], [42, 255]], [f"class {i}" for i in range(100)])
    colours = grids._colours(row)
    np.testing.assert_allclose(colours[[90, 42, 17]], grids.mask_colours(3))
    assert len({tuple(c) for c in colours[[0, 1, 17, 42, 90]]}) == 5
    lines = grids._legend(row, 3.0)
    assert [name for line in lines for name, _, _ in line] == ["class 90", "class 42", "class 17", "not labelled"]


def test_blocks_flow_over_the_page_without_overlap():
    sizes = [(4.7, 1.5), (4.7, 1.9), (5.9, 1.0), (4.7, 1.0), (7.0, 1.0)]
    places, width, height = grids._flow(sizes)
    assert width <= grids.PAGE and places[0][1] == places[1][1] < places[2][1] < places[3][1]
    boxes = [(left, top, left + w, top + h) for (left, top), (w, h) in zip(places, sizes)]
    for i, a in enumerate(boxes):
        assert a[2] <= width and a[3] <= height
        for b in boxes[:i]:
            assert a[0] >= b[2] or b[0] >= a[2] or a[1] >= b[3] or b[1] >= a[3]


@pytest.mark.parametrize("text", ["a dog", "a very long name of a thing that nobody can fit in here", "W" * 40])
def test_titles_fit_their_cell(text):
    lines = grids._wrap(text, grids.SMALL, grids.CELL)
    assert 1 <= len(lines) <= 2 and all(plots.text_width(line, grids.SMALL) <= grids.CELL for line in lines)
    assert " ".join(lines) == text or lines[-1].endswith("…")


def test_grids_refuse_nonsense(tmp_path):
    for queries, rows in (([], []), (["a"], []), (["a"], [[]])):
        with pytest.raises(ValueError, match="each query needs its pictures"):
            grids.retrieval_grid(queries, rows, tmp_path / "a.png")
    with pytest.raises(ValueError, match="no pictures"):
        grids.map_grid([], tmp_path / "a.png")
    with pytest.raises(ValueError, match=r"not \[4, 4\]"):
        grids.retrieval_grid(["a"], [[(np.zeros((4, 4)), True, 0.0)]], tmp_path / "a.png")


if __name__ == "__main__":
    print(fake_report(Path(sys.argv[1]), ""))
