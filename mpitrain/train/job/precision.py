"""The ``[precision]`` section: in which type the passes are computed, and how float16 scales the loss."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Literal

from pydantic import Field

from mpitrain.train.job.section import Count, Positive, Problem, Section

_OF_FLOAT16 = ("initial_scale", "growth_factor", "backoff_factor", "growth_interval", "most_skips")


class PrecisionSection(Section):
    """In which type forward and backward passes are computed.

    Parameters, sums of gradients and optimizer state stay float32. The other keys but `emulate` are those of float16's
    loss scale, which is made as large as it can be without overflow; steps that overflow are skipped.
    """

    compute: Literal["float32", "float16", "bfloat16"] = Field(
        "float32", description="Type of the passes; the 16-bit ones are for GPUs."
    )
    emulate: bool = Field(
        False, description="Allow 16 bits on a CPU, which computes them more slowly than float32; for tests."
    )
    initial_scale: Positive | None = Field(
        None,
        description="What the sum of a batch's losses is multiplied by at first; by default 65536 divided by the "
        "labels of a batch, as a power of two.",
    )
    growth_factor: float = Field(2.0, gt=1, description="By which the scale grows.")
    backoff_factor: float = Field(0.5, gt=0, lt=1, description="By which it is multiplied after an overflow.")
    growth_interval: Count = Field(2000, description="Steps in a row without overflow after which it grows.")
    most_skips: Count = Field(25, description="Skipped steps in a row after which the run ends with an error.")

    @property
    def mixed(self) -> bool:
        """Whether passes are in another type than parameters."""
        return self.compute != "float32"

    def problems(self) -> Iterator[Problem]:
        """Yield what does not fit together."""
        if self.emulate and not self.mixed:
            yield Problem(
                "emulate", "allows 16 bits, which are not asked for", True, 'compute = "float16" or "bfloat16"'
            )
        if self.compute == "float16":
            return
        for name in _OF_FLOAT16:
            if getattr(self, name) != type(self).model_fields[name].default:
                yield Problem(name, "is of the loss scale", getattr(self, name), 'compute = "float16" beside it')
