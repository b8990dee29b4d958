"""Tables of tokens of which each rank holds some rows: the first layer of a language model, and the last."""

from __future__ import annotations

from collections.abc import Sequence

from mpitrain._typing import Array, Tree
from mpitrain.nn import Call, Context, Embedding, Parameter, Unembedding
from mpitrain.nn.embedding import add_rows, gather_rows
from mpitrain.parallel.tensor.adjoints import COLLECT, COPY, SPREAD, SUM, Cut
from mpitrain.parallel.tensor.call import peer_call
from mpitrain.parallel.tensor.portion import Portion, boxed
from mpitrain.parallel.tensor.shared_input import SharedInput


class VocabularyEmbedding(Embedding):
    """Some rows of an embedding: integers (n, t) to (n, t, features).

    Parameters
    ----------
    whole : Embedding
        The table that all ranks together hold.
    portion : Portion
        Which part of it this is.
    sequence : bool
        Whether the output is divided along axis 1.

    Notes
    -----
    Each rank looks up the numbers that it has, and zeros for others; the sum over the ranks is the vectors.

    Collective.  Forward: an allreduce of the output, or a reduce_scatter; backward: nothing, or an allgather.
    """

    def __init__(self, whole: Embedding, portion: Portion, sequence: bool = False) -> None:
        super().__init__(whole.count, whole.features, whole.std, whole.decay)
        self.span = portion.span(whole.count, "tokens")
        self.pair = COLLECT if sequence else SUM

    def parameters(self) -> Sequence[Parameter]:
        """Return this rank's rows."""
        return boxed(super().parameters(), weight=(0, self.span))

    def forward(self, params: Tree, x: Array, call: Call) -> tuple[Array, Context]:
        """Look the vectors up."""
        self._check(x)
        call, context = peer_call(call), call.context()
        start, stop = self.span
        context["here"] = here = (x >= start) & (x < stop)
        context["x"], numbers = x, call.xp.where(here, x - start, 0)
        found = context.take((*x.shape, self.features), params["weight"].dtype)
        gather_rows(params["weight"], numbers, found)
        found *= here[..., None]
        return self.pair.forward(found, Cut(1, call.length), context, call), context

    def backward_weight(self, grads: Tree, context: Context, dy: Array, call: Call) -> None:
        """Add the sum of ``dy`` over the occurrences of each number that this rank has."""
        call, here = peer_call(call), context["here"]
        dy = self.pair.backward(dy, Cut(1, call.length), context, call)
        add_rows(grads["weight"], context["x"][here] - self.span[0], dy[here], call)


class VocabularyUnembedding(SharedInput, Unembedding):
    """Some scores of an unembedding: (n, t, features) to (n, t, span).

    Parameters
    ----------
    whole : Unembedding
        The table that all ranks together hold.
    portion : Portion
        Which part of it this is.
    sequence : bool
        Whether the input is divided along axis 1.

    Notes
    -----
    Collective, as `ColumnLinear` is.
    """

    def __init__(self, whole: Unembedding, portion: Portion, sequence: bool = False) -> None:
        self.whole = whole
        self.span = portion.span(whole.count, "tokens")
        super().__init__(self.span[1] - self.span[0], whole.features, whole.std)
        self.pair = SPREAD if sequence else COPY

    def parameters(self) -> Sequence[Parameter]:
        """Return this rank's rows."""
        return boxed(self.whole.parameters(), weight=(0, self.span))
