"""Pairs: every layout with real files, damaged data, the keyed order, and mixtures.

Gives: tests of silc.data.pairs, tables, shards and store.
Used by: pytest.
"""

import io
import json
import os
import pickle
import tarfile
from collections import Counter

import fsspec
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from silc.config import DataConfig
from silc.data import shards as shards_module
from silc.data.images import BadSample, decode
from silc.data.pairs import Mixture, Source, open_source, shuffled
from silc.data.shards import Shards, scan
from silc.data.store import Packer, expand

CFG = DataConfig()


@pytest.fixture(autouse=True)
def cache(tmp_path_factory, monkeypatch):
    folder = tmp_path_factory.mktemp("cache")
    monkeypatch.setenv("SILC_CACHE", str(folder))
    return folder


def jpeg(value: int, side: int = 8, kind: str = "JPEG") -> bytes:
    out = io.BytesIO()
    Image.new("RGB", (side, side), (value, 255 - value, 7)).save(out, kind)
    return out.getvalue()


def tar_bytes(members: list[tuple[str, bytes]]) -> bytes:
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w") as tar:
        for name, data in members:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return out.getvalue()


def content(source: Source) -> dict[str, tuple[bytes, list[str]]]:
    rows = [source.read(i) for i in range(len(source))]
    assert [ident for _, _, ident in rows] == [source.ident(i) for i in range(len(source))]
    assert [captions for _, captions, _ in rows] == [source.captions(i) for i in range(len(source))]
    return {ident: (data, captions) for data, captions, ident in rows}


def cause(source: Source, index: int) -> str:
    with pytest.raises(BadSample) as caught:
        source.read(index)
    return caught.value.cause


def images(folder, names):
    for number, name in enumerate(names):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(jpeg(number))


# ---------------------------------------------------------------- tables and folders


ROWS = [("a.jpg", "one"), ("sub/b.jpg", "two, with comma"), ("a.jpg", "uno"), ("c.jpg", "drei ü")]
WANT = {"a.jpg": (0, ["one", "uno"]), "sub/b.jpg": (1, ["two, with comma"]), "c.jpg": (2, ["drei ü"])}


def write_table(path, image="image", text="caption"):
    if path.suffix == ".parquet":
        pa = pytest.importorskip("pyarrow")
        import pyarrow.parquet as pq

        pq.write_table(pa.table({image: [r[0] for r in ROWS], text: [r[1] for r in ROWS], "n": range(4)}), path)
    elif path.suffix == ".jsonl":
        path.write_text("\n".join(json.dumps({image: a, text: b}) for a, b in ROWS) + "\n\n", encoding="utf-8")
    else:
        mark = "\t" if path.suffix == ".tsv" else ","
        lines = [mark.join((a, f'"{b}"')) for a, b in [(image, text), *ROWS]]
        path.write_text("\n".join(lines), encoding="utf-8-sig")


@pytest.mark.parametrize("suffix", [".csv", ".tsv", ".jsonl", ".parquet"])
def test_tables_give_images_with_all_their_captions(tmp_path, suffix):
    images(tmp_path, WANT)
    want = {name: (jpeg(number), captions) for name, (number, captions) in WANT.items()}
    write_table(tmp_path / f"any{suffix}")
    assert content(open_source(str(tmp_path / f"any{suffix}"), CFG)) == want
    write_table(tmp_path / f"metadata{suffix}", "file_name", "text")
    assert content(open_source(f"file://{tmp_path}", CFG)) == want
    (tmp_path / f"metadata{suffix}").unlink()
    write_table(tmp_path / f"captions{suffix}", "i", "c")
    assert content(open_source(str(tmp_path), DataConfig(image_key="i", text_key="c"))) == want


