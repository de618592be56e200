"""silc: image-text contrastive pretraining with local-to-global self-distillation (SILC, arXiv 2310.13355).

Gives: load, Silc, Predictor.  Names are resolved on first use, so that `import silc` and `silc --help` stay quick.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from silc.model.silc import Silc as Silc
    from silc.opening import load as load
    from silc.predict import Predictor as Predictor

__version__ = "0.1.0"
__all__ = ["Predictor", "Silc", "load"]


def __getattr__(name: str) -> Any:
    if name == "Silc":
        from silc.model.silc import Silc

        return Silc
    if name == "Predictor":
        from silc.predict import Predictor

        return Predictor
    if name == "load":
        from silc.opening import load

        return load
    raise AttributeError(f"module 'silc' has no attribute {name!r}")
