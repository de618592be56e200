"""What a study found, as tables.

Gives: Table, tables, markdown, score_name.
Used by: study/page, study/pictures, experiments.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import median
from typing import Any

from silc.app.runs import metric_name, short_count
from silc.study.analysis import Interval, Row, Series, apart, gain, gain_at_equal_flops, rows, series, slope, together
from silc.study.declared import Study

Records = Sequence[Mapping[str, Any]]


@dataclass(frozen=True)
class Table:
    title: str
    note: str
    head: Sequence[str]
    body: Sequence[Sequence[str]]


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


def score_name(score: str) -> str:
    """For people: the set and its metric."""
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
                 ["arm", "pairs", "seeds", *map(score_name, all_series), "FLOPs ×", "pairs/s"], body)  # fmt: skip


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
            body.append([arm, *["0"] * len(study.samples), "0", *["–"] * len(study.samples), rise, "0"])
            continue
        equal = [_interval(gain(one, base, n)) for n in study.samples]
        cost = [_interval(gain_at_equal_flops(one, base, n)) if n in one.values else "–" for n in study.samples]
        over = together(one, base, study.samples)
        several = f"{_interval(over[1])} over {' and '.join(map(short_count, over[0]))}" if over else "–"
        body.append([arm, *equal, several, *cost, rise, _interval(slope(apart(one, base), study.samples))])
    names = [short_count(n) for n in study.samples]
    note = (f"Points of {score_name(score)} above {study.baseline}: seed by seed at equal samples; and against "
            f"{study.baseline} trained as long as the arm's FLOPs would pay for (linear in log FLOPs; "
            "– where it was never trained so long; seed by seed too, where it has three seeds at both of the durations "
            "between which that lies, else above its means). ± is a 95% interval (Student's t over seeds), absent for "
            "one seed; bold where it leaves out zero. Together: over the durations at which three or more seeds have "
            "both, of the seeds that have all of these. Slope: points for each doubling of the samples, of the arm and "
            f"of what it is above {study.baseline}.")  # fmt: skip
    head = ["arm", *(f"{n}, equal samples" for n in names), "together, equal samples",
            *(f"{n}, equal FLOPs" for n in names), "slope", f"slope above {study.baseline}"]  # fmt: skip
    return Table(f"Against {study.baseline}: {score_name(score)}", note, head, body)


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
                 ["part", "arms", *map(score_name, by_score)], body)  # fmt: skip


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


def markdown(made: Sequence[Table]) -> str:
    parts = []
    for one in made:
        lines = ["| " + " | ".join(one.head) + " |", "|---|" + "---:|" * (len(one.head) - 1)]
        lines += ["| " + " | ".join(cells) + " |" for cells in one.body]
        parts.append(f"## {one.title}\n\n{one.note}\n\n" + "\n".join(lines) + "\n")
    return "\n".join(parts)
