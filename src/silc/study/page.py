"""What a study found, for people: tables, plots, one HTML page, the same as Markdown, and the scores as Parquet.

Gives: write (all of it), tables, markdown.
Used by: the command line. Everything here is made from the records alone, so that it can be made again from raw files.
"""

from __future__ import annotations

import base64
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

from silc.app import plots
from silc.app.pages import template
from silc.app.runs import duration, metric_name, short_count
from silc.study.analysis import Interval, Row, Series, apart, gain, gain_at_equal_flops, rows, series, slope
from silc.study.declared import Study

Records = Sequence[Mapping[str, Any]]
AXES: tuple[tuple[str, Callable[[Series, int], float]], ...] = (
    ("pairs seen", lambda one, n: float(n)),
    ("training FLOPs", lambda one, n: one.flops[n]),
    ("seconds of training, one process", lambda one, n: one.seconds[n]),
)


@dataclass(frozen=True)
class Table:
    title: str
    note: str
    head: Sequence[str]
    body: Sequence[Sequence[str]]


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
    pictures = [_plot(study, found, score, out) for score in study.scores if series(found, score)]
    if (health := _health_plot(study, ordered, out)) is not None:
        pictures.append(health)
    made = tables(study, ordered)
    (out / "results.md").write_text(markdown(made))
    shown = [{"light": _inline(path), "dark": _inline(plots.dark_twin(path)), "alt": path.stem} for path in pictures]
    html = template("study.html").render(study=study, tables=made, pictures=shown, runs=len(ordered))
    (out / "study.html").write_text(html, encoding="utf-8")
    return out / "study.html"


def markdown(made: Sequence[Table]) -> str:
    parts = []
    for one in made:
        lines = ["| " + " | ".join(one.head) + " |", "|---|" + "---:|" * (len(one.head) - 1)]
        lines += ["| " + " | ".join(cells) + " |" for cells in one.body]
        parts.append(f"## {one.title}\n\n{one.note}\n\n" + "\n".join(lines) + "\n")
    return "\n".join(parts)


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


# ---------------------------------------------------------------- tables


def tables(study: Study, records: Records) -> list[Table]:
    """Scores; gains over the baseline on equal samples and on equal FLOPs; slopes; what each part buys; health."""
    found = rows(records)
    by_score = {score: series(found, score) for score in study.scores}
    by_score = {score: known for score, known in by_score.items() if study.baseline in known}
    made = [_scores(study, records, found)]
    for score, known in by_score.items():
        made.append(_gains(study, score, known))
    made.append(_parts(study, by_score))
    made.append(_health(study, records))
    return [one for one in made if one.body]


def _named(score: str) -> str:
    which, _, metric = score.rpartition(" ")
    return f"{which} {metric_name(metric)}"


def _scores(study: Study, records: Records, found: Sequence[Row]) -> Table:
    """A row an arm and duration: every set's first metric, in percent, mean over seeds."""
    firsts: dict[str, str] = {}
    for row in found:
        firsts.setdefault(row.set, row.metric)
    chosen = dict.fromkeys([*study.scores, *(f"{name} {metric}" for name, metric in firsts.items())])
    all_series = {score: series(found, score) for score in chosen}
    base = {n: flops for one in all_series.values() if study.baseline in one
            for n, flops in one[study.baseline].flops.items()}  # fmt: skip
    body = []
    for arm in study.arms:
        for samples in sorted({r["samples"] for r in records if r["arm"] == arm}):
            mine = [r for r in records if (r["arm"], r["samples"]) == (arm, samples)]
            cost = f"{mine[0]['flops'] / base[samples]:.2f}" if samples in base else "–"
            rate = median(r["images_per_s"] for r in mine)
            cells = [_cell(known.get(arm), samples) for known in all_series.values()]
            body.append([arm, short_count(samples), str(len(mine)), *cells, cost, f"{rate:.0f}"])
    chances = {f"{row.set} {row.metric}": row.chance for row in found}
    level = [f"{100 * chance:.1f}" if (chance := chances.get(score)) is not None else "–" for score in all_series]
    body.append(["chance", "", "", *level, "", ""])
    return Table("Scores", "In percent, mean over seeds (lowest to highest). FLOPs as a multiple of the baseline's at "
                 "the same samples; pairs per second as logged, on shared cores.",
                 ["arm", "pairs", "seeds", *map(_named, all_series), "FLOPs ×", "pairs/s"], body)  # fmt: skip


def _cell(one: Series | None, samples: int) -> str:
    if one is None or samples not in one.values:
        return "–"
    low, high = one.ends(samples)
    spread = f" ({100 * low:.1f} to {100 * high:.1f})" if len(one.values[samples]) > 1 else ""
    return f"{100 * one.mean(samples):.1f}{spread}"


