"""The tuning table: what it chooses, how it is kept, and that a file which does not fit is never used."""

from __future__ import annotations

import json
import time
import warnings
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mpitrain._errors import InputError, StorageError
from mpitrain.comm import Communicator, LocalWorld
from mpitrain.comm.algorithms.registry import assign
from mpitrain.comm.calls import Call, Prepared
from mpitrain.comm.tuning import Found, Key, Row, Table, adopt, cache, install, kept, load, measure, path_of, save, tune

KEY = Key("8 x CPU", "MPI 1.0", "host", "2x4")


def row(total_bytes: int, algorithm: str, operation: str = "allreduce", size: int = 8) -> Row:
    return Row(operation, size, total_bytes, algorithm, {"default": 2e-6, algorithm: 1e-6})


TABLE = Table(KEY, (row(16384, "ring"), row(64, "doubling"), row(1024, "default"), row(64, "tree", "reduce", 4)))


@pytest.fixture
def caches(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    return tmp_path


@pytest.mark.parametrize(
    ("total_bytes", "expected"),
    [
        (0, "doubling"), (64, "doubling"), (255, "doubling"), (256, "default"),  # 256 = √(64 · 1024)
        (4095, "default"), (4096, "ring"), (16384, "ring"), (2**40, "ring"),
    ],
)  # fmt: skip
def test_chooses_the_row_nearest_in_size(total_bytes: int, expected: str) -> None:
    assert TABLE.choose("allreduce", total_bytes, 8) == expected


def test_chooses_the_default_where_nothing_was_measured() -> None:
    assert TABLE.choose("allreduce", 64, 4) == "default"
    assert TABLE.choose("reduce", 64, 4) == "tree"
    assert TABLE.choose("barrier", 0, 8) == "default"


def test_calls_follow_the_table_of_their_communicator() -> None:
    def program(comm: Communicator) -> list[tuple[int, int]]:
        comm.tuning = Table(KEY, (row(64, "tree", size=3), row(1024, "ring", size=3)))
        sent = []
        for n, choice in ((1, None), (1000, None), (1000, "default"), (1, "ring")):
            comm.ledger.reset()
            assert comm.allreduce(np.ones(n), algorithm=choice).tolist() == [3.0] * n
            (count,) = comm.ledger.snapshot().values()
            sent.append((count.moved_messages, count.moved_bytes))
        return sent

    root, middle, last = LocalWorld(3).run(program)
    assert root == [(2, 16), (4, (333 + 333) * 8 + (334 + 333) * 8), (0, 0), (1, 8)]
    assert middle[0] == last[0] == (1, 8)


def test_describes_its_choices_and_joins_rows_that_choose_alike() -> None:
    rows = [row(4**i, "doubling" if i < 4 else "ring") for i in range(1, 12)]
    table = Table(KEY, (*rows, row(64, "default", "reduce"), row(1024, "default", "reduce")))
    assert table.describe() == [
        "allreduce: doubling below 128 bytes, ring above",
        "reduce: default",
    ]  # 128 = √(64 · 256)
    assert [table.choose("allreduce", size, 8) for size in (127, 128)] == ["doubling", "ring"]
    assert table.choose("reduce", 64, 8) == "default"


def test_a_call_that_the_table_leaves_to_the_default_is_handed_on_as_it_was() -> None:
    def program(comm: Communicator) -> bool:
        comm.tuning = Table(KEY, (row(64, "default", size=1), row(4096, "ring", size=1)))
        small, large = (
            Prepared("allreduce", [Call("allreduce", recv=np.ones(n), dtype=np.dtype(float))], lambda: None)
            for n in (8, 512)
        )
        return assign(comm, small, None) is small and assign(comm, large, None).calls[0].algorithm == "ring"

    assert LocalWorld(1).run(program) == [True]


def test_is_read_as_it_was_written() -> None:
    assert Table.from_json(TABLE.to_json()) == TABLE


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda t: "[]", "the file is not as it was written"),
        (lambda t: "", "not JSON"),
        (lambda t: json.dumps({**t, "version": 2}), "of another version; got 2; expected 1"),
        (lambda t: json.dumps({**t, "more": 1}), "the file is not as it was written"),
        (lambda t: json.dumps({**t, "key": {}}), "the key is not as it was written"),
        (lambda t: json.dumps({**t, "rows": [None]}), "row 0 is not as it was written"),
        (lambda t: json.dumps({**t, "rows": [{**t["rows"][0], "size": "8"}]}), r"size \(int\)"),
        (lambda t: json.dumps({**t, "rows": [{**t["rows"][0], "seconds": {"ring": "1"}}]}), "row 0, seconds"),
        (lambda t: json.dumps({**t, "rows": [{**t["rows"][0], "algorithm": "magic"}]}), "row 0 names no algorithm"),
        (lambda t: json.dumps({**t, "rows": [{**t["rows"][0], "operation": "reduce", "algorithm": "doubling"}]}),
         "no algorithm of reduce; got 'doubling'; expected ring, tree, ordered, default"),
    ],
)  # fmt: skip
def test_refuses_text_that_is_anything_else(change: Callable[[Any], str], words: str) -> None:
    with pytest.raises(InputError, match=words):
        Table.from_json(change(json.loads(TABLE.to_json())))


