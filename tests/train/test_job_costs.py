"""What `mpitrain bench job` finds: memory as predicted under every method, and a pipeline's overhead by hand."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from commands import write_job

from mpitrain._errors import JobError
from mpitrain.comm import Communicator, LocalWorld
from mpitrain.comm.local import alone
from mpitrain.nn import Network
from mpitrain.parallel import PipelineParallel
from mpitrain.train import Job
from mpitrain.train.assembly import assemble
from mpitrain.train.bench.job import measure_job, memory_of
from mpitrain.train.bench.memory import Memory
from mpitrain.train.bench.overhead import overhead

TOML = """
[data]
source = "text"
path = "TEXT"
hold_out = "end"
options = { context = 6 }
[model]
kind = "gpt"
layers = 3
width = 32
heads = 4
dropout = 0.1
[optimizer]
kind = "adam"
[method]
microbatches = 4
[train]
batch_size = 16
steps = 3
"""

WIDTH, HIDDEN, LAYERS, CONTEXT = 32, 128, 3, 6
LETTERS = 27 + 1


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "text.txt"
    path.write_text("the quick brown fox jumps over the lazy dog; " * 12)
    return path


def job(file: Path, *settings: str) -> Job:
    return Job.from_toml(TOML.replace("TEXT", str(file)), "a.toml", settings)


def memory(comm: Communicator, job: Job) -> dict[str, Memory]:
    parts = assemble(job, comm)
    assert isinstance(parts.model, Network)
    parts.model.pool.drop_free()
    parts.method.advance(parts.feed, 3)
    return memory_of(comm, job, parts)


BLOCKS = LAYERS * (WIDTH * 3 * WIDTH + WIDTH * WIDTH + 2 * WIDTH * HIDDEN)
SMALL = LAYERS * (4 * WIDTH + 3 * WIDTH + WIDTH + HIDDEN + WIDTH) + 2 * WIDTH
TABLE, PLACES = LETTERS * WIDTH, CONTEXT * WIDTH
N = BLOCKS + SMALL + TABLE + PLACES
DIVIDED = BLOCKS + LAYERS * (3 * WIDTH + HIDDEN) + TABLE
"""What ranks along ``tensor`` divide of it: no norms, and no biases of rows."""

HALF = DIVIDED / 2 + N - DIVIDED

EMULATE, LANES = "precision.emulate=true", ["reproducible=true"]

METHODS: dict[str, tuple[int, list[str], tuple[float, float, float]]] = {
    "data": (3, [], (N, N, 2 * N)),
    "gradient 1": (4, ['method.kind="gradient"'], (N, N + N / 4, 2 * N / 4)),
    "tensor": (4, ["mesh.tensor=2"], (HALF, HALF, 2 * HALF)),
    "1f1b": (4, ["mesh.pipe=4"], ((N + TABLE) / 4, (N + TABLE) / 4, 2 * (N + TABLE) / 4)),
    "interleaved": (
        2, ["mesh.pipe=2", 'method.schedule="interleaved"', "method.chunks=2"],
        ((N + TABLE) / 2, (N + TABLE) / 2, (N + TABLE)),
    ),
    "zb-h1, tensor": (
        4, ["mesh.pipe=2", "mesh.tensor=2", 'method.schedule="zb-h1"'],
        ((HALF + TABLE / 2) / 2, (HALF + TABLE / 2) / 2, HALF + TABLE / 2),
    ),
    "data, gpipe": (
        4, ["mesh.data=2", "mesh.pipe=2", 'method.schedule="gpipe"'],
        ((N + TABLE) / 2, (N + TABLE) / 2, (N + TABLE)),
    ),
    "gradient 1, gpipe": (
        4, ['method.kind="gradient"', "mesh.data=2", "mesh.pipe=2", 'method.schedule="gpipe"'],
        ((N + TABLE) / 2, (N + TABLE) / 2 * 1.5, (N + TABLE) / 2),
    ),
    "data, bfloat16": (2, ['precision.compute="bfloat16"', EMULATE], (1.5 * N, N, 2 * N)),
    "gradient 1, float16": (
        3, ['method.kind="gradient"', 'precision.compute="float16"', EMULATE],
        (N / 2 + N / 3, N + N / 3, 2 * N / 3),
    ),
    "1f1b, bfloat16": (
        2, ["mesh.pipe=2", 'precision.compute="bfloat16"', EMULATE],
        (1.5 * (N + TABLE) / 2, (N + TABLE) / 2, N + TABLE),
    ),
    "gradient 1, 1f1b, bfloat16": (
        4, ['method.kind="gradient"', "mesh.data=2", "mesh.pipe=2", 'precision.compute="bfloat16"', EMULATE],
        ((N + TABLE) / 2, (N + TABLE) / 2 * 1.5, (N + TABLE) / 2),
    ),
    "local SGD": (2, ["method.average_every=2"], (N, N, 2 * N)),
    "lanes": (2, [*LANES, "lanes=5"], (N, 5 / 2 * (N + TABLE) + N, 2 * N)),
    "lanes, bfloat16": (
        2, [*LANES, "lanes=2", 'precision.compute="bfloat16"', EMULATE], (1.5 * N, N + TABLE + N, 2 * N)
    ),
    "lanes, gradient": (2, [*LANES, "lanes=4", 'method.kind="gradient"'], (N, 2 * (N + TABLE) + N / 2, N)),
    "lanes, pipe": (
        2, [*LANES, "lanes=2", "mesh.pipe=2"], ((N + TABLE) / 2, (2 + 1) * (N + TABLE) / 2, N + TABLE)
    ),
    "lanes, gradient, pipe": (
        4, [*LANES, "lanes=4", 'method.kind="gradient"', "mesh.data=2", "mesh.pipe=2"],
        ((N + TABLE) / 2, (2 + 1 / 2) * (N + TABLE) / 2, (N + TABLE) / 2),
    ),
}  # fmt: skip
"""Ranks, settings, and parameters, gradients and optimizer state on a rank, in numbers of 4 bytes.

