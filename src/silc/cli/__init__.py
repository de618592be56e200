"""The one command. Each verb is a few lines in a file beside this one; what it does lives in the rooms.

Gives: main.
Used by: the `silc` script, `python -m silc`, `torchrun -m silc`.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from typing import Any

from silc.cli import measuring, models, training, using
from silc.plain import nearest
from silc.train.guard import Halt, Stopped

OVERVIEW = """\
usage: silc VERB [options]        `silc VERB --help` tells all of a verb

{verbs}

A first run, on any machine, in ten minutes:   silc quickstart
On your own pairs:                             silc train silc --data.sources pairs.csv --out runs/mine
On eight GPUs:                                 torchrun --nproc-per-node 8 -m silc train silc ...
"""

VERBS: dict[str, Callable[[list[str]], None]] = {
    "quickstart": training.quickstart,
    "train": training.train,
    "plan": training.plan,
    "eval": measuring.evaluate,
    "compare": measuring.compare,
    "heatmap": using.heatmap,
    "segment": using.segment,
    "search": using.search,
    "demo": using.demo,
    "interpolate": measuring.interpolate,
    "export": models.export,
    "inspect": models.inspect,
    "push": models.push,
    "study": training.study,
    "recipes": training.list_recipes,
}


def main(argv: list[str] | None = None) -> None:
    """Run one verb. A user error ends with one sentence on stderr and status 2, a guard's stop with 1."""
    args = sys.argv[1:] if argv is None else argv
    if not args or args[0] in ("-h", "--help", "help"):
        print(OVERVIEW.format(verbs=training.table({n: (f.__doc__ or "").split("\n")[0] for n, f in VERBS.items()})))
        return
    if args[0] == "--version":
        from silc import __version__

        print(f"silc {__version__}")
        return
    if args[0] not in VERBS:
        _fail(f"no verb {args[0]!r}." + nearest(args[0], VERBS), 2)
    try:
        VERBS[args[0]](args[1:])
        sys.stdout.flush()
    except ValueError as error:
        _fail(str(error), 2)
    except Halt as error:
        _fail(str(error), 1)
    except Stopped as error:
        _fail(str(error), 75)
    except KeyboardInterrupt:
        _fail("interrupted.", 130)
    except OSError as error:
        if isinstance(error, BrokenPipeError):
            _end_where_nobody_reads()
        _fail(f"{error.strerror or error}: {error.filename or ''}".rstrip(": "), 1)


def _end_where_nobody_reads() -> None:
    """As `silc ... | head`, which closes what it reads from once it has enough: end without a word. Return where it was
    another pipe that broke."""
    try:
        os.write(sys.stdout.fileno(), b"\n")
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # nor a word of the interpreter's as it ends
        raise SystemExit(141) from None


def _fail(message: str, status: int) -> Any:
    print(f"silc: {message}", file=sys.stderr)
    raise SystemExit(status)
