"""Batches on their way through a pipeline in evaluation mode: the sums of their metrics, and their outputs.

Knows neither gradients nor schedules, and adds nothing up over pipelines.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import TypeVar

import numpy as np

from mpitrain._typing import Array
from mpitrain.arrays import Batch, FlatBuffer, Key
from mpitrain.comm import Communicator
from mpitrain.method.evaluation import Sums
from mpitrain.method.steps import add_sums
from mpitrain.nn import Network
from mpitrain.parallel.pipeline.executor import Executor
from mpitrain.parallel.pipeline.stages import Microbatch

_T = TypeVar("_T")


class Evaluator:
    """Evaluates batches, cut into as many parts as the model is evaluated in.

    Parameters
    ----------
    pipe : Communicator
        The ranks of the pipeline.
    executor : Executor
        Runs this rank's stages, in the parameters' type.
    network : Network
        The whole model.
    key : Key
        The run's.

    Notes
    -----
    All methods are collective over ``pipe``, with the same batches on all ranks but for `rounds`.
    """

    def __init__(self, pipe: Communicator, executor: Executor, network: Network, key: Key) -> None:
        self._pipe, self._executor, self._network, self._key = pipe, executor, network, key

    def rounds(self, items: Iterable[_T]) -> Iterator[list[_T]]:
        """Yield the next batch, or what there is in its place, of every rank of the pipeline, until none has one."""
        own = iter(items)
        while True:
            found = [item for item in self._pipe.allgather_object(next(own, None)) if item is not None]
            if not found:
                return
            yield found

    def sums(self, batches: Sequence[Batch], params: FlatBuffer) -> list[Sums]:
        """Return each batch's sums (`Model.sums`) on the pipeline's last rank, elsewhere none."""
        parts = [(number, each) for number, b in enumerate(batches) for each in self._parts(b, params)]
        ready = [each for _, each in parts]
        found = dict[int, Sums]()
        for outputs, (number, each) in zip(self._executor.outputs(ready), parts, strict=False):
            found[number] = add_sums(found.get(number), self._network.loss.sums(outputs, each.batch))
        return list(found.values())

    def outputs(self, inputs: Array, params: FlatBuffer) -> Array:
        """Return the outputs of the last stage for ``inputs``, shape (n, …), on all ranks: the first rank's count."""
        count = len(inputs)
        zeros = np.zeros(count, np.int64)
        ready = self._parts(Batch(inputs, zeros, zeros), params)
        shape = self._executor.shapes(ready[0])[-1]
        outputs: Array = params.xp.empty((count, *shape), params.layout.dtype)
        start = 0
        for found in self._executor.outputs(ready):
            outputs[start : start + len(found)] = found
            start += len(found)
        self._pipe.broadcast(outputs, self._pipe.size - 1, out=outputs)
        return outputs

    def _parts(self, batch: Batch, params: FlatBuffer) -> list[Microbatch]:
        """Return a batch in as many parts as it is evaluated in, with what their passes need."""
        parts = [batch.part(rows) for rows in self._network.slices(batch.inputs)]
        return [
            Microbatch.of(self._network, each, params, training=False, key=self._key, reduce=None) for each in parts
        ]
