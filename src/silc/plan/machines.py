"""Cards and links: what the vendors' data sheets say, and the shares of it that are assumed to be reached.

Gives: Card, CARDS, get_card, and the assumptions of the plan as named constants.
Used by: estimate.py, memory.py, cli.py.
"""

from __future__ import annotations

from dataclasses import dataclass

from silc.config import Config
from silc.plain import nearest

GB, GIB = 1e9, 2.0**30


@dataclass(frozen=True)
class Card:
    """One accelerator. Dense rates without sparsity; links in one direction, per card."""

    name: str
    bf16: float
    """Peak FLOP/s of bf16 matrix products with fp32 sums."""
    fp32: float
    """Peak FLOP/s of fp32 without TF32."""
    memory: float
    """Bytes; data sheets of memory say GB where they mean GiB."""
    rate: float
    """Bytes/s of that memory."""
    inside: float
    """Bytes/s to the other cards of the node: NVLink, else PCIe."""
    outside: float
    """Bytes/s to other nodes: the network adapter that this card has to itself in the vendor's usual node."""


CARDS = {
    # NVIDIA H100 and H200 SXM data sheets: 1,979 TFLOP/s sparse = 989 dense, 67 fp32, HBM3 and HBM3e, NVLink
    # 900 GB/s both ways; one 400 Gbit/s adapter a card in DGX H100 and H200
    "h100": Card("H100 SXM 80 GB", 989e12, 67e12, 80 * GIB, 3.35e12, 450 * GB, 50 * GB),
    "h200": Card("H200 SXM 141 GB", 989e12, 67e12, 141 * GIB, 4.8e12, 450 * GB, 50 * GB),
    # NVIDIA DGX B200 data sheet: 72 PFLOP/s fp8 sparse for eight = 2,250 bf16 dense; 192 GB on the chip, NVLink 5
    "b200": Card("B200 192 GB", 2250e12, 75e12, 192 * GIB, 8e12, 900 * GB, 50 * GB),
    # NVIDIA A100 data sheet: 312 dense, 19.5 fp32, NVLink 600 GB/s both ways; 200 Gbit/s a card in DGX A100
    "a100-80": Card("A100 SXM 80 GB", 312e12, 19.5e12, 80 * GIB, 2.0e12, 300 * GB, 25 * GB),
    "a100-40": Card("A100 SXM 40 GB", 312e12, 19.5e12, 40 * GIB, 1.55e12, 300 * GB, 25 * GB),
    # NVIDIA L40S data sheet: 733 sparse = 362 dense, 91.6 fp32, no NVLink: PCIe 4 x16; 200 Gbit/s for two cards
    "l40s": Card("L40S 48 GB", 362e12, 91.6e12, 48 * GIB, 0.86e12, 32 * GB, 12.5 * GB),
    # NVIDIA Ada architecture paper: RTX 4090 165 dense with fp32 sums, 82.6 fp32, PCIe 4 x16; 100 Gbit/s for four
    "4090": Card("RTX 4090 24 GB", 165e12, 82.6e12, 24 * GIB, 1.0e12, 32 * GB, 3.1 * GB),
    # not a vendor's figure: one Zen 4 core (AVX512-BF16) as measured by 2048^3 products, and a 25 Gbit/s network
    "cpu": Card("one CPU core with 8 GB", 0.19e12, 0.085e12, 8 * GIB, 0.02e12, 5 * GB, 0.4 * GB),
}

USABLE = 0.92
"""Share of a card's memory that tensors may fill; the rest is for the driver, kernels and fragmentation."""
MFU = 0.45
"""Assumed share of the card's peak that the arithmetic reaches. Not measured for silc on any GPU yet."""
LINK = 0.8
"""Assumed share of a link's rate that a collective reaches."""
OVERLAP = 0.8
"""Assumed share of the computing time behind which the exchange of weights and gradients can hide."""
PICTURE_SECONDS = 0.7e-3
"""Seconds of one CPU core to read and decode a 500 x 375 JPEG and tokenise its caption."""
VIEW_SECONDS = 0.0
"""Seconds of one CPU core for each view that is cut from it."""
PIXEL_SECONDS = 7.9e-9
"""Seconds of one CPU core for each pixel of these views."""
PICTURE_BYTES = 60e3
"""Assumed size of a stored picture with its captions."""


def picture_seconds(config: Config) -> float:
    """Seconds of one CPU core to make one pair ready: a 500 x 375 JPEG and all its views."""
    v, s = config.views, config.model.preprocess.size
    pixels = v.globals * v.global_size**2 + v.locals * v.local_size**2
    views = v.globals + v.locals
    if config.objective.contrast_views != "global":
        pixels, views = pixels + s**2, views + 1
    return PICTURE_SECONDS + VIEW_SECONDS * views + PIXEL_SECONDS * pixels


def get_card(name: str) -> Card:
    """The card of that name. ValueError names the nearest one otherwise."""
    if name not in CARDS:
        raise ValueError(f"--gpu {name!r} is not known." + nearest(name, CARDS))
    return CARDS[name]
