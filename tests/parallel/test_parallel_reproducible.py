"""Reproducible methods: the same bits on every number of ranks and under either method, and the right values."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import pytest
from parallel_cases import (
    CLASSES,
    IMAGES,
    ROWS,
    SEED,
    TEXT,
    KeptKeys,
    Make,
    Recorder,
    RowsFeed,
    by_label,
    cnn,
    gpt,
    mlp,
    plan,
    same_on_all,
)
from parallel_reference import assert_close, buffer, descend, network_mean_gradient

from mpitrain import nn
from mpitrain._errors import InputError, NonFiniteError
from mpitrain.arrays import Batch, FlatBuffer, Gradients, Key, Layout, Segment
from mpitrain.comm import Communicator, LocalWorld
from mpitrain.data import evaluation_batches
from mpitrain.method import tiles
from mpitrain.method.steps import Part
from mpitrain.optim import SGD, Optimizer, make_optimizer
from mpitrain.parallel import DataParallel, ReproducibleDataParallel, ReproducibleGradientParallel
from mpitrain.parallel.lanes import LaneSteps

LANES, STEPS = 4, 5
"""Of a batch of seven rows, lanes have two or one; of the next, which has three, the last has none."""

MAKES: dict[str, Make] = {
    "data": partial(ReproducibleDataParallel, lanes=LANES),
    "gradient": partial(ReproducibleGradientParallel, lanes=LANES),
}

every_make = pytest.mark.parametrize("make", MAKES.values(), ids=MAKES)

MODELS = {
    "cnn": (partial(cnn, np.float32), RowsFeed(dtype=np.float32), {}),
    "cnn, owned rows": (partial(cnn, np.float32), RowsFeed(dtype=np.float32, owner=by_label), {}),
    "cnn, microbatches": (partial(cnn, np.float32), RowsFeed(dtype=np.float32), {"microbatches": 2}),
    "gpt": (partial(gpt, np.float32), RowsFeed(TEXT, dtype=np.float32), {}),
    "mlp, float64": (mlp, RowsFeed(), {}),
}


FEW = {("data", "cnn"), ("gradient", "cnn"), ("gradient", "gpt")}
"""What is tried by default."""


@pytest.fixture(autouse=True)
def _small_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    """Several tiles a tensor."""
    monkeypatch.setattr(tiles, "TILE_SIZE", 16)


def trained(comm: Communicator, make: Make, model: str, optimizer: Optimizer, **limits: float) -> tuple[str, float]:
    """Train, and return a hash of the weights, and the mean loss of all steps."""
    build, feed, options = MODELS[model]
    method = make(comm, **options)
    method.setup(build(), optimizer, plan(STEPS, **limits))
    progress = method.advance(feed, until=STEPS)
    same_on_all(comm, (method.params.sha256(), progress))
    return method.params.sha256(), progress.loss


def check_bits(comm: Communicator, make: Make, model: str, optimizer: Optimizer, limits: dict[str, float]) -> None:
    found = trained(comm, make, model, optimizer, **limits)
    (serial,) = LocalWorld(1).run(lambda one: trained(one, MAKES["data"], model, optimizer, **limits))
    assert found == serial


@pytest.mark.parametrize(
    ("method", "model"),
    [
        pytest.param(method, model, marks=() if (method, model) in FEW else pytest.mark.slow)
        for method in MAKES
        for model in MODELS
    ],
)
def test_weights_and_losses_have_the_bits_of_one_rank(on_ranks, method, model):
    on_ranks(check_bits, MAKES[method], model, make_optimizer("adam", weight_decay=0.01), {"clip_norm": 0.2})


@every_make
@pytest.mark.parametrize("name", ["lamb", "momentum"])
def test_norms_of_tensors_and_of_everything_have_one_rounding(on_ranks, make, name):
    """In float64, whose weights show the last bit of a norm."""
    optimizer = make_optimizer(name, weight_decay=0.01)
    on_ranks(check_bits, make, "mlp, float64", optimizer, {"clip_norm": 0.1, "clip_value": 0.05})


def lane_rows(rows: int) -> list[np.ndarray]:
    """The positions of each lane in a batch of some rows, near-equal and in order, by another way than the loader's."""
    return np.array_split(np.arange(rows), LANES)


