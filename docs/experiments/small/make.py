"""Trains the model that silc comes with, scores it, and writes it to src/silc/small with its model card.

    python docs/experiments/small/make.py DRAWINGS.jsonl.xz PHOTOGRAPHS FOLDER [SAMPLES]
    python docs/experiments/small/make.py page          README.md from figures.json

DRAWINGS is the file that docs/experiments/drawings.py makes. PHOTOGRAPHS holds `caltech101` (train and test as class
folders) and, to be looked at alone, `camvid` and `coco128`. Trained on composed scenes of drawings and on Caltech's
training half, whose captions are its class names. Goes on where it was cut off.
"""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path

from silc import load
from silc.app.evaluation import evaluate
from silc.app.exporting import export
from silc.config import Config
from silc.data.emoji import Corpus
from silc.data.photographs import pairs
from silc.data.vectors import build
from silc.plain import from_dict, read_json
from silc.study.declared import MEAN, ONE, TINY, merged
from silc.train.loop import train

HERE = Path(__file__).parent
TARGET = HERE.parents[2] / "src" / "silc" / "small"
SHARE = 0.25
"""Of the pairs, photographs."""
WHAT = """## What it is

A toy that lets the commands work right after the installation: it knows drawings of everyday things, and the
hundred classes of Caltech-101, at 64 px, badly. Do not build on it. Trained on {scenes:,} composed scenes of
drawings ({names:,} names; OpenMoji, CC-BY-SA-4.0; Twemoji, Noto, Fluent and icon sets under CC-BY-4.0,
Apache-2.0, MIT and others; Open Clip Art, public domain), and for {share:.0f}% of the pairs on {photographs:,}
photographs of Caltech-101's training half (CC-BY-4.0), from which {near_duplicates_left_out} were left out
because they look like one of the {compared_with:,} photographs that it is scored on. Classes of Caltech-101 are
therefore known to it; its score there is not zero-shot in the strict sense. The captions of photographs are
class names alone.
"""


def config(corpus: Corpus, table: Path, out: Path, samples: int) -> Config:
    """silc with one global view and mean pooling, which at this size reads patches better than attention pooling."""
    from silc import recipes
    from silc.plain import to_dict

    own = {
        "out": str(out), "recipe": "small",
        "data": {"sources": [corpus.shards, str(table)], "weights": [1 - SHARE, SHARE]},
        "train": {"samples": samples, "threads": 1, "log_every": 20},
    }  # fmt: skip
    change = {"model": MEAN, "views": ONE, "objective": {"distill": {"weight": 0.5, "start": 0.3}}}
    return from_dict(Config, merged(to_dict(recipes.get("silc")), TINY, change, own))


def main(drawings: Path, root: Path, folder: Path, samples: int) -> None:
    corpus = build(drawings, folder / "corpus", scenes=16_000, size=80, styles=4)
    sets = [root / name for name in ("caltech101/test", "camvid/test", "coco128")]
    table, counts = pairs([root / "caltech101" / "train"], sets, folder)
    run = train(config(corpus, table, folder / "run", samples))
    sets = {name: str(place) for name, place in corpus.evals.items() if name.split("/")[0] not in ("masks",)}
    sets.pop("segment/tuning")
    sets |= {"zeroshot/caltech101": str(root / "caltech101"), "segment/coco128": str(root / "coco128"),
             "retrieval/coco128": str(root / "coco128"), "segment/camvid": str(root / "camvid")}  # fmt: skip
    results, _ = evaluate(str(run), sets, out=folder / "scores", device="cpu")
    shutil.rmtree(TARGET, ignore_errors=True)
    export(str(run), "safetensors", TARGET, scores=folder / "scores", licence="other")
    about = {key: value for key, value in read_json(corpus.folder / "corpus.json").items() if key != "files"}
    found = {name: {m: [v, r.chance.get(m)] for m, v in r.metrics.items()} for name, r in results.items()}
    card = TARGET / "README.md"
    card.write_text(card.read_text().replace("## Training\n", WHAT.format(**counts, scenes=about["counts"]["scenes"],
        names=about["counts"]["names_trained_on"], share=100 * SHARE) + "\n## Training\n"))  # fmt: skip
    facts = {"corpus": about, "photographs": counts, "scores": found, "samples": samples}
    (HERE / "figures.json").write_text(json.dumps(facts, indent=1) + "\n")
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    keys = ("kind", "step", "loss", "contrast", "distill", "teacher_entropy", "images_per_s", "seconds")
    kept = [{k: row[k] for k in keys if k in row} for row in rows]
    (HERE / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in kept))
    print(f"wrote {TARGET}: {sum(p.numel() for p in load(TARGET).parameters()):,} parameters")


def page() -> str:
    f = read_json(HERE / "figures.json")
    corpus, photos = f["corpus"], f["photographs"]
    rows = [f"| {name} | {metric} | {100 * value:.1f} | {'' if chance is None else f'{100 * chance:.1f}'} |"
            for name, metrics in f["scores"].items() for metric, (value, chance) in metrics.items()]  # fmt: skip
    return (HERE / "page.md").read_text().format(
        samples=f["samples"], scenes=corpus["counts"]["scenes"], names=corpus["counts"]["names_trained_on"],
        drawings=corpus["rendered"], left=corpus["near_duplicates_left_out"], share=100 * SHARE, rows="\n".join(rows),
        bytes=(TARGET / "model.safetensors").stat().st_size / 1e6, photographs=photos["photographs"],
        licences=", ".join(f"{n:,} {name}" for name, n in sorted(corpus["licences"].items(), key=lambda x: -x[1])),
        near=photos["near_duplicates_left_out"], compared=photos["compared_with"],
    )  # fmt: skip


if __name__ == "__main__":
    if sys.argv[1:] == ["page"]:
        (HERE / "README.md").write_text(page())
        sys.exit()
    if len(sys.argv) < 4:
        sys.exit(__doc__)
    main(*(Path(word) for word in sys.argv[1:4]), int(sys.argv[4]) if len(sys.argv) > 4 else 600_000)
