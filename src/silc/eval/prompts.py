"""From class names to class embeddings, through prompt templates.

Gives: TEMPLATES, template_sets, read_templates, check_templates, resolve_templates, canonicalize, ClassEmbeddings,
class_embeddings. Used by: zero-shot classification and segmentation, predict.
"""

from __future__ import annotations

import re
import string
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from silc.eval.embed import evaluating
from silc.model.silc import Silc
from silc.plain import nearest

TEMPLATES = ("{}", "a photo of a {}.", "a picture of the {}.")
"""Used where neither the caller nor the set brings its own; `simple` among the lists that ship."""

SHIPPED = Path(__file__).with_name("templates")


def template_sets() -> list[str]:
    """Names of the lists that ship: clip80 (CLIP's 80 for ImageNet), clip_paper (these and the bare name: big_vision's
    81), tcl9 (TCL, arXiv 2212.00785), simple."""
    return sorted(path.stem for path in SHIPPED.glob("*.txt"))


def check_templates(templates: Sequence[str], where: str = "templates") -> list[str]:
    """The templates as a list. ValueError naming the line if one has not exactly one `{}`, or if there is none."""
    for number, template in enumerate(templates, 1):
        if template.count("{}") != 1:
            raise ValueError(f"{where}, line {number}: {template!r} needs exactly one {{}} where the class name goes.")
    if not templates:
        raise ValueError(f"{where}: there is no template; write one a line, such as `a photo of a {{}}.`")
    return list(templates)


def read_templates(path: Path | str) -> list[str]:
    """One template a line, blank lines left out. ValueError names the file and the line that is wrong."""
    path = Path(path)
    try:
        lines = path.read_text(encoding="utf-8-sig").splitlines()
    except FileNotFoundError:
        raise ValueError(f"{path} does not exist; it should hold one template a line.") from None
    except UnicodeDecodeError:
        raise ValueError(f"{path} is not UTF-8 text.") from None
    for number, line in enumerate(lines, 1):
        if line.strip():
            check_templates(["{}"] * (number - 1) + [line.strip()], str(path))
    return check_templates([line.strip() for line in lines if line.strip()], str(path))


def resolve_templates(given: Sequence[str]) -> list[str]:
    """Templates from what a user writes: prompts with one `{}`, names of lists that ship, files with one a line.

    ValueError for an entry that is none of them, naming the nearest list.
    """
    found: list[str] = []
    for entry in given:
        if "{" in entry:
            found += check_templates([entry])
        elif entry in template_sets():
            found += read_templates(SHIPPED / f"{entry}.txt")
        elif Path(entry).is_file():
            found += read_templates(entry)
        else:
            raise ValueError(
                f"templates: {entry!r} has no {{}} for the class name, and is neither a file nor one of "
                f"{', '.join(template_sets())}." + nearest(entry, template_sets())
            )
    return check_templates(found)


def canonicalize(text: str, keep: str = "{}") -> str:
    """Lower case, `_` as a space, no punctuation but `keep`, single spaces (as big_vision writes prompts)."""
    def kept(match: re.Match[str]) -> str:
        return keep if match[0] == keep else ""

    text = re.sub(f"{re.escape(keep)}|[{re.escape(string.punctuation)}]", kept, text.replace("_", " "))
    return " ".join(text.lower().split())


@dataclass(frozen=True)
class ClassEmbeddings:
    """One unit vector a *name*: vectors [T, D], owner int64 [T] (the name's class), T >= C names.

    A class scores as its best name does, so synonyms help and never blur each other.
    """

    vectors: Tensor
    owner: Tensor
    classes: int

    def scores(self, features: Tensor) -> Tensor:
        """features [B, D] of unit length -> cosine with each class's best name [B, C]."""
        by_name = features @ self.vectors.T
        if len(self.owner) == self.classes:
            return by_name[:, self.owner.argsort()]
        empty = by_name.new_full((len(features), self.classes), -torch.inf)
        return empty.scatter_reduce(1, self.owner.expand(len(features), -1), by_name, "amax")


def class_embeddings(
    model: Silc, classes: Sequence[Sequence[str]], templates: Sequence[str], batch: int = 256
) -> ClassEmbeddings:
    """Embed every name of every class: normalise, average over the templates, normalise again (CLIP, section 3.1.4).

    classes[c] holds the names of class c. Raises ValueError for a wrong template, no class, or a class without a name.
    """
    templates = check_templates(templates)
    names = [name for group in classes for name in group]
    if not names or not all(classes):
        raise ValueError("every class needs a name, and there must be at least one class.")
    owner = torch.tensor([c for c, group in enumerate(classes) for _ in group])
    prompts = [template.replace("{}", name) for name in names for template in templates]
    total: Tensor | None = None
    with evaluating(model):
        for start in range(0, len(prompts), batch):
            part = F.normalize(model.encode_text(prompts[start : start + batch]).float(), dim=-1)
            rows = torch.arange(start, start + len(part), device=part.device) // len(templates)
            total = part.new_zeros(len(names), part.shape[1]) if total is None else total
            total.index_add_(0, rows, part)
        assert total is not None
        vectors = F.normalize(total, dim=-1)
    return ClassEmbeddings(vectors, owner.to(vectors.device), len(classes))
