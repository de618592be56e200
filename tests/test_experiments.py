"""The pages of the studies are what their raw files say: text, tables, scores.parquet.

Gives: figures and tables held to records.jsonl.
Used by: pytest.
"""

from __future__ import annotations

import importlib.util
import json
import re
from pathlib import Path
from types import ModuleType

import pytest

from silc.study import declared
from silc.study.running import read_records

HOUSE = Path(__file__).parents[1] / "docs" / "experiments"
KEPT = [name for name in declared.names() if (HOUSE / name / "records.jsonl").exists()]


@pytest.fixture
def studies(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(HOUSE)
    import studies

    return studies


@pytest.mark.parametrize("name", KEPT)
def test_the_page_is_what_the_raw_files_say(name: str, studies: ModuleType) -> None:
    told = (HOUSE / name / "README.md").read_text()
    assert told == studies.page(name, HOUSE / name), f"run `python docs/experiments/studies.py {name}`"
    assert "{{" not in told
    for picture in re.findall(r"!\[.*?\]\((.*?)\)", told):
        assert (HOUSE / name / picture).stat().st_size > 1000


@pytest.mark.parametrize("name", KEPT)
def test_the_scores_as_parquet_are_those_of_the_records(name: str) -> None:
    parquet = pytest.importorskip("pyarrow.parquet", reason="pyarrow is not installed: pip install 'silc[parquet]'")
    kept = parquet.read_table(HOUSE / name / "scores.parquet").to_pylist()
    records = read_records(HOUSE / name / "records.jsonl")
    values = {(r["arm"], r["samples"], r["seed"], n, m): one["value"]
              for r in records for n, scores in r["scores"].items() for m, one in scores.items()}  # fmt: skip
    assert {(k["arm"], k["samples"], k["seed"], k["set"], k["metric"]): k["value"] for k in kept} == values


@pytest.mark.parametrize("name", KEPT)
def test_every_record_is_of_a_cell_that_the_study_declares(name: str) -> None:
    cells = {(cell.arm, cell.samples, cell.seed) for cell in declared.get(name).cells()}
    found = [(r["arm"], r["samples"], r["seed"]) for r in read_records(HOUSE / name / "records.jsonl")]
    assert len(set(found)) == len(found) and set(found) <= cells


def test_the_catseg_page_is_what_its_figures_say() -> None:
    spec = importlib.util.spec_from_file_location("catseg_make", HOUSE / "catseg" / "make.py")
    assert spec is not None and spec.loader is not None
    make = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(make)
    figures = json.loads((HOUSE / "catseg" / "figures.json").read_text())
    assert (HOUSE / "catseg" / "README.md").read_text() == make.text(figures)
