"""Every way in which a model comes in: runs and exports of silc, files and folders of other libraries, the Hub.

Gives: load (a model), open_model -> Opened (with its load report and where it came from).
Used by: the command line, train/prepare.py, app/*, anyone in Python. Settings and tokenizer come from the files,
weights through safetensors, `.npz` without objects or torch.load(weights_only=True); nothing is unpickled, and nothing
goes on the network but for a target that begins with `hf:`.
"""

from __future__ import annotations

import importlib.util
import re
import sys
import warnings
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from silc.config import ModelConfig
from silc.data.tokenizer import CLIP_VOCAB, Tokenizer, clip_tokenizer, load_tokenizer
from silc.model.big_vision import from_big_vision
from silc.model.detectron2 import from_catseg, is_catseg
from silc.model.layout import LoadReport, Place, at_size, fill
from silc.model.open_clip import from_open_clip
from silc.model.silc import CONFIG_NAME, WEIGHTS_NAME, Silc
from silc.model.timm import from_timm
from silc.model.weights import from_transformers
from silc.plain import from_dict, read_json

OPEN_CLIP_CONFIG = "open_clip_config.json"
WEIGHTS = (WEIGHTS_NAME, "pytorch_model.bin")
OPEN_CLIP_WEIGHTS = ("open_clip_model.safetensors", "open_clip_pytorch_model.bin")
PICKLES = (".pt", ".pth", ".bin", ".ckpt")
HUB_FILES = ["*.json", "*.safetensors", "*.model", "*.txt", "*.npz", "README.md"]
HUB_ID = re.compile(r"(?P<name>[\w.-]+/[\w.-]+)(@(?P<revision>[\w./-]+))?")
SMALL = Path(__file__).parent / "small"
"""The model that comes with silc: a toy of drawings and simple photographs. docs/experiments/small tells what it is."""
VOCABULARY = "bpe_simple_vocab_16e6.txt.gz"


@dataclass(frozen=True)
class Opened:
    """A model on the CPU, in eval mode, with its tokenizer, and how it came in."""

    model: Silc
    report: LoadReport
    library: str
    """silc, transformers, open_clip, timm, big_vision or catseg."""
    path: Path
    licence: str | None
    """As the model card beside the weights states it."""
    settings: dict[str, Any] = field(default_factory=dict)
    """What was read beside the tensors; empty where these tell all."""


@dataclass(frozen=True)
class NoTokenizer:
    """In the place of a tokenizer that did not come with the weights: says so when it is asked."""

    reason: str

    def __call__(self, texts: list[str]) -> Tensor:
        raise ValueError(self.reason)


def load(target: str | Path) -> Silc:
    """Open a model with its tokenizer, in eval mode on the CPU; a load report goes to stderr for another library's.

    `target`: the folder of a run or an export; a folder of transformers, open_clip or timm; a file of tensors with its
    settings beside it; a big_vision `.npz`; `hf:owner/name[@revision]`, which downloads, or `owner/name`, which looks
    in the local cache alone; `small`, the model that comes with silc. ValueError says in one sentence what is missing
    or does not fit.
    """
    opened = open_model(target)
    if opened.library != "silc":
        print(opened.report, file=sys.stderr)
    return opened.model


def open_model(target: str | Path, *, image_size: int | None = None, minimum: float = 0.9) -> Opened:
    """As `load`, with all that is known about it.

    `image_size`: build it for pictures of that size, the position table resized. `minimum`: share of the towers'
    tensors that must be found. ValueError, one sentence, which names the target.
    """
    path = _place(target)
    try:
        folder, settings, source = _described(path)
        model, report, library = _built(settings, source, folder, minimum, image_size)
        _attach_tokenizer(model, library, settings, folder)
    except ValueError as error:
        said = str(error)
        raise ValueError(said if said.startswith(str(path)) else f"{path}: {said}") from None
    return Opened(model.eval(), report, library, path, _licence(folder), settings)


# ---------------------------------------------------------------- where it is


def _place(target: str | Path) -> Path:
    """The file or folder; downloaded, or found in the Hub's cache, where the target is an id."""
    if isinstance(target, str) and target.startswith("hf:"):
        return _from_hub(target.removeprefix("hf:"), target, offline=False)
    if Path(target).exists():
        return Path(target)
    if target == SMALL.name and SMALL.exists():
        return SMALL
    if isinstance(target, str) and HUB_ID.fullmatch(target):
        return _from_hub(target, target, offline=True)
    raise ValueError(f"{target} does not exist: give the folder of a run or of an exported model, a file of weights, "
                     "hf:owner/name, or small, the model that comes with silc.")


