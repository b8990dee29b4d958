"""The ``[mesh]`` section: how many ranks share what, axis by axis."""

from __future__ import annotations

from collections.abc import Iterator

from pydantic import Field

from mpitrain.train.job.section import Count, Problem, Section


class MeshSection(Section):
    """How the ranks are put on a grid; as many as the axes multiplied.

    Ranks along `data` compute different samples, and divide what `[method]` says; ranks along `pipe` or `tensor`
    compute the same samples, each with a part of the model. By default every rank is one along `data`.
    """

    data: Count | None = Field(
        None,
        description="Ranks that share a batch; by default as many as the others leave, and 1 where those are along "
        "`pipe`.",
    )
    pipe: Count | None = Field(
        None,
        description="Ranks that divide the model's layers, a pipeline; by default 1, and with "
        '`kind = "pipeline"` as many as the others leave.',
    )
    tensor: Count = Field(1, description='Ranks that divide the model\'s tensors, for `kind = "gpt"` and `"mlp"`.')
    sequence_parallel: bool = Field(
        False,
        description="Whether these ranks also divide, along the sequence, the activations between the layers that they "
        'divide: less memory, the same bytes; for `kind = "gpt"`.',
    )

    @property
    def divides_model(self) -> bool:
        """Whether no rank has all of the model."""
        return self.tensor > 1

    def problems(self) -> Iterator[Problem]:
        """Yield what does not fit together."""
        if self.sequence_parallel and self.tensor == 1:
            yield Problem("sequence_parallel", "needs ranks that divide the model", True, "tensor > 1")
