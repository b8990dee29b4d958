"""The contract of a layer: what it needs, what a pass through it leaves behind, and how gradients come back.

A layer holds hyperparameters and nothing else.  Parameters, gradients and workspaces are handed in; what a forward
pass leaves for its backward passes lies in a `Context`.  So any number of passes may be in flight (microbatches,
pipelines), a pass may be run twice (recomputation), and the gradients of the weights may be computed long after
those of the inputs (zero-bubble pipelines).

Arrays are channels-last: features lie on the last axis, images are (n, height, width, channels).
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import numpy as np

from mpitrain._typing import Array, DType, Shape, Tree
from mpitrain.arrays import Box, Group, Key, Segment
from mpitrain.nn.model import Reduce
from mpitrain.nn.pool import Pool

if TYPE_CHECKING:
    from mpitrain.nn.activations import Activation

Initialiser = Callable[[Key, Segment], Array]
"""Gives the initial values of a segment's box, from a key that already carries the segment's name."""


@dataclass(frozen=True)
class Parameter:
    """A tensor that a layer wants.

    Parameters
    ----------
    name : str
        Path below the layer, e.g. ``"weight"``, or ``"0.weight"`` seen from a container.
    shape : tuple of int
        Global shape.
    initialiser : callable
        ``(key, segment) -> array`` of the segment's shape.
    group : {"decay", "no_decay", "statistics"}
        Parameter group.
    rate : float
        ``statistics`` only, see `mpitrain.arrays.Segment`.
    box : tuple of (int, int)
        Which part of it this layer holds; all of it unless it is divided among ranks.
    axes : frozenset of str
        Mesh axes over which its gradient is summed.
    """

    name: str
    shape: Shape
    initialiser: Initialiser
    group: Group = "decay"
    rate: float = 0.0
    box: Box = ()
    axes: frozenset[str] = frozenset({"data"})

    def under(self, prefix: str) -> Parameter:
        """Return the parameter as the container of the layer ``prefix`` names it."""
        return replace(self, name=f"{prefix}.{self.name}")

    def segment(self) -> Segment:
        """Return the segment that a layout needs for it."""
        return Segment(self.name, self.shape, self.box, self.group, self.axes, self.rate)


@dataclass(frozen=True)
class Call:
    """What one pass needs from outside the layer.

    Parameters
    ----------
    xp : module
        ``numpy`` or ``cupy``, whichever the arrays belong to.
    pool : Pool
        Where arrays come from.
    training : bool
        Whether Dropout drops and BatchNorm measures.
    key : Key
        Random stream of this step and of the layer's path; read by forward only.
    index : array of int64, shape (n,), optional
        Position of each sample in the global batch; needed by layers that are random per sample.
    count : float
        The loss's count of this batch: the weight with which its statistics enter the mean over ranks.
    reduce : callable, optional
        Sums an array over the ranks that share the batch; None: the batch here is all there is.
    path : str
        What the names of the layer's parameters begin with, e.g. ``"3."``.
    complete : callable, optional
        Told the path of each layer whose gradients are complete, see `mpitrain.arrays.FlatBuffer.complete`.
    activation : Activation, optional
        What a layer that `Layer.applies_activations` is to apply to its output.
    """

    xp: Any = np
    pool: Pool = field(default_factory=Pool)
    training: bool = False
    key: Key = field(default=Key(0))
    index: Array | None = None
    count: float = 0.0
    reduce: Reduce | None = None
    path: str = ""
    complete: Callable[[str], None] | None = None
    activation: Activation | None = None

    def child(self, name: str) -> Call:
        """Return the call that a container hands to its child ``name``: random stream and path differ."""
        return replace(self, key=self.key.child(name), path=f"{self.path}{name}.", activation=None)

    def below(self, name: str) -> Call:
        """Return the call for the backward passes of the child ``name``, which read no random stream."""
        return self if self.complete is None else replace(self, path=f"{self.path}{name}.")

    def context(self) -> Context:
        """Return an empty context for this pass."""
        return Context(self.pool, self.xp)

    def take(self, shape: Shape, dtype: DType) -> Array:
        """Lend scratch memory, to be given back within the same method."""
        return self.pool.take(shape, dtype, self.xp)

    def give(self, *arrays: Array) -> None:
        """Take scratch memory back."""
        for array in arrays:
            self.pool.give(array)

    def summed(self, array: Array) -> Array:
        """Return ``array`` summed over the ranks that share the batch, in place.  Collective."""
        return array if self.reduce is None else self.reduce(array)


class Context:
    """What one forward pass leaves for its backward passes; read and written like a dictionary.

    It owns every array that the layer took for this pass, the pass's output and input gradient included: they are
    valid until `release`.  Arrays that were handed in are borrowed from their owners' contexts.
    """

    __slots__ = ("_held", "_pool", "_values", "_xp", "children")

    def __init__(self, pool: Pool, xp: Any = np) -> None:
        self._pool = pool
        self._xp = xp
        self._held: list[Array] = []
        self._values: dict[str, Any] = {}
        self.children: list[Context] = []

    def __getitem__(self, name: str) -> Any:
        return self._values[name]

    def __setitem__(self, name: str, value: Any) -> None:
        self._values[name] = value

    def __contains__(self, name: str) -> bool:
        return name in self._values

    def take(self, shape: Shape, dtype: DType) -> Array:
        """Return an array with arbitrary contents, valid until `release`."""
        array = self._pool.take(shape, dtype, self._xp)
        self._held.append(array)
        return array

    def release(self) -> None:
        """Give all arrays back to the pool, the children's included; harmless when repeated."""
        for child in self.children:
            child.release()
        for array in self._held:
            self._pool.give(array)
        self._held.clear()
        self._values.clear()


