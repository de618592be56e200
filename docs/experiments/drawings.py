"""Builds the file of named vector drawings that silc.data.vectors takes, from packages anyone can get.

    python docs/experiments/drawings.py FOLDER                             writes FOLDER/drawings.jsonl.xz
    python docs/experiments/drawings.py FOLDER --packages node_modules     the same without the network

FOLDER/drawings.jsonl.xz holds one JSON a line: `id`, `style`, `colour`, `text` (the name), `tags`, `lic`, `svg`. The
drawings are the icon sets in colour of the npm package @iconify/json and, where Debian's openclipart-svg is installed,
Open Clip Art; emoji are called as emojibase-data calls them, so that one thing has one name in all emoji styles. npm
fetches the two packages (110 MB, 450 MB unpacked for as long as this runs) unless --packages is given. Some licences
ask for attribution or for sharing alike: see each row's `lic`, and do not pass the file on without looking.
"""

from __future__ import annotations

import argparse
import json
import lzma
import os
import re
import shutil
import subprocess
import sys
import tarfile
import tempfile
import unicodedata
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

FILE = "drawings.jsonl.xz"
PACKAGES = {"@iconify/json": "2.2.535", "emojibase-data": "17.0.0"}
"""What npm fetches, in the versions this was made with."""
INSTALL = f"npm install {' '.join(f'{name}@{version}' for name, version in PACKAGES.items())}"
QUIETLY = ("--loglevel", "error", "--no-update-notifier")
NEEDED = re.compile(r"package/(collections|json/[^/]+|en/data)\.json")
CLIPART = Path("/usr/share/openclipart/svg")
"""Where openclipart-svg puts its files."""
FREE = re.compile(r"MIT|Apache-2\.0|ISC|CC0-1\.0|CC-BY(-SA)?-[34]\.0")
"""SPDX names of the licences taken. Those that forbid commercial use (CC-BY-NC) or changes (ND) are not among them."""
NO_THINGS = ("Logos", "Programming", "Flags / Maps")
"""Categories of icon sets left out: brands, and flags, which are called by the codes of their countries."""
BRANDS = ("Brand", "Logos")
"""Categories inside other sets. What some set files there is a brand in all: their `apple` is no fruit."""
COMPONENTS, FLAGS = 2, 9
"""Groups of emoji left out: skin and hair by themselves, and flags."""
CLIPART_LEFT_OUT = re.compile(r"logos|flags|special|duplicates|computer/icons/.+/|aiga-symbols|games/cards|map_symbols")
"""Folders of Open Clip Art that hold brands, patterns, whole themes of icons, or one drawing in dozens of variants."""
UNNAMED = re.compile(r"(unnamed|untitled|no title|new|image|icon|drawing|clip ?art)\b", re.IGNORECASE)
LICENCE = ".//{*}Work/{*}license"
LARGEST = 200_000
"""Bytes of a clip art file. Larger ones are traced pictures."""
PIXELS = {"": 1.0, "px": 1.0, "pt": 1.25, "pc": 15.0, "mm": 90 / 25.4, "cm": 90 / 2.54, "in": 90.0}
"""A unit in pixels of 90 to the inch, what drawing programs used when these files were drawn."""
SVG, XLINK = "http://www.w3.org/2000/svg", "http://www.w3.org/1999/xlink"

Row = dict[str, Any]
Emoji = dict[str, tuple[str, list[str]]]
"""Name and tags of emoji, by what `squeeze` makes of their names or by their code points."""


# ---------------------------------------------------------------- packages


def fetch(folder: Path) -> Path:
    """Have npm fetch PACKAGES and unpack what is needed of them, as below a node_modules. ValueError if it cannot."""
    folder = folder.resolve()
    npm = shutil.which("npm")
    if npm is None:
        raise ValueError(
            f"npm is not installed: install Node.js, or run `{INSTALL}` elsewhere and give the node_modules that it"
            " makes as --packages."
        )
    for name, version in PACKAGES.items():
        call = [npm, "pack", f"{name}@{version}", "--ignore-scripts", "--pack-destination", str(folder), *QUIETLY]
        told = subprocess.run(call, capture_output=True, text=True)  # no shell
        if told.returncode:
            why = "; ".join(line.removeprefix("npm error ") for line in told.stderr.splitlines()[:4])
            raise ValueError(f"npm could not fetch {name} {version}; is there a network? It says: {why}")
        archive, target = folder / told.stdout.split()[-1], folder / name
        with tarfile.open(archive) as held:
            held.extractall(folder / "part", [m for m in held if NEEDED.fullmatch(m.name)], filter="data")
        target.parent.mkdir(exist_ok=True)
        (folder / "part" / "package").rename(target)
        archive.unlink()
    return folder


