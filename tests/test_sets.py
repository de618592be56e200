"""Readers of published sets, each on a tiny tree in the very layout in which the set is distributed."""

from __future__ import annotations

import io
import json
import re
import struct
import tarfile
import zlib
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

import silc
from silc.data.labelled import Labelled, Masked, open_captioned, open_classification, open_masked
from silc.data.sets import names as names_module
from silc.data.sets.mat import read_matrix
from silc.data.sets.names import class_list, colours

GRID = Sequence[Sequence[int]]


def jpeg(path: Path, value: int = 100, height: int = 2, width: int = 3) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.full((height, width, 3), value, np.uint8)).save(path, format="JPEG", quality=95)
    return path


def grid(path: Path, values: GRID, kind: type[np.generic] = np.uint8) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.array(values, kind)).save(path)
    return path


def write(path: Path, content: Any) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(content if isinstance(content, str) else json.dumps(content))
    return path


def message(action: Callable[[], Any]) -> str:
    with pytest.raises(ValueError) as error:
        action()
    text = str(error.value)
    assert "\n" not in text and text[-1] in ".?" and "Traceback" not in text
    return text


def first(data: Labelled | Masked) -> list[str]:
    return [group[0] for group in data.classes]


# ---------------------------------------------------------------- shipped lists

COUNTS = {
    "ade150": 150, "ade847": 847, "camvid": 11, "cityscapes": 19, "coco_stuff": 171, "context459": 459,
    "context59": 59, "imagenet": 1000, "voc20": 20,
}  # fmt: skip


@pytest.mark.parametrize("name", COUNTS)
def test_shipped_lists_have_the_published_size_and_say_where_they_come_from(name: str) -> None:
    shipped = class_list(name)
    assert len(shipped.classes) == COUNTS[name] == len(shipped.palette)
    assert all(group and all(n and n == n.strip() for n in group) for group in shipped.classes)
    assert all(len(colour) == 3 and all(0 <= v < 256 for v in colour) for colour in shipped.palette)
    keys: list[Any] = shipped.ids or list(shipped.synsets)
    assert len(set(keys)) == len(keys) == COUNTS[name]
    raw = json.loads((names_module.FOLDER / f"{name}.json").read_text())
    assert raw["source"] and raw["licence"] and raw["about"]


def test_all_shipped_lists_are_tested_small_and_inside_the_package() -> None:
    assert {p.stem for p in names_module.FOLDER.iterdir()} == set(COUNTS)
    assert sum(p.stat().st_size for p in names_module.FOLDER.iterdir()) < 100_000
    assert Path(silc.__file__).parent in names_module.FOLDER.parents


def test_known_places_in_the_lists() -> None:
    """Facts that anybody can check against the sets' own documentation."""
    imagenet = class_list("imagenet")
    assert (imagenet.synsets[0], imagenet.classes[0]) == ("n01440764", ["tench"])
    assert (imagenet.synsets[999], imagenet.classes[999]) == ("n15075141", ["toilet paper"])
    assert imagenet.synsets == sorted(imagenet.synsets)
    assert dict(zip(class_list("cityscapes").ids, class_list("cityscapes").classes))[33] == ["bicycle"]
    stuff = dict(zip(class_list("coco_stuff").ids, class_list("coco_stuff").classes))
    assert stuff[0] == ["person"] and stuff[12] == ["stop sign"] and stuff[181] == ["wood"] and 11 not in stuff
    labels = [group[0] for group in class_list("context459").classes]
    context = class_list("context59")
    assert [labels[number - 1] for number in context.ids] == [group[0] for group in context.classes]
    assert class_list("ade847").classes[1] == ["building", "edifice"]


def test_voc_colours_are_the_published_ones_and_distinct_for_every_list() -> None:
    assert colours(20, 1) == class_list("voc20").palette and colours(1) == [[0, 0, 0]]
    assert len({tuple(colour) for colour in class_list("ade847").palette}) == 847


def test_a_missing_or_damaged_list_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert "no list of class names 'voc2'" in message(lambda: class_list("voc2"))
    monkeypatch.setattr(names_module, "FOLDER", tmp_path)
    write(tmp_path / "broken.json", '{"classes": ')
    assert "known are broken" in message(lambda: class_list("gone"))
    assert "broken.json is damaged" in message(lambda: class_list("broken"))


# ---------------------------------------------------------------- classification


def test_class_folders_divided_into_splits(tmp_path: Path) -> None:
    for split, count in (("train", 2), ("test", 1)):
        for name in ("b_c", "a"):
            for i in range(count):
                jpeg(tmp_path / split / name / f"{i}.jpg")
    write(tmp_path / "classes.txt", "b_c\na\tant\n")
    write(tmp_path / "templates.txt", "a {}.\n")
    data, train = open_classification(tmp_path), open_classification(tmp_path, "train")
    assert (data.name, data.split, len(data)) == (tmp_path.name, "test", 2)
    assert (train.split, len(train), train.labels) == ("train", 4, [0, 0, 1, 1])
    assert train.classes == [["b c"], ["ant"]] and train.templates == ["a {}."]
    alone = open_classification(tmp_path / "test", "test")
    assert (alone.name, alone.split, alone.classes) == (tmp_path.name, "test", train.classes)
    text = message(lambda: open_classification(tmp_path, "dev"))
    assert "no split 'dev'; it has: test, train." in text
    assert "not divided into splits, so it has no 'val'" in message(
        lambda: open_classification(tmp_path / "test", "val")
    )


