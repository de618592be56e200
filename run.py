"""One command from a fresh clone: makes .venv, installs what the command needs, runs it. Needs only Python 3.11+.

python3 run.py quickstart [options]    the main job: train, evaluate, report
python3 run.py test [pytest options]   lint, types and all tests
python3 run.py silc VERB [options]     any other silc command
"""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
import venv
from pathlib import Path

ROOT = Path(__file__).resolve().parent
HOME = ROOT / ".venv"
PYTHON = HOME / ("Scripts/python.exe" if os.name == "nt" else "bin/python")
EXTRAS = {"test": "dev", "quickstart": "quickstart", "silc": "quickstart"}


def install(extra: str) -> None:
    """Make .venv hold silc with the extra, at the versions of constraints.txt; quick when nothing changed."""
    inputs = [(ROOT / name).read_bytes() for name in ("pyproject.toml", "constraints.txt")]
    wanted = hashlib.sha256(b"\0".join(inputs)).hexdigest()
    done = HOME / f".installed-{extra}"
    if done.exists() and done.read_text() == wanted:
        return
    if not PYTHON.exists():
        print(f"making {HOME}", flush=True)
        venv.create(HOME, with_pip=True)
    print(f"installing silc[{extra}] ...", flush=True)
    pip = [str(PYTHON), "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
    run([*pip, "--constraint", str(ROOT / "constraints.txt"), "--editable", f"{ROOT}[{extra}]"])
    done.write_text(wanted)


def run(command: list[str]) -> None:
    status = subprocess.run(command, cwd=ROOT, check=False).returncode
    if status:
        raise SystemExit(status)


def test(options: list[str]) -> None:
    """What CI runs: lint, types, then every test."""
    run([str(PYTHON), "-m", "ruff", "check", "."])
    run([str(PYTHON), "-m", "mypy"])
    workers = [] if any(o.startswith("-n") for o in options) else ["-n", str(min(4, os.cpu_count() or 1))]
    run([str(PYTHON), "-m", "pytest", *workers, *options])


def main() -> None:
    if sys.version_info < (3, 11):  # noqa: UP036  an older one can read this file
        raise SystemExit(f"silc needs Python 3.11 or newer; this is {sys.version.split()[0]}.")
    if len(sys.argv) < 2 or sys.argv[1] not in EXTRAS:
        raise SystemExit((__doc__ or "").strip())
    verb, options = sys.argv[1], sys.argv[2:]
    try:
        install(EXTRAS[verb])
    except subprocess.CalledProcessError as error:  # venv without ensurepip, as on some Linux distributions
        raise SystemExit(f"could not make {HOME} ({error}); install your system's python3-venv package.") from None
    if verb == "test":
        test(options)
    else:
        run([str(PYTHON), "-m", "silc", *(options if verb == "silc" else [verb, *options])])


if __name__ == "__main__":
    main()
