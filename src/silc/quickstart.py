"""The embedded main job: a small real corpus, a SILC run on any CPU, five evaluations, and a report with pictures.

Gives: quickstart.
Used by: cli.py. It takes the same ways as a user's own run: shards in, labelled folders in, report out.
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from silc import plan, recipes
from silc.app import grids, report
from silc.app.report import Section
from silc.app.results import save
from silc.app.runs import duration, read_run
from silc.config import Config, Term
from silc.data.emoji import Corpus, build
from silc.data.images import normalise, preprocess
from silc.data.labelled import Masked, open_masked
from silc.eval.metrics import Result
from silc.eval.run import evaluate, fingerprint, table
from silc.model.silc import Silc
from silc.opening import load
from silc.train.loop import train

QUERIES, SCENES = 8, 6
LABELS = {
    "retrieval/concepts": "Held-out concepts",
    "zeroshot/concepts": "Held-out concepts",
    "retrieval/style": "Held-out drawing style",
    "zeroshot/style": "Held-out drawing style",
    "segment/scenes": "Held-out scenes",
}
SUMMARY = "Trained from nothing, on scenes composed of emoji with captions that name what is in them."


def quickstart(
    out: Path = Path("quickstart"),
    compare: bool = False,
    steps: int = 0,
    scenes: int = 24_000,
    cache: Path | None = None,
    threads: int = 0,
    seed: int = 0,
) -> None:
    """Build a small real corpus, train SILC on it on any CPU, evaluate, and write a report with pictures.

    Args:
        out: Folder for the runs and report.html. Interrupted, the same command goes on where it was.
        compare: Also train CLIP (the same recipe without distillation) on the same samples, and show both.
        steps: Training steps; 0 takes the recipe's, sized for ten minutes on two cores.
        scenes: Training scenes to compose.
        cache: Where the corpus is kept between runs; default ~/.cache/silc, or SILC_CACHE.
        threads: CPU threads; 0 leaves it to PyTorch.
        seed: Of the corpus, the weights and the order.
    """
    phases: list[tuple[str, float]] = []
    cache = cache or Path(os.environ.get("SILC_CACHE") or Path.home() / ".cache" / "silc")
    with phase(phases, "Corpus: render emoji, compose scenes, write evaluation sets"):
        corpus = build(cache, seed=seed, scenes=scenes, say=say)
    config = configure(corpus, steps, threads, seed)
    plans = {"SILC": config, "CLIP": as_clip(config)} if compare else {"SILC": config}
    runs: dict[str, Path] = {}
    for name, one in plans.items():
        with phase(phases, f"Train {name}: {one.steps} steps of {one.train.batch} pairs"):
            runs[name] = train(replace(one, out=str(out / name.lower())))
    results: dict[str, dict[str, Result]] = {}
    with phase(phases, "Evaluate: retrieval, classification, segmentation"):
        for name, folder in runs.items():
            model = load(folder)
            results[name] = evaluate(model, corpus.evals, folder / "eval" / "pictures")
            about = {"model": str(folder), "recipe": plans[name].recipe, "sha256": fingerprint(model)}
            save(results[name], folder / "eval", about)
            print(f"\n{name}\n\n" + table(results[name]))
    with phase(phases, "Report: plots, retrieved pictures, patch-text maps"):
        sections = [cost_section(plans, runs)] if compare else []
        for name, folder in runs.items():
            sections += [
                retrieval_section(name, results[name], folder),
                maps_section(name, corpus, load(folder), folder),
            ]
        facts = [("Training scenes", f"{scenes:,}"), ("Corpus", str(corpus.folder))]
        title = "SILC and CLIP on composed scenes" if compare else "SILC on composed scenes"
        # drawn twice so that the page can tell the time of its own drawing
        page = report.build(runs, out, sections, phases, title, facts, LABELS, SUMMARY)
    page = report.build(runs, out, sections, phases, title, facts, LABELS, SUMMARY)
    for label, seconds in phases:
        say(f"{duration(seconds):>8}  {label}")
    say(f"\nreport:  {page}\nmodel:   {runs['SILC'] / 'export'}   (try: silc heatmap {runs['SILC']} PICTURE -t WORDS)")


def say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


@contextmanager
def phase(phases: list[tuple[str, float]], name: str) -> Iterator[None]:
    say(f"\n== {name}")
    began = time.monotonic()
    yield
    phases.append((name, time.monotonic() - began))


def configure(corpus: Corpus, steps: int, threads: int, seed: int) -> Config:
    c = recipes.quickstart()
    run = replace(c.train, threads=threads)
    if steps:
        run = replace(run, samples=steps * run.batch)
    every = max(1, replace(c, train=run).steps // 4)
    sets = {name: str(folder) for name, folder in corpus.evals.items()}
    data = replace(c.data, sources=(corpus.shards,))
    return replace(c, seed=seed, data=data, train=run, eval=replace(c.eval, sets=sets, every=every))


def as_clip(config: Config) -> Config:
    """The same run without distillation and without the views that only distillation reads."""
    objective = replace(config.objective, distill=Term(0.0))
    return replace(config, recipe="quickstart-clip", objective=objective, views=replace(config.views, locals=0))


def cost_section(plans: dict[str, Config], runs: dict[str, Path]) -> Section:
    """What each run paid: equal samples are not equal compute, so both stand side by side."""
    rows = []
    for name, config in plans.items():
        per_pair, run = plan.flops_per_sample(config).total, read_run(name, runs[name])
        pairs = config.steps * config.train.batch
        rows.append(
            (
                name,
                f"{pairs:,}",
                f"{per_pair / 1e6:.0f}",
                f"{pairs * per_pair / 1e12:.1f}",
                duration(run.seconds),
            )
        )
    text = (
        "Equal samples are not equal compute: SILC also pays for local views and prototypes. "
        "FLOPs are counted from shapes."
    )
    return Section("Cost", text, table=(("Run", "Pairs seen", "MFLOP a pair", "TFLOP in all", "Training time"), rows))


def retrieval_section(name: str, results: dict[str, Result], folder: Path) -> Section:
    """What the model finds for names of held-out drawings."""
    found = results["retrieval/style"].details["neighbours"]["text_to_image"]
    chosen = found[:: max(1, len(found) // QUERIES)][:QUERIES]
    rows = [[(_rgb(hit["path"]), hit["right"], hit["cosine"]) for hit in query["found"]] for query in chosen]
    path = grids.retrieval_grid([query["text"] for query in chosen], rows, folder / "eval" / "retrieved.png")
    text = (
        "Each name, and the five drawings nearest to it among all of the held-out style. "
        "Queries are evenly spaced, not picked."
    )
    return Section(
        f"{name}: retrieved drawings", text, [(path, "A tick marks the right drawing; numbers are cosines.")]
    )


def maps_section(name: str, corpus: Corpus, model: Silc, folder: Path) -> Section:
    """Patch-text maps of held-out scenes beside the true masks."""
    data = open_masked(corpus.evals["segment/scenes"])
    spaced = [i * len(data) // SCENES for i in range(SCENES)]
    path = grids.map_grid([map_row(model, data, i) for i in spaced], folder / "eval" / "maps.png")
    text = (
        "Held-out scenes: cosine of each patch with the name of each object in the scene; then the prediction over all "
        f"{len(data.classes)} class names, and the true mask. No mask was seen in training. "
        "Scenes are evenly spaced, not picked."
    )
    return Section(f"{name}: patch-text maps", text, [(path, "Maps of one scene share a colour scale.")])


def map_row(model: Silc, data: Masked, index: int) -> grids.MapRow:
    import torch

    names = [group[0] for group in data.classes]
    image, truth, p = data.image(index), data.mask(index), model.config.preprocess
    side = 2 * p.size
    pixels = normalise(preprocess(image, replace(p, size=side))[None], p.mean, p.std)
    with torch.inference_mode():
        maps = model.patch_text_map(pixels, names)[0]
    present = [c for c in truth.unique().tolist() if c < len(names)]
    grown = torch.nn.functional.interpolate(maps[None], truth.shape[-2:], mode="bilinear")[0]
    prediction = torch.where(truth == (data.void if data.void is not None else -1), truth, grown.argmax(0))
    shown: list[tuple[str, Any]] = [(names[c], maps[c].numpy()) for c in present]
    row = {"image": image.numpy(), "maps": shown, "truth": truth.numpy(), "prediction": prediction.numpy()}
    return grids.MapRow(**row, names=names, palette=data.palette)  # type: ignore[typeddict-item]


def _rgb(path: str) -> np.ndarray:
    return np.asarray(Image.open(path).convert("RGB"))