def test_imagenet_folders_get_their_names_in_the_order_of_the_labels(tmp_path: Path) -> None:
    for synset in ("n15075141", "n01440764", "n01443537"):
        jpeg(tmp_path / "val" / synset / "ILSVRC2012_val_00000001.JPEG")
    data = open_classification(tmp_path, "validation")
    assert data.classes == [["tench"], ["goldfish"], ["toilet paper"]] and data.labels == [0, 1, 2]
    assert data.split == "val" and data.paths[2].parent.name == "n15075141"
    assert open_classification(tmp_path / "val").classes == data.classes
    jpeg(tmp_path / "val" / "n00000001" / "1.JPEG")
    assert "n00000001 is no synset of ImageNet-1k" in message(lambda: open_classification(tmp_path))
    write(tmp_path / "classes.txt", "n00000001\tsoap\nn01440764\nn01443537\nn15075141\n")
    assert open_classification(tmp_path).classes[0] == ["soap"]


def test_tables_of_images_and_labels(tmp_path: Path) -> None:
    for i in range(4):
        jpeg(tmp_path / "images" / f"{i}.jpg", value=10 * i)
    rows = [("0", "red_fox", "train"), ("1", "ant", "test"), ("2", "red_fox", "test"), ("3", "ant", "test")]
    table = write(
        tmp_path / "labels.csv", "image,label,split\n" + "".join(f"images/{i}.jpg,{c},{s}\n" for i, c, s in rows)
    )
    data = open_classification(tmp_path)
    assert (data.name, data.split, data.classes) == (tmp_path.name, "test", [["ant"], ["red fox"]])
    assert data.labels == [0, 1, 0] and abs(int(data.image(1).float().mean()) - 20) < 3
    assert open_classification(tmp_path / "labels.csv", "train").labels == [0]
    write(tmp_path / "classes.txt", "red_fox\tred fox, Vulpes\nbee\nant\n")
    assert open_classification(tmp_path).labels == [2, 0, 2]
    table.unlink()
    numbers = "".join(json.dumps({"image": f"images/{i}.jpg", "label": n}) + "\n" for i, n in ((0, 2), (3, 0)))
    write(tmp_path / "labels.jsonl", numbers)
    data = open_classification(tmp_path)
    assert data.labels == [2, 0] and data.classes[0] == ["red fox", "Vulpes"] and data.split == ""


@pytest.mark.parametrize(
    ("text", "classes", "words"),
    [
        ("image,lable\n0.jpg,x\n", None, "no column 'label'. Perhaps you meant 'lable'"),
        ("image,label\n", None, "has no rows"),
        ("image,label\n0.jpg,\n", None, "line 2: the row has no `label`"),
        ("image,label\n9.jpg,ant\n", None, "line 2: the image .*9.jpg does not exist"),
        ("image,label\n0.jpg,ants\n", "ant\nbee\n", "'ants' is not a class of classes.txt. Perhaps you meant 'ant'"),
        ("image,label\n0.jpg,2\n", "ant\nbee\n", "line 2: '2' is not a class of classes.txt"),
        ("image,label\n0.jpg,ant\n", "", "classes.txt names no class"),
        ("image,label\n0.jpg,a\n", "a\tant\nb\tAnt\n", "two classes are named 'Ant'"),
        ("image,label\n0.jpg,a_b\n0.jpg,a b\n", None, "two classes are named 'a b'"),
    ],
)
def test_mistakes_in_tables_of_labels(tmp_path: Path, text: str, classes: str | None, words: str) -> None:
    jpeg(tmp_path / "0.jpg")
    write(tmp_path / "labels.csv", text)
    if classes is not None:
        write(tmp_path / "classes.txt", classes)
    assert re.search(words, message(lambda: open_classification(tmp_path)))


# ---------------------------------------------------------------- CLIP_benchmark tars


def picture_bytes(value: int, kind: str) -> bytes:
    stream = io.BytesIO()
    Image.fromarray(np.full((2, 3, 3), value, np.uint8)).save(
        stream, format=kind, **({"lossless": True} if kind == "WEBP" else {})
    )
    return stream.getvalue()


def shard(path: Path, members: dict[str, bytes]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as tar:
        for name, data in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))


def wds(root: Path, texts: dict[str, list[list[str]]], kind: str) -> Path:
    """`texts`: for each split and shard the labels or captions; picture i of a split has the value 10 i."""
    for split, shards in texts.items():
        count = 0
        for number, items in enumerate(shards):
            members: dict[str, bytes] = {}
            for text in items:
                members[f"s{count:07d}.webp"] = picture_bytes(10 * count, "WEBP")
                members[f"s{count:07d}.{kind}"] = text.encode()
                count += 1
            shard(root / split / f"{number}.tar", members)
        write(root / split / "nshards.txt", f"{len(shards)}\n")
    return root


