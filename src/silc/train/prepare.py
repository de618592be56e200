"""Before the first step: is the folder free, what does the run begin with, and what do model and tokenizer decide?

Gives: check_folder, open_data, prepare -> Start, begun_with, decided, note_environment; by_name.
Used by: train/loop.py; app/planning.py, which must know the model too.
"""

from __future__ import annotations

import json
import shutil
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from silc import parallel
from silc.config import Config, DataConfig, InitConfig, ModelConfig
from silc.data.masked import MaskedCrops, open_masks
from silc.data.pairs import Mixture, open_source
from silc.data.tokenizer import Tokenizer, byte_tokenizer, load_tokenizer, train_tokenizer
from silc.opening import Opened, open_model
from silc.parallel import World
from silc.plain import load_json, save_json, to_dict
from silc.train.log import environment

FREE_TO_CHANGE = tuple(f"train.{name}" for name in ("threads", "shard", "save_every", "keep", "log_every"))
FREE_TO_CHANGE += ("data.workers", "log", "eval", "retention")
"""Settings under which a run may go on: they do not touch its arithmetic, but for the order of sums."""
DECIDED = ("out", "model.text.vocab", "model.text.eos_id", "model.text.pad_id")
"""Settings that a run decides itself."""
LEFT_OPEN = {"objective.kind": "auto", "views.global_size": 0, "views.local_size": 0}
"""Settings that it decides when they are asked for so."""
LOCAL_SHARE = 3 / 7
"""Side of a local view by a global one's: DINO's 96 of 224 px."""
TOKENIZER_CAPTIONS = 200_000


def check_folder(folder: Path, config: Config) -> None:
    """A new or empty folder, or one with this very run to resume. ValueError otherwise, naming what differs."""
    if not folder.exists() or not any(folder.iterdir()):
        return
    if not (folder / "config.json").exists():
        raise ValueError(f"{folder} is not empty and holds no silc run: choose another --out, or empty it.")
    if not _began(folder):
        return
    saved = by_name(to_dict(load_json(folder / "config.json", Config)))
    free = (*FREE_TO_CHANGE, "model") if config.init.model else FREE_TO_CHANGE
    differ = [
        f"{key} {saved[key]!r} -> {value!r}"
        for key, value in sorted(by_name(to_dict(config)).items())
        if saved.get(key) != value
        and key not in DECIDED
        and not (key in LEFT_OPEN and value == LEFT_OPEN[key])
        and not any(key == name or key.startswith(name + ".") for name in free)
    ]
    if differ:
        raise ValueError(
            f"{folder} holds a run with other settings ({'; '.join(differ[:4])}). "
            "To resume it repeat its settings; for a new run choose another --out."
        )


def _began(folder: Path) -> bool:
    """Was it more than a start that failed over its settings?"""
    return (folder / "metrics.jsonl").exists()