def test_lists_of_captions(tmp_path):
    pa = pytest.importorskip("pyarrow")
    import pyarrow.parquet as pq

    images(tmp_path, ["a.jpg", "b.jpg"])
    want = {"a.jpg": (jpeg(0), ["x", "y"]), "b.jpg": (jpeg(1), ["z"])}
    rows = {"image": ["a.jpg", "b.jpg"], "caption": [["x", " y ", ""], ["z"]]}
    pq.write_table(pa.table(rows), tmp_path / "t.parquet")
    assert content(open_source(str(tmp_path / "t.parquet"), CFG)) == want
    (tmp_path / "t.jsonl").write_text('{"image": "a.jpg", "caption": ["x", "y"]}\n{"image": "b.jpg", "caption": "z"}')
    assert content(open_source(str(tmp_path / "t.jsonl"), CFG)) == want
    (tmp_path / "t.csv").write_text('image,caption\na.jpg,"[""x"", ""y""]"\nb.jpg,z\n')
    assert content(open_source(str(tmp_path / "t.csv"), CFG)) == want


def test_folder_of_images_with_texts(tmp_path):
    images(tmp_path, ["x/1.JPG", "x/2.png", "y/1.webp", "y/lone.jpg", ".hidden.jpg"])
    for name in ("x/1", "x/2", "y/1", "other"):
        (tmp_path / f"{name}.txt").write_text(f"about {name}\n")
    source = open_source(str(tmp_path), CFG)
    idents = [source.ident(i) for i in range(len(source))]
    assert idents == ["x/1.JPG", "x/2.png", "y/1.webp", "y/lone.jpg"]
    assert source.read(2) == (jpeg(2), ["about y/1"], "y/1.webp")
    assert cause(source, 3) == "no caption"


def test_folders_are_listed_in_order(tmp_path):
    names = [f"{folder}/{name}.png" for folder in "qzmab" for name in (10, 2, 1)]
    images(tmp_path, names)
    (tmp_path / "q/1.txt").write_text("x")
    source = open_source(str(tmp_path), CFG)
    assert [source.ident(i) for i in range(len(source))] == sorted(names)


def test_rows_that_cannot_be_read(tmp_path):
    images(tmp_path, ["a.jpg"])
    rows = ['{"image": "a.jpg"}', '{"image": null, "caption": "x"}', '{"image": "gone.jpg", "caption": "x"}',
            '{"image": "https://example.com/a.jpg", "caption": "x"}', '{"image": "a.jpg/", "caption": 7}',
            '{"caption": "x", "image": "."}', '{"caption": "\\ud800ok", "image": "a.jpg"}']  # fmt: skip
    (tmp_path / "t.jsonl").write_text("\n".join(rows))
    source = open_source(str(tmp_path / "t.jsonl"), CFG)
    assert source.read(0)[1] == ["ok"]  # the first and the last row name one image; a lone surrogate is dropped
    got = [cause(source, i) for i in range(1, len(source))]
    assert got == ["no image", "missing file", "image is an address", "no caption", "missing file"]


# ---------------------------------------------------------------- tar shards


def shard(start: int, count: int, extra=()) -> bytes:
    members = []
    for i in range(start, start + count):
        meta = json.dumps({"caption": f"json {i}", "long": [f"long {i}", f"lang {i}"]}).encode()
        members += [(f"{i:05d}.jpg", jpeg(i)), (f"{i:05d}.json", meta), (f"{i:05d}.txt", f"text {i}".encode())]
    return tar_bytes([*members, *extra])


def test_tar_shards_with_brace_range(tmp_path):
    for number in range(3):
        (tmp_path / f"s-{number:04d}.tar").write_bytes(shard(10 * number, 2 + number))
    for location in (str(tmp_path / "s-{0000..0002}.tar"), str(tmp_path)):
        rows = content(open_source(location, CFG))
        assert len(rows) == 9 and rows["s-0002.tar:00023"] == (jpeg(23), ["text 23"])
    asked = open_source(str(tmp_path / "s-{0001..0001}.tar"), DataConfig(text_key="long"))
    assert asked.read(1) == (jpeg(11), ["long 11", "lang 11"], "s-0001.tar:00011")
    with pytest.raises(ValueError, match=r"s-0003.tar and 1 more of 5 shards does not exist"):
        open_source(str(tmp_path / "s-{0000..0004}.tar"), CFG)


