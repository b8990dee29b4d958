"""Runs a command that may hang or crash, keeps what it prints, and says in a few words how it ended."""

from __future__ import annotations

import subprocess
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

_GRACE_S = 5.0
"""What a command gets to end after it was asked to."""


@dataclass(frozen=True)
class Ended:
    """A command that has ended.

    Parameters
    ----------
    code : int or None
        Exit code; None if it was ended at the limit.
    seconds : float
        Wall time.
    output : str
        All that was printed, standard error included.
    """

    code: int | None
    seconds: float
    output: str

    @property
    def ending(self) -> str:
        """How it ended, in a few words."""
        if self.code is None:
            return f"no end after {self.seconds:.0f} s"
        lines = [line.strip() for line in self.output.splitlines() if any(map(str.isalnum, line))]
        error = next((line for line in lines if "error" in line.lower()), lines[0] if lines else "no output")
        return f"exit code {self.code}: {error}"


def run_limited(argv: Sequence[str], env: Mapping[str, str], limit_s: float) -> Ended:
    """Run a command to its end, or to ``limit_s`` seconds."""
    with tempfile.TemporaryFile("w+", errors="replace") as log:
        began = time.monotonic()
        code = _run(argv, env, limit_s, log.fileno())
        seconds = time.monotonic() - began
        log.seek(0)
        return Ended(code, seconds, log.read())


def _run(argv: Sequence[str], env: Mapping[str, str], limit_s: float, output: int) -> int | None:
    child = subprocess.Popen(argv, env=env, stdin=subprocess.DEVNULL, stdout=output, stderr=output)
    try:
        return child.wait(limit_s)
    except subprocess.TimeoutExpired:
        return None
    finally:
        _end(child)


def _end(child: subprocess.Popen[bytes]) -> None:
    if child.poll() is None:
        child.terminate()  # a launcher that is killed at once leaves its ranks behind
    try:
        child.wait(_GRACE_S)
    except subprocess.TimeoutExpired:
        child.kill()
        child.wait()
