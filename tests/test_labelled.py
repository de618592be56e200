"""Labelled sets: what is read from folders, and the sentence for each mistake in one."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from silc.data.labelled import open_captioned, open_classification, open_masked


def picture(path: Path, width: int = 8, height: int = 6, value: int = 200) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.full((height, width, 3), value, np.uint8)).save(path)
    return path


def one_sentence(error: pytest.ExceptionInfo[ValueError]) -> str:
    text = str(error.value)
    assert "\n" not in text and text[-1] in ".)" and "Traceback" not in text
    return text


# ---------------------------------------------------------------- classes


def test_classification_without_a_list_sorts_folders(tmp_path: Path) -> None:
    picture(tmp_path / "red_fox" / "b.jpg")
    picture(tmp_path / "red_fox" / "a.png", value=7)
    picture(tmp_path / "ant" / "x.webp")
    (tmp_path / "ant" / "notes.txt").write_text("no picture")
    (tmp_path / ".hidden").mkdir()
    data = open_classification(tmp_path)
    assert data.classes == [["ant"], ["red fox"]] and data.labels == [0, 1, 1] and data.templates is None
    assert [p.name for p in data.paths] == ["x.webp", "a.png", "b.jpg"] and len(data) == 3
    assert data.image(1).shape == (3, 6, 8) and (data.image(1) == 7).all()


def test_classes_txt_gives_order_names_and_synonyms(tmp_path: Path) -> None:
    for name in ("a", "b", "c_d"):
        picture(tmp_path / name / "1.png")
    (tmp_path / "classes.txt").write_text("b\tbadger, brock\n\nc_d\na\tant\n")
    (tmp_path / "templates.txt").write_text("a photo of a {}.\n\n{}\n")
    data = open_classification(tmp_path)
    assert data.classes == [["badger", "brock"], ["c d"], ["ant"]]
    assert [p.parent.name for p in data.paths] == ["b", "c_d", "a"] and data.labels == [0, 1, 2]
    assert data.templates == ["a photo of a {}.", "{}"]


@pytest.mark.parametrize(
    ("listing", "templates", "words"),
    [
        ("", None, "names no class"),
        ("ant\nbee\nbee\n", None, "listed twice"),
        ("ant\tInsect\nbee\tinsect\n", None, "two classes are named 'insect'"),
        ("ant\nbe\nbee\n", None, "lists 'be'.*Perhaps you meant 'bee'"),
        ("ant\n", None, "bee is not listed in classes.txt"),
        ("ant\nbee\t , \n", None, "a class has no name"),
        (None, "a photo\n", "exactly one {}"),
    ],
)
def test_classification_mistakes(tmp_path: Path, listing: str | None, templates: str | None, words: str) -> None:
    picture(tmp_path / "ant" / "1.png")
    picture(tmp_path / "bee" / "1.png")
    for name, text in (("classes.txt", listing), ("templates.txt", templates)):
        if text is not None:
            (tmp_path / name).write_text(text)
    with pytest.raises(ValueError) as error:
        open_classification(tmp_path)
    assert re.search(words, one_sentence(error))


def test_a_folder_without_classes_without_pictures_or_missing(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="laid out as pictures with classes: it is empty, and silc knows folders"):
        open_classification(tmp_path)
    (tmp_path / "ant").mkdir()
    with pytest.raises(ValueError, match="holds no pictures"):
        open_classification(tmp_path)
    with pytest.raises(ValueError, match="nowhere does not exist"):
        open_classification(tmp_path / "nowhere")


def test_a_damaged_picture_is_named(tmp_path: Path) -> None:
    path = picture(tmp_path / "ant" / "1.png")
    path.write_bytes(path.read_bytes()[:40])
    with pytest.raises(ValueError, match=r"1\.png cannot be read as a picture"):
        open_classification(tmp_path).image(0)


# ---------------------------------------------------------------- captions


def test_captions_from_jsonl_and_csv_are_the_same_and_grouped(tmp_path: Path) -> None:
    picture(tmp_path / "images" / "a.png")
    picture(tmp_path / "images" / "b.png")
    rows = [("images/a.png", "one"), ("images/b.png", 'two, "quoted"'), ("images/a.png", "three")]
    lines = [json.dumps({"image": i, "caption": [c] if c == "three" else c}) for i, c in rows]
    (tmp_path / "captions.jsonl").write_text("\n".join(lines) + "\n")
    (tmp_path / "t.csv").write_text('\ufeffimage,caption,extra\nimages/a.png,one,1\nimages/b.png,"two, ""quoted""",2\n'
                                    "images/a.png,three,3\n", encoding="utf-8")  # fmt: skip
    for data in (open_captioned(tmp_path), open_captioned(tmp_path / "t.csv")):
        assert [p.name for p in data.paths] == ["a.png", "b.png"] and data.ident(1).endswith("images/b.png")
        assert data.captions == [["one", "three"], ['two, "quoted"']] and data.image(1).shape == (3, 6, 8)
    assert open_captioned(tmp_path).name == tmp_path.name and open_captioned(tmp_path / "t.csv").name == "t"


