"""How ready-made models are divided: which of their layers becomes which tensor-parallel one."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from mpitrain._errors import InputError
from mpitrain.comm import Communicator
from mpitrain.nn import (
    GPT,
    Activation,
    BatchNorm,
    CausalAttention,
    CrossEntropy,
    Dropout,
    Embedding,
    Layer,
    LayerNorm,
    Linear,
    Loss,
    PositionEmbedding,
    Recompute,
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
from mpitrain.parallel.tensor.loss import VocabularyCrossEntropy
from mpitrain.parallel.tensor.network import TensorNetwork
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


def divided_network(
    whole: Layer, loss: Loss, peers: Communicator, dtype: Any = np.float32, sequence: bool = False
) -> TensorNetwork:
    """Return this rank's part of a ready-made model, as the `TensorNetwork` that methods train.

    Parameters
    ----------
    whole : GPT, or Sequential as for `split_mlp`
        The model.
    loss : Loss
        Of the whole model; a GPT's is `CrossEntropy`.
    peers : Communicator
        The ranks that divide it.
    dtype : dtype
        As for `Network`.
    sequence : bool
        As for `TensorGPT`.

    Raises
    ------
    InputError
        The model, or its loss, cannot be divided, or not among so many ranks.
    """
    portion = Portion(peers.rank, peers.size)
    if isinstance(whole, GPT) and isinstance(loss, CrossEntropy):
        classes = whole.vocabulary
        divided = VocabularyCrossEntropy(classes, peers, loss.label_smoothing, loss.unit)
        return TensorNetwork(TensorGPT(whole, portion, sequence), divided, peers, dtype, classes)
    if isinstance(whole, Sequential) and not isinstance(whole, GPT) and not sequence:
        return TensorNetwork(split_mlp(whole, portion), loss, peers, dtype)
    raise InputError(
        "tensor-parallel: this model cannot be divided", got=f"{type(whole).__name__} under {type(loss).__name__}",
        expected="a GPT under CrossEntropy, or linear layers one after the other",
        remedy="make a layer of ColumnLinear, RowLinear and the like, and a TensorNetwork of it",
    )  # fmt: skip


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
        if not isinstance(layer, Linear):
            layers[name] = layer if here is None else _of_features(layer, here)
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
        case Activation():
            return layer
        case BatchNorm():
            return FeatureBatchNorm(layer, span)
        case Dropout():
            return FeatureDropout(layer, span)
    raise InputError(
        "tensor-parallel: a layer needs all features, which are divided there", got=type(layer).__name__,
        expected="an activation, BatchNorm or Dropout between two linear layers",
    )  # fmt: skip


def _divided(children: Sequence[tuple[str, Layer]], portion: Portion, sequence: bool) -> dict[str, Layer]:
    heads = next((layer.heads for _, layer in children if isinstance(layer, CausalAttention)), None)
    return {name: _part(name, layer, portion, sequence, heads) for name, layer in children}


def _part(name: str, layer: Layer, portion: Portion, sequence: bool, heads: int | None) -> Layer:
    """Return a rank's part of one layer of a GPT; ``heads`` are those of the attention beside it."""
    match layer:
        case Residual():
            return Residual(_part("inner", layer.children[0][1], portion, sequence, None))
        case Recompute():
            return Recompute(_part(name, layer.layer, portion, sequence, heads))
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
