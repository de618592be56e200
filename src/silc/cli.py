"""The one command. Each verb is a few lines; what it does lives in the rooms.

Gives: main.
Used by: the `silc` script, `python -m silc`, `torchrun -m silc`.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro

from silc.config import Config
from silc.plain import load_json, nearest
from silc.train.guard import Halt, Stopped

OVERVIEW = """\
usage: silc VERB [options]        `silc VERB --help` tells all of a verb

{verbs}

A first run, on any machine, in ten minutes:   silc quickstart
On your own pairs:                             silc train silc --data.sources pairs.csv --out runs/mine
On eight GPUs:                                 torchrun --nproc-per-node 8 -m silc train silc ...
"""


def train(args: list[str]) -> None:
    """Pretrain by a recipe, or by a config.json; going on where the run folder left off."""
    from silc import recipes

    if not args or args[0] in ("-h", "--help"):
        print("usage: silc train RECIPE|config.json [--out FOLDER] [--data.sources ...] [--SECTION.KEY VALUE ...]\n")
        print("recipes:\n" + _table(recipes.names()))
        print("\n`silc train RECIPE --help` lists every setting with its value in that recipe.")
        return
    name, rest = args[0].removeprefix("recipe="), args[1:]
    config = tyro.cli(Config, default=_base(name), args=rest, prog=f"silc train {name}", description=_about(name))
    from silc.train.loop import train as run

    folder = run(config)
    print(f"done: {folder}  (model in {folder / 'export'}, numbers in {folder / 'metrics.jsonl'})")


def plan(args: list[str]) -> None:
    """Say what a run needs before it runs: memory, FLOPs, traffic, days and cost on given GPUs."""
    from silc import recipes
    from silc.app.planning import Asked, show
    from silc.plan.estimate import sized

    if not args or args[0] in ("-h", "--help"):
        print("usage: silc plan RECIPE|config.json [--gpus 256] [--gpu h100] [--size L/16] [--SECTION.KEY VALUE ...]\n")
        print("recipes:\n" + _table(recipes.names()))
        print("\n`silc plan RECIPE --help` lists every setting, those of the plan first.")
        return
    base, prog = _base(args[0]), f"silc plan {args[0]}"
    asked = tyro.cli(Asked, default=Asked(config=base), args=args[1:], prog=prog)
    if asked.size:  # what is said beside the size counts more
        asked = tyro.cli(Asked, default=Asked(config=sized(base, asked.size)), args=args[1:], prog=prog)
    print(show(asked.plan()))


def _base(name: str) -> Config:
    """The recipe of that name, or the config in that file."""
    from silc import recipes

    return load_json(Path(name), Config) if name.endswith(".json") else recipes.get(name)


def _about(name: str) -> str:
    from silc import recipes

    return recipes.names().get(name.replace("_", "-"), "A run by its saved config.")


def quickstart(args: list[str]) -> None:
    """Build a small real corpus, train SILC on it on any CPU, evaluate, and write a report with pictures."""
    from silc.quickstart import quickstart as run

    tyro.cli(run, args=args, prog="silc quickstart")


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


def heatmap(args: list[str]) -> None:
    """Show where a picture matches each text."""

    def run(
        model: tyro.conf.Positional[str],
        image: tyro.conf.Positional[Path],
        text: Annotated[tuple[str, ...], tyro.conf.arg(aliases=["-t"])],
        out: Path = Path("heatmap.png"),
        how: str = "whole-image",
    ) -> None:
        """Draw the patch-text map of a picture for each text, side by side.

        Args:
            model: Anything that silc.load opens.
            image: A picture.
            text: What to look for: `-t "a red apple" "a dog"`.
            out: The PNG to write.
            how: The segmentation protocol whose size, windows and read-out are used: whole-image, tcl, tips, ...
        """
        from silc.app.overlays import overlay_heatmap
        from silc.opening import load
        from silc.predict import Predictor

        maps = Predictor(load(model)).heatmap(image, list(text), how=how)
        overlay_heatmap(image, maps, text).save(out)
        print(f"wrote {out}")

    tyro.cli(run, args=args, prog="silc heatmap")


def export(args: list[str]) -> None:
    """Write a model for transformers, open_clip, onnx or as safetensors, read back and compared, with a model card."""

    def run(
        model: tyro.conf.Positional[str],
        to: Literal["transformers", "open_clip", "onnx", "safetensors"],
        out: Path,
        check: bool = True,
        tolerance: float = 1e-4,
        size: tuple[int, int] | None = None,
        scores: Path | None = None,
        licence: str | None = None,
    ) -> None:
        """Write a model as another library opens it, whole and in agreement, or not at all.

        Args:
            model: Anything that silc.load opens.
            to: The library.
            out: Folder to write; new or empty.
            check: Read the result back with that library and compare images, texts, logits and dense features.
            tolerance: Largest difference as a share of the largest value; ten times that for dense features.
            size: Height and width of the pictures of an ONNX graph; default the model's own.
            scores: Folder that `silc eval --out` wrote, for the model card; default the evaluations of the run.
            licence: Of the weights, for the model card; default that of the model which the run began with.
        """
        from silc.app.exporting import export as write
        from silc.export.check import table

        rows = write(model, to, out, check, tolerance, size, scores, licence)
        print(table(rows) if rows else "not compared (--no-check)")
        print(f"wrote {out}, with its model card in README.md")

    tyro.cli(run, args=args, prog="silc export")


def inspect(args: list[str]) -> None:
    """Say what a model is and how it came in; with --check, compare it with the library that it is of."""

    def run(model: tyro.conf.Positional[str], check: bool = False, tolerance: float = 1e-4) -> None:
        """Print a model's settings, tokenizer, licence and load report.

        Args:
            model: Anything that silc.load opens: hf:owner/name, a folder, a file.
            check: Open the same weights in transformers or open_clip too, and compare what both make of a picture and
                two captions. Exits with 1 where they differ.
            tolerance: Largest difference as a share of the largest value; ten times that for dense features.
        """
        from silc.app.exporting import inspect as look

        said, agree = look(model, check, tolerance)
        print(said)
        if not agree:
            raise Halt("the two libraries differ by more than --tolerance.")

    tyro.cli(run, args=args, prog="silc inspect")


def push(args: list[str]) -> None:
    """Upload an export to the Hugging Face Hub."""

    def run(folder: tyro.conf.Positional[Path], name: tyro.conf.Positional[str], private: bool = False) -> None:
        """Upload what `silc export` wrote; the login is that of `hf auth login`.

        Args:
            folder: The export.
            name: owner/name on the Hub.
            private: Create it so that only you see it.
        """
        from silc.app.exporting import push as upload

        print(f"uploaded to {upload(folder, name, private)}")

    tyro.cli(run, args=args, prog="silc push")


def segment(args: list[str]) -> None:
    """Say which of some classes every pixel of a picture, a folder or a video belongs to."""

    def run(
        source: tyro.conf.Positional[Path],
        classes: tyro.conf.Positional[str],
        model: str,
        out: Path = Path("segmented"),
        how: str = "auto",
        background: float | None = None,
        arrays: bool = False,
        every: int = 1,
        device: str = "auto",
    ) -> None:
        """Write, for every picture, an overlay with legend, a label map (PNG with palette), and scores by class (JSON).

        Args:
            source: A picture, a folder of pictures, an animation, or a video (needs silc[video]).
            classes: What to look for, in your own words, with commas: "road, car, tree".
            model: Anything that silc.load opens; one with a CAT-Seg head uses it, any other goes without training.
            out: Folder for NAME.png, NAME.labels.png and NAME.json.
            how: The protocol; auto: catseg for a model with a head, else whole-image. Also tcl, tips, maskclip, ...
            background: Pixels whose best score (0 to 1) is lower belong to no class, and are black.
            arrays: Write all scores too, NAME.npy: float16 [classes, height, width].
            every: Of an animation or video, every Nth frame.
            device: auto, cpu, cuda or cuda:1.
        """
        from silc.app.segmenting import segment as write

        labels = [label.strip() for label in classes.split(",") if label.strip()]
        done = write(model, source, labels, out, how, background, arrays, every, device)
        print(f"wrote {done} picture{'s' * (done != 1)} to {out}: NAME.png (overlay), NAME.labels.png, NAME.json")

    tyro.cli(run, args=args, prog="silc segment")


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


def study(args: list[str]) -> None:
    """Run a grid of recipes, durations and seeds over one corpus, and show what it says; or show it from raw files."""
    from silc.study import declared
    from silc.study.command import Asked

    if not args or args[0] in ("-h", "--help"):
        print("usage: silc study NAME|study.json --drawings FILE --out FOLDER [options]    (again: it goes on)\n")
        print("studies:\n" + _table(declared.names()))
        print("\n`silc study NAME --help` lists every option. docs/experiments: how FILE is made, what came out.")
        return

    tyro.cli(Asked, args=args[1:], prog=f"silc study {args[0]}").answer(args[0])


def list_recipes(args: list[str]) -> None:
    """List the recipes."""
    from silc import recipes

    print(_table(recipes.names()))


VERBS: dict[str, Callable[[list[str]], None]] = {
    "quickstart": quickstart,
    "train": train,
    "plan": plan,
    "eval": evaluate,
    "compare": compare,
    "heatmap": heatmap,
    "segment": segment,
    "interpolate": interpolate,
    "export": export,
    "inspect": inspect,
    "push": push,
    "study": study,
    "recipes": list_recipes,
}


def _table(rows: dict[str, str]) -> str:
    width = max(map(len, rows))
    return "\n".join(f"  {name:<{width}}  {text}" for name, text in rows.items())


def main(argv: list[str] | None = None) -> None:
    """Run one verb. A user error ends with one sentence on stderr and status 2, a guard's stop with 1."""
    args = sys.argv[1:] if argv is None else argv
    if not args or args[0] in ("-h", "--help", "help"):
        print(OVERVIEW.format(verbs=_table({n: (f.__doc__ or "").split("\n")[0] for n, f in VERBS.items()})))
        return
    if args[0] == "--version":
        from silc import __version__

        print(f"silc {__version__}")
        return
    if args[0] not in VERBS:
        _fail(f"no verb {args[0]!r}." + nearest(args[0], VERBS), 2)
    try:
        VERBS[args[0]](args[1:])
    except ValueError as error:
        _fail(str(error), 2)
    except Halt as error:
        _fail(str(error), 1)
    except Stopped as error:
        _fail(str(error), 75)
    except KeyboardInterrupt:
        _fail("interrupted.", 130)
    except OSError as error:
        _fail(f"{error.strerror or error}: {error.filename or ''}".rstrip(": "), 1)


def _fail(message: str, status: int) -> Any:
    print(f"silc: {message}", file=sys.stderr)
    raise SystemExit(status)