def test_brace_ranges():
    assert expand("a/{8..10}-{01..02}.tar") == [f"a/{i}-{j}.tar" for i in (8, 9, 10) for j in ("01", "02")]
    assert expand("a/{x,y}.csv") == ["a/{x,y}.csv"]
    with pytest.raises(ValueError, match="backwards"):
        expand("{5..2}.tar")


class Trap:
    def __reduce__(self):
        return os.mkdir, (os.environ["SILC_TRAP"],)


def test_tar_members_that_are_not_pairs_are_never_read(tmp_path, monkeypatch):
    monkeypatch.setenv("SILC_TRAP", str(tmp_path / "sprung"))
    trap = pickle.dumps(Trap())
    extra = [("00000.pkl", trap), ("00000.pth", trap), ("00000.pyd", trap), ("00000.seg.png", jpeg(0, kind="PNG")),
             ("._00000.jpg", b"resource fork"), ("../../up.jpg", jpeg(5)), ("../../up.txt", b"up")]  # fmt: skip
    (tmp_path / "s.tar").write_bytes(shard(0, 2, extra))
    source = open_source(str(tmp_path / "s.tar"), CFG)
    assert isinstance(source, Shards) and source.ignored == 5
    assert len(content(source)) == 3 and not (tmp_path / "sprung").exists()
    assert os.listdir(tmp_path) == ["s.tar"]
    with pytest.raises(FileExistsError):  # the trap is a live one: unpickling it calls mkdir
        (tmp_path / "sprung").mkdir()
        pickle.loads(trap)


def test_tar_samples_that_lack_a_part(tmp_path):
    members = [("a.jpg", jpeg(1)), ("b.txt", b"lone"), ("c.jpg", jpeg(2)), ("c.json", b'{"caption": null}'),
               ("d.jpg", jpeg(3)), ("d.json", b"{broken"), ("e.jpg", jpeg(4)), ("e.txt", b" \n"),
               ("f/x.png", jpeg(5)), ("f/x.txt", b"ok"), ("g/x.png", jpeg(6)), ("g/x.txt", b"ok too"),
               ("h.txt", b"early"), ("i.jpg", b""), ("i.txt", b"empty"), ("h.jpg", jpeg(7))]  # fmt: skip
    (tmp_path / "s.tar").write_bytes(tar_bytes(members))
    source = open_source(str(tmp_path / "s.tar"), CFG)
    causes = [cause(source, i) for i in range(5)]
    assert causes == ["no caption", "no image", "no caption", "broken json", "no caption"]
    assert [source.read(i) for i in (5, 6, 7, 8)] == [
        (jpeg(5), ["ok"], "s.tar:f/x"), (jpeg(6), ["ok too"], "s.tar:g/x"),
        (jpeg(7), ["early"], "s.tar:h"), (b"", ["empty"], "s.tar:i"),
    ]  # fmt: skip
    assert "keys of the json: caption; looked for 'caption'" in source.found(2)


