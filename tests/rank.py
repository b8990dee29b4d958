"""What ``tests/run.py`` starts on every rank: pytest, with output, report and temporary files of the rank's own."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest

_RANK_VARIABLES = ("OMPI_COMM_WORLD_RANK", "PMI_RANK", "PMIX_RANK", "SLURM_PROCID")


def main(folder: str, *arguments: str) -> int:
    rank = next(os.environ[name] for name in _RANK_VARIABLES if name in os.environ)
    with (Path(folder) / f"rank-{rank}.log").open("wb") as log:
        for stream in (1, 2):
            os.dup2(log.fileno(), stream)
    own = [f"--junitxml={folder}/rank-{rank}.xml", f"--basetemp={folder}/tmp-{rank}"]
    return int(pytest.main([*own, *arguments]))


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
