"""A CAT-Seg head on two towers, SILC's and CLIP's, on street photographs with classes held out.

    python docs/experiments/catseg/make.py data CAMVID FOLDER          sets: training without four classes, tests
    python docs/experiments/catseg/make.py run FOLDER TOWERS SEED ...  head and scores on both towers of each seed
    python docs/experiments/catseg/make.py page FOLDER                 figures.json, README.md, overlays.png

TOWERS holds the runs of `silc study main` (OUT/runs): equal pairs of drawings, no photograph. A step that is done is
not done again.
"""

from __future__ import annotations

import json
import shutil
import statistics
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from silc import load, recipes
from silc.config import CatSegConfig, Config
from silc.eval import segment
from silc.plain import save_json
from silc.train.loop import train

HERE = Path(__file__).parent
UNSEEN = ("pavement", "car", "sign", "pedestrian")
TOWERS, SEEDS, PAIRS = ("silc", "clip"), (0, 1, 2), 49_152
SIDE, STEPS, BATCH = 128, 300, 8
FREE = ("whole-image", "maskclip")
SETS = ("all", "unseen")


# ---------------------------------------------------------------- data


def data(camvid: Path, folder: Path) -> None:
    """`seen`: CamVid's train split, pixels of held-out classes void. `all`: every second picture of its test split.
    `unseen`: the same with held-out classes alone, all other pixels void."""
    names = {int(k): v for k, v in json.loads((camvid / "classes.json").read_text()).items() if v != "unlabelled"}
    kept = {"seen": [v for v in names.values() if v not in UNSEEN], "all": list(names.values()), "unseen": list(UNSEEN)}
    for name, split in (("seen", "train"), ("all", "test"), ("unseen", "test")):
        target = folder / name
        for kind in ("images", "masks"):
            (target / kind).mkdir(parents=True, exist_ok=True)
        (target / "classes.json").write_text(json.dumps({"classes": kept[name], "void": 255}))
        table = np.full(256, 255, np.uint8)
        for value, word in names.items():
            if word in kept[name]:
                table[value] = kept[name].index(word)
        # frames follow each other closely: every second of the test split says as much
        for mask in sorted((camvid / split / "masks").iterdir())[:: 2 if split == "test" else 1]:
            Image.fromarray(table[np.asarray(Image.open(mask))]).save(target / "masks" / mask.name)
            image = next((camvid / split / "images").glob(f"{mask.stem}.*"))
            shutil.copy(image, target / "images" / image.name)


# ---------------------------------------------------------------- runs


def tower_run(towers: Path, tower: str, seed: int) -> Path:
    return towers / f"{tower}-{PAIRS}-s{seed}"


def config(folder: Path, towers: Path, tower: str, seed: int) -> Config:
    c = recipes.get("catseg")
    head = CatSegConfig(width=64, window=4, decoder=(32, 16), guides=(64, 32), guide_widths=(16, 8), classes=16)
    return replace(
        c,
        seed=seed,
        out=str(folder / f"{tower}-{seed}"),
        init=replace(c.init, model=str(tower_run(towers, tower, seed)), image_size=SIDE),
        model=replace(c.model, catseg=head),
        optim=replace(c.optim, lr=1e-3, warmup=0.05),
        data=replace(c.data, sources=(str(folder / "seen"),), workers=0),
        train=replace(c.train, batch=BATCH, samples=BATCH * STEPS, threads=1, save_every=100),
        eval=replace(c.eval, every=0),
    )


def run(folder: Path, towers: Path, seeds: list[int]) -> None:
    torch.set_num_threads(1)
    for seed in seeds:
        for tower in TOWERS:
            out = folder / f"{tower}-{seed}.json"
            if out.exists():
                continue
            started = {how: scores(tower_run(towers, tower, seed), folder, how) for how in FREE}
            trained = train(config(folder, towers, tower, seed))
            found = {"trained": scores(trained, folder, "catseg"), **started}
            out.write_text(json.dumps(found, indent=1) + "\n")


def scores(model: Path, folder: Path, how: str) -> dict[str, Any]:
    """mIoU and pixel accuracy with their chance, and IoU by class, on both test sets."""
    opened, found = load(model), {}
    for name in SETS:
        result = segment.run(opened, folder / name, segment.Config(protocol=how))
        found[name] = {"metrics": result.metrics, "chance": result.chance, "interval": result.details["interval"],
                       "iou": {row["class"]: row["iou"] for row in result.details["per_class"]}}  # fmt: skip
    return found


# ---------------------------------------------------------------- page


