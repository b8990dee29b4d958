"""What the tests of pipelines share: every schedule on any number of ranks, and what the ranks hold put together."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
from parallel_cases import IMAGES, SEED, TEXT, KeptKeys, RowsFeed, cnn, gpt, mlp, plan
from parallel_reference import Named, network_mean_gradient

from mpitrain.arrays import FlatBuffer, Key
from mpitrain.comm import Communicator, ProcessMesh
from mpitrain.nn.cutting import units
from mpitrain.optim import Optimizer
from mpitrain.parallel import PipelineParallel


@dataclass(frozen=True)
class Case:
    """A schedule, and its microbatches on p ranks: of 7 rows and then of 3 some are smaller, or empty."""

    schedule: str
    chunks: int = 1

    def options(self, ranks: int) -> dict[str, Any]:
        microbatches = 5 if self.schedule != "interleaved" else 6 // ranks * ranks
        return {"schedule": self.schedule, "chunks": self.chunks, "microbatches": microbatches}


CASES = {
    "gpipe": Case("gpipe"),
    "1f1b": Case("1f1b"),
    "interleaved": Case("interleaved", 2),
    "zb-h1": Case("zb-h1"),
}
"""Every schedule; a further one is a row here."""

MODELS: dict[str, tuple[Callable[..., KeptKeys], Any]] = {
    "mlp": (mlp, IMAGES), "cnn": (cnn, IMAGES), "gpt": (gpt, TEXT),
}  # fmt: skip

every_case = pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())


class StageRecorder(Optimizer):
    """Keeps the mean gradients that a method hands it, tensor by tensor, and updates nothing."""

    def __init__(self) -> None:
        self.seen: dict[int, Named] = {}

    def update(self, params: Any, grads: Any, state: Any, lr: Any, step: Any, shard: Any, totals: Any = None) -> None:
        found = self.seen.setdefault(step, {})
        for number, cut in shard.pieces:
            segment = shard.layout.segments[number]
            found[segment.name] = grads[cut].reshape(segment.shape).copy()


def fits(case: Case, network: KeptKeys, ranks: int) -> bool:
    """Tell whether there is a layer for each stage."""
    return ranks * case.chunks <= len(units(network.layer))


def ready(
    comm: Communicator | ProcessMesh, network: KeptKeys, optimizer: Optimizer, steps: int, case: Case, **limits: float
) -> PipelineParallel:
    """A pipeline ready to train."""
    ranks = comm.shape["pipe"] if isinstance(comm, ProcessMesh) else comm.size
    method = PipelineParallel(comm, **case.options(ranks))
    method.setup(network, optimizer, plan(steps, **limits))
    return method


def united(comm: Communicator, own: Named) -> Named:
    """Put together what the ranks hold; what several hold must be the same bits."""
    whole: Named = {}
    for part in comm.allgather_object({name: np.asarray(array).copy() for name, array in own.items()}):
        for name, array in part.items():
            assert name not in whole or whole[name].tobytes() == array.tobytes(), name
            whole[name] = array
    return whole


def whole_params(comm: Communicator, method: PipelineParallel) -> FlatBuffer:
    """The parameters of all stages, in one float64 buffer."""
    found = FlatBuffer(method.model.layout.astype(np.float64))
    for name, array in united(comm, method.params.views).items():
        found.views[name][...] = array
    return found


def tensors(params: FlatBuffer) -> Named:
    """Every tensor under its own name alone."""
    return {each.name: params.views[each.name] for each in params.layout}


def serial(
    network: KeptKeys, params: FlatBuffer, feed: RowsFeed, step: int, microbatches: int
) -> tuple[float, FlatBuffer]:
    """The mean loss and gradient of one process on the same microbatches, with the random keys of that step."""
    key = Key(SEED).child("train").at(step)
    keys = [key.child(f"microbatch{number}") for number in range(microbatches)]
    return network_mean_gradient(network, params, feed.whole(step, microbatches), keys)