In 16 bits passes read half as much besides.  A lane has a gradient of each use of a tied tensor.
"""

OTHERS = {
    "gradient 2": ['method.kind="gradient"', "method.stage=2"],
    "gradient 3": ['method.kind="gradient"', "method.stage=3", "method.bucket_bytes=4096"],
    "gradient 2, bfloat16": ['method.kind="gradient"', "method.stage=2", 'precision.compute="bfloat16"', EMULATE],
    "gradient 3, bfloat16": [
        'method.kind="gradient"', "method.stage=3", "method.bucket_bytes=4096", 'precision.compute="bfloat16"', EMULATE,
    ],
}  # fmt: skip


@pytest.mark.parametrize("name", METHODS)
def test_a_rank_holds_what_the_formulas_say(file, name):
    ranks, settings, numbers = METHODS[name]
    found = LocalWorld(ranks, timeout_s=20).run(memory, job(file, *settings))[0]
    for kind, expected in zip(("parameters", "gradients", "optimizer"), numbers, strict=True):
        assert found[kind].predicted_bytes == pytest.approx(4 * expected, rel=0.01), kind  # which pads
        assert found[kind].measured_bytes == pytest.approx(found[kind].predicted_bytes, rel=0.02), kind
    activations = found["activations"]
    assert activations.predicted_bytes is not None
    assert activations.predicted_bytes < activations.measured_bytes < 3 * activations.predicted_bytes


@pytest.mark.parametrize("name", OTHERS)
def test_so_do_shards_that_pass_through_buckets(file, name):
    """For whose formulas see test_bench_training, and test_parallel_ledger."""
    found = LocalWorld(3, timeout_s=20).run(memory, job(file, *OTHERS[name]))[0]
    for kind in ("parameters", "gradients", "optimizer"):
        assert found[kind].measured_bytes == pytest.approx(found[kind].predicted_bytes, rel=0.02), kind


def test_what_another_library_keeps_is_not_told(file, monkeypatch):
    monkeypatch.setattr("mpitrain.train.bench.job.Network", type(None))  # so that no model is one
    found = LocalWorld(1).run(memory, job(file))[0]
    assert list(found) == ["parameters", "gradients", "optimizer"]


CODECS: dict[str, tuple[list[str], int]] = {
    "topk": ([], BLOCKS),
    "powersgd": (["method.codec.rank=3"], BLOCKS + 3 * LAYERS * (3 * WIDTH + WIDTH + HIDDEN + WIDTH)),
    "int8": (["method.codec.min_size=800"], BLOCKS + TABLE),
}
"""Settings, and how many numbers are kept from step to step; with min_size = 1024 none of the smaller tensors."""


@pytest.mark.parametrize("name", CODECS)
def test_what_a_codec_keeps_is_counted_by_itself(file, name):
    settings, numbers = CODECS[name]
    found = LocalWorld(2, timeout_s=20).run(memory, job(file, f'method.codec.kind="{name}"', *settings))[0]
    assert found["codec"] == Memory(4 * numbers + 8, 4 * numbers + 8)  # and the count that it was left over from
    assert found["gradients"].predicted_bytes == pytest.approx(4 * N, rel=0.01)
    assert found["gradients"].measured_bytes == found["gradients"].predicted_bytes


def test_steps_between_two_averagings_are_counted(file, monkeypatch):
    """The method goes on to the end of a period, so that whole ones are timed."""
    taken, divided_by = [], []

    def timed(comm: Communicator, steps: Any, count: int) -> float:
        method = steps.parts.method
        before = method.step
        steps(count)
        taken.append(method.step - before)
        divided_by.append(count)
        return 0.01

    monkeypatch.setattr("mpitrain.train.bench.job.timed", timed)
    averaged = job(file, "method.average_every=5")
    LocalWorld(2, timeout_s=60).run(lambda comm: measure_job(averaged, comm, rounds=2, round_s=0.1))
    assert sorted(taken) == sorted(divided_by) == [5, 5, 10, 10, 10, 10]


def test_batches_that_do_not_divide_the_epoch_count_as_they_are(tmp_path, monkeypatch):
    """96 rows in batches of 40, 40 and 16, which are 32 in the mean."""

    def timed(comm: Communicator, steps: Any, count: int) -> float:
        steps(count)
        return 0.01

    monkeypatch.setattr("mpitrain.train.bench.job.timed", timed)
    monkeypatch.setattr("mpitrain.train.bench.job.product_flops_per_s", lambda comm, dtype: 1e9)
    path = write_job(tmp_path)
    uneven, even = (Job.load(path, [f"train.batch_size={size}"]) for size in (40, 32))
    found, expected = (measure_job(job, alone(), rounds=2, round_s=0.03) for job in (uneven, even))
    assert (found.batch_size, expected.batch_size) == (40, 32)
    assert found.samples_per_s == expected.samples_per_s == pytest.approx(32 / 0.01)
    assert found.flops == expected.flops
    assert found.utilisation == expected.utilisation


def slices(rank: int, *events: tuple[str, str, float, float]) -> list[dict[str, Any]]:
    """Events of a rank's trace: phases (``F``, ``BW``, the whole), and waits for messages and for a sum."""
    names = {"F": "forward", "BW": "backward", "all": "gradients", "message": "wait irecv", "sum": "allreduce"}
    found = []
    for kind, where, start, stop in events:
        category = {"message": "wait", "sum": "comm"}.get(kind, "phase")
        arguments = {"communicator": where} if where else {}
        found.append(
            {"ph": "X", "pid": rank, "name": names[kind], "cat": category, "ts": start, "dur": stop - start,
             "args": arguments}
        )  # fmt: skip
    return found


