"""Ranks that end early: those that others wait for are named (see also `test_comm_misuse`), the others are let go."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest

from mpitrain.comm import absence
from mpitrain.comm.calls import Call, Prepared
from mpitrain.comm.watchdog import Watch

Launch = Callable[..., tuple[int | None, str]]

LEAVES = """
import sys, time
import numpy as np
from mpitrain import world
from mpitrain.comm import absence

PAUSE_S = 1.2
absence.FIRST_S = 0.3
comm = world()
comm.timeout_s = 2.0  # the watchdog then looks ten times a second
part = comm.split(comm.rank // 2)
if comm.rank == 2:
    comm.gather(np.ones(1))  # which takes a part of it, and no more
    sys.exit(0)
late = comm.rank == 1
time.sleep(PAUSE_S * late)
comm.gather(np.ones(1))
time.sleep(PAUSE_S * late)
comm.send(np.ones(1), 0) if late else comm.recv(np.ones(1), 1)
time.sleep(PAUSE_S * late)
print("sum", part.allreduce(np.ones(1)))
"""

MESSAGE = """
import time
import numpy as np
from mpitrain import world
from mpitrain.comm import absence

absence.FIRST_S = 0.3
comm = world()
comm.timeout_s = 20.0
if comm.rank == 2:
    comm.recv(np.ones(3), 1)
elif comm.rank == 0:  # whom the others ask
    time.sleep(600)
"""


def test_a_rank_may_end_while_others_go_on_without_it(launch: Launch) -> None:
    code, output = launch(3, LEAVES)
    assert (code, output.count("sum [2.]")) == (0, 2), output


def test_a_message_from_a_rank_that_has_ended(launch: Launch) -> None:
    code, output = launch(3, MESSAGE, timeout_s=30.0)
    assert code not in (None, 0), output
    assert "rank 1 has come to the end of the program, and rank 2 waits for that in vain, in recv(float64[3])" in output


class _Told:
    """A channel to three ranks, of which the last has ended."""

    rank = 0

    def __init__(self, waits: dict[int, list[str]]) -> None:
        self.waits = waits

    def departed(self, every_s: float) -> dict[int, str]:
        return {2: "has exited"}

    def inquire(self, ranks: list[int], patience_s: float) -> dict[int, str]:
        return {rank: f"told by {rank}" for rank in ranks}

    def status(self) -> str:
        return "told by 0"


def _watch(call: Call, waits: list[str]) -> Watch:
    watch = Watch("world", name="/1", members=lambda: [0, 1, 2])
    watch.channel = _Told({1: waits})  # type: ignore[assignment]
    watch.current = Prepared(call.operation, [call], lambda: None)
    return watch


def test_all_others_must_wait_in_the_same_communicator() -> None:
    barrier = Call("barrier")
    found = absence.find(_watch(barrier, ["/1"]), 2.0)
    assert found == (
        "error: rank 2 has come to the end of the program, and ranks 0, 1 wait for that in vain, in barrier(); "
        "the job ends here\n  rank 0: told by 0\n  rank 1: told by 1\n  rank 2: told by 2"
    )
    assert absence.find(_watch(barrier, ["/2"]), 100.0) is None
    assert absence.find(_watch(barrier, ["/1"]), 1.9) is None
    without = _watch(barrier, ["/1"])
    without.members = lambda: [0, 1]
    assert absence.find(without, 100.0) is None


@pytest.mark.parametrize(("waited_s", "told"), [(11.9, False), (12.1, True)])
def test_many_bytes_may_still_be_on_their_way(waited_s: float, told: bool) -> None:
    large = Call("allreduce", np.dtype("f8"), recv=np.zeros(12_500_000), op="sum")  # 100 MB: 10 s
    assert (absence.find(_watch(large, ["/1"]), waited_s) is not None) == told


def test_a_message_concerns_its_two_ranks() -> None:
    def receives(peer: int) -> Watch:
        return _watch(Call("recv", np.dtype("f8"), recv=np.zeros(3), peer=peer), [])

    assert absence.find(receives(1), 100.0) is None
    assert absence.find(receives(2), 2.1) is not None
