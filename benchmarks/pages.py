"""The page of figures, from the raw files alone: `python benchmarks/pages.py`.

Gives: docs/performance.md: every claim with its target, figure and whether it holds; what does not hold and why (WHY in
the benchmark's file); then each benchmark's table with command, machine and versions.
Used by: whoever ran a benchmark; tests/test_benchmarks.py holds the page to the raw files.
"""

from __future__ import annotations

import ast
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
RESULTS, PAGE = HERE / "results", HERE.parent / "docs" / "performance.md"
ORDER = (
    "data_path",
    "contrastive",
    "prototypes",
    "step",
    "inference",
    "catseg",
    "processes",
    "gpu_step",
    "growth",
    "eval_memory",
    "plan_check",
)
HIDDEN = ("least_seconds", "most_seconds", "axis")
INTRO = """# Performance

Made by `python benchmarks/pages.py` from the raw files in `benchmarks/results/`; the figures are not typed by hand.
[benchmarks/README.md](../benchmarks/README.md) says how to run them on your machine.

Each file of `benchmarks/` pairs silc with its peers **in one run**: cases in turns (A B A B), the median over rounds,
ratios taken within a round, memory as the peak above what was there before, each case in a process of its own. Equal
answers (values and gradients) are checked in the same run, which fails where they differ. Only ratios travel between
machines; a ratio within some percent of 1 is a tie.
"""


def raw() -> list[dict[str, Any]]:
    """The kept files that benchmarks wrote, in the order of the page."""
    found = [json.loads(path.read_text()) for path in sorted(RESULTS.glob("*.json"))]
    mine = [data for data in found if "benchmark" in data]
    return sorted(mine, key=lambda d: (ORDER.index(d["benchmark"]) if d["benchmark"] in ORDER else 99, d["benchmark"]))


def source(name: str) -> ast.Module:
    return ast.parse((HERE / f"{name}.py").read_text())


def reasons(name: str) -> dict[str, str]:
    """WHY of a benchmark: from the beginning of a claim to the reason that it does not hold."""
    for node in source(name).body:
        if isinstance(node, ast.AnnAssign) and ast.unparse(node.target) == "WHY" and node.value is not None:
            return dict(ast.literal_eval(node.value))
    return {}


def reason(name: str, claim: str) -> str | None:
    """The one whose key the claim begins with, the longest such key first."""
    found = [why for key, why in sorted(reasons(name).items(), key=lambda item: -len(item[0])) if claim.startswith(key)]
    return found[0] if found else None


def number(value: float) -> str:
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.3g}"


def bound(entry: Mapping[str, Any]) -> tuple[str, str]:
    """Target and figure as text; small shares as 1/n, which is how they are claimed."""
    if "most" in entry and entry["most"] <= 0.5 and entry["figure"] > 0:
        return f"at most 1/{1 / entry['most']:.3g}", f"1/{1 / entry['figure']:.3g}"
    for key in ("least", "most"):
        if key in entry:
            return f"at {key} {number(entry[key])}", number(entry["figure"])
    return "none, told beside", number(entry["figure"])


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines) + "\n"


def claims(files: Sequence[Mapping[str, Any]]) -> str:
    rows = []
    for data in files:
        for entry in data["targets"]:
            wanted, figure = bound(entry)
            said = "yes" if entry["holds"] else "**no**"
            where = f"[{data['benchmark']}](../benchmarks/results/{data['benchmark']}.json)"
            rows.append([entry["what"], entry["against"], wanted, figure, said, where])
    return "## Claims\n\n" + table(["what", "against", "target", "measured", "holds", "raw"], rows)


def failures(files: Sequence[Mapping[str, Any]]) -> str:
    """One paragraph a reason, under the claims it explains."""
    told: dict[str, list[str]] = {}
    for data in files:
        for entry in data["targets"]:
            if not entry["holds"]:
                why = reason(data["benchmark"], entry["what"]) or "Not explained yet."
                told.setdefault(why, []).append(f"{entry['what']}, against {entry['against']}: {bound(entry)[1]}")
    if not told:
        return ""
    paragraphs = ["\n".join([*(f"- {claim}" for claim in lines), "", why]) for why, lines in told.items()]
    return "## What does not hold, and why\n\n" + "\n\n".join(paragraphs) + "\n"


def cell(key: str, value: Any, row: Mapping[str, Any]) -> str:
    if value is None or isinstance(value, bool | str):
        return {None: "", True: "yes", False: "no"}.get(value, str(value))
    if key == "median_seconds" and "most_seconds" in row:
        low, high = duration(row["least_seconds"]), duration(row["most_seconds"])
        return f"{duration(value)} ({low} to {high})"
    if key.endswith("_seconds"):
        return duration(value)
    if key.endswith("_bytes"):
        return f"{value / 2**20:,.0f} MiB" if value >= 2**22 else f"{value / 2**10:,.0f} KiB"
    if key.endswith("flops_per_second"):
        return f"{value / 1e9:,.0f} G"
    if key == "peak_share":
        return f"{value:.0%}"
    return number(value) if isinstance(value, float) else f"{value:,}"


def duration(seconds: float) -> str:
    return f"{seconds:,.3g} s" if seconds >= 1 else f"{1e3 * seconds:.3g} ms"


def title(key: str) -> str:
    words = {"median_seconds": "median (least to most)", "flops_per_second": "FLOP/s"}
    words |= {"peak_share": "of the matmul peak", "above_bytes": "added memory", "rest_bytes": "memory at rest"}
    for end in ("_seconds", "_bytes"):
        key = words.get(key, key.removesuffix(end))
    return words.get(key, key).replace("_", " ")


def section(data: Mapping[str, Any]) -> str:
    name, rows = data["benchmark"], data["rows"]
    doc = (ast.get_docstring(source(name)) or name).splitlines()[0]
    keys = [k for k in dict.fromkeys(k for row in rows for k in row) if k not in HIDDEN]
    keys = [k for k in keys if not any(isinstance(row.get(k), dict | list) for row in rows)]
    parts = [f"## {doc.partition(':')[0]}\n"]
    parts.append(table([title(k) for k in keys], [[cell(k, row.get(k), row) for k in keys] for row in rows]))
    if name == "growth":
        parts += [f"![Memory over {path.stem}](images/{path.name})\n" for path in sorted(images())]
    machine, versions = data["machine"], ", ".join(f"{n} {v}" for n, v in data["versions"].items())
    threads = f"{machine['threads']} thread{'s' * (machine['threads'] != 1)}"
    facts = [f"`{data['command']}`", machine.get("gpu") or f"{machine['cpu']}, {machine['cores']} cores, {threads}"]
    facts += ([f"{data['rounds']} rounds"] if "rounds" in data else []) + [versions]
    if data["checks"]:
        worst = max(check["relative_error"] for check in data["checks"])
        facts.append(f"{len(data['checks'])} comparisons of answers, largest relative error {worst:.1e}")
    parts.append("; ".join(facts) + ".\n")
    parts += [f"Left out: {line}.\n" for line in data["left_out"]]
    return "\n".join(parts)


def images() -> list[Path]:
    return list((PAGE.parent / "images").glob("growth-*.png"))


def page() -> str:
    files = raw()
    parts = [INTRO, claims(files), failures(files), *(section(data) for data in files)]
    return "\n".join(part for part in parts if part)


if __name__ == "__main__":
    PAGE.write_text(page())
    print(f"wrote {PAGE}")
