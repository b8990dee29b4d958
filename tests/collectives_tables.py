"""What a benchmark of the collectives found, as Markdown, and whether it reaches the project's goals."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from typing import NamedTuple

from mpitrain.cli.bench.tables import best_rival, size_text
from mpitrain.comm.bench.components import DEFAULT
from mpitrain.comm.bench.ranks import MAIN
from mpitrain.comm.bench.results import Report, geometric_mean

KIB, MIB = 2**10, 2**20
ON_EMPTY = ("plan", "plan in place", "in place on comm.empty")
ORDINARY = ("checked", "checked in place")
NO_SLOWER = 1.05


class Row(NamedTuple):
    """One of our ways to call, at one size: its time, and by how much that of each rival is longer.

    ``behind_us`` is ours less mpi4py's; ``gloo`` is None where it did not take part.
    """

    operation: str
    variant: str
    transport: str
    size: int
    us: float
    behind_us: float
    default: float
    best: float
    best_name: str
    gloo: float | None

    @property
    def times(self) -> float:
        """Our time in units of the default's."""
        return 1 / self.default


class Goal(NamedTuple):
    """A goal: which rows it is about, what becomes of those of one call, and whether that will do.

    Rows that it ``claims`` need not reach the goal for all the rest.
    """

    text: str
    about: Callable[[Row], bool]
    found: Callable[[Sequence[Row]], float]
    met: Callable[[float], bool]
    claims: bool = True


def rows(report: Report) -> Iterator[Row]:
    """Yield all that the library as it is by default was raced with."""
    for key, each in report.measurements(DEFAULT.name).items():
        best, rivals = best_rival(report, key), each.rivals
        if MAIN in rivals:
            yield Row(
                *key, each.seconds.p50 * 1e6, rivals[MAIN].behind_s.p50 * 1e6, rivals[MAIN].ratio.p50,
                best.rivalry.ratio.p50, best.name, rivals["gloo"].ratio.p50 if "gloo" in rivals else None,
            )  # fmt: skip


def table(found: Iterable[Row]) -> list[str]:
    """Return the lines of a table of allreduce by mpitrain's own transports, call by call."""
    lines = _head("call", "size", "µs", "Δ µs", "to default", "to best", "to gloo")
    for group in _by_call(row for row in found if not _left_to_the_library(row)):
        for i, row in enumerate(group):
            best = f"{_number(row.best)} ({row.best_name})"
            cells = (_number(row.us), _number(row.behind_us, "+"), _number(row.default), best, _number(row.gloo))
            lines.append(_line("" if i else _name(row), size_text(row.size), *cells))
        large = [row for row in group if row.size >= 256 * KIB]
        means = (_mean(large, "default"), _mean(large, "best"), _mean(large, "gloo"))
        lines.append(_line("", "mean from 256K on", "", "", *(f"**{_number(mean)}**" for mean in means)))
    return lines


def left_to_the_library(found: Iterable[Row]) -> list[str]:
    """Return the lines of a table of all other calls over the sizes: ours by the default's time."""
    groups = _by_call(row for row in found if _left_to_the_library(row))
    sizes = sorted({row.size for group in groups for row in group})
    lines = _head("ours by the default's time", *map(size_text, sizes))
    for group in groups:
        times = {row.size: row.times for row in group}
        lines.append(_line(_name(group[0]), *(_number(times.get(size)) for size in sizes)))
    return lines


def goals(found: Sequence[Row], ranks: int) -> list[str]:
    """Return the lines of a table of the goals that so many ranks have, and of what misses the last of them."""
    lines = _head("goal", "found", "met")
    claimed: set[Row] = set()
    for goal in (*(_paired_goals() if ranks == 2 else ()), *_small_goals()):
        concerned = [row for row in found if goal.about(row)]
        claimed.update(concerned if goal.claims else ())
        if concerned:
            lines.append(_verdict(goal, _by_call(concerned)))
    rest = [row for row in found if row not in claimed]
    behind = [row for row in rest if row.times > NO_SLOWER]
    words = f"{len(rest) - len(behind)} of {len(rest)}"
    lines.append(_line(f"everywhere else at most {NO_SLOWER} × the default's time", words, "no" if behind else "yes"))
    slower = (
        f"{_name(group[0])} {', '.join(f'{size_text(row.size)} {_number(row.times)}' for row in group)}"
        for group in _by_call(behind)
    )
    return [*lines, *(["", f"Above {NO_SLOWER} × the default's time: {'; '.join(slower)}."] if behind else [])]


