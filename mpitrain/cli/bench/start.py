"""How a benchmark starts ranks that print for themselves."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Sequence

from mpitrain.comm.launch import launch_command


def start_ranks(ranks: int, arguments: Sequence[str]) -> int:
    """Run ``mpitrain`` with some arguments on ranks of its own; return 0, 2 for a user's error, 1 for any other.

    Parameters
    ----------
    ranks : int
        How many.
    arguments : sequence of str
        Of the command line, ``-n`` not among them.
    """
    argv, env = launch_command(ranks, [sys.executable, "-m", "mpitrain", *arguments])
    code = subprocess.run(argv, env=env, check=False).returncode
    return code if code in (0, 1, 2) else 1
