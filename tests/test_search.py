"""`silc search` and silc.app.searching: the ranking, what is kept between runs, what goes wrong, the page.

Gives: tests of app/searching, app/index_file, app/search_command, and of the verb.
Used by: pytest. Real photographs skip where there are none; everything else is drawn here.
"""

from __future__ import annotations

import dataclasses
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import textwrap
import time
from collections.abc import Callable
from pathlib import Path
from urllib.parse import unquote_to_bytes

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import COLOURS, SHAPES, draw
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import Tensor

import silc
from silc.app import index_file, searching
from silc.app.searching import Hit, Index
from silc.cli import main
from silc.data.images import normalise, preprocess
from silc.predict import as_image

NAMES = sorted(f"{colour}/{shape}.png" for colour in COLOURS for shape in SHAPES)


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The user's cache is one of the test's own."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    return tmp_path / "xdg" / "silc" / "search"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Twelve drawings in four folders."""
    for i, name in enumerate(NAMES):
        (tmp_path / "photos" / name).parent.mkdir(parents=True, exist_ok=True)
        draw(*name.removesuffix(".png").split("/"), 15 * i).save(tmp_path / "photos" / name)
    return tmp_path / "photos"


class Watched(silc.model.silc.Silc):
    """The model that comes with silc; knows how many pictures it was shown."""

    seen: int
    stop_after: float

    def encode_image(self, pixels: Tensor) -> Tensor:
        if self.seen >= self.stop_after:
            raise KeyboardInterrupt
        self.seen += len(pixels)
        return super().encode_image(pixels)


@pytest.fixture
def model() -> Watched:
    found = silc.load("small")
    found.__class__ = Watched
    found.seen, found.stop_after = 0, float("inf")
    return found


def vector(model: silc.Silc, path: Path) -> Tensor:
    """[D] of one picture alone."""
    cfg = model.config.preprocess
    with torch.inference_mode():
        return model.encode_image(normalise(preprocess(as_image(path), cfg)[None], cfg.mean, cfg.std))[0].double()


