"""The script that makes the file of named drawings: what it takes from tiny packages made here, and under which names.

Gives: rows of icon sets and clip art against what they must be, the file as silc.data.vectors reads it, errors.
Used by: pytest. No network: npm is a stand-in that packs the same packages.
"""

from __future__ import annotations

import importlib.util
import json
import lzma
import sys
import tarfile
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from silc.data.vectors import read

SCRIPT = Path(__file__).parents[1] / "docs" / "experiments" / "drawings.py"
EMOJI = [
    {"label": "bento box", "hexcode": "1F371", "group": 4, "tags": ["food"]},
    {"label": "man’s shoe", "hexcode": "1F45E", "group": 7},
    {"label": "bullseye", "hexcode": "1F3AF", "group": 6,
     "skins": [{"label": "bullseye: dark skin tone", "hexcode": "1F3AF-1F3FF"}]},
    {"label": "heart suit", "hexcode": "2665-FE0F", "group": 6},
    {"label": "flag: Fiji", "hexcode": "1F1EB-1F1EF", "group": 9},
    {"label": "red hair", "hexcode": "1F9B0", "group": 2},
    {"label": "regional indicator A", "hexcode": "1F1E6"},
]  # fmt: skip
FIRST = {
    "icons": ["bento-box", "mans-shoe", "bullseye", "bullseye-dark-skin-tone", "hearts", "flag-fiji", "letter-a",
              "gnu"],
    "chars": {"1f371": "bento-box", "1f45e": "mans-shoe", "1f3af": "bullseye", "1f3af-1f3ff": "bullseye-dark-skin-tone",
              "2665": "hearts", "1f1eb-1f1ef": "flag-fiji", "1f1e6": "letter-a", "e047": "gnu"},
    "aliases": {"direct-hit": {"parent": "bullseye"}, "kurumi": {"parent": "bento-box", "hFlip": True}},
}  # fmt: skip
SECOND = {"icons": ["bentobox", "directhit", "hearts-1", "hearts-2", "kurumi", "robot", "redhair"]}
ICONS = {
    "icons": ["bentobox", "tea-cup", "tea-cup-flat", "tea-cup-2-flat", "acme", "acme-logo", "logout", "faded"],
    "suffixes": {"": "Line", "flat": "Flat"},
}
"""`acme` is a brand only in the set after it."""
BRANDED = {"icons": ["acme-logo-1", "saw"], "categories": {"Logos": ["acme-logo-1"], "Tools": ["saw"]}}
SETS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "first": ({"license": {"spdx": "CC-BY-4.0"}, "palette": True, "category": "Emoji"}, FIRST),
    "second-emoji": ({"license": {"spdx": "MIT"}, "palette": True}, SECOND),
    "icons": ({"license": {"spdx": "Apache-2.0"}, "palette": True, "category": "UI Multicolor"}, ICONS),
    "more-icons": ({"license": {"spdx": "CC-BY-SA-4.0"}, "palette": True}, BRANDED),
    "forbidden": ({"license": {"spdx": "CC-BY-NC-4.0"}, "palette": True}, {"icons": ["car"]}),
    "unknown": ({"license": {"title": "Ask us"}, "palette": True}, {"icons": ["car"]}),
    "grey": ({"license": {"spdx": "MIT"}, "palette": False}, {"icons": ["car"]}),
    "firms": ({"license": {"spdx": "MIT"}, "palette": True, "category": "Logos"}, {"icons": ["car"]}),
}
EXPECTED = {
    "first": ["bento box", "bullseye", "heart suit", "man's shoe"],
    "second-emoji": ["bento box", "bullseye", "heart suit"],
    "icons": ["bento box", "logout", "tea cup"],
    "more-icons": ["saw"],
}
"""hearts-1 is the heart suit because the first set says so; a flipped drawing does not give its name away."""
CLIPART = """<?xml version="1.0"?>
<!DOCTYPE svg [<!ENTITY ns_svg "http://www.w3.org/2000/svg">]>
<svg xmlns="&ns_svg;" xmlns:rdf="http://www.w3.org/1999/02/22-rdf-syntax-ns#" {size}><metadata><rdf:RDF><Work
xmlns="http://web.resource.org/cc/" xmlns:dc="http://purl.org/dc/elements/1.1/"><license
rdf:resource="http://web.resource.org/cc/{lic}"/><dc:title>{title}</dc:title><dc:subject>
<rdf:Bag><rdf:li>hash(1)</rdf:li><rdf:li>garden</rdf:li></rdf:Bag></dc:subject></Work></rdf:RDF></metadata>
<rect x="10" y="10" width="50" height="20" fill="red"/></svg>"""


