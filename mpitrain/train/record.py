"""What training did in its first steps, in global coordinates, so that two runs can be compared.

The gradients are those that the optimizer was handed, reduced, divided and clipped; where it sums and divides them
while it updates, their mean.  So any method can be recorded, and nothing of it is changed.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np

from mpitrain._typing import Array
from mpitrain.arrays import Allocator, Shard, namespace, plain, to_host
from mpitrain.arrays.box import boxed
from mpitrain.comm import Communicator
from mpitrain.method.state import Piece, pieces_of
from mpitrain.optim import Optimizer, State, Terms
from mpitrain.parallel import Synchronous
from mpitrain.train.assembly import Assembly, assemble, job_optimizer
from mpitrain.train.job import Job
from mpitrain.train.session import settle_arithmetic

_WEIGHTS, _GRADIENT = "params", "gradient"
_Place = tuple[str, Any, Any]  # name, box and range of a piece: the same for copies of it on several ranks


@dataclass(frozen=True, eq=False)
class Record:
    """What was recorded.

    Parameters
    ----------
    losses : array of float64, shape (steps,)
        Mean loss of each step.
    norms : dict of str to array of float64, shape (steps,)
        By tensor, the norm of its gradient at each step.
    gradient, weights : dict of str to array
        By tensor, its gradient in the first step and its values after the last; NaN wherever two ranks that hold the
        same part do not agree.
    """

    losses: Array
    norms: dict[str, Array]
    gradient: dict[str, Array]
    weights: dict[str, Array]

    def write(self, path: Path) -> None:
        """Write a file that `read` reads."""
        groups = {"norms": self.norms, "gradient": self.gradient, "weights": self.weights}
        tables = {f"{group}/{name}": array for group, found in groups.items() for name, array in found.items()}
        with path.open("wb") as file:
            np.savez(file, losses=self.losses, **tables)  # type: ignore[arg-type]

    @classmethod
    def read(cls, path: Path) -> Record:
        """Return the record in a file."""
        groups: dict[str, dict[str, Array]] = {"norms": {}, "gradient": {}, "weights": {}}
        with np.load(path, allow_pickle=False) as found:
            for key in found.files:
                group, _, name = key.partition("/")
                if name:
                    groups[group][name] = found[key]
            return cls(found["losses"], **groups)


def record(job: Job, comm: Communicator, steps: int) -> Record | None:
    """Train for some steps and return what was seen, on rank 0.  Collective.

    Parameters
    ----------
    steps : int
        How many; fewer where the job has fewer.
    """
    watch = _Watch(job_optimizer(job))
    parts = assemble(job, comm, watch)
    settle_arithmetic(job, comm)
    losses, method = [], parts.method
    while method.step < min(steps, parts.steps):
        losses.append(method.advance(parts.feed, method.step + 1).loss)
    weights = [_on_host(piece) for piece in method.state().pieces if piece.name.startswith(f"{_WEIGHTS}/")]
    everyones = comm.gather_object((watch.first, _counted(watch.squares, parts), weights))
    if everyones is None:
        return None
    firsts, squares, pieces = zip(*everyones, strict=True)
    names = [segment.name for segment in parts.model.layout]  # the method may hold some of them only
    return Record(np.array(losses), _norms(squares, names), _whole(firsts), _whole(pieces))


class _Watch(Optimizer):
    """An optimizer that records the gradients it is handed, and leaves the update to another.

    Attributes
    ----------
    first : list of Piece
        This rank's gradients of the first step.
    squares : list of dict
        For each step, the squared norm of each piece of the gradient.
    """

    def __init__(self, of: Optimizer) -> None:
        self._of = of
        self.first: list[Piece] = []
        self.squares: list[dict[_Place, float]] = []

    def init(self, shard: Shard, allocator: Allocator = plain) -> State:
        return self._of.init(shard, allocator)

    def partials(self, params: Array, grads: Array, state: State, step: int, shard: Shard) -> Array | None:
        return self._of.partials(params, grads, state, step, shard)

    def update(
        self,
        params: Array,
        grads: Array,
        state: State,
        lr: float,
        step: int,
        shard: Shard,
        totals: Array | None = None,
    ) -> None:
        self._note(grads, step, shard)
        self._of.update(params, grads, state, lr, step, shard, totals)

    @property
    def takes_terms(self) -> bool:
        """Whether the other does: methods take the steps that they would take with it."""
        return self._of.takes_terms

    def update_mean(self, params: Array, terms: Terms, state: State, lr: float, step: int, shard: Shard) -> None:
        self._note(terms.mean(namespace(params).empty_like(params)), step, shard)
        self._of.update_mean(params, terms, state, lr, step, shard)

    def _note(self, grads: Array, step: int, shard: Shard) -> None:
        """Record the gradients of a shard."""
        pieces = [_on_host(piece) for piece in pieces_of(_GRADIENT, grads, shard)]
        if step == 1:
            self.first += pieces
        self.squares += [{} for _ in range(step - len(self.squares))]
        for piece in pieces:
            values = piece.array.astype(np.float64)
            self.squares[-1][_place(piece)] = float(values @ values)


def _on_host(piece: Piece) -> Piece:
    """Return a copy, flat, of a piece of live memory."""
    return replace(piece, array=np.array(to_host(piece.array)).reshape(-1))


def _place(piece: Piece) -> _Place:
    return piece.name.partition("/")[2], piece.box, piece.span


def _counted(squares: list[dict[_Place, float]], parts: Assembly) -> list[dict[_Place, float]]:
    """Leave out the whole tensors that every rank of a divided model has: its first rank counts them."""
    across = parts.method.across if isinstance(parts.method, Synchronous) else None
    if across is None or across.rank == 0:
        return squares
    layout = parts.model.layout
    return [{place: value for place, value in step.items() if not layout[place[0]].is_whole} for step in squares]


def _norms(everyones: Sequence[list[dict[_Place, float]]], names: Sequence[str]) -> dict[str, Array]:
    """Return the norm of each tensor at each step; a piece that several ranks hold counts once."""
    squares = {name: np.zeros(max(map(len, everyones))) for name in names}
    for step in range(max(map(len, everyones))):
        found: dict[_Place, float] = {}
        for rank in reversed(everyones):
            found |= rank[step] if step < len(rank) else {}
        for (name, _, _), value in found.items():
            squares[name][step] += value
    return {name: np.sqrt(values) for name, values in squares.items()}


def _whole(everyones: Sequence[list[Piece]]) -> dict[str, Array]:
    """Put the ranks' pieces together; where two of them do not agree, there is a NaN."""
    found: dict[str, Array] = {}
    seen: dict[str, Array] = {}
    for piece in chain.from_iterable(everyones):
        name = _place(piece)[0]
        whole = found.setdefault(name, np.zeros(piece.global_shape, piece.array.dtype))
        known = seen.setdefault(name, np.zeros(piece.global_shape, bool))
        there, seen_there, span = boxed(whole, piece.box), boxed(known, piece.box), slice(*piece.span)
        values, filled = there.reshape(-1), seen_there.reshape(-1)  # copies, unless the box is everything
        other = filled[span] & (values[span] != piece.array)
        values[span], filled[span] = np.where(other, np.nan, piece.array), True
        there[...], seen_there[...] = values.reshape(there.shape), filled.reshape(there.shape)
    return found