def fails(args: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    """The one sentence of a command that ends with status 2."""
    with pytest.raises(SystemExit) as stopped:
        main(args)
    said = capsys.readouterr().err
    assert stopped.value.code == 2 and "Traceback" not in said
    assert said.startswith("silc: ") and said.count("\n") == 1, said
    return said


# ---------------------------------------------------------------- what is found


def ranks_as_alone(model: silc.Silc, index: Index, query: Tensor, hits: list[Hit], truth: dict[str, Tensor]) -> None:
    """Hits are the best of all pictures, each embedded alone; float16 features may swap what is nearer than 1e-4."""
    cosines = {path: float(F.normalize(query.double(), dim=0) @ one) for path, one in truth.items()}
    best = sorted(cosines, key=lambda path: (-cosines[path], path))
    assert len({hit.path for hit in hits}) == len(hits) == min(10, len(truth))
    for place, hit in enumerate(hits):
        assert hit.cosine == pytest.approx(cosines[hit.path], abs=1e-4)
        assert cosines[hit.path] == pytest.approx(cosines[best[place]], abs=2e-4)


def test_photographs_are_ranked_as_one_by_one(photographs: Path, tmp_path: Path, model: Watched) -> None:
    place = photographs / "caltech101" / "test"
    chosen = sorted(place.rglob("*.webp"))[::25]
    for path in chosen:
        (tmp_path / "photos" / path.relative_to(place)).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(path, tmp_path / "photos" / path.relative_to(place))
    index = Index.of(model, tmp_path / "photos", batch=32)
    assert list(index.paths) == sorted(str(path.relative_to(place)) for path in chosen) and len(chosen) > 60
    truth = {path: vector(model, index.root / path) for path in index.paths}
    texts = ["a butterfly", "an airplane", "a face", "Motorbikes", "something red"]
    for text in texts:
        with torch.inference_mode():
            ranks_as_alone(model, index, model.encode_text([text])[0], index.find(text), truth)
    assert len({index.find(text)[0].path for text in texts}) > 2
    for path in index.paths[::10]:
        hits = index.find(index.root / path)
        ranks_as_alone(model, index, truth[path], hits, truth)
        assert hits[0].path == path and hits[0].cosine > 0.9999
    assert re.search("airplane|motorbike|butterfly", " ".join(hit.path.lower() for t in texts for hit in index.find(t)))


def test_every_kind_of_query_and_several_at_once(folder: Path, model: Watched) -> None:
    index = Index.of(model, str(folder))
    truth = {name: vector(model, folder / name) for name in NAMES}
    own, other = folder / NAMES[4], folder / NAMES[7]
    array = np.array(Image.open(own).convert("RGB"))
    for query in (own, Image.open(own), array, torch.from_numpy(array).permute(2, 0, 1)):
        hits = index.find(query)
        assert hits[0].path == NAMES[4] and hits[0].cosine > 0.9999
        ranks_as_alone(model, index, truth[NAMES[4]], hits, truth)
    mixed = index.ask(index.vectors(["a red circle", other, "a tree"]), top=3)
    for hits, query in zip(mixed, ("a red circle", other, "a tree")):
        alone = index.find(query, top=3)
        assert [hit.path for hit in hits] == [hit.path for hit in alone]
        assert [hit.cosine for hit in hits] == pytest.approx([hit.cosine for hit in alone], abs=1e-6)
    assert mixed[0] != mixed[2] and mixed[1][0].path == NAMES[7]
    assert len(index.find("a tree", top=99)) == 12
    for wrong in ("", "  "):
        with pytest.raises(ValueError, match="empty"):
            index.find(wrong)
    with pytest.raises(ValueError, match="missing file"):
        index.find(folder / "none.png")
    with pytest.raises(ValueError, match="top must be 1"):
        index.find("a tree", top=0)
    with pytest.raises(ValueError, match=r"must be \[Q, 128\], not \[3\]"):
        index.ask(torch.ones(3))


def test_a_large_jpeg_is_read_at_a_fraction_of_its_size_and_means_the_same(tmp_path: Path, model: Watched) -> None:
    (tmp_path / "photos").mkdir()
    rng = np.random.default_rng(0)
    for i in range(6):
        smooth = Image.fromarray(rng.integers(0, 256, (6, 8, 3), dtype=np.uint8))
        smooth.resize((1600, 1200), Image.Resampling.BICUBIC).save(tmp_path / "photos" / f"{i}.jpg", quality=95)
    index = Index.of(model, tmp_path / "photos")
    assert searching._read(index.root / "0.jpg", 64).shape == (3, 150, 200)
    for row, path in enumerate(index.paths):
        assert index.features[row].double() @ vector(model, index.root / path) > 0.9995
        assert index.find(index.root / path)[0].path == path


def test_many_pictures_in_tiles_are_ranked_as_at_once(monkeypatch: pytest.MonkeyPatch, model: Watched) -> None:
    rng = torch.Generator().manual_seed(0)
    features = F.normalize(torch.randn(5003, 24, generator=rng), dim=1).half()
    queries = torch.randn(37, 24, generator=rng)
    paths = [f"{i:05d}.png" for i in range(5003)]
    monkeypatch.setattr(searching, "TILE", 500)
    found = Index(model, "", Path("/"), paths, features, {}).ask(queries, top=20)
    exact = F.normalize(features.double(), dim=1) @ F.normalize(queries.double(), dim=1).T
    for column, hits in enumerate(found):
        best = exact[:, column].argsort(descending=True)[:20]
        assert [hit.path for hit in hits] == [paths[i] for i in best]
        assert [hit.cosine for hit in hits] == pytest.approx(exact[best, column].tolist(), abs=1e-6)


@pytest.mark.parametrize("tile", [7, 64, 1 << 13])
def test_equal_pictures_stand_in_the_order_of_their_paths(
    tile: int, monkeypatch: pytest.MonkeyPatch, model: Watched
) -> None:
    rng = torch.Generator().manual_seed(1)
    few = F.normalize(torch.randn(3, 128, generator=rng), dim=1).half()
    features, paths = few[torch.arange(1001) % 3], [f"{i:04d}.png" for i in range(1001)]
    monkeypatch.setattr(searching, "TILE", tile)
    index = Index(model, "", Path("/"), paths, features, {})
    for which in range(3):
        hits = index.ask(few[which : which + 1].float(), top=340)[0]
        own = [int(hit.path[:4]) for hit in hits[:333]]
        assert own == list(range(which, 999, 3)), "a third of all, by path"


MEASURED = """
import resource, torch
from pathlib import Path
from silc.app.searching import Index

def peak():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024

features = torch.full((400_000, 256), 1 / 16, dtype=torch.float16)
index = Index(None, "", Path("/"), range(len(features)), features, {})
before = peak()
hits = index.ask(torch.ones(1, 256), top=5)[0]
assert [hit.path for hit in hits] == [0, 1, 2, 3, 4]
print((peak() - before) / (features.numel() * 2))
"""


@pytest.mark.slow
def test_a_query_needs_no_second_copy_of_the_features() -> None:
    """Nor where all pictures are equal, so that all are compared twice."""
    said = subprocess.run([sys.executable, "-c", MEASURED], check=True, stdout=subprocess.PIPE, text=True).stdout
    assert float(said) < 0.6


# ---------------------------------------------------------------- what is kept


def test_a_second_search_embeds_nothing_and_a_change_only_what_changed(
    folder: Path, cache: Path, model: Watched, capsys: pytest.CaptureFixture[str]
) -> None:
    before = {path: os.stat(path) for path in [folder, *folder.rglob("*")]}
    first = Index.of(model, folder)
    assert model.seen == 12 and [path.suffix for path in cache.iterdir()] == [".safetensors"]
    again = Index.of(model, folder)
    assert model.seen == 12 and torch.equal(first.features, again.features) and first.paths == again.paths
    after = {path: os.stat(path) for path in [folder, *folder.rglob("*")]}
    assert before.keys() == after.keys(), "nothing is written among the pictures"
    assert all(before[path].st_mtime_ns == after[path].st_mtime_ns for path in before)

    (folder / NAMES[0]).unlink()
    draw("blue", "circle", 7).save(folder / NAMES[5])
    draw("red", "square", 99).save(folder / "new.png")
    index = Index.of(model, folder)
    assert model.seen == 14, "one is new, one has changed"
    assert set(index.paths) == {*NAMES[1:], "new.png"} and list(index.paths) == sorted(index.paths)
    for path, row in zip(index.paths, index.features):
        assert row.double() @ vector(model, folder / path) > 0.9999, path
    model.seen = 0
    (folder / "new.png").unlink()
    Index.of(model, folder)
    for file in cache.iterdir():
        assert b"new.png" not in file.read_bytes(), "what is gone is dropped"
    stat = os.stat(folder / NAMES[3])
    os.utime(folder / NAMES[3], ns=(stat.st_atime_ns, stat.st_mtime_ns + 1))
    Index.of(model, folder)
    assert model.seen == 1 and len(list(cache.iterdir())) == 1 and capsys.readouterr().err == ""


def test_models_folders_and_caches_are_kept_apart(folder: Path, cache: Path, tmp_path: Path, model: Watched) -> None:
    whole = Index.of(model, folder)
    with torch.no_grad():
        model.image.proj.weight.mul_(torch.linspace(0.5, 1.5, model.image.proj.weight.shape[1]))
    changed = Index.of(model, folder)
    assert model.seen == 24 and not torch.equal(whole.features, changed.features)
    assert whole.fingerprint != changed.fingerprint
    cropped = dataclasses.replace(model.config.preprocess, resize="crop")
    model.config = dataclasses.replace(model.config, preprocess=cropped)
    Index.of(model, folder)
    assert model.seen == 36
    assert len(Index.of(model, folder / "red").paths) == 3 and model.seen == 39
    assert len(list(cache.iterdir())) == 4
    Index.of(model, folder, tmp_path / "elsewhere")
    assert model.seen == 51 and len(list(cache.iterdir())) == 4 and len(list((tmp_path / "elsewhere").iterdir())) == 1


def _short(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-40])