def test_clip_benchmark_classification(tmp_path: Path) -> None:
    root = wds(tmp_path / "wds_mini", {"train": [["0"]], "test": [["2", "0"], ["1"]]}, "cls")
    write(root / "classnames.txt", "tench\ngreat_white shark\nmissile\nmissile\n")
    write(root / "zeroshot_classification_templates.txt", "a photo of a {c}.\nthe {c}.\n")
    data = open_classification(root)
    assert (data.name, data.split, data.labels) == ("wds_mini", "test", [2, 0, 1])
    assert first(data) == ["tench", "great white shark", "missile", "missile"]
    assert data.templates == ["a photo of a {}.", "the {}."]
    assert [int(data.image(i)[0, 0, 0]) for i in (2, 0, 1)] == [20, 0, 10]
    assert data.ident(2).endswith("wds_mini/test/1.tar/s0000002") and data.paths[2].stem == "s0000002"
    assert open_classification(root, "train").labels == open_classification(root / "train").labels == [0]
    with ThreadPoolExecutor(8) as pool:
        values = list(pool.map(lambda i: int(data.image(i % 3)[0, 0, 0]), range(60)))
    assert values == [0, 10, 20] * 20


def test_clip_benchmark_retrieval(tmp_path: Path) -> None:
    root = wds(tmp_path, {"test": [["one\ntwo\n\n", "drei"]]}, "txt")
    write(root / "dataset_type.txt", "retrieval\n")
    data = open_captioned(root, "test")
    assert data.captions == [["one", "two"], ["drei"]] and data.image(1).shape == (3, 2, 3)
    assert "is a retrieval set of CLIP_benchmark, not one for classification" in message(
        lambda: open_classification(root)
    )


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda r: write(r / "test" / "nshards.txt", "2"), r"1\.tar does not exist, but nshards\.txt counts 2 shards"),
        (lambda r: write(r / "test" / "nshards.txt", "many"), "must hold the number of shards, not 'many'"),
        (lambda r: write(r / "classnames.txt", "\n"), "names no class"),
        (
            lambda r: write(r / "classnames.txt", "ant\n"),
            r"s0000000\.cls holds '1', but classnames\.txt names classes 0 to 0",
        ),
        (lambda r: write(r / "dataset_type.txt", "multilabel"), "is a multilabel set"),
        (lambda r: shard(r / "test" / "0.tar", {"a.txt": b"x"}), "tars without pictures"),
        (lambda r: shard(r / "test" / "0.tar", {"a.png": b"x"}), r"0\.tar/a has a picture but no \.cls"),
        (
            lambda r: (r / "test" / "0.tar").write_bytes((r / "test" / "0.tar").read_bytes()[:700]),
            "cannot be read as a tar",
        ),
        (lambda r: (r / "test" / "0.tar").write_bytes(b"no tar" * 200), "cannot be read as a tar"),
        (lambda r: write(r / "zeroshot_classification_templates.txt", "a photo"), r"exactly one \{\}"),
    ],
)
def test_mistakes_in_clip_benchmark_sets(tmp_path: Path, change: Callable[[Path], Any], words: str) -> None:
    root = wds(tmp_path, {"test": [["1", "0"]]}, "cls")
    write(root / "classnames.txt", "ant\nbee\n")
    change(root)
    assert re.search(words, message(lambda: open_classification(root)))


# ---------------------------------------------------------------- captions


def coco_captions(root: Path, images: str = "val2017") -> Path:
    for number in (7, 9, 11):
        jpeg(root / images / f"{number:012d}.jpg", value=10 * number)
    return write(root / "annotations" / "captions_val2017.json", {
        "info": {}, "licenses": [],
        "images": [{"id": n, "file_name": f"{n:012d}.jpg", "height": 2, "width": 3} for n in (9, 7, 11)],
        "annotations": [{"id": 1, "image_id": 7, "caption": "a dog\n"}, {"id": 2, "image_id": 9, "caption": "a cat"},
                        {"id": 3, "image_id": 7, "caption": "one dog"}],
    })  # fmt: skip


@pytest.mark.parametrize("images", ["val2017", "images/val2017", "images"])
def test_coco_captions(tmp_path: Path, images: str) -> None:
    file = coco_captions(tmp_path, images)
    for data in (open_captioned(tmp_path), open_captioned(file), open_captioned(tmp_path, "val")):
        assert data.captions == [["a cat"], ["a dog", "one dog"]] and data.split == "val2017"
        assert [p.name for p in data.paths] == ["000000000009.jpg", "000000000007.jpg"]
    assert abs(int(data.image(1)[0, 0, 0]) - 70) < 3


def test_mistakes_in_coco_captions(tmp_path: Path) -> None:
    file = coco_captions(tmp_path)
    assert "no split 'test'; it has: val2017" in message(lambda: open_captioned(tmp_path, "test"))
    data = json.loads(file.read_text())
    data["annotations"][0]["image_id"] = 5
    write(file, data)
    assert "a caption for image 5, which it does not list" in message(lambda: open_captioned(tmp_path))
    data["annotations"][0]["image_id"] = 7
    write(file, data)
    (tmp_path / "val2017" / "000000000007.jpg").unlink()
    assert "000000000007.jpg, which does not exist" in message(lambda: open_captioned(tmp_path))
    write(file, {**data, "annotations": []})
    assert "holds no captions" in message(lambda: open_captioned(tmp_path))
    write(file, {"images": []})
    assert "is no COCO caption file" in message(lambda: open_captioned(tmp_path))


