"""What a study found, for people: tables, plots, one HTML page, the same as Markdown, and the scores as Parquet.

Gives: write (all of it), summary.
Used by: the command line. Everything here is made from the records alone, so that it can be made again from raw files.
"""

from __future__ import annotations

import base64
import json
from collections.abc import Sequence
from pathlib import Path

from silc.app import plots
from silc.app.pages import template
from silc.app.runs import duration
from silc.study.analysis import Row, rows, series
from silc.study.declared import Study
from silc.study.pictures import health_plot, plot
from silc.study.tables import Records, markdown, tables


def write(study: Study, records: Records, out: Path) -> Path:
    """records.jsonl, scores.parquet, a PNG a score (and its twin for dark pages), results.md, study.html.

    ValueError where matplotlib is missing, or where a record belongs to an arm that the study has not."""
    known = [r for r in records if r["arm"] in study.arms]
    if not known:
        raise ValueError(f"none of the {len(records)} records is of an arm of the study {study.name}.")
    ordered = sorted(known, key=lambda r: (list(study.arms).index(r["arm"]), r["samples"], r["seed"]))
    out.mkdir(parents=True, exist_ok=True)
    (out / "records.jsonl").write_text("".join(json.dumps(r) + "\n" for r in ordered))
    found = rows(ordered)
    _parquet(found, out / "scores.parquet")
    pictures = [plot(study, found, score, out) for score in study.scores if series(found, score)]
    if (health := health_plot(study, ordered, out)) is not None:
        pictures.append(health)
    made = tables(study, ordered)
    (out / "results.md").write_text(markdown(made))
    shown = [{"light": _inline(path), "dark": _inline(plots.dark_twin(path)), "alt": path.stem} for path in pictures]
    html = template("study.html").render(study=study, tables=made, pictures=shown, runs=len(ordered))
    (out / "study.html").write_text(html, encoding="utf-8")
    return out / "study.html"


def summary(records: Records) -> str:
    """One line for the terminal."""
    seconds = sum(r["seconds"] for r in records)
    return f"{len(records)} runs, {duration(seconds)} of training in all"


def _parquet(found: Sequence[Row], path: Path) -> None:
    """Skipped, and said, without pyarrow: the records hold the same."""
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError:
        print('no scores.parquet: pip install "silc[parquet]"')
        return
    columns = {name: [getattr(row, name) for row in found] for name in Row._fields}
    pyarrow.parquet.write_table(pyarrow.table(columns), path)


def _inline(path: Path) -> str:
    return "data:image/png;base64," + base64.b64encode(path.read_bytes()).decode()
