"""Tensor-parallel models: ranks that divide the tensors of a model, horizontally, and take every pass together."""

from mpitrain.parallel.tensor.adjoints import ADJOINTS, Cut, Pair
from mpitrain.parallel.tensor.call import PeerCall
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
from mpitrain.parallel.tensor.portion import Portion
from mpitrain.parallel.tensor.split import TensorGPT, divided_network, split_mlp
from mpitrain.parallel.tensor.vocabulary import VocabularyEmbedding, VocabularyUnembedding

__all__ = [
    "ADJOINTS",
    "ColumnLinear",
    "Cut",
    "FeatureBatchNorm",
    "FeatureDropout",
    "Pair",
    "PeerCall",
    "Portion",
    "RowLinear",
    "SequenceDropout",
    "SequenceLayerNorm",
    "SequencePositions",
    "TensorGPT",
    "TensorNetwork",
    "VocabularyCrossEntropy",
    "VocabularyEmbedding",
    "VocabularyUnembedding",
    "divided_network",
    "split_mlp",
]
