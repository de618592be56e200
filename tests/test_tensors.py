"""Files of tensors: who may read them, and what is in them."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch
from safetensors import safe_open

import silc
from silc.tensors import save_tensors


@pytest.mark.skipif(os.name == "nt", reason="permissions of POSIX")
@pytest.mark.parametrize("mask", [0o022, 0o077, 0o002])
def test_the_permissions_are_those_of_any_new_file(tmp_path: Path, mask: int) -> None:
    before = os.umask(mask)
    try:
        (tmp_path / "other").write_text("")
        save_tensors({"a": torch.ones(2, 3).T}, tmp_path / "new.safetensors")
    finally:
        os.umask(before)
    assert (tmp_path / "new.safetensors").stat().st_mode == (tmp_path / "other").stat().st_mode


def test_a_file_that_was_there_is_replaced(tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    save_tensors({"a": torch.ones(4, 4)}, path)
    save_tensors({"b": torch.arange(3.0, requires_grad=True)}, path, {"format": "pt"})
    with safe_open(path, "pt") as file:
        assert list(file.keys()) == ["b"] and file.metadata() == {"format": "pt"}
        assert file.get_tensor("b").tolist() == [0, 1, 2]


def test_a_saved_model_may_be_read_by_others(tmp_path: Path) -> None:
    silc.load("small").save(tmp_path)
    assert len({path.stat().st_mode for path in tmp_path.iterdir()}) == 1


def test_a_folder_that_is_none_is_an_oserror(tmp_path: Path) -> None:
    with pytest.raises(OSError, match="none"):
        save_tensors({"a": torch.ones(1)}, tmp_path / "none" / "a.safetensors")
