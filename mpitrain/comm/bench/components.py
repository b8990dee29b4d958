"""How the collectives inside an MPI library can be chosen: a table of set-ups, each of which needs a launch of its own.

All are environment variables, which launchers hand on.  What a set-up does not perform itself, the library leaves to
its default: there the set-up would be measured under a false name, so the table says what each performs.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field

VERBOSE = {"OMPI_MCA_coll_base_verbose": "9"}
"""Lets Open MPI tell which components it enabled for each communicator."""

_ALL = ("allreduce", "broadcast", "reduce_scatter", "allgather")


@dataclass(frozen=True)
class Component:
    """One set-up of an MPI library.

    Parameters
    ----------
    name : str
        What it is called in the results.
    settings : mapping of str to str
        Environment variables.
    operations : tuple of str
        The collectives that it performs itself.
    needs : str
        The component that Open MPI must have enabled; empty: nothing can be asked.
    """

    name: str
    settings: Mapping[str, str] = field(default_factory=dict)
    operations: tuple[str, ...] = _ALL
    needs: str = ""


DEFAULT = Component("default")

_TUNED = ("linear", "nonoverlapping", "recursive doubling", "ring", "segmented ring", "Rabenseifner")
"""Of Open MPI's ``coll_tuned_allreduce_algorithm``, from 1."""

_MPICH = ("recursive_doubling", "reduce_scatter_allgather", "ring", "smp")
"""Of MPICH's ``MPIR_CVAR_ALLREDUCE_INTRA_ALGORITHM``."""


def components(kind: str) -> tuple[Component, ...]:
    """Return the set-ups of a library, the default first.

    Parameters
    ----------
    kind : str
        As `mpitrain.comm.launch.Library` has it.
    """
    if kind == "openmpi":
        return (DEFAULT, *_open_mpi_components(), *map(_open_mpi_algorithm, range(1, len(_TUNED) + 1)))
    if kind == "mpich":
        return (DEFAULT, _mpich_shared_memory(), *map(_mpich_algorithm, _MPICH))
    return (DEFAULT,)


_SELECTION = re.compile(
    r"\[(?P<process>\S+)\] coll:base:comm_select: "
    r"(?:new communicator: (?P<communicator>.+) \(cid|selecting\s+(?P<component>\w+), priority\s+\d+, Enabled)"
)


def disabled(component: Component, log: str) -> str | None:
    """Return why a set-up takes no effect, from what Open MPI printed with `VERBOSE`; None if it does."""
    if not component.needs or component.needs in _enabled_for_all(log):
        return None
    return f"Open MPI does not enable its component {component.needs} for these ranks"


def _enabled_for_all(log: str) -> set[str]:
    """Return the components of the communicator of all ranks; those of a node's ranks may be others."""
    communicators: dict[str, str] = {}
    found = set()
    for line in _SELECTION.finditer(log):
        if line["communicator"]:
            communicators[line["process"]] = line["communicator"]
        elif communicators.get(line["process"]) == "MPI_COMM_WORLD":
            found.add(line["component"])
    return found


def _open_mpi_components() -> list[Component]:
    """Return the components that may perform whole collectives; the one of highest priority does."""
    performs = {
        "sm": ("allreduce", "broadcast"),
        "han": ("allreduce", "broadcast", "allgather"),
        "adapt": ("broadcast",),
        "basic": _ALL,
    }
    return [_open_mpi_component(name, operations) for name, operations in performs.items()]


def _open_mpi_component(name: str, operations: tuple[str, ...]) -> Component:
    return Component(name, {f"OMPI_MCA_coll_{name}_priority": "100"}, operations, name)


def _open_mpi_algorithm(number: int) -> Component:
    settings = {
        "OMPI_MCA_coll_tuned_priority": "100",  # above han's, which is the default's on several nodes
        "OMPI_MCA_coll_tuned_use_dynamic_rules": "1",
        "OMPI_MCA_coll_tuned_allreduce_algorithm": str(number),
    }
    return Component(f"tuned {number} {_TUNED[number - 1]}", settings, ("allreduce",), "tuned")


def _mpich_algorithm(name: str) -> Component:
    settings = {
        "MPIR_CVAR_DEVICE_COLLECTIVES": "none",  # else those of the node's shared memory go first
        "MPIR_CVAR_ALLREDUCE_INTRA_ALGORITHM": name,
    }
    return Component(f"MPICH {name.replace('_', ' ')}", settings, ("allreduce",))


def _mpich_shared_memory() -> Component:
    """Return MPICH's way through the memory of a node."""
    operations = {"allreduce": "ALLREDUCE", "broadcast": "BCAST"}
    settings = {f"MPIR_CVAR_{name}_POSIX_INTRA_ALGORITHM": "release_gather" for name in operations.values()}
    return Component("MPICH release gather", settings, tuple(operations))
