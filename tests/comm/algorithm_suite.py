"""Checks of our own algorithms, called with a communicator on every rank: values, bits, and what is sent.

The expected values come from `conformance.folded`, the serial result; the expected messages and bytes are written down
here from the formulas in ``docs/algorithms.md``, by hand and apart from the code that sends.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from itertools import count
from typing import Any

import ml_dtypes
import numpy as np
from conformance import DTYPES, folded, ops, own_rows, same, shards, values

from mpitrain.comm import Communicator
from mpitrain.comm.algorithms import ALGORITHMS, names

PAIRS = sorted(ALGORITHMS)


def sizes(p: int) -> list[int]:
    """Elements: none, fewer than ranks, as many, one more, and a few uneven ones."""
    return [0, 1, p - 1, p, p + 1, 37]


def combinations(p: int, salt: int) -> Iterator[tuple[Any, str, int]]:
    """Every dtype with every op it has, each with one size: over p and the salt, with all.  Above 4 ranks, a third."""
    turn = count(p + salt)
    for dtype in DTYPES:
        for op in ops(dtype):
            number = next(turn)
            if p <= 4 or number % 3 == 0:
                yield dtype, op, sizes(p)[number // 3 % 6]


def check_values(comm: Communicator, operation: str, name: str) -> None:
    checks: dict[str, Callable[[Communicator, str, int], None]] = {
        "allreduce": _check_allreduce,
        "reduce": _check_reduce,
        "broadcast": _check_broadcast,
        "reduce_scatter": _check_reduce_scatter,
        "allgather": _check_allgather,
    }
    checks[operation](comm, name, PAIRS.index((operation, name)))


def _check_allreduce(comm: Communicator, name: str, salt: int) -> None:
    for dtype, op, n in combinations(comm.size, salt):
        x = values(comm.rank, (n,), dtype)
        before = x.copy()
        same(comm.allreduce(x, op, algorithm=name), folded(comm.size, (n,), dtype, op))
        same(x, before)
        comm.allreduce(x, op, out=x, algorithm=name)
        same(x, folded(comm.size, (n,), dtype, op))
    for op, expected in {"or": True, "and": comm.size == 1, "max": True, "min": comm.size == 1}.items():
        same(
            comm.allreduce(np.array([True, comm.rank == 0]), op, algorithm=name),
            [True, expected or op in ("or", "max")],
        )


def _check_reduce(comm: Communicator, name: str, salt: int) -> None:
    for i, (dtype, op, n) in enumerate(combinations(comm.size, salt)):
        root = i % comm.size
        x = values(comm.rank, (n,), dtype)
        got = comm.reduce(x, op, root=root, algorithm=name)
        same(x, values(comm.rank, (n,), dtype))
        if comm.rank == root:
            same(got, folded(comm.size, (n,), dtype, op))
        else:
            assert got is None


def _check_broadcast(comm: Communicator, name: str, salt: int) -> None:
    for root in range(comm.size):
        for i, dtype in enumerate([*DTYPES, "bool"]):
            n = sizes(comm.size)[(i + root + salt) % 6]
            got = comm.broadcast(values(comm.rank, (n,), dtype), root, algorithm=name)
            same(got, values(root, (n,), dtype))


def _check_reduce_scatter(comm: Communicator, name: str, salt: int) -> None:
    for dtype, op, n in combinations(comm.size, salt):
        x = values(comm.rank, (comm.size, n), dtype)
        same(comm.reduce_scatter(x, op, algorithm=name), folded(comm.size, x.shape, dtype, op)[comm.rank])
        same(x, values(comm.rank, x.shape, dtype))
        counts = shards(comm.size)
        x = values(comm.rank, (7, 3), dtype)
        expected = folded(comm.size, x.shape, dtype, op)[own_rows(counts, comm.rank)]
        same(comm.reduce_scatter(x, op, counts, algorithm=name), expected)


def _check_allgather(comm: Communicator, name: str, salt: int) -> None:
    for i, dtype in enumerate([*DTYPES, "bool"]):
        n = sizes(comm.size)[(i + salt) % 6]
        got = comm.allgather(values(comm.rank, (n,), dtype), algorithm=name)
        same(got, np.stack([values(r, (n,), dtype) for r in range(comm.size)]))
        counts = shards(comm.size)
        whole = values(0, (7, 3), dtype)
        same(comm.allgather(whole[own_rows(counts, comm.rank)], counts, algorithm=name), whole)


def real_values(rank: int, n: int, dtype: Any) -> np.ndarray:
    """Values of many magnitudes, so that nearly every order of adding gives other bits."""
    rng = np.random.default_rng(rank)
    return (rng.standard_normal(n) * 10.0 ** rng.integers(-3, 3, n)).astype(dtype)


def left_fold(size: int, n: int, dtype: Any, combine: np.ufunc = np.add) -> np.ndarray:
    """((x0 + x1) + x2) + …, of 16-bit floats in float32 and rounded once."""
    held = np.float32 if np.dtype(dtype).itemsize == 2 else np.dtype(dtype)
    total = real_values(0, n, dtype).astype(held)
    for rank in range(1, size):
        total = combine(total, real_values(rank, n, dtype).astype(held))
    return total.astype(dtype)


def same_bits(got: np.ndarray, expected: np.ndarray) -> None:
    assert got.dtype == expected.dtype
    assert got.tobytes() == expected.tobytes()


def check_ordered_bits(comm: Communicator) -> None:
    for dtype in ("float32", "float64", "float16", ml_dtypes.bfloat16):
        for n in (1, 5, 100):
            x = real_values(comm.rank, n, dtype)
            expected = left_fold(comm.size, n, dtype)
            for name in ("ordered", "pipelined"):
                same_bits(comm.allreduce(x, algorithm=name), expected)
                cut = [comm.allreduce(part, algorithm=name) for part in (x[: n // 3], x[n // 3 :])]
                same_bits(np.concatenate(cut), expected)
            root = comm.size - 1
            got = comm.reduce(x, root=root, algorithm="ordered")
            same_bits(expected if got is None else got, expected)
            counts = [n, *[0] * root]
            got = comm.reduce_scatter(x, counts=counts, algorithm="ordered")
            same_bits(got, expected[: counts[comm.rank]])


def check_all_ranks_agree_in_bits(comm: Communicator) -> None:
    x = real_values(comm.rank, 100, "float32")
    x[:4] = [(-0.0, 0.0)[comm.rank % 2], np.nan, np.inf, -np.inf]
    for name in names("allreduce"):
        for op in ("sum", "max", "min"):
            got = comm.allreduce(x, op, algorithm=name)
            assert len(set(comm.allgather_object(got.tobytes()))) == 1, (name, op)


def moved(comm: Communicator, axis: str | None = None) -> dict[str, tuple[int, int]]:
    """Messages and bytes that this rank sent, by operation."""
    found = comm.ledger.snapshot().items()
    return {
        operation: (each.moved_messages, each.moved_bytes)
        for (on, operation), each in found
        if on == (axis or comm.ledger.axis)
    }


def check_sent(comm: Communicator, operation: str, name: str) -> None:
    """Compare what the ledger says with the formula, for arrays of float32."""
    p = comm.size
    for n in (840 * p, 1000, 5, 1, 0):
        parts = _parts(n, p)
        x = np.ones(n, np.float32)
        rows = {"reduce_scatter": (x, parts), "allgather": (np.ones(parts[comm.rank], np.float32), parts)}
        comm.ledger.reset()
        if operation in rows:
            array, counts = rows[operation]
            getattr(comm, operation)(array, counts=counts, algorithm=name)
        else:
            getattr(comm, operation)(x, algorithm=name)
        got = moved(comm)[operation]
        messages, elements = FORMULAS[operation, name](comm.rank, p, parts)
        assert got == (messages, 4 * elements), (name, p, n, comm.rank)
        closed = EVEN | (EVEN_ON_POWERS_OF_TWO if p & (p - 1) == 0 else {})
        if n % p == 0 and n and (operation, name) in closed:
            assert got == closed[operation, name](p, 4 * n)


def _parts(n: int, p: int) -> list[int]:
    return [len(part) for part in np.array_split(np.arange(n), p)]


Sent = tuple[int, int]
"""Messages and elements."""


def _sum(pieces: list[int]) -> Sent:
    """Pieces, each one message unless it is empty."""
    return sum(piece > 0 for piece in pieces), sum(pieces)


def _both(one: Sent, two: Sent) -> Sent:
    return one[0] + two[0], one[1] + two[1]


def _all_but(rank: int, parts: list[int]) -> Sent:
    return _sum([part for r, part in enumerate(parts) if r != rank % len(parts)])


def _ring_scatter(rank: int, p: int, parts: list[int]) -> Sent:
    return _all_but(rank, parts)


def _ring_gather(rank: int, p: int, parts: list[int]) -> Sent:
    return _all_but(rank + 1, parts)


def _own_to_all(rank: int, p: int, parts: list[int]) -> Sent:
    return _sum([parts[rank]] * (p - 1))


def _shares_to_root(rank: int, p: int, parts: list[int]) -> Sent:
    return _sum([parts[rank]]) if rank else (0, 0)


def _shares_from_root(rank: int, p: int, parts: list[int]) -> Sent:
    return (0, 0) if rank else _all_but(0, parts)


def _core(p: int) -> tuple[int, int]:
    """The largest power of two q ≤ p, and p − q."""
    q = 1 << (p.bit_length() - 1)
    return q, p - q


def _core_rank(rank: int, p: int) -> int | None:
    pairs = _core(p)[1]
    if rank >= 2 * pairs:
        return rank - pairs
    return rank // 2 if rank % 2 else None


def _stands_for(rank: int, p: int) -> bool:
    return rank % 2 == 1 and rank < 2 * _core(p)[1]


def _blocks(parts: list[int]) -> list[int]:
    """Sizes of the core ranks' blocks, each of the shares of those that it stands for."""
    pairs = _core(len(parts))[1]
    return [parts[2 * i] + parts[2 * i + 1] for i in range(pairs)] + parts[2 * pairs :]


