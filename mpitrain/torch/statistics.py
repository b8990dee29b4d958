"""The running statistics of batch normalisation, which each rank gathers from its own samples."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from mpitrain._typing import Array


class RunningStatistics:
    """``running_mean`` and ``running_var`` of a module's batch normalisation layers.

    Parameters
    ----------
    model : torch.nn.Module
        Whose layers they are.

    Notes
    -----
    Their mean over the ranks, weighted by the ranks' counts, is what each step leaves on every rank.  The normalisation
    itself is over each rank's own samples, as under DDP.

    A forward pass changes them at once, so a copy is kept of what the last step left, for when the next is refused.
    """

    def __init__(self, model: Any) -> None:
        layers = [each for each in model.modules() if isinstance(each, torch.nn.modules.batchnorm._NormBase)]
        found = [buffer for each in layers for buffer in (each.running_mean, each.running_var)]
        self._buffers = [buffer for buffer in found if buffer is not None]
        self._counters = [each.num_batches_tracked for each in layers if each.num_batches_tracked is not None]
        self.note()

    def note(self) -> None:
        """Take them as they are now, with the layers' counts of batches, for what `restore` goes back to."""
        self._kept = [buffer.clone() for buffer in (*self._buffers, *self._counters)]

    def restore(self) -> None:
        """Undo what forward passes have done to them since `set` or `note`.  Local."""
        for buffer, kept in zip((*self._buffers, *self._counters), self._kept, strict=True):
            buffer.copy_(kept)

    def weighted(self, weight: float) -> Array:
        """Return all of them times ``weight``, float64, shape (n,); zeros for a weight of 0."""
        flat = [buffer.detach().double().numpy().ravel() for buffer in self._buffers] if weight else []
        if flat:
            found: Array = np.concatenate(flat) * weight
            return found
        return np.zeros(sum(buffer.numel() for buffer in self._buffers))

    def set(self, values: Array) -> None:
        """Write them, from values in the order of `weighted`."""
        start = 0
        for buffer in self._buffers:
            part = torch.from_numpy(values[start : start + buffer.numel()])
            buffer.copy_(part.view(buffer.shape))
            start += buffer.numel()
        self.note()
