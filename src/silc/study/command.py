"""What `silc study NAME` is asked, and what it does then.

Gives: Asked.
Used by: the command line.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from silc.study import declared
from silc.study.page import summary, write
from silc.study.running import read_records, run_from


@dataclass(frozen=True)
class Asked:
    """Run what is not done, then write study.html, results.md, plots, records.jsonl and scores.parquet."""

    out: Path
    """Folder of the study: its corpus, its runs and what is made of them."""
    drawings: Path | None = None
    """File of named drawings, from which the corpus is built (docs/experiments/drawings.py makes it)."""
    photographs: Path | None = None
    """Folder of the sets of the suite `photographs` (caltech101, camvid, coco128), for studies that mix them in."""
    records: Path | None = None
    """Instead of running: the records.jsonl, or the folder, of a study that ran."""
    processes: int = 1
    """Runs at a time; they take turns on the GPUs, or share the CPU's cores."""
    only: tuple[str, ...] = ()
    """Arms to run now; the others stay for later."""
    start: str = ""
    """Model from which a study of continued training begins; anything that silc.load opens."""

    def answer(self, name: str) -> None:
        """ValueError for a study that is none and options that do not go together."""
        study = declared.get(name)
        if (self.drawings is None) == (self.records is None):
            raise ValueError("give --drawings FILE to run the study, or --records FILE to show one that ran.")
        if self.drawings is not None:
            run_from(study, self.drawings, self.out, self.processes, self.start, self.only, self.photographs)
        found = read_records(self.records or self.out)
        page = write(study, found, self.out)
        print(f"{summary(found)}; wrote {page}")
