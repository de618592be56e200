"""What every benchmark shares: time in turns, memory in processes of its own, peers, and the raw file that is kept.

Gives: interleave, median, ratio, timed, Measured, status, matmul_peak, pin, alone, need, have, Missing, arguments,
check, target, write, machine, versions.
Used by: every file of benchmarks/. A quick run keeps no file unless told where (--out FOLDER).
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import importlib
import importlib.util
import json
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from importlib import metadata
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

RESULTS = Path(__file__).with_name("results")
INSTALL = "python -m pip install -r benchmarks/requirements.txt; see benchmarks/README.md"
CLONE = "git clone it into a folder and name that folder by SILC_PEERS; see benchmarks/README.md"
PACKAGES = {"open_clip": "open_clip_torch", "cv2": "opencv-python-headless", "PIL": "pillow", "sklearn": "scikit-learn"}
_asked: dict[str, str] = {}
_left_out: list[str] = []


# ---------------------------------------------------------------- time


def interleave(cases: Mapping[str, Callable[[], object]], rounds: int = 7, warm: int = 1) -> dict[str, list[float]]:
    """Seconds of each case by name, [rounds] each, in turns A B A B: what slows the machine slows all alike."""
    for _ in range(warm):
        for run in cases.values():
            run()
    seconds: dict[str, list[float]] = {name: [] for name in cases}
    for _ in range(rounds):
        for name, run in cases.items():
            gc.collect()
            began = time.perf_counter()
            run()
            seconds[name].append(time.perf_counter() - began)
    return seconds


def median(seconds: Sequence[float]) -> float:
    return statistics.median(seconds)


def ratio(a: Sequence[float], b: Sequence[float]) -> float:
    """Median over rounds of a / b, each pair from the same round: above 1, b is the faster."""
    return statistics.median(x / y for x, y in zip(a, b, strict=True))


def timed(case: str, seconds: Sequence[float], flops: float = 0.0, peak: float = 0.0, **more: Any) -> dict[str, Any]:
    """A row of a table: median, least and most seconds, and where `flops` of one run are given FLOP/s and its share of
    the measured `peak`."""
    row = {"case": case, **more, "median_seconds": median(seconds), "least_seconds": min(seconds)}
    row["most_seconds"] = max(seconds)
    if flops:
        row["flops_per_second"] = flops / row["median_seconds"]
        if peak:
            row["peak_share"] = row["flops_per_second"] / peak
    return row


def pin(threads: int = 1, quick: bool = False) -> None:
    """This process on so many threads, and unless `quick` on as many cores (the last ones it may use)."""
    torch.set_num_threads(threads)
    if not quick and hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[-threads:])


def matmul_peak(dtype: torch.dtype, threads: int = 1, size: int = 2048, products: int = 7) -> dict[str, float]:
    """FLOP/s of square products measured now, `best` and `median` of several: the ceiling of all that is GEMM."""
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    a, b = (torch.randn(size, size).to(dtype) for _ in range(2))
    out = torch.empty(size, size, dtype=dtype)
    seconds = interleave({"product": lambda: torch.mm(a, b, out=out)}, products)["product"]
    torch.set_num_threads(before)
    work = 2.0 * size**3
    return {"best": work / min(seconds), "median": work / median(seconds)}


# ---------------------------------------------------------------- memory


def status(field: str) -> int:
    """Bytes of a field of /proc/self/status: VmRSS is now, VmHWM the most since the last reset."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{field}:"):
            return int(line.split()[1]) * 1024
    raise ValueError(f"this system does not tell {field}: memory is measured on Linux only.")


class Measured:
    """Peak bytes above what was there on entry, and seconds."""

    def __enter__(self) -> Measured:
        gc.collect()
        trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
        if trim is not None:  # else pages that the allocator kept from earlier work would serve this one uncounted
            trim(0)
        Path("/proc/self/clear_refs").write_text("5")
        self.before, self.began = status("VmRSS"), time.monotonic()
        return self

    def __exit__(self, *_: object) -> None:
        self.seconds = time.monotonic() - self.began
        self.above = status("VmHWM") - self.before