@pytest.fixture(scope="module")
def script() -> ModuleType:
    spec = importlib.util.spec_from_file_location("drawings_script", SCRIPT)
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def packages(tmp_path: Path) -> Path:
    root = tmp_path / "node_modules"
    for folder in ("@iconify/json/json", "emojibase-data/en"):
        (root / folder).mkdir(parents=True)
    (root / "emojibase-data/en/data.json").write_text(json.dumps(EMOJI))
    (root / "@iconify/json/collections.json").write_text(json.dumps({name: about for name, (about, _) in SETS.items()}))
    for number, (name, (_, said)) in enumerate(SETS.items()):
        icons = {icon: {"body": f'<path d="M0 0h9v{i}z" fill="red"/>'} for i, icon in enumerate(said["icons"], 1)}
        if "faded" in icons:
            icons["faded"]["hidden"] = True  # type: ignore[assignment]
        held = {**said, "prefix": name, "icons": icons, "width": 24 + number, "height": 24}
        (root / f"@iconify/json/json/{name}.json").write_text(json.dumps(held))
    return root


@pytest.fixture
def clipart(tmp_path: Path) -> Path:
    root = tmp_path / "clipart"
    for where, title, size, *lic in (
        ("plants/tree", "Old_tree", 'width="80pt" height="40pt"'),
        ("plants/twin", "old tree", 'viewBox="0 0 9 9"'),
        ("plants/boxed", "shrub", 'width="100%" viewBox="1 2 70 30"'),
        ("plants/sizeless", "moss", ""),
        ("plants/licensed", "fern", 'viewBox="0 0 9 9"', "GPL"),
        ("plants/nameless", "Untitled", 'viewBox="0 0 9 9"'),
        ("logos/firm", "firm", 'viewBox="0 0 9 9"'),
    ):
        (root / where).parent.mkdir(parents=True, exist_ok=True)
        (root / f"{where}.svg").write_text(CLIPART.format(title=title, size=size, lic=(lic or ["PublicDomain"])[0]))
    (root / "plants/broken.svg").write_text("<svg")
    return root


def rows(file: Path) -> list[dict[str, Any]]:
    with lzma.open(file, "rt", encoding="utf-8") as held:
        return [json.loads(line) for line in held]


def test_rows_are_free_drawings_in_colour_under_shared_names(script, packages: Path, clipart: Path) -> None:  # type: ignore[no-untyped-def]
    out = packages.parent / "out"
    script.main([str(out), "--packages", str(packages), "--clipart", str(clipart)])
    assert [p.name for p in out.iterdir()] == ["drawings.jsonl.xz"]
    found = rows(out / "drawings.jsonl.xz")
    names: dict[str, list[str]] = {}
    for row in found:
        names.setdefault(row["style"], []).append(row["text"])
        assert row["colour"] is True
        assert row["style"] == "openclipart" or row["lic"] == SETS[row["style"]][0]["license"]["spdx"]
    clip = names.pop("openclipart")
    assert {style: sorted(taken) for style, taken in names.items()} == EXPECTED
    assert sorted(clip) == ["Old tree", "shrub"]
    box = next(row for row in found if row["id"] == "icons:bentobox")
    assert box["tags"] == ["food"] and 'viewBox="0 0 26 24"><path d="M0 0h9v1z" fill="red"/></svg>' in box["svg"]
    shrub = next(row for row in found if row["text"] == "shrub")
    assert shrub["tags"] == ["garden"] and 'viewBox="1 2 70 30"' in shrub["svg"] and "100%" not in shrub["svg"]
    tree = next(row for row in found if row["text"] == "Old tree")
    assert 'viewBox="0 0 100 50"' in tree["svg"]  # 80 x 40 points at 90 to the inch
    assert "metadata" not in shrub["svg"] and shrub["lic"] == "public domain"


