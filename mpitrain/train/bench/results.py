"""What the benchmark of training steps found: plain data, and its form as JSON."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from pydantic import TypeAdapter, ValidationError

from mpitrain._errors import InputError
from mpitrain.comm.bench.results import Quantiles
from mpitrain.train.bench.memory import Memory

VERSION = 1
"""Of the JSON form."""


@dataclass(frozen=True)
class Contestant:
    """One way to train a model.

    Parameters
    ----------
    name : str
        A method of ours, or a rival.
    seconds : Quantiles
        Of a step, on the slowest rank, over the rounds.
    per_s : float
        Samples or tokens a second of all ranks together, from the median.
    share_of_products : float
        Counted operations a second, by those of the ranks' own matrix products.
    ratios : dict of str to Quantiles
        To each contestant it is compared with: that one's time by this one's, round by round; above 1 this is faster.
    communication_share : float, optional
        Part of a step that is spent in calls of the communicator, waits for other ranks included; None: not known.
    memory : dict of str to Memory
        By kind; empty for rivals.
    """

    name: str
    seconds: Quantiles
    per_s: float
    share_of_products: float
    ratios: dict[str, Quantiles]
    communication_share: float | None = None
    memory: dict[str, Memory] = field(default_factory=dict)


@dataclass(frozen=True)
class Trained:
    """A model, and all that trained it in turn.

    Parameters
    ----------
    name, title, unit : str
        See `Task`.
    units : int
        Samples or tokens of each rank in a step.
    parameters : int
        How many numbers are trained.
    flops : int
        Operations of each rank's matrix products in a step, counted.
    contestants : list of Contestant
        Ours first.
    """

    name: str
    title: str
    unit: str
    units: int
    parameters: int
    flops: int
    contestants: list[Contestant]


@dataclass(frozen=True)
class TrainingReport:
    """All that one command measured.

    Parameters
    ----------
    command : list of str
        As it was typed.
    about : dict
        Versions, machine, settings.
    product_flops_per_s : float
        What each rank's large matrix product reaches while the others do the same.
    models : list of Trained
        In turn.
    notes : list of str
        What was left out, and why.
    version : int
        Of this form.
    """

    command: list[str]
    about: dict[str, Any]
    product_flops_per_s: float
    models: list[Trained]
    notes: list[str]
    version: int = VERSION

    def to_json(self) -> bytes:
        """Return the report as text."""
        return TypeAdapter(TrainingReport).dump_json(self, indent=1)

    @classmethod
    def from_json(cls, text: bytes) -> TrainingReport:
        """Return the report that `to_json` wrote.

        Raises
        ------
        InputError
            The text is anything else.
        """
        try:
            report: TrainingReport = TypeAdapter(cls).validate_json(text)
        except ValidationError as error:
            raise InputError("not what mpitrain bench training writes", got=error.errors()[0]["msg"]) from error
        return report