def karpathy(*rows: tuple[str, str, str]) -> dict[str, Any]:
    made: list[dict[str, Any]] = []
    for i, (folder, name, split) in enumerate(rows):
        row = {"sentids": [i], "filename": name, "imgid": i, "split": split,
               "sentences": [{"tokens": [], "raw": f"{name} one", "imgid": i}, {"raw": f"{name} two "}]}  # fmt: skip
        made.append({"filepath": folder, **row} if folder else row)
    return {"images": made, "dataset": "coco" if rows[0][0] else "flickr30k"}


def test_karpathy_splits_of_coco_and_flickr(tmp_path: Path) -> None:
    rows = [("val2014", "a.jpg", "test"), ("train2014", "b.jpg", "restval"), ("val2014", "c.jpg", "val")]
    write(tmp_path / "coco" / "dataset_coco.json", karpathy(*rows))
    for folder, name, _ in rows:
        jpeg(tmp_path / "coco" / folder / name)
    data = open_captioned(tmp_path / "coco")
    assert (data.name, data.split, len(data)) == ("coco", "test", 1)
    assert data.captions == [["a.jpg one", "a.jpg two"]] and data.image(0).shape == (3, 2, 3)
    assert open_captioned(tmp_path / "coco", "restval").paths[0].parent.name == "train2014"
    write(tmp_path / "flickr" / "dataset_flickr30k.json", karpathy(("", "1.jpg", "train"), ("", "2.jpg", "test")))
    jpeg(tmp_path / "flickr" / "flickr30k-images" / "2.jpg")
    data = open_captioned(tmp_path / "flickr" / "dataset_flickr30k.json")
    assert (data.name, data.split, data.paths[0].name) == ("flickr30k", "test", "2.jpg")
    text = message(lambda: open_captioned(tmp_path / "flickr", "train"))
    assert re.search(r"names the image .*1\.jpg, which does not exist", text)
    assert "has no split 'dev'; it has: test, train" in message(lambda: open_captioned(tmp_path / "flickr", "dev"))
    write(tmp_path / "flickr" / "dataset_flickr30k.json", {"images": [{"sentences": []}]})
    assert "is no split file of Karpathy" in message(lambda: open_captioned(tmp_path / "flickr"))


def test_a_folder_with_two_kinds_of_captions_asks_which(tmp_path: Path) -> None:
    coco_captions(tmp_path)
    write(tmp_path / "dataset_coco.json", karpathy(("val2017", "000000000011.jpg", "test")))
    assert "can be read as coco or karpathy; say which" in message(lambda: open_captioned(tmp_path))
    assert open_captioned(tmp_path, kind="karpathy").captions == [["000000000011.jpg one", "000000000011.jpg two"]]
    assert len(open_captioned(tmp_path, kind="coco")) == 2
    assert "'koko' is no kind of pictures with captions; known are table" in message(
        lambda: open_captioned(tmp_path, kind="koko")
    )
    assert re.search(
        "not laid out as .* silc knows index: index.jsonl", message(lambda: open_captioned(tmp_path, kind="index"))
    )


def test_a_table_of_captions_with_splits(tmp_path: Path) -> None:
    jpeg(tmp_path / "a.jpg")
    write(tmp_path / "captions.csv", "image,caption,split\na.jpg,one,train\na.jpg,two,val\na.jpg,three,val\n")
    assert open_captioned(tmp_path).captions == [["two", "three"]]
    assert open_captioned(tmp_path, "train").captions == [["one"]]
    assert "it has: train, val" in message(lambda: open_captioned(tmp_path, "test"))


# ---------------------------------------------------------------- masks of one's own

LISTED = {"classes": ["sky", "sea"], "void": 255}


@pytest.mark.parametrize("inner", [False, True])
def test_pairs_divided_into_splits(tmp_path: Path, inner: bool) -> None:
    write(tmp_path / "classes.json", LISTED)
    for split in ("train", "val"):
        a, b = (f"images/{split}", f"masks/{split}") if inner else (f"{split}/images", f"{split}/masks")
        jpeg(tmp_path / a / f"{split}.jpg")
        grid(tmp_path / b / f"{split}.png", [[0, 1, 255], [1, 1, 0]])
    data = open_masked(tmp_path)
    assert (data.name, data.split, data.paths[0].name, data.void) == (tmp_path.name, "val", "val.jpg", 255)
    assert open_masked(tmp_path, "train").mask(0).tolist() == [[0, 1, 255], [1, 1, 0]]
    assert "has no split 'test'; it has: train, val" in message(lambda: open_masked(tmp_path, "test"))
    if not inner:
        assert open_masked(tmp_path / "train").split == "train"


