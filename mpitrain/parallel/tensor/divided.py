"""Layers that work on each feature, or each place of a sequence, by itself, where a rank has only some of those.

They exchange nothing.  Some of them hold parameters for the features that are here, others all parameters, of whose
gradients the places that are here give a term.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import prod

from mpitrain._typing import Array
from mpitrain.nn import BatchNorm, Call, Dropout, LayerNorm, Parameter, PositionEmbedding
from mpitrain.parallel.tensor.call import peer_call
from mpitrain.parallel.tensor.portion import Span, boxed, in_terms


class FeatureBatchNorm(BatchNorm):
    """Batch normalisation of some features.

    Parameters
    ----------
    whole : BatchNorm
        Of all features.
    span : (int, int)
        Which of them are here.
    """

    def __init__(self, whole: BatchNorm, span: Span) -> None:
        super().__init__(span[1] - span[0], whole.momentum, whole.eps)
        self.whole, self.span = whole, span

    def parameters(self) -> Sequence[Parameter]:
        """Return the parts of gamma, beta and the running statistics."""
        names = ("gamma", "beta", "running_mean", "running_var")
        return boxed(self.whole.parameters(), **dict.fromkeys(names, (0, self.span)))


class FeatureDropout(Dropout):
    """Dropout of some features, (n, span), as of all.

    Parameters
    ----------
    whole : Dropout
        Of all features.
    span : (int, int)
        Which of them are here.
    """

    def __init__(self, whole: Dropout, span: Span) -> None:
        super().__init__(whole.p)
        self.span = span

    def _elements(self, x: Array, call: Call) -> Span:
        return self.span


class SequenceDropout(Dropout):
    """Dropout of some places of a sequence, (n, span, features), as of all."""

    def _elements(self, x: Array, call: Call) -> Span:
        start, stop = peer_call(call).places
        features = prod(x.shape[2:])
        return start * features, stop * features


class SequenceLayerNorm(LayerNorm):
    """Layer normalisation of some places of a sequence; gradients of gamma and beta are terms."""

    def parameters(self) -> Sequence[Parameter]:
        """Return gamma and beta."""
        return in_terms(super().parameters(), "gamma", "beta")


class SequencePositions(PositionEmbedding):
    """Learned positions of some places of a sequence; gradients are terms, zero for the other places."""

    def parameters(self) -> Sequence[Parameter]:
        """Return the table."""
        return in_terms(super().parameters(), "weight")

    def _places(self, x: Array, call: Call) -> slice:
        return slice(*peer_call(call).places)