def _halving(core_rank: int, blocks: list[int]) -> Sent:
    """At each distance: the half of the blocks that holds the partner's."""
    sent, distance = (0, 0), len(blocks) // 2
    while distance:
        first = (core_rank ^ distance) // distance * distance
        sent = _both(sent, _sum([sum(blocks[first : first + distance])]))
        distance //= 2
    return sent


def _doubling(core_rank: int, blocks: list[int]) -> Sent:
    """At each distance: all blocks of the own group."""
    sent, distance = (0, 0), 1
    while distance < len(blocks):
        first = core_rank // distance * distance
        sent = _both(sent, _sum([sum(blocks[first : first + distance])]))
        distance *= 2
    return sent


def _recursive_allreduce(rank: int, p: int, parts: list[int]) -> Sent:
    n, me = sum(parts), _core_rank(rank, p)
    if me is None:
        return _sum([n])
    blocks = _parts(n, _core(p)[0])
    back = _sum([n]) if _stands_for(rank, p) else (0, 0)
    return _both(_both(_halving(me, blocks), _doubling(me, blocks)), back)


def _recursive_scatter(rank: int, p: int, parts: list[int]) -> Sent:
    me = _core_rank(rank, p)
    if me is None:
        return _sum([sum(parts)])
    back = _sum([parts[rank - 1]]) if _stands_for(rank, p) else (0, 0)
    return _both(_halving(me, _blocks(parts)), back)


