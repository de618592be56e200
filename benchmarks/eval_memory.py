"""How much memory the two evaluations need that could need most, above the model: `python benchmarks/eval_memory.py`.

Gives: a table, and benchmarks/results/eval_memory.json (figures, machine, versions, command). Each case is a process of
its own on one thread pool as PyTorch sets it; the peak is the kernel's (VmHWM), reset after the model was made, so that
everything else counts: the features, the pictures, the masks. Linux only.
Used by: whoever changes eval/protocols, eval/segment or metrics.first_hit_ranks.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from importlib import metadata
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from silc.config import ImageTowerConfig, ModelConfig, TextTowerConfig
from silc.data.tokenizer import byte_tokenizer
from silc.eval import segment
from silc.eval.metrics import first_hit_ranks
from silc.eval.protocols import PROTOCOLS
from silc.model.silc import Silc

LIMIT = 2 * 2**30
RESULTS = Path(__file__).with_name("results") / "eval_memory.json"
CLASSES, HEIGHT, WIDTH = 847, 1024, 2048
IMAGES, CAPTIONS, DIM = 100_000, 5, 64


def status(field: str) -> int:
    """Bytes of a field of /proc/self/status: VmRSS is now, VmHWM the most since the last reset."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{field}:"):
            return int(line.split()[1]) * 1024
    raise ValueError(f"this system does not tell {field}: the benchmark runs on Linux.")


class Measured:
    """Peak above what was there on entry, and seconds."""

    def __enter__(self) -> Measured:
        gc.collect()
        Path("/proc/self/clear_refs").write_text("5")
        self.before, self.began = status("VmRSS"), time.monotonic()
        return self

    def __exit__(self, *_: object) -> None:
        self.seconds = time.monotonic() - self.began
        self.above = status("VmHWM") - self.before


def write_set(folder: Path, height: int, width: int, pictures: int = 1) -> None:
    """Pictures of noise in large cells, and masks in which all the classes occur."""
    rng = np.random.default_rng(0)
    for part in ("images", "masks"):
        (folder / part).mkdir(parents=True)
    for i in range(pictures):
        cells = rng.integers(0, 256, (height // 32, width // 32, 3), dtype=np.uint8)
        Image.fromarray(cells.repeat(32, 0).repeat(32, 1)).save(folder / "images" / f"{i}.png")
        owner = (np.arange(height // 32 * (width // 32)) % CLASSES).astype(np.uint16).reshape(height // 32, -1)
        Image.fromarray(owner.repeat(32, 0).repeat(32, 1)).save(folder / "masks" / f"{i}.png")
    about = {"classes": [f"thing {i}" for i in range(CLASSES)], "background": True, "void": 65535}
    (folder / "classes.json").write_text(json.dumps(about))


def segmentation(protocol: str, quick: bool) -> dict[str, object]:
    """The whole task on one picture, with a ViT-B/16 and a text tower that is small only to save time."""
    torch.manual_seed(0)
    height, width = (HEIGHT // 4, WIDTH // 4) if quick else (HEIGHT, WIDTH)
    text = TextTowerConfig(vocab=259, length=48, width=64, depth=1, heads=1, mlp=64)
    model = Silc(ModelConfig(image=ImageTowerConfig(depth=2 if quick else 12), text=text)).eval()
    model.tokenizer = byte_tokenizer(48)
    with tempfile.TemporaryDirectory() as name:
        write_set(Path(name) / "set", height, width)
        with Measured() as measured:
            result = segment.run(model, Path(name) / "set", segment.Config(protocol=protocol))
    size = f"{CLASSES} classes, {width} x {height}"
    return {"case": f"segment {protocol}", "size": size, "above_model_bytes": measured.above,
            "seconds": round(measured.seconds, 1), "miou": result.metrics["miou"]}


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
    return {"case": f"retrieval {way}", "size": size, "queries": len(asked), "above_model_bytes": measured.above,
            "seconds": round(measured.seconds, 1), "recall_at_10": (ranks < 10).double().mean().item()}


def machine() -> dict[str, object]:
    info = Path("/proc/cpuinfo").read_text().splitlines()
    cpu = next((line.partition(":")[2].strip() for line in info if line.startswith("model name")), platform.machine())
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return {"cpu": cpu, "cores": os.cpu_count(), "threads": torch.get_num_threads(), "memory_bytes": memory,
            "system": f"{platform.system()} {platform.release()}"}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="small sizes, to see that it runs; the limit still holds")
    parser.add_argument("--queries", type=int, default=0, help="retrieval: only so many, all candidates; 0: all")
    parser.add_argument("--only", default="", help="cases whose name contains this")
    parser.add_argument("--out", type=Path, default=RESULTS)
    parser.add_argument("--case", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.case:
        kind, _, name = args.case.partition(" ")
        row = segmentation(name, args.quick) if kind == "segment" else retrieval(name, args.quick, args.queries)
        print(json.dumps(row))
        return
    cases = [f"segment {p.name}" for p in PROTOCOLS] + ["retrieval image_to_text", "retrieval text_to_image"]
    rows = []
    print(f"{'case':<26} {'size':<52} {'above the model':>16} {'seconds':>8}")
    for case in (c for c in cases if args.only in c):
        command = [sys.executable, __file__, "--case", case, "--queries", str(args.queries)]
        command += ["--quick"] * args.quick
        said = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout
        row = json.loads(said.splitlines()[-1])
        rows.append(row)
        above = f"{row['above_model_bytes'] / 2**20:,.0f} MiB"
        print(f"{case:<26} {row['size']:<52} {above:>16} {row['seconds']:>8}", flush=True)
    versions = {"python": platform.python_version(), **{n: metadata.version(n) for n in ("torch", "numpy", "pillow")}}
    words = ["python", "benchmarks/eval_memory.py", *sys.argv[1:]]
    data = {"command": " ".join(words), "limit_bytes": LIMIT, "machine": machine(), "versions": versions, "cases": rows}
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.write_text(json.dumps(data, indent=1) + "\n")
    over = [row["case"] for row in rows if row["above_model_bytes"] >= LIMIT]
    if over:
        sys.exit(f"over {LIMIT / 2**30:g} GiB: {', '.join(over)}")


if __name__ == "__main__":
    main()
