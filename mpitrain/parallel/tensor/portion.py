"""Which part of a size belongs to which of the ranks that divide a model: near-equal blocks, and nothing refused."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from mpitrain._errors import InputError
from mpitrain.arrays import Box
from mpitrain.data.shares import share
from mpitrain.nn.layer import Parameter

Span = tuple[int, int]
"""First and last-plus-one."""


@dataclass(frozen=True)
class Portion:
    """One of the near-equal parts into which a model's tensors are cut.

    Parameters
    ----------
    number, parts : int
        Which of how many: rank and size of the communicator that divides the model.
    """

    number: int
    parts: int

    def span(self, size: int, what: str, groups: int | None = None) -> Span:
        """Return this part of a size.

        Parameters
        ----------
        size : int
            What is divided; 67 in 4 parts are 17, 17, 17 and 16.
        what : str
            What it counts, for the message.
        groups : int, optional
            So many equal stretches of it stay whole: the columns of a head.

        Raises
        ------
        InputError
            There are more parts than there is to divide.
        """
        units = size if groups is None else groups
        if self.parts > units:
            raise InputError(
                f"tensor-parallel: more ranks than {what}", got=f"{units} {what} on {self.parts} ranks",
                expected="one at least for each rank", remedy=f"divide the model over at most {units} ranks",
            )  # fmt: skip
        start, stop = share(units, self.parts, self.number)
        return start * size // units, stop * size // units


def spans(size: int, parts: int) -> list[Span]:
    """Return every part of a size, some of them perhaps empty."""
    return [share(size, parts, number) for number in range(parts)]


def boxed(parameters: Sequence[Parameter], **cuts: tuple[int, Span]) -> tuple[Parameter, ...]:
    """Return parameters of which some are held in part: ``weight=(axis, span)``."""
    return tuple(replace(each, box=_box(each, *cuts[each.name])) if each.name in cuts else each for each in parameters)


def in_terms(parameters: Sequence[Parameter], *names: str) -> tuple[Parameter, ...]:
    """Return parameters that all ranks hold, but of whose gradients each computes only a term."""
    return tuple(replace(each, axes=each.axes | {"tensor"}) if each.name in names else each for each in parameters)


def _box(parameter: Parameter, axis: int, span: Span) -> Box:
    return tuple(span if number == axis else (0, size) for number, size in enumerate(parameter.shape))