def alone(file: str | Path, case: str, quick: bool = False, *words: str) -> dict[str, Any]:
    """One case of a benchmark in a process of its own; what it prints last is its result, as JSON."""
    command = [sys.executable, str(file), "--case", case, *["--quick"] * quick, *words]
    said = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout
    return dict(json.loads(said.splitlines()[-1]))


# ---------------------------------------------------------------- peers


class Missing(Exception):
    """A peer is not here; the message says how to get it."""


def need(*names: str) -> list[ModuleType]:
    """Peers as modules, in order. A name is a module's (`open_clip`, `lightly.loss`), or a file's inside the folder of
    git checkouts that SILC_PEERS names (`open_clip_git/src/open_clip/loss.py`); `dinov2.*` comes from there too.

    Raises Missing with what to do when one is absent.
    """
    return [_from_file(name) if name.endswith(".py") else _from_package(name) for name in names]


def have(*names: str) -> list[ModuleType] | None:
    """`need`, or None with a line that says what is left out, which is kept in the raw file."""
    try:
        return need(*names)
    except Missing as missing:
        line = str(missing)
        if line not in _left_out:
            _left_out.append(line)
            print(f"left out: {line}", file=sys.stderr, flush=True)
        return None


def _from_package(name: str) -> ModuleType:
    root = name.partition(".")[0]
    if root == "dinov2":
        folder = str(_checkout("dinov2"))
        if folder not in sys.path:
            sys.path.append(folder)
    elif importlib.util.find_spec(root) is None:
        raise Missing(f"{root} is not installed ({INSTALL})")
    else:
        package = PACKAGES.get(root, root)
        _asked[package] = metadata.version(package)
    _torchvision_operators()
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise Missing(f"{name} cannot be imported: {error} ({INSTALL})") from None


def _from_file(name: str) -> ModuleType:
    repository, _, inside = name.partition("/")
    path = _checkout(repository) / inside
    if not path.is_file():
        raise Missing(f"{name} is not in the checkouts of SILC_PEERS ({CLONE})")
    alias = "peer_" + "_".join(Path(name).with_suffix("").parts)
    spec = importlib.util.spec_from_file_location(alias, path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def _checkout(repository: str) -> Path:
    folder = Path(os.environ.get("SILC_PEERS", "")) / repository
    if "SILC_PEERS" not in os.environ or not folder.is_dir():
        raise Missing(f"the checkout {repository}/ is not here ({CLONE})")
    command = ["git", "-C", str(folder), "rev-parse", "--short=12", "HEAD"]
    told = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, check=False)
    _asked[repository] = told.stdout.strip() or "unknown commit"
    return folder


def _torchvision_operators() -> None:
    """A torchvision built for CUDA cannot load its operators beside a CPU torch, and then refuses to be imported
    because it describes two that are not there: declare them. Nothing here calls them."""
    if importlib.util.find_spec("torchvision") is None or "torchvision" in sys.modules:
        return
    try:
        importlib.import_module("torchvision")
    except RuntimeError:
        for name in [name for name in sys.modules if name.partition(".")[0] == "torchvision"]:
            del sys.modules[name]
        library = torch.library.Library("torchvision", "FRAGMENT")
        for operator in ("nms", "qnms"):
            library.define(f"{operator}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
        _asked["torchvision's operators"] = "declared only: built for CUDA, on a CPU torch"
        _kept.append(library)


_kept: list[torch.library.Library] = []


# ---------------------------------------------------------------- in and out


def arguments(doc: str | None, **extra: Any) -> argparse.Namespace:
    """The flags that all benchmarks have, and `extra` ones by name and default (a list takes several values)."""
    form = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=doc, formatter_class=form)
    parser.add_argument("--quick", action="store_true", help="small sizes and few rounds, to see that it runs")
    parser.add_argument("--rounds", type=int, default=0, help="timed rounds; 0: 7, quick 2")
    parser.add_argument("--out", type=Path, help="folder of the raw file; default benchmarks/results, quick: none")
    parser.add_argument("--case", help=argparse.SUPPRESS)
    for name, default in extra.items():
        many = isinstance(default, list | tuple)
        kind = type(default[0] if many else default)
        parser.add_argument(f"--{name}", type=kind, default=default, nargs="+" if many else None)
    args = parser.parse_args()
    args.rounds = args.rounds or (2 if args.quick else 7)
    if args.out is None and not args.quick:
        args.out = RESULTS
    return args


