"""Figures are drawn by a process of their own: sweeps imports nothing of plots.

It is started before there are rows, so that it has imported what it needs once they are there.
"""

import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


@contextmanager
def drawing() -> Iterator[Callable[[Path], bool]]:
    """Gives draw(DIR) -> whether the figures of the rows there are drawn, else what is wrong was
    printed. To be called once at most; what waits at the end is ended."""
    command = [sys.executable, "-m", "plots", "-"]
    with subprocess.Popen(
        command,
        cwd=ROOT,
        stdin=subprocess.PIPE,
        start_new_session=True,  # Ctrl-C ends the run, and the run ends this
    ) as process:

        def draw(root: Path) -> bool:
            process.communicate(os.fsencode(root.resolve()))
            return process.returncode == 0

        try:
            yield draw
        finally:
            process.kill()
