"""Our own algorithms on threads: values against the serial result, bits, messages, nodes, misuse."""

from __future__ import annotations

import algorithm_suite as suite
import numpy as np
import pytest
from conformance import CHECKS

from mpitrain._errors import InputError, MismatchError
from mpitrain.comm import Communicator, LocalWorld, dtypes
from mpitrain.comm.algorithms import Hierarchy, hierarchical, names, ordered, pipelined, ring
from mpitrain.comm.tuning import Key, Row, Table

PAIRS = pytest.mark.parametrize(("operation", "name"), suite.PAIRS)
SIZES = pytest.mark.parametrize("size", range(1, 9))


@SIZES
@PAIRS
def test_values(operation: str, name: str, size: int) -> None:
    nodes = size % 3 + 1
    LocalWorld(size, ranks_per_node=nodes, rendezvous=size % 2 == 0, timeout_s=20).run(
        suite.check_values, operation, name
    )


@pytest.mark.filterwarnings("ignore:.* was dropped without wait:ResourceWarning")
@pytest.mark.parametrize("name", names("allreduce"))
def test_conforms_where_the_table_chooses_it(name: str) -> None:
    operations = [operation for operation, each in suite.PAIRS if each == name]
    rows = tuple(Row(operation, 3, 1, name, {}) for operation in operations)

    def conform(comm: Communicator) -> None:
        comm.node  # noqa: B018 - built without the table
        comm.tuning = Table(Key("", "", "", ""), rows)
        for check in CHECKS:
            check(comm)

    LocalWorld(3, ranks_per_node=2, timeout_s=20).run(conform)


@pytest.mark.parametrize("size", [1, 2, 3, 4, 5, 8])
@pytest.mark.parametrize("landing_bytes", [1 << 20, 64])
def test_ordered_is_the_left_fold_in_rank_order(size: int, landing_bytes: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ordered, "LANDING_BYTES", landing_bytes)
    monkeypatch.setattr(ordered, "PIECE_BYTES", 16)
    monkeypatch.setattr(pipelined, "LANDING_BYTES", landing_bytes)
    monkeypatch.setattr(pipelined, "LEAST_MESSAGE_BYTES", 16)
    LocalWorld(size, timeout_s=20).run(suite.check_ordered_bits)


def test_the_data_of_that_test_tells_other_orders_apart() -> None:
    expected = suite.left_fold(4, 100, "float32").tobytes()
    for name in set(names("allreduce")) - {"ordered", "pipelined"}:
        got = LocalWorld(4).run(
            lambda c, name=name: c.allreduce(suite.real_values(c.rank, 100, "float32"), algorithm=name)
        )
        assert got[0].tobytes() != expected, name