@given(cut=st.integers(0, 10240))
@settings(max_examples=60, deadline=None)
def test_truncated_tar_is_indexed_as_far_as_it_is_whole(cut):
    whole = tar_bytes([(f"{i}.{kind}", bytes([i]) * 300) for i in range(5) for kind in ("jpg", "txt")])
    index = scan(io.BytesIO(whole[:cut]), cut)
    sizes, offsets = index.ranges[:, :2, 1], index.ranges[:, :2, 0]
    members = min(cut // 1024, 10) if cut % 1024 < 512 + 300 else min(cut // 1024 + 1, 10)
    assert (sizes >= 0).sum() == members
    assert all((at + 300 <= cut) for at in offsets[sizes >= 0])
    assert (index.cause == "") == (cut >= 10 * 1024 + 512 or cut == 10240 + 512)


def test_truncated_shard_is_remembered_and_forged_headers_end(tmp_path):
    (tmp_path / "s-0.tar").write_bytes(shard(0, 3))
    (tmp_path / "s-1.tar").write_bytes(shard(3, 3)[:5000])
    (tmp_path / "s-2.tar").write_bytes(b"<html>" * 1000)
    source = open_source(str(tmp_path / "s-{0..2}.tar"), CFG)
    assert [source.ident(i) for i in range(3)] == [f"s-0.tar:0000{i}" for i in range(3)]
    assert source.read(3) == (jpeg(3), ["text 3"], "s-1.tar:00003")
    assert len(source) == 5 and cause(source, 4) == "no caption"  # its image is whole, its texts are beyond the end
    assert [(item["id"].rpartition("/")[2], item["cause"]) for item in source.damage] == [
        ("s-1.tar", "truncated shard"),
        ("s-2.tar", "not a tar file"),
    ]
    bad = Mixture([source], (), 0).damage
    assert [item["position"] for item in bad] == [-1, -1] and bad[0]["source"] == source.name
    header = bytearray(tar_bytes([("a.jpg", b"x")])[:512])
    header[124:136] = b"\xff" * 12  # size -1 in base 256, which would send the reader backwards for ever
    header[148:156] = b" " * 8
    header[148:156] = b"%06o\0 " % sum(header)
    forged = bytes(header) + bytes(2048)
    assert scan(io.BytesIO(forged), len(forged)).cause == "truncated shard"


def test_index_is_kept_and_renewed_when_the_shard_changes(tmp_path, cache, monkeypatch):
    path = tmp_path / "s.tar"
    path.write_bytes(shard(0, 2))
    first = content(open_source(str(path), CFG))
    kept = list(cache.rglob("*.npz"))
    assert len(kept) == 1
    with np.load(kept[0], allow_pickle=False) as arrays:
        assert arrays["ranges"].shape == (2, 3, 2)
    scans = []
    monkeypatch.setattr(shards_module, "scan", lambda *a: scans.append(1) or scan(*a))
    assert content(open_source(str(path), CFG)) == first and not scans
    kept[0].write_bytes(b"damaged cache")
    assert content(open_source(str(path), CFG)) == first and len(scans) == 1
    path.write_bytes(shard(5, 3))
    assert len(content(open_source(str(path), CFG))) == 3 and len(scans) == 2
    source = open_source(str(path), CFG)
    path.write_bytes(b"")  # emptied while in use
    assert cause(source, 0) == "truncated"


def test_remote_file_systems(tmp_path):
    fs = fsspec.filesystem("memory")
    for number in range(2):
        fs.pipe(f"/pairs/s-{number}.tar", shard(number, 1))
    fs.pipe("/table/img/a.jpg", jpeg(1))
    fs.pipe("/table/captions.csv", b"image,caption\nimg/a.jpg,one\nmemory://table/img/a.jpg,two\n/etc/passwd,three\n")
    fs.pipe("/loose/x/a.png", jpeg(3))
    fs.pipe("/loose/x/a.txt", b"loose")
    want = {"s-0.tar:00000": (jpeg(0), ["text 0"]), "s-1.tar:00001": (jpeg(1), ["text 1"])}
    assert content(open_source("memory://pairs/s-{0..1}.tar", CFG)) == want
    assert content(open_source("memory://pairs", CFG)) == want
    for location in ("memory://table", "memory://table/captions.csv"):
        table = open_source(location, CFG)
        assert table.read(0)[0] == table.read(1)[0] == jpeg(1)
        assert cause(table, 2) == "missing file"  # looked for below the table, not on this machine
    assert content(open_source("memory://loose", CFG)) == {"x/a.png": (jpeg(3), ["loose"])}
    with pytest.raises(ValueError, match="memory://nothing does not"):
        open_source("memory://nothing", CFG)


def test_remote_reads_are_tried_again(monkeypatch):
    fs = fsspec.filesystem("memory")
    fs.pipe("/flaky/s.tar", shard(0, 1))
    source, tries, read = open_source("memory://flaky/s.tar", CFG), [], type(fs).cat_file
    monkeypatch.setattr("silc.data.store.time.sleep", lambda seconds: None)

    def flaky(self, *args, fails=2, **kwargs):
        tries.append(1)
        if len(tries) <= fails:
            raise RuntimeError("503 slow down")
        return read(self, *args, **kwargs)

    monkeypatch.setattr(type(fs), "cat_file", flaky)
    assert source.read(0) == (jpeg(0), ["text 0"], "s.tar:00000") and len(tries) == 3
    tries.clear()
    monkeypatch.setattr(type(fs), "cat_file", lambda self, *a, **k: flaky(self, *a, fails=9, **k))
    assert cause(source, 0) == "unreadable file" and len(tries) == 3


def test_long_indexing_tells_its_progress(tmp_path, monkeypatch, capsys):
    for number in range(5):
        (tmp_path / f"{number}.tar").write_bytes(shard(number, 1))
    open_source(str(tmp_path), CFG)
    assert capsys.readouterr().err == ""
    clock = iter(range(0, 100, 1))
    monkeypatch.setattr(shards_module.time, "monotonic", lambda: next(clock))
    shards_module.index_shards([str(tmp_path / f"{number}.tar") for number in range(5)])
    assert capsys.readouterr().err == "indexing shards (once): 3/5\n"


# ---------------------------------------------------------------- one clear sentence


def test_locations_that_cannot_be_opened(tmp_path):
    images(tmp_path, ["bare/a.jpg", "two/a.jpg", "ok/a.jpg"])
    (tmp_path / "empty").mkdir()
    for name in ("captions.csv", "captions.jsonl"):
        (tmp_path / "two" / name).write_text("")
    files = {
        "keys.csv": "file,text\na.jpg,x\n", "none.csv": "image,caption\na.jpg,\n", "head.csv": "image,caption\n",
        "void.csv": "", "list.jsonl": "[1]\n", "web.csv": "image,caption\nhttp://x.org/a.jpg,x\n", "a.tgz": "x",
        "bad.parquet": "x", "ok.tar": "", "latin.csv": b"image,caption\na.jpg,\xff\n",
    }  # fmt: skip
    for name, text in files.items():
        (tmp_path / name).write_bytes(text if isinstance(text, bytes) else text.encode())
    (tmp_path / "keys.tar").write_bytes(tar_bytes([("a.cls", b"1"), ("a.jpg", jpeg(1))]))
    (tmp_path / "text.tar").write_bytes(tar_bytes([("a.txt", b"1")]))
    wanted = {
        "empty": "no images, tables or tar shards in .*empty", "bare": "no captions in .*bare", "gone": "not exist",
        "gone.csv": "not exist", "gone.tar": "not exist", "two": "holds captions.csv and captions.jsonl",
        "keys.csv": "no column 'image'; it has: file, text.* --data.image-key .* --data.text-key",
        "none.csv": "no captions in .*empty in all 1 rows", "head.csv": "no rows", "void.csv": "no column 'image'",
        "list.jsonl": "line 1 is no JSON object", "web.csv": "by address.*does not download", "a.tgz": "unpack",
        "bad.parquet": "not a Parquet file", "ok.tar": "no image in .*not a tar file", "latin.csv": "not UTF-8",
        "keys.tar": "no caption in .*found: cls, jpg; expected an image", "text.tar": "no image in .*found: txt",
        "x-{1..2}.csv": "range in braces",
    }  # fmt: skip
    for name, message in wanted.items():
        with pytest.raises(ValueError, match=message) as caught:
            open_source(str(tmp_path / name), CFG)
        assert type(caught.value) is ValueError and "\n" not in str(caught.value)
    for location in ("nonsense://x/y.tar", ""):
        with pytest.raises(ValueError, match=r"^data: "):
            open_source(location, CFG)


def test_shell_is_refused(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for location in ("pipe:touch x", "a.tar::PIPE:touch x", "x.tar; touch x", "$(touch x).tar", "`touch x`", "a|b"):
        with pytest.raises(ValueError, match="looks like a shell command; silc runs none"):
            open_source(location, CFG)
    assert not list(tmp_path.iterdir())


def test_parquet_of_embedded_images_is_explained(tmp_path):
    pa = pytest.importorskip("pyarrow")
    import pyarrow.parquet as pq

    table = {"image": [{"bytes": b"x", "path": "a.jpg"}], "caption": ["x"]}
    pq.write_table(pa.table(table), tmp_path / "t.parquet")
    with pytest.raises(ValueError, match="holds images, not paths"):
        open_source(str(tmp_path / "t.parquet"), CFG)


@given(st.lists(st.text(st.characters()), max_size=20))
def test_packed_strings(items):
    packed = Packer(items).strings()
    assert list(packed) == items and len(packed) == len(items)


# ---------------------------------------------------------------- order and mixture


@given(n=st.integers(1, 3000), seed=st.integers(-(2**70), 2**70), epoch=st.integers(0, 2**30))
@settings(max_examples=60, deadline=None)
def test_every_epoch_is_a_permutation(n, seed, epoch):
    got = shuffled(np.arange(epoch * n, (epoch + 1) * n), n, seed)
    assert np.array_equal(np.sort(got), np.arange(n))
    assert [shuffled(epoch * n + i, n, seed) for i in range(min(n, 20))] == got[:20].tolist()
    if n > 20:
        other = shuffled(np.arange((epoch + 1) * n, (epoch + 2) * n), n, seed)
        reseeded = shuffled(np.arange(epoch * n, (epoch + 1) * n), n, seed + 1)
        assert not np.array_equal(got, other) and not np.array_equal(got, reseeded)


def test_order_looks_random():
    n = 1000
    orders = np.stack([shuffled(np.arange(n), n, seed) for seed in range(400)])
    counts = np.bincount(orders[:, 17] // 100, minlength=10)  # where the 18th sample goes: uniform over tenths
    assert ((counts - 40) ** 2 / 40).sum() < 30  # chi-square with 9 degrees of freedom: p about 4e-4
    correlation = np.corrcoef(orders[0], np.arange(n))[0, 1], np.corrcoef(orders[0], orders[1])[0, 1]
    assert max(map(abs, correlation)) < 0.15
    assert abs(np.mean(np.diff(orders[0]) > 0) - 0.5) < 0.06


class Numbers(Source):
    """n samples whose bytes are their index; those in `broken` are bad."""

    def __init__(self, name, n, broken=()):
        self.name, self.n, self.broken, self.damage = name, n, set(broken), []

    def __len__(self):
        return self.n

    def ident(self, index):
        return f"{self.name}{index}"

    def captions(self, index):
        if index in self.broken:
            raise BadSample("no caption")
        return [self.ident(index)]

    def read(self, index):
        return str(index).encode(), self.captions(index), self.ident(index)

    def found(self, index):
        return "members found: jpg; expected txt"


def test_without_weights_every_sample_once_a_pass():
    mixture = Mixture([Numbers("a", 3), Numbers("b", 50), Numbers("c", 7)], (), 4)
    places = [(s, i) for s, n in enumerate((3, 50, 7)) for i in range(n)]
    for turn in range(3):
        got = [mixture.locate(turn * 60 + p) for p in range(60)]
        assert sorted(got) == places and got != places
    assert sorted(mixture.captions(100)) == sorted(f"{'abc'[s]}{i}" for s, i in places)


@given(
    weights=st.lists(st.floats(0.01, 100), min_size=1, max_size=5),
    first=st.integers(0, 2**30),
)
@settings(max_examples=30, deadline=None)
def test_shares_are_exact_in_every_block_and_in_the_long_run(weights, first):
    mixture = Mixture([Numbers(str(i), 10) for i in range(len(weights))], weights, 1)
    wanted = np.array(weights) / sum(weights)
    counts = np.array([mixture._counts(k) for k in range(first, first + 4)])
    assert (counts.sum(1) == np.arange(first, first + 4) * mixture.block).all()
    assert np.abs(counts - wanted * counts.sum(1, keepdims=True)).max() < 1 + mixture.block * (first + 4) * 2**-39
    assert (np.diff(counts, axis=0) >= 0).all()
    if mixture.block == 1024:
        got = Counter(mixture.locate(first * 1024 + p)[0] for p in range(1024))
        assert [got[s] for s in range(len(weights))] == (counts[1] - counts[0]).tolist()


def test_weighted_sources_go_through_all_their_samples():
    mixture = Mixture([Numbers("a", 30), Numbers("b", 1000)], (1, 3), 2)
    got = [mixture.locate(p) for p in range(4096)]
    small = [i for s, i in got if s == 0]
    assert len(small) == 1024 and set(Counter(small).values()) <= {34, 35}
    assert len({i for s, i in got[:1024] if s == 1}) == 768
    runs = np.count_nonzero(np.diff([s for s, _ in got]))
    assert runs == pytest.approx(2 * 0.25 * 0.75 * 4096, rel=0.1)  # sources are interleaved as if at random


def test_bad_samples_are_replaced_the_same_way_every_time():
    broken = range(0, 40, 2)
    sources = [Numbers("a", 40, broken), Numbers("b", 40)]
    mixture, again = Mixture(sources, (), 3), Mixture(sources, (), 3)
    bad = []
    for position in range(80):
        value, ident, items = mixture.read(position, lambda data, captions, ident: (int(data), captions[0]))
        assert value[1] == ident and ident not in {f"a{i}" for i in broken}
        assert all(item["position"] == position and item["source"] == "a" for item in items)
        bad += [(item["id"], item["cause"]) for item in items]
        if position % 7 == 0:
            assert again.read(position, lambda data, captions, ident: (int(data), captions[0])) == (value, ident, items)
    assert {f"a{i}" for i in broken} <= {ident for ident, _ in bad} and {c for _, c in bad} == {"no caption"}


def test_a_source_in_which_all_is_bad_is_explained():
    mixture = Mixture([Numbers("a", 10, range(10))], (), 0)
    with pytest.raises(ValueError, match=r"16 samples in a row .*: 16 x no caption; .*found: jpg; expected txt"):
        mixture.read(5, lambda data, captions, ident: data)


def test_mixture_refuses_senseless_weights():
    for weights, message in (((1.0, 2.0), "2 --data.weights for 1"), ((0.0,), "above 0"), ((float("nan"),), "above 0")):
        with pytest.raises(ValueError, match=message):
            Mixture([Numbers("a", 3)], weights, 0)
    with pytest.raises(ValueError, match="no pairs"):
        Mixture([], (), 0)


def test_unusable_pictures_are_told_apart(tmp_path):
    noise = np.random.default_rng(0).integers(0, 255, (64, 64, 3), np.uint8)
    out = io.BytesIO()
    Image.fromarray(noise).save(out, "JPEG")
    files = {"good": out.getvalue(), "short": out.getvalue()[:1500], "page": b"<!doctype html><p>404", "zero": b"",
             "vast": jpeg(1, 300)}  # fmt: skip
    members = [(f"{n}.{k}", d) for n, data in files.items() for k, d in (("jpg", data), ("txt", b"x"))]
    (tmp_path / "s.tar").write_bytes(tar_bytes(members))
    mixture = Mixture([open_source(str(tmp_path / "s.tar"), CFG)], (), 0)
    seen = {}
    for position in range(5):
        image, ident, bad = mixture.read(position, lambda data, captions, ident: decode(data, 10_000))
        assert ident == "s.tar:good" and image.shape == (3, 64, 64)
        seen.update({item["id"]: item["cause"] for item in bad})
    assert seen == {"s.tar:short": "truncated", "s.tar:page": "not an image", "s.tar:zero": "empty",
                    "s.tar:vast": "too large"}  # fmt: skip