def test_numbered_classes_leave_gaps_and_name_what_is_void(tmp_path: Path) -> None:
    write(tmp_path / "classes.json", {"0": "unlabeled", "13": ["stop sign", "sign"], "7": "train"})
    jpeg(tmp_path / "images" / "p.jpg")
    grid(tmp_path / "masks" / "p.png", [[0, 13, 7], [7, 0, 13]])
    data = open_masked(tmp_path)
    assert data.classes == [["train"], ["stop sign", "sign"]] and data.void == 255 and not data.background
    assert data.mask(0).tolist() == [[255, 1, 0], [0, 255, 1]] and len(data.palette or []) == 2
    grid(tmp_path / "masks" / "p.png", [[0, 13, 12], [7, 0, 13]])
    assert re.search(r"p\.png holds the value 12, but the set has 2 classes", message(lambda: data.mask(0)))
    write(tmp_path / "classes.json", {"0": "unlabeled"})
    assert "names no class" in message(lambda: open_masked(tmp_path))
    write(tmp_path / "classes.json", {"0": "sea", "1": "Sea"})
    assert "two classes are named 'Sea'" in message(lambda: open_masked(tmp_path))


def test_an_index_file_serves_captions_and_masks(tmp_path: Path) -> None:
    write(tmp_path / "classes.json", {"0": "unlabeled", "1": "person"})
    rows = [{"image": "images/0.jpg", "mask": "masks/0.png", "captions": [], "split": "train"},
            {"image": "images/1.jpg", "mask": "masks/1.png", "captions": ["a", "b"], "split": "val"},
            {"image": "images/2.jpg", "mask": "masks/2.png", "captions": ["c"], "split": "val"}]  # fmt: skip
    write(tmp_path / "index.jsonl", "".join(json.dumps(row) + "\n" for row in rows))
    for i in range(3):
        jpeg(tmp_path / f"images/{i}.jpg")
    grid(tmp_path / "masks" / "0.png", [[0, 1, 1], [0, 0, 0]])
    grid(tmp_path / "masks" / "1.png", [[1, 1, 1], [0, 0, 0]])
    captions = open_captioned(tmp_path)
    assert (captions.split, captions.captions, captions.name) == ("val", [["a", "b"], ["c"]], tmp_path.name)
    masks = open_masked(tmp_path)
    assert (masks.split, len(masks), masks.mask(0).tolist()) == ("val", 1, [[0, 0, 0], [255, 255, 255]])
    assert open_masked(tmp_path / "index.jsonl", "train").mask(0).tolist() == [[255, 0, 0], [255, 255, 255]]
    assert "has no split 'train'; it has: val" in message(lambda: open_captioned(tmp_path, "train"))
    (tmp_path / "images" / "1.jpg").unlink()
    assert re.search(r"images/1\.jpg.* does not exist", message(lambda: open_masked(tmp_path)))
    assert re.search(r"images/1\.jpg, which does not exist", message(lambda: open_captioned(tmp_path)))


def test_camvid_as_segnet_has_it(tmp_path: Path) -> None:
    for split in ("train", "val", "test"):
        grid(tmp_path / split / "0.png", np.zeros((1, 3, 3), np.uint8).tolist())
        grid(tmp_path / f"{split}annot" / "0.png", [[0, 10, 11]])
    data = open_masked(tmp_path)
    assert (data.name, data.split, len(data.classes), data.void) == ("camvid", "test", 11, 255)
    assert data.mask(0).tolist() == [[0, 10, 255]] and first(data)[10] == "bicyclist"
    (tmp_path / "val" / "0.png").unlink()
    assert re.search(r"valannot/0\.png has no picture", message(lambda: open_masked(tmp_path, "val")))


# ---------------------------------------------------------------- Pascal


def voc(root: Path, values: GRID) -> Path:
    jpeg(root / "JPEGImages" / "2007_000033.jpg")
    mask = Image.fromarray(np.array(values, np.uint8), mode="L")
    mask.putpalette([v for colour in colours(256) for v in colour])
    (root / "SegmentationClass").mkdir()
    mask.save(root / "SegmentationClass" / "2007_000033.png")
    for split in ("train", "val"):
        write(root / "ImageSets" / "Segmentation" / f"{split}.txt", "2007_000033\n")
    return root


def test_voc_with_and_without_background(tmp_path: Path) -> None:
    root = voc(tmp_path / "VOC2012", [[0, 1, 20], [255, 0, 15]])
    data = open_masked(root)
    assert (data.name, data.split, len(data.classes), data.background, data.void) == ("voc21", "val", 21, True, 255)
    assert data.mask(0).tolist() == [[0, 1, 20], [255, 0, 15]] and first(data)[:2] == ["background", "aeroplane"]
    assert data.palette is not None and data.palette[:2] == [[0, 0, 0], [128, 0, 0]]
    data = open_masked(root, "train", "voc20")
    assert (data.name, data.split, len(data.classes), data.background) == ("voc20", "train", 20, False)
    assert data.mask(0).tolist() == [[255, 0, 19], [255, 255, 14]] and data.classes[14] == ["person"]
    assert "has no split 'test'; it has: train, val" in message(lambda: open_masked(root, "test"))
    grid(root / "SegmentationClass" / "2007_000033.png", [[0, 1, 21], [255, 0, 15]])
    assert re.search("holds the value 21, but the set has 20 classes .*voc20", message(lambda: data.mask(0)))
    write(root / "ImageSets" / "Segmentation" / "val.txt", "2007_000042\n")
    assert re.search(r"lists 2007_000042, but .*2007_000042\.png does not exist", message(lambda: open_masked(root)))
    write(root / "ImageSets" / "Segmentation" / "val.txt", "")
    assert "lists no pictures" in message(lambda: open_masked(root))