def found_on(size: int, per_node: int, what: Callable[[Communicator], Found] = load) -> Found:
    """What all ranks found, which must be the same."""
    found = LocalWorld(size, ranks_per_node=per_node).run(what)
    assert all(each == found[0] for each in found)
    return found[0]


def keep(per_node: int, *rows: Row) -> Path:
    (key, *_) = LocalWorld(4, ranks_per_node=per_node).run(cache.key_of)
    return save(Table(key, rows))


def test_the_key_tells_the_layout() -> None:
    layouts = [LocalWorld(n, ranks_per_node=k).run(cache.key_of)[0].layout for n, k in ((4, 4), (4, 1), (5, 2), (7, 3))]
    assert layouts == ["1x4", "4x1", "2x2+1x1", "2x3+1x1"]


def test_a_table_is_found_by_the_layout_that_it_was_kept_for(caches: Path) -> None:
    path = keep(2, row(64, "ring", size=4))
    assert path.is_relative_to(caches / "mpitrain" / "tuning")
    found = found_on(4, 2)
    assert found.table is not None
    assert found.table.choose("allreduce", 64, 4) == "ring"
    assert (found.refused, found.note) == (False, f"tuning table {path} with 1 rows")
    assert list(path.parent.iterdir()) == [path]
    other = found_on(4, 4)
    assert (other.table, other.refused) == (None, False)
    assert "mpitrain bench collectives --tune makes one" in other.note


@pytest.mark.parametrize("damage", [b"{", b"\xff\xfe", b'{"version": 1}'])
def test_a_damaged_file_is_ignored_with_a_note(caches: Path, damage: bytes) -> None:
    path = keep(4, row(64, "ring", size=4))
    path.write_bytes(damage)
    found = found_on(4, 4)
    assert (found.table, found.refused) == (None, True)
    assert found.note.startswith(f"tuning table ignored: {path} cannot be read: ")


@pytest.mark.parametrize("field", ["machine", "library", "transport", "layout"])
def test_a_file_of_another_machine_is_ignored_with_a_note(caches: Path, field: str) -> None:
    path = keep(4, row(64, "ring", size=4))
    table = Table.from_json(path.read_text())
    path.write_text(replace(table, key=replace(table.key, **{field: "another"})).to_json())
    found = found_on(4, 4)
    assert (found.table, found.refused) == (None, True)
    assert f"{path} is of {field} 'another', here " in found.note


def test_install_sets_the_table_and_warns_of_a_file_that_cannot_be_used(caches: Path) -> None:
    path = keep(2, row(64, "ring", size=4))

    def program(comm: Communicator) -> str | None:
        install(comm)
        return comm.tuning and comm.tuning.choose("allreduce", 64, 4)

    assert LocalWorld(4, ranks_per_node=2).run(program) == ["ring"] * 4
    assert LocalWorld(4, ranks_per_node=4).run(program) == [None] * 4
    path.write_text("{")
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        assert LocalWorld(4, ranks_per_node=2).run(program) == [None] * 4
    assert [str(each.message).split(":")[0] for each in seen] == ["tuning table ignored"]


def adopted(size: int) -> list[str | None]:
    def program(comm: Communicator) -> str | None:
        adopt(comm)
        return comm.tuning and comm.tuning.choose("allreduce", 64, comm.size)

    return LocalWorld(size, ranks_per_node=2).run(program)


