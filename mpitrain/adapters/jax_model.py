"""A JAX loss function and its parameters, as the model that the training methods know."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping
from typing import Any

import jax
import numpy as np

from mpitrain._errors import DtypeError, InputError
from mpitrain._typing import Array
from mpitrain.adapters import checks
from mpitrain.adapters.empty import two_of_zeros
from mpitrain.adapters.jax_sharded import ShardedLoss
from mpitrain.adapters.tree import add
from mpitrain.arrays import Batch, FlatBuffer, Gradients, Key, Layout, ParameterSource, Segment
from mpitrain.nn import Model, Reduce
from mpitrain.nn.loss import labels_or_samples, mean

Parameters = Any
"""A tree of arrays: dictionaries, lists, tuples, data classes that JAX knows."""


class JaxModel(Model):
    """Trains a JAX function under any method.

    Parameters
    ----------
    loss : callable
        ``loss(params, batch, key)`` returns the *sum* of the batch's losses, a scalar, and can be traced.  ``params``
        is a tree like ``parameters``; ``batch`` a dictionary of ``inputs`` (n, …), ``targets`` (n, …) and ``weights``
        (n,), the factor on each sample's loss; ``key`` a JAX random key of the step and microbatch, None in
        evaluation.
    parameters : tree of arrays
        Initial values, all float32 or all float64; the same on all ranks, which methods verify.
    predict : callable, optional
        ``predict(params, inputs)`` returns the outputs.

    Raises
    ------
    DtypeError
        The parameters are of other dtypes, or float64 while ``jax_enable_x64`` is off.

    Notes
    -----
    The loss is averaged over labels where targets are integers, else over samples; it is the only metric.  The gradient
    is one compiled function, compiled anew for each shape of batch: rank counts that do not divide the batch size
    cost a second compilation.  Values come to JAX and back through host memory.

    What is random depends on how a batch is divided, as the key is one of the first sample's place in the global batch.

    *Fully sharded* (`GradientParallel`, stage 3): the loss is traced and cut into units, each of which reads the
    tensors of one layer and, beside them, little of others.  A layer is what hangs on one branch of the tree, or one
    tensor at its top.  Each unit is compiled; equal blocks once for all, if a block with ``relu``, ``softmax``,
    ``lax.scan`` or a derivative rule of its own is a function under ``jax.jit``, for JAX makes such rules anew at each
    call.  A unit's parameters are brought for it, and it is run again in the backward pass, as under
    ``jax.checkpoint``: what it prints or calls back may come twice.  A function with a derivative rule of its own gets
    all it needs as arguments.  A loop of JAX's (``lax.scan``) is one unit, with all parameters that it reads.
    A rank with an empty batch goes through the units with two samples of zeros, of which nothing is counted.  The
    values that were handed over are let go when the first samples come.
    """

    reads_by_layer = True

    def __init__(
        self,
        loss: Callable[[Parameters, dict[str, Any], Any], Any],
        parameters: Parameters,
        predict: Callable[[Parameters, Any], Any] | None = None,
    ) -> None:
        leaves, self._tree = jax.tree_util.tree_flatten_with_path(parameters)
        self._names = [jax.tree_util.keystr(path, simple=True, separator=".") or "parameters" for path, _ in leaves]
        self._initial = {name: np.array(leaf) for name, (_, leaf) in zip(self._names, leaves, strict=True)}
        self._layout = _layout(self._initial)
        self._given = loss
        self._loss = jax.jit(self._sum)
        self._gradient = jax.jit(jax.value_and_grad(self._with_key))
        shapes = [jax.ShapeDtypeStruct(array.shape, array.dtype) for array in self._initial.values()]
        self._sharded = ShardedLoss(self._of_list, self._names, shapes, self.layer_of)
        self._predict = None if predict is None else jax.jit(predict)
        self._is_a_sum = False

    @property
    def layout(self) -> Layout:
        """Names, shapes and groups of the parameters: weights (two axes or more) decay, others do not."""
        return self._layout

    def initialise(self, params: FlatBuffer, key: Key) -> None:
        """Fill ``params`` with the values that were handed over; ``key`` has no say in them."""
        if not self._initial:
            raise InputError(
                "the first values were let go when the model was trained fully sharded", operation="JaxModel",
                remedy="make the model again",
            )  # fmt: skip
        checks.on_host("JaxModel", params.flat)
        for segment in params.layout.segments:
            params.views[segment.name][...] = self._initial[segment.name]

    def layer_of(self, name: str) -> str:
        """Return the branch of the tree in which a tensor is; see `Model.layer_of`."""
        return name.rpartition(".")[0] or name

    def loss_and_gradients(
        self, params: ParameterSource, batch: Batch, grads: Gradients, rng: Key, reduce: Reduce | None = None
    ) -> tuple[float, float]:
        """Add the gradient of the sum of the batch's losses to ``grads``; see `Model.loss_and_gradients`.

        Raises
        ------
        InputError
            The loss is seen to be a mean: it does not grow when the batch is there twice.
        """
        if not isinstance(params, FlatBuffer):
            return self._by_units(params, batch, grads, rng)
        if not len(batch):
            return 0.0, 0.0
        values = self._values(params.views)
        if not self._is_a_sum:
            self._check_sum(values, batch)
        loss_sum, found = self._gradient(values, *self._arguments(batch, rng))
        for name, gradient in zip(self._names, jax.tree_util.tree_leaves(found), strict=True):
            add(grads.tree, name, np.asarray(gradient))
        for name in self._names:
            grads.complete(name)
        return float(loss_sum), labels_or_samples(batch)

    def _by_units(self, params: ParameterSource, batch: Batch, grads: Gradients, rng: Key) -> tuple[float, float]:
        """Compute the gradients unit by unit, with parameters brought as they are read.

        All ranks run the same units in the same order, also those without samples, or they would wait for each other.
        """
        self._let_go(batch)
        arguments = self._arguments(batch if len(batch) else _nothing(batch), rng)
        steps = self._sharded.steps(arguments)
        left = Counter(name for reads in steps.reads for name in reads)
        for name in self._names:
            if name not in left:
                grads.complete(name)

        def receive(name: str, gradient: Array) -> None:
            if len(batch):
                add(grads.tree, name, gradient)
            left[name] -= 1
            if not left[name]:
                grads.complete(name)

        loss_sum = steps.run(params.tree, arguments, receive)
        return (loss_sum, labels_or_samples(batch)) if len(batch) else (0.0, 0.0)

    def _let_go(self, batch: Batch) -> None:
        """Drop the initial values, of which every rank has all, once samples have shown that the loss is a sum."""
        if not len(batch):
            return
        initial, self._initial = self._initial, {}
        if initial and not self._is_a_sum:
            self._check_sum(self._values(initial), batch)

    def _arguments(self, batch: Batch, rng: Key) -> tuple[dict[str, Array], Array, Any]:
        key = rng.child(f"from{int(batch.index[0])}")
        return self._fields(batch), np.array(key.words, np.uint32), np.uint32(key.step)

    def _sum(self, params: Parameters, batch: dict[str, Any], key: Any) -> Any:
        return _scalar(self._given(params, batch, key))

    def _with_key(self, params: Parameters, batch: dict[str, Any], words: Any, step: Any) -> Any:
        key = jax.random.wrap_key_data(words, impl="threefry2x32")
        return self._sum(params, batch, jax.random.fold_in(key, step))

    def _of_list(self, parameters: list[Any], *arguments: Any) -> Any:
        return self._with_key(self._tree.unflatten(parameters), *arguments)

    def predict(self, params: FlatBuffer, inputs: Array) -> Array:
        """Return the outputs for ``inputs``, shape (n, …); a new array.

        Raises
        ------
        InputError
            The model was made without ``predict``, or the inputs are no array.
        """
        if self._predict is None:
            raise InputError("the model has no predict", operation="JaxModel", remedy="pass predict=")
        checks.array("JaxModel", inputs)
        if not len(inputs):  # for which x.reshape(len(x), -1) fails, as functions are often written
            return self.predict(params, two_of_zeros(inputs))[:0]
        return np.array(self._predict(self._values(params.views), self._inputs(inputs)))

    def sums(self, params: FlatBuffer, batch: Batch) -> dict[str, Array]:
        """Return ``count`` and ``loss`` of the batch."""
        loss = float(self._loss(self._values(params.views), self._fields(batch), None)) if len(batch) else 0.0
        return {"count": np.array(labels_or_samples(batch)), "loss": np.array(loss)}

    def metrics(self, sums: Mapping[str, Array]) -> dict[str, Any]:
        """Return ``loss``."""
        return {"loss": mean(sums, "loss")}

    def _values(self, values: Mapping[str, Array]) -> Parameters:
        return self._tree.unflatten([values[name] for name in self._names])

    def _inputs(self, inputs: Array) -> Array:
        return inputs if inputs.dtype.kind in "iub" else inputs.astype(self._layout.dtype, copy=False)

    def _fields(self, batch: Batch) -> dict[str, Array]:
        weights = np.ones(len(batch)) if batch.weights is None else batch.weights
        return {
            "inputs": self._inputs(batch.inputs),
            "targets": self._inputs(batch.targets),
            "weights": weights.astype(self._layout.dtype, copy=False),
        }

    def _check_sum(self, values: Parameters, batch: Batch) -> None:
        """Refuse a mean: with every sample there twice, a sum doubles."""
        once = self._fields(batch)
        twice = {name: np.concatenate([field, field]) for name, field in once.items()}
        one, two = (float(self._loss(values, fields, None)) for fields in (once, twice))
        if abs(two - one) < abs(two - 2 * one):
            raise InputError(
                "the loss is a mean over the batch", operation="JaxModel",
                got=f"{one:.6g} for a batch, {two:.6g} for the same batch twice", expected="the sum of the losses",
                remedy="return losses.sum(); the division, by the number of samples of all ranks, comes later",
            )  # fmt: skip
        self._is_a_sum = True


def _scalar(value: Any) -> Any:
    got = type(value).__name__
    if jax.tree_util.all_leaves([value]):
        shape, dtype = jax.numpy.shape(value), jax.numpy.result_type(value)
        if not shape and jax.numpy.issubdtype(dtype, jax.numpy.floating):
            return value
        got = f"{dtype} of shape {shape}"
    raise InputError(
        "the loss is no number", operation="JaxModel", got=got,
        expected="a floating-point scalar, the sum of the losses", remedy="return losses.sum()",
    )  # fmt: skip


def _nothing(batch: Batch) -> Batch:
    """Return two samples of zeros, in the shapes of an empty batch's."""
    return Batch(two_of_zeros(batch.inputs), two_of_zeros(batch.targets), np.arange(2))


def _layout(initial: Mapping[str, Array]) -> Layout:
    kinds = {array.dtype.name for array in initial.values()}
    if kinds not in ({"float32"}, {"float64"}):
        raise DtypeError(
            "the parameters are not of one dtype that can be trained", operation="JaxModel",
            got=", ".join(sorted(kinds)) or "no arrays", expected="all float32, or all float64",
        )  # fmt: skip
    (dtype,) = kinds
    if dtype == "float64" and not jax.config.jax_enable_x64:
        raise DtypeError(
            "JAX would round float64 to float32", operation="JaxModel", got="float64 parameters",
            remedy='jax.config.update("jax_enable_x64", True), or float32 parameters',
        )  # fmt: skip
    segments = [
        Segment(name, array.shape, group="decay" if array.ndim > 1 else "no_decay") for name, array in initial.items()
    ]
    return Layout.build(segments, dtype)