def test_context_as_mmsegmentation_converts_it(tmp_path: Path) -> None:
    jpeg(tmp_path / "JPEGImages" / "2008_000002.jpg")
    grid(tmp_path / "SegmentationClassContext" / "2008_000002.png", [[0, 1, 59], [2, 0, 58]])
    write(tmp_path / "ImageSets" / "SegmentationContext" / "val.txt", "2008_000002\n")
    data = open_masked(tmp_path)
    assert (data.name, data.split, len(data.classes), data.background) == ("context60", "val", 60, True)
    assert data.mask(0).tolist() == [[0, 1, 59], [2, 0, 58]] and first(data)[59] == "wood"
    data = open_masked(tmp_path, kind="context59")
    assert (len(data.classes), data.background) == (59, False)
    assert data.mask(0).tolist() == [[255, 0, 58], [1, 255, 57]] and first(data)[58] == "wood"
    assert "holds no masks for context459; it has those for context60, context59" in message(
        lambda: open_masked(tmp_path, kind="context459")
    )


def test_context_as_detectron2_converts_it(tmp_path: Path) -> None:
    jpeg(tmp_path / "JPEGImages" / "2008_000002.jpg")
    jpeg(tmp_path / "JPEGImages" / "2008_000009.jpg")
    write(tmp_path / "pascalcontext_val.txt", "2008_000002\n2008_000007\n")
    grid(tmp_path / "annotations_detectron2" / "pc59_val" / "2008_000002.png", [[0, 58, 255], [1, 0, 0]])
    grid(tmp_path / "annotations_detectron2" / "pc459_val" / "2008_000002.tif", [[0, 458, 459], [255, 0, 0]], np.uint16)
    data = open_masked(tmp_path)
    assert (data.name, data.split, len(data)) == ("context59", "val", 1)
    assert data.mask(0).tolist() == [[0, 58, 255], [1, 0, 0]]
    data = open_masked(tmp_path, "val", "context459")
    assert (len(data.classes), data.void) == (459, 65535)
    assert data.mask(0).tolist() == [[0, 458, 65535], [255, 0, 0]] and first(data)[458] == "wool"


def matlab(path: Path, name: str, values: GRID, packed: bool = True) -> Path:
    """A MATLAB 5 file of one uint16 matrix, as MATLAB and SciPy write it."""
    array = np.array(values, np.uint16)

    def element(kind: int, body: bytes) -> bytes:
        if len(body) <= 4:
            return struct.pack("<HH", kind, len(body)) + body.ljust(4, b"\0")
        return struct.pack("<II", kind, len(body)) + body + bytes(-len(body) % 8)

    body = element(6, struct.pack("<II", 11, 0)) + element(5, struct.pack("<ii", *array.shape))
    body += element(1, name.encode()) + element(4, array.tobytes("F"))
    whole = struct.pack("<II", 14, len(body)) + body
    if packed:
        small = zlib.compress(whole)
        whole = struct.pack("<II", 15, len(small)) + small
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(b"MATLAB 5.0 MAT-file".ljust(124) + struct.pack("<HH", 0x0100, 0x4D49) + whole)
    return path


def test_context_as_published(tmp_path: Path) -> None:
    jpeg(tmp_path / "JPEGImages" / "2008_000002.jpg")
    matlab(tmp_path / "trainval" / "2008_000002.mat", "LabelMap", [[1, 2, 459], [458, 9, 431]])
    write(tmp_path / "pascalcontext_val.txt", "2008_000002\n")
    assert open_masked(tmp_path, kind="context459").mask(0).tolist() == [[0, 1, 458], [457, 8, 430]]
    data = open_masked(tmp_path, kind="context59")
    assert data.mask(0).tolist() == [[255, 0, 255], [58, 1, 255]] and first(data)[:2] == ["aeroplane", "bag"]
    data = open_masked(tmp_path)
    assert (data.name, data.split) == ("context60", "val") and data.mask(0).tolist() == [[0, 1, 0], [59, 2, 0]]


def test_matlab_files(tmp_path: Path) -> None:
    values = np.random.default_rng(0).integers(0, 460, (5, 7))
    for packed in (True, False):
        path = matlab(tmp_path / "a.mat", "LabelMap", values.tolist(), packed)
        assert (read_matrix(path, "LabelMap") == values).all()
    assert "holds LabelMap, not Other" in message(lambda: read_matrix(path, "Other"))
    path.write_bytes(path.read_bytes()[:-20])
    assert "it is truncated" in message(lambda: read_matrix(path, "LabelMap"))
    path.write_bytes(b"x" * 300)
    assert "not a MATLAB 5 file" in message(lambda: read_matrix(path, "LabelMap"))


