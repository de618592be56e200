"""Segmentation by other read-outs: the towers of `silc study main` as they are, patches read in four ways.

    python docs/experiments/main/readouts.py OUT [ARM ...]     OUT is the study's folder; writes readouts.jsonl

Protocol whole-image on segment/scenes but for the read-out (`ImageTower.dense` says what each is).
"""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from pathlib import Path
from unittest.mock import patch

import torch

from silc import load
from silc.eval import segment
from silc.eval.protocols import protocol
from silc.study.running import read_records

HERE = Path(__file__).parent
WAYS = ("tokens", "value", "sclip", "clearclip")


def main(out: Path, arms: list[str]) -> None:
    torch.set_num_threads(1)
    scenes = next((out / "corpus").glob("*/segment-scenes"))
    lines = []
    for record in read_records(out):
        if arms and record["arm"] not in arms:
            continue
        key = f"{record['arm']}-{record['samples']}-s{record['seed']}"
        model, found = load(out / "runs" / key), {}
        for way in WAYS:
            how = replace(protocol("whole-image"), readout=way)  # type: ignore[arg-type]
            with patch.object(segment, "protocol", lambda *_, how=how: how):
                found[way] = {k: round(v, 6) for k, v in segment.run(model, scenes, segment.Config()).metrics.items()}
        lines.append({**{k: record[k] for k in ("arm", "samples", "seed")}, "readouts": found})
        print(key, found, flush=True)
    (HERE / "readouts.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2:]) if len(sys.argv) > 1 else sys.exit(__doc__)
