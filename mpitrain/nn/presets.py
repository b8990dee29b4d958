"""Ready-made models and losses, by the names and options that job files use."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence

from mpitrain._errors import InputError
from mpitrain._options import check_kind, choose
from mpitrain.nn import checks
from mpitrain.nn.activations import ACTIVATIONS
from mpitrain.nn.batchnorm import BatchNorm
from mpitrain.nn.containers import Sequential
from mpitrain.nn.conv import Conv2d
from mpitrain.nn.dropout import Dropout
from mpitrain.nn.embedding import Embedding
from mpitrain.nn.flatten import Flatten
from mpitrain.nn.gpt import GPT
from mpitrain.nn.layer import Layer
from mpitrain.nn.linear import Linear
from mpitrain.nn.loss import Loss
from mpitrain.nn.losses import BinaryCrossEntropy, CrossEntropy, MeanSquaredError
from mpitrain.nn.pooling import MaxPool2d


def linear(inputs: int, outputs: int) -> Layer:
    """Return a linear model: regression, or logistic regression under a cross-entropy."""
    return Sequential(Flatten(), Linear(inputs, outputs))


def mlp(
    inputs: int,
    outputs: int,
    hidden: Sequence[int] = (128,),
    activation: str = "relu",
    dropout: float = 0.0,
    batch_norm: bool = False,
) -> Layer:
    """Return a multilayer perceptron: for each hidden size Linear, BatchNorm, activation, Dropout; then Linear.

    Parameters
    ----------
    inputs, outputs : int
        Numbers in and out of a sample; images are flattened.
    hidden : sequence of int
        Sizes of the hidden layers.
    activation : str
        Name in `ACTIVATIONS`.
    dropout : float
        Probability of dropping a hidden value.
    batch_norm : bool
        Whether hidden layers are normalised.
    """
    check_kind("mlp", "hidden", hidden, Collection, "sizes of layers, e.g. [128, 64]")
    layers: list[Layer] = [Flatten()]
    for size in hidden:
        layers.append(Linear(inputs, size, bias=not batch_norm))
        layers += _hidden(size, activation, dropout, batch_norm)
        inputs = size
    return Sequential(*layers, Linear(inputs, outputs))


def cnn(
    input_shape: Sequence[int],
    outputs: int,
    channels: Sequence[int] = (16, 32),
    hidden: int = 64,
    kernel_size: int = 3,
    pool_every: int = 2,
    activation: str = "relu",
    dropout: float = 0.25,
    batch_norm: bool = True,
) -> Layer:
    """Return a convolutional network: convolutions that keep the size, halving in between, and a small perceptron.

    Parameters
    ----------
    input_shape : (int, int, int)
        Height, width and channels of the images.
    outputs : int
        Numbers out.
    channels : sequence of int
        Output channels of each convolution; each is followed by BatchNorm and the activation.
    hidden : int
        Size of the linear layer before the last.
    kernel_size : int
        Odd size of the convolutions' windows.
    pool_every : int
        After so many convolutions the image is halved by a MaxPool2d(2).
    activation : str
        Name in `ACTIVATIONS`.
    dropout : float
        Probability of dropping a value of the hidden linear layer.
    batch_norm : bool
        Whether convolutions are normalised.
    """
    height, width, depth = _image(input_shape)
    check_kind("cnn", "channels", channels, Collection, "channels of each convolution, e.g. [16, 32]")
    if checks.positive("cnn: kernel_size", kernel_size) % 2 == 0:
        raise InputError("cnn: kernel_size is even", got=kernel_size, expected="an odd number, which keeps the size")
    checks.positive("cnn: pool_every", pool_every)
    layers: list[Layer] = []
    for number, size in enumerate(channels, start=1):
        layers.append(Conv2d(depth, size, kernel_size, padding=kernel_size // 2, bias=not batch_norm))
        layers += _hidden(size, activation, 0.0, batch_norm)
        depth = size
        if number % pool_every == 0:
            layers.append(MaxPool2d(2))
            height, width = height // 2, width // 2
    if not height or not width:
        raise InputError(
            "cnn: pooling leaves nothing of the images", got=f"images of {input_shape[0]} × {input_shape[1]}",
            expected=f"at least {2 ** (len(channels) // pool_every)} pixels a side", remedy="raise pool_every",
        )  # fmt: skip
    layers += [Flatten(), Linear(height * width * depth, hidden), *_hidden(hidden, activation, dropout, False)]
    return Sequential(*layers, Linear(hidden, outputs))


def bigram(vocabulary: int) -> Layer:
    """Return a bigram model of text: a token's row of a table is the logits of the next token."""
    return Sequential(Embedding(vocabulary, vocabulary, std=0.01))


def _hidden(size: int, activation: str, dropout: float, batch_norm: bool) -> list[Layer]:
    """Return what follows a hidden linear layer or convolution."""
    layers: list[Layer] = [BatchNorm(size)] if batch_norm else []
    layers.append(choose(ACTIVATIONS, "activation", activation)())
    return [*layers, Dropout(dropout)] if dropout else layers


def _image(shape: Sequence[int]) -> tuple[int, int, int]:
    expected = "(height, width, channels)"
    check_kind("cnn", "input_shape", shape, Collection, expected)
    if len(shape) != 3:
        raise InputError("cnn: input_shape is wrong", got=tuple(shape), expected=expected)
    height, width, depth = (checks.positive("cnn: input_shape", size) for size in shape)
    return height, width, depth


MODELS: dict[str, Callable[..., Layer]] = {"bigram": bigram, "cnn": cnn, "gpt": GPT, "linear": linear, "mlp": mlp}
"""Builders of models by name.  One more: a function above, a row here, a row in its test, a line in the docs."""

LOSSES: dict[str, type[Loss]] = {"bce": BinaryCrossEntropy, "cross_entropy": CrossEntropy, "mse": MeanSquaredError}
"""Losses by name; `label_smoothing` is an option of cross_entropy."""