def test_voc_and_context_in_one_folder_ask_which(tmp_path: Path) -> None:
    root = voc(tmp_path / "VOC2010", [[0, 1, 2], [0, 0, 0]])
    grid(root / "SegmentationClassContext" / "2007_000033.png", [[0, 1, 59], [2, 0, 58]])
    assert "can be read as voc21 or context60; say which" in message(lambda: open_masked(root))
    assert open_masked(root, kind="voc20").name == "voc20" and open_masked(root, kind="context60").name == "context60"


# ---------------------------------------------------------------- ADE20K, Cityscapes


def test_ade20k_150(tmp_path: Path) -> None:
    for split, stem in (("training", "ADE_train_00000001"), ("validation", "ADE_val_00000001")):
        jpeg(tmp_path / "images" / split / f"{stem}.jpg")
        grid(tmp_path / "annotations" / split / f"{stem}.png", [[0, 1, 150], [3, 0, 0]])
    data = open_masked(tmp_path)
    assert (data.name, data.split, len(data.classes), data.void) == ("ade150", "validation", 150, 255)
    assert data.mask(0).tolist() == [[255, 0, 149], [2, 255, 255]]
    assert first(data)[:3] == ["wall", "building", "sky"] and not data.background
    assert open_masked(tmp_path, "train").split == "training"
    grid(tmp_path / "annotations" / "validation" / "ADE_val_00000001.png", [[0, 1, 151], [3, 0, 0]])
    assert "holds the value 151" in message(lambda: data.mask(0))
    assert "has no split 'test'; it has: training, validation" in message(lambda: open_masked(tmp_path, "test"))
    (tmp_path / "annotations" / "validation").rename(tmp_path / "gone")
    grid(tmp_path / "annotations_detectron2" / "validation" / "ADE_val_00000001.png", [[0, 149, 255], [3, 0, 0]])
    assert open_masked(tmp_path).mask(0).tolist() == [[0, 149, 255], [3, 0, 0]]