def _from_hub(name: str, target: str, offline: bool) -> Path:
    from huggingface_hub import snapshot_download  # comes with tokenizers

    asked = HUB_ID.fullmatch(name)
    if not asked:
        raise ValueError(f"{target!r} is no id of the Hub: write hf:owner/name or hf:owner/name@revision.")
    get = partial(snapshot_download, asked["name"], revision=asked["revision"], local_files_only=offline)
    try:
        folder = Path(get(allow_patterns=HUB_FILES))
        if not offline and not any(folder.rglob("*.safetensors")) and not any(folder.rglob("*.npz")):
            folder = Path(get(allow_patterns=[*HUB_FILES, "*.bin", "*.pt"]))
    except Exception as error:  # its own errors and those of three libraries below it
        if offline:
            raise ValueError(f"{target} is neither here nor in the local cache of the Hub: write hf:{name} to download "
                             "it.") from None
        raise ValueError(f"{target} could not be downloaded ({str(error).splitlines()[0]}).") from None
    return folder


def _described(path: Path) -> tuple[Path, dict[str, Any], Path]:
    """(folder, settings, file of weights or folder of shards); big_vision's arrays are their own settings."""
    if path.is_dir():
        folder = _folder_of_model(path)
        return folder, *_in_folder(folder)
    if path.suffix == ".npz":
        return path.parent, {}, path
    if path.suffix not in (".safetensors", *PICKLES):
        raise ValueError(f"silc opens .safetensors, .npz, and of pickles {', '.join(PICKLES)} with tensors alone.")
    for name in (path.with_suffix(".json").name, CONFIG_NAME, OPEN_CLIP_CONFIG):
        if (path.parent / name).is_file():
            return path.parent, read_json(path.parent / name), path
    return path.parent, {}, path


def _folder_of_model(path: Path) -> Path:
    if (path / "state.json").is_file():
        raise ValueError("this is a checkpoint, from which training goes on: give the folder of its run.")
    if (path / "export").is_dir():
        return path / "export"
    if (path / "metrics.jsonl").exists():
        raise ValueError(f"the run {path} has no `export` folder yet: let it reach its end, or its first save.")
    return path


def _in_folder(folder: Path) -> tuple[dict[str, Any], Path]:
    config = read_json(folder / CONFIG_NAME) if (folder / CONFIG_NAME).is_file() else {}
    has = next((folder / n for n in WEIGHTS if (folder / n).is_file() or (folder / f"{n}.index.json").is_file()), None)
    if config and (has or not (folder / OPEN_CLIP_CONFIG).is_file()):
        if has is None:
            raise ValueError(f"there is no {WEIGHTS_NAME} in it.")
        return config, has
    if (folder / OPEN_CLIP_CONFIG).is_file():
        named = [folder / name for name in OPEN_CLIP_WEIGHTS if (folder / name).is_file()]
        others = [file for file in sorted(folder.iterdir()) if file.suffix in (".safetensors", *PICKLES)]
        if not named and len(others) != 1:
            raise ValueError(f"there is no {OPEN_CLIP_WEIGHTS[0]} in it.")
        return read_json(folder / OPEN_CLIP_CONFIG), (named or others)[0]
    arrays = sorted(folder.glob("*.npz"))
    if len(arrays) == 1:
        return {}, arrays[0]
    raise ValueError(f"{folder} holds no model: there is no {CONFIG_NAME} in it.")


def _licence(folder: Path) -> str | None:
    card = folder / "README.md"
    text = card.read_text(encoding="utf-8", errors="replace") if card.is_file() else ""
    front = text.split("---")[1] if text.startswith("---") else ""
    found = re.search(r"^license:\s*(\S+)", front, re.MULTILINE)
    return found[1] if found else None


# ---------------------------------------------------------------- tensors