def load(packages: Path, name: str) -> Any:
    """A JSON file of a package. ValueError where it is missing or broken."""
    try:
        return json.loads((packages / name).read_text(encoding="utf-8"))
    except (OSError, json.JSONDecodeError) as error:
        raise ValueError(
            f"{packages / name} cannot be read ({error}): give as --packages the node_modules that `{INSTALL}` makes."
        ) from None


# ---------------------------------------------------------------- names


def plain(text: str) -> str:
    """In ASCII: `piñata` is called pinata."""
    return unicodedata.normalize("NFKD", text.replace("’", "'")).encode("ascii", "ignore").decode().strip()


def squeeze(text: str) -> str:
    """The letters and digits alone: sets write one name as `bento box`, `bento-box` and `bentobox`."""
    return re.sub(r"[^a-z0-9]", "", plain(text).lower())


def code(hexcode: str) -> str:
    """Code points as all sets write them: in small letters, without the selector of the coloured form."""
    return "-".join(point for point in hexcode.lower().split("-") if point != "fe0f")


def emoji_labels(packages: Path) -> tuple[Emoji, Emoji]:
    """Emoji by their name, and by their code points. Those in a tone of skin are near copies and not among them."""
    by_name: Emoji = {}
    by_code: Emoji = {}
    for emoji in load(packages, "emojibase-data/en/data.json"):
        if emoji.get("group", COMPONENTS) not in (COMPONENTS, FLAGS):
            known = plain(emoji["label"]), emoji.get("tags", [])
            by_name.setdefault(squeeze(known[0]), known)
            by_code[code(emoji["hexcode"])] = known
    return by_name, by_code


def emoji_names(labels: Emoji, by_code: Emoji, sets: list[Row]) -> Emoji:
    """Emoji by all their names. Some sets say which code points an icon draws and what it was once called; with that,
    `direct hit` is the bullseye in the sets that say neither."""
    names = dict(labels)
    for icons in sets:
        drawn = {icon: code(points) for points, icon in icons.get("chars", {}).items() if code(points) in by_code}
        own = {icon: by_code[points] for icon, points in drawn.items()}
        for alias, of in icons.get("aliases", {}).items():
            if of["parent"] in own and not {"hFlip", "vFlip", "rotate"} & set(of):
                own.setdefault(alias, own[of["parent"]])
        for icon, known in own.items():
            names.setdefault(squeeze(icon), known)
    return names


# ---------------------------------------------------------------- icon sets


def is_emoji(prefix: str, about: Row) -> bool:
    return about.get("category") == "Emoji" or "emoji" in prefix


def is_wanted(prefix: str, about: Row) -> bool:
    """In colour, free, and of things."""
    free = FREE.fullmatch(about["license"].get("spdx", ""))
    return bool(free and about.get("palette") and about.get("category") not in NO_THINGS and "logo" not in prefix)


def icon_rows(packages: Path) -> Iterator[Row]:
    """The drawings of all wanted sets, one a name and set."""
    about = {k: v for k, v in load(packages, "@iconify/json/collections.json").items() if is_wanted(k, v)}
    sets = {prefix: load(packages, f"@iconify/json/json/{prefix}.json") for prefix in sorted(about)}
    labels, by_code = emoji_labels(packages)
    names = emoji_names(labels, by_code, [icons for prefix, icons in sets.items() if is_emoji(prefix, about[prefix])])
    brands = {brand for icons in sets.values() for brand in branded(icons)}
    for prefix, icons in sets.items():
        emoji, taken = is_emoji(prefix, about[prefix]), set()
        for icon, drawing in sorted(icons["icons"].items()):
            name = trunk(icon, icons)
            # an icon of an emoji set that is no emoji may be a brand or a flag; other icons are spelled as the emoji
            known = names.get(squeeze(name)) if emoji else labels.get(squeeze(name), (name.replace("-", " "), []))
            if known is None or known[0] in taken or drawing.get("hidden"):
                continue
            if not emoji and (name in brands or "logo" in name.split("-")):
                continue
            taken.add(known[0])
            yield {"id": f"{prefix}:{icon}", "style": prefix, "colour": True, "text": known[0], "tags": known[1],
                   "lic": about[prefix]["license"]["spdx"], "svg": whole(drawing, icons)}  # fmt: skip


def branded(icons: Row) -> Iterator[str]:
    for category in BRANDS:
        for icon in icons.get("categories", {}).get(category, ()):
            yield trunk(icon, icons).removesuffix("-logo")


def trunk(icon: str, icons: Row) -> str:
    """The name without what tells variants: with `flat` among the suffixes of the set, `bird-2-flat` is a bird."""
    suffix = next((suffix for suffix in icons.get("suffixes", {}) if suffix and icon.endswith(f"-{suffix}")), "")
    return re.sub(r"-\d+$", "", icon.removesuffix(f"-{suffix}"))