def test_the_world_adopts_what_was_kept_for_it(caches: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("MPITRAIN_TRANSPORT", raising=False)
    assert adopted(4) == [None] * 4
    (key, *_) = LocalWorld(4, ranks_per_node=2).run(lambda comm: cache.key_of(comm, "auto"))
    path = save(Table(key, (row(64, "ring", size=4),)))
    assert adopted(4) == ["ring"] * 4
    assert adopted(2) == [None] * 2
    assert list(kept().items()) == [(path, Table(key, (row(64, "ring", size=4),)))]
    with monkeypatch.context() as off:
        off.setenv("MPITRAIN_TUNING", "off")
        assert adopted(4) == [None] * 4
    with monkeypatch.context() as other:
        other.setenv("MPITRAIN_TRANSPORT", "host")
        assert adopted(4) == [None] * 4
    path.write_text("{")
    assert list(kept().values()) == [None]
    with pytest.warns(RuntimeWarning, match="tuning table ignored") as told:
        assert adopted(4) == [None] * 4
    assert len(told) == 1


def test_tuning_again_takes_over_what_is_not_measured(caches: Path) -> None:
    def program(comm: Communicator) -> list[str]:
        for operation in ("allreduce", "broadcast"):
            table = tune(comm, [operation], sizes_bytes=[64], rounds=1)
            if comm.rank == 0:
                save(table)
            comm.barrier()
        return [each.operation for each in table.rows]

    assert LocalWorld(2).run(program) == [["allreduce", "broadcast"]] * 2


def test_a_cache_that_cannot_be_written_is_an_error(caches: Path) -> None:
    (caches / "mpitrain").write_text("a file where a folder should be")
    with pytest.raises(StorageError, match=r"tuning table cannot be kept; .*XDG_CACHE_HOME"):
        save(TABLE)
    assert path_of(KEY).parent == caches / "mpitrain" / "tuning"


def test_measure_times_all_candidates_and_all_ranks_agree() -> None:
    def program(comm: Communicator) -> Table:
        return measure(comm, sizes_bytes=(1, 4096), rounds=2)

    tables = LocalWorld(3, ranks_per_node=2, timeout_s=30).run(program)
    assert all(table == tables[0] for table in tables)
    rows = tables[0].rows
    assert [(each.operation, each.total_bytes) for each in rows[:4]] == [
        ("allreduce", 12), ("allreduce", 4092), ("reduce", 12), ("reduce", 4092),
    ]  # fmt: skip
    assert set(rows[0].seconds) == {
        "default",
        "ring",
        "recursive",
        "doubling",
        "tree",
        "ordered",
        "pipelined",
        "hierarchical",
    }
    assert all(seconds > 0 for each in rows for seconds in each.seconds.values())
    assert all(each.algorithm in each.seconds for each in rows)
    assert Table.from_json(tables[0].to_json()) == tables[0]


def test_measure_chooses_what_is_fastest_on_the_slowest_rank(monkeypatch: pytest.MonkeyPatch) -> None:
    pauses = {"default": (0.06, 0.06), "tree": (0.001, 0.08), "ring": (0.03, 0.03)}  # a busy machine adds some 1 ms

    def trial(comm: Communicator, operation: str, row: Any, whole: Any) -> Callable[[str], object]:
        return lambda name: time.sleep(pauses.get(name, (0.06, 0.06))[comm.rank])

    monkeypatch.setattr("mpitrain.comm.tuning.measuring._trial", trial)
    (table, _) = LocalWorld(2).run(lambda comm: measure(comm, ["allreduce"], (64,), rounds=3))
    assert table.rows[0].algorithm == "ring"
    assert 0.08 <= table.rows[0].seconds["tree"] < 0.12
    pauses["default"] = (0.03, 0.03)  # as fast, but for noise
    (table, _) = LocalWorld(2).run(lambda comm: measure(comm, ["allreduce"], (64,), rounds=3))
    assert table.rows[0].algorithm == "default"


@pytest.mark.mpi
def test_tuning_over_mpi(world: Communicator, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = world.broadcast_object(str(tmp_path))
    monkeypatch.setenv("XDG_CACHE_HOME", folder)
    with world.split(0) as comm:
        table = measure(comm, ["allreduce", "allgather"], (64, 65536), rounds=3)
        if comm.rank == 0:
            save(table)
        found = install(comm)
        assert found.table == comm.tuning == table
        assert table.key.library == comm.library
        assert comm.allreduce(np.ones(100)).tolist() == [comm.size] * 100