def by_name(data: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested settings by their dotted names, tuples as lists."""
    flat: dict[str, Any] = {}
    for key, value in data.items():
        name = prefix + key
        flat |= by_name(value, name + ".") if isinstance(value, dict) and value else {name: _plain(value)}
    return flat


def _plain(value: Any) -> Any:
    return [_plain(v) for v in value] if isinstance(value, (list, tuple)) else value


# ---------------------------------------------------------------- data


def open_data(config: Config, world: World) -> tuple[Mixture | MaskedCrops, Mixture | None]:
    """The stream of pairs, or of pictures with masks where a head for segmentation is to be trained, and that of
    pictures without captions if there is one. ValueError for what cannot work."""
    data, train = config.data, config.train
    for name, count in (("batch", train.batch), ("images", train.images)):
        if count % (world.size * train.accumulate):
            raise ValueError(
                f"--train.{name} {count} is not a multiple of {world.size} processes x "
                f"{train.accumulate} micro-batches."
            )
    if not data.sources:
        raise ValueError(
            "no training data: pass --data.sources with a folder, a .csv/.jsonl/.parquet file or tar shards "
            "(or try `silc quickstart`, which brings its own)."
        )
    if (train.images > 0) != bool(data.images):
        raise ValueError("--data.images and --train.images go together: the pictures, and how many of them a step.")
    if train.images and max(config.objective.distill.weight, config.objective.masked.weight) <= 0:
        raise ValueError("pictures without captions feed the teacher's terms, but this objective has none.")
    if config.model.catseg.layers:
        if train.images:
            raise ValueError("pictures without captions feed the teacher's terms; segmentation has none.")
        return open_masks(config), None
    with parallel.leader_first(world):  # the leader indexes shards once; the others read its index
        pairs = Mixture(_open(data.sources, data, True), data.weights, config.seed)
        # another seed: the two streams share no crops, orders or colours
        alone = Mixture(_open(data.images, data, False), (), config.seed + 1) if data.images else None
    return pairs, alone


def _open(locations: tuple[str, ...], data: DataConfig, captioned: bool) -> list[Any]:
    return [open_source(location, data, captioned) for location in locations]


# ---------------------------------------------------------------- model and tokenizer


class Start(NamedTuple):
    config: Config
    """With everything that model and tokenizer decide."""
    tokenizer: Tokenizer
    weights: dict[str, Tensor]
    """Of the model that the run begins with, by name; none where it begins with nothing or goes on."""


def prepare(config: Config, folder: Path, mixture: Mixture | MaskedCrops, world: World, resumes: bool) -> Start:
    """What the run begins with; config, tokenizer and where the weights came from are written down.

    A run that goes on needs nothing but its folder: what it began with may be gone by then."""
    opened = None
    if resumes:
        saved = load_json(folder / "config.json", Config)
        config = replace(config, model=saved.model, views=saved.views, objective=saved.objective)
    else:
        with parallel.leader_first(world):  # the leader downloads, where that is asked for
            opened = begun_with(config)
        config = decided(config, opened)
    if world.leads:
        _write(config, folder, mixture, opened)
    parallel.barrier(world)
    tokenizer = load_tokenizer(folder / "tokenizer", config.model.text.length)
    if not _has_text(opened) and not resumes:
        text = replace(
            config.model.text, vocab=tokenizer.vocab, eos_id=tokenizer.eos_id, pad_id=tokenizer.pad_id
        )
        config = replace(config, model=replace(config.model, text=text))
    if world.leads:
        save_json(folder / "config.json", config)
    weights = opened.model.state_dict() if opened else {}
    return Start(config, tokenizer, {name: weights[name] for name in (opened.report.loaded if opened else ())})


def _has_text(opened: Opened | None) -> bool:
    return opened is not None and any(name.startswith("text.") for name in opened.report.loaded)


def begun_with(config: Config) -> Opened | None:
    """The model that --init.model names, if any."""
    init = config.init
    if not init.model:
        return None
    return open_model(init.model, image_size=init.image_size or None, minimum=init.minimum)


def decided(config: Config, opened: Opened | None) -> Config:
    """The config with the opened model's architecture, and with what was left open."""
    model = config.model
    if opened is None and config.init != InitConfig():
        raise ValueError("this recipe goes on from a trained model: name it with --init.model.")
    if opened is not None:
        theirs = opened.model.config
        # small crops read the position table: without antialiasing they would train only a few of its cells
        image = replace(theirs.image, position_resize="bicubic-antialias")
        # a head goes on where both have one, is new where the recipe has one, and is left behind where it has none
        head = theirs.catseg if theirs.catseg.layers and model.catseg.layers else model.catseg
        if head.layers and not _has_text(opened):
            raise ValueError(f"{config.init.model} is an image tower alone: segmentation needs one for texts, too.")
        model = replace(theirs if _has_text(opened) else _beside(model, theirs), image=image, catseg=head)
    kind = config.objective.kind
    if kind == "auto":
        kind = "softmax" if model.bias_init is None else "sigmoid"
    v, patch = config.views, model.image.patch
    large = v.global_size or model.image.image_size
    small = v.local_size or max(1, round(LOCAL_SHARE * large / patch)) * patch
    for name, size in (("global", large), ("local", small)):
        if size % patch and (name == "global" or v.locals):
            raise ValueError(f"--views.{name}-size {size} is not a multiple of the patch of {patch} px.")
    views = replace(v, global_size=large, local_size=small)
    return replace(config, model=model, views=views, objective=replace(config.objective, kind=kind))


def _beside(own: ModelConfig, theirs: ModelConfig) -> ModelConfig:
    """An image tower that came alone, with the config's own new text tower."""
    return replace(own, preprocess=theirs.preprocess, embed_dim=theirs.embed_dim)


def _write(config: Config, folder: Path, mixture: Mixture | MaskedCrops, opened: Opened | None) -> None:
    """The tokenizer of the run (made once, then read), and where its weights came from."""
    kept = folder / "tokenizer"
    folder.mkdir(parents=True, exist_ok=True)
    if opened is not None:
        print(opened.report, file=sys.stderr)
        facts = {"model": config.init.model, "library": opened.library, "licence": opened.licence}
        (folder / "init.json").write_text(json.dumps(facts | {"path": str(opened.path)}, indent=2) + "\n")
    if kept.exists() and _began(folder):
        return
    shutil.rmtree(kept, ignore_errors=True)
    if opened is not None and _has_text(opened):
        tokenizer = opened.model.tokenizer
        if not isinstance(tokenizer, Tokenizer):
            if config.data.tokenizer == "train":
                raise ValueError(f"{config.init.model} came without its tokenizer: name the file, --data.tokenizer.")
            tokenizer = load_tokenizer(Path(config.data.tokenizer), config.model.text.length)
        if tokenizer.vocab > config.model.text.vocab:
            raise ValueError(f"the tokenizer has {tokenizer.vocab} tokens, the model {config.model.text.vocab}.")
        tokenizer.save(kept)
    else:
        _make_tokenizer(config, mixture).save(kept)


def _make_tokenizer(config: Config, mixture: Mixture | MaskedCrops) -> Tokenizer:
    asked, text = config.data.tokenizer, config.model.text
    if asked == "bytes":
        return byte_tokenizer(text.length)
    if asked != "train":
        return load_tokenizer(Path(asked), text.length)
    print("training a tokenizer on the captions ...", file=sys.stderr)
    return train_tokenizer(mixture.captions(TOKENIZER_CAPTIONS), text.vocab, text.length)


def note_environment(folder: Path, world: World, step: int) -> None:
    """Where the run was trained: env.json, to which each resumption adds itself."""
    path, facts = folder / "env.json", environment(sys.argv)
    facts |= {"processes": world.size, "device": str(world.device), "threads": torch.get_num_threads()}
    if step and path.exists():
        began = json.loads(path.read_text())
        facts = began | {"resumed": [*began.get("resumed", []), {"step": step} | facts]}
    path.write_text(json.dumps(facts, indent=2) + "\n")
