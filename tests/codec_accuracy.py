"""What codecs cost in accuracy and save on the wire: `python tests/codec_accuracy.py` prints a table for the docs."""

from __future__ import annotations

from functools import cache

import numpy as np
from accuracy import JOBS, RANKS, run

from mpitrain.arrays import FlatBuffer, Key
from mpitrain.comm import Communicator, LocalWorld
from mpitrain.comm.codecs import CompressedSum, make_codec
from mpitrain.train.job import Job
from mpitrain.train.models import build_model
from mpitrain.train.samples import load_samples

JOB = "digits_cnn"
SEEDS = (0, 1, 2, 3, 4)
CODECS = (
    '"fp16"',
    '"bf16"',
    '"int8"',
    '"topk"',
    '{ kind = "topk", values = "fp16" }',
    '"powersgd"',
    '{ kind = "powersgd", rank = 2 }',
)


@cache
def accuracies(codec: str) -> tuple[float, ...]:
    """Test accuracy in % for each seed; ``""``: uncompressed."""
    setting = [f"method.codec={codec}"] if codec else []
    return tuple(100 * run(JOB, f"seed={seed}", *setting)["test_accuracy"] for seed in SEEDS)


def points_lost(codec: str) -> float:
    return float(np.mean(accuracies("")) - np.mean(accuracies(codec)))


def wire_ratio(codec: str, ranks: int = RANKS) -> float:
    """How many times fewer bytes a rank sends for the gradients of a step, by the ledger.

    Of n bytes in the ledger an allreduce has each rank send 2(p−1)/p·n, any other collective (p−1)/p·n on average.
    """
    job = Job.load(JOBS / f"{JOB}.toml", [f"method.codec={codec}"])
    layout = build_model(job, load_samples(job).facts).layout
    section = job.method.codec
    assert section is not None

    def sent(comm: Communicator) -> float:
        compressed = CompressedSum(comm, make_codec(section.kind, **section.arguments()), layout, Key(job.seed))
        comm.ledger.reset()
        compressed.reduce(FlatBuffer(layout), 0)
        return sum(
            (2 if operation == "allreduce" else 1) * count.logical_bytes
            for (_, operation), count in comm.ledger.snapshot().items()
        )

    return 2 * layout.nbytes / float(np.mean(LocalWorld(ranks).run(sent)))


def row(codec: str) -> str:
    found = accuracies(codec)
    values = " ".join(f"{value:.2f}" for value in found)
    lost = f"{points_lost(codec):+.2f} | {wire_ratio(codec):.1f} | {wire_ratio(codec, 4):.1f}" if codec else "0 | 1 | 1"
    return f"| `{codec or 'none'}` | {values} | {np.mean(found):.2f} | {lost} |"


if __name__ == "__main__":
    print("| codec | test accuracy in %, seeds 0 to 4 | mean | points lost | × fewer bytes, 2 ranks | 4 ranks |")
    print("|---|---|---|---|---|---|")
    for codec in ("", *CODECS):
        print(row(codec), flush=True)
