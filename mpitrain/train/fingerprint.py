"""What the bits of a result depend on besides the job: processor, libraries, threads; agreed by all ranks of a job.

Processes of one fingerprint compute the same bits from the same arrays.  It is a flat table of strings, so that what
differs between two can be named.
"""

from __future__ import annotations

import platform
from collections import defaultdict
from collections.abc import Mapping
from importlib.metadata import version

import numpy as np
import threadpoolctl

from mpitrain import __version__, _env
from mpitrain._errors import MismatchError
from mpitrain.comm import Communicator
from mpitrain.nn import kernel as nn_kernel
from mpitrain.optim import kernel as optim_kernel

Fingerprint = dict[str, str]


def fingerprint(in_bfloat16: bool = False) -> Fingerprint:
    """Return the fingerprint of this process; for bfloat16, with the version of ``ml_dtypes``, which rounds to it."""
    found = {
        "processor": platform.machine(),
        "CPU features": _cpu_features(),
        "BLAS": _blas(),
        "NumPy": np.__version__,
        "C library": " ".join(platform.libc_ver()),
        "compiled loops": "yes" if _env.kernel() and nn_kernel.LIBRARY.loaded and optim_kernel.LIBRARY.loaded else "no",
        "mpitrain": __version__,
    }
    return found | {"ml_dtypes": version("ml_dtypes")} if in_bfloat16 else found


def agreed_fingerprint(comm: Communicator, own: Fingerprint) -> Fingerprint:
    """Return the fingerprint that all ranks have.  Collective.

    Raises
    ------
    MismatchError
        The ranks' fingerprints differ; the message names the ranks, and what differs.
    """
    everyones: list[Fingerprint] = comm.allgather_object(own)
    differing = [key for key in own if len({each[key] for each in everyones}) > 1]
    if differing:
        found = "; ".join(f"{key}: {_by_rank([each[key] for each in everyones])}" for key in differing)
        raise MismatchError(
            "the ranks would not compute the same bits", operation="reproducible", got=found,
            remedy="start them on nodes of one kind, with one installation, or set reproducible = false",
        )  # fmt: skip
    return own


def changes(before: Mapping[str, str], now: Mapping[str, str]) -> str:
    """Say in one line what differs between two fingerprints; empty if nothing does."""
    keys = [key for key in {**before, **now} if before.get(key) != now.get(key)]
    return "; ".join(f"{key} {before.get(key, 'unknown')}, now {now.get(key, 'unknown')}" for key in keys)


def _by_rank(values: list[str]) -> str:
    ranks = defaultdict(list)
    for rank, value in enumerate(values):
        ranks[value].append(rank)
    return " and ".join(f"{value} on ranks {numbers}" for value, numbers in ranks.items())


def _cpu_features() -> str:
    """Return the instruction sets (AVX2 …) of this processor for which NumPy has loops."""
    found = np.show_config(mode="dicts")
    sets = found.get("SIMD Extensions", {}) if isinstance(found, dict) else {}
    return " ".join([*sets.get("baseline", ()), *sets.get("found", ())]) or "unknown"


def _blas() -> str:
    """Return which BLAS libraries are loaded, with the kernels that they chose for this processor, and threads."""
    pools = (pool for pool in threadpoolctl.threadpool_info() if pool["user_api"] == "blas")
    words = (
        f"{pool['internal_api']} {pool['version']} {pool.get('architecture', '')} threads {pool['num_threads']}"
        for pool in pools
    )
    return ", ".join(sorted(set(words))) or "unknown"
