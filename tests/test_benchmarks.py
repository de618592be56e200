"""The benchmarks run, at toy size and without peers too; the page of figures is what the raw files say."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest

HOUSE = Path(__file__).parents[1] / "benchmarks"
SHARED = ("harness", "pages", "peer_towers")
FILES = sorted(path.stem for path in HOUSE.glob("*.py") if path.stem not in SHARED)


@pytest.fixture
def pages(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(HOUSE)
    import pages

    return pages


@pytest.fixture
def harness(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(HOUSE)
    import harness

    return harness


@pytest.mark.slow
@pytest.mark.parametrize("name", FILES)
def test_every_benchmark_runs_at_toy_size_and_keeps_what_it_found(name: str, tmp_path: Path) -> None:
    few = ["--only", "retrieval text"] if name == "eval_memory" else []
    command = [sys.executable, str(HOUSE / f"{name}.py"), "--quick", "--out", str(tmp_path), *few]
    environment = {k: v for k, v in os.environ.items() if k != "SILC_PEERS"} | {"OMP_NUM_THREADS": "1"}
    found = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    assert found.returncode == 0, found.stderr[-2000:]
    data = json.loads((tmp_path / f"{name}.json").read_text())
    assert data["machine"]["cpu"] and data["versions"]["torch"] and str(tmp_path) not in data["command"]
    assert data["rows"] and all(check["holds"] for check in data["checks"])
    for line in data["left_out"]:
        assert f"left out: {line}" in found.stderr, "what is left out is said aloud"


def test_the_page_is_what_the_raw_files_say(pages: ModuleType) -> None:
    assert pages.PAGE.read_text() == pages.page(), "run `python benchmarks/pages.py`"


def test_every_claim_that_does_not_hold_is_explained(pages: ModuleType) -> None:
    for data in pages.raw():
        for claim in data["targets"]:
            assert claim["holds"] or pages.reason(data["benchmark"], claim["what"]), claim


def test_no_committed_run_was_a_quick_one_or_had_unequal_answers(pages: ModuleType) -> None:
    for data in pages.raw():
        assert "--quick" not in data["command"], data["benchmark"]
        assert all(check["holds"] for check in data["checks"]), data["benchmark"]


def test_the_page_says_claims_failures_and_reasons(
    pages: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    told = {"benchmark": "toy", "command": "python benchmarks/toy.py", "versions": {"torch": "9"}, "rounds": 7}
    told |= {"machine": {"cpu": "abacus", "cores": 2, "threads": 1}, "left_out": ["a peer"]}
    rows = [{"case": "a", "median_seconds": 0.5, "least_seconds": 0.25, "most_seconds": 2.0, "above_bytes": 2**23}]
    targets = [
        {"what": "memory of a", "against": "b", "figure": 0.125, "most": 1 / 5, "holds": True},
        {"what": "speed of a", "against": "b", "figure": 1.25, "least": 1.5, "holds": False},
    ]
    checks = [{"what": "value", "relative_error": 3e-7, "limit": 1e-5, "holds": True}]
    raw = told | {"rows": rows, "targets": targets, "checks": checks}
    (tmp_path / "toy.json").write_text(json.dumps(raw))
    (tmp_path / "toy.py").write_text('"""Toys: how fast."""\nWHY: dict[str, str] = {"speed of a": "It is a toy."}\n')
    monkeypatch.setattr(pages, "RESULTS", tmp_path)
    monkeypatch.setattr(pages, "HERE", tmp_path)
    page = pages.page()
    assert "| memory of a | b | at most 1/5 | 1/8 | yes |" in page
    assert "| speed of a | b | at least 1.5 | 1.25 | **no** |" in page
    assert "- speed of a, against b: 1.25\n\nIt is a toy." in page
    assert "| a | 500 ms (250 ms to 2 s) | 8 MiB |" in page
    assert "largest relative error 3.0e-07" in page and "Left out: a peer." in page


def test_ratios_are_taken_within_a_round_and_cases_take_turns(harness: ModuleType) -> None:
    assert harness.ratio([2.0, 40.0, 400.0], [1.0, 10.0, 200.0]) == 2.0  # of 2, 4 and 2; the medians' ratio is 4
    order: list[str] = []
    found = harness.interleave({"a": lambda: order.append("a"), "b": lambda: order.append("b")}, rounds=2, warm=1)
    assert order == ["a", "b"] * 3 and [len(s) for s in found.values()] == [2, 2]


def test_a_different_answer_fails_the_run(harness: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import torch

    monkeypatch.setattr(sys, "argv", ["toy.py", "--out", str(tmp_path), "--rounds", "3"])
    good = harness.check("same", torch.ones(3), torch.ones(3), 1e-6)
    bad = harness.check("other", torch.tensor([1.0, 1.0]), torch.tensor([1.0, 2.0]), 1e-6)
    assert good["holds"] and not bad["holds"] and bad["relative_error"] == pytest.approx(5**-0.5)
    with pytest.raises(SystemExit, match="answers differ: other"):
        harness.write(tmp_path, "toy", [], checks=[good, bad])
    kept = json.loads((tmp_path / "toy.json").read_text())
    assert kept["command"] == "python benchmarks/toy.py --rounds 3"


def test_memory_counts_what_was_added_and_not_what_was_there(tmp_path: Path) -> None:
    # in a process of its own, as every case of a benchmark: here other tests' threads would be counted too
    (tmp_path / "case.py").write_text(f"""
import sys
sys.path.insert(0, {str(HOUSE)!r})
import harness, torch
torch.ones(2**26)  # 256 MiB, gone again
before = torch.ones(2**24)  # 64 MiB
with harness.Measured() as measured:
    torch.ones(2**24)
    torch.ones(2**22)
print(measured.above / 2**20, len(before))
""")
    said = subprocess.run([sys.executable, tmp_path / "case.py"], check=True, stdout=subprocess.PIPE, text=True).stdout
    assert 60 < float(said.split()[0]) < 75


def test_a_missing_peer_says_how_to_get_it(harness: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("SILC_PEERS", raising=False)
    with pytest.raises(harness.Missing, match=r"requirements\.txt"):
        harness.need("no_such_peer")
    for name in ("dinov2.loss", "open_clip_git/src/open_clip/loss.py"):
        with pytest.raises(harness.Missing, match="SILC_PEERS"):
            harness.need(name)