def _gains(study: Study, score: str, known: Mapping[str, Series]) -> Table:
    base = known[study.baseline]
    body = []
    for arm, one in known.items():
        rise = _interval(slope(one, study.samples))
        if arm == study.baseline:
            body.append([arm, *["0"] * len(study.samples), *["–"] * len(study.samples), rise, "0"])
            continue
        equal = [_interval(gain(one, base, n)) for n in study.samples]
        cost = [_interval(gain_at_equal_flops(one, base, n)) if n in one.values else "–" for n in study.samples]
        body.append([arm, *equal, *cost, rise, _interval(slope(apart(one, base), study.samples))])
    names = [short_count(n) for n in study.samples]
    note = (f"Points of {_named(score)} above {study.baseline}: seed by seed at equal samples; and against "
            f"{study.baseline} trained as long as the arm's FLOPs would pay for (linear in log FLOPs; "
            "– where it was never trained so long; seed by seed too, where it has three seeds at both of the durations "
            "between which that lies, else above its means). ± is a 95% interval (Student's t over seeds), absent for "
            "one seed; bold where it leaves out zero. Slope: points for each doubling of the samples, of the arm and "
            f"of what it is above {study.baseline}.")  # fmt: skip
    head = ["arm", *(f"{n}, equal samples" for n in names), *(f"{n}, equal FLOPs" for n in names), "slope",
            f"slope above {study.baseline}"]  # fmt: skip
    return Table(f"Against {study.baseline}: {_named(score)}", note, head, body)


def _interval(found: Interval | None) -> str:
    if found is None:
        return "–"
    text = f"{100 * found.mean:+.2f}" + (f" ± {100 * found.half:.2f}" if found.half is not None else "")
    return f"**{text}**" if found.sign else text


def _parts(study: Study, by_score: Mapping[str, Mapping[str, Series]]) -> Table:
    """What one change buys, at the longest duration that both arms have with most seeds."""
    body = []
    for what, (arm, other) in study.parts.items():
        cells = []
        for known in by_score.values():
            if arm not in known or other not in known:
                cells.append("–")
                continue
            shared = [n for n in known[arm].durations if n in known[other].values]
            most = max((len(known[arm].values[n].keys() & known[other].values[n].keys()), n) for n in shared)[1]
            cells.append(f"{_interval(gain(known[arm], known[other], most))} at {short_count(most)}")
        body.append([what, f"{arm} − {other}", *cells])
    return Table("What each part buys", "Points, seed by seed, at equal samples: the longest duration with most seeds.",
                 ["part", "arms", *map(_named, by_score)], body)  # fmt: skip


def _health(study: Study, records: Records) -> Table:
    body = []
    for arm in study.arms:
        told = [r["health"] for r in records if r["arm"] == arm and r["health"]]
        if told:
            entropy = [value for one in told for value in one["entropy"]]
            use = [value for one in told for value in one["prototype_use"]]
            least, most = min(entropy), max(entropy)
            sane = "yes" if least >= 0.1 and most <= 0.9 else "no"
            body.append([arm, str(len(told)), f"{least:.2f} to {most:.2f}", sane, f"{min(use):.2f}"])
    return Table("Was the teacher well?", "Over all runs of an arm, after the first tenth of each: entropy of the "
                 "teacher's targets as a share of ln K (0 is a collapse to one prototype, 1 to none), and the lowest "
                 "share of the prototypes that a batch could fill and that lead for some view.",
                 ["arm", "runs", "entropy / ln K", "within 0.1 to 0.9", "least prototype use"], body)  # fmt: skip


# ---------------------------------------------------------------- plots


def _plot(study: Study, found: Sequence[Row], score: str, out: Path) -> Path:
    """Three panels: the score against samples, FLOPs and time; a line an arm, whiskers from lowest to highest seed."""
    known = series(found, score)
    chance = next((row.chance for row in found if f"{row.set} {row.metric}" == score), None)
    path = out / f"{score.replace('/', '-').replace(' ', '-')}.png"
    if len({row.samples for row in found}) == 1:
        return _dots(study, known, score, chance, path)

    def draw(figure: Any, theme: plots.Theme) -> None:
        from matplotlib.ticker import NullLocator

        for number, (label, of) in enumerate(AXES):
            axes = figure.add_axes((0.055 + number * 0.325, 0.25, 0.275, 0.62))
            for slot, arm in enumerate(a for a in study.arms if a in known):
                one = known[arm]
                x = [of(one, n) for n in one.durations]
                y = [100 * one.mean(n) for n in one.durations]
                ends = [one.ends(n) for n in one.durations]
                below, above = zip(*((m - 100 * low, 100 * high - m) for m, (low, high) in zip(y, ends)))
                whiskers = [below, above]
                main = arm == study.baseline
                colour = theme.ink if main else theme.runs[slot % len(theme.runs)]
                dashes: Any = "-" if slot < len(theme.runs) else (0, (4, 2))
                axes.errorbar(x, y, whiskers, label=arm, color=colour, lw=2.2 if main else 1.3, ls=dashes, ms=4,
                              marker="osD^vPX*hd"[slot % 10], elinewidth=0.8)  # fmt: skip
            if chance is not None:
                axes.axhline(100 * chance, color=theme.muted, lw=0.9, ls=(0, (4, 3)))
            axes.set_xscale("log", base=2)
            axes.xaxis.set_major_formatter(lambda value, _: _count(value))
            axes.xaxis.set_minor_locator(NullLocator())
            axes.set_xlabel(label, fontsize=8.5)
            axes.grid(color=theme.rule, lw=0.6)
            for side in ("top", "right"):
                axes.spines[side].set_visible(False)
        figure.text(0.012, 0.96, f"{_named(score)}, %", va="top", fontsize=10.5, fontweight="bold")
        handles, labels = figure.axes[0].get_legend_handles_labels()
        figure.legend(handles, labels, loc="lower center", ncols=min(9, len(labels)), frameon=False, fontsize=8)

    return plots.save(path, 11.0, 3.7, draw)


