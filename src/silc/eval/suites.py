"""Suites: a name for many sets, each with its folder below a data root and its task's settings; plain JSON.

Gives: Suite, Entry, names, open_suite, locate.
Used by: the command line, `silc eval MODEL --suite NAME --data ROOT`.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

from silc.plain import from_dict, nearest

SHIPPED = Path(__file__).with_name("suites")


@dataclass(frozen=True)
class Entry:
    """One set of a suite: `folder` is relative to the data root, `config` the settings of its task."""

    folder: str
    config: Any


@dataclass(frozen=True)
class Suite:
    name: str
    about: str
    sets: dict[str, Entry]
    """By `task` or `task/label`."""


def names() -> list[str]:
    """The suites that ship."""
    return sorted(path.stem for path in SHIPPED.glob("*.json"))


def open_suite(name: str, tasks: Mapping[str, ModuleType]) -> Suite:
    """A suite that ships, by name, or a user's own, a .json file; its settings are checked against the tasks' Config.

    The file holds `about` (a sentence) and `sets`: `{"zeroshot/pets": {"folder": "pets", "protocol": "openai"}}`.
    ValueError for an unknown suite or task (naming the nearest), a setting that the task has not, a set without folder.
    """
    path = Path(name) if name.endswith(".json") else SHIPPED / f"{name}.json"
    if path.parent == SHIPPED and path.stem not in names():
        raise ValueError(f"there is no suite {name!r}; silc has {', '.join(names())}, and opens a .json file."
                         + nearest(name, names()))
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ValueError(f"the suite {path} cannot be read ({error.strerror}).") from None
    except ValueError as error:
        raise ValueError(f"the suite {path} is not valid JSON ({error}).") from None
    sets = data.get("sets") if isinstance(data, dict) else None
    if not isinstance(sets, dict) or not sets:
        raise ValueError(f"the suite {path} needs `sets`: task or task/label -> folder and settings.")
    if strange := sorted(set(data) - {"about", "sets"}):
        raise ValueError(f"the suite {path}: unknown key {strange[0]!r}." + nearest(strange[0], ["about", "sets"]))
    return Suite(path.stem, str(data.get("about", "")), {key: _entry(key, said, tasks, path)
                                                         for key, said in sets.items()})


def _entry(name: str, said: Any, tasks: Mapping[str, ModuleType], path: Path) -> Entry:
    task = name.partition("/")[0]
    if task not in tasks:
        raise ValueError(f"the suite {path}: there is no task {task!r}." + nearest(task, tasks))
    settings = {"folder": said} if isinstance(said, str) else said
    folder = settings.get("folder") if isinstance(settings, dict) else None
    if not isinstance(folder, str) or not folder:
        raise ValueError(f"the suite {path}: {name} names no `folder`.")
    given = {key: value for key, value in settings.items() if key != "folder"}
    try:
        return Entry(folder, from_dict(tasks[task].Config, given))
    except ValueError as error:
        raise ValueError(f"the suite {path}, {name}: {error}") from None


def locate(suite: Suite, root: Path) -> tuple[dict[str, Path], dict[str, Any], dict[str, str]]:
    """(set -> folder, set -> settings) of the sets that lie below `root`, and set -> where others were expected.

    ValueError if there is no such root, or nothing of the suite in it.
    """
    if not root.is_dir():
        raise ValueError(f"the data root {root} is not a folder; it should hold the sets of the suite {suite.name}.")
    places = {name: root / entry.folder for name, entry in suite.sets.items()}
    found = {name: place for name, place in places.items() if place.exists()}
    if not found:
        expected = ", ".join(dict.fromkeys(entry.folder for entry in suite.sets.values()))
        raise ValueError(f"{root} holds no set of the suite {suite.name}; expected in it: {expected}.")
    configs = {name: suite.sets[name].config for name in found}
    return found, configs, {name: str(place) for name, place in places.items() if name not in found}
