"""The first principal component of data whose rows are split over the ranks, by power iteration.

It shows research code that uses nothing of mpitrain but its collectives.  The result is the same for any number of
ranks, up to the rounding of sums:

    python jobs/research_allreduce.py
    mpirun -n 2 python jobs/research_allreduce.py
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

import mpitrain

Floats = npt.NDArray[np.float64]


def measurements(rows: int = 20_000, columns: int = 40) -> Floats:
    """Return data whose columns have the standard deviations 1, 2, …, so that the last ones matter most."""
    deviations = np.arange(1, columns + 1)
    return np.random.default_rng(seed=0).normal(0, deviations, size=(rows, columns))


def first_component(comm: mpitrain.Communicator, mine: Floats, tolerance: float = 1e-12) -> tuple[float, Floats, int]:
    """Return the largest eigenvalue of the covariance, its eigenvector, and the iterations that it took.

    ``mine`` are this rank's rows.  No rank ever sees the others': each iteration sums one vector over the ranks.
    """
    count = comm.allreduce(np.array(float(len(mine))))
    mine = mine - comm.allreduce(mine.sum(axis=0)) / count
    vector, variance, before, iterations = np.ones(mine.shape[1]), 0.0, np.inf, 0
    while abs(variance - before) > tolerance * variance:
        vector = vector / np.linalg.norm(vector)
        image = comm.allreduce(mine.T @ (mine @ vector)) / count
        before, variance = variance, float(vector @ image)
        vector, iterations = image, iterations + 1
    return variance, vector / np.linalg.norm(vector), iterations


if __name__ == "__main__":
    comm = mpitrain.world()
    variance, vector, iterations = first_component(comm, measurements()[comm.rank :: comm.size])
    if comm.rank == 0:
        print(f"variance {variance:.8f} along column {abs(vector).argmax()} mostly, after {iterations} iterations")
