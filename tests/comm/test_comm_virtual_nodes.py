"""Everything that has ranks on several nodes, over TCP between namespaces that are nodes to the MPI library."""

from __future__ import annotations

import sys
import xml.etree.ElementTree as ET
from pathlib import Path

import pytest
from virtual_nodes import ROOT, VirtualNodes, bytes_per_s, missing

pytestmark = pytest.mark.skipif(bool(missing()), reason=f"no virtual nodes: {missing()}")

TRANSPORTS = ("test_comm_shared_mpi.py",)
EVERYTHING = (*TRANSPORTS, "test_comm_mpi_conformance.py", "test_comm_algorithms_mpi.py")
"""Every transport, and every collective and algorithm too."""

_WORLD = """
import numpy as np, mpitrain
world = mpitrain.world()
x = world.empty(1 << 20, np.int64)  # 8 MiB: more than one chunk
y = np.empty((1 << 21) + 5, np.int64)  # 16 MiB and a little
for array in (x, y):
    array[...] = np.arange(array.size) * (world.rank + 1)
    total = np.arange(array.size) * sum(range(1, world.size + 1))
    assert np.array_equal(world.allreduce_plan(array)(), total)
    assert np.array_equal(world.allreduce(array), total)
    world.allreduce(array, out=array)
    assert np.array_equal(array, total)
print(world.node.size, world.transport, flush=True)
"""


@pytest.mark.parametrize(("nodes", "ranks_per_node", "transport"), [(3, 1, "network"), (2, 2, "shared")])
def test_nodes_are_told_apart_and_reduce(nodes: int, ranks_per_node: int, transport: str, tmp_path: Path) -> None:
    log, script = tmp_path / "log", tmp_path / "script.py"
    script.write_text(_WORLD)
    with VirtualNodes(nodes) as made, log.open("wb") as output:
        code = made.run(ranks_per_node, [sys.executable, str(script)], 60, output, PYTHONPATH=str(ROOT))
    assert code == 0, log.read_text()
    said = [line for line in log.read_text().splitlines() if line == f"{ranks_per_node} {transport}"]
    assert len(said) == nodes * ranks_per_node, log.read_text()


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize(("nodes", "ranks_per_node", "suites"), [(2, 2, EVERYTHING), (3, 1, TRANSPORTS)])
def test_the_suites_of_the_communicator(
    nodes: int, ranks_per_node: int, suites: tuple[str, ...], tmp_path: Path
) -> None:
    ranks = nodes * ranks_per_node
    options = ["--with-mpi", "-p", "no:cacheprovider", "--timeout=60", "--timeout-method=thread", "-m", "mpi", "-q"]
    paths = [str(ROOT / "tests" / "comm" / suite) for suite in suites]
    argv = [sys.executable, str(ROOT / "tests" / "rank.py"), str(tmp_path), *options, *paths]
    with VirtualNodes(nodes, "1gbit") as made, (tmp_path / "log").open("wb") as output:
        code = made.run(
            ranks_per_node, argv, 550, output, PYTHONPATH=str(ROOT), MPITRAIN_TEST_RANKS=str(ranks),
        )  # fmt: skip
    tail = (tmp_path / "rank-0.log").read_text()[-4000:]
    assert code == 0, tail
    cases = [ET.parse(tmp_path / f"rank-{rank}.xml").getroot().iter("testcase") for rank in range(ranks)]
    assert all(len(list(each)) > 50 for each in cases), tail


def test_rates_as_tc_writes_them() -> None:
    assert bytes_per_s("1gbit") == 125e6
    assert bytes_per_s("2.5mbit") == 312_500
