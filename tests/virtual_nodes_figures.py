"""What `virtual_nodes.py` runs on every rank: times of allreduce and of training steps, the slowest rank's each."""

from __future__ import annotations

import json
import os
import platform
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from mpi4py import MPI

import mpitrain
from mpitrain import DataParallel, Key, Network, Plan, nn
from mpitrain.arrays import Batch, FlatBuffer, Layout
from mpitrain.comm import Communicator
from mpitrain.comm.codecs import CODECS, Codec, CompressedSum, make_codec
from mpitrain.optim import SGD

MIB = (16, 64)
HIDDEN = [1024, 1024]  # 1.86 million parameters with 784 inputs and 10 classes
BATCH = 8
SHARES = {"allreduce": 1.0, "alltoall": 0.5, "allgather": 0.5, "reduce": 1.0, "broadcast": 1.0}
"""What passes through the busier direction of a link between two ranks, of the bytes in the ledger."""

Trial = Callable[[], object]


def times(comm: Communicator, trials: Mapping[str, Trial], rounds: int) -> dict[str, list[float]]:
    """Milliseconds of the slowest rank, turn by turn; the first round is not counted."""
    found: dict[str, list[float]] = {name: [] for name in trials}
    for _ in range(rounds + 1):
        for name, trial in trials.items():
            comm.barrier()
            start = time.perf_counter()
            trial()
            found[name].append(1e3 * (time.perf_counter() - start))
    return {name: comm.allreduce(np.array(ms[1:]), "max").tolist() for name, ms in found.items()}


def allreduce(comm: Communicator, nbytes: int, rounds: int) -> dict[str, Any]:
    """An array and a `Communicator.empty` buffer, and the library itself."""
    x, shared = np.ones(nbytes // 4, np.float32), comm.empty(nbytes // 4)
    trials: dict[str, Trial] = {
        "library": lambda: MPI.COMM_WORLD.Allreduce(MPI.IN_PLACE, x),
        "`allreduce(x, out=x)`": lambda: comm.allreduce(x, out=x),
        "`allreduce(x)`": lambda: comm.allreduce(x),
        "the same, `x` from `empty`, `out=x`": lambda: comm.allreduce(shared, out=shared),
        "its plan": comm.allreduce_plan(shared),
    }
    x[...] = shared[...] = 0  # sums that stay finite
    return {"nbytes": nbytes, "ms": times(comm, trials, rounds)}


class Timed:
    """A communicator that adds up the time which its collectives take."""

    def __init__(self, comm: Communicator) -> None:
        self._comm, self.seconds = comm, 0.0

    def __getattr__(self, name: str) -> Any:
        found = getattr(self._comm, name)
        if name not in SHARES:
            return found

        def timed(*args: Any, **options: Any) -> Any:
            start = time.perf_counter()
            try:
                return found(*args, **options)
            finally:
                self.seconds += time.perf_counter() - start

        return timed


class TimedSum(CompressedSum):
    """Keeps for each step how long the codec computes: what a sum takes without its collectives."""

    def __init__(self, comm: Communicator, codec: Codec, layout: Layout, key: Key) -> None:
        self._timed = Timed(comm)
        super().__init__(self._timed, codec, layout, key)  # type: ignore[arg-type]
        self.ms: list[float] = []

    def reduce(self, grads: FlatBuffer, step: int, count: float = 1.0) -> bool:
        self._timed.seconds, start = 0.0, time.perf_counter()
        finite = super().reduce(grads, step, count)
        self.ms.append(1e3 * (time.perf_counter() - start - self._timed.seconds))
        return finite


class Repeated:
    """The same batch at every step, for both kinds of feed."""

    def __init__(self) -> None:
        rng = np.random.default_rng(0)
        self._batch = Batch(rng.random((BATCH, 784), np.float32), np.arange(BATCH) % 10, np.arange(BATCH))

    def share(self, rank: int, size: int, microbatches: int) -> Repeated:
        return self

    def batch(self, step: int) -> list[Batch]:
        return [self._batch]


class Training:
    """Steps of one method, taken one at a time."""

    def __init__(self, comm: Communicator, codec: str | None, steps: int) -> None:
        self._method, self._feed = DataParallel(comm, codec=codec), Repeated()
        network = Network(nn.MODELS["mlp"](784, 10, hidden=HIDDEN), nn.CrossEntropy())
        self._method.setup(network, SGD(), Plan(Key(0), lambda step: 1e-3, steps))
        self._sum = TimedSum(comm, make_codec(codec), network.layout, Key(0)) if codec else None
        if self._sum:
            self._method._compressed = self._sum

    def __call__(self) -> None:
        self._method.advance(self._feed, self._method.step + 1)

    def codec_ms(self, comm: Communicator) -> float:
        """Median over the steps but the first, of the slowest rank."""
        return float(np.median(comm.allreduce(np.array(self._sum.ms[1:]), "max"))) if self._sum else 0.0


def through_the_link(comm: Communicator, step: Trial) -> float:
    """Bytes of one step through the busier direction of a link, operation by operation."""
    comm.ledger.reset()
    step()
    return sum(
        SHARES.get(operation, 0.0) * each.logical_bytes
        for (axis, operation), each in comm.ledger.snapshot().items()
        if axis == comm.ledger.axis
    )


def steps(comm: Communicator, rounds: int) -> list[dict[str, Any]]:
    """Every codec, with what its step is made of."""
    alone = comm.split(comm.rank)
    assert alone is not None
    compute = Training(alone, None, rounds + 2)
    runs = {name: Training(comm, name, rounds + 2) for name in (None, *CODECS)}
    found = times(comm, {"compute": compute} | {str(name): run for name, run in runs.items()}, rounds)
    return [
        {
            "codec": str(name or "none"),
            "step_ms": float(np.median(found[str(name)])),
            "compute_ms": float(np.median(found["compute"])),
            "codec_ms": run.codec_ms(comm),
            "nbytes": through_the_link(comm, run),
        }
        for name, run in runs.items()
    ]


def main(report: str, rounds: str) -> None:
    comm = mpitrain.world()
    ranks_per_node = comm.node.size
    found = {
        "versions": f"{comm.library.split(',')[0]}, Linux {platform.release()}, Python {platform.python_version()}, "
        f"NumPy {np.__version__}",
        "ranks_per_node": ranks_per_node,
        "transport": comm.transport,
        "allreduce": [allreduce(comm, mib << 20, int(rounds)) for mib in MIB],
        "steps": steps(comm, 3 * int(rounds)) if ranks_per_node == 1 else [],
        "load": os.getloadavg()[1],
    }
    if comm.rank == 0:
        Path(report).write_text(json.dumps(found))


if __name__ == "__main__":
    main(*sys.argv[1:])
