"""Typed settings to plain data and back, strictly; JSON files; the nearest name for a misspelt one.

Gives: to_dict / from_dict (an unknown key names its nearest match), read_json, save_json, load_json; nearest and
beneath, for messages.
Used by: everyone who reads or writes settings.
"""

from __future__ import annotations

import dataclasses
import difflib
import json
import math
import types
import typing
from collections.abc import Iterable
from pathlib import Path
from typing import Any, Literal, TypeVar, Union

T = TypeVar("T")


def nearest(word: str, options: Iterable[str]) -> str:
    """` Perhaps you meant 'x'.` for a near miss, else the list of what there is; to end an error message."""
    options = sorted(options)
    close = difflib.get_close_matches(word, options, n=1, cutoff=0.5)
    return f" Perhaps you meant {close[0]!r}." if close else f" There are: {', '.join(options)}."


def beneath(error: BaseException) -> str:
    """The first line of what an error began with: why a package cannot be imported is seldom said by the last one."""
    while inner := error.__cause__ or error.__context__:
        error = inner
    return str(error).splitlines()[0] if str(error) else type(error).__name__


def to_dict(config: Any) -> dict[str, Any]:
    return dataclasses.asdict(config)


def from_dict(cls: type[T], data: Any, where: str = "") -> T:
    """Build the dataclass `cls` from plain data, strictly.

    Raises ValueError for an unknown key (naming its place and nearest match) and for a value of the wrong type.
    """
    if not isinstance(data, dict):
        raise ValueError(f"config: {where or 'the file'} must hold settings by name, not {type(data).__name__}.")
    hints = typing.get_type_hints(cls)
    for key in data:
        if key not in hints:
            raise ValueError(f"config: unknown key {where + key!r}." + nearest(key, hints))
    return cls(**{k: _coerce(hints[k], v, f"{where}{k}.") for k, v in data.items()})


def _coerce(hint: Any, value: Any, where: str) -> Any:
    if hint is Any:
        return value
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    name = where.rstrip(".")
    if dataclasses.is_dataclass(hint):
        return from_dict(typing.cast(type, hint), value, where)
    if origin in (Union, types.UnionType):
        if value is None and type(None) in args:
            return None
        return _coerce(next(a for a in args if a is not type(None)), value, where)
    if origin is Literal:
        if value not in args:
            raise ValueError(f"config: {name} = {value!r}." + nearest(str(value), map(str, args)))
        return value
    if origin is tuple and isinstance(value, (list, tuple)):
        kinds = [args[0]] * len(value) if args[-1] is Ellipsis else list(args)
        if len(kinds) == len(value):
            return tuple(_coerce(k, v, where) for k, v in zip(kinds, value))
    if origin is dict and isinstance(value, dict):
        return {str(k): _coerce(args[1], v, f"{where}{k}.") for k, v in value.items()}
    if hint is float and isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value):
        return float(value)
    if isinstance(hint, type) and isinstance(value, hint) and not (hint is int and isinstance(value, bool)):
        return value
    raise ValueError(f"config: {name} must be {getattr(hint, '__name__', hint)}, not {value!r}.")


def read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file. ValueError names the file when it cannot be read, is not JSON, or holds no object."""
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ValueError(f"{path} cannot be read ({error.strerror}).") from None
    except ValueError as error:
        raise ValueError(f"{path} is not valid JSON ({error}).") from None
    if not isinstance(data, dict):
        raise ValueError(f"{path} must hold a JSON object, not {type(data).__name__}.")
    return data


def save_json(path: Path, config: Any) -> None:
    path.write_text(json.dumps(to_dict(config), indent=2) + "\n")


def load_json(path: Path, cls: type[T]) -> T:
    """Read a config written by `save_json`. ValueError names the file when it is not JSON or has a stray key."""
    try:
        return from_dict(cls, json.loads(path.read_text()))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is not valid JSON ({error}).") from None
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None
