"""Between two models of the same architecture: weights on the line from one to the other (WiSE-FT, arXiv 2109.01903).

Gives: mix (one model), sweep (models along the line, scored, with a plot), plot.
Used by: the command line, after continued training that gained one thing and lost another.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from silc.app import plots
from silc.app.evaluation import evaluate_model
from silc.app.runs import metric_name
from silc.data.tokenizer import Tokenizer
from silc.eval.metrics import Result
from silc.model.silc import Silc
from silc.opening import Opened, open_model


@dataclass(frozen=True)
class Ends:
    """Two models between which one can go: alpha 0 is `base`, 1 is `tuned`."""

    base: Opened
    tuned: Opened


def open_ends(base: str, tuned: str) -> Ends:
    """Open both. ValueError names the first tensor that does not fit."""
    one, other = open_model(base), open_model(tuned)
    ours, theirs = (opened.model.state_dict() for opened in (one, other))
    for name in sorted(ours.keys() | theirs.keys()):
        shapes = [list(state[name].shape) if name in state else "missing" for state in (ours, theirs)]
        if shapes[0] != shapes[1]:
            raise ValueError(
                f"{base} and {tuned} are not of one architecture: {name} is {shapes[0]} and {shapes[1]}. "
                "Interpolate between a model and what was trained from it."
            )
    return Ends(one, other)


def mix(ends: Ends, alpha: float) -> Silc:
    """(1 - alpha) base + alpha tuned, every weight, temperature and bias included, in fp32; exact at 0 and 1.

    The settings and the tokenizer are those of the tuned model."""
    ours, theirs = (end.model.state_dict() for end in (ends.base, ends.tuned))
    model = Silc(ends.tuned.model.config).eval()
    model.load_state_dict({name: torch.lerp(ours[name], theirs[name], alpha) for name in ours})
    model.tokenizer = ends.tuned.model.tokenizer
    return model


def write(ends: Ends, alpha: float, out: Path) -> None:
    """Save the mixture as a folder that silc.load opens. ValueError for a folder that is not empty."""
    if out.exists() and any(out.iterdir()):
        raise ValueError(f"{out} is not empty: choose another --out, or empty it.")
    model = mix(ends, alpha)
    named = {"base": str(ends.base.path), "tuned": str(ends.tuned.path), "alpha": alpha}
    model.save(out, {"interpolated": named})
    if isinstance(model.tokenizer, Tokenizer):
        model.tokenizer.save(out)


def sweep(ends: Ends, alphas: Sequence[float], sets: Mapping[str, str], out: Path, device: str) -> list[dict[str, Any]]:
    """Score the mixtures; write sweep.json, sweep.png and, for `silc compare`, a folder of results for each alpha."""
    rows = []
    for alpha in alphas:
        results = evaluate_model(mix(ends, alpha), f"alpha {alpha:g}", sets, out / f"alpha-{alpha:g}", device)
        rows.append({"alpha": alpha, "scores": {name: result.metrics for name, result in results.items()}})
        print(f"alpha {alpha:<5g} " + "  ".join(_told(results)), flush=True)
    (out / "sweep.json").write_text(json.dumps(rows, indent=1) + "\n")
    plot(rows, out / "sweep.png")
    return rows


def _told(results: Mapping[str, Result]) -> list[str]:
    return [f"{name} {next(iter(r.metrics))} {next(iter(r.metrics.values())):.1%}" for name, r in results.items()]


def plot(rows: Sequence[Mapping[str, Any]], path: Path) -> Path:
    """The way from base to tuned, as the first metric of each further set over that of the first; over alpha where
    there is one set only."""
    names = list(rows[0]["scores"])
    first = {name: next(iter(rows[0]["scores"][name])) for name in names}
    values = {name: [100 * row["scores"][name][first[name]] for row in rows] for name in names}
    across, along = ([100 * r["alpha"] for r in rows], "alpha, %") if len(names) == 1 else (
        values[names[0]], f"{names[0]} {metric_name(first[names[0]])}, %")  # fmt: skip
    shown = names if len(names) == 1 else names[1:]

    def draw(figure: Any, theme: plots.Theme) -> None:
        for number, name in enumerate(shown):
            left = (number + 0.16) / len(shown)
            axes = figure.add_axes((left, 0.16, 0.8 / len(shown), 0.74))
            axes.plot(across, values[name], color=theme.runs[0], lw=1.6, marker="o", ms=4)
            for x, y, row in zip(across, values[name], rows):
                ends = {0.0: "base", 1.0: "tuned"}
                axes.annotate(ends.get(row["alpha"], f"{row['alpha']:g}"), (x, y), textcoords="offset points",
                              xytext=(5, 5), color=theme.muted, fontsize=8)  # fmt: skip
            axes.set_xlabel(along)
            axes.set_title(f"{name} {metric_name(first[name])}, %", fontsize=9, loc="left")
            axes.grid(color=theme.rule, lw=0.6)
            axes.margins(0.12)
            for side in ("top", "right"):
                axes.spines[side].set_visible(False)

    return plots.save(path, 4.6 * len(shown), 3.4, draw)