def test_ade20k_847_as_published_and_as_converted(tmp_path: Path) -> None:
    folder = tmp_path / "images" / "ADE" / "validation" / "urban" / "street"
    jpeg(folder / "ADE_val_00000001.jpg")
    ids = class_list("ade847").ids
    colour = [[(number // 256 * 10, number % 256, 77) for number in (ids[0], ids[846], 0)]] * 2
    grid(folder / "ADE_val_00000001_seg.png", colour)  # type: ignore[arg-type]
    data = open_masked(tmp_path)
    assert (data.name, data.split, len(data.classes), data.void) == ("ade847", "validation", 847, 65535)
    assert data.mask(0).tolist() == [[0, 846, 65535]] * 2
    jpeg(tmp_path / "images_detectron2" / "validation" / "ADE_val_00000001.jpg")
    tif = tmp_path / "annotations_detectron2" / "validation" / "ADE_val_00000001.tif"
    grid(tif, [[0, 846, 65535], [255, 0, 0]], np.uint16)
    data = open_masked(tmp_path)
    assert (
        data.mask(0).tolist() == [[0, 846, 65535], [255, 0, 0]]
        and data.paths[0].parent.parent.name == "images_detectron2"
    )
    grid(tif, [[0, 847, 65535], [255, 0, 0]], np.uint16)
    assert "holds the value 847" in message(lambda: data.mask(0))


def test_cityscapes_by_label_ids_and_by_train_ids(tmp_path: Path) -> None:
    for split, city in (("val", "lindau"), ("val", "munster"), ("test", "bonn")):
        stem = f"{city}_000000_000019"
        grid(tmp_path / "leftImg8bit" / split / city / f"{stem}_leftImg8bit.png", np.zeros((1, 4, 3), int).tolist())
        grid(tmp_path / "gtFine" / split / city / f"{stem}_gtFine_labelIds.png", [[7, 33, 0, 9]])
        grid(tmp_path / "gtFine" / split / city / f"{stem}_gtFine_color.png", [[0, 0, 0, 0]])
    data = open_masked(tmp_path)
    assert (data.name, data.split, len(data), len(data.classes)) == ("cityscapes", "val", 2, 19)
    assert data.mask(1).tolist() == [[0, 18, 255, 255]] and data.image(1).shape == (3, 1, 4)
    for mask in data.mask_paths:
        grid(mask.with_name(mask.name.replace("labelIds", "labelTrainIds")), [[0, 18, 255, 5]])
    assert open_masked(tmp_path).mask(0).tolist() == [[0, 18, 255, 5]]
    data.paths[0].unlink()
    assert "has no picture" in message(lambda: open_masked(tmp_path))


# ---------------------------------------------------------------- COCO


@pytest.mark.parametrize(("masks", "images"), [("annotations", "images/val2017"), ("stuffthingmaps", "val2017")])
def test_coco_stuff(tmp_path: Path, masks: str, images: str) -> None:
    jpeg(tmp_path / images / "000000000139.jpg")
    mask = grid(tmp_path / masks / "val2017" / "000000000139.png", [[0, 12, 181], [255, 91, 0]])
    data = open_masked(tmp_path, "val")
    assert (data.name, data.split, len(data.classes), data.void) == ("coco-stuff", "val2017", 171, 255)
    assert data.mask(0).tolist() == [[0, 11, 170], [255, 80, 0]] and first(data)[80] == "banner"
    grid(mask, [[0, 11, 181], [255, 91, 0]])
    assert "holds the value 11, but the set has 171 classes" in message(lambda: data.mask(0))
    grid(mask.with_name("000000000139_labelTrainIds.png"), [[0, 11, 170], [255, 80, 0]])
    assert open_masked(tmp_path).mask(0).tolist() == [[0, 11, 170], [255, 80, 0]]
    (tmp_path / images / "000000000139.jpg").unlink()
    assert "has no picture" in message(lambda: open_masked(tmp_path))


def panoptic(root: Path) -> Path:
    """Segments 1 and 70000 are two persons, 258 is sky, 0 is nothing."""
    jpeg(root / "val2017" / "000000000139.jpg")
    colours_of = np.array([[1, 258, 70000], [0, 258, 1]])
    grid(root / "annotations" / "panoptic_val2017" / "000000000139.png",
         np.stack([colours_of % 256, colours_of // 256 % 256, colours_of // 65536], -1).tolist())  # fmt: skip
    return write(root / "annotations" / "panoptic_val2017.json", {
        "images": [{"id": 139, "file_name": "000000000139.jpg", "height": 2, "width": 3}],
        "annotations": [{"image_id": 139, "file_name": "000000000139.png", "segments_info": [
            {"id": 1, "category_id": 1}, {"id": 258, "category_id": 187}, {"id": 70000, "category_id": 1}]}],
        "categories": [{"id": 1, "name": "person"}, {"id": 187, "name": "sky-other-merged"}],
    })  # fmt: skip


def test_coco_panoptic_becomes_semantic(tmp_path: Path) -> None:
    file = panoptic(tmp_path)
    for data in (open_masked(tmp_path), open_masked(file)):
        assert (data.name, data.split, data.void) == ("coco-panoptic", "val2017", 255)
        assert first(data) == ["person", "sky-other-merged"]
        assert data.mask(0).tolist() == [[0, 1, 0], [255, 1, 0]]
    broken = json.loads(file.read_text())
    broken["annotations"][0]["segments_info"].pop()
    write(file, broken)
    assert "000000000139.png has a segment 70000 that its JSON does not list" in message(
        lambda: open_masked(tmp_path).mask(0)
    )
    write(file, {"categories": []})
    assert "is no panoptic file" in message(lambda: open_masked(tmp_path))


def test_coco_stuff_and_panoptic_in_one_folder_ask_which(tmp_path: Path) -> None:
    panoptic(tmp_path)
    grid(tmp_path / "stuffthingmaps" / "val2017" / "000000000139.png", [[0, 12, 181], [255, 91, 0]])
    assert "can be read as coco-stuff or coco-panoptic; say which" in message(lambda: open_masked(tmp_path))
    assert len(open_masked(tmp_path, kind="coco-stuff").classes) == 171
    assert len(open_masked(tmp_path, kind="coco-panoptic").classes) == 2


def test_a_mask_of_another_size_than_its_image(tmp_path: Path) -> None:
    jpeg(tmp_path / "images" / "validation" / "ADE_val_00000001.jpg")
    grid(tmp_path / "annotations" / "validation" / "ADE_val_00000001.png", [[1, 1]])
    text = message(lambda: open_masked(tmp_path).mask(0))
    assert "ADE_val_00000001.png is 2 x 1 pixels, but its image is 3 x 2" in text


def test_an_unknown_folder_says_what_was_found_and_what_is_known(tmp_path: Path) -> None:
    for i in range(8):
        (tmp_path / f"part{i}").mkdir()
    text = message(lambda: open_masked(tmp_path))
    assert "it holds part0/, part1/, part2/, part3/, part4/, part5/ and 2 more, and silc knows pairs: images/" in text
    assert all(
        kind in text for kind in ("voc21/voc20", "context459", "ade847", "cityscapes", "coco-panoptic", "camvid")
    )


# ---------------------------------------------------------------- real photographs


def test_the_real_sets_are_read_as_they_lie(photographs: Path) -> None:
    camvid = open_masked(photographs / "camvid")
    assert (camvid.name, camvid.split, len(camvid), len(camvid.classes)) == ("camvid", "test", 233, 11)
    mask = camvid.mask(0)
    assert mask.shape == camvid.image(0).shape[1:] and set(mask.unique().tolist()) <= {*range(11), 255}
    assert [len(open_masked(photographs / "camvid", split)) for split in ("train", "val")] == [367, 101]
    coco = open_masked(photographs / "coco128")
    assert len(coco.classes) == 129 and len(coco) > 60 and coco.void == 255
    for index in range(0, len(coco), 16):
        assert coco.mask(index).shape == coco.image(index).shape[1:]
    captions = open_captioned(photographs / "coco128")
    assert (captions.split, len(captions), {len(texts) for texts in captions.captions}) == ("val", 128, {5, 6})
    caltech = open_classification(photographs / "caltech101", "train")
    assert caltech.name == "caltech101" and len(caltech.classes) == 100 and caltech.split == "train"
