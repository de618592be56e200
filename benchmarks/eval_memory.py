"""How much memory the two evaluations need that could need most, above the model: `python benchmarks/eval_memory.py`.

Gives: benchmarks/results/eval_memory.json. Each case is a process of its own on one thread pool as PyTorch sets it; the
peak is the kernel's (VmHWM), reset after the model was made, so that everything else counts: the features, the
pictures, the masks. `--queries N` ranks only so many queries among all candidates. Linux only.
Used by: growth.py, pages.py; whoever changes eval/protocols, eval/segment or metrics.first_hit_ranks.
"""

from __future__ import annotations

import json
import sys
import tempfile
from pathlib import Path

import numpy as np
import torch
from harness import Measured, alone, arguments, target, write
from PIL import Image

from silc.config import ImageTowerConfig, ModelConfig, TextTowerConfig
from silc.data.tokenizer import byte_tokenizer
from silc.eval import segment
from silc.eval.metrics import first_hit_ranks
from silc.eval.protocols import PROTOCOLS
from silc.model.silc import Silc

LIMIT = 2 * 2**30
CLASSES, HEIGHT, WIDTH = 847, 1024, 2048
IMAGES, CAPTIONS, DIM = 100_000, 5, 64


def write_set(folder: Path, height: int, width: int, classes: int = CLASSES, pictures: int = 1) -> None:
    """Pictures of noise in large cells, and masks in which all the classes occur."""
    rng = np.random.default_rng(0)
    for part in ("images", "masks"):
        (folder / part).mkdir(parents=True)
    for i in range(pictures):
        cells = rng.integers(0, 256, (height // 32, width // 32, 3), dtype=np.uint8)
        Image.fromarray(cells.repeat(32, 0).repeat(32, 1)).save(folder / "images" / f"{i}.png")
        owner = (np.arange(height // 32 * (width // 32)) % classes).astype(np.uint16).reshape(height // 32, -1)
        Image.fromarray(owner.repeat(32, 0).repeat(32, 1)).save(folder / "masks" / f"{i}.png")
    about = {"classes": [f"thing {i}" for i in range(classes)], "background": True, "void": 65535}
    (folder / "classes.json").write_text(json.dumps(about))


def segmentation(protocol: str, quick: bool, classes: int) -> dict[str, object]:
    """The whole task on one picture, with a ViT-B/16 and a text tower that is small only to save time."""
    torch.manual_seed(0)
    height, width = (HEIGHT // 4, WIDTH // 4) if quick else (HEIGHT, WIDTH)
    text = TextTowerConfig(vocab=259, length=48, width=64, depth=1, heads=1, mlp=64)
    model = Silc(ModelConfig(image=ImageTowerConfig(depth=2 if quick else 12), text=text)).eval()
    model.tokenizer = byte_tokenizer(48)
    with tempfile.TemporaryDirectory() as name:
        write_set(Path(name) / "set", height, width, classes)
        with Measured() as measured:
            result = segment.run(model, Path(name) / "set", segment.Config(protocol=protocol))
    size = f"{classes} classes, {width} x {height}"
    return {
        "case": f"segment {protocol}",
        "size": size,
        "above_bytes": measured.above,
        "once_seconds": round(measured.seconds, 1),
        "miou": result.metrics["miou"],
    }


def retrieval(way: str, quick: bool, queries: int) -> dict[str, object]:
    """One direction: features made, ranks of some queries (0: of all) among all candidates. A caption is its image's
    vector and noise."""
    images, generator = IMAGES // (20 if quick else 1), torch.Generator().manual_seed(0)
    with Measured() as measured:
        image = torch.nn.functional.normalize(torch.randn(images, DIM, generator=generator), dim=1)
        owner = torch.arange(images).repeat_interleave(CAPTIONS)
        text = torch.randn(len(owner), DIM, generator=generator).div_(DIM**0.5).add_(image[owner])
        text = torch.nn.functional.normalize(text, dim=1)
        pairs = torch.stack([owner, torch.arange(len(owner))], dim=1)
        asked, among = (image, text) if way == "image_to_text" else (text, image)
        pairs = pairs if way == "image_to_text" else pairs.flip(1)
        asked = asked[: queries or len(asked)]
        ranks = first_hit_ranks(asked, among, pairs[pairs[:, 0] < len(asked)])
    size = f"{images:,} images, {len(owner):,} captions, {DIM} numbers"
    return {
        "case": f"retrieval {way}",
        "size": size,
        "queries": len(asked),
        "above_bytes": measured.above,
        "once_seconds": round(measured.seconds, 1),
        "recall_at_10": (ranks < 10).double().mean().item(),
    }


def main() -> None:
    args = arguments(__doc__, queries=0, classes=CLASSES, only="")
    quick = args.quick
    if args.case:
        kind, _, name = args.case.partition(" ")
        row = segmentation(name, quick, args.classes) if kind == "segment" else retrieval(name, quick, args.queries)
        print(json.dumps(row))
        return
    cases = [f"segment {p.name}" for p in PROTOCOLS] + ["retrieval image_to_text", "retrieval text_to_image"]
    words = ("--queries", str(args.queries), "--classes", str(args.classes))
    rows = [alone(__file__, case, quick, *words) for case in cases if args.only in case]
    targets = [
        target(f"memory of {row['case']}, {row['size']}: GiB", "limit", row["above_bytes"] / 2**30, most=LIMIT / 2**30)
        for row in rows
    ]
    write(args.out, "eval_memory", rows, targets)
    over = [row["case"] for row in rows if row["above_bytes"] >= LIMIT]
    if over:
        sys.exit(f"over {LIMIT / 2**30:g} GiB: {', '.join(over)}")


if __name__ == "__main__":
    main()
