"""Local SGD: every rank trains on its own share of each batch, and every k steps the models are averaged."""

from __future__ import annotations

from dataclasses import replace
from typing import Any, ClassVar

import numpy as np

from mpitrain._errors import InputError
from mpitrain._options import check_whole
from mpitrain.arrays import Batch
from mpitrain.comm import Communicator
from mpitrain.method.method import Plan
from mpitrain.method.steps import all_finite
from mpitrain.nn.model import Model
from mpitrain.optim import Optimizer
from mpitrain.parallel.data import DataParallel
from mpitrain.parallel.tally import Tally


class ModelAveraging(DataParallel):
    """Data-parallel training that averages models instead of gradients.

    Parameters
    ----------
    comm : Communicator
        The ranks that share each batch.
    average_every : int
        Steps between two averagings; the commit points.
    **options
        As for `DataParallel`; neither codec nor ``across``.

    Notes
    -----
    Parameters and optimizer state are averaged, weighted by the samples that each rank has seen since the last time:
    local SGD with averaged momentum (Yu, Jin, Yang, ICML 2019, algorithm 1).  Unlike `DataParallel`, the result depends
    on the number of ranks.  A rank whose share of a step is empty takes none.
    """

    reads_in_place: ClassVar[bool] = False

    def __init__(self, comm: Communicator, *, average_every: int, **options: Any) -> None:
        super().__init__(comm, **options)
        if self.codec is not None:
            raise InputError(
                "a codec compresses gradients, and this method sends none", operation="ModelAveraging",
                got=self.codec.name, remedy="use DataParallel, or no codec",
            )  # fmt: skip
        if self.across is not None:
            raise InputError(
                "ranks that divide a model take every step together", operation="ModelAveraging", got="across",
                remedy="use DataParallel or GradientParallel",
            )  # fmt: skip
        check_whole("ModelAveraging", "average_every", average_every, 1)
        self.average_every = average_every

    def setup(self, model: Model, optimizer: Optimizer, plan: Plan) -> None:
        """See `Method.setup`."""
        super().setup(model, optimizer, plan)
        self._seen = 0.0  # this rank's samples since the last averaging

    def _at_commit(self, step: int) -> bool:
        return step % self.average_every == 0 or step == self.plan.steps

    def _train_step(self, microbatches: list[Batch]) -> Tally:
        phase = self.comm.phase
        with phase("gradients"):
            own = self._gradients(microbatches, self.grads, None)
        with phase("check"):
            own = replace(own, bad=float(own.bad or not all_finite(self.parts)))
            total = self._agreement.total(own)
            taken = self._is_taken(not total.bad, microbatches)
        if not taken:
            own, total = own.untrained(), total.untrained()
        if own.count:
            with phase("update"):
                self._update(own.count)
        self._seen += own.count
        if self._at_commit(self.step + 1):
            with phase("average"):
                self._average()
        return total

    def _average(self) -> None:
        total = float(self.comm.allreduce(np.float64(self._seen)))
        if not total:  # all steps since were skipped
            return
        share = self._seen / total
        for array in (self.params.flat, *self.optimizer_state.values()):
            array *= array.dtype.type(share)
            self.comm.allreduce(array, out=array)
        self._seen = 0.0
