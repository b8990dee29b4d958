"""Data-parallel training with compressed gradients: replicas stay alike, and a resumed run is the uninterrupted one."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest

from mpitrain import nn
from mpitrain._errors import InputError, NonFiniteError
from mpitrain.arrays import FlatBuffer, Key
from mpitrain.comm import Communicator, LocalWorld
from mpitrain.comm.codecs import CODECS, Codec, Fp16, PowerSGD, State
from mpitrain.data import Batches, Dataset
from mpitrain.method import Plan
from mpitrain.nn import Network
from mpitrain.optim import Momentum
from mpitrain.parallel import DataParallel, ModelAveraging
from mpitrain.train import checkpoint

STEPS, FEATURES, CLASSES = 6, 24, 3
COMPRESSED = "1.weight"


def samples(rows: int = 40) -> Dataset:
    rng = np.random.default_rng(0)
    inputs = rng.standard_normal((rows, FEATURES)).astype(np.float32)
    return Dataset(inputs, inputs[:, :CLASSES].argmax(axis=1), "classification", "largest of three")


def feed(dataset: Dataset) -> Batches:
    """Batches of 16, 16 and 8: what is left over of one goes into another of another size."""
    return Batches(dataset, 16, 0, dtype="float32")


def set_up(comm: Communicator, codec: str | Codec) -> DataParallel:
    network = Network(nn.MODELS["mlp"](FEATURES, CLASSES, hidden=[64], batch_norm=True), nn.CrossEntropy(), "float32")
    method = DataParallel(comm, codec=codec)
    method.setup(network, Momentum(), Plan(Key(5), lambda step: 0.05, STEPS))
    return method


@pytest.mark.parametrize("codec", sorted(CODECS))
def test_replicas_stay_alike_and_learn(on_ranks: Callable[..., None], codec: str):
    def check(comm: Communicator) -> None:
        method, batches = set_up(comm, codec), feed(samples())
        losses = [method.advance(batches, step).loss for step in (3, 6)]
        assert losses[1] < losses[0]
        assert len(set(comm.allgather_object(method.params.sha256()))) == 1
        names = {piece.name: piece.kind for piece in method.state().pieces if piece.name.startswith("codec.")}
        assert names.pop(f"codec.left/{COMPRESSED}") == "summed"
        assert names.pop("codec.unit/count") == "replicated"
        assert names == ({f"codec.q/{COMPRESSED}": "replicated"} if codec == "powersgd" else {})

    on_ranks(check)


@pytest.mark.parametrize("codec", sorted(CODECS))
def test_a_resumed_run_is_the_uninterrupted_one(on_ranks: Callable[..., None], codec: str, tmp_path: Path):
    def check(comm: Communicator) -> None:
        folder = Path(comm.broadcast_object(str(tmp_path)))
        batches = feed(samples())
        whole, before, after = (set_up(comm, codec) for _ in range(3))
        whole.advance(batches, STEPS)

        before.advance(batches, 2)
        saved = checkpoint.save(folder, 2, before.state(), comm, before.params.layout)
        found = checkpoint.load(saved, comm, after.params.layout)
        after.load(found.scalars, found.read)
        after.advance(batches, STEPS)
        assert after.params.sha256() == whole.params.sha256()

    on_ranks(check)


class Watched(Fp16):
    """Notes the random key that it is handed at each step."""

    keys: ClassVar[list[Key]] = []

    def sum(
        self, comm: Communicator, values: FlatBuffer, state: State, key: Key, out: Mapping[str, np.ndarray],
        others: list[np.ndarray],
    ) -> None:  # fmt: skip
        self.keys.append(key)
        super().sum(comm, values, state, key, out, others)


def test_each_step_has_random_values_of_its_own():
    Watched.keys.clear()
    LocalWorld(1).run(lambda comm: set_up(comm, Watched()).advance(feed(samples()), STEPS))
    assert len({key.words for key in Watched.keys}) == 1
    assert len({key.step for key in Watched.keys}) == STEPS


def test_what_is_left_over_survives_another_number_of_ranks(tmp_path: Path):
    def write(comm: Communicator) -> tuple[np.ndarray, np.ndarray]:
        method = set_up(comm, PowerSGD(rank=2))
        method.advance(feed(samples()), 3)
        checkpoint.save(tmp_path, 3, method.state(), comm, method.params.layout)
        return kept(method)

    def read(comm: Communicator) -> tuple[np.ndarray, np.ndarray]:
        method = set_up(comm, PowerSGD(rank=2))
        path = checkpoint.latest(tmp_path)
        assert path is not None
        found = checkpoint.load(path, comm, method.params.layout)
        method.load(found.scalars, found.read)
        return kept(method)

    def kept(method: DataParallel) -> tuple[np.ndarray, np.ndarray]:
        pieces = {piece.name: np.array(piece.array) for piece in method.state().pieces}
        return pieces[f"codec.left/{COMPRESSED}"], pieces[f"codec.q/{COMPRESSED}"]

    written, found = LocalWorld(3).run(write), LocalWorld(2).run(read)
    assert np.abs(written[0][0]).max() > 0
    assert np.allclose(sum(left for left, _ in found), sum(left for left, _ in written), rtol=1e-6, atol=1e-9)
    assert all(np.array_equal(q, written[0][1]) for _, q in found)


@pytest.mark.parametrize("codec", sorted(CODECS))
def test_a_gradient_that_is_not_finite_ends_the_run_on_all_ranks(on_ranks: Callable[..., None], codec: str):
    dataset = samples()
    dataset.inputs[3, 2] = np.nan

    def check(comm: Communicator) -> None:
        method = set_up(comm, codec)
        with pytest.raises(NonFiniteError, match="not finite"):
            method.advance(feed(dataset), STEPS)

    on_ranks(check)


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda comm: DataParallel(comm, codec="topkk"), ["unknown codec", 'did you mean "topk"?']),
        (lambda comm: ModelAveraging(comm, average_every=2, codec="fp16"), ["sends none", "got fp16", "DataParallel"]),
    ],
)
def test_what_cannot_be_is_refused(make: Callable[[Communicator], Any], words: list[str]):
    with pytest.raises(InputError) as caught:
        LocalWorld(1).run(make)
    assert all(word in str(caught.value) for word in words), str(caught.value)
