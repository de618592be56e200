"""From a model to a folder that another library opens: written, read back, compared, described; inspected; uploaded.

Gives: export, inspect, push.
Used by: the command line.
"""

from __future__ import annotations

import os
import shutil
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal, get_args

from silc.app import results
from silc.app.runs import read_run
from silc.data.tokenizer import Tokenizer
from silc.eval.protocols import protocol
from silc.eval.run import find_tasks
from silc.export import onnx, open_clip, transformers
from silc.export.card import Facts, card, unit
from silc.export.check import Peer, Row, compare, table
from silc.model.silc import Silc
from silc.opening import Opened, open_model, read_tensors
from silc.plain import read_json

Form = Literal["transformers", "open_clip", "onnx", "safetensors"]
PEERS: dict[str, Callable[[Path], Peer]] = {
    "transformers": transformers.peer, "open_clip": open_clip.peer, "onnx": onnx.peer,
}  # fmt: skip
MODEL_FILES = ("*.json", "*.safetensors", "*.onnx", "*.model", "*.txt", "README.md", "tokenizer/*")


def export(
    target: str, to: Form, out: Path, check: bool = True, tolerance: float = 1e-4, size: tuple[int, int] | None = None,
    scores: Path | None = None, licence: str | None = None,
) -> list[Row]:  # fmt: skip
    """Write the model `target` to the folder `out` as `to` reads it, whole and within `tolerance` or not at all.

    ValueError for a model that the library cannot express, a missing library, and differences above the tolerance."""
    if to not in get_args(Form):
        raise ValueError(f"--to {to}: there are {', '.join(get_args(Form))}.")
    if size is not None and to != "onnx":
        raise ValueError("--size is for --to onnx, whose graphs have a fixed size; elsewhere the model keeps its own.")
    out = out.resolve()  # a folder beside it must have a name, which `.` has not
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ValueError(f"{out} is not empty: choose another --out, or empty it.")
    opened = open_model(target)
    part = out.with_name(f".{out.name}.part")
    shutil.rmtree(part, ignore_errors=True)
    try:
        _write(opened, to, part, size)
        rows = _compared(opened.model, to, part, tolerance) if check else []
        if bad := [row.what for row in rows if not row.good]:
            raise ValueError(f"not exported: {to} differs from silc in {', '.join(bad)}.\n{table(rows)}".rstrip())
        (part / "README.md").write_text(card(opened.model, to, _facts(target, out.name, opened, scores, licence), rows))
        if out.exists():
            out.rmdir()
        os.replace(part, out)
    finally:
        shutil.rmtree(part, ignore_errors=True)
    return rows


def _write(opened: Opened, to: Form, folder: Path, size: tuple[int, int] | None) -> None:
    model = opened.model
    if model.catseg is not None and to != "safetensors":
        print(f"{to} has no CAT-Seg head: it is left out. (--to safetensors keeps it.)", file=sys.stderr)
    if to == "transformers":
        transformers.write(model, folder)
        if opened.library == "transformers" and opened.path.is_dir():
            transformers.copy_tokenizer(opened.path, folder)
    elif to == "open_clip":
        open_clip.write(model, folder)
    elif to == "onnx":
        onnx.write(model, folder, size)
    else:
        model.save(folder)
        if isinstance(model.tokenizer, Tokenizer):
            model.tokenizer.save(folder)


def _compared(model: Silc, to: Form, folder: Path, tolerance: float) -> list[Row]:
    if not isinstance(model.tokenizer, Tokenizer):
        raise ValueError("this model has no tokenizer, so its texts cannot be compared: export it with --no-check.")
    return compare(model, _silc_peer(folder) if to == "safetensors" else PEERS[to](folder), tolerance)


def _silc_peer(folder: Path) -> Peer:
    model = open_model(folder).model
    return Peer("silc", model.encode_image, model.encode_text,
                lambda pixels, texts: model.logits(model.encode_image(pixels), model.encode_text(texts)),
                model.encode_dense)  # fmt: skip


# ---------------------------------------------------------------- facts


