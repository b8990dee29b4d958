"""Collectives timed against those of others: what is timed, against whom, how, and what came of it.

The modules are imported one by one: some need MPI, or pydantic, which importing `mpitrain.comm` must not.
"""
