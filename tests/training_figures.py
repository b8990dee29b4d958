"""Step times of the training methods side by side, and beside PyTorch DDP over gloo: one process a rank, interleaved.

    mpiexec -n 2 python tests/training_figures.py [--hidden 256 1024 2048] [--batch 64 64 128] [--rounds 15] [--ddp]
    mpiexec -n 2 python tests/training_figures.py --torch [--hidden 1024] [--batch 64] [--gpt 8] [--rounds 15]

An MLP 784-h-h-10 under Adam in float32, one BLAS thread a rank; ``--batch`` is per rank.  Each round takes some steps
of each contestant in turn; a figure is the median over rounds, ratios are medians of each round's ratio.  "alone" is a
serial run on each rank, all side by side, that share nothing: what is lost to it is what the method costs (and what
fewer copies of everything give back).  ``--ddp`` needs PyTorch: ``gradient_as_bucket_view=True``, fused Adam.
``--torch`` compares three ways to train one PyTorch module with fused Adam: `mpitrain.torch`, DDP, and alone.  The
module is the MLP, or a GPT of 4 layers of width 128 with 4 heads on 128 characters, whose samples are characters.
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
CHARACTERS, CONTEXT = 96, 128
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


@dataclass(frozen=True)
class TorchTask:
    """What PyTorch trains: a module, and a batch of inputs and labels on each rank."""

    module: Callable[[], Any]
    batch: Callable[[int], tuple[np.ndarray, np.ndarray]]

    def parts(self, rank: int) -> tuple[Any, Any, Any]:
        """The module, the same on all ranks, and this rank's tensors."""
        import torch

        torch.set_num_threads(1)
        torch.manual_seed(0)
        inputs, labels = (torch.from_numpy(each) for each in self.batch(rank))
        return self.module(), inputs, labels


def torch_mlp(hidden: int, count: int) -> TorchTask:
    def module() -> Any:
        from torch.nn import Linear, ReLU, Sequential

        return Sequential(
            Linear(INPUTS, hidden), ReLU(), Linear(hidden, hidden), ReLU(), Linear(hidden, CLASSES)
        )  # fmt: skip

    return TorchTask(module, lambda rank: samples(rank, count))


def torch_gpt(count: int) -> TorchTask:
    def module() -> Any:
        from torch_gpt import TorchGPT

        return TorchGPT(CHARACTERS, CONTEXT, layers=4, width=128, heads=4)

    def batch(rank: int) -> tuple[np.ndarray, np.ndarray]:
        tokens = np.random.default_rng(rank).integers(0, CHARACTERS, (count, CONTEXT + 1))
        return tokens[:, :-1].copy(), tokens[:, 1:].copy()

    return TorchTask(module, batch)


def ddp(comm: Communicator, task: TorchTask) -> Steps:
    from torch import distributed
    from torch.nn.parallel import DistributedDataParallel

    module, inputs, labels = task.parts(comm.rank)
    if not distributed.is_initialized():
        store = comm.broadcast_object(f"{tempfile.gettempdir()}/mpitrain-figures-{os.getpid()}")
        distributed.init_process_group("gloo", init_method=f"file://{store}", rank=comm.rank, world_size=comm.size)
    return torch_steps(DistributedDataParallel(module, gradient_as_bucket_view=True), inputs, labels)


def torch_alone(comm: Communicator, task: TorchTask) -> Steps:
    return torch_steps(*task.parts(comm.rank))


def torch_steps(module: Any, inputs: Any, labels: Any) -> Steps:
    import torch

    adam = torch.optim.Adam(module.parameters(), lr=1e-3, fused=True)

    def run(steps: int) -> None:
        for _ in range(steps):
            adam.zero_grad()
            torch.nn.functional.cross_entropy(module(inputs).flatten(0, -2), labels.flatten()).backward()
            adam.step()

    return run


def torch_ours(comm: Communicator, task: TorchTask) -> Steps:
    import torch

    import mpitrain.torch as mt

    module, inputs, labels = task.parts(comm.rank)
    opt = mt.DistributedOptimizer(torch.optim.Adam(module.parameters(), lr=1e-3, fused=True), module, comm)

    def run(steps: int) -> None:
        for _ in range(steps):
            opt.zero_grad()
            outputs = module(inputs).flatten(0, -2)
            torch.nn.functional.cross_entropy(outputs, labels.flatten(), reduction="sum").backward()
            opt.step(count=labels.numel())

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
    parser.add_argument("--hidden", type=int, nargs="*", default=[256, 1024, 2048])
    parser.add_argument("--batch", type=int, nargs="*", default=[64, 64, 128], help="per rank, one for each width")
    parser.add_argument("--gpt", type=int, nargs="*", default=[8], help="windows per rank, with --torch")
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--round-s", type=float, default=0.15, help="seconds of each contestant in a round")
    parser.add_argument("--ddp", action="store_true", help="PyTorch DDP over gloo too")
    parser.add_argument("--torch", action="store_true", help="a PyTorch module under mpitrain.torch and under DDP")
    options = parser.parse_args()
    threadpool_limits(1)
    comm = world()
    if options.torch:
        compare_torch(comm, options)
    else:
        compare(comm, options)


def compare_torch(comm: Communicator, options: argparse.Namespace) -> None:
    """mpitrain.torch beside DDP."""
    tasks = [
        (f"MLP h = {h}, {n} a rank", torch_mlp(h, n), n) for h, n in zip(options.hidden, options.batch, strict=True)
    ]
    tasks += [(f"GPT, {n} windows a rank", torch_gpt(n), n * CONTEXT) for n in options.gpt]
    for title, task, count in tasks:
        ways = {"torch": torch_ours, "DDP": ddp, "alone": torch_alone}
        contestants = {name: way(comm, task) for name, way in ways.items()}
        seconds = contest(comm, contestants, options.rounds, options.round_s)
        report(comm, f"{title}, {comm.size} ranks, {comm.transport}", seconds, count)


def compare(comm: Communicator, options: argparse.Namespace) -> None:
    """The methods beside each other, and beside DDP."""
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
            contestants["DDP"] = ddp(comm, torch_mlp(hidden, count))
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
