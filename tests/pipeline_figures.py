"""What a pipeline costs: step times of every schedule beside the formulas and the simulator's prediction.

    mpiexec -n 2 python tests/pipeline_figures.py [--layers 4] [--width 128] [--rows 4] [--microbatches 8] [--rounds 15]
    python tests/pipeline_figures.py --picture docs/pipeline.png     # the schedules, from the simulator

Stages of equal cost: transformer blocks, without embeddings and head, in float32 under SGD, one BLAS thread a rank.
Each round takes some steps of each contestant in turn.  "serial" is a run of the same microbatches on one rank, all
ranks side by side, so that the cores are as busy as with a pipeline.  The overhead is p · step time / serial time − 1.
The simulator is handed the times of each unit, measured side by side too, and half a ping-pong of one activation.
"""

from __future__ import annotations

import argparse
import statistics
import time
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
from threadpoolctl import threadpool_limits

from mpitrain import Batch, Communicator, DataParallel, Key, Network, PipelineParallel, Plan, nn, world
from mpitrain.nn.gpt import block
from mpitrain.optim import SGD
from mpitrain.parallel.pipeline import FAMILIES, Costs, Sizes, measured, partition, simulate
from mpitrain.train.bench.contest import contest
from mpitrain.train.bench.tasks import Steps

EVER = 10**9

CHUNKS = {"interleaved": 2}
"""Stages a rank, where not 1."""


class Repeated:
    """A feed of the same microbatches again and again, so that loading costs nothing."""

    def __init__(self, microbatches: list[Batch]) -> None:
        self._microbatches = microbatches

    def share(self, rank: int, size: int, microbatches: int) -> Repeated:
        return self

    def batch(self, step: int) -> list[Batch]:
        return self._microbatches


def network(options: Any) -> Network:
    blocks = {f"block{i}": block(options.width, 4) for i in range(options.layers)}
    return Network(nn.Sequential(**blocks), nn.MeanSquaredError())


def microbatches(options: Any) -> list[Batch]:
    rng, shape = np.random.default_rng(0), (options.rows, options.context, options.width)
    draw = lambda: rng.standard_normal(shape).astype(np.float32)  # noqa: E731
    return [Batch(draw(), draw(), np.arange(options.rows)) for _ in range(options.microbatches)]


def trainer(method: Any, options: Any) -> Steps:
    method.setup(network(options), SGD(), Plan(Key(0), lambda step: 1e-4, EVER))
    feed = Repeated(microbatches(options))
    return lambda steps: (method.advance(feed, method.step + steps), None)[1]


def stage_costs(comm: Communicator, options: Any, sizes: Sizes) -> Costs:
    """Return what the stages cost when all ranks measure at the same time; the median over the ranks."""
    comm.barrier()
    times = comm.allgather_object(measured(network(options), microbatches(options)[0], options.rounds))
    cuts = list(pairwise(partition([1.0] * len(times[0]), sizes.stages)))

    def of(name: str) -> list[float]:
        units = [statistics.median(getattr(unit, name) for unit in ranks) for ranks in zip(*times, strict=True)]
        return [sum(units[start:stop]) for start, stop in cuts]

    return Costs(of("forward_s"), of("backward_input_s"), of("backward_weight_s"), message(comm, options))


def message(comm: Communicator, options: Any, repeats: int = 50) -> float:
    """Return half the time of a ping-pong of one activation between ranks 0 and 1."""
    array, times = np.zeros((options.rows, options.context, options.width), np.float32), []
    for _ in range(repeats):
        began = time.perf_counter()
        if comm.rank == 0:
            comm.send(array, 1)
            comm.recv(array, 1, out=array)
        elif comm.rank == 1:
            comm.recv(array, 0, out=array)
            comm.send(array, 0)
        times.append((time.perf_counter() - began) / 2)
    return float(comm.broadcast(np.float64(statistics.median(times))))


