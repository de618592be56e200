"""The runs of a study: one process a device, what is done is not done again, what was cut off goes on.

Gives: run_from, mix, run, read_records, RECORD.
Used by: the command line; study/page reads what is left here.

A cell's folder is OUT/runs/KEY: the run, log.txt, and when all is scored record.json. A cell is done when its record
was made with the very settings that the study asks for now; where only a set is new, that alone is scored.
"""

from __future__ import annotations

import hashlib
import json
import math
import multiprocessing
import os
import shutil
import signal
import sys
import threading
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from multiprocessing.connection import wait
from multiprocessing.context import SpawnProcess
from pathlib import Path
from statistics import median
from typing import Any

import torch

from silc import recipes
from silc.app.runs import duration
from silc.config import Config
from silc.data.emoji import Corpus
from silc.data.photographs import pairs
from silc.data.vectors import build
from silc.eval.metrics import Result
from silc.eval.run import evaluate, find_tasks
from silc.eval.suites import locate, open_suite
from silc.opening import load
from silc.parallel import pick_device
from silc.plain import from_dict, read_json, to_dict
from silc.plan import flops_per_sample
from silc.study.declared import Cell, Study, config_of, merged
from silc.train.guard import Halt, Stopped
from silc.train.log import cpu_name
from silc.train.loop import train
from silc.train.prepare import by_name, check_folder

RECORD = "record.json"
OPEN_VOCABULARY = "catseg/scenes"
"""The set called `segment/scenes`, scored by the trained head."""
KNOWN = "segment/known"
"""New scenes of drawings that training knows; on these, a head is trained where a study has one, after the scoring."""
WHEREABOUTS = ("recipe", "out", "init.model", "data.sources", "data.workers", "train.device", "train.threads",
               "train.save_every", "train.keep", "train.log_every")  # fmt: skip
"""Settings that do not decide what a run finds."""
TERMS = ("contrast", "distill", "masked", "loss")


@dataclass(frozen=True)
class Job:
    """A cell and where it runs: everything that its process needs."""

    study: Study
    cell: Cell
    config: Config
    evals: dict[str, str]
    masks: str
    configs: dict[str, Any] = field(default_factory=dict)
    """Settings of those evaluations that go by others than their task's own."""
    card: str = ""
    """Number of the GPU that the process sees; empty: whatever there is."""

    @property
    def folder(self) -> Path:
        return Path(self.config.out)

    @property
    def log(self) -> Path:
        """Beside the run's folder, into which it moves once all is well."""
        return self.folder.with_name(f"{self.cell.key}.txt")

    def asked(self, sets: Iterable[str]) -> str:
        """Digest of the settings that decide the scores of these sets: those that are not the defaults, so that a
        setting which is new in silc changes nothing; and not names, folders, devices."""
        mine, usual = by_name(to_dict(self.config)), by_name(to_dict(Config()))
        told = {key: value for key, value in mine.items() if key not in WHEREABOUTS and usual.get(key) != value}
        head = self.study.head_of(self.cell)
        return hashlib.sha256(json.dumps([told, head, sorted(sets)], sort_keys=True).encode()).hexdigest()[:16]

    @property
    def done(self) -> bool:
        return self.evals.keys() <= self.kept.keys()

    @property
    def kept(self) -> dict[str, Any]:
        """Scores of its record, where that was made with the settings that are asked for now."""
        if not (self.folder / RECORD).exists():
            return {}
        record = read_json(self.folder / RECORD)
        scores: dict[str, Any] = record["scores"]
        return scores if record["asked"] == self.asked(scores.keys() - {OPEN_VOCABULARY}) else {}


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
    whole = sum(_cost(job) for job in jobs)
    try:
        while waiting or under_way:
            while waiting and slots:
                job = replace(waiting.pop(0), card=slots.pop())
                process = multiprocessing.get_context("spawn").Process(target=_work, args=(job,))
                process.start()
                under_way[process] = (job, time.monotonic())
            ready = wait([process.sentinel for process in under_way])
            for process in [p for p in under_way if p.sentinel in ready]:
                process.join()
                job, since = under_way.pop(process)
                slots.append(job.card)
                finished += _cost(job)
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


def _cost(job: Job) -> float:
    return flops_per_sample(job.config).total * job.config.train.samples


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


# ---------------------------------------------------------------- one cell, in a process of its own