def _paired_goals() -> Iterator[Goal]:
    """Yield those for two ranks on one node."""
    yield Goal("`comm.empty`: 3 × the best, mean", _on_empty, partial(_mean, ratio="best"), _at_least(3))
    yield Goal("1.8 × the best at each size", _on_empty, partial(_least, ratio="best"), _at_least(1.8))
    yield Goal("4 × the default, mean", _on_empty, partial(_mean, ratio="default"), _at_least(4))
    for text, bound, about in (
        ("15 × gloo up to 4M", 15, lambda row: _on_empty(row) and row.size <= 4 * MIB),
        ("5 × gloo above 4M", 5, lambda row: _on_empty(row) and row.size > 4 * MIB),
    ):
        yield Goal(
            text, lambda row, about=about: about(row) and row.gloo, partial(_least, ratio="gloo"), _at_least(bound)
        )
    large = "ordinary arrays: 1.5 × the default from 1M on"
    yield Goal(large, _is_ordinary, partial(_least, ratio="default"), _at_least(1.5))


def _small_goals() -> Iterator[Goal]:
    """Yield those for 4 bytes, in µs more than mpi4py takes."""
    for text, sign, most in (
        ("checked, 4 bytes: 5 µs more at most", "checked", 5),
        ("planned, 4 bytes: 1 µs", "plan", 1),
    ):

        def about(row: Row, sign: str = sign) -> bool:
            return row.size == 4 and row.operation == "allreduce" and row.variant.startswith(sign)

        yield Goal(text, about, lambda group: group[0].behind_us, lambda us, most=most: us <= most, claims=False)


def _on_empty(row: Row) -> bool:
    return row.variant in ON_EMPTY and row.transport == "shared" and row.size >= 256 * KIB


def _is_ordinary(row: Row) -> bool:
    return not _left_to_the_library(row) and row.variant in ORDINARY and row.size >= MIB


def _left_to_the_library(row: Row) -> bool:
    return row.operation != "allreduce" or row.transport == "host"


def _verdict(goal: Goal, groups: Sequence[Sequence[Row]]) -> str:
    values = {_name(group[0]): goal.found(group) for group in groups}
    words = ", ".join(
        f"{name}: {_number(value)}{'' if goal.met(value) else ' **missed**'}" for name, value in values.items()
    )
    return _line(goal.text, words, "yes" if all(map(goal.met, values.values())) else "no")


def _at_least(bound: float) -> Callable[[float], bool]:
    return lambda value: value >= bound


def _least(group: Sequence[Row], ratio: str) -> float:
    return min(getattr(row, ratio) for row in group)


def _mean(group: Iterable[Row], ratio: str) -> float | None:
    values = [value for row in group if (value := getattr(row, ratio)) is not None]
    return geometric_mean(values) if values else None


def _by_call(found: Iterable[Row]) -> list[list[Row]]:
    """Return the rows of each call, in order of size."""
    groups: dict[str, list[Row]] = {}
    for row in found:
        groups.setdefault(_name(row), []).append(row)
    return [sorted(group, key=lambda row: row.size) for group in groups.values()]


def _name(row: Row) -> str:
    operation = "" if row.operation == "allreduce" else f"{row.operation}, "
    return f"{operation}{row.variant} ({row.transport})"


def _number(value: float | None, sign: str = "") -> str:
    """Return three digits that count."""
    if value is None:
        return ""
    return f"{value:{sign},.0f}" if abs(value) >= 100 else f"{value:{sign}.3g}"


def _head(*cells: str) -> list[str]:
    return [_line(*cells), _line(*("---" for _ in cells))]


def _line(*cells: str) -> str:
    return f"| {' | '.join(cells)} |"
