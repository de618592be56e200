"""Verbs that train, and say what training needs and does.

Gives: quickstart, train, plan, study, list_recipes, table.
Used by: the command line's table of verbs.
"""

from __future__ import annotations

from pathlib import Path

import tyro

from silc.config import Config
from silc.plain import load_json


def quickstart(args: list[str]) -> None:
    """Build a small real corpus, train SILC on it on any CPU, evaluate, and write a report with pictures."""
    from silc.quickstart import quickstart as run

    tyro.cli(run, args=args, prog="silc quickstart")


def train(args: list[str]) -> None:
    """Pretrain by a recipe, or by a config.json; going on where the run folder left off."""
    from silc import recipes

    if not args or args[0] in ("-h", "--help"):
        print("usage: silc train RECIPE|config.json [--out FOLDER] [--data.sources ...] [--SECTION.KEY VALUE ...]\n")
        print("recipes:\n" + table(recipes.names()))
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
        print("recipes:\n" + table(recipes.names()))
        print("\n`silc plan RECIPE --help` lists every setting, those of the plan first.")
        return
    base, prog = _base(args[0]), f"silc plan {args[0]}"
    asked = tyro.cli(Asked, default=Asked(config=base), args=args[1:], prog=prog)
    if asked.size:  # what is said beside the size counts more
        asked = tyro.cli(Asked, default=Asked(config=sized(base, asked.size)), args=args[1:], prog=prog)
    print(show(asked.plan()))


def study(args: list[str]) -> None:
    """Run a grid of recipes, durations and seeds over one corpus, and show what it says; or show it from raw files."""
    from silc.study import declared
    from silc.study.command import Asked

    if not args or args[0] in ("-h", "--help"):
        print("usage: silc study NAME|study.json --drawings FILE --out FOLDER [options]    (again: it goes on)\n")
        print("studies:\n" + table(declared.names()))
        print("\n`silc study NAME --help` lists every option. docs/experiments: how FILE is made, what came out.")
        return

    tyro.cli(Asked, args=args[1:], prog=f"silc study {args[0]}").answer(args[0])


def list_recipes(args: list[str]) -> None:
    """List the recipes."""
    from silc import recipes

    print(table(recipes.names()))


def _base(name: str) -> Config:
    """The recipe of that name, or the config in that file."""
    from silc import recipes

    return load_json(Path(name), Config) if name.endswith(".json") else recipes.get(name)


def _about(name: str) -> str:
    from silc import recipes

    return recipes.names().get(name.replace("_", "-"), "A run by its saved config.")


def table(rows: dict[str, str]) -> str:
    """Names and what they are, aligned."""
    width = max(map(len, rows))
    return "\n".join(f"  {name:<{width}}  {text}" for name, text in rows.items())
