"""A layer whose activations are not kept for the backward pass, but computed again there: less memory, more work."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace

from mpitrain._options import check_kind
from mpitrain._typing import Array, Tree
from mpitrain.nn.layer import Call, Context, Layer, Parameter


class Recompute(Layer):
    """The same function as ``layer``, of which only input and output stay between the passes.

    Parameters
    ----------
    layer : Layer
        Most often a `Sequential` of several layers, such as a block of a decoder; its tensors keep their names.

    Notes
    -----
    Outputs and gradients have the same bits: random masks are drawn from the same keys, and what a forward pass has
    summed over ranks (BatchNorm's statistics) is kept, a few numbers per feature, instead of summed again.  Layers
    that exchange data among ranks by other means do so once more.

    Memory: between the passes, the output instead of everything that ``layer`` keeps; in the backward pass, that of one
    such layer at a time.  Work: one more forward pass.

    T. Chen, B. Xu, C. Zhang, C. Guestrin, "Training deep nets with sublinear memory cost", 2016, section 3.
    """

    def __init__(self, layer: Layer) -> None:
        check_kind("Recompute", "layer", layer, Layer, "a layer of mpitrain.nn, e.g. Sequential(Linear(64, 10))")
        self.layer = layer
        self.takes_indices = layer.takes_indices

    def parameters(self) -> Sequence[Parameter]:
        """Return those of the layer."""
        return self.layer.parameters()

    def ties(self) -> Mapping[str, str]:
        """Return those of the layer."""
        return self.layer.ties()

    def forward(self, params: Tree, x: Array, call: Call) -> tuple[Array, Context]:
        """Run the layer, and keep nothing of the pass but its output and what was summed over ranks."""
        context, sums = call.context(), list[Array]()
        y, inner = self.layer.forward(params, x, _noting(call, sums))
        kept = context.take(y.shape, y.dtype)
        kept[...] = y
        inner.release()
        context["x"], context["call"], context["sums"] = x, call, sums
        return kept, context

    def backward_input(self, params: Tree, context: Context, dy: Array, call: Call) -> Array:
        """Run the forward pass again, then the layer's backward pass to its input."""
        return self.layer.backward_input(params, self._again(params, context), dy, call)

    def backward_weight(self, grads: Tree, context: Context, dy: Array, call: Call) -> None:
        """Add the layer's gradients, from the pass that `backward_input` has run again."""
        self.layer.backward_weight(grads, context.children[0], dy, call)

    def backward(
        self, params: Tree, grads: Tree, context: Context, dy: Array, call: Call, want_dx: bool = True
    ) -> Array | None:
        """Run the forward pass again, then both of the layer's backward passes."""
        return self.layer.backward(params, grads, self._again(params, context), dy, call, want_dx)

    def _again(self, params: Tree, context: Context) -> Context:
        call = _repeating(context["call"], iter(context["sums"]))
        _, inner = self.layer.forward(params, context["x"], call)
        context.children.append(inner)
        return inner


def _noting(call: Call, sums: list[Array]) -> Call:
    """Return a call that keeps a copy of what it sums over ranks."""
    reduce = call.reduce
    if reduce is None:
        return call

    def noted(array: Array) -> Array:
        found = reduce(array)
        sums.append(found.copy())
        return found

    return replace(call, reduce=noted)


def _repeating(call: Call, sums: Iterator[Array]) -> Call:
    """Return a call that gives the kept sums once more."""
    if call.reduce is None:
        return call

    def repeated(array: Array) -> Array:
        array[...] = next(sums)
        return array

    return replace(call, reduce=repeated)