def lanes_gradient(network: KeptKeys, params: FlatBuffer, batch: Batch, key: Key) -> FlatBuffer:
    """The mean gradient over the lanes of a batch, each normalised by itself, added as floats."""
    total = FlatBuffer(params.layout)
    for rows in lane_rows(len(batch)):
        network.loss_and_gradients(params, batch.part(slice(rows[0], rows[-1] + 1)), total, key)
    total.flat /= len(batch)
    return total


def check_values(comm: Communicator, make: Make) -> None:
    """In float64; the CNN's BatchNorm normalises each lane by itself, and its statistics are those of the lanes."""
    network, exact, recorder, feed = cnn(), cnn(), Recorder(), RowsFeed()
    method = make(comm)
    method.setup(network, recorder, plan(1))
    start = buffer(network.layout, method.params.flat)
    method.advance(feed, until=1)
    (batch,) = feed.whole(0)
    expected = lanes_gradient(exact, start, batch, network.keys[0])
    found = buffer(network.layout, recorder.seen(comm)[0])
    noise = np.linalg.norm(expected.flat)  # the bias before a BatchNorm has a gradient of rounding errors
    for name, right in expected.views.items():
        assert np.linalg.norm(found.views[name] - right) <= 1e-14 * noise, name


@every_make
def test_the_gradient_is_the_sum_over_lanes(on_ranks, make):
    on_ranks(check_values, make)


def check_serial(comm: Communicator, make: Make, build: Callable[[], KeptKeys], feed: RowsFeed) -> None:
    network, exact, optimizer = build(), build(), make_optimizer("lamb")
    method = make(comm)
    method.setup(network, optimizer, plan(STEPS, clip_norm=0.2))
    start = buffer(network.layout, method.params.flat)
    method.advance(feed, until=STEPS)
    keys = network.keys[:: len(method.shares)]

    def mean_gradient(params: FlatBuffer, step: int) -> FlatBuffer:
        return network_mean_gradient(exact, params, feed.whole(step), [keys[step]])[1]

    expected = descend(start, optimizer, mean_gradient, STEPS, plan(1).schedule, clip_norm=0.2)
    assert_close(method.params, expected, 1e-11)


@every_make
@pytest.mark.parametrize(
    ("build", "feed"),
    [(mlp, RowsFeed()), pytest.param(gpt, RowsFeed(TEXT), marks=pytest.mark.slow)],
    ids=["mlp", "gpt"],
)
def test_without_batchnorm_it_goes_where_the_serial_run_goes(on_ranks, make, build, feed):
    on_ranks(check_serial, make, build, feed)


def check_order(comm: Communicator, make: Make) -> None:
    """Terms that float addition gives another sum for in nearly every other order."""
    method = make(comm)
    terms = [np.array([1e16, 1.0]), np.array([3.0, 1e16]), np.array([-1e16, 3.0]), np.array([1.0, -1e16])]
    assert isinstance(method, LaneSteps)
    total = method._over_lanes([terms[lane] for lane, _ in method.shares])
    assert total.tolist() == [((1e16 + 3.0) - 1e16) + 1.0, ((1.0 + 1e16) + 3.0) - 1e16]


@every_make
def test_numbers_are_added_in_the_order_of_the_lanes(on_ranks, make):
    on_ranks(check_order, make)


def evaluation(comm: Communicator, make: Make) -> dict[str, Any]:
    method = make(comm)
    method.setup(mlp(np.float32), SGD(), plan(1))
    assert isinstance(method, LaneSteps)
    walks = [evaluation_batches(IMAGES, 4, *share) for share in method.shares]
    metrics = method.evaluate(batch for batches in zip(*walks, strict=True) for batch in batches)
    return {name: np.asarray(value).tobytes() for name, value in metrics.items()}


def check_evaluation(comm: Communicator, make: Make) -> None:
    (serial,) = LocalWorld(1).run(lambda one: evaluation(one, MAKES["data"]))
    assert evaluation(comm, make) == serial


@every_make
def test_metrics_have_the_bits_of_one_rank(on_ranks, make):
    on_ranks(check_evaluation, make)