def _recursive_gather(rank: int, p: int, parts: list[int]) -> Sent:
    me = _core_rank(rank, p)
    if me is None:
        return _sum([parts[rank]])
    back = _sum([sum(parts)]) if _stands_for(rank, p) else (0, 0)
    return _both(_doubling(me, _blocks(parts)), back)


def _whole_doubling(rank: int, p: int, parts: list[int]) -> Sent:
    steps = _core(p)[0].bit_length() - 1 + _stands_for(rank, p)
    return _sum([sum(parts)] * (1 if _core_rank(rank, p) is None else steps))


def _up_the_tree(rank: int, p: int, parts: list[int]) -> Sent:
    return _sum([sum(parts)]) if rank else (0, 0)


def _down_the_tree(rank: int, p: int, parts: list[int]) -> Sent:
    """Rank r's children are r + 2^i for all 2^i below its lowest bit."""
    children = [rank + 2**i for i in range(10) if rank % 2 ** (i + 1) == 0 and rank + 2**i < p]
    return _sum([sum(parts)] * len(children))


def _then(*phases: Callable[[int, int, list[int]], Sent]) -> Callable[[int, int, list[int]], Sent]:
    def total(rank: int, p: int, parts: list[int]) -> Sent:
        sent = (0, 0)
        for phase in phases:
            sent = _both(sent, phase(rank, p, parts))
        return sent

    return total


