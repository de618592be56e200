"""One run of a study, in a process of its own: train, score, train a head where the study has one, and tell.

Gives: Job, work, RECORD, KNOWN.
Used by: study/running.

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
from collections.abc import Iterable
from dataclasses import dataclass, field
from multiprocessing.connection import wait
from pathlib import Path
from statistics import median
from typing import Any

import torch

from silc import recipes
from silc.config import Config
from silc.eval.metrics import Result
from silc.eval.run import evaluate
from silc.opening import load
from silc.parallel import pick_device
from silc.plain import from_dict, read_json, to_dict
from silc.plan import flops_per_sample
from silc.study.declared import Cell, Study, merged
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
SCORING = 10_000
"""What scoring takes, as so many pairs of training: for the ETA."""
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

    @property
    def trained(self) -> bool:
        return (self.folder / "export").exists()

    @property
    def cost(self) -> float:
        """Roughly what is left to do, in FLOPs of training."""
        return flops_per_sample(self.config).total * (SCORING + (0 if self.trained else self.config.train.samples))


def work(job: Job) -> None:
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
    if not job.trained:  # a run that ended needs only what was not asked for then
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