def check_any_batches(comm: Communicator, make: Make) -> None:
    """One batch a rank, which is fewer than it has lanes."""
    method, plain = make(comm), DataParallel(comm)
    for each in (method, plain):
        each.setup(mlp(), SGD(), plan(1))
    batches = list(evaluation_batches(IMAGES, ROWS, comm.rank, comm.size, np.float64))
    found, expected = method.evaluate(batches), plain.evaluate(batches)
    assert found["loss"] == pytest.approx(expected["loss"], rel=1e-14)
    assert found["confusion"].tolist() == expected["confusion"].tolist()
    with pytest.raises(InputError, match="nothing to evaluate"):
        method.evaluate([])


@every_make
def test_other_batches_are_evaluated_too(on_ranks, make):
    on_ranks(check_any_batches, make)


class Explodes(KeptKeys):
    """Gives an infinite gradient for the last of a batch's seven samples: the lane of the last rank."""

    def loss_and_gradients(
        self, params: FlatBuffer, batch: Batch, grads: Gradients, rng: Key, reduce: nn.Reduce | None = None
    ) -> tuple[float, float]:
        found = super().loss_and_gradients(params, batch, grads, rng, reduce)
        if 6 in batch.index:
            grads.tree["1"]["bias"][0] = np.inf
        return found


def check_not_finite(comm: Communicator, make: Make) -> None:
    method = make(comm)
    method.setup(Explodes(nn.MODELS["mlp"](32, CLASSES, hidden=[5]), nn.CrossEntropy()), SGD(), plan(1))
    with pytest.raises(NonFiniteError, match=rf"step 1 .*ranks .*: \[{comm.size - 1}\]; tensors: 1.bias; look"):
        method.advance(RowsFeed(dtype=np.float32), until=1)


@every_make
def test_what_is_not_finite_is_told_with_the_rank_that_gave_it(on_ranks, make):
    on_ranks(check_not_finite, make)


@pytest.mark.parametrize("kind", [ReproducibleDataParallel, ReproducibleGradientParallel])
def test_more_ranks_than_lanes_are_refused(kind):
    def check(comm: Communicator) -> None:
        with pytest.raises(InputError) as caught:
            kind(comm, lanes=2)
        assert str(caught.value) == (
            f"{kind.__name__}: more ranks than lanes; got 3 ranks, 2 lanes; expected a lane for each rank; "
            "set lanes to 3 or more, or start at most 2 ranks"
        )

    LocalWorld(3).run(check)


LAYOUT = Layout.build(
    [Segment("a", (7, 9)), Segment("none", (0,)), Segment("b", (5,)), Segment("mean", (40,), group="statistics")],
    np.float64,
)


@pytest.mark.parametrize("ranks", [1, 2, 3, 5, 9])
def test_shards_cover_the_layout_once_and_begin_where_tiles_do(ranks):
    shards = tiles.tile_shards(LAYOUT, ranks)
    assert [shard.start for shard in shards] == [0, *(shard.stop for shard in shards[:-1])]
    assert shards[-1].stop == LAYOUT.size
    offsets = {segment.name: segment.offset for segment in LAYOUT}
    allowed = {
        offsets[name] + 16 * number for name, count in (("a", 4), ("b", 1), ("mean", 3)) for number in range(count)
    }
    assert {shard.start for shard in shards} <= allowed | {LAYOUT.size}
    largest = max(shard.size for shard in shards)
    assert largest <= -(-LAYOUT.size // ranks) + 16


@pytest.mark.parametrize("ranks", [1, 2, 3, 5])
def test_a_norm_leaves_out_statistics_and_has_the_same_bits_however_it_is_divided(ranks):
    values = np.random.default_rng(SEED).standard_normal(LAYOUT.size)
    trained = np.concatenate([values[LAYOUT[name].offset : LAYOUT[name].stop] for name in ("a", "b")])

    def norm(comm: Communicator, size: int) -> float:
        own = tiles.tile_shards(LAYOUT, size)[comm.rank]
        part = Part(own, values[own.start : own.stop], values[own.start : own.stop], {})
        return tiles.Tiles([part], comm).squared_norm()

    (whole,) = LocalWorld(1).run(norm, 1)
    assert whole == pytest.approx(float(trained @ trained), rel=1e-14)
    assert LocalWorld(ranks).run(norm, ranks) == [whole] * ranks
