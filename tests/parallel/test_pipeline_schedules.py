"""Schedules are complete, free of deadlock, and as long and as large as the papers say: to the formula, exactly."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from fractions import Fraction

import pytest

from mpitrain._errors import InputError
from mpitrain.parallel.pipeline import FAMILIES, Costs, Operation, Schedule, Sizes, Span, peaks, simulate, validate

Formula = Callable[[int, int, int], Fraction]

# Of p ranks, v chunks, m microbatches, at F = B = W.  A further schedule is a row in each of these tables.
OVERHEADS: dict[str, Formula] = {
    "gpipe": lambda p, v, m: Fraction(p - 1, m),
    "1f1b": lambda p, v, m: Fraction(p - 1, m),
    "interleaved": lambda p, v, m: Fraction(p - 1, v * m),
    "zb-h1": lambda p, v, m: Fraction(p - 1, m) / 3,
}

PEAKS: dict[str, Callable[[int, int, int, int], int]] = {
    "gpipe": lambda p, v, m, rank: m,
    "1f1b": lambda p, v, m, rank: min(p - rank, m),
    "interleaved": lambda p, v, m, rank: min((v - 1) * p + 2 * (p - rank - 1) + 1, v * m),
    "zb-h1": lambda p, v, m, rank: min(p, m),
}


def all_sizes(name: str) -> Iterator[Sizes]:
    for p in range(1, 7):
        for m in range(1, 14):
            if name != "interleaved":
                yield Sizes(p, 1, m)
            elif m % p == 0:
                yield from (Sizes(p, v, m) for v in (1, 2, 3))


def equal_costs(sizes: Sizes, f: int = 1, b: int = 1, w: int = 1) -> Costs:
    """A rank's F, B and W take so long, however many stages they are divided into."""
    parts = [[Fraction(each, sizes.chunks)] * sizes.stages for each in (f, b, w)]
    return Costs(*parts)


def test_every_family_has_its_formulas():
    assert set(FAMILIES) == set(OVERHEADS) == set(PEAKS)


@pytest.mark.parametrize("name", FAMILIES)
def test_schedules_of_all_sizes_are_valid(name):
    for sizes in all_sizes(name):
        validate(FAMILIES[name].schedule(sizes))


@pytest.mark.parametrize("name", FAMILIES)
def test_the_peak_is_the_formula(name):
    for sizes in all_sizes(name):
        schedule = FAMILIES[name].schedule(sizes)
        formula = [PEAKS[name](sizes.ranks, sizes.chunks, sizes.microbatches, rank) for rank in range(sizes.ranks)]
        assert list(peaks(schedule)) == list(schedule.peaks) == formula, sizes


@pytest.mark.parametrize("name", FAMILIES)
def test_the_simulated_overhead_is_the_formula(name):
    for sizes in all_sizes(name):
        p, v, m = sizes.ranks, sizes.chunks, sizes.microbatches
        timeline = simulate(FAMILIES[name].schedule(sizes), equal_costs(sizes))
        assert timeline.overhead == FAMILIES[name].overhead(sizes), sizes
        assert timeline.idle == timeline.overhead / (1 + timeline.overhead)
        if m >= p:
            assert timeline.overhead == OVERHEADS[name](p, v, m), sizes


@pytest.mark.parametrize(("f", "b", "w"), [(1, 1, 1), (2, 3, 1), (3, 4, 2), (2, 2, 2)])
def test_zero_bubble_costs_what_its_paper_says(f, b, w):
    """Table 1 of Qi and others: (p - 1)(F + B - W), where 1F1B costs (p - 1)(F + B + W)."""
    for p in range(1, 6):
        sizes = Sizes(p, 1, 2 * p)
        times = {name: simulate(FAMILIES[name].schedule(sizes), equal_costs(sizes, f, b, w)) for name in FAMILIES}
        work = 2 * p * (f + b + w)
        assert times["zb-h1"].length - work == (p - 1) * (f + b - w)
        assert times["1f1b"].length - work == times["gpipe"].length - work == (p - 1) * (f + b + w)


