"""Runs a command with a hard time limit, after which nothing of it is left."""

from __future__ import annotations

import os
import signal
import subprocess
import time
from collections.abc import Sequence
from pathlib import Path
from typing import IO

GRACE_S = 3.0


def run_limited(
    argv: Sequence[str], env: dict[str, str], timeout_s: float, output: IO[bytes] | None = None
) -> int | None:
    """Return the exit code of a command, or None if it had to be killed.

    A launcher is asked to end first, since it alone can end ranks on its behalf; then all of its session is killed.
    """
    process = subprocess.Popen(
        argv, env=env, stdin=subprocess.DEVNULL, stdout=output, stderr=subprocess.STDOUT if output else None,
        start_new_session=True,
    )  # fmt: skip
    try:
        return process.wait(timeout_s)
    except subprocess.TimeoutExpired:
        process.terminate()
        return None
    finally:
        _end_session(process)


def _end_session(process: subprocess.Popen[bytes]) -> None:
    deadline = time.monotonic() + GRACE_S
    while _session(process.pid) and process.returncode is None and time.monotonic() < deadline:
        process.poll()
        time.sleep(0.05)
    for pid in _session(process.pid):
        try:
            os.kill(pid, signal.SIGKILL)
        except ProcessLookupError:
            continue
    process.wait()


def _session(session: int) -> list[int]:
    """Return the processes of a session; ranks have process groups of their own, but not sessions."""
    found = []
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = stat.read_text().rpartition(")")[2].split()
        except OSError:
            continue  # it has just ended
        if int(fields[3]) == session and fields[0] != "Z":
            found.append(int(stat.parent.name))
    return found
