"""A GPT-style decoder: embeddings, blocks of attention and perceptron around shortcuts, and a head."""

from __future__ import annotations

from collections.abc import Mapping
from math import sqrt

from mpitrain._errors import InputError
from mpitrain.nn import checks
from mpitrain.nn.activations import GELU
from mpitrain.nn.attention import CausalAttention
from mpitrain.nn.containers import Residual, Sequential
from mpitrain.nn.dropout import Dropout
from mpitrain.nn.embedding import Embedding
from mpitrain.nn.layer import Layer
from mpitrain.nn.layernorm import LayerNorm
from mpitrain.nn.linear import Linear
from mpitrain.nn.positions import PositionEmbedding
from mpitrain.nn.recompute import Recompute
from mpitrain.nn.unembedding import Unembedding

_STD = 0.02
"""Standard deviation of the initial weights; the layers that write to the shortcuts get less, see `block`."""


class GPT(Sequential):
    """Scores for the token that follows each token, from those before: integers (n, t) to (n, t, vocabulary).

    Its layers are ``tokens``, ``positions``, ``dropout`` if there is any, ``block0`` and so on, ``norm`` and ``head``.

    Parameters
    ----------
    vocabulary : int
        Number of different tokens.
    context : int
        Longest sequence, t.
    layers : int
        Number of blocks.
    width : int
        Features of each token between the blocks.
    heads : int
        Attention heads of a block; ``width`` is a multiple of it.
    hidden : int, optional
        Units of each block's perceptron; None: 4 · width.
    dropout : float
        Fraction of the embeddings, and of what each branch adds, that is dropped in training.
    tied : bool
        Whether the head's table is that of the tokens.
    recompute : bool
        Whether each block is computed again in the backward pass, so that its activations need not be kept; the bits
        are the same.

    Notes
    -----
    Radford and others, "Language models are unsupervised multitask learners", 2019, section 2.3, with its initial
    values; dropout of the attention's weights is left out.  Weight decay shrinks the blocks' weights and an untied
    head; embeddings, biases and norms it leaves alone.
    """

    def __init__(
        self,
        vocabulary: int,
        context: int,
        layers: int = 4,
        width: int = 128,
        heads: int = 4,
        hidden: int | None = None,
        dropout: float = 0.0,
        tied: bool = True,
        recompute: bool = False,
    ) -> None:
        self.vocabulary, self.tied = vocabulary, tied
        scale = 1.0 / sqrt(2 * checks.positive("GPT: layers", layers))
        blocks = {f"block{i}": block(width, heads, hidden, dropout, scale) for i in range(layers)}
        if recompute:
            blocks = {name: Recompute(each) for name, each in blocks.items()}
        super().__init__(
            tokens=Embedding(vocabulary, width, _STD, decay=False),
            positions=PositionEmbedding(context, width, _STD),
            **_dropout(dropout),
            **blocks,
            norm=LayerNorm(width),
            head=Unembedding(vocabulary, width, _STD),
        )

    def ties(self) -> Mapping[str, str]:
        """Return that the head's table is that of the tokens, if they are tied."""
        return {"head.weight": "tokens.weight"} if self.tied else {}


def block(width: int, heads: int, hidden: int | None = None, dropout: float = 0.0, scale: float = 1.0) -> Layer:
    """Return a pre-norm transformer block: ``x + attention(norm(x))``, then ``x + perceptron(norm(x))``.

    Parameters
    ----------
    width, heads, hidden, dropout
        As for `GPT`.
    scale : float
        Factor on the initial weights of the two layers that write to the shortcut: 1 / √(number of those in the
        decoder) keeps the sum's variance.

    Notes
    -----
    Norms before the branches: Xiong and others, "On layer normalization in the transformer architecture", ICML 2020.
    """
    if checks.positive("GPT: width", width) % checks.positive("GPT: heads", heads):
        raise InputError("GPT: width is not a multiple of heads", got=f"{width} and {heads}")
    hidden = 4 * width if hidden is None else hidden
    attention = Sequential(
        norm=LayerNorm(width),
        qkv=Linear(width, 3 * width, std=_STD),
        heads=CausalAttention(heads),
        out=Linear(width, width, std=_STD * scale),
        **_dropout(dropout),
    )
    perceptron = Sequential(
        norm=LayerNorm(width),
        up=Linear(width, hidden, std=_STD),
        gelu=GELU(),
        down=Linear(hidden, width, std=_STD * scale),
        **_dropout(dropout),
    )
    return Sequential(attention=Residual(attention), mlp=Residual(perceptron))


def _dropout(p: float) -> dict[str, Layer]:
    layer = Dropout(p)
    return {"dropout": layer} if layer.p else {}