def _noise(path: Path) -> None:
    path.write_bytes(b"\xff" * 3000)


def _foreign(path: Path) -> None:
    save_file({"weight": torch.ones(3)}, path, {"library": "other"})


def _edited(**tensors: Tensor) -> Callable[[Path], None]:
    def edit(path: Path) -> None:
        with index_file.safe_open(path, "pt") as file:
            about = file.metadata()
        save_file({**load_file(path), **tensors}, path, about)

    return edit


DAMAGES = {
    "cut short": _short, "noise": _noise, "of another kind": _foreign, "empty": lambda path: path.write_bytes(b""),
    "too few features": _edited(features=torch.ones(11, 128).half()),
    "too few stamps": _edited(stamps=torch.ones(11, 2).long()),
    "offsets that run backwards": _edited(paths_at=torch.tensor([0, 9, 3, *range(20, 29), 5])),
    "offsets beyond the end": _edited(causes_at=torch.full((13,), 7)),
}  # fmt: skip


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_cache_is_made_anew_with_one_sentence(
    damage: str, folder: Path, cache: Path, model: Watched, capsys: pytest.CaptureFixture[str]
) -> None:
    first = Index.of(model, folder)
    (file,) = cache.iterdir()
    DAMAGES[damage](file)
    again = Index.of(model, folder)
    said = capsys.readouterr().err
    assert said.count("\n") == 1 and "embedded anew" in said and str(file) in said
    assert model.seen == 24 and torch.equal(first.features, again.features)
    Index.of(model, folder)
    assert model.seen == 24 and capsys.readouterr().err == ""


