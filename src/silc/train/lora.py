"""Low-rank adapters (LoRA, arXiv 2106.09685) on q and v of both towers, by the library peft.

Gives: add, merged.
Used by: train/loop.py, when it builds a run and when it writes the model that comes out.
"""

from __future__ import annotations

from torch import Tensor

from silc.model.silc import Silc
from silc.plain import beneath

TARGETS = r"blocks\.\d+\.attention\.(q|v)"


def add(model: Silc, rank: int) -> None:
    """Put adapters of that rank beside q and v of every block, in place; all else of the towers then stands still.

    Their product counts once (alpha = rank). ValueError when peft is missing."""
    try:
        from peft import LoraConfig, inject_adapter_in_model
    except (ImportError, RuntimeError) as error:
        raise ValueError(f'--init.lora needs peft ({beneath(error)}): pip install "silc[lora]"') from None
    for tower in (model.image, model.text):
        inject_adapter_in_model(LoraConfig(r=rank, lora_alpha=rank, target_modules=TARGETS), tower)


def merged(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """The weights of a model with adapters as those of a plain one: W + B A. A plain one's stay as they are."""
    plain = {}
    for name, tensor in tensors.items():
        if ".base_layer." in name:
            layer, kind = name.split(".base_layer.")
            if kind == "weight":
                up, down = (tensors[f"{layer}.lora_{x}.default.weight"] for x in "BA")
                tensor = tensor + up @ down
            plain[f"{layer}.{kind}"] = tensor
        elif ".lora_" not in name:
            plain[name] = tensor
    return plain
