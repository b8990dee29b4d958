"""mpitrain: training over MPI whose result does not depend on how it was parallelised."""

__version__ = "0.1.0.dev0"
