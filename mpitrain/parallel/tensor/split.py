"""How ready-made models are divided: which of their layers becomes which tensor-parallel one."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from mpitrain.nn import (
    GPT,
    BatchNorm,
    CausalAttention,
    Dropout,
    Embedding,
    Layer,
    LayerNorm,
    Linear,
    PositionEmbedding,
    Residual,
    Sequential,
    Unembedding,
)
from mpitrain.parallel.tensor.divided import (
    FeatureBatchNorm,
    FeatureDropout,
    SequenceDropout,
    SequenceLayerNorm,
    SequencePositions,
)
from mpitrain.parallel.tensor.linear import ColumnLinear, RowLinear
from mpitrain.parallel.tensor.portion import Portion, Span
from mpitrain.parallel.tensor.vocabulary import VocabularyEmbedding, VocabularyUnembedding

_COLUMNS, _ROWS = ("qkv", "up"), ("out", "down")
"""What the linear layers of a GPT's block become, by name."""


class TensorGPT(Sequential):
    """A rank's part of a `GPT`, with the same names: vocabulary, heads and the perceptrons' units are divided.

    Parameters
    ----------
    whole : GPT
        The model.
    portion : Portion
        Which part of it.
    sequence : bool
        Whether the activations between the divided layers are divided too, along the sequence; else each rank has
        all of them.

    Raises
    ------
    InputError
        There are more ranks than heads, units or tokens.
    """

    def __init__(self, whole: GPT, portion: Portion, sequence: bool = False) -> None:
        self.whole = whole
        super().__init__(**_divided(whole.children, portion, sequence))

    def ties(self) -> Mapping[str, str]:
        """Return what is tied in the whole."""
        return self.whole.ties()


def split_mlp(whole: Sequential, portion: Portion) -> Sequential:
    """Return a rank's part of a multilayer perceptron, with the same names: by columns, then by rows, and so on.

    Between the two, hidden features are divided, and what stands there works on those that are here.  The last of an
    odd number of linear layers takes its part of the whole input, and is divided by rows.  Outputs are whole.

    Parameters
    ----------
    whole : Sequential
        Linear layers, and between them activations, BatchNorm, Dropout.
    portion : Portion
        Which part of it.

    Raises
    ------
    InputError
        There are more ranks than units of a divided layer.
    """
    layers, here = dict[str, Layer](), None
    left = sum(isinstance(layer, Linear) for layer in whole.layers)
    for name, layer in whole.children:
        layers[name] = layer if here is None else _of_features(layer, here)
        if not isinstance(layer, Linear):
            continue
        left -= 1
        if here is not None or not left:
            layers[name], here = RowLinear(layer, portion, split=here is None), None
        else:
            layers[name] = column = ColumnLinear(layer, portion)
            here = column.span
    return Sequential(**layers)


def _of_features(layer: Layer, span: Span) -> Layer:
    match layer:
        case BatchNorm():
            return FeatureBatchNorm(layer, span)
        case Dropout():
            return FeatureDropout(layer, span)
    return layer


def _divided(children: Sequence[tuple[str, Layer]], portion: Portion, sequence: bool) -> dict[str, Layer]:
    heads = next((layer.heads for _, layer in children if isinstance(layer, CausalAttention)), None)
    return {name: _part(name, layer, portion, sequence, heads) for name, layer in children}


def _part(name: str, layer: Layer, portion: Portion, sequence: bool, heads: int | None) -> Layer:
    """Return a rank's part of one layer of a GPT; ``heads`` are those of the attention beside it."""
    match layer:
        case Residual():
            return Residual(_part("inner", layer.children[0][1], portion, sequence, None))
        case Sequential():
            return Sequential(**_divided(layer.children, portion, sequence))
        case Embedding():
            return VocabularyEmbedding(layer, portion, sequence)
        case Unembedding():
            return VocabularyUnembedding(layer, portion, sequence)
        case Linear() if name in _COLUMNS:
            return ColumnLinear(layer, portion, heads, sequence)
        case Linear() if name in _ROWS:
            return RowLinear(layer, portion, heads, sequence)
        case CausalAttention():
            start, stop = portion.span(layer.heads, "heads")
            return CausalAttention(stop - start)
    return _of_sequence(layer) if sequence else layer


def _of_sequence(layer: Layer) -> Layer:
    match layer:
        case LayerNorm():
            return SequenceLayerNorm(layer.features, layer.eps)
        case PositionEmbedding():
            return SequencePositions(layer.count, layer.features, layer.std)
        case Dropout():
            return SequenceDropout(layer.p)
    return layer
