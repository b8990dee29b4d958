"""Linear layers of which each rank holds some columns, or some rows."""

from __future__ import annotations

from collections.abc import Sequence

from mpitrain._typing import Array, Tree
from mpitrain.nn import Call, Context, Linear, Parameter, checks
from mpitrain.nn.reductions import add_product, column_sums, rows
from mpitrain.parallel.tensor.adjoints import COLLECT, COPY, SPLIT, SPREAD, SUM, Cut
from mpitrain.parallel.tensor.call import peer_call
from mpitrain.parallel.tensor.portion import Portion, boxed, in_terms
from mpitrain.parallel.tensor.shared_input import SharedInput


class ColumnLinear(SharedInput, Linear):
    """Some columns of a linear layer: of the whole input, a part of the outputs, (n, …, inputs) to (n, …, span).

    Parameters
    ----------
    whole : Linear
        The layer that all ranks together are.
    portion : Portion
        Which part of it this is.
    heads : int, optional
        The outputs are those of so many attention heads, which stay whole.
    sequence : bool
        Whether the input is divided along axis 1: it is gathered on the way in, instead of being there.

    Notes
    -----
    Collective in both passes.  Forward: nothing, or an allgather; backward: an allreduce of the input's gradient, or a
    reduce_scatter.  Shoeybi and others, "Megatron-LM", 2019, section 3; along the sequence: Korthikanti and others,
    "Reducing activation recomputation in large transformer models", MLSys 2023, section 4.2.
    """

    def __init__(self, whole: Linear, portion: Portion, heads: int | None = None, sequence: bool = False) -> None:
        self.whole = whole
        self.span = portion.span(whole.outputs, "outputs of a layer" if heads is None else "heads", heads)
        super().__init__(whole.inputs, self.span[1] - self.span[0], whole.bias, whole.std)
        self.pair = SPREAD if sequence else COPY

    def parameters(self) -> Sequence[Parameter]:
        """Return this rank's columns of weight and bias."""
        return boxed(self.whole.parameters(), weight=(1, self.span), bias=(0, self.span))


class RowLinear(Linear):
    """Some rows of a linear layer: of a part of the inputs, a term of all outputs, (n, …, span) to (n, …, outputs).

    Parameters
    ----------
    whole : Linear
        The layer that all ranks together are.
    portion : Portion
        Which part of it this is.
    heads : int, optional
        The inputs are those of so many attention heads, which stay whole.
    sequence : bool
        Whether the output is divided along axis 1.
    split : bool
        Whether the whole input comes in, of which the layer takes its part; else only the part does.

    Notes
    -----
    Collective in both passes.  Forward: an allreduce of the output, or a reduce_scatter; backward: nothing, or an
    allgather; with ``split`` an allgather of the input's gradient.  Every rank holds the bias, which is added to the
    sum.  Source: see `ColumnLinear`.
    """

    def __init__(
        self, whole: Linear, portion: Portion, heads: int | None = None, sequence: bool = False, split: bool = False
    ) -> None:
        self.whole, self.sequence, self.split = whole, sequence, split
        self.span = portion.span(whole.inputs, "inputs of a layer" if heads is None else "heads", heads)
        super().__init__(self.span[1] - self.span[0], whole.outputs, whole.bias, whole.std)
        self.pair = COLLECT if sequence else SUM

    def parameters(self) -> Sequence[Parameter]:
        """Return this rank's rows of the weight, and the bias."""
        parameters = boxed(self.whole.parameters(), weight=(0, self.span))
        return in_terms(parameters, "bias") if self.sequence else parameters

    def forward(self, params: Tree, x: Array, call: Call) -> tuple[Array, Context]:
        """Return the sum over the ranks of ``x W``, plus ``b``."""
        call, context = peer_call(call), call.context()
        if self.split:
            checks.last_axis("Linear", x, self.whole.inputs)
            x = SPLIT.forward(x, Cut(-1, self.whole.inputs), context, call)
        checks.last_axis("RowLinear", x, self.inputs)
        terms = context.take((*x.shape[:-1], self.outputs), x.dtype)
        call.xp.matmul(rows(x), params["weight"], out=rows(terms))
        y = self.pair.forward(terms, Cut(1, call.length), context, call)
        if self.bias:
            y += params["bias"]
        context["x"] = x
        return y, context

    def backward_input(self, params: Tree, context: Context, dy: Array, call: Call) -> Array:
        """Return ``dy Wᵀ``: the part of this rank, or of all ranks where the whole input came in."""
        call = peer_call(call)
        dx = super().backward_input(params, context, self._arrived(context, dy, call), call)
        return SPLIT.backward(dx, Cut(-1, self.whole.inputs), context, call) if self.split else dx

    def backward_weight(self, grads: Tree, context: Context, dy: Array, call: Call) -> None:
        """Add ``xᵀ dy``, and for the bias the sums of the ``dy`` that is here."""
        add_product(rows(context["x"]), rows(self._arrived(context, dy, call)), grads, "weight", call)
        if self.bias:
            grads["bias"][...] += column_sums(dy, call)

    def _arrived(self, context: Context, dy: Array, call: Call) -> Array:
        """Return the whole output gradient, exchanged once."""
        if "dy" not in context:
            call = peer_call(call)
            context["dy"] = self.pair.backward(dy, Cut(1, call.length), context, call)
        found: Array = context["dy"]
        return found