def _facts(target: str, name: str, opened: Opened, scores: Path | None, licence: str | None) -> Facts:
    folder = opened.path
    began = read_json(folder / "init.json") if (folder / "init.json").is_file() else None
    if opened.library != "silc":
        began = {"model": target, "library": opened.library, "licence": opened.licence}
    config, found = None, []
    if (folder / "metrics.jsonl").is_file():
        config = read_json(folder / "config.json")
        for task, lines in read_run(name, folder).evals.items():
            # as the run scores: by the task's own settings, in which `auto` depends on the model
            usual = getattr(find_tasks()[task.partition("/")[0]].Config(), "protocol", "")
            usual = protocol(usual, model=opened.model).name if usual == "auto" else usual
            how = f"protocol {usual}, " if usual else ""
            how += f"at the end of the run, {lines[-1]['samples']:,} {unit(config)}"
            found += [(task, k, v, lines[-1]["chance"].get(k), how) for k, v in lines[-1]["metrics"].items()]
    if scores is not None:
        found = _scored(scores)
    return Facts(name, config, began, licence or (began or {}).get("licence"), found)


def _scored(folder: Path) -> list[tuple[str, str, float, float | None, str]]:
    """Of a folder that `silc eval --out` wrote."""
    rows = []
    for name, result in results.read(folder).sets.items():
        details = result["details"]
        how = [f"protocol {named}"] if (named := (details.get("protocol") or {}).get("name")) else []
        how += [f"{details['count']:,} pictures"] if details.get("count") else []
        rows += [(name, k, v, result["chance"].get(k), ", ".join(how)) for k, v in result["metrics"].items()]
    return rows


# ---------------------------------------------------------------- inspect


def inspect(target: str, check: bool, tolerance: float) -> tuple[str, bool]:
    """What a model is and how it came in; with `check`, beside the library that it is of. (text, do they agree?)"""
    opened = open_model(target)
    c, model, words = opened.model.config, opened.model, opened.model.tokenizer
    millions, licence = sum(p.numel() for p in model.parameters()) / 1e6, opened.licence or "not stated beside it"
    lines = [
        f"{target}: {opened.library}, {millions:.1f}M parameters, licence {licence}",
        f"image  {_line(c.image)}",
        f"text   {_line(c.text)}",
        f"pixels {_line(c.preprocess)}",
        f"words  {_line(words.rules) if isinstance(words, Tokenizer) else 'no tokenizer beside it'}",
        f"scale  {model.scale.item():.3f}" + ("" if model.bias is None else f", bias {model.bias.item():.3f}"),
        "",
        str(opened.report),
    ]
    if not check:
        return "\n".join(lines), True
    if not isinstance(words, Tokenizer):
        raise ValueError(f"--check compares texts too, and {target} came without its tokenizer.")
    with tempfile.TemporaryDirectory(prefix="silc-") as made:
        name, folder, beside = opened.library, opened.path, opened.library
        if name == "open_clip" and not folder.is_dir():
            open_clip.as_folder(opened.settings, read_tensors(folder), Path(made))
            transformers.copy_tokenizer(folder.parent, Path(made))
            folder = Path(made)
        elif name not in PEERS or not folder.is_dir():
            # a library without PyTorch classes, or a file alone: only transformers' layers can be asked
            name, folder, beside = "transformers", Path(made), "transformers, to which silc wrote the weights"
            transformers.write(model, folder)
        rows = compare(model, PEERS[name](folder), tolerance)
    return "\n".join([*lines, "", f"Beside {beside}:", "", table(rows)]), all(row.good for row in rows)


def _line(settings: Any) -> str:
    return ", ".join(f"{name} {value}" for name, value in vars(settings).items())


# ---------------------------------------------------------------- push


def push(folder: Path, name: str, private: bool) -> str:
    """Upload an export to the Hub; returns its address. ValueError unless it has a card that states a licence."""
    from huggingface_hub import HfApi

    text = (folder / "README.md").read_text() if (folder / "README.md").is_file() else ""
    if not text.startswith("---") or "\nlicense:" not in text:
        raise ValueError(f"{folder} has no model card with a licence: upload what `silc export` wrote.")
    if "\nlicense: other" in text:
        raise ValueError(f"the licence in {folder / 'README.md'} is `other`: state the one under which you may pass "
                         "the weights on, `silc export --licence apache-2.0`.")  # fmt: skip
    try:
        api = HfApi()
        api.create_repo(name, private=private, exist_ok=True)
        api.upload_folder(repo_id=name, folder_path=folder, allow_patterns=list(MODEL_FILES),
                          commit_message="Model exported by silc")  # fmt: skip
    except Exception as error:  # its own errors and those of three libraries below it
        raise ValueError(f"{name} could not be uploaded ({str(error).splitlines()[0]}).") from None
    return f"https://huggingface.co/{name}"


