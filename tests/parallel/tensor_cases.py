"""What the tests of tensor-parallel models divide: whole models, a rank's part of them, and whole tensors again."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from mpitrain import nn
from mpitrain.arrays import Batch, FlatBuffer, Key, Layout
from mpitrain.comm import Communicator
from mpitrain.nn import Network
from mpitrain.parallel.tensor import Portion, TensorGPT, TensorNetwork, VocabularyCrossEntropy, split_mlp

VOCABULARY, CONTEXT = 13, 7


@dataclass(frozen=True)
class Model:
    """A model as a whole and as what each of some ranks has of it."""

    kind: str
    options: Mapping[str, Any] = field(default_factory=dict)
    sequence: bool = False
    loss: nn.Loss = field(default_factory=nn.CrossEntropy)

    def layer(self) -> Any:
        if self.kind == "gpt":
            defaults = {"layers": 2, "width": 20, "heads": 5, "hidden": 9}
            return nn.GPT(VOCABULARY, CONTEXT, **(defaults | self.options))
        return nn.MODELS["mlp"](32, 3, **self.options)

    def serial(self, dtype: Any = np.float64) -> Network:
        return Network(self.layer(), self.loss, dtype)

    def divided(self, peers: Communicator, dtype: Any = np.float64) -> TensorNetwork:
        portion = Portion(peers.rank, peers.size)
        if self.kind == "gpt":
            loss = VocabularyCrossEntropy(VOCABULARY, peers, self.loss.label_smoothing, self.loss.unit)
            return TensorNetwork(TensorGPT(self.layer(), portion, self.sequence), loss, peers, dtype, VOCABULARY)
        return TensorNetwork(split_mlp(self.layer(), portion), self.loss, peers, dtype)


MODELS = {
    "mlp": Model("mlp", {"hidden": [7], "activation": "tanh"}),
    "mlp of three": Model("mlp", {"hidden": [7, 6], "activation": "gelu", "dropout": 0.3}),
    "mlp of four": Model("mlp", {"hidden": [7, 6, 5], "batch_norm": True, "dropout": 0.2}),
    "mlp of four, plain": Model("mlp", {"hidden": [7, 6, 5]}),
    "linear": Model("mlp", {"hidden": []}),
    "gpt": Model("gpt", {"dropout": 0.2}),
    "gpt, untied, smoothed": Model("gpt", {"tied": False}, loss=nn.CrossEntropy(0.1)),
    "gpt, sequence": Model("gpt", {"dropout": 0.2}, sequence=True),
    "gpt, sequence, untied": Model("gpt", {"tied": False}, sequence=True),
}


def text(rows: int, length: int = CONTEXT, seed: int = 0) -> Batch:
    tokens = np.random.default_rng(seed).integers(0, VOCABULARY, (rows, length + 1))
    return Batch(tokens[:, :-1], tokens[:, 1:], np.arange(rows))


def images(rows: int, seed: int = 0) -> Batch:
    rng = np.random.default_rng(seed)
    return Batch(rng.standard_normal((rows, 4, 4, 2)), rng.integers(0, 3, rows), np.arange(rows))


def batch_for(model: Model, rows: int) -> Batch:
    return text(rows) if model.kind == "gpt" else images(rows)


def initial(network: Network, seed: int = 3) -> FlatBuffer:
    params = FlatBuffer(network.layout)
    network.initialise(params, Key(seed).child("init"))
    return params


def boxes(layout: Layout, whole: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """What a rank holds of whole tensors."""
    return {each.name: whole[each.name][tuple(slice(*span) for span in each.box)] for each in layout}


def sum_terms(peers: Communicator, grads: FlatBuffer) -> None:
    """Add up what each rank has a term of, as a method does."""
    for segment in grads.layout:
        if "tensor" in segment.axes:
            view = grads.views[segment.name]
            peers.allreduce(view, out=view)