@pytest.mark.parametrize(
    ("name", "text", "words"),
    [
        ("c.jsonl", "\n", "has no rows"),
        ("c.csv", "", "has no rows"),
        ("c.csv", "image,caption\n", "has no rows"),
        ("c.csv", "picture,caption\na.png,x\n", "no column 'image'"),
        ("c.csv", "image,caption\na.png,x\nb.png,y\n", "line 3: the image .*b.png does not exist"),
        ("c.csv", "image,caption\na.png\n", "line 2: the row has no `caption`"),
        ("c.jsonl", '{"image": "a.png", "caption": ["x", ""]}', "line 1: the row has no `caption`"),
        ("c.jsonl", '{"caption": "x"}', "line 1: the row has no `image`"),
        ("c.jsonl", '{"image": "a.png", "caption": "x"}\n{"image"', "line 2 is not valid JSON"),
        ("c.jsonl", "[1]", "must hold a JSON object"),
        ("c.txt", "x", "it is a .txt file, and silc knows table: captions.jsonl or captions.csv"),
    ],
)
def test_caption_mistakes(tmp_path: Path, name: str, text: str, words: str) -> None:
    picture(tmp_path / "a.png")
    (tmp_path / name).write_text(text)
    with pytest.raises(ValueError) as error:
        open_captioned(tmp_path / name)
    assert re.search(words, one_sentence(error))


def test_a_folder_without_a_caption_file_and_text_in_another_encoding(tmp_path: Path) -> None:
    (tmp_path / "notes").mkdir()
    with pytest.raises(ValueError, match=r"it holds notes/, and silc knows .* annotations/captions_SPLIT\.json"):
        open_captioned(tmp_path)
    (tmp_path / "captions.jsonl").write_bytes(b'{"image": "\xe9"}')
    with pytest.raises(ValueError, match="not UTF-8"):
        open_captioned(tmp_path)


# ---------------------------------------------------------------- masks


def masked_set(folder: Path, values: list[list[int]], mode: str = "L", **classes: Any) -> Path:
    picture(folder / "images" / "p.jpg", width=len(values[0]), height=len(values))
    (folder / "masks").mkdir(exist_ok=True)
    mask = Image.fromarray(np.array(values, np.uint8)).convert(mode)
    mask.save(folder / "masks" / "p.png")
    (folder / "classes.json").write_text(json.dumps({"classes": ["sky", ["sea", "water"]], **classes}))
    return folder


