"""The figures of ``mpitrain bench job``: what they are, how they are kept, and how they are told."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from pydantic import TypeAdapter, ValidationError

from mpitrain._errors import InputError
from mpitrain.comm.bench.results import Quantiles
from mpitrain.train.bench.memory import Memory
from mpitrain.train.bench.overhead import Overhead

WORKSPACE = "measured activations include the workspace of backward passes, predicted ones do not"
"""What is to be said beside figures of memory."""


@dataclass(frozen=True)
class JobCosts:
    """What was found.

    Parameters
    ----------
    title : str
        The job in one line.
    ranks, batch_size : int
        How many ranks, and how many samples a whole batch of all of them has.
    seconds : Quantiles
        Of a step, on the slowest rank.
    samples_per_s : float
        Of all ranks together: the samples that the timed steps took in the mean, by the median of their times.
    tokens_per_s : float, optional
        Likewise; None: samples are no windows of tokens.
    flops : int, optional
        Operations of the matrix products of a step, the mean of those timed, of all ranks together, counted from shapes
        as on one rank; None: they cannot be counted.
    product_flops_per_s : float
        What a rank's large product reaches in the job's dtype while the others do the same.
    utilisation : float, optional
        Counted operations a second, by those of all ranks' products.
    communication_share : float
        Part of a step that is spent in calls of communicators, waits for other ranks included.
    memory : dict of str to Memory
        By kind: parameters, gradients, optimizer, of a `Network` activations, and where there is one, codec.
    pipeline : Overhead, optional
        Where the model is cut into stages.
    notes : list of str
        What is not known, and why.
    """

    title: str
    ranks: int
    batch_size: int
    seconds: Quantiles
    samples_per_s: float
    tokens_per_s: float | None
    flops: int | None
    product_flops_per_s: float
    utilisation: float | None
    communication_share: float
    memory: dict[str, Memory]
    pipeline: Overhead | None
    notes: list[str]

    def to_json(self) -> bytes:
        """Return the figures as text."""
        return TypeAdapter(JobCosts).dump_json(self, indent=1)

    @classmethod
    def from_json(cls, text: bytes) -> JobCosts:
        """Return the figures that `to_json` wrote.

        Raises
        ------
        InputError
            The text is anything else.
        """
        try:
            found: JobCosts = TypeAdapter(cls).validate_json(text)
        except ValidationError as error:
            raise InputError("not what mpitrain bench job writes", got=error.errors()[0]["msg"]) from error
        return found

    def rows(self) -> Iterator[tuple[str, str]]:
        """Yield what was found for people, name by name; memory is not among it."""
        seconds, tokens = self.seconds, f", {told_rate(self.tokens_per_s)} tokens/s" if self.tokens_per_s else ""
        times_ms = f"{seconds.p50 * 1e3:.4g} ms (p10 {seconds.p10 * 1e3:.4g}, p90 {seconds.p90 * 1e3:.4g})"
        yield "step", f"{times_ms}: {told_rate(self.samples_per_s)} samples/s{tokens}"
        if self.flops and self.utilisation:
            whose = f"{self.product_flops_per_s / 1e9:.0f} GFLOP/s of each rank's products"
            yield "operations", f"{self.flops / 1e9:.4g} GFLOP a step, {self.utilisation:.1%} of {whose}"
        yield "communication", f"{self.communication_share:.1%} of a step, waits included"
        if self.pipeline:
            lost = self.pipeline
            predicted = f"{lost.simulated:.1%} simulated with the passes' times, {lost.formula:.1%} by formula"
            yield "pipeline", f"overhead {lost.measured:.1%}; {predicted}"


def told_rate(per_s: float) -> str:
    """Return a rate for people: whole, or three digits of a slow one."""
    return f"{per_s:,.0f}" if per_s >= 100 else f"{per_s:.3g}"
