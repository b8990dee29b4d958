"""A model that some ranks divide: each holds a part of its tensors, and all take every pass together."""

from __future__ import annotations

from typing import Any

import numpy as np

from mpitrain._typing import Array
from mpitrain.arrays import FlatBuffer, namespace
from mpitrain.comm import Communicator
from mpitrain.nn import Layer, Loss, Network
from mpitrain.parallel.tensor.adjoints import GATHER, Cut
from mpitrain.parallel.tensor.call import PeerCall


class TensorNetwork(Network):
    """A `Network` whose layers are divided among the ranks of a communicator.

    Parameters
    ----------
    layer : Layer
        This rank's part, e.g. of `split_gpt`.
    loss : Loss
        Compares outputs with targets; for outputs that are divided, one that knows it.
    peers : Communicator
        The ranks that divide the model; all are given the same batches.
    dtype : dtype
        As for `Network`.
    outputs : int, optional
        Size of the outputs' last axis if each rank computes only its part of them; None: all compute all.

    Notes
    -----
    Collective over ``peers``: every pass, also over an empty batch.
    """

    def __init__(
        self, layer: Layer, loss: Loss, peers: Communicator, dtype: Any = np.float32, outputs: int | None = None
    ) -> None:
        super().__init__(layer, loss, dtype)
        self.peers, self.outputs = peers, outputs

    def predict(self, params: FlatBuffer, inputs: Array) -> Array:
        """Return the whole outputs for ``inputs``, shape (n, …), in evaluation mode; a new array.  Collective."""
        return self.united(self._outputs(params, inputs))

    def united(self, outputs: Array) -> Array:
        """Return whole outputs, given this rank's part of them.  Collective."""
        if self.outputs is None:
            return outputs
        call = self.call(outputs)
        return GATHER.forward(outputs, Cut(-1, self.outputs), call.context(), call)

    def call(self, inputs: Array, **options: Any) -> PeerCall:
        """Return the surroundings of a pass over ``inputs``."""
        length = inputs.shape[1] if inputs.ndim > 1 else 1
        return PeerCall(namespace(inputs), self.pool, peers=self.peers, length=length, **options)
