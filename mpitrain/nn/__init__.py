"""Layers, losses, and the models made of them; over NumPy or CuPy, and without communication of their own."""

from mpitrain.nn.activations import ACTIVATIONS, GELU, Activation, ReLU, Sigmoid, Tanh
from mpitrain.nn.attention import CausalAttention
from mpitrain.nn.batchnorm import BatchNorm
from mpitrain.nn.containers import Residual, Sequential
from mpitrain.nn.conv import Conv2d
from mpitrain.nn.dropout import Dropout
from mpitrain.nn.embedding import Embedding
from mpitrain.nn.flatten import Flatten
from mpitrain.nn.gpt import GPT
from mpitrain.nn.gradcheck import check_layer, check_loss
from mpitrain.nn.layer import Call, Context, Layer, Parameter
from mpitrain.nn.layernorm import LayerNorm
from mpitrain.nn.linear import Linear
from mpitrain.nn.loss import Loss
from mpitrain.nn.losses import BinaryCrossEntropy, CrossEntropy, MeanSquaredError
from mpitrain.nn.model import MixedModel, Model, Reduce
from mpitrain.nn.network import Network
from mpitrain.nn.pool import Pool
from mpitrain.nn.pooling import AvgPool2d, MaxPool2d
from mpitrain.nn.positions import PositionEmbedding
from mpitrain.nn.presets import LOSSES, MODELS
from mpitrain.nn.recompute import Recompute
from mpitrain.nn.unembedding import Unembedding
from mpitrain.nn.wide import in_float32

__all__ = [
    "ACTIVATIONS",
    "GELU",
    "GPT",
    "LOSSES",
    "MODELS",
    "Activation",
    "AvgPool2d",
    "BatchNorm",
    "BinaryCrossEntropy",
    "Call",
    "CausalAttention",
    "Context",
    "Conv2d",
    "CrossEntropy",
    "Dropout",
    "Embedding",
    "Flatten",
    "Layer",
    "LayerNorm",
    "Linear",
    "Loss",
    "MaxPool2d",
    "MeanSquaredError",
    "MixedModel",
    "Model",
    "Network",
    "Parameter",
    "Pool",
    "PositionEmbedding",
    "ReLU",
    "Recompute",
    "Reduce",
    "Residual",
    "Sequential",
    "Sigmoid",
    "Tanh",
    "Unembedding",
    "check_layer",
    "check_loss",
    "in_float32",
]