def check(what: str, got: Tensor, expected: Tensor, limit: float) -> dict[str, Any]:
    """Are two answers equal? The error is the norm of the difference over the norm of what is expected."""
    size = expected.detach().double().norm().item()
    error = (got.detach().double() - expected.detach().double()).norm().item() / (size or 1.0)
    return {"what": what, "relative_error": error, "limit": limit, "holds": error <= limit}


def target(
    what: str, against: str, figure: float, *, least: float | None = None, most: float | None = None
) -> dict[str, Any]:
    """A row of the claims: the figure (a ratio unless `what` says otherwise) and the bound it must keep."""
    holds = (least is None or figure >= least) and (most is None or figure <= most)
    bounds = {name: bound for name, bound in (("least", least), ("most", most)) if bound is not None}
    return {"what": what, "against": against, "figure": figure, **bounds, "holds": holds}


def write(
    out: Path | None,
    name: str,
    rows: Sequence[Mapping[str, Any]],
    targets: Sequence[Mapping[str, Any]] = (),
    checks: Sequence[Mapping[str, Any]] = (),
    **facts: Any,
) -> Path | None:
    """Print rows, targets and checks, and keep them in OUT/name.json with the command, the machine and versions.

    In rows, keys that end in _seconds, _bytes, _per_second and _share tell their unit. Exits with an error when an
    equality check fails: a speed bought with a different answer is no result.
    """
    for kind, entries in (("row", rows), ("target", targets), ("check", checks)):
        for entry in entries:
            said = (f"{k} {v:.4g}" if isinstance(v, float) else f"{k} {v}" for k, v in entry.items())
            print(f"{kind}: {', '.join(said)}")
    words = [w for i, w in enumerate(sys.argv[1:], 1) if w != "--out" and sys.argv[i - 1] != "--out"]
    data = {
        "benchmark": name,
        "command": " ".join(["python", f"benchmarks/{Path(sys.argv[0]).name}", *words]),
        "machine": machine(),
        "versions": versions(),
        "left_out": _left_out,
        **facts,
        "rows": list(rows),
        "targets": list(targets),
        "checks": list(checks),
    }
    path = None
    if out is not None:
        path = out / f"{name}.json"
        out.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(data, indent=1) + "\n")
        print(f"kept in {path}")
    unequal = [entry["what"] for entry in checks if not entry["holds"]]
    if unequal:
        sys.exit(f"answers differ: {'; '.join(unequal)}")
    return path


def machine() -> dict[str, Any]:
    info = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    cpu = next((line.partition(":")[2].strip() for line in info if line.startswith("model name")), platform.machine())
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    facts = {"cpu": cpu, "cores": os.cpu_count(), "threads": torch.get_num_threads(), "memory_bytes": memory}
    if torch.cuda.is_available():
        facts["gpu"] = torch.cuda.get_device_name()
    return {**facts, "system": f"{platform.system()} {platform.release()}"}


def versions() -> dict[str, str]:
    """Of Python, of what silc stands on, and of the peers this run asked for."""
    ours = {name: metadata.version(name) for name in ("torch", "numpy", "pillow")}
    return {"python": platform.python_version(), **ours, **_asked}