def test_where_nothing_can_be_kept_a_search_goes_on(
    folder: Path, tmp_path: Path, model: Watched, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(searching, "PATIENCE", 0.0)
    monkeypatch.setattr(searching, "SHARE", 0)
    (tmp_path / "file").write_text("in the way")
    index = Index.of(model, folder, tmp_path / "file" / "below", batch=4)
    said = capsys.readouterr().err
    assert len(index.paths) == 12 and said.count("cannot be kept") == 1, said


def test_an_interrupted_run_keeps_what_it_did(folder: Path, cache: Path, model: Watched) -> None:
    model.stop_after = 8
    with pytest.raises(KeyboardInterrupt):
        Index.of(model, folder, batch=4)
    model.stop_after = float("inf")
    index = Index.of(model, folder, batch=4)
    assert model.seen == 12 and len(index.paths) == 12
    for path, row in zip(index.paths, index.features):
        assert row.double() @ vector(model, folder / path) > 0.9999, path


KILLED = """
import os, signal, sys, torch, silc
from silc.app import searching
torch.set_num_threads(1)
searching.PATIENCE, searching.SHARE = 0.0, 0
model, seen = silc.load("small"), []
real = model.encode_image
def encode_image(pixels):
    if len(seen) == 2:
        os.kill(os.getpid(), signal.SIGKILL)
    seen.append(1)
    return real(pixels)
model.encode_image = encode_image
searching.Index.of(model, sys.argv[1], batch=4)
"""


def test_a_killed_run_keeps_what_it_wrote(folder: Path, cache: Path, model: Watched) -> None:
    dead = subprocess.run([sys.executable, "-c", textwrap.dedent(KILLED), str(folder)], check=False)
    assert dead.returncode == -signal.SIGKILL
    index = Index.of(model, folder, batch=4)
    assert model.seen == 4, "two batches of three were kept"
    for path, row in zip(index.paths, index.features):
        assert row.double() @ vector(model, folder / path) > 0.9999, path


def test_what_a_run_killed_in_writing_left_goes_after_a_while(folder: Path, cache: Path, model: Watched) -> None:
    Index.of(model, folder)
    (file,) = cache.iterdir()
    old, new = (file.with_suffix(f".{number}.part") for number in (1, 2))
    for part in (old, new):
        part.write_bytes(b"half")
    os.utime(old, (time.time() - 7200,) * 2)
    draw("red", "square", 99).save(folder / "new.png")
    Index.of(model, folder)
    assert set(cache.iterdir()) == {file, new}


# ---------------------------------------------------------------- pictures that cannot be read, links, names


def test_bad_pictures_are_told_counted_and_not_tried_again_until_they_change(
    folder: Path, model: Watched, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = (folder / NAMES[0]).read_bytes()
    (folder / "cut.png").write_bytes(whole[: len(whole) // 2])
    (folder / "page.jpg").write_text("<html>not found</html>")
    (folder / "empty.webp").write_bytes(b"")
    with (folder / "huge.jpeg").open("wb") as file:
        file.truncate(searching.MAX_BYTES + 1)
    (folder / "notes.txt").write_text("no picture, and not called one")
    index = Index.of(model, folder, batch=4)
    said = capsys.readouterr().err
    causes = {"cut.png": "truncated", "page.jpg": "not an image", "empty.webp": "empty", "huge.jpeg": "too large"}
    for name, cause in causes.items():
        assert said.count(f"{name} is left out: {cause}.") == 1
    assert "left out 4 of 16 pictures" in said and "1 truncated" in said and "notes" not in said
    assert index.bad == causes and list(index.paths) == NAMES
    assert all(torch.equal(a, b) for a, b in zip(index.features, Index.of(model, folder).features))

    capsys.readouterr()
    read: list[str] = []
    real = searching._read
    monkeypatch.setattr(searching, "_read", lambda path, size: (read.append(path.name), real(path, size))[1])
    again = Index.of(model, folder)
    assert again.bad == causes and not read
    assert capsys.readouterr().err == "left out 4 of 16 pictures: " + said.rpartition(": ")[2]
    (folder / "page.jpg").write_bytes(whole)
    assert "page.jpg" in Index.of(model, folder).paths and read == ["page.jpg"]
    for name in NAMES + ["page.jpg"]:
        (folder / name).unlink()
    with pytest.raises(ValueError, match="no picture that can be read"):
        Index.of(model, folder)


def test_a_picture_that_was_away_for_a_while_is_tried_again(folder: Path, tmp_path: Path, model: Watched) -> None:
    (folder / "link.png").symlink_to(tmp_path / "later.png")
    assert Index.of(model, folder).bad == {"link.png": "missing file"}
    assert Index.of(model, folder).bad == {"link.png": "missing file"}
    draw("red", "circle", 3).save(tmp_path / "later.png")
    model.seen = 0
    assert "link.png" in Index.of(model, folder).paths and model.seen == 1
    real = searching._read

    def locked(path: Path, size: int) -> Tensor:
        if path.name == "locked.png":
            raise searching.BadSample("unreadable file")
        return real(path, size)

    draw("red", "circle", 5).save(folder / "locked.png")
    draw("red", "circle", 6).save(folder / "new.png")  # so that something is written, and that not with it
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(searching, "_read", locked)
        assert Index.of(model, folder).bad == {"locked.png": "unreadable file"}
    assert not Index.of(model, folder).bad, "as a file whose permission was given since"


def test_links_loops_hidden_files_and_pipes(folder: Path, tmp_path: Path, model: Watched) -> None:
    (folder / "loop").symlink_to(folder)
    (tmp_path / "outside").mkdir()
    draw("red", "circle", 1).save(tmp_path / "outside" / "other.png")
    (folder / "away").symlink_to(tmp_path / "outside")
    (folder / "linked.PNG").symlink_to(tmp_path / "outside" / "other.png")
    (folder / ".thumbnails").mkdir()
    draw("red", "circle", 2).save(folder / ".thumbnails" / "small.png")
    draw("red", "circle", 2).save(folder / "._hidden.png")
    os.mkfifo(folder / "pipe.png")
    (tmp_path / "link").symlink_to(folder)
    index = Index.of(model, tmp_path / "link")
    assert sorted(index.paths) == sorted([*NAMES, "linked.PNG"]) and index.root == folder and not index.bad


def test_names_that_are_no_text_or_would_be_markup(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    odd = ["<script>alert(1)<", "a\nb.png", "x::y.png", '" onerror="alert(1).png', os.fsdecode(b"\xff.png"), "50%#.png"]
    (folder / odd[0]).mkdir()
    odd[0] += "/script>.png"
    for name in odd:
        draw("red", "circle", 90).save(folder / name)
    query, out = "<img src=x onerror=alert(2)>", tmp_path / "found"
    main(["search", str(folder), query, "--model", "small", "--top", "99", "--out", str(out)])
    said = capsys.readouterr().out
    assert len(said.splitlines()) == 1 + 18 + 1 and "\N{REPLACEMENT CHARACTER}.png" in said
    page = (out / "search.html").read_text()
    assert "<script" not in page and "onerror=alert(2)>" not in page and 'onerror="' not in page
    assert "&lt;img src=x onerror=alert(2)&gt;" in page and page.count("data:image/webp") == 18
    told = json.loads((out / "results.json").read_text())["queries"][0]
    assert {hit["path"] for hit in told["hits"]} == {*NAMES, *odd}
    links = re.findall(r'href="(\.\./[^"]*)"', page)
    assert {os.path.realpath(os.fsencode(out) + b"/" + unquote_to_bytes(link)) for link in links} == {
        os.fsencode(folder.resolve() / name) for name in [*NAMES, *odd]
    }


# ---------------------------------------------------------------- the command


def test_the_command_prints_tables_and_writes_page_and_json(
    folder: Path, tmp_path: Path, cache: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    picture, out = folder / NAMES[2], tmp_path / "found"
    (folder / "bad.png").write_bytes(b"none")
    args = ["search", str(folder), "a red circle", str(picture), "--model", "small", "--top", "4"]
    main(args)
    once = capsys.readouterr()
    main([*args, "--out", str(out)])
    again = capsys.readouterr()
    assert again.out.startswith(once.out) and "bad.png" in once.err and "bad.png is" not in again.err
    lines = once.out.splitlines()
    assert lines[0] == "a red circle" and lines[5] == str(picture) and len(lines) == 10
    index = Index.of(silc.load("small"), folder)
    for start, query in ((1, "a red circle"), (6, picture)):
        hits = index.find(query, top=4)
        assert lines[start : start + 4] == [f"  {hit.cosine:7.4f}  {folder / hit.path}" for hit in hits]
    told = json.loads((out / "results.json").read_text())
    assert told["pictures"] == 12 and told["left_out"] == {"not an image": 1} and told["folder"] == str(folder)
    assert [(one["query"], one["kind"]) for one in told["queries"]] == [
        ("a red circle", "words"), (str(picture), "picture"),
    ]  # fmt: skip
    assert told["queries"][1]["hits"][0] == {"path": NAMES[2], "cosine": pytest.approx(1, abs=1e-4)}
    page = (out / "search.html").read_text()
    assert "“a red circle”" in page and "1 not an image" in page and "prefers-color-scheme:dark" in page
    assert not re.search(r'(src|href)="(https?:)?//', page) and "<script" not in page
    assert len(list(cache.iterdir())) == 1


@pytest.mark.parametrize(
    ("args", "said"),
    [
        (["FOLDER"], "say what to look for"),
        (["FOLDER", " "], "a query is empty"),
        (["FOLDER", "a dog", "--top", "0"], "--top must be 1 or more"),
        (["FOLDER", "a dog", "--batch", "0"], "--batch must be 1 or more"),
        (["FOLDER/none", "a dog"], "FOLDER/none does not exist"),
        (["FOLDER/red", "none.jpg"], "none.jpg does not exist; with such an ending"),
        (["FOLDER/red/circle.png", "a dog"], "is a file: give the folder"),
        (["FOLDER/empty", "a dog"], "FOLDER/empty holds no pictures (jpg, jpeg, png, webp)"),
        (["FOLDER", "FOLDER/notes.txt"], "notes.txt cannot be read as a picture (not an image)"),
        (["FOLDER", "a dog", "--model", "none/such"], "none/such"),
    ],
)
def test_a_mistake_is_one_sentence(
    args: list[str], said: str, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (folder / "empty").mkdir()
    (folder / "notes.txt").write_text("no picture")
    args = [arg.replace("FOLDER", str(folder)) for arg in args]
    model = [] if "--model" in args else ["--model", "small"]
    assert said.replace("FOLDER", str(folder)) in fails(["search", *args, *model], capsys)


def test_words_may_be_the_name_of_a_file_without_an_ending(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "dog").write_text("no picture")
    main(["search", str(folder), "dog", "x" * 5000, "--model", "small", "--top", "1"])
    assert capsys.readouterr().out.startswith("dog\n")


def test_a_diverged_model_is_said_to_be_one(folder: Path, model: Watched, cache: Path) -> None:
    with torch.no_grad():
        model.image.proj.weight.fill_(torch.nan)
    with pytest.raises(ValueError, match="not finite"):
        Index.of(model, folder)
    assert not cache.exists()


def test_progress_tells_how_long_it_takes(
    folder: Path, model: Watched, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    real = searching.Progress
    monkeypatch.setattr(searching, "Progress", lambda label, total: real(label, total, patience=0.0))
    Index.of(model, folder, batch=4)
    said = capsys.readouterr().err
    assert "embed photos: 4/12 images" in said and "embed photos: 12/12 images" in said and "images/s" in said