def _dots(study: Study, known: Mapping[str, Series], score: str, chance: float | None, path: Path) -> Path:
    """Where there is one duration: a row an arm, a dot a seed, the baseline's mean as a line."""
    arms = [arm for arm in study.arms if arm in known][::-1]

    def draw(figure: Any, theme: plots.Theme) -> None:
        axes = figure.add_axes((0.2, 0.55 / height, 0.77, 1 - 1.05 / height))
        for row, arm in enumerate(arms):
            values = [100 * value for of in known[arm].values.values() for value in of.values()]
            colour = theme.ink if arm == study.baseline else theme.runs[0]
            axes.plot(values, [row] * len(values), "o", ms=5, color=colour)
        base = known.get(study.baseline)
        if base is not None:
            axes.axvline(100 * base.mean(base.durations[0]), color=theme.ink, lw=0.9)
        if chance is not None:
            axes.axvline(100 * chance, color=theme.muted, lw=0.9, ls=(0, (4, 3)))
        axes.set_yticks(range(len(arms)), arms, fontsize=8.5)
        axes.set_xlim(left=0)
        axes.grid(color=theme.rule, lw=0.6)
        for side in ("top", "right", "left"):
            axes.spines[side].set_visible(False)
        axes.tick_params(length=0)
        figure.text(0.012, 1 - 0.13 / height, f"{_named(score)}, %", va="top", fontsize=10.5, fontweight="bold")

    height = 1.1 + 0.24 * len(arms)
    return plots.save(path, 7.0, height, draw)


def _count(value: float) -> str:
    for size, unit in ((1e18, "E"), (1e15, "P"), (1e12, "T")):
        if value >= 0.9995 * size:
            return f"{value / size:.3g}{unit}"
    return short_count(value)


def _health_plot(study: Study, records: Records, out: Path) -> Path | None:
    """Entropy of the teacher's targets over each run, an arm a panel."""
    arms = [arm for arm in study.arms if any(r["arm"] == arm and r["health"] for r in records)]
    if not arms:
        return None

    columns = min(6, len(arms))
    lines = -(-len(arms) // columns)
    # logged at equal distances up to the end; a term that starts late has fewer
    most = {n: max(len(r["health"]["entropy"]) for r in records if r["samples"] == n and r["health"])
            for n in {r["samples"] for r in records if r["health"]}}  # fmt: skip

    def draw(figure: Any, theme: plots.Theme) -> None:
        for number, arm in enumerate(arms):
            column, line = number % columns, number // columns
            axes = figure.add_axes((0.045 + column * 0.95 / columns, 1 - (0.85 + 1.6 * line + 1.05) / height,
                                    0.95 / columns * 0.86, 1.05 / height))  # fmt: skip
            for r in (r for r in records if r["arm"] == arm and r["health"]):
                y, gap = r["health"]["entropy"], 0.9 / most[r["samples"]]
                slot = sorted(most).index(r["samples"])
                x = [1 - gap * (len(y) - 1 - i) for i in range(len(y))]
                axes.plot(x, y, lw=0.9, color=theme.runs[slot % len(theme.runs)])
            axes.set_xlim(0, 1.02)
            axes.set_ylim(0, 1)
            axes.axhspan(0.1, 0.9, color=theme.good, alpha=0.06, lw=0)
            axes.set_title(arm, fontsize=8.5, loc="left")
            axes.tick_params(labelsize=7.5, labelleft=column == 0, labelbottom=number + columns >= len(arms))
            for side in ("top", "right"):
                axes.spines[side].set_visible(False)
        figure.text(0.012, 1 - 0.12 / height, "Entropy of the teacher's targets / ln K by share of the run; a line a "
                    "run, a colour a duration", va="top", fontsize=10.5, fontweight="bold")  # fmt: skip

    height = 0.75 + 1.6 * lines
    return plots.save(out / "teacher-entropy.png", 11.0, height, draw)


def summary(records: Records) -> str:
    """One line for the terminal."""
    seconds = sum(r["seconds"] for r in records)
    return f"{len(records)} runs, {duration(seconds)} of training in all"
