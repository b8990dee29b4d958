"""What a step of a divided model sends is what the formulas of ``docs/tensor-parallel.md`` say, and nothing else."""

from __future__ import annotations

import pytest
from parallel_cases import plan
from tensor_cases import CONTEXT, MODELS, VOCABULARY, Model, images, text
from test_tensor_methods import meshes

from mpitrain.arrays import Batch
from mpitrain.comm import Communicator, Count
from mpitrain.optim import make_optimizer
from mpitrain.parallel import DataParallel

ROWS, MICROBATCHES, ITEM = 4, 2, 8
WIDTH, LAYERS = 20, 2
TALLY_BYTES = 5 * 8  # see test_parallel_ledger
AGREED_BYTES = 2 * 8  # whether a rank was asked to stop, and whether its numbers are finite
NORM_BYTES = 8


class Same:
    """A feed of the same microbatch, twice, for everybody."""

    def __init__(self, batch: Batch) -> None:
        self.batches = [batch] * MICROBATCHES

    def share(self, rank: int, size: int, microbatches: int) -> Same:
        return self

    def batch(self, step: int) -> list[Batch]:
        return self.batches


def spent(comm: Communicator, model: Model, batch: Batch) -> list[tuple[dict[tuple[str, str], Count], int]]:
    """What a step costs on each mesh, and the bytes of this rank's gradients."""
    found = []
    with meshes(comm) as made:
        for mesh in made:
            method = DataParallel(mesh["data"], microbatches=MICROBATCHES, across=mesh["tensor"])
            method.setup(model.divided(mesh["tensor"]), make_optimizer("adam"), plan(2, clip_norm=1.0))
            comm.ledger.reset()
            method.advance(Same(batch), until=1)
            found.append((comm.ledger.snapshot(), method.params.layout.nbytes))
    return found


def times(calls: int, nbytes: int) -> Count:
    return Count(calls, calls, nbytes)


def check(comm: Communicator, model: Model, batch: Batch, expected: dict[str, Count]) -> None:
    for counts, gradients in spent(comm, model, batch):
        data = {("data", "allreduce"): times(2, gradients + TALLY_BYTES)}
        every_step = times(2, AGREED_BYTES + NORM_BYTES)
        tensor = expected | {"allreduce": expected["allreduce"] + every_step}
        assert counts == data | {("tensor", operation): count for operation, count in tensor.items()}


TOKENS = ROWS * CONTEXT
ACTIVATIONS = TOKENS * WIDTH * ITEM
LOSS = times(2 * MICROBATCHES, 3 * TOKENS * ITEM * MICROBATCHES)
"""The maxima; then sums and label's scores in one message."""


def check_gpt(comm: Communicator) -> None:
    """Two reductions a block forward and two backward, one of the embedding, one of the head."""
    passes = (4 * LAYERS + 2) * MICROBATCHES
    model = Model("gpt", {"layers": LAYERS, "width": WIDTH})
    check(comm, model, text(ROWS), {"allreduce": times(passes, passes * ACTIVATIONS) + LOSS})


def test_a_block_reduces_twice_forward_and_twice_backward(on_ranks):
    on_ranks(check_gpt)


def check_sequence(comm: Communicator) -> None:
    """As many gathers and as many scatters, of the same size; and the terms, all in one message a step."""
    passes = (4 * LAYERS + 2) * MICROBATCHES
    exchanged = times(passes, passes * ACTIVATIONS)
    terms = (CONTEXT + LAYERS * (4 + 2) + 2) * WIDTH * ITEM
    model = Model("gpt", {"layers": LAYERS, "width": WIDTH}, sequence=True)
    fused = times(1, terms)
    check(comm, model, text(ROWS), {"allgather": exchanged, "reduce_scatter": exchanged, "allreduce": LOSS + fused})


def test_along_the_sequence_each_reduction_is_a_gather_and_a_scatter(on_ranks):
    on_ranks(check_sequence)


def check_mlp(comm: Communicator) -> None:
    """Of 32-7-6-5-3: outputs of rows forward, inputs of columns backward, but for those of the first layer."""
    exchanged = [6, 3, 6]
    calls = len(exchanged) * MICROBATCHES
    expected = {"allreduce": times(calls, sum(exchanged) * ROWS * ITEM * MICROBATCHES)}
    check(comm, MODELS["mlp of four, plain"], images(ROWS), expected)


def check_odd_mlp(comm: Communicator) -> None:
    """Of 32-7-6-3: the last layer takes its part of six, and its input's gradient is gathered."""
    expected = {
        "allreduce": times(2 * MICROBATCHES, (6 + 3) * ROWS * ITEM * MICROBATCHES),
        "allgather": times(MICROBATCHES, 6 * ROWS * ITEM * MICROBATCHES),
    }
    check(comm, MODELS["mlp of three"], images(ROWS), expected)


@pytest.mark.parametrize("check_one", [check_mlp, check_odd_mlp])
def test_two_linear_layers_reduce_once_forward_and_once_backward(on_ranks, check_one):
    on_ranks(check_one)


def check_evaluation(comm: Communicator) -> None:
    """Predicting gathers scores once; for metrics they stay where they are."""
    with meshes(comm) as made:
        for mesh in made:
            method = DataParallel(mesh["data"], across=mesh["tensor"])
            method.setup(MODELS["gpt"].divided(mesh["tensor"]), make_optimizer("sgd"), plan(1))
            comm.ledger.reset()
            method.evaluate([text(ROWS)])
            counts = comm.ledger.snapshot()
            assert counts["tensor", "allgather"] == times(2, 2 * mesh.shape["tensor"] * TOKENS * ITEM)
            reductions = 2 * LAYERS + 1
            assert counts["tensor", "allreduce"] == times(reductions + 2, reductions * ACTIVATIONS + 3 * TOKENS * ITEM)
            comm.ledger.reset()
            method.predict(text(ROWS).inputs)
            counts = comm.ledger.snapshot()
            assert counts["tensor", "allgather"] == times(1, TOKENS * VOCABULARY * ITEM)


def test_scores_are_gathered_to_predict_and_never_else(on_ranks):
    on_ranks(check_evaluation)
