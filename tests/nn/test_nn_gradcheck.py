"""Every layer and every loss passes the gradient check; and the check itself sees what is wrong."""

import numpy as np
import pytest

from mpitrain import nn
from mpitrain.arrays import Batch
from mpitrain.nn.gpt import block


def _numbers(*shape):
    """Distinct values away from 0, so that no ReLU and no maximum sits at its kink."""
    values = np.linspace(-2.0, 2.0, int(np.prod(shape)) + int(np.prod(shape)) % 2)[: int(np.prod(shape))]
    return np.random.default_rng(3).permutation(values).reshape(shape)


LAYERS = {
    "linear": (lambda: nn.Linear(4, 3), (5, 4)),
    "linear-no-bias": (lambda: nn.Linear(4, 3, bias=False), (5, 4)),
    "linear-tokens": (lambda: nn.Linear(4, 3), (2, 3, 4)),
    "conv": (lambda: nn.Conv2d(2, 3, 3), (2, 5, 4, 2)),
    "conv-padded": (lambda: nn.Conv2d(2, 3, 3, padding=1), (2, 4, 4, 2)),
    "conv-wide-border": (lambda: nn.Conv2d(2, 3, (2, 1), padding=(0, 1)), (2, 4, 3, 2)),
    "conv-strided": (lambda: nn.Conv2d(2, 2, (3, 2), stride=(2, 3), padding=(1, 0)), (2, 6, 6, 2)),
    "conv-leftover": (lambda: nn.Conv2d(1, 2, 2, stride=2, bias=False), (2, 5, 5, 1)),
    "maxpool": (lambda: nn.MaxPool2d(2), (2, 4, 4, 3)),
    "maxpool-overlapping": (lambda: nn.MaxPool2d(3, stride=1), (2, 5, 4, 2)),
    "maxpool-leftover": (lambda: nn.MaxPool2d(2), (2, 5, 5, 2)),
    "avgpool": (lambda: nn.AvgPool2d(2), (2, 4, 4, 3)),
    "avgpool-overlapping": (lambda: nn.AvgPool2d((3, 2), stride=(2, 1)), (2, 5, 4, 2)),
    "flatten": (lambda: nn.Flatten(), (3, 2, 2, 2)),
    "relu": (lambda: nn.ReLU(), (4, 5)),
    "gelu": (lambda: nn.GELU(), (4, 5)),
    "tanh": (lambda: nn.Tanh(), (4, 5)),
    "sigmoid": (lambda: nn.Sigmoid(), (4, 5)),
    "dropout": (lambda: nn.Dropout(0.4), (4, 3, 3)),
    "dropout-none": (lambda: nn.Dropout(0.0), (4, 3)),
    "batchnorm": (lambda: nn.BatchNorm(3), (7, 3)),
    "batchnorm-images": (lambda: nn.BatchNorm(2), (3, 2, 3, 2)),
    "layernorm": (lambda: nn.LayerNorm(5), (3, 2, 5)),
    "attention": (lambda: nn.CausalAttention(2), (2, 5, 12)),
    "attention-of-one": (lambda: nn.CausalAttention(1), (3, 1, 6)),
    "attention-in-blocks": (lambda: nn.CausalAttention(1), (1, 67, 3)),
    "positions": (lambda: nn.PositionEmbedding(4, 3), (2, 3, 3)),
    "unembedding": (lambda: nn.Unembedding(4, 3), (2, 3, 3)),
    "transformer-block": (lambda: block(4, 2, hidden=3, dropout=0.3), (2, 3, 4)),
    "sequential": (
        lambda: nn.Sequential(nn.Flatten(), nn.Linear(4, 6), nn.BatchNorm(6), nn.Tanh(), nn.Flatten(), nn.Linear(6, 2)),
        (5, 2, 2),
    ),
    "sequential-nested": (
        lambda: nn.Sequential(nn.Sequential(nn.Flatten(), nn.Flatten()), nn.Sequential(nn.Linear(4, 3), nn.GELU())),
        (5, 2, 2),
    ),
    "sequential-empty": (lambda: nn.Sequential(), (2, 3)),
    "residual": (lambda: nn.Residual(nn.Sequential(nn.Linear(4, 4), nn.Tanh())), (3, 4)),
    "residual-shortcut": (lambda: nn.Residual(nn.Linear(4, 3), nn.Linear(4, 3, bias=False)), (3, 4)),
    "residual-of-sequential-shortcuts": (
        lambda: nn.Residual(nn.Sequential(nn.Flatten(), nn.Linear(4, 3)), nn.Sequential(nn.Flatten(), nn.Linear(4, 3))),
        (3, 2, 2),
    ),
    "residual-of-residuals": (
        lambda: nn.Sequential(
            nn.Flatten(), nn.Residual(nn.Residual(nn.Sequential(nn.Linear(4, 4), nn.Sigmoid()))), nn.Tanh()
        ),
        (3, 4),
    ),
}


