"""The model card: what a model is, what it was trained on, how good it is, what it is not for. Made of facts alone.

Gives: Facts, card, unit.
Used by: app/exporting, which collects the facts from the run.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from silc.export.check import Row, table
from silc.model.silc import Silc

USE = {
    "transformers": '''from transformers import AutoModel, AutoProcessor

model, processor = AutoModel.from_pretrained("{name}"), AutoProcessor.from_pretrained("{name}")
inputs = processor(text=["a dog", "a cat"], images=picture, padding="max_length", truncation=True,
                   return_tensors="pt")
scores = model(**inputs).logits_per_image''',
    "open_clip": '''import open_clip

model, _, preprocess = open_clip.create_model_and_transforms("local-dir:{name}")
tokenizer = open_clip.get_tokenizer("local-dir:{name}")
image, text = model.encode_image(preprocess(picture)[None]), model.encode_text(tokenizer(["a dog", "a cat"]))''',
    "onnx": '''import onnxruntime

image = onnxruntime.InferenceSession("{name}/image.onnx")       # pixels as silc.json says -> image_embedding, dense
embedding, dense = image.run(None, {{"pixels": pixels}})
text = onnxruntime.InferenceSession("{name}/text.onnx")         # ids of tokenizer/ -> text_embedding
words, = text.run(None, {{"ids": ids}})''',
    "safetensors": '''import silc

model = silc.load("{name}")
model.encode_image(pixels), model.encode_text(["a dog", "a cat"]), model.encode_dense(pixels)''',
}
SEGMENT = '''
silc.Predictor(model).segment("photo.jpg", ["road", "car", "tree"])     # [H, W], by its CAT-Seg head'''
TUNED = {"qv": "and the queries and values of both towers", "none": "alone", "all": "and both towers"}
LIBRARY = {"transformers": "transformers", "open_clip": "open_clip", "onnx": "onnx", "safetensors": "silc"}


@dataclass(frozen=True)
class Facts:
    """What is known of a model besides its weights; what is not is None or empty, and the card says so."""

    name: str
    config: dict[str, Any] | None = None
    """The run's config.json."""
    base: dict[str, Any] | None = None
    """The run's init.json: the model that it began with."""
    licence: str | None = None
    """Asked for, or that of the base."""
    scores: Sequence[tuple[str, str, float, float | None, str]] = field(default_factory=tuple)
    """Set, metric, score, chance, how: protocol, pictures."""


def card(model: Silc, to: str, facts: Facts, rows: Sequence[Row]) -> str:
    """Markdown with the Hub's front matter."""
    base, licence = (facts.base or {}).get("model"), facts.licence or "other"
    front = ["---", f"license: {licence}", f"library_name: {LIBRARY[to]}"]
    front += ["pipeline_tag: zero-shot-image-classification", "tags: [silc, clip, image-text, dense-features]"]
    if base and str(base).startswith("hf:"):
        front.append(f"base_model: {str(base).removeprefix('hf:').partition('@')[0]}")
    parts = [
        "\n".join([*front, "---"]),
        f"# {facts.name}",
        _what(model),
        "## Use\n\n```python\n" + USE[to].format(name=facts.name) + (SEGMENT if headed(model, to) else "") + "\n```",
        "## Training\n\n" + "\n".join(f"- {line}" for line in _training(facts)),
        "## Scores\n\n" + _scores(facts),
        "## Limits\n\n" + "\n".join(f"- {line}" for line in _limits(model, to, facts)),
    ]
    if rows:
        said = f"## Agreement with silc\n\nThis export, opened by {to}, beside the model that it was made from:\n\n"
        parts.append(said + table(list(rows)).strip())
    return "\n\n".join(parts) + "\n"


def headed(model: Silc, to: str) -> bool:
    """Is there a CAT-Seg head in the export? Only silc's own form has room for one."""
    return model.catseg is not None and to == "safetensors"


def unit(config: dict[str, Any]) -> str:
    """What a run counts as its samples."""
    return "crops with masks" if config["model"].get("catseg", {}).get("layers") else "pairs"


def _what(model: Silc) -> str:
    c, millions = model.config, sum(p.numel() for p in model.parameters()) / 1e6
    kind = {"map": "attention pooling", "cls": "a class token", "mean": "mean pooling"}[c.image.pool]
    return (
        f"An image tower and a text tower in one space of {c.embed_dim} numbers, {millions:.1f}M parameters in all. "
        f"Pictures: {c.image.image_size} px in patches of {c.image.patch}, {c.image.depth} blocks of width "
        f"{c.image.width}, {kind}; {c.preprocess.resize}, {c.preprocess.interpolation}. Texts: up to {c.text.length} "
        f"tokens, {c.text.depth} blocks of width {c.text.width}. Every patch can be read in the space of the text."
        + (" It was trained with a CAT-Seg head, which segments by any words." if model.catseg is not None else "")
    )


def _training(facts: Facts) -> list[str]:
    base, c = facts.base, facts.config
    began = ["Began with: nothing known." if c is None else "Began with random weights."]
    if base:
        said = base.get("licence") or "not stated beside them: look it up before you pass these on"
        began = [f"Began with: `{base.get('model')}` ({base.get('library')}); licence of those weights: {said}."]
    if c is None:
        return [*began, "Data, objective and length: not recorded in what was exported."]
    o, t = c["objective"], c["train"]
    if unit(c) == "pairs":
        terms = [f"{o['kind']} contrast x {o['contrast']['weight']:g}"]
        terms += [f"{n} x {o[n]['weight']:g}" for n in ("distill", "masked", "anchor") if o.get(n, {}).get("weight")]
    else:
        terms = [f"binary cross-entropy of every class at every pixel, of the head {TUNED[c['segment']['tune']]}"]
    steps = max(1, t["samples"] // t["batch"])
    data = ", ".join(f"`{source.rsplit('/', 2)[-1]}`" for source in c["data"]["sources"])
    return [
        *began,
        f"Recipe `{c['recipe']}`: {' + '.join(terms)}.",
        f"{steps * t['batch']:,} {unit(c)} in {steps:,} steps of {t['batch']:,}, seed {c['seed']}.",
        f"Data: {data or 'not recorded'}. Its licence is not known to silc.",
    ]


def _scores(facts: Facts) -> str:
    if not facts.scores:
        return "None recorded: run `silc eval` and export with `--scores`."
    lines = ["| set | metric | score | chance | how |", "|---|---|---:|---:|---|"]
    for name, metric, value, chance, how in facts.scores:
        level = "" if chance is None else f"{100 * chance:.1f}"
        lines.append(f"| {name} | {metric} | {100 * value:.1f} | {level} | {how} |")
    return "\n".join(lines)


def _limits(model: Silc, to: str, facts: Facts) -> list[str]:
    sets = {name.partition("/")[0] for name, *_ in facts.scores}
    missing = [task for task in ("zeroshot", "retrieval", "segment") if task not in sets]
    limits = [f"Texts beyond {model.config.text.length} tokens are cut; languages of the captions are not recorded."]
    if model.catseg is not None and not headed(model, to):
        limits.append("The model's CAT-Seg head is not in this form of it; scores that need it are of the whole model.")
    if missing:
        limits.append(f"Not scored here: {', '.join(missing)}.")
    limits.append("Not examined for bias, for faces, or for any use in which a wrong answer does harm.")
    return limits
