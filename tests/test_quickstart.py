"""The main job end to end, small: corpus, both runs, evaluations, report; and that it goes on where it was."""

from __future__ import annotations

import json
from html.parser import HTMLParser
from pathlib import Path

import pytest

from silc.cli import main

pytest.importorskip("resvg_py", reason="the quickstart's packages are missing: pip install silc[quickstart]")


class References(HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []
        self.words: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.found += [v for k, v in attrs if k in ("src", "href") and v and not v.startswith(("#", "data:"))]

    def handle_data(self, data: str) -> None:
        self.words.append(data)


@pytest.mark.slow
def test_the_quickstart_ends_with_a_report(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "out"
    args = ["quickstart", "--out", str(out), "--cache", str(tmp_path / "cache"), "--steps", "4", "--scenes", "400"]
    main([*args, "--compare"])
    page = References()
    page.feed((out / "report.html").read_text())
    assert len(page.found) > 20
    for reference in page.found:
        assert "://" not in reference and (out / reference).exists(), reference
    words = " ".join(page.words)
    for expected in ("SILC", "CLIP", "chance", "MFLOP a pair", "patch-text maps", "retrieved drawings"):
        assert expected in words
    for name in ("silc", "clip"):
        told = map(json.loads, (out / name / "metrics.jsonl").read_text().splitlines())
        evals = {row["set"] for row in told if row["kind"] == "eval"}
        sets = {"retrieval/concepts", "zeroshot/concepts", "retrieval/style", "zeroshot/style", "segment/scenes"}
        assert evals == sets
    said = capsys.readouterr()
    assert str(out / "report.html") in said.err and "| retrieval/style | text_to_image_r1 |" in said.out

    main([*args, "--compare"])  # everything is done: only evaluation and report are made again
    assert "Reusing" in capsys.readouterr().err
    picture = next((tmp_path / "cache").glob("emoji-*/segment-scenes/images/*.png"))
    main(["heatmap", str(out / "silc"), str(picture), "-t", "a dog", "--out", str(tmp_path / "map.png")])
    assert (tmp_path / "map.png").stat().st_size > 1000