FORMULAS: dict[tuple[str, str], Callable[[int, int, list[int]], Sent]] = {
    ("allreduce", "ring"): _then(_ring_scatter, _ring_gather),
    ("allreduce", "recursive"): _recursive_allreduce,
    ("allreduce", "doubling"): _whole_doubling,
    ("allreduce", "tree"): _then(_up_the_tree, _down_the_tree),
    ("allreduce", "ordered"): _then(_ring_scatter, _ring_gather),
    ("allreduce", "pipelined"): _then(_ring_scatter, _own_to_all),
    ("reduce", "ring"): _then(_ring_scatter, _shares_to_root),
    ("reduce", "tree"): _up_the_tree,
    ("reduce", "ordered"): _then(_ring_scatter, _shares_to_root),
    ("broadcast", "ring"): _then(_shares_from_root, _ring_gather),
    ("broadcast", "tree"): _down_the_tree,
    ("reduce_scatter", "ring"): _ring_scatter,
    ("reduce_scatter", "recursive"): _recursive_scatter,
    ("reduce_scatter", "ordered"): _ring_scatter,
    ("allgather", "ring"): _ring_gather,
    ("allgather", "recursive"): _recursive_gather,
}
"""By (operation, name): what a rank of p sends, given the elements of the ranks' shares; root 0."""


EVEN: dict[tuple[str, str], Callable[[int, int], Sent]] = {
    ("allreduce", "ring"): lambda p, n: (2 * (p - 1), 2 * (p - 1) * n // p),
    ("allreduce", "ordered"): lambda p, n: (2 * (p - 1), 2 * (p - 1) * n // p),
    ("allreduce", "pipelined"): lambda p, n: (2 * (p - 1), 2 * (p - 1) * n // p),
    ("reduce_scatter", "ring"): lambda p, n: (p - 1, (p - 1) * n // p),
    ("reduce_scatter", "ordered"): lambda p, n: (p - 1, (p - 1) * n // p),
    ("allgather", "ring"): lambda p, n: (p - 1, (p - 1) * n // p),
}
"""The closed forms that hold on every rank where p divides n: messages, and bytes of n bytes."""

EVEN_ON_POWERS_OF_TWO: dict[tuple[str, str], Callable[[int, int], Sent]] = {
    ("allreduce", "recursive"): lambda p, n: (2 * (p.bit_length() - 1), 2 * (p - 1) * n // p),
    ("allreduce", "doubling"): lambda p, n: (p.bit_length() - 1, (p.bit_length() - 1) * n),
    ("reduce_scatter", "recursive"): lambda p, n: (p.bit_length() - 1, (p - 1) * n // p),
    ("allgather", "recursive"): lambda p, n: (p.bit_length() - 1, (p - 1) * n // p),
}