def test_a_timeline_by_hand():
    """Two ranks, two microbatches, F 1, BW 2, messages 1: rank 1 waits for its first input, rank 0 for gradients."""
    sizes = Sizes(2, 1, 2)
    timeline = simulate(FAMILIES["1f1b"].schedule(sizes), Costs([1, 1], [1, 1], [1, 1], message=1))

    def span(kind: str, stage: int, microbatch: int, start: int, stop: int) -> Span:
        return Span(Operation(kind, stage, microbatch), start, stop)

    assert timeline.spans[0] == (
        span("F", 0, 0, 0, 1),
        span("F", 0, 1, 1, 2),
        span("BW", 0, 0, 6, 8),
        span("BW", 0, 1, 9, 11),
    )
    assert timeline.spans[1] == (
        span("F", 1, 0, 2, 3),
        span("BW", 1, 0, 3, 5),
        span("F", 1, 1, 5, 6),
        span("BW", 1, 1, 6, 8),
    )
    assert (timeline.length, timeline.ideal, timeline.idle) == (11, 6, 1 - 6 / 11)


def test_uneven_stages_are_as_slow_as_the_slowest():
    sizes = Sizes(2, 1, 100)
    timeline = simulate(FAMILIES["1f1b"].schedule(sizes), Costs([1, 3], [1, 3], [1, 3]))
    assert timeline.length == 100 * 9 + 1 + 2


def test_messages_are_two_for_each_cut_and_microbatch():
    assert Sizes(4, 3, 8).messages == 2 * (4 * 3 - 1) * 8
    assert Sizes(1, 3, 8).messages == 0


# What the validator must refuse.

F, B, W, BW = (lambda stage, j, kind=kind: Operation(kind, stage, j) for kind in ("F", "B", "W", "BW"))


def schedule_of(*orders: list[Operation], microbatches: int = 2, peaks: tuple[int, ...] = (2, 2)) -> Schedule:
    return Schedule("mine", Sizes(2, 1, microbatches), tuple(map(tuple, orders)), peaks)


FIRST = [F(0, 0), F(0, 1), BW(0, 0), BW(0, 1)]
SECOND = [F(1, 0), BW(1, 0), F(1, 1), B(1, 1), W(1, 1)]


@pytest.mark.parametrize(
    ("first", "second", "message"),
    [
        (FIRST[:-1], SECOND, "rank 0, stage 0: B is not complete; got 1 microbatches; expected 2"),
        (FIRST, SECOND[:-1], "rank 1, stage 1: W is not complete"),
        (
            [F(0, 0), F(0, 1), BW(0, 1), BW(0, 0)],
            SECOND,
            "rank 0: an operation is out of order; got BW of microbatch 1",
        ),
        ([*FIRST, BW(0, 1)], SECOND, "rank 0: an operation is out of order"),
        (FIRST, [BW(1, 0), F(1, 0), F(1, 1), BW(1, 1)], "rank 1: an operation is out of order; got BW of microbatch 0"),
        (FIRST, [F(1, 0), W(1, 0), B(1, 0), F(1, 1), BW(1, 1)], "rank 1: an operation is out of order; got W"),
        ([F(1, 0), *FIRST], SECOND, "rank 0 does not have the stage; got F of microbatch 0 in stage 1"),
        (
            [F(0, 0), BW(0, 0), F(0, 1), BW(0, 1)],
            [F(1, 0), F(1, 1), BW(1, 0), BW(1, 1)],
            "ranks would wait for each other; got .* waits for ",
        ),
    ],
)
def test_what_is_wrong_is_named(first, second, message):
    validate(schedule_of(FIRST, SECOND))
    with pytest.raises(InputError, match=f"schedule 'mine': {message}"):
        validate(schedule_of(first, second))


def test_more_memory_than_promised_is_refused():
    good = FAMILIES["1f1b"].schedule(Sizes(2, 1, 4))
    with pytest.raises(InputError, match="rank 0 has more passes in flight than promised; got 2; expected 1"):
        validate(replace(good, peaks=(1, 1)))


@pytest.mark.parametrize(
    ("name", "sizes", "message"),
    [
        ("1f1b", (2, 2, 4), "schedule '1f1b': a rank has one stage in this schedule; got chunks 2"),
        (
            "interleaved",
            (3, 2, 4),
            "microbatches do not divide by the ranks of the pipeline; got 4 microbatches, 3 ranks",
        ),
        ("gpipe", (2, 1, 0), "microbatches is too small; got 0; expected at least 1"),
    ],
)
def test_sizes_without_a_schedule_are_named(name, sizes, message):
    with pytest.raises(InputError, match=message):
        FAMILIES[name].schedule(Sizes(*sizes))
