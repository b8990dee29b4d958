"""The ranks of this launch together: one world, the same software, CPUs and memory enough for all."""

from __future__ import annotations

from mpitrain.cli.checks.finding import Finding, fail, ok, warn
from mpitrain.cli.checks.host import MEBIBYTE, size
from mpitrain.cli.checks.survey import Rank, Survey, usable_cpus

_CONTAINER_SHM_BYTES = 64 * MEBIBYTE
"""What Docker gives where nobody asks for more."""

_SHOWN = 4


def plural(count: int, thing: str) -> str:
    """Return ``1 rank``, ``2 ranks``."""
    return f"{count} {thing}" if count == 1 else f"{count} {thing}s"


def versions(survey: Survey) -> Finding | None:
    """Whether all ranks run the same software."""
    if len(survey.ranks) == 1:
        return None
    differing = []
    for name in survey.ranks[0].versions:
        found = {rank.versions[name]: rank.host for rank in reversed(survey.ranks)}  # the first host that has it
        if len(found) > 1:
            differing.append(f"{name}: {', '.join(f'{version} on {host}' for version, host in found.items())}")
    if differing:
        return fail("; ".join(differing), "start all ranks from one environment that every node sees")
    return ok("the same on all ranks")


def layout(survey: Survey) -> Finding:
    """Which ranks are where, and whether they have a CPU each."""
    nodes = survey.nodes
    shapes = {(len(node), usable_cpus(node)) for node in nodes}
    if len(shapes) == 1 and len(nodes) > 1:
        text = f"{len(nodes)} nodes ({nodes[0][0].host} …), each {_shape(nodes[0])}"
    else:
        text = "; ".join(f"{node[0].host}: {_shape(node)}" for node in nodes[:_SHOWN])
        text += f"; and {len(nodes) - _SHOWN} more nodes" if len(nodes) > _SHOWN else ""
    crowded = [node for node in nodes if len(node) > usable_cpus(node)]
    if not crowded:
        return ok(text)
    bound = any(usable_cpus(node) < node[0].cpus_there and node[0].quota is None for node in crowded)
    remedy = "bind ranks to CPUs of their own: --bind-to none (mpirun), -c N (srun); or " if bound else ""
    return warn(f"{text}: ranks wait for each other's CPU", f"{remedy}start at most one rank per CPU")


def threads(survey: Survey) -> Finding:
    """Whether the BLAS threads of a node's ranks have a CPU each."""
    first = survey.ranks[0]
    source = f"fixed by {first.fixed}" if first.fixed else "their share of the CPUs"
    text = f"{plural(first.threads, 'BLAS thread')} per rank, {source}"
    for node in survey.nodes:
        total = sum(rank.threads for rank in node)
        if total > usable_cpus(node) and any(rank.threads > 1 for rank in node):
            return warn(
                f"{text}: {plural(len(node), 'rank')} x threads = {total} on {plural(usable_cpus(node), 'CPU')}"
                f" of {node[0].host}",
                f"unset {first.fixed.partition('=')[0] or 'the thread variables'}: mpitrain divides the CPUs by itself",
            )
    return ok(text)


def shared_memory(survey: Survey) -> Finding:
    """Whether the ranks of each node have room for the memory that they share."""
    found = [(rank.shared, rank.host) for node in survey.nodes for rank in node[:1]]
    missing = [host for shared, host in found if shared is None]
    if missing:
        return warn(
            f"missing on {missing[0]}: slow, or no start at all, with more than one rank", "mount a tmpfs there"
        )
    (total, free), host = min(((shared, host) for shared, host in found if shared), key=lambda pair: pair[0][1])
    text = f"{size(total)}, {size(free)} free" + (f" on {host}" if len(found) > 1 else "")
    if total <= _CONTAINER_SHM_BYTES:
        return warn(
            f"{text}: a container's default, too little for many ranks", "docker run --shm-size=1g, or --ipc=host"
        )
    if free < _CONTAINER_SHM_BYTES:
        return warn(f"{text}: nearly full", "remove what crashed jobs left in /dev/shm")
    return ok(text)


def _shape(node: list[Rank]) -> str:
    """Say how many ranks share how many CPUs."""
    each = {len(rank.cpus) for rank in node}
    bound = len(frozenset().union(*(rank.cpus for rank in node)))
    usable, there = usable_cpus(node), node[0].cpus_there
    text = f"{plural(len(node), 'rank')} on {plural(usable, 'CPU') if usable == there else f'{usable} of {there} CPUs'}"
    if usable < bound:
        return f"{text} (the container's quota)"
    return f"{text}, bound to {plural(max(each), 'CPU')} each" if max(each) < bound else text