@pytest.mark.parametrize("mode", ["L", "I", "P"])
def test_masks_are_class_indices_and_void(tmp_path: Path, mode: str) -> None:
    values = [[0, 1, 1], [1, 0, 255]]
    folder = masked_set(tmp_path, values, void=255, background=True, palette=[[0, 0, 0], [9, 9, 9]])
    if mode == "P":
        mask = Image.fromarray(np.array(values, np.uint8), mode="L")
        mask.putpalette([255 - i // 3 for i in range(768)])
        mask.save(folder / "masks" / "p.png")
    data = open_masked(folder)
    assert data.classes == [["sky"], ["sea", "water"]] and data.background and data.void == 255
    assert data.palette == [[0, 0, 0], [9, 9, 9]]
    assert data.mask(0).tolist() == values and str(data.mask(0).dtype) == "torch.int64"
    assert data.image(0).shape == (3, 2, 3)


def test_an_unknown_mask_value_names_file_and_value(tmp_path: Path) -> None:
    data = open_masked(masked_set(tmp_path, [[0, 1], [7, 255]], void=255))
    with pytest.raises(ValueError, match=r"masks/p\.png holds the value 7, but .* 0 to 1 and void 255"):
        data.mask(0)
    with pytest.raises(ValueError, match=r"p\.png holds the value 255.*no void value"):
        open_masked(masked_set(tmp_path, [[0, 1], [1, 255]])).mask(0)


def test_a_colour_mask_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="RGB picture; a mask needs one channel"):
        open_masked(masked_set(tmp_path, [[0, 1]], mode="RGB")).mask(0)


def test_missing_and_misfitting_masks(tmp_path: Path) -> None:
    folder = masked_set(tmp_path, [[0, 1], [1, 1]])
    Image.fromarray(np.zeros((3, 5), np.uint8)).save(folder / "masks" / "p.png")
    with pytest.raises(ValueError, match=r"p\.png is 5 x 3 pixels, but its image is 2 x 2") as error:
        open_masked(folder)
    one_sentence(error)
    (folder / "masks" / "p.png").unlink()
    with pytest.raises(ValueError, match=r"images/p\.jpg has no mask"):
        open_masked(folder)
    (folder / "images" / "p.jpg").unlink()
    with pytest.raises(ValueError, match="holds no pictures"):
        open_masked(folder)
    (folder / "classes.json").unlink()
    with pytest.raises(ValueError, match=r"has no classes\.json"):
        open_masked(folder)


def test_a_turned_photograph_is_measured_as_it_is_decoded(tmp_path: Path) -> None:
    folder = masked_set(tmp_path, [[0, 1, 1], [1, 0, 0]])
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.fromarray(np.zeros((3, 2, 3), np.uint8)).save(folder / "images" / "p.jpg", exif=exif)
    data = open_masked(folder)
    assert data.image(0).shape[1:] == data.mask(0).shape == (2, 3)


@pytest.mark.parametrize(
    ("classes", "words"),
    [
        ({"classes": []}, "names no class"),
        ({"classes": {"0": "sky"}}, "must be a list of names"),
        ({"classes": ["sky", ["Sky", "heaven"]]}, "two classes are named 'Sky'"),
        ({"classes": ["sky", ""]}, "a class has no name"),
        ({"void": 1}, "`void` must be null or a whole number"),
        ({"void": True}, "`void` must be null or a whole number"),
        ({"background": 1}, "`background` must be true or false"),
        ({"palette": [[0, 0, 0]]}, "`palette` must be null or one colour"),
        ({"palette": [[0, 0, 0], [0, 0, 256]]}, "`palette` must be null or one colour"),
        ({"backgroud": True}, "unknown key 'backgroud'. Perhaps you meant 'background'"),
    ],
)
def test_class_list_mistakes(tmp_path: Path, classes: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError) as error:
        open_masked(masked_set(tmp_path, [[0, 1]], **classes))
    assert words in one_sentence(error)


def test_a_mask_that_changed_its_size_after_opening(tmp_path: Path) -> None:
    data = open_masked(masked_set(tmp_path, [[0, 1], [1, 1]]))
    Image.fromarray(np.zeros((3, 5), np.uint8)).save(data.mask_paths[0])
    with pytest.raises(ValueError, match="5 x 3 pixels, but its image is 2 x 2"):
        data.mask(0)


def test_a_picture_that_went_away_is_named(tmp_path: Path) -> None:
    path = picture(tmp_path / "ant" / "1.png")
    data = open_classification(tmp_path)
    path.unlink()
    with pytest.raises(ValueError, match=r"1\.png cannot be read \(No such file"):
        data.image(0)


def test_opens_real_photographs(photographs: Path) -> None:
    data = open_classification(photographs / "caltech101" / "test")
    listed = (photographs / "caltech101" / "classes.txt").read_text().split()
    assert len(data.classes) == len(listed) == 100 and max(data.labels) == 99
    assert data.image(0).shape[0] == 3
