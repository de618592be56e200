"""The larger drawn corpus: what is held out stays out, and what is built is what the readers open.

Gives: splits, near duplicates, licences, determinism, on drawings made here.
Used by: pytest. Skips where resvg is not installed.
"""

from __future__ import annotations

import json
import tarfile
import zipfile
from pathlib import Path

import pytest

from silc.data.vectors import HELD_STYLES, build, heldout, read
from silc.eval.run import evaluate
from silc.model.silc import Silc

COLOURS = ("crimson", "teal", "gold", "navy", "olive", "orchid", "beige", "salmon")
FORMS = {
    "disc": '<circle cx="50" cy="50" r="{r}" fill="{c}"/>',
    "box": '<rect x="10" y="10" width="{r}" height="80" fill="{c}"/>',
    "tent": '<path d="M5 95 L50 {r} L95 95 Z" fill="{c}"/>',
    "bar": '<rect x="5" y="35" width="90" height="{r}" fill="{c}"/>',
}
STYLES = ("plain", "bold", "thin", *HELD_STYLES)


def write(folder: Path) -> Path:
    """32 names in five styles, and rows that must not be taken."""
    rows = []
    for i, colour in enumerate(COLOURS):
        for j, (form, path) in enumerate(FORMS.items()):
            for k, style in enumerate(STYLES):
                # in the last style every drawing is that of the first once more
                svg = path.format(r=28 + 3 * (k % 4) + i, c=colour)
                row = {"style": style, "colour": True, "text": f"{colour} {form}", "lic": ("MIT", "CC0")[j % 2]}
                rows.append(row | {"svg": f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 100 100">{svg}</svg>'})
    good = rows[0]
    rows += [good | {"text": "grey thing", "colour": False}, good | {"text": "a sentence of far too many words"},
             good | {"text": "forbidden thing", "lic": "CC-BY-NC-4.0"}, good | {"text": "broken thing", "svg": "<svg"}]
    empty = '<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 9 9"/>'
    rows.append(good | {"text": "empty thing", "svg": empty})
    file = folder / "drawings.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return file


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory):  # type: ignore[no-untyped-def]
    pytest.importorskip("resvg_py", reason="resvg is not installed: pip install 'silc[quickstart]'")
    folder = tmp_path_factory.mktemp("vectors")
    return build(write(folder), folder / "cache", scenes=60, size=48, processes=1, say=lambda text: None)


def test_only_drawings_of_things_in_colour_under_free_licences_count(tmp_path: Path) -> None:
    drawings, licences = read(write(tmp_path), None)
    names = {name for name, *_ in drawings}
    assert {"crimson disc", "broken thing", "empty thing"} <= names
    assert not names & {"grey thing", "a sentence of far too many words", "forbidden thing"}
    assert set(licences) == {"MIT", "CC0"} and sum(licences.values()) == len(drawings)
    assert len({name for name, *_ in read(tmp_path / "drawings.jsonl", 5)[0]}) == 5
    (tmp_path / "bad.jsonl").write_text('{"text": 1}\n')
    for file, words in (("bad.jsonl", "no file of named drawings"), ("none.xz", "cannot be read")):
        with pytest.raises(ValueError, match=words):
            build(tmp_path / file, tmp_path / "cache", say=lambda text: None)


def test_training_scenes_hold_neither_held_out_names_nor_styles(corpus) -> None:  # type: ignore[no-untyped-def]
    seen = set()
    for shard in sorted((corpus.folder / "train").glob("*.tar")):
        with tarfile.open(shard) as held:
            for member in held:
                if member.name.endswith(".json"):
                    told = json.loads(held.extractfile(member).read())  # type: ignore[union-attr]
                    assert len(told["captions"]) >= 3
                    seen |= {tuple(one) for one in told["objects"]}
    assert len(seen) > 20
    assert not any(heldout(name) or style in HELD_STYLES for name, style in seen)
    assert not {"broken thing", "empty thing"} & {name for name, _ in seen}


def test_a_drawing_that_looks_like_one_for_training_is_not_evaluated(corpus) -> None:  # type: ignore[no-untyped-def]
    record = json.loads((corpus.folder / "corpus.json").read_text())
    names = [f"{colour} {form}" for colour in COLOURS for form in FORMS]
    assert record["rendered"] == len(names) * len(STYLES)
    # the second look of a held-out name is one too many as well, whichever style it is in
    assert record["near_duplicates_left_out"] >= len(names)
    with zipfile.ZipFile(next(corpus.folder.parent.glob("vectors-*.zip"))) as held:
        kept = {tuple(one) for one in json.loads(held.read("about.json"))["kept"]}
    assert all((name, HELD_STYLES[-1]) not in kept for name in names if not heldout(name))
    assert set(record["licences"]) == {"MIT", "CC0"}


def test_the_sets_open_and_chance_is_chance(corpus) -> None:  # type: ignore[no-untyped-def]
    from silc import recipes
    from silc.data.tokenizer import byte_tokenizer

    model = Silc(recipes.mu().model).eval()
    model.tokenizer = byte_tokenizer(16)
    results = evaluate(model, {name: str(folder) for name, folder in corpus.evals.items() if name != "segment/tuning"})
    known = {"zeroshot/style", "zeroshot/concepts", "fewshot/style", "retrieval/scenes", "segment/scenes"}
    assert set(results) <= known and {"zeroshot/style", "fewshot/style", "segment/scenes"} <= set(results)
    assert 1e-3 <= results["retrieval/scenes"].chance["text_to_image_r1"] < 1e-2  # some scenes share a caption
    assert corpus.evals["segment/tuning"] != corpus.evals["segment/scenes"]
    first, second = ((corpus.evals[f"segment/{n}"] / "images" / "0000.png").read_bytes() for n in ("tuning", "scenes"))
    assert first != second


def test_few_shot_learns_from_other_styles_than_it_is_asked_about(corpus) -> None:  # type: ignore[no-untyped-def]
    folder = corpus.evals["fewshot/style"]
    styles = {part: {p.stem for p in (folder / part).rglob("*.png")} for part in ("train", "test")}
    assert styles["train"] == set(STYLES) - set(HELD_STYLES) and styles["test"] == {HELD_STYLES[0]}
    classes = [sorted(p.name for p in (folder / part).iterdir() if p.is_dir()) for part in ("train", "test")]
    assert classes[0] == classes[1]


def test_a_head_learns_other_classes_than_it_is_asked_about(tmp_path: Path) -> None:
    from unittest.mock import patch

    pytest.importorskip("resvg_py", reason="resvg is not installed: pip install 'silc[quickstart]'")
    with patch("silc.data.vectors.SEGMENT_CLASSES", 6):
        made = build(write(tmp_path), tmp_path / "cache", scenes=20, size=48, processes=1, say=lambda text: None)
    learned, asked = (json.loads((made.evals[name] / "classes.json").read_text())["classes"]
                      for name in ("masks/train", "segment/scenes"))  # fmt: skip
    assert len(asked) == 6 and len(learned) > 6 and not {c[0] for c in learned} & {c[0] for c in asked}


def test_names_that_few_styles_draw_can_be_left_out(tmp_path: Path) -> None:
    file = write(tmp_path)
    everything = {name for name, *_ in read(file, None)[0]}
    rare = json.loads(file.read_text().splitlines()[0]) | {"text": "rare thing"}
    file.write_text(file.read_text() + json.dumps(rare) + "\n")
    assert "rare thing" in {name for name, *_ in read(file, None)[0]}
    assert {name for name, *_ in read(file, None, styles=3)[0]} == {n for n in everything if "thing" not in n}


def test_the_same_again_is_reused_and_rebuilt_alike(corpus, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    source = write(tmp_path)
    one = build(source, tmp_path / "cache", scenes=60, size=48, processes=1, say=lambda text: None)
    assert not one.reused
    files = [p.relative_to(one.folder) for p in sorted(one.folder.rglob("*.*")) if p.name != "corpus.json"]
    assert files and all((one.folder / f).read_bytes() == (corpus.folder / f).read_bytes() for f in files)
    assert build(source, tmp_path / "cache", scenes=60, size=48, processes=1, say=lambda text: None).reused