def test_ordered_folds_even_what_does_not_commute(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(dtypes.UFUNCS, "sum", np.subtract)
    for name in ("ordered", "pipelined"):
        got = LocalWorld(5).run(
            lambda c, name=name: c.allreduce(suite.real_values(c.rank, 40, "float64"), algorithm=name)
        )
        for each in got:
            suite.same_bits(each, suite.left_fold(5, 40, "float64", np.subtract))


@pytest.mark.parametrize("size", [2, 3, 6, 8])
def test_all_ranks_get_the_same_bits(size: int) -> None:
    LocalWorld(size, ranks_per_node=3).run(suite.check_all_ranks_agree_in_bits)


@SIZES
@pytest.mark.parametrize(("operation", "name"), sorted(suite.FORMULAS))
def test_messages_and_bytes_equal_the_formula(operation: str, name: str, size: int) -> None:
    LocalWorld(size, timeout_s=20).run(suite.check_sent, operation, name)


def test_every_algorithm_has_a_formula() -> None:
    assert set(suite.FORMULAS) | {("allreduce", "hierarchical")} == set(suite.PAIRS)


@pytest.mark.parametrize("size", range(2, 6))
def test_the_ring_reduces_long_shares_in_segments(size: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ring, "SEGMENT_BYTES", 40)

    def program(comm: Communicator) -> None:
        x = np.arange(35.0 * size) + comm.rank  # shares of 280 bytes: seven segments
        got = comm.allreduce(x, algorithm="ring")
        assert np.array_equal(got, size * np.arange(35.0 * size) + size * (size - 1) / 2)
        assert suite.moved(comm)["allreduce"] == ((size - 1) * (7 + 1), 2 * (size - 1) * 280)

    LocalWorld(size, rendezvous=True).run(program)


def sent_on_nodes(nodes: int, per_node: int, n: int) -> dict[str, tuple[int, int]]:
    """Messages and bytes that each rank sends for n bytes on equal nodes, a power of two in number."""
    return {
        "node": (2 * (per_node - 1), 2 * (per_node - 1) * n // per_node),
        "cross": (2 * (nodes.bit_length() - 1), 2 * (nodes - 1) * n // nodes // per_node),
    }


@pytest.mark.parametrize(("size", "per_node"), [(8, 1), (8, 2), (8, 4), (8, 8), (6, 3), (4, 2)])
def test_hierarchical_sends_each_share_across_nodes_once(size: int, per_node: int) -> None:
    def program(comm: Communicator) -> dict[str, tuple[int, int]]:
        x = np.ones(48, np.float32)
        assert np.array_equal(comm.allreduce(x, algorithm="hierarchical"), size * x)
        return {axis: suite.moved(comm, axis)["allreduce"] for axis in ("node", "cross")}

    for sent in LocalWorld(size, ranks_per_node=per_node).run(program):
        assert sent == sent_on_nodes(size // per_node, per_node, 48 * 4)


@pytest.mark.parametrize("per_node", [1, 2, 3, 5])
@pytest.mark.parametrize("leaders", [1, 2, None])
def test_hierarchical_with_any_number_of_leaders(per_node: int, leaders: int | None) -> None:
    def program(comm: Communicator) -> int:
        hierarchy = Hierarchy.of(comm, leaders)
        for n in (0, 1, 7, 100):
            words = np.arange(n) + comm.rank
            hierarchical.reduce_for_all(hierarchy, words, np.add)
            assert np.array_equal(words, 8 * np.arange(n) + 28)
        assert (hierarchy.cross is not None) == (comm.node.rank < hierarchy.leaders)
        return hierarchy.leaders

    smallest = {1: 1, 2: 2, 3: 2, 5: 3}[per_node]
    assert LocalWorld(8, ranks_per_node=per_node).run(program) == [min(leaders or smallest, smallest)] * 8


def test_an_unknown_algorithm_is_refused_before_anything_is_sent() -> None:
    def program(comm: Communicator) -> None:
        comm.allreduce(np.ones(3), algorithm="rings")

    with pytest.raises(InputError, match=r"allreduce: no such algorithm; got 'rings'; .*did you mean \"ring\"\?"):
        LocalWorld(2).run(program)
    with pytest.raises(InputError, match="broadcast: no such algorithm; got 'ordered'; expected 'ring', 'tree'"):
        LocalWorld(1).run(lambda comm: comm.broadcast(np.ones(3), algorithm="ordered"))


@pytest.mark.parametrize("other", ["tree", "default", None])
def test_ranks_that_choose_different_algorithms_are_told(other: str | None) -> None:
    def program(comm: Communicator) -> None:
        comm.allreduce(np.ones(3, np.float32), algorithm=other if comm.rank == 1 else "ring")

    with pytest.raises(MismatchError, match=r"rank 0: allreduce\(float32\[3\], op=sum, algorithm=ring\) .*\n  rank 1"):
        LocalWorld(3, timeout_s=5).run(program)


@pytest.mark.parametrize("name", names("allreduce"))
def test_messages_of_the_caller_under_way_are_not_met(name: str) -> None:
    def program(comm: Communicator) -> None:
        peer = 1 - comm.rank
        request = comm.isend(np.full(2, 9.0), peer, tag=32766)
        assert comm.allreduce(np.ones(4), algorithm=name).tolist() == [2.0] * 4
        assert comm.recv(np.zeros(2), peer, tag=32766).tolist() == [9.0, 9.0]
        request.wait()

    LocalWorld(2).run(program)


def test_scratch_memory_is_kept() -> None:
    def program(comm: Communicator) -> None:
        first = comm._links.scratch("landing", 100, np.dtype("float64"))
        assert np.may_share_memory(comm._links.scratch("landing", 50, np.dtype("int8")), first)
        assert not np.may_share_memory(comm._links.scratch("copy", 50, np.dtype("int8")), first)

    LocalWorld(1).run(program)