def test_the_reader_takes_the_file_and_what_is_in_it_renders(script, packages: Path, clipart: Path) -> None:  # type: ignore[no-untyped-def]
    script.main([str(packages.parent), "--packages", str(packages), "--clipart", str(clipart)])
    drawings, licences = read(packages.parent / "drawings.jsonl.xz", None)
    wanted = {(name, style) for style, names in EXPECTED.items() for name in names}
    wanted |= {(name, "openclipart") for name in ("old tree", "shrub")}
    assert {(name, style) for name, style, _ in drawings} == wanted
    assert licences == {"CC-BY-4.0": 4, "MIT": 3, "Apache-2.0": 3, "CC-BY-SA-4.0": 1, "public domain": 2}
    resvg = pytest.importorskip("resvg_py", reason="resvg is not installed: pip install 'silc[quickstart]'")
    for _, _, svg in drawings:
        assert bytes(resvg.svg_to_bytes(svg_string=svg, width=48)).startswith(b"\x89PNG")


def test_npm_fetches_the_packages(script, packages: Path, monkeypatch: pytest.MonkeyPatch) -> None:  # type: ignore[no-untyped-def]
    tools, out = packages.parent / "tools", packages.parent / "out"
    tools.mkdir()
    for name in script.PACKAGES:
        with tarfile.open(tools / f"{name.replace('/', '+')}.tgz", "w:gz") as held:
            held.add(packages / name, "package")
    npm = tools / "npm"
    npm.write_text(f"""#!{sys.executable}
import shutil, sys
name, folder = sys.argv[2].rpartition("@")[0], sys.argv[sys.argv.index("--pack-destination") + 1]
shutil.copy("{tools}/" + name.replace("/", "+") + ".tgz", folder + "/made.tgz")
print("made.tgz")
""")
    npm.chmod(0o755)
    monkeypatch.setenv("PATH", str(tools))
    monkeypatch.setattr(script, "CLIPART", packages.parent / "none")
    script.main([str(out)])
    assert [p.name for p in out.iterdir()] == ["drawings.jsonl.xz"]
    assert len(rows(out / "drawings.jsonl.xz")) == sum(map(len, EXPECTED.values()))


def test_errors_say_what_is_missing(script, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:  # type: ignore[no-untyped-def]
    monkeypatch.setattr(script, "CLIPART", tmp_path / "none")
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(SystemExit, match="npm is not installed"):
        script.main([str(tmp_path / "out")])
    with pytest.raises(SystemExit, match=r"collections\.json cannot be read .*--packages"):
        script.main([str(tmp_path / "out"), "--packages", str(tmp_path)])
    with pytest.raises(SystemExit, match="no folder of Open Clip Art"):
        script.main([str(tmp_path / "out"), "--clipart", str(tmp_path / "none")])
    npm = tmp_path / "npm"
    npm.write_text(f"#!{sys.executable}\nraise SystemExit('npm error code ENOTFOUND')\n")
    npm.chmod(0o755)
    with pytest.raises(SystemExit, match=r"could not fetch @iconify/json .* ENOTFOUND"):
        script.main([str(tmp_path / "out")])
    assert not list((tmp_path / "out").iterdir())
