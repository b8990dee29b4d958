"""What all ranks of a synchronous method agree on: those that share batches, and those that divide the model.

Knows neither models nor what a step does with a verdict.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace

import numpy as np

from mpitrain.arrays import FlatBuffer
from mpitrain.arrays.flatbuffer import sha256
from mpitrain.comm import Communicator
from mpitrain.data import Batches
from mpitrain.method.method import Feed, Plan
from mpitrain.method.steps import check_same, verify_replicas, verify_settings
from mpitrain.optim import Optimizer
from mpitrain.parallel.tally import Tally


class Agreement:
    """Compares what has to be the same on all ranks, and sums what each has of a step.

    Parameters
    ----------
    comm : Communicator
        The ranks that share each batch.
    across : Communicator, optional
        The ranks that divide the model and see the same samples; None: there are none.

    Notes
    -----
    All methods are collective over both.  What is compared raises a `MismatchError` on all ranks that compare it.
    """

    def __init__(self, comm: Communicator, across: Communicator | None) -> None:
        self._comm, self._across = comm, across
        self._both = (comm, across) if across else (comm,)

    def check_settings(self, optimizer: Optimizer, plan: Plan) -> None:
        """Check that all ranks take steps by the same rule."""
        for comm in self._both:
            verify_settings(comm, optimizer, plan)

    def check_feed(self, feed: Feed) -> None:
        """Refuse batches that are others than on rank 0: each rank would take its share, or pass, of another whole."""
        said = str(feed) if isinstance(feed, Batches) else type(feed).__name__
        for comm in self._both:
            with comm.ledger.unchanged():
                check_same(comm, said, "ranks were given different batches", "advance")

    def check_parameters(self, replicas: Communicator, stretches: Iterable[FlatBuffer]) -> None:
        """Check that ranks hold the same values of the same tensors.

        Parameters
        ----------
        replicas : Communicator
            The ranks that hold the same parameters as this one.
        stretches : iterable of FlatBuffer
            The parameters, part by part; ranks along ``across`` may cut theirs elsewhere.
        """
        common: list[str] = []
        for params in stretches:
            verify_replicas(replicas, params.sha256())
            if self._across:
                whole = (segment.name for segment in params.layout if segment.is_whole)
                common += [f"{name} {sha256([params.views[name]])}" for name in whole]
        if self._across:
            verify_replicas(self._across, "\n".join(sorted(common)))

    def total(self, own: Tally) -> Tally:
        """Return a tally summed over the ranks that share batches, with the stops and troubles of all others, too."""
        total = Tally(*self._comm.allreduce(np.array(own.numbers, np.float64)).tolist())
        if self._across is None:
            return total
        stops, bad = self._across.allreduce(np.array([total.stops, total.bad]), "max").tolist()
        return replace(total, stops=stops, bad=bad)
