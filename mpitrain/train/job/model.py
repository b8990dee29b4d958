"""The ``[model]`` section: a preset with its options, or the user's own model, and its loss."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Annotated, Any, ClassVar, Literal

from pydantic import AfterValidator, BeforeValidator, Field, ValidationInfo

from mpitrain._names import did_you_mean
from mpitrain.train.job.section import (
    BuildText,
    Count,
    Counts,
    Fraction,
    KindSection,
    Problem,
    build_by_default,
    is_build,
    rejected,
)

LOSSES = ("bce", "cross_entropy", "mse")
LOSS_OF_TASK = {"classification": "cross_entropy", "regression": "mse", "sequence": "cross_entropy"}

_LOSS_WORDS = " or ".join(f'"{name}"' for name in (*LOSSES, "file.py:name"))


def _is_loss(text: str, info: ValidationInfo) -> str:
    if text in LOSSES:
        return text
    if ":" not in text:
        raise rejected(Problem("", "is not one of the losses", text, _LOSS_WORDS, did_you_mean(text, LOSSES)))
    return is_build(text, info)


def _is_odd(value: int) -> int:
    if value % 2 == 0:
        raise rejected(Problem("", "is even, and windows are centred on a pixel", value, _ODD_WORDS))
    return value


_ODD_WORDS = "odd integer ≥ 1"
OddCount = Annotated[int, Field(ge=1), AfterValidator(_is_odd), _ODD_WORDS]
Activation = Literal["relu", "gelu", "tanh", "sigmoid"]


class Model(KindSection):
    """What is trained: a preset (`kind`) or your own model (`build`)."""

    not_options: ClassVar[frozenset[str]] = frozenset({"kind", "loss"})

    loss: Annotated[str, AfterValidator(_is_loss), _LOSS_WORDS] | None = Field(
        None,
        description="What is minimised; your own as a function in a Python file. By default the cross-entropy for "
        "classes and tokens, the mean squared error for a regression.",
    )


class Mlp(Model):
    """A multi-layer perceptron: linear layers with activations between them."""

    kind: Literal["mlp"]
    hidden: Counts = Field((128,), description="Units of each hidden layer.")
    activation: Activation = Field("relu", description="The non-linearity.")
    batch_norm: bool = Field(False, description="Whether each hidden layer is followed by batch normalisation.")
    dropout: Fraction = Field(0.0, description="Fraction of the hidden units that is dropped in training.")


class Cnn(Model):
    """A convolutional network: convolutions with pooling in between, then one hidden and one last linear layer."""

    kind: Literal["cnn"]
    channels: Counts = Field((16, 32), description="Output channels of each convolution.")
    hidden: Count = Field(64, description="Units of the hidden linear layer.")
    kernel_size: OddCount = Field(3, description="Width of the convolutions' windows, in pixels.")
    pool_every: Count = Field(2, description="After how many convolutions the image is halved.")
    activation: Activation = Field("relu", description="The non-linearity.")
    batch_norm: bool = Field(True, description="Whether each convolution is followed by batch normalisation.")
    dropout: Fraction = Field(0.25, description="Fraction of the hidden units that is dropped in training.")


class Linear(Model):
    """One linear layer: linear, logistic or softmax regression, as the loss says."""

    kind: Literal["linear"]


class Bigram(Model):
    """Predicts each token from the one before it: one table of logits."""

    kind: Literal["bigram"]


class Gpt(Model):
    """A GPT-style decoder: each token from those before it, in windows as long as the data's `context`."""

    kind: Literal["gpt"]
    layers: Count = Field(4, description="Blocks of attention and perceptron.")
    width: Count = Field(128, description="Features of each token between the blocks.")
    heads: Count = Field(4, description="Attention heads of each block; `width` is a multiple of it.")
    hidden: Count | None = Field(None, description="Units of each block's perceptron; by default 4 · `width`.")
    dropout: Fraction = Field(
        0.0, description="Fraction of the embeddings, and of what each branch adds, that is dropped in training."
    )
    tied: bool = Field(True, description="Whether the last layer's table of tokens is the first one's.")
    recompute: bool = Field(
        False,
        description="Whether the backward pass computes each block again instead of keeping its activations: less "
        "memory, about a third more work, the same bits.",
    )

    def problems(self) -> Iterator[Problem]:
        """Yield what does not fit together."""
        if self.width % self.heads:
            yield Problem("width", "is not a multiple of heads", self.width, f"a multiple of {self.heads}")


class BuiltModel(Model):
    """Your own model: a function in a Python file that returns a `Model`, a layer, or a PyTorch module."""

    kind: Literal["build"]
    build: BuildText = Field(description='Where it is: `"my_model.py:build"`.')
    options: dict[str, Any] = Field({}, description="Keyword arguments that it is called with.")

    def arguments(self) -> dict[str, Any]:
        """Return the keyword arguments for the user's function."""
        return dict(self.options)


ModelSection = Annotated[
    Mlp | Cnn | Linear | Bigram | Gpt | BuiltModel, Field(discriminator="kind"), BeforeValidator(build_by_default)
]