def _work(job: Job) -> None:
    threading.Thread(target=_end_with_the_study, daemon=True).start()
    if job.card:  # before CUDA starts in this process
        os.environ["CUDA_VISIBLE_DEVICES"] = job.card
    job.folder.parent.mkdir(parents=True, exist_ok=True)
    with job.log.open("a") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
        try:
            record = _one(job)
        except (ValueError, Halt, Stopped, OSError) as error:
            print(f"silc: {error}", flush=True)
            sys.exit(1)
    part = job.folder / f".{RECORD}"
    part.write_text(json.dumps(record, indent=1) + "\n")
    os.replace(part, job.folder / RECORD)
    job.log.replace(job.folder / "log.txt")
    shutil.rmtree(job.folder / "checkpoints", ignore_errors=True)


def _end_with_the_study() -> None:
    """A run whose study was killed saves and ends too: a second one in its folder would be one too many."""
    study = multiprocessing.parent_process()
    if study is not None:
        wait([study.sentinel])
        os.kill(os.getpid(), signal.SIGTERM)


def _one(job: Job) -> dict[str, Any]:
    """Train, score, train a head where the study has one, and tell."""
    check_folder(job.folder, job.config)
    if not (job.folder / "export").exists():  # a run that ended needs only what was not asked for then
        train(job.config)
    device, scores = pick_device(job.config.train.device), job.kept
    missing = {name: folder for name, folder in job.evals.items() if name not in scores}
    configs = {name: config for name, config in job.configs.items() if name in missing}
    found = evaluate(load(str(job.folder)).to(device), missing, configs=configs)
    if job.study.head_of(job.cell) and OPEN_VOCABULARY not in scores:
        found[OPEN_VOCABULARY] = _with_head(job)
    scores |= {name: _plain(result) for name, result in found.items()}
    config = from_dict(Config, read_json(job.folder / "config.json"))
    cost = flops_per_sample(config)
    return {
        "study": job.study.name, "arm": job.cell.arm, "samples": job.cell.samples, "seed": job.cell.seed,
        "asked": job.asked(job.evals), "flops_per_pair": cost.total,
        "flops": cost.total * config.steps * config.train.batch, "ema_momentum": config.ema_momentum,
        **_watched(job.folder, config),
        "scores": {name: scores[name] for name in (*job.evals, OPEN_VOCABULARY) if name in scores},
        "machine": {"device": torch.cuda.get_device_name() if device.type == "cuda" else cpu_name(),
                    "threads": torch.get_num_threads(), "torch": str(torch.__version__)},
    }  # fmt: skip


def _plain(result: Result) -> dict[str, dict[str, Any]]:
    intervals = result.details.get("interval", {})
    return {metric: {"value": round(value, 6), "chance": _rounded(result.chance.get(metric)),
                     "interval": [round(end, 6) for end in intervals[metric]] if intervals.get(metric) else None}
            for metric, value in result.metrics.items()}  # fmt: skip


def _rounded(value: float | None) -> float | None:
    return None if value is None else round(value, 6)


def _with_head(job: Job) -> Result:
    """A CAT-Seg head on the trained towers, and its score on the pictures with masks."""
    folder = job.folder / "head"
    own = {"seed": job.cell.seed, "out": str(folder), "init": {"model": str(job.folder)},
           "data": {"sources": [job.masks], "workers": 0},
           "train": {"device": job.config.train.device, "threads": job.config.train.threads}}  # fmt: skip
    trained = train(from_dict(Config, merged(to_dict(recipes.get("catseg")), job.study.head, own)))
    model = load(str(trained)).to(pick_device(job.config.train.device))
    shutil.rmtree(folder / "checkpoints", ignore_errors=True)
    return evaluate(model, {"segment/scenes": job.evals["segment/scenes"]})["segment/scenes"]


def _watched(folder: Path, config: Config) -> dict[str, Any]:
    """What the log tells: speed, the terms at the end, and whether the teacher was well."""
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    steps = [row for row in rows if row["kind"] == "train"]
    rates = [row["images_per_s"] for row in steps[1:] or steps]
    ends = {term: round(steps[-1][term], 5) for term in TERMS if term in steps[-1]}
    # the first tenth warms up: learning rate, centre and prototypes settle
    settled = [row for row in steps if "teacher_entropy" in row and row["step"] > 0.1 * config.steps]
    health = {}
    if settled:
        most = math.log(config.objective.prototypes.count)
        health = {"entropy": [round(row["teacher_entropy"] / most, 4) for row in settled],
                  "prototype_use": [round(row["prototype_use"], 4) for row in settled]}  # fmt: skip
    rate = median(rates)
    return {"images_per_s": round(rate, 1), "seconds": round(config.steps * config.train.batch / rate, 1),
            "terms": ends, "health": health}  # fmt: skip
