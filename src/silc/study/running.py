"""The runs of a study: one process a device, what is done is not done again, what was cut off goes on.

Gives: run_from, mix, run, read_records.
Used by: the command line; study/page reads what is left here. What one run does is in study/cells.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from multiprocessing.connection import wait
from multiprocessing.context import SpawnProcess
from pathlib import Path
from typing import Any

import torch

from silc.app.runs import duration
from silc.data.emoji import Corpus
from silc.data.photographs import pairs
from silc.data.vectors import build
from silc.eval.run import find_tasks
from silc.eval.suites import locate, open_suite
from silc.plain import read_json
from silc.study.cells import KNOWN, RECORD, Job, work
from silc.study.declared import Study, config_of
from silc.train.guard import Halt


@dataclass(frozen=True)
class Mixed:
    """Photographs of a study: pairs for training, and the sets of the suite `photographs`, which are scored."""

    table: Path
    evals: dict[str, str]
    configs: dict[str, Any]


def run_from(
    study: Study, drawings: Path, out: Path, processes: int, start: str = "", only: Sequence[str] = (),
    photographs: Path | None = None,
) -> None:  # fmt: skip
    """Build the corpus, unless OUT/corpus holds it, and `run`."""
    if processes < 1:
        raise ValueError(f"--processes {processes}: at least one run at a time.")
    if bool(study.photographs) != (photographs is not None):
        way = "photographs: name their folder, --photographs" if study.photographs else "none: drop --photographs"
        raise ValueError(f"study {study.name} takes {way}.")
    mixed = mix(photographs, out) if photographs is not None else None
    c = study.corpus
    corpus = build(drawings, out / "corpus", c.seed, c.scenes, c.size, c.limit, c.styles, processes=processes)
    run(study, corpus, out, processes, start, only, mixed)


def mix(root: Path, out: Path) -> Mixed:
    """Pairs from the training halves of the suite's classified photographs, those left out that look like one in its
    sets; how many, in OUT/photographs.json. ValueError for a folder that holds none."""
    sets, configs, _ = locate(open_suite("photographs", find_tasks()), root)
    train = [place / "train" for name, place in sets.items() if name.startswith("zeroshot/")]
    table, counts = pairs(train, list(sets.values()), out)
    (out / "photographs.json").write_text(json.dumps(counts, indent=1) + "\n")
    print("{photographs:,} photographs for training; {near_duplicates_left_out} left out that look like one of the "
          "{compared_with:,} for evaluation".format(**counts), flush=True)  # fmt: skip
    return Mixed(table, {name: str(place) for name, place in sets.items()}, configs)


def run(
    study: Study, corpus: Corpus, out: Path, processes: int, start: str = "", only: Sequence[str] = (),
    mixed: Mixed | None = None,
) -> None:  # fmt: skip
    """Run every cell that is not done (of the arms in `only`, where given), `processes` at a time.

    ValueError for settings that cannot work, before anything runs; Halt, after the others are done, when cells failed.
    """
    jobs = [job for job in _jobs(study, corpus, out, start, only, processes, mixed) if not job.done]
    print(f"study {study.name}: {len(study.cells())} runs, {len(jobs)} to do, {processes} at a time", flush=True)
    slots = _slots(processes)
    under_way: dict[SpawnProcess, tuple[Job, float]] = {}
    waiting, failed, began, finished = list(jobs), [], time.monotonic(), 0.0
    costs = {job.cell: job.cost for job in jobs}  # as of now: a run that has trained costs less
    whole = sum(costs.values())
    try:
        while waiting or under_way:
            while waiting and slots:
                job = replace(waiting.pop(0), card=slots.pop())
                process = multiprocessing.get_context("spawn").Process(target=work, args=(job,))
                process.start()
                under_way[process] = (job, time.monotonic())
            ready = wait([process.sentinel for process in under_way])
            for process in [p for p in under_way if p.sentinel in ready]:
                process.join()
                job, since = under_way.pop(process)
                slots.append(job.card)
                finished += costs[job.cell]
                failed += [job] if process.exitcode else []
                spent = time.monotonic() - began
                left = duration(spent / finished * (whole - finished)) if finished < whole else "done"
                said = f"failed, see {job.log}" if process.exitcode else _told(study, job)
                took = duration(time.monotonic() - since)
                print(f"{job.cell.key}: {said}  ({took}; {len(waiting)} waiting, ETA {left})", flush=True)
    finally:
        for process in under_way:  # they save and end on SIGTERM
            process.terminate()
        for process in under_way:
            process.join()
    if failed:
        raise Halt(f"{len(failed)} of {len(jobs)} runs failed: {', '.join(job.cell.key for job in failed[:5])}. "
                   f"{failed[0].log} says why; the same command runs them again.")  # fmt: skip


def read_records(out: Path) -> list[dict[str, Any]]:
    """The records of a study's folder, or those of a file that keeps one a line. ValueError where there are none."""
    if out.is_file():
        found = [json.loads(line) for line in out.read_text().splitlines()]
    else:
        found = [read_json(path) for path in sorted((out / "runs").glob(f"*/{RECORD}"))]
    if not found:
        raise ValueError(f"{out} holds no finished run of a study.")
    return found


def _jobs(
    study: Study, corpus: Corpus, out: Path, start: str, only: Sequence[str], processes: int, mixed: Mixed | None
) -> list[Job]:
    if study.begins != bool(start):
        way = "a trained model: name it, --start MODEL" if study.begins else "nothing: drop --start"
        raise ValueError(f"study {study.name} begins from {way}.")
    if unknown := [arm for arm in only if arm not in study.arms]:
        raise ValueError(f"study {study.name} has no arm {unknown[0]!r}; it has {', '.join(study.arms)}.")
    other = "segment/scenes" if study.tuning else "segment/tuning"
    evals = {n: str(folder) for n, folder in corpus.evals.items() if n != other and not n.startswith("masks")}
    masks = str(corpus.evals["masks/train"]) if "masks/train" in corpus.evals else ""
    if masks and not study.tuning:
        evals[KNOWN] = masks
    evals |= mixed.evals if mixed else {}
    jobs = []
    for cell in study.cells():
        if only and cell.arm not in only:
            continue
        config = config_of(study, cell, corpus, out / "runs" / cell.key, start, mixed.table if mixed else None)
        threads = config.train.threads or max(1, _cores() // processes)
        config = replace(config, train=replace(config.train, threads=threads))
        jobs.append(Job(study, cell, config, evals, masks, mixed.configs if mixed else {}))
    return jobs


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _slots(processes: int) -> list[str]:
    """One a process: the number of its GPU, where there are some."""
    cards = torch.cuda.device_count()
    return [str(i % cards) if cards else "" for i in range(processes)]


def _told(study: Study, job: Job) -> str:
    scores = read_json(job.folder / RECORD)["scores"]
    told = []
    for name in study.scores:
        which, _, metric = name.rpartition(" ")
        if value := scores.get(which, {}).get(metric):
            told.append(f"{which} {metric} {100 * value['value']:.1f}")
    return "  ".join(told)
