"""A layer and a loss, as the model that the training methods know."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace
from math import prod
from typing import Any

import numpy as np

from mpitrain._errors import DataError
from mpitrain._options import check_kind
from mpitrain._typing import Array, DType
from mpitrain.arrays import Batch, FlatBuffer, Gradients, Key, Layout, ParameterSource, namespace
from mpitrain.arrays.dtypes import accumulator, floating, is_half
from mpitrain.arrays.products import half_products
from mpitrain.nn.layer import Call, Context, Layer
from mpitrain.nn.layout import layout_of
from mpitrain.nn.loss import Loss
from mpitrain.nn.model import MixedModel, Reduce
from mpitrain.nn.pool import Pool
from mpitrain.nn.wide import copied

_PREDICT_ROWS = 256
"""Samples that `Network.predict` takes at a time, so that its memory does not grow with the data set."""

_PREDICT_TOKENS = 2048
"""Tokens that it takes at a time, each of which becomes a sample's worth of features."""


class Network(MixedModel):
    """Trains a layer, most often a `Sequential`, with a loss.

    Parameters
    ----------
    layer : Layer
        Gives the outputs.
    loss : Loss
        Compares them with the targets.
    dtype : dtype
        float32 or float64: of parameters, gradients and everything between.  Inputs are converted to it.

    Raises
    ------
    InputError
        The layer is none, or the loss.
    DtypeError
        Any other dtype.
    """

    reads_by_layer = True

    def __init__(self, layer: Layer, loss: Loss, dtype: Any = np.float32) -> None:
        check_kind("Network", "layer", layer, Layer, "a layer of mpitrain.nn, e.g. Sequential(Linear(64, 10))")
        check_kind("Network", "loss", loss, Loss, "a loss of mpitrain.nn, e.g. CrossEntropy()")
        self.layer = layer
        self.loss = loss
        self.pool = Pool()
        self._parameters = {parameter.name: parameter for parameter in layer.parameters()}
        self._layout = layout_of(layer, floating(dtype, "network"))

    @property
    def layout(self) -> Layout:
        """Names, shapes and groups of the parameters; the same on all ranks."""
        return self._layout

    def initialise(self, params: FlatBuffer, key: Key) -> None:
        """Fill ``params``, which may hold only a part of the tensors, with values that no layout changes."""
        xp = params.xp
        for segment in params.layout.segments:
            values = self._parameters[segment.name].initialiser(key.child(segment.name), segment)
            params.views[segment.name][...] = xp.asarray(values.astype(params.layout.dtype))

    def loss_and_gradients(
        self, params: ParameterSource, batch: Batch, grads: Gradients, rng: Key, reduce: Reduce | None = None
    ) -> tuple[float, float]:
        """Add the gradient of the sum of the batch's losses to ``grads``; see `Model.loss_and_gradients`."""
        return self.scaled_gradients(params, batch, grads, rng, reduce)

    def scaled_gradients(
        self,
        params: ParameterSource,
        batch: Batch,
        grads: Gradients,
        rng: Key,
        reduce: Reduce | None = None,
        scale: float = 1.0,
    ) -> tuple[float, float]:
        """See `MixedModel.scaled_gradients`; the loss is computed in float32 at least."""
        batch = self.prepared(batch, params)
        call = self.surroundings(params, batch, scale, training=True, key=rng, reduce=reduce, complete=grads.complete)
        outputs, context = self.layer.forward(params.tree, batch.inputs, call)
        loss_sum, d_outputs, loss_context = self.compared(outputs, batch, scale)
        self.layer.backward(params.tree, grads.tree, context, d_outputs, call, want_dx=False)
        loss_context.release()
        context.release()
        return loss_sum, self.loss.count(batch)

    def surroundings(self, params: ParameterSource, batch: Batch, scale: float = 1.0, **options: Any) -> Call:
        """Return the surroundings of a pass over a batch, prepared for ``params``, whose loss is scaled."""
        call = self.call(batch.inputs, index=batch.index, count=scale * self.loss.count(batch), **options)
        return replace(call, xp=half_products(call.xp)) if is_half(params.layout.dtype) else call

    def compared(self, outputs: Array, batch: Batch, scale: float = 1.0) -> tuple[float, Array, Context]:
        """Return the loss of outputs, and its gradient in their dtype.

        Returns
        -------
        loss_sum : float
            Computed in float32 at least, and not scaled.
        gradient : array, shape and dtype of outputs
            Times ``scale``, and rounded once; valid until the context's release.
        context : Context
            What holds it.
        """
        context = Context(self.pool, namespace(outputs))
        loss_sum, inner = self.loss.forward(_in_full(outputs, context), batch, self.pool)
        context.children.append(inner)
        return loss_sum, _scaled(self.loss.backward(inner), outputs.dtype, scale, context), context

    def predict(self, params: FlatBuffer, inputs: Array) -> Array:
        """Return the outputs for ``inputs``, shape (n, …), in evaluation mode; a new array."""
        return self._outputs(params, inputs)

    def call(self, inputs: Array, **options: Any) -> Call:
        """Return the surroundings of a pass over ``inputs``."""
        return Call(namespace(inputs), self.pool, **options)

    def united(self, outputs: Array) -> Array:
        """Return whole outputs, where ranks have parts of them; here each has all."""
        return outputs

    def _outputs(self, params: FlatBuffer, inputs: Array) -> Array:
        """Return what the layer gives for ``inputs`` in evaluation mode; a new array."""
        parts = []
        for rows in self.slices(inputs):
            part = self.prepared_inputs(inputs[rows], params)
            outputs, context = self.layer.forward(params.tree, part, self.call(part))
            parts.append(outputs.copy())
            context.release()
        found: Array = params.xp.concatenate(parts)
        return found

    def sums(self, params: FlatBuffer, batch: Batch) -> dict[str, Array]:
        """Return the sums over the batch from which `metrics` follow."""
        batch, total = self.prepared(batch, params), dict[str, Array]()
        for rows in self.slices(batch.inputs):
            part = batch.part(rows)
            sums = self.loss.sums(self._outputs(params, part.inputs), part)
            total = {name: total[name] + sums[name] for name in sums} if total else sums
        return total

    def metrics(self, sums: Mapping[str, Array]) -> dict[str, Any]:
        """Turn added `sums` into the loss's metrics."""
        return self.loss.metrics(sums)

    def slices(self, inputs: Array) -> Iterator[slice]:
        """Yield the samples that are predicted at a time: one part of them at least, be it empty."""
        tokens = prod(getattr(inputs, "shape", ())[1:]) if self.layer.takes_indices else 1
        rows = max(1, min(_PREDICT_ROWS, _PREDICT_TOKENS // max(1, tokens)))
        return (slice(start, start + rows) for start in range(0, max(len(inputs), 1), rows))

    def prepared(self, batch: Batch, params: ParameterSource) -> Batch:
        """Return the batch in the parameters' library, its inputs as the layer takes them."""
        xp = params.xp
        inputs = self.prepared_inputs(batch.inputs, params)
        weights = None if batch.weights is None else xp.asarray(batch.weights)
        return Batch(inputs, xp.asarray(batch.targets), xp.asarray(batch.index), weights)

    def prepared_inputs(self, inputs: Array, params: ParameterSource) -> Array:
        """Return the inputs contiguous, in the parameters' library, and unless they are indices in their dtype."""
        xp = params.xp
        if not hasattr(inputs, "dtype"):
            raise DataError(
                "network: the inputs are no array", got=type(inputs).__name__, expected="an array of shape (n, …)",
                remedy="convert them with numpy.asarray",
            )  # fmt: skip
        if inputs.dtype.kind not in "fiub":
            raise DataError("network: the inputs are not numbers", got=inputs.dtype, expected="floats or integers")
        dtype = inputs.dtype if self.layer.takes_indices else params.layout.dtype
        found: Array = xp.ascontiguousarray(xp.asarray(inputs), dtype=dtype)
        return found


def _in_full(outputs: Array, context: Context) -> Array:
    """Return outputs in float32 at least."""
    dtype = accumulator(outputs.dtype)
    return outputs if dtype == outputs.dtype else copied(outputs, dtype, context)


def _scaled(gradient: Array, dtype: DType, scale: float, context: Context) -> Array:
    """Return a gradient times ``scale``, rounded once to the dtype of the layers."""
    if scale == 1.0 and gradient.dtype == dtype:
        return gradient
    scaled = context.take(gradient.shape, dtype)
    namespace(gradient).multiply(gradient, scale, out=scaled)
    return scaled
