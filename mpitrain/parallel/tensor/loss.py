"""Cross-entropy of scores that ranks divide among them: they are never gathered."""

from __future__ import annotations

import numpy as np

from mpitrain._typing import Array, Shape
from mpitrain.arrays import namespace
from mpitrain.comm import Communicator
from mpitrain.nn import CrossEntropy
from mpitrain.nn.losses import CONFUSION_CLASSES, confusion
from mpitrain.parallel.tensor.portion import Portion


class VocabularyCrossEntropy(CrossEntropy):
    """`CrossEntropy` where each rank has the scores of some classes, (n, …, span); labels are the same on all ranks.

    Parameters
    ----------
    classes : int
        Number of classes on all ranks together.
    peers : Communicator
        The ranks; kept, for a loss is handed no call.
    label_smoothing, unit
        As for `CrossEntropy`.

    Notes
    -----
    Collective.  Three numbers a label are reduced, in two messages: the maximum of the scores; then the sum of
    ``exp(score − maximum)`` and the label's own score (and with smoothing the sum of the scores).  For metrics the
    maxima and where they are: two numbers a label and rank.
    """

    def __init__(self, classes: int, peers: Communicator, label_smoothing: float = 0.0, unit: str = "") -> None:
        super().__init__(label_smoothing, unit)
        self.classes, self.peers = classes, peers
        self.start, self.stop = Portion(peers.rank, peers.size).span(classes, "classes")

    def check(self, outputs_shape: Shape, targets: Array) -> None:
        """Require integer labels in range, one for each row of scores."""
        super().check((*outputs_shape[:-1], self.classes), targets)

    def evaluate(self, outputs: Array, targets: Array, gradient: Array) -> Array:
        """Compute ``log Σ exp(z) − z[label]`` with the maximum over all ranks taken off first."""
        xp, labels = namespace(outputs), targets.ravel()
        logits, work = (each.reshape(labels.size, outputs.shape[-1]) for each in (outputs, gradient))
        xp.subtract(logits, self.peers.allreduce(logits.max(axis=1), "max")[:, None], out=work)
        here = xp.flatnonzero((labels >= self.start) & (labels < self.stop))
        picked = (here, labels[here] - self.start)
        sums = xp.zeros((3 if self.label_smoothing else 2, labels.size), outputs.dtype)
        sums[1, here] = work[picked]
        if self.label_smoothing:
            work.sum(axis=1, out=sums[2])
        xp.exp(work, out=work)
        work.sum(axis=1, out=sums[0])
        self.peers.allreduce(sums, out=sums)
        work /= sums[0][:, None]
        losses: Array = xp.log(sums[0]) - (1.0 - self.label_smoothing) * sums[1]
        if self.label_smoothing:
            losses -= self.label_smoothing / self.classes * sums[2]
            work -= self.label_smoothing / self.classes
        work[picked] -= 1.0 - self.label_smoothing
        return losses.reshape(targets.shape)

    def tallies(self, outputs: Array, targets: Array) -> dict[str, Array]:
        """Count the correct labels, and pairs of true and predicted class."""
        labels, predicted = targets.ravel(), self._likeliest(outputs)
        found = {"correct": (labels == predicted).sum()}
        if self.classes <= CONFUSION_CLASSES:
            found["confusion"] = confusion(labels, predicted, self.classes)
        return found

    def _likeliest(self, outputs: Array) -> Array:
        """Return the class of the largest score of all ranks, of equal ones the first, shape (labels,)."""
        xp = namespace(outputs)
        rows = outputs.reshape(-1, outputs.shape[-1])
        maxima = self.peers.allgather(rows.max(axis=1))
        places = self.peers.allgather(rows.argmax(axis=1).astype(np.int64) + self.start)
        found: Array = xp.take_along_axis(places, maxima.argmax(axis=0)[None], axis=0)[0]
        return found