class Layer(ABC):
    """A differentiable function of an input and parameters, without state.

    ``params`` and ``grads`` are dictionaries of views (see `FlatBuffer.tree`), the layer's own part of them.  A pass:
    ``forward``, then ``backward_input`` and ``backward_weight`` in this order and once each, with the same ``dy``,
    at any later time, then ``context.release()``.  Outputs may be views of inputs.
    """

    takes_indices: bool = False
    """Whether the input is integers (token numbers) instead of numbers of the parameters' dtype."""

    computes_in_float32: bool = False
    """Whether passes over 16-bit floats are computed in float32, as `mpitrain.nn.in_float32` has them."""

    applies_activations: bool = False
    """Whether ``forward`` applies ``call.activation`` to its output, which no backward pass needs as it was before.

    A subclass says so anew.
    """

    def parameters(self) -> Sequence[Parameter]:
        """Return the tensors that the layer wants; none unless overridden."""
        return ()

    def ties(self) -> Mapping[str, str]:
        """Return which of its tensors are others of its tensors under a further name; none unless overridden.

        Both names are handed in, in parameters and gradients; the memory behind them is one.
        """
        return {}

    @abstractmethod
    def forward(self, params: Tree, x: Array, call: Call) -> tuple[Array, Context]:
        """Compute the output.

        Parameters
        ----------
        params : dict of str to array
            The layer's parameters; not changed.
        x : array, shape (n, …)
            Input, C-contiguous; not changed, and to stay so until the backward passes are done.  ``n`` may be 0.
        call : Call
            Surroundings of the pass.

        Returns
        -------
        y : array, shape (n, …)
            Output in the dtype of the parameters, valid until the context is released.
        context : Context
            What the backward passes need.
        """

    @abstractmethod
    def backward_input(self, params: Tree, context: Context, dy: Array, call: Call) -> Array:
        """Return the gradient of the input, valid until the context is released; the layer before may overwrite it.

        Parameters
        ----------
        params : dict of str to array
            As in `forward`.
        context : Context
            What `forward` returned.
        dy : array, shape of y
            Gradient of the output; not changed.
        call : Call
            Surroundings of the pass, as in `forward`.
        """

    def backward_weight(self, grads: Tree, context: Context, dy: Array, call: Call) -> None:  # noqa: B027
        """Add the gradients of the parameters to ``grads``; nothing to do unless overridden."""

    def backward(
        self, params: Tree, grads: Tree, context: Context, dy: Array, call: Call, want_dx: bool = True
    ) -> Array | None:
        """Run both backward passes at once, as training without a pipeline does.

        Containers override it to give memory back early: afterwards only the returned array is valid, not ``y``.

        Parameters
        ----------
        want_dx : bool
            Whether the input gradient is needed; the first layer of a network saves that work.
        """
        dx = self.backward_input(params, context, dy, call) if want_dx else None
        self.backward_weight(grads, context, dy, call)
        if call.complete is not None:
            call.complete(call.path)
        return dx