def page(folder: Path) -> None:
    if (folder / "silc-0.json").exists():
        runs = {f"{t}-{s}": json.loads((folder / f"{t}-{s}.json").read_text()) for t in TOWERS for s in SEEDS}
        (HERE / "figures.json").write_text(json.dumps(runs, indent=1) + "\n")
        raw = {name: (folder / name / "metrics.jsonl").read_text() for name in runs}
        for name, lines in raw.items():
            (HERE / f"{name}.jsonl").write_text(lines)
        settings = config(Path("FOLDER"), Path("TOWERS"), "silc", 0)
        save_json(HERE / "config.json", settings)
        overlays(folder)
    (HERE / "README.md").write_text(text(json.loads((HERE / "figures.json").read_text())))


def overlays(folder: Path) -> None:
    """Three test pictures: training-free, trained, and truth."""
    from silc.app.overlays import overlay_labels
    from silc.data.labelled import open_masked
    from silc.predict import Predictor

    held = open_masked(folder / "all")
    names = [group[0] for group in held.classes]
    sheets = []
    for index in (10, 55, 100):
        image = held.image(index)
        trained = Predictor(load(folder / "silc-0")).segment(image, names)
        truth = held.mask(index)
        truth[truth == held.void] = names.index("sky")
        sheets.append((overlay_labels(image, trained, names), overlay_labels(image, truth, names)))
    width, height = (max(s.size[axis] for pair in sheets for s in pair) for axis in (0, 1))
    whole = Image.new("RGB", (2 * width, 3 * height), "white")
    for row, pair in enumerate(sheets):
        for column, sheet in enumerate(pair):
            whole.paste(sheet, (column * width, row * height))
    whole.save(HERE / "overlays.png", optimize=True)


def text(runs: dict[str, Any]) -> str:
    def values(tower: str, how: str, which: str, metric: str = "miou") -> list[float]:
        return [100 * runs[f"{tower}-{s}"][how][which]["metrics"][metric] for s in SEEDS]

    def cell(numbers: list[float]) -> str:
        return f"{statistics.mean(numbers):.1f} ({', '.join(f'{n:.1f}' for n in numbers)})"

    rows = []
    for which in SETS:
        for how in ("trained", *FREE):
            cells = [cell(values(t, how, which, m)) for m in ("miou", "pixel_accuracy") for t in TOWERS]
            rows.append(f"| {which} | {how} | " + " | ".join(cells) + " |")
        chance = runs["silc-0"]["trained"][which]["chance"]
        constant = (f"{100 * chance[metric]:.1f} | " for metric in ("miou", "pixel_accuracy"))
        rows.append(f"| {which} | best constant | " + "| ".join(constant) + "|")
    lines = []
    for which in SETS:
        gains = [[a - max(values(t, how, which)[i] for how in FREE) for i, a in enumerate(values(t, "trained", which))]
                 for t in TOWERS]  # fmt: skip
        for tower, found in zip(TOWERS, gains):
            lines.append(f"- `{which}`, {tower} tower: trained minus the better training-free protocol, by seed: "
                         + ", ".join(f"{g:+.1f}" for g in found) + f"; {interval(found)}")
        found = [a - b for a, b in zip(values("silc", "trained", which), values("clip", "trained", which))]
        lines.append(f"- `{which}`: SILC tower minus CLIP tower under the same head, by seed: "
                     + ", ".join(f"{g:+.1f}" for g in found) + f"; {interval(found)}")
    held = []
    for name in runs["silc-0"]["trained"]["all"]["iou"]:
        cells = []
        for t in TOWERS:
            for how in ("trained", FREE[0]):
                found = [runs[f"{t}-{s}"][how]["all"]["iou"][name] or 0.0 for s in SEEDS]
                cells.append(f"{100 * statistics.mean(found):.1f}")
        held.append(f"| {name}{' (held out)' if name in UNSEEN else ''} | " + " | ".join(cells) + " |")
    return PAGE.format(table="\n".join(rows), lines="\n".join(lines), classes="\n".join(held), unseen=", ".join(UNSEEN),
                       side=SIDE, steps=STEPS, batch=BATCH, pairs=PAIRS)  # fmt: skip


def interval(found: list[float]) -> str:
    """Student's t of three numbers."""
    half = 4.303 * statistics.stdev(found) / len(found) ** 0.5
    mean = statistics.mean(found)
    return f"mean {mean:+.1f}, 95% interval {mean - half:+.1f} to {mean + half:+.1f}"


PAGE = (HERE / "page.md").read_text() if (HERE / "page.md").exists() else "{table}\n\n{lines}\n\n{classes}\n"


if __name__ == "__main__":
    verb, *rest = sys.argv[1:] or ["help"]
    if verb == "data":
        data(Path(rest[0]), Path(rest[1]))
    elif verb == "run":
        run(Path(rest[0]), Path(rest[1]), [int(seed) for seed in rest[2:]])
    elif verb == "page":
        page(Path(rest[0]) if rest else HERE)
    else:
        sys.exit(__doc__)
