"""Verbs that score models and compare scores.

Gives: evaluate, compare, interpolate.
Used by: the command line's table of verbs.
"""

from __future__ import annotations

from pathlib import Path

import tyro


def evaluate(args: list[str]) -> None:
    """Score a model: a suite of sets or single ones, with a report card."""

    def run(
        model: tyro.conf.Positional[str],
        suite: str | None = None,
        data: Path | None = None,
        sets: dict[str, str] = {},  # noqa: B006 - read only
        out: Path | None = None,
        device: str = "auto",
        cache: Path | None = None,
    ) -> None:
        """Score a model, print a table, and with --out write results.json, results.md and card.html.

        Args:
            model: Anything that silc.load opens: a run, an export, a folder or file of another library, hf:owner/name.
            suite: photographs, quickstart, paper, catseg, or a JSON file of your own; needs --data.
            data: The folder below which the sets of the suite lie.
            sets: Pairs of task and folder: `--sets zeroshot pets/ retrieval coco/`; label a task as `zeroshot/pets`.
            out: Folder for the results, a JSON each, and the report card.
            device: auto, cpu, cuda or cuda:1.
            cache: Folder in which image features are kept for the next evaluation of the same model.
        """
        from silc.app.evaluation import evaluate as score
        from silc.eval.run import table

        results, failed = score(model, sets, suite, data, out, device, cache)
        print(table(results))
        if out:
            print(f"wrote {out / 'card.html'}, results.json and results.md")
        if failed:
            raise ValueError(f"{len(failed)} of {len(failed) + len(results)} sets failed: {', '.join(failed)}.")

    tyro.cli(run, args=args, prog="silc eval")


def compare(args: list[str]) -> None:
    """Put evaluations side by side and say which differences are more than noise."""

    def run(
        folders: tyro.conf.Positional[tuple[Path, ...]],
        sets: tuple[str, ...] = (),
        out: Path | None = None,
    ) -> None:
        """Compare folders that `silc eval ... --out FOLDER` wrote; every one with the first.

        Args:
            folders: Two or more folders of results.
            sets: Only these, as `zeroshot/pets`.
            out: Folder for compare.md and compare.json.
        """
        from silc.app.compare import compare as put
        from silc.app.compare import terminal, write

        found = put(folders, sets)
        print(terminal(found))
        if out:
            write(found, out)
            print(f"wrote {out / 'compare.md'} and compare.json")

    tyro.cli(run, args=args, prog="silc compare")


def interpolate(args: list[str]) -> None:
    """Go part of the way from a model to what was trained from it (WiSE-FT), and see what each part costs."""

    def run(
        base: tyro.conf.Positional[str],
        tuned: tyro.conf.Positional[str],
        alpha: tuple[float, ...] = (0.0, 0.25, 0.5, 0.75, 1.0),
        sets: dict[str, str] = {},  # noqa: B006 - read only
        out: Path = Path("interpolated"),
        device: str = "auto",
    ) -> None:
        """Write (1 - alpha) base + alpha tuned: with one alpha the model itself, with several their scores and a plot.

        Args:
            base: What the training began with: a run, an export, or anything that silc.load opens.
            tuned: What came out of it.
            alpha: How far to go: 0 is the base, 1 the tuned model.
            sets: Pairs of task and folder to score, as in `silc eval`; the plot shows the others over the first.
            out: Folder of the model, or of sweep.json, sweep.png and the results.
            device: auto, cpu, cuda or cuda:1.
        """
        from silc.app.interpolating import open_ends, sweep, write

        if not alpha or not all(-1 <= a <= 2 for a in alpha):
            raise ValueError("--alpha must be one number or more between -1 and 2: 0 is the base, 1 the tuned model.")
        ends = open_ends(base, tuned)
        if len(alpha) == 1:
            write(ends, alpha[0], out)
            print(f"wrote the model to {out}")
        if sets:
            sweep(ends, alpha, sets, out, device)
            print(f"wrote {out / 'sweep.json'} and sweep.png")
        elif len(alpha) > 1:
            raise ValueError("several --alpha are for comparing: name what to score, --sets TASK FOLDER ...")

    tyro.cli(run, args=args, prog="silc interpolate")