def whole(drawing: Row, icons: Row) -> str:
    """The SVG of an icon; what it does not say about its box, its set says."""
    sides = {"left": 0, "top": 0, "width": 16, "height": 16}
    box = " ".join(f"{drawing.get(side, icons.get(side, otherwise))}" for side, otherwise in sides.items())
    return f'<svg xmlns="{SVG}" xmlns:xlink="{XLINK}" viewBox="{box}">{drawing["body"]}</svg>'


# ---------------------------------------------------------------- Open Clip Art


def clipart_rows(folder: Path) -> Iterator[Row]:
    """The drawings of Open Clip Art that say what they are called and that they are public domain, one a name."""
    ElementTree.register_namespace("", SVG)
    ElementTree.register_namespace("xlink", XLINK)
    taken = set()
    for file in sorted(folder.rglob("*.svg")):
        where = file.relative_to(folder).with_suffix("").as_posix()
        if CLIPART_LEFT_OUT.search(where) or file.is_symlink() or file.stat().st_size > LARGEST:
            continue
        try:
            drawing = ElementTree.parse(file).getroot()
        except (ElementTree.ParseError, ValueError, LookupError):
            continue
        name, tags = title(drawing)
        free = any("publicdomain" in squeeze(" ".join(said.attrib.values())) for said in drawing.iterfind(LICENCE))
        if free and name and name.lower() not in taken and fit(drawing):
            taken.add(name.lower())
            yield {"id": f"openclipart:{where}", "style": "openclipart", "colour": True, "text": name, "tags": tags,
                   "lic": "public domain", "svg": ElementTree.tostring(drawing, encoding="unicode")}  # fmt: skip


def title(drawing: ElementTree.Element) -> tuple[str, list[str]]:
    """Title and keywords among the metadata; an empty title if there is none worth the name."""
    name = plain(" ".join((drawing.findtext(".//{*}Work/{*}title") or "").replace("_", " ").split()))
    words = [plain(word.text or "") for word in drawing.iterfind(".//{*}Work/{*}subject//{*}li")]
    return "" if UNNAMED.match(name) else name, [word for word in words if word and not word.startswith("hash(")]


def fit(drawing: ElementTree.Element) -> bool:
    """Strip what is not drawn, and say the size by a `viewBox` alone, without which old files do not render. False if
    the drawing does not tell its size."""
    for inside in list(drawing.iter()):
        for child in list(inside):
            if not isinstance(child.tag, str) or child.tag.rpartition("}")[2] in ("metadata", "namedview", "pgf"):
                inside.remove(child)
    sides = [re.fullmatch(r"\s*([\d.]+)\s*([a-z]*)\s*", drawing.attrib.pop(side, "")) for side in ("width", "height")]
    if not drawing.get("viewBox"):
        lengths = [float(side[1]) * PIXELS.get(side[2], 0) for side in sides if side]
        drawing.set("viewBox", " ".join(f"{length:g}" for length in (0, 0, *lengths)))
        return len(lengths) == 2 and min(lengths) > 0
    return True


# ---------------------------------------------------------------- the file


def write(file: Path, packages: Path, clipart: Path | None) -> dict[str, Counter[str]]:
    """How many drawings it has written of each style and licence."""
    counts = {"style": Counter[str](), "lic": Counter[str]()}
    with lzma.open(file, "wt", preset=3, encoding="utf-8") as out:
        for rows in (icon_rows(packages), clipart_rows(clipart) if clipart else ()):
            for row in rows:
                out.write(json.dumps(row, ensure_ascii=False) + "\n")
                for key, count in counts.items():
                    count[row[key]] += 1
    return counts


def main(args: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, metavar="FOLDER")
    parser.add_argument("--packages", type=Path, help="a folder that holds both npm packages, unpacked")
    parser.add_argument("--clipart", type=Path, help=f"Open Clip Art ({CLIPART} if that exists)")
    asked = parser.parse_args(args)
    clipart = asked.clipart or CLIPART
    if not clipart.is_dir():
        missing = f"{clipart} is no folder of Open Clip Art: install Debian's package openclipart-svg"
        if asked.clipart:
            sys.exit(f"{missing}, or leave --clipart away.")
        print(f"{missing} to have its drawings too. Going on without.")
        clipart = None
    try:
        asked.folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=asked.folder, prefix=".drawings-") as made:
            part, file = Path(made) / FILE, asked.folder / FILE
            counts = write(part, asked.packages or fetch(Path(made)), clipart)
            os.replace(part, file)
    except (ValueError, OSError) as error:
        sys.exit(str(error))
    for count in counts.values():
        print(", ".join(f"{name} {number}" for name, number in count.most_common()))
    print(f"Wrote {counts['style'].total()} drawings to {file}")


if __name__ == "__main__":
    main()