def read_tensors(file: Path) -> dict[str, Tensor]:
    """The state dict in a file, in the shards that its index lists, or nested in a training checkpoint.

    ValueError for a damaged file, one that would run code, and one that holds several models of one size.
    """
    index = file.with_name(f"{file.name}.index.json")
    if index.is_file():
        # an index is data from elsewhere: it may name files beside it only
        names = sorted({Path(name).name for name in read_json(index).get("weight_map", {}).values()})
        return {key: tensor for name in names for key, tensor in read_tensors(file.with_name(name)).items()}
    if not file.is_file():
        raise ValueError(f"there is no {file.name} in it.")
    if file.suffix == ".safetensors":
        try:
            return load_file(file)
        except (SafetensorError, OSError) as error:
            raise ValueError(f"{file.name} is damaged ({error}).") from None
    try:
        with warnings.catch_warnings(action="ignore"):  # what it would say of a program, we say below
            found = torch.load(file, map_location="cpu", weights_only=True)
    except Exception as error:  # whatever a damaged or hostile file makes of it
        if "TorchScript" in str(error):
            raise ValueError(f"{file.name} is a TorchScript program, not tensors: save its state_dict() with the "
                             "library that wrote it.") from None
        raise ValueError(f"{file.name} is damaged or would run code when it is unpickled, so silc leaves it shut: save "
                         "its tensors alone, best as .safetensors, with the library that wrote it.") from None
    return _state_dict(found, file.name)


def _state_dict(found: Any, name: str) -> dict[str, Tensor]:
    """The largest mapping of names to tensors, at any depth of a checkpoint."""
    held: list[tuple[int, str, dict[str, Tensor]]] = []

    def look(value: Any, where: str) -> None:
        if isinstance(value, Mapping):
            tensors = {k: v for k, v in value.items() if isinstance(k, str) and isinstance(v, Tensor)}
            held.append((len(tensors), where, tensors))
            for key, inner in value.items():
                look(inner, f"{where}.{key}".strip("."))

    look(found, "")
    held.sort(key=lambda one: -one[0])
    if not held or not held[0][0]:
        raise ValueError(f"{name} holds no tensors by name.")
    if len(held) > 1 and held[1][0] == held[0][0]:
        raise ValueError(f"{name} holds several models, {held[0][1]!r} and {held[1][1]!r}: save the one to use in a "
                         "file of its own.")
    return held[0][2]


def _arrays(file: Path) -> dict[str, np.ndarray]:
    try:
        with np.load(file, allow_pickle=False) as held:
            return {name: held[name] for name in held.files}
    except Exception as error:  # a broken archive raises what its parts raise
        raise ValueError(f"{file.name} is damaged, or holds objects, which silc leaves shut ({error}).") from None


# ---------------------------------------------------------------- models


def _built(
    settings: dict[str, Any], source: Path, folder: Path, minimum: float, image_size: int | None
) -> tuple[Silc, LoadReport, str]:
    """The model that the settings describe, filled; which library it is of."""
    if source.suffix == ".npz":
        return *from_big_vision(_arrays(source), image_size=image_size, minimum=minimum), "big_vision"
    if settings.get("library") == "silc":
        return *_silc(settings, source, folder, image_size), "silc"
    tensors = read_tensors(source)
    if any(name.startswith("task.") for name in tensors):
        raise ValueError(f"{source.name} holds heads and teacher for going on with: give the folder that it lies in.")
    if is_catseg(tensors):
        if image_size is not None:
            raise ValueError("its head is built for one size of picture, which cannot be changed.")
        return *from_catseg(tensors, minimum), "catseg"
    if not settings:
        raise ValueError(
            "it holds tensors, which do not tell activation, heads, mean and std: put the settings beside it, as "
            f"{source.stem}.json or {CONFIG_NAME} (silc's, transformers' or timm's config) or {OPEN_CLIP_CONFIG} "
            '({"model_cfg": ..., "preprocess_cfg": ...}).'
        )
    if "model_type" in settings:
        stated = folder / "preprocessor_config.json"
        seen = read_json(stated) if stated.is_file() else None
        return *from_transformers(settings, tensors, seen, minimum, image_size), "transformers"
    if "model_cfg" in settings or "vision_cfg" in settings:
        whole = settings if "model_cfg" in settings else {"model_cfg": settings, "preprocess_cfg": {}}
        return *from_open_clip(whole, tensors, minimum, image_size), "open_clip"
    if "architecture" in settings:
        return *from_timm(settings, tensors, minimum, image_size), "timm"
    raise ValueError("its config is none of silc's, transformers' (model_type), open_clip's (model_cfg) or timm's "
                     "(architecture).")


