"""What ranks have summed over their evaluation batches, put together where some of them had no batch at all."""

from __future__ import annotations

import numpy as np

from mpitrain._errors import InputError
from mpitrain._typing import Array
from mpitrain.comm import Communicator

Sums = dict[str, Array]
"""As `mpitrain.nn.Model.sums` gives them, added over batches."""


def filled(comm: Communicator, sums: Sums | None) -> Sums | None:
    """Return a rank's sums, or zeros like those of another rank where it has none; None if no rank has any.

    Parameters
    ----------
    comm : Communicator
        The ranks whose sums are to be added.
    sums : dict of str to array of float64, optional
        This rank's; None: it had no batch.

    Notes
    -----
    Collective over ``comm``: shapes are gathered, some hundred bytes a rank.
    """
    shapes = comm.allgather_object(None if sums is None else {name: np.shape(value) for name, value in sums.items()})
    known = next((each for each in shapes if each is not None), None)
    if known is None or sums is not None:
        return sums
    return {name: np.zeros(shape) for name, shape in known.items()}


def something(sums: Sums | None) -> Sums:
    """Return sums that are there.

    Raises
    ------
    InputError
        They are not: no rank had a batch.
    """
    if sums is None:
        raise InputError("there is nothing to evaluate", operation="evaluate", got="no batches on any rank")
    return sums
