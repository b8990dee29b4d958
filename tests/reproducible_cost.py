"""What a step of a reproducible job costs beside one of the same job as it is: `docs/reproducible.md` has the figures.

    mpiexec -n 2 python tests/reproducible_cost.py [LANES …]

One BLAS thread a rank.  The contestants take turns; times are medians over the turns of the slowest rank.
"""

from __future__ import annotations

import sys
import time
from pathlib import Path

import numpy as np
from threadpoolctl import threadpool_limits

import mpitrain
from mpitrain.train import Assembly, Job, assemble

ROOT = Path(__file__).resolve().parent.parent
JOBS = ("digits_mlp", "digits_cnn", "gpt_pydoc")
TURNS, STEPS = 15, 4


def turn(parts: Assembly) -> float:
    """Return the seconds of a step, averaged over a few, of the slowest rank."""
    comm = mpitrain.world()
    comm.barrier()
    began = time.perf_counter()
    parts.method.advance(parts.feed, parts.method.step + STEPS)
    return float(comm.allreduce(np.float64(time.perf_counter() - began), "max")) / STEPS


def main() -> None:
    comm = mpitrain.world()
    lanes = [int(each) for each in sys.argv[1:]] or [4, 12]
    with threadpool_limits(1):
        for name in JOBS:
            path = ROOT / "jobs" / f"{name}.toml"
            settings = [[], *([f"lanes={number}", "reproducible=true"] for number in lanes)]
            settings += [[*settings[-1], "method.kind=pipeline"]]
            contestants = [assemble(Job.load(path, each), comm) for each in settings]
            times = [[turn(each) for each in contestants] for _ in range(TURNS)][2:]  # the first two warm up
            medians = np.median(times, axis=0) * 1e3
            if comm.rank == 0:
                names = ["as it is", *(f"{number} lanes" for number in lanes), f"{lanes[-1]} lanes through a pipeline"]
                found = ", ".join(f"{what} {ms:.2f}" for what, ms in zip(names, medians, strict=True))
                print(f"{name} on {comm.size}: ms a step: {found}", flush=True)


if __name__ == "__main__":
    main()
