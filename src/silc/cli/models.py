"""Verbs that look at a model, and take it elsewhere.

Gives: export, inspect, push.
Used by: the command line's table of verbs.
"""

from __future__ import annotations

from pathlib import Path
from typing import Literal

import tyro

from silc.train.guard import Halt


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
