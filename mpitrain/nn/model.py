"""The contract between any model and any method: what gives a loss and gradients for a batch."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from typing import Any, TypeAlias

from mpitrain._typing import Array
from mpitrain.arrays import Batch, FlatBuffer, Gradients, Key, Layout, ParameterSource

Reduce: TypeAlias = Callable[[Array], Array]
"""Sums an array over all ranks that share the batch, in place, and returns it.  Collective."""


class Model(ABC):
    """Gives a loss and gradients for a batch; holds no parameters and no state between calls.

    A model is handed its parameters, the buffer for its gradients, its random key and, where it needs numbers of
    other ranks (BatchNorm), a reduction.  So microbatches, pipelines and recomputation are safe.
    """

    reads_by_layer: bool = False
    """Whether a method may keep the parameters divided and bring them layer by layer (`layer_of`).

    That needs a `loss_and_gradients` that reads parameters through ``params.tree`` alone, one layer at a time; that
    keeps none of their arrays; and that takes the layers in the same order on all ranks, whatever the batch."""

    def layer_of(self, name: str) -> str:
        """Return the layer that a tensor belongs to, whose tensors are read together: its prefix unless overridden."""
        return name.rpartition(".")[0]

    @property
    @abstractmethod
    def layout(self) -> Layout:
        """Names, shapes and groups of the parameters; the same on all ranks."""

    @abstractmethod
    def initialise(self, params: FlatBuffer, key: Key) -> None:
        """Fill ``params`` with initial values that depend on ``key`` and the tensors' names alone.

        A model that `reads_by_layer` may be handed a buffer with only some of its tensors.
        """

    @abstractmethod
    def loss_and_gradients(
        self, params: ParameterSource, batch: Batch, grads: Gradients, rng: Key, reduce: Reduce | None = None
    ) -> tuple[float, float]:
        """Add the gradient of the *sum* of the batch's losses to ``grads``.

        Parameters
        ----------
        params : ParameterSource
            Parameters; not changed.  A `FlatBuffer`, unless the model `reads_by_layer`.
        batch : Batch
            This rank's share; may be empty, and then the same reductions are called as with samples.
        grads : Gradients
            Gradients, added to.  For ``statistics`` tensors: the batch's statistic times ``count``.  A model may tell
            it, as it goes, which are complete (`FlatBuffer.complete`), so that they are reduced at once; a model that
            touches them through ``grads.tree`` alone lets methods keep only some of them at a time.
        rng : Key
            Randomness of this step.
        reduce : callable, optional
            Sums an array over all ranks that share the batch; None: the batch here is all there is.

        Returns
        -------
        loss_sum : float
            Sum of the samples' losses.
        count : float
            What the sum is to be divided by, once reduced: number of samples (or tokens).
        """

    @abstractmethod
    def predict(self, params: FlatBuffer, inputs: Array) -> Array:
        """Return the model's outputs for ``inputs``, shape (n, …), in evaluation mode; a new array."""

    @abstractmethod
    def sums(self, params: FlatBuffer, batch: Batch) -> dict[str, Array]:
        """Return float64 sums over the batch from which `metrics` follow, once added over batches and ranks.

        Keys and shapes are the same for every batch, an empty one included; ``"count"`` and ``"loss"`` (the sum of
        the losses) are always among them.
        """

    @abstractmethod
    def metrics(self, sums: Mapping[str, Array]) -> dict[str, Any]:
        """Turn added `sums` into metrics: ``loss``, and e.g. ``accuracy`` and ``confusion`` or ``r2``."""


class MixedModel(Model):
    """A model that also computes in 16 bits: in the dtype of the parameters that it is handed."""

    @abstractmethod
    def scaled_gradients(
        self,
        params: ParameterSource,
        batch: Batch,
        grads: Gradients,
        rng: Key,
        reduce: Reduce | None = None,
        scale: float = 1.0,
    ) -> tuple[float, float]:
        """Do as `loss_and_gradients`, with all that is added to ``grads`` multiplied by ``scale``.

        Parameters
        ----------
        params : ParameterSource
            Of the model's own dtype, or of float16 or bfloat16: then the passes are in that dtype.
        grads : Gradients
            Of the model's own dtype.
        scale : float
            Multiplies the gradient of the loss before it goes back through the layers, where small numbers would
            vanish in float16; statistics too.  Loss and count, which are returned, are not scaled.
        """
