"""Step times and memory of a GPT that ranks divide, beside one rank alone and the data divided: interleaved.

    mpiexec -n 2 python tests/tensor_figures.py [--rounds 9] [--batch 8] [--width 128] [--context 128] [--layers 4]

Every contestant takes the same step: ``--batch`` windows in all, Adam, float32, one BLAS thread a rank.  "alone" is
rank 0 with the whole batch while the others wait.  Figures are medians over rounds of the slowest rank, ratios medians
of each round's ratio.  Memory is what parameters, gradients and optimizer state take, against the formula of
``docs/tensor-parallel.md``.
"""

from __future__ import annotations

import argparse
import statistics
from typing import Any

import numpy as np
from threadpoolctl import threadpool_limits

from mpitrain import Batch, Communicator, DataParallel, Key, Network, Plan, nn, world
from mpitrain.data.shares import share
from mpitrain.optim import Adam
from mpitrain.parallel.tensor import divided_network
from mpitrain.train.bench.contest import contest
from mpitrain.train.bench.tasks import Steps

VOCABULARY, EVER = 97, 10**9


class Windows:
    """A feed that deals the same windows out again and again."""

    def __init__(self, count: int, context: int) -> None:
        tokens = np.random.default_rng(0).integers(0, VOCABULARY, (count, context + 1))
        self.batch = Batch(tokens[:, :-1], tokens[:, 1:], np.arange(count))

    def share(self, rank: int, size: int, microbatches: int) -> Any:
        part = self.batch.part(slice(*share(len(self.batch), size, rank)))
        return type("Share", (), {"batch": lambda self, step: [part]})()


def set_up(comm: Communicator, tensor: Communicator | None, options: Any, sequence: bool = False) -> DataParallel:
    gpt = nn.GPT(VOCABULARY, options.context, options.layers, options.width, options.heads)
    loss = nn.CrossEntropy()
    model = divided_network(gpt, loss, tensor, sequence=sequence) if tensor else Network(gpt, loss)
    method = DataParallel(comm, across=tensor)
    method.setup(model, Adam(), Plan(Key(0), lambda step: 1e-3, EVER))
    return method


def steps(method: DataParallel, feed: Windows) -> Steps:
    return lambda count: (method.advance(feed, method.step + count), None)[1]


def predicted_bytes(options: Any, ranks: int) -> float:
    """Parameters, gradients and Adam's two moments in float32 of rank 0, whose parts are the largest."""
    w, layers = options.width, options.layers
    tokens, heads, units = (-(-size // ranks) for size in (VOCABULARY, options.heads, 4 * w))
    columns = heads * w // options.heads
    divided = tokens * w + layers * (4 * w * columns + 3 * columns + (2 * w + 1) * units)
    repeated = (options.context + 2) * w + layers * 6 * w
    return 4.0 * 4 * (divided + repeated)


def held_bytes(method: DataParallel) -> int:
    arrays = [method.params.flat, method.grads.flat, *method.optimizer_state.values()]
    return sum(array.nbytes for array in arrays)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--round-s", type=float, default=0.5, help="seconds of each contestant in a round")
    for name, default in (("batch", 8), ("width", 128), ("context", 128), ("layers", 4), ("heads", 4)):
        parser.add_argument(f"--{name}", type=int, default=default)
    options = parser.parse_args()
    threadpool_limits(1)
    comm = world()
    alone = comm.split(comm.rank)
    assert alone is not None
    feed = Windows(options.batch, options.context)
    methods = {
        "alone": set_up(alone, None, options),
        f"data = {comm.size}": set_up(comm, None, options),
        f"tensor = {comm.size}": set_up(alone, comm, options),
        "and sequence": set_up(alone, comm, options, sequence=True),
    }
    contestants = {name: steps(method, feed) for name, method in methods.items()}
    if comm.rank:
        contestants["alone"] = lambda count: None
    seconds = contest(comm, contestants, options.rounds, options.round_s)
    if comm.rank == 0:
        report(seconds, methods, options, comm.size)


def report(seconds: dict[str, list[float]], methods: dict[str, DataParallel], options: Any, ranks: int) -> None:
    tokens = options.batch * options.context
    for name, each in seconds.items():
        median = statistics.median(each)
        ratio = statistics.median(one / own for one, own in zip(seconds["alone"], each, strict=True))
        expected = predicted_bytes(options, ranks if "tensor" in name or "sequence" in name else 1)
        print(
            f"{name:12s} {median * 1e3:8.2f} ms a step  {tokens / median:9,.0f} tokens/s  {ratio:5.2f} x alone  "
            f"{held_bytes(methods[name]) / 2**20:7.3f} MiB, predicted {expected / 2**20:7.3f}",
            flush=True,
        )


if __name__ == "__main__":
    main()
