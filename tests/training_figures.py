"""Step times of the training methods side by side, and beside PyTorch DDP over gloo: one process a rank, interleaved.

    mpiexec -n 2 python tests/training_figures.py [--hidden 256 1024 2048] [--batch 64 64 128] [--rounds 15] [--ddp]

An MLP 784-h-h-10 under Adam in float32, one BLAS thread a rank; ``--batch`` is per rank.  Each round takes some steps
of each contestant in turn; a figure is the median over rounds, ratios are medians of each round's ratio.  "alone" is a
serial run on each rank, all side by side, that share nothing: what is lost to it is what the method costs (and what
fewer copies of everything give back).  ``--ddp`` needs PyTorch: ``gradient_as_bucket_view=True``, fused Adam.
"""

from __future__ import annotations

import argparse
import os
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from threadpoolctl import threadpool_limits

from mpitrain import Batch, Communicator, DataParallel, GradientParallel, Key, Network, Plan, nn, world
from mpitrain.optim import Adam

INPUTS, CLASSES = 784, 10
EVER = 10**9

Steps = Callable[[int], None]
"""Takes so many steps."""


@dataclass(frozen=True)
class Repeated:
    """A feed that gives each rank one batch again and again, so that loading costs nothing."""

    batch: Batch

    def share(self, rank: int, size: int, microbatches: int) -> Repeated.Share:
        return Repeated.Share(self.batch)

    @dataclass(frozen=True)
    class Share:
        kept: Batch

        def batch(self, step: int) -> Sequence[Batch]:
            return [self.kept]


def samples(rank: int, count: int) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(rank)
    return rng.standard_normal((count, INPUTS)).astype(np.float32), rng.integers(0, CLASSES, count)


def method(comm: Communicator, make: Callable[..., Any], hidden: int, count: int) -> Steps:
    network = Network(nn.MODELS["mlp"](INPUTS, CLASSES, hidden=[hidden, hidden]), nn.CrossEntropy())
    trained = make(comm)
    trained.setup(network, Adam(), Plan(Key(0), lambda step: 1e-3, EVER))
    inputs, labels = samples(comm.rank, count)
    feed = Repeated(Batch(inputs, labels, np.arange(count) + comm.rank * count))
    return lambda steps: (trained.advance(feed, trained.step + steps), None)[1]


def ddp(comm: Communicator, hidden: int, count: int) -> Steps:
    import torch
    from torch import distributed
    from torch.nn.parallel import DistributedDataParallel

    if not distributed.is_initialized():
        torch.set_num_threads(1)
        store = comm.broadcast_object(f"{tempfile.gettempdir()}/mpitrain-figures-{os.getpid()}")
        distributed.init_process_group("gloo", init_method=f"file://{store}", rank=comm.rank, world_size=comm.size)
    torch.manual_seed(0)
    layers = torch.nn.Sequential(
        torch.nn.Linear(INPUTS, hidden), torch.nn.ReLU(), torch.nn.Linear(hidden, hidden), torch.nn.ReLU(),
        torch.nn.Linear(hidden, CLASSES),
    )  # fmt: skip
    model = DistributedDataParallel(layers, gradient_as_bucket_view=True)
    adam = torch.optim.Adam(model.parameters(), lr=1e-3, fused=True)
    loss = torch.nn.CrossEntropyLoss()
    inputs, labels = (torch.from_numpy(each) for each in samples(comm.rank, count))

    def run(steps: int) -> None:
        for _ in range(steps):
            adam.zero_grad()
            loss(model(inputs), labels).backward()
            adam.step()

    return run


def contest(comm: Communicator, contestants: dict[str, Steps], rounds: int, round_s: float) -> dict[str, list[float]]:
    """Return seconds per step of each contestant in each round, the slowest rank's."""
    counts = {}
    for name, steps in contestants.items():
        steps(3)
        one = timed(comm, steps, 3)
        counts[name] = max(1, int(round_s / one))
    seconds: dict[str, list[float]] = {name: [] for name in contestants}
    for number in range(rounds):
        order = list(contestants) if number % 2 == 0 else list(contestants)[::-1]
        for name in order:
            seconds[name].append(timed(comm, contestants[name], counts[name]))
    return seconds


def timed(comm: Communicator, steps: Steps, count: int) -> float:
    comm.barrier()
    began = time.perf_counter()
    steps(count)
    return float(comm.allreduce((time.perf_counter() - began) / count, "max"))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--hidden", type=int, nargs="+", default=[256, 1024, 2048])
    parser.add_argument("--batch", type=int, nargs="+", default=[64, 64, 128], help="per rank, one for each width")
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--round-s", type=float, default=0.15, help="seconds of each contestant in a round")
    parser.add_argument("--ddp", action="store_true", help="PyTorch DDP over gloo too")
    options = parser.parse_args()
    threadpool_limits(1)
    comm = world()
    alone = comm.split(comm.rank)
    assert alone is not None
    for hidden, count in zip(options.hidden, options.batch, strict=True):
        makes = {
            "data": DataParallel,
            "gradient 1": GradientParallel,
            "gradient 2": lambda c: GradientParallel(c, stage=2),
        }
        contestants = {name: method(comm, make, hidden, count) for name, make in makes.items()}
        contestants["alone"] = method(alone, DataParallel, hidden, count)
        if options.ddp:
            contestants["DDP"] = ddp(comm, hidden, count)
        seconds = contest(comm, contestants, options.rounds, options.round_s)
        report(comm, f"h = {hidden}, {count} a rank, {comm.size} ranks, {comm.transport}", seconds, count)


def report(comm: Communicator, title: str, seconds: dict[str, list[float]], count: int) -> None:
    """Print a table on rank 0."""
    if comm.rank:
        return
    print(title)
    rivals = [name for name in ("data", "alone", "DDP") if name in seconds]
    for name, each in seconds.items():
        median = statistics.median(each)
        ratios = {
            rival: statistics.median(theirs / own for theirs, own in zip(seconds[rival], each, strict=True))
            for rival in rivals
        }
        print(
            f"  {name:10s} {median * 1e3:8.3f} ms a step  {comm.size * count / median:8,.0f} samples/s  "
            + "  ".join(f"{ratio:5.2f} x {rival}" for rival, ratio in ratios.items()),
            flush=True,
        )


if __name__ == "__main__":
    main()