def _silc(settings: dict[str, Any], source: Path, folder: Path, image_size: int | None) -> tuple[Silc, LoadReport]:
    if source.name == WEIGHTS_NAME:
        state: Mapping[str, Tensor] = (own := Silc.open(folder)).state_dict()
        config = own.config
    else:
        state, config = read_tensors(source), from_dict(ModelConfig, settings["model"])
    if any(name.startswith("task.") for name in state):
        raise ValueError(f"{source.name} holds heads and teacher for going on with: give the folder that it lies in.")
    model = Silc(at_size(config, image_size))
    # the table of positions as other libraries have it, the class token's first, so that it is resized like theirs
    table = [name for name in ("image.cls_position", "image.position") if name in state]
    tensors = {name: tensor for name, tensor in state.items() if name not in table}
    layout = {name: Place([name]) for name in model.state_dict() if name not in table}
    tensors["image.position"] = torch.cat([state[name].flatten(0, -2) for name in table])
    return model, fill(model, layout | {"image.position": Place(table)}, tensors, "silc", 1.0)


# ---------------------------------------------------------------- tokenizers


def _attach_tokenizer(model: Silc, library: str, settings: dict[str, Any], folder: Path) -> None:
    find = {"silc": _own, "transformers": _of_transformers, "open_clip": _of_open_clip, "catseg": _of_open_clip}
    find |= {"big_vision": _of_big_vision}
    if library == "timm":
        model.tokenizer = NoTokenizer(f"{folder} holds an image tower only: it has no embeddings of texts.")
        return
    tokenizer = find[library](model, settings, folder)
    if isinstance(tokenizer, Tokenizer) and tokenizer.vocab > model.config.text.vocab:
        raise ValueError(f"its tokenizer has {tokenizer.vocab} tokens, but the model only {model.config.text.vocab}; "
                         "they do not belong together.")
    model.tokenizer = tokenizer


def _own(model: Silc, settings: dict[str, Any], folder: Path) -> Tokenizer:
    return load_tokenizer(folder)


def _of_transformers(model: Silc, settings: dict[str, Any], folder: Path) -> Tokenizer:
    rules = folder / "tokenizer_config.json"
    named = str(read_json(rules).get("tokenizer_class", "")) if rules.is_file() else ""
    # the first SigLIP took punctuation away and padded with its end token; its vocabulary goes by this file name
    first = (named.startswith("Siglip") and not named.startswith("Siglip2")) or (folder / "spiece.model").is_file()
    text = model.config.text
    return load_tokenizer(
        folder, text.length, text.eos_id, text.eos_id if first else None, lowercase=True, punctuation=not first)


def _of_open_clip(model: Silc, settings: dict[str, Any], folder: Path) -> Tokenizer | NoTokenizer:
    text, said = model.config.text, settings.get("model_cfg", settings).get("text_cfg", {})
    clean = (said.get("tokenizer_kwargs") or {}).get("clean", "whitespace")
    own = not said.get("hf_tokenizer_name")  # CLIP's byte pairs, always in lower case and padded with zeros
    if any((folder / name).is_file() for name in ("tokenizer.json", "tokenizer.model", "spiece.model")):
        lower = own or clean in ("lower", "canonicalize")
        pad = 0 if own else None
        return load_tokenizer(folder, text.length, text.eos_id, pad, lower, clean != "canonicalize")
    if own and text.vocab >= CLIP_VOCAB:
        package = importlib.util.find_spec("open_clip")  # found, not imported
        installed = (package.submodule_search_locations or []) if package else []
        for place in (folder, *map(Path, installed)):
            if (place / VOCABULARY).is_file():
                return clip_tokenizer(place / VOCABULARY, text.length)
    wanted = f"tokenizer.json, or CLIP's {VOCABULARY}," if own else f"the tokenizer.json of {said['hf_tokenizer_name']}"
    return NoTokenizer(f"this model came without its tokenizer: put {wanted} into {folder}.")


def _of_big_vision(model: Silc, settings: dict[str, Any], folder: Path) -> Tokenizer | NoTokenizer:
    files = sorted(folder.glob("*.model"))
    if not files:
        return NoTokenizer(f"this model came without its tokenizer: put its SentencePiece .model into {folder}.")
    return load_tokenizer(files[0], model.config.text.length, 1, 1, lowercase=True, punctuation=False)