def test_a_pipelines_overhead_by_hand(file):
    """Two ranks, two microbatches: waits for messages are no work, sums over other ranks are, waits between passes not.

    Work: rank 0 two F of 2 and two BW of 4; rank 1 two F of 2, the second with a sum, and two BW of 4, after waits.
    """
    first = slices(
        0, ("all", "", 0, 20), ("F", "", 0, 2), ("F", "", 2, 4), ("BW", "", 4, 12), ("message", "pipe", 4, 8),
        ("message", "pipe", 12, 15), ("BW", "", 15, 20), ("message", "pipe", 15, 16),
    )  # fmt: skip
    second = slices(
        1, ("all", "", 0, 16), ("F", "", 0, 4), ("message", "pipe", 0, 2), ("BW", "", 4, 8), ("F", "", 8, 10),
        ("sum", "data", 8, 9), ("BW", "", 10, 14), ("all", "", 30, 34),
    )  # fmt: skip

    def check(comm: Communicator) -> None:
        parts = assemble(job(file, "mesh.pipe=2", "method.microbatches=2"), comm)
        assert isinstance(parts.method, PipelineParallel)
        found = overhead(parts.method, [*second, *first], [0, 1])
        work = (2 + 2 + 4 + 4) + (2 + 2 + 4 + 4)
        assert found.measured == pytest.approx((20 + 16 + 4) / work - 1)
        assert (found.simulated, found.formula) == (pytest.approx(1 / 2), 1 / 2)
        slow = [{**each, "ts": 2 * each["ts"], "dur": 2 * each["dur"]} for each in second]
        # Rank 1 takes 4 and 8: F, then its 24, then the last BW of rank 0: 30; the mean work is 18.
        assert overhead(parts.method, [*slow, *first], [0, 1]).simulated == pytest.approx(30 / 18 - 1)

    LocalWorld(2).run(check)


def test_a_gpu_is_refused(file):
    on_gpu = job(file).model_copy(update={"device": "gpu"})
    with pytest.raises(JobError, match="device: is measured on the CPU only; got gpu"):
        LocalWorld(1).run(lambda comm: measure_job(on_gpu, comm))
