"""Checks that any codec must pass: each is called with a communicator and a codec, on every rank.

Expected values are computed serially in float64 from every rank's gradients, which all ranks can make.
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import product
from typing import Any

import numpy as np

from mpitrain.arrays import FlatBuffer, Key, Layout, Segment
from mpitrain.comm import Communicator
from mpitrain.comm.codecs import Bf16, Codec, CompressedSum, Fp16, Int8, PowerSGD, TopK

KEY = Key(7, "test")
TAKEN = {"kernel": (3, 3, 8, 16), "weight": (40, 30)}
OTHERS = {"bias": (30,), "empty": (0, 4)}
STATISTICS = {"mean": (2048,)}

CODECS: dict[str, Codec] = {
    "fp16": Fp16(),
    "bf16": Bf16(),
    "int8": Int8(),
    "int8 in small blocks": Int8(block=10),
    "topk": TopK(ratio=0.1),
    "topk as fp16": TopK(ratio=0.1, values="fp16"),
    "topk as int8": TopK(ratio=0.1, values="int8"),
    "topk of everything": TopK(ratio=1.0),
    "powersgd": PowerSGD(),
    "powersgd of rank 1": PowerSGD(rank=1),
}
CHECKS: list[Callable[[Communicator, Codec], None]] = []


def check(function: Callable[[Communicator, Codec], None]) -> Callable[[Communicator, Codec], None]:
    CHECKS.append(function)
    return function


def layout(dtype: Any = np.float32) -> Layout:
    tensors = [Segment(name, shape) for name, shape in (TAKEN | OTHERS).items()]
    statistics = [Segment(name, shape, group="statistics", rate=0.1) for name, shape in STATISTICS.items()]
    return Layout.build([*tensors, *statistics], dtype)


def gradients(rank: int, step: int, dtype: Any = np.float32) -> dict[str, np.ndarray]:
    """What a rank has at a step: nothing on rank 1; where it is not compressed, integers, of which sums are exact."""
    rng = np.random.default_rng([rank, step])
    found = {name: 10.0**number * rng.standard_normal(shape) for number, (name, shape) in enumerate(TAKEN.items())}
    found |= {name: rng.integers(-9, 9, shape) for name, shape in (OTHERS | STATISTICS).items()}
    return {name: (values * (rank != 1)).astype(dtype) for name, values in found.items()}


def total(size: int, step: int, dtype: Any = np.float32) -> dict[str, np.ndarray]:
    """The serial sum, in float64."""
    every = [gradients(rank, step, dtype) for rank in range(size)]
    return {name: np.sum([each[name].astype(np.float64) for each in every], axis=0) for name in every[0]}


def buffer(values: dict[str, np.ndarray], dtype: Any = np.float32) -> FlatBuffer:
    filled = FlatBuffer(layout(dtype))
    for name, value in values.items():
        filled.views[name][...] = value
    return filled


def reduced(comm: Communicator, compressed: CompressedSum, step: int, count: float = 1.0) -> FlatBuffer:
    dtype = compressed.residual.layout.dtype
    grads = buffer(gradients(comm.rank, step, dtype), dtype)
    compressed.reduce(grads, step, count)
    return grads


def start(comm: Communicator, codec: Codec, dtype: Any = np.float32) -> CompressedSum:
    return CompressedSum(comm, codec, layout(dtype), KEY)


@check
def nothing_is_lost(comm: Communicator, codec: Codec) -> None:
    """Mean gradients handed out, and all that is left over, are all mean gradients; batches differ in size."""
    for dtype, tolerance in ((np.float32, 1e-5), (np.float64, 1e-13)):
        compressed = start(comm, codec, dtype)
        got = {name: np.zeros(shape) for name, shape in TAKEN.items()}
        expected = {name: np.zeros(shape) for name, shape in TAKEN.items()}
        for step, count in enumerate((64.0, 64.0, 3.0, 7.0)):
            grads = reduced(comm, compressed, step, count)
            for name in TAKEN:
                got[name] += grads.views[name].astype(np.float64) / count
                expected[name] += total(comm.size, step, dtype)[name] / count
        for name in TAKEN:
            left = comm.allreduce(compressed.residual.views[name].astype(np.float64)) / compressed.count
            scale = np.abs(expected[name]).max()
            assert np.allclose(got[name] + left, expected[name], rtol=0, atol=40 * tolerance * scale)


@check
def all_ranks_get_the_same_bits(comm: Communicator, codec: Codec) -> None:
    compressed = start(comm, codec)
    for step in range(3):
        grads = reduced(comm, compressed, step)
        remembered = [state.sha256() for state in compressed.codec_state.values()]
        everyones = comm.allgather_object((grads.flat.tobytes(), remembered))
        assert all(each == everyones[0] for each in everyones)


@check
def small_tensors_and_statistics_are_summed_as_they_are(comm: Communicator, codec: Codec) -> None:
    compressed = start(comm, codec)
    assert {segment.name for segment in compressed.residual.layout} == set(TAKEN)
    for step in range(2):
        grads = reduced(comm, compressed, step)
        for name in OTHERS | STATISTICS:
            assert np.array_equal(grads.views[name], total(comm.size, step)[name])


@check
def the_mean_of_many_steps_is_right(comm: Communicator, codec: Codec) -> None:
    """Error feedback: of a gradient that stays the same, all arrives in the end."""
    compressed = start(comm, codec)
    mean, steps = {name: np.zeros(shape) for name, shape in TAKEN.items()}, 100
    own = gradients(comm.rank, 0)
    for step in range(steps):
        grads = buffer(own)
        compressed.reduce(grads, step)
        for name in TAKEN:
            mean[name] += grads.views[name] / steps
    for name in TAKEN:
        expected = total(comm.size, 0)[name]
        assert np.linalg.norm(mean[name] - expected) < 0.25 * np.linalg.norm(expected)


@check
def zero_stays_zero_and_life_goes_on(comm: Communicator, codec: Codec) -> None:
    compressed = start(comm, codec)
    for step in range(2):
        grads = FlatBuffer(layout())
        compressed.reduce(grads, step)
        assert not grads.flat.any()
        assert not compressed.residual.flat.any()
    grads = reduced(comm, compressed, 2)
    assert np.isfinite(grads.flat).all()
    assert all(grads.views[name].any() for name in TAKEN)


@check
def what_is_not_finite_is_seen_by_all(comm: Communicator, codec: Codec) -> None:
    for name, value in product(("weight", "bias"), (np.nan, np.inf, -np.inf)):
        compressed = start(comm, codec)
        grads = buffer(gradients(comm.rank, 0))
        if comm.rank == comm.size - 1:
            grads.views[name][..., 4] = value
        assert not compressed.reduce(grads, 0)
        assert not np.isfinite(grads.views[name]).all()


@check
def a_copy_of_what_is_kept_goes_on_with_the_same_bits(comm: Communicator, codec: Codec) -> None:
    one, two = start(comm, codec), start(comm, codec)
    for step in range(3):
        reduced(comm, one, step, count=3.0 + step)
    assert [kept.kind for kept in one.kept] == ["summed", "replicated"] + ["replicated"] * len(one.codec_state)
    for here, there in zip(one.kept, two.kept, strict=True):
        there.buffer.flat[...] = here.buffer.flat
    assert reduced(comm, one, 3).flat.tobytes() == reduced(comm, two, 3).flat.tobytes()


@check
def one_tiny_tensor_and_none_at_all(comm: Communicator, codec: Codec) -> None:
    for shape in ((), (1,), (3, 2), (0,)):
        lone = Layout.build([Segment("lone", shape)])
        compressed = CompressedSum(comm, type(codec)(min_size=1), lone, KEY)
        grads = FlatBuffer(lone)
        grads.views["lone"][...] = 2.0
        compressed.reduce(grads, 0)
        left = comm.allreduce(compressed.residual.views.get("lone", np.zeros(shape, np.float32)))
        assert np.allclose(grads.views["lone"] + left, 2.0 * comm.size)
    nothing = Layout.build([])
    CompressedSum(comm, codec, nothing, KEY).reduce(FlatBuffer(nothing), 0)
