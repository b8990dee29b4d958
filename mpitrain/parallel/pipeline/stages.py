"""What a rank computes: passes through its stages, one microbatch at a time.  Knows no other rank, and no schedule."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from mpitrain._typing import Array, Shape
from mpitrain.arrays import Batch, FlatBuffer, Gradients
from mpitrain.nn import Call, Context, Network, Sequential


@dataclass(frozen=True)
class Microbatch:
    """What every stage knows of a microbatch.

    Parameters
    ----------
    batch : Batch
        In the parameters' library; the first stage reads the inputs, the last one the targets.
    params : FlatBuffer
        The parameters of this rank's stages, in the dtype in which they compute.
    call : Call
        The surroundings of its passes.
    scale : float
        What the last stage multiplies the gradient of the loss by.
    """

    batch: Batch
    params: FlatBuffer
    call: Call
    scale: float = 1.0

    @classmethod
    def of(
        cls, network: Network, batch: Batch, params: FlatBuffer, scale: float = 1.0, **surroundings: Any
    ) -> Microbatch:
        """Return a batch with all that passes through the stages of a network need, see `Network.surroundings`."""
        batch = network.prepared(batch, params)
        return cls(batch, params, network.surroundings(params, batch, scale, **surroundings), scale)

    @property
    def sample_shape(self) -> Shape:
        """Shape of one input."""
        return tuple(self.batch.inputs.shape[1:])


@dataclass
class Pass:
    """A microbatch on its way through a stage: what its backward passes need.

    Parameters
    ----------
    microbatch : Microbatch
        Which.
    x : array
        The stage's input.
    y : array
        Its output, valid until `release`.
    contexts : list of Context
        Of the layers, and of the loss.
    dy : array, optional
        Gradient of the output, once it is known.
    """

    microbatch: Microbatch
    x: Array
    y: Array
    contexts: list[Context]
    dy: Array | None = field(default=None)

    def release(self) -> None:
        """Give the activations back."""
        for context in self.contexts:
            context.release()


class Stages:
    """A rank's stages.

    Parameters
    ----------
    network : Network
        The whole model, whose loss is used.
    layers : dict of int to Sequential
        This rank's stages, by number.
    """

    def __init__(self, network: Network, layers: Mapping[int, Sequential]) -> None:
        self._network, self._layers = network, layers

    def forward(self, stage: int, microbatch: Microbatch, x: Array) -> Pass:
        """Compute a stage's output."""
        y, context = self._layers[stage].forward(microbatch.params.tree, x, microbatch.call)
        return Pass(microbatch, x, y, [context])

    def output_shape(self, stage: int, empty: Microbatch, sample_shape: Shape) -> Shape:
        """Return the shape of a sample behind a stage, given that before it; ``empty`` has no samples."""
        x = empty.batch.inputs
        if stage > 0:
            x = empty.call.xp.empty((0, *sample_shape), empty.params.layout.dtype)
        way = self.forward(stage, empty, x)
        way.release()
        return tuple(way.y.shape[1:])

    def loss(self, way: Pass) -> float:
        """Compute the loss of the last stage's output, and its scaled gradient; return the sum over the samples."""
        microbatch = way.microbatch
        loss_sum, way.dy, context = self._network.compared(way.y, microbatch.batch, microbatch.scale)
        way.contexts.append(context)
        return loss_sum

    def backward(self, kind: str, stage: int, way: Pass, grads: Gradients) -> Array | None:
        """Compute B, W or both; return the gradient of the input, None from W and from the first stage."""
        layer, call, context = self._layers[stage], way.microbatch.call, way.contexts[0]
        params, is_first = way.microbatch.params.tree, stage == 0
        assert way.dy is not None
        match kind:
            case "BW":
                return layer.backward(params, grads.tree, context, way.dy, call, want_dx=not is_first)
            case "B" if is_first:
                layer.backward_within(params, context, way.dy, call)
            case "B":
                return layer.backward_input(params, context, way.dy, call)
            case _:
                layer.backward_weight(grads.tree, context, way.dy, call)
        return None
