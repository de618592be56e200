"""Templates and class names, and the embeddings they make.

Gives: tests of silc.eval.prompts.
Used by: pytest.
"""

from __future__ import annotations

import string

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from known import Oracle
from torch import Tensor

from silc.eval import prompts


@pytest.mark.parametrize(("name", "count"), [("clip80", 80), ("clip_paper", 81), ("tcl9", 9), ("simple", 3)])
def test_the_lists_that_ship(name, count):
    found = prompts.resolve_templates([name])
    assert len(found) == len(set(found)) == count and all(t.count("{}") == 1 for t in found)
    assert all(t == t.strip() and t.isascii() for t in found)


def test_how_the_lists_relate():
    assert prompts.template_sets() == ["clip80", "clip_paper", "simple", "tcl9"]
    clip80 = prompts.resolve_templates(["clip80"])
    assert prompts.resolve_templates(["clip_paper"]) == [*clip80, "{}"]
    assert tuple(prompts.resolve_templates(["simple"])) == prompts.TEMPLATES
    # CLIP's own shortest good list is seven of the eighty; TCL takes them with one article changed, and two more
    seven = {"itap of a {}.", "a bad photo of the {}.", "a origami {}.", "a photo of the large {}.",
             "a {} in a video game.", "art of the {}.", "a photo of the small {}."}
    assert seven <= set(clip80)
    assert len(seven & set(prompts.resolve_templates(["tcl9"]))) == 6


def test_prompts_names_and_files_mix(tmp_path):
    (tmp_path / "mine.txt").write_text("my {}\n\n{} of mine\n")
    found = prompts.resolve_templates(["a {} here", "simple", str(tmp_path / "mine.txt")])
    assert found == ["a {} here", *prompts.TEMPLATES, "my {}", "{} of mine"]


@pytest.mark.parametrize(("given", "word"), [
    (["a photo"], "neither a file nor one of clip80"), (["clip8"], "'clip80'"), (["{} and {}"], "exactly one"),
    (["a {x}"], "exactly one"), ([], "no template"),
])
def test_what_is_no_template_is_told(given, word):
    with pytest.raises(ValueError, match=word):
        prompts.resolve_templates(given)


@pytest.mark.parametrize(("text", "keep", "expected"), [
    ("A bad photo of a {}.", "{}", "a bad photo of a {}"), ("a close-up of the {}.", "{}", "a closeup of the {}"),
    ("great_white  Shark", ",", "great white shark"), ("jack-o'-lantern, pumpkin", ",", "jackolantern, pumpkin"),
    ("{ {} }", "{}", "{}"), (" St. Bernard\t", ",", "st bernard"),
])
def test_canonical_form_by_hand(text, keep, expected):
    assert prompts.canonicalize(text, keep) == expected


@settings(max_examples=200, deadline=None)
@given(st.text(st.sampled_from("aB _{},.-'\t"), max_size=20), st.sampled_from(["{}", ","]))
def test_canonical_form_against_a_walk(text, keep):
    """Letter by letter, without a regular expression."""
    text, made, i = text.replace("_", " "), "", 0
    while i < len(text):
        if text.startswith(keep, i):
            made, i = made + keep, i + len(keep)
        else:
            made, i = made + ("" if text[i] in string.punctuation else text[i].lower()), i + 1
    assert prompts.canonicalize(text, keep) == " ".join(made.split())


def test_class_embeddings_average_unit_vectors_and_keep_synonyms():
    class Count(Oracle):
        def encode_text(self, texts: list[str]) -> Tensor:
            return torch.tensor([[float(len(t)), float(t.count("a")), 1.0] for t in texts])

    classes, templates = [["cat", "a big cat"], ["dog"]], ["{}", "a {} {x}".replace("{x}", "here"), "aa {}"]
    expected = []
    for name in ("cat", "a big cat", "dog"):
        rows = np.array([[len(t), t.count("a"), 1.0] for t in (p.replace("{}", name) for p in templates)])
        mean = (rows / np.linalg.norm(rows, axis=1, keepdims=True)).mean(0)
        expected.append(mean / np.linalg.norm(mean))
    for batch in (1, 2, 100):
        found = prompts.class_embeddings(Count(), classes, templates, batch)
        np.testing.assert_allclose(found.vectors, expected, rtol=1e-5)
        features = F.normalize(torch.rand(5, 3), dim=1)
        by_name = features.numpy() @ np.array(expected).T
        best = np.stack([by_name[:, :2].max(1), by_name[:, 2]], 1)
        np.testing.assert_allclose(found.scores(features), best, rtol=1e-5)


def test_templates_are_checked_with_their_line(tmp_path):
    path = tmp_path / "t.txt"
    path.write_text("a {}\n\nno place\n")
    with pytest.raises(ValueError, match=r"t\.txt, line 3: 'no place'"):
        prompts.read_templates(path)
    path.write_text("{} and {}\n")
    with pytest.raises(ValueError, match="line 1"):
        prompts.read_templates(path)
    path.write_text("\n")
    with pytest.raises(ValueError, match="no template"):
        prompts.read_templates(path)
    with pytest.raises(ValueError, match="does not exist"):
        prompts.read_templates(tmp_path / "none")
    path.write_text("a {}.\n\n{}\n")
    assert prompts.read_templates(path) == ["a {}.", "{}"]