@pytest.mark.parametrize("training", [True, False], ids=["training", "evaluation"])
@pytest.mark.parametrize("name", LAYERS)
def test_layer_passes(name, training):
    build, shape = LAYERS[name]
    nn.check_layer(build(), _numbers(*shape), training=training)


@pytest.mark.parametrize("dtype", [np.int64, np.int32, np.uint8])
def test_embedding_passes(dtype):
    numbers = np.array([[3, 0, 3], [1, 3, 1]], dtype)
    nn.check_layer(nn.Embedding(5, 2), numbers)
    nn.check_layer(nn.Sequential(nn.Embedding(5, 2), nn.Flatten(), nn.Linear(6, 2)), numbers)


@pytest.mark.parametrize("training", [True, False], ids=["training", "evaluation"])
@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
def test_gpt_passes(tied, training):
    layer = nn.GPT(5, context=4, layers=2, width=4, heads=2, hidden=3, dropout=0.2, tied=tied)
    nn.check_layer(layer, np.array([[3, 0, 3], [1, 3, 4]]), training=training)


LOSSES = {
    "cross-entropy": (nn.CrossEntropy(), (4, 3), np.array([2, 0, 1, 1])),
    "cross-entropy-smooth": (nn.CrossEntropy(label_smoothing=0.2), (4, 3), np.array([2, 0, 1, 1])),
    "cross-entropy-tokens": (nn.CrossEntropy(), (2, 3, 4), np.array([[2, 0, 1], [1, 3, 3]])),
    "bce": (nn.BinaryCrossEntropy(), (4, 1), np.array([1, 0, 0, 1])),
    "bce-many": (nn.BinaryCrossEntropy(), (2, 3), np.array([[1, 0, 0], [1, 1, 0]])),
    "mse": (nn.MeanSquaredError(), (4, 1), np.array([1.0, -0.5, 0.25, 3.0])),
    "mse-many": (nn.MeanSquaredError(), (2, 3), np.array([[1.0, 2.0, 0.5], [-1.0, 0.0, 4.0]])),
}


@pytest.mark.parametrize("weighted", [False, True], ids=["plain", "weighted"])
@pytest.mark.parametrize("name", LOSSES)
def test_loss_passes(name, weighted):
    loss, shape, targets = LOSSES[name]
    n = shape[0]
    weights = np.linspace(0.0, 2.0, n) if weighted else None
    nn.check_loss(loss, _numbers(*shape), Batch(np.zeros((n, 1)), targets, np.arange(n), weights))


class _WrongSlope(nn.Tanh):
    def slope(self, x, y, out, call):
        super().slope(x, y, out, call)
        out *= 1.001


class _NoBias(nn.Linear):
    def backward_weight(self, grads, context, dy, call):
        kept = grads["bias"].copy()
        super().backward_weight(grads, context, dy, call)
        grads["bias"][...] = kept


class _Overwrites(nn.Linear):
    def backward_weight(self, grads, context, dy, call):
        grads["weight"][...] = 0
        super().backward_weight(grads, context, dy, call)


class _Remembers(nn.Tanh):
    def forward(self, params, x, call):
        y, context = super().forward(params, x, call)
        self.y = y
        return y, context

    def slope(self, x, y, out, call):
        super().slope(x, self.y, out, call)


class _InPlace(nn.ReLU):
    def forward(self, params, x, call):
        x *= 1.5
        return super().forward(params, x, call)


class _Allocates(nn.ReLU):
    def forward(self, params, x, call):
        call.take(x.shape, x.dtype)
        return super().forward(params, x, call)


@pytest.mark.parametrize(
    ("layer", "shape", "message"),
    [
        (_WrongSlope(), (3, 4), "gradient of input is off"),
        (_NoBias(4, 2), (3, 4), "gradient of bias"),
        (_Overwrites(4, 2), (3, 4), "added to ones"),
        (_Remembers(), (3, 4), "two passes in flight"),
        (_InPlace(), (3, 4), "repeated pass"),
        (_Allocates(), (3, 4), "allocates"),
    ],
)
def test_check_sees_a_broken_layer(layer, shape, message):
    with pytest.raises(AssertionError, match=message):
        nn.check_layer(layer, _numbers(*shape))


def test_check_sees_a_broken_loss():
    class Halved(nn.MeanSquaredError):
        def evaluate(self, outputs, targets, gradient):
            losses = super().evaluate(outputs, targets, gradient)
            gradient *= 0.5
            return losses

    batch = Batch(np.zeros((3, 1)), np.array([1.0, 2.0, 3.0]), np.arange(3))
    with pytest.raises(AssertionError, match="gradient of output is off"):
        nn.check_loss(Halved(), _numbers(3, 1), batch)
