"""The command itself: what it says of its verbs, and how it ends."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from silc import __version__
from silc.cli import VERBS, main


def test_it_tells_every_verb_and_its_version(capsys: pytest.CaptureFixture[str]) -> None:
    main([])
    told = capsys.readouterr().out
    assert all(f"\n  {verb} " in told for verb in VERBS)
    main(["--version"])
    assert capsys.readouterr().out == f"silc {__version__}\n"
    with pytest.raises(SystemExit) as end:
        main(["evla"])
    assert end.value.code == 2 and capsys.readouterr().err == "silc: no verb 'evla'. Perhaps you meant 'eval'.\n"


@pytest.mark.parametrize("words", [["recipes"], ["plan", "clip"], ["train", "silc", "--help"]], ids=" ".join)
def test_it_ends_without_a_word_where_nobody_reads_on(words: list[str]) -> None:
    """As `silc recipes | head -1`, whose end of the pipe is closed before all is said."""
    reads, writes = os.pipe()
    os.close(reads)
    ended = subprocess.run([sys.executable, "-m", "silc", *words], stdout=writes, stderr=subprocess.PIPE, text=True,
                           timeout=100, check=False)  # fmt: skip
    os.close(writes)
    assert (ended.returncode, ended.stderr) == (141, "")
