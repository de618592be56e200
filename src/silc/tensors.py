"""Tensors to files that others may read.

Gives: save_tensors.
Used by: whatever writes weights: models, runs, checkpoints, exports.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from safetensors.torch import save_file
from torch import Tensor


def save_tensors(tensors: Mapping[str, Tensor], path: Path, about: dict[str, str] | None = None) -> None:
    """A safetensors file with the permissions of any new file here: safetensors itself gives its files to the owner
    alone, so that a colleague, or a server that runs as another user, could not read them. OSError as from open()."""
    path.touch()
    permissions = path.stat().st_mode
    save_file({name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}, path, about)
    path.chmod(permissions)