def measure(comm: Communicator, options: Any) -> None:
    alone = comm.split(comm.rank)
    assert alone is not None
    m = options.microbatches
    schedules = {
        name: FAMILIES[name].schedule(Sizes(comm.size, CHUNKS.get(name, 1), m)) for name in FAMILIES
    }  # fmt: skip
    units = 2 * options.layers
    contestants = {
        "serial": trainer(DataParallel(alone, microbatches=m), options),
        "split": trainer(PipelineParallel(alone, schedule="zb-h1", microbatches=m), options),
    }
    for name, schedule in schedules.items():
        chunks = schedule.sizes.chunks
        method = PipelineParallel(comm, schedule=name, chunks=chunks, microbatches=m, costs=[1.0] * units)
        contestants[name] = trainer(method, options)
    seconds = contest(comm, contestants, options.rounds, options.round_s)
    predicted = {name: simulate(each, stage_costs(comm, options, each.sizes)) for name, each in schedules.items()}
    if comm.rank:
        return
    serial, split = seconds.pop("serial"), seconds.pop("split")
    cost = statistics.median(two / one for one, two in zip(serial, split, strict=True)) - 1
    print(f"{options.layers} blocks of width {options.width}, {m} microbatches of {options.rows} x {options.context}")
    print(f"serial, {comm.size} ranks side by side: {statistics.median(serial) * 1e3:.1f} ms a step")
    print(f"the same with W after B instead of layer by layer: {cost:+.1%}\n")
    print("| schedule | chunks | ms a step | ms simulated | overhead | overhead simulated | formula, F = B = W |")
    print("|---|---|---|---|---|---|---|")
    for name, each in seconds.items():
        overhead = statistics.median(own * comm.size / one - 1 for own, one in zip(each, serial, strict=True))
        shown = [overhead, predicted[name].overhead, float(FAMILIES[name].overhead(schedules[name].sizes))]
        times_ms = f"{statistics.median(each) * 1e3:.1f} | {predicted[name].length * 1e3:.1f}"
        print(f"| {name} | {CHUNKS.get(name, 1)} | {times_ms} | " + " | ".join(f"{part:.1%}" for part in shown) + " |")


def draw(path: Path) -> None:
    """Draw the schedules of four ranks and eight microbatches, at F = B = W."""
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot
    from matplotlib.patches import Patch

    figure, axes = pyplot.subplots(len(FAMILIES), 1, figsize=(11, 7.5), sharex=True, layout="constrained")
    for axis, (name, family) in zip(axes, FAMILIES.items(), strict=True):
        sizes = Sizes(4, CHUNKS.get(name, 1), 8)
        parts = [[1 / sizes.chunks] * sizes.stages] * 3
        timeline = simulate(family.schedule(sizes), Costs(*parts))
        for rank, spans in enumerate(timeline.spans):
            for span in spans:
                draw_span(axis, rank, span, sizes)
        chunks = f", {sizes.chunks} chunks" if sizes.chunks > 1 else ""
        axis.set_title(f"{name}{chunks}: overhead {timeline.overhead:.1%}", loc="left", fontsize=10)
        axis.set_yticks(range(4), [f"rank {rank}" for rank in range(4)])
        axis.set_ylim(3.5, -0.5)
        axis.spines[["top", "right"]].set_visible(False)
    axes[-1].set_xlim(0, 33.2)
    axes[-1].set_xlabel("time, in forward passes of a rank")
    figure.legend(
        handles=[Patch(color=each, label=label) for each, label in LEGEND.items()], ncols=4, loc="outside upper right"
    )
    figure.savefig(path, dpi=100)


COLOURS = {"F": "#8ecae6", "BW": "#ffb703", "B": "#f4a3b5", "W": "#b7e4c7"}
WORDS = {"F": "forward", "BW": "backward", "B": "gradient of the input", "W": "gradient of the weights"}
LEGEND = {COLOURS[kind]: words for kind, words in WORDS.items()}


def draw_span(axis: Any, rank: int, span: Any, sizes: Sizes) -> None:
    """Draw an operation, later chunks paler, with the number of its microbatch."""
    kind, stage, microbatch = span.operation
    later = stage // sizes.ranks
    axis.barh(
        rank, span.stop - span.start, left=span.start, height=0.9, color=COLOURS[kind], alpha=1 - 0.35 * later,
        edgecolor="white", linewidth=0.6,
    )  # fmt: skip
    axis.text((span.start + span.stop) / 2, rank, str(microbatch), ha="center", va="center", fontsize=6.5)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, default in {
        "layers": 4, "width": 128, "context": 64, "rows": 4, "microbatches": 8, "rounds": 15
    }.items():  # fmt: skip
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--round-s", type=float, default=0.4, help="seconds of each contestant in a round")
    parser.add_argument("--picture", type=Path, help="draw the schedules into this file, and measure nothing")
    options = parser.parse_args()
    if options.picture:
        draw(options.picture)
        return
    threadpool_limits(1)
    measure(world(), options)


if __name__ == "__main__":
    main()
