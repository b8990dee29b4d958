"""What the ranks of virtual nodes run: all cases of the layout that they find themselves on; they list those done."""

from __future__ import annotations

import json
import socket
import sys
from collections import Counter
from pathlib import Path

from pairwise import Case
from pairwise_cases import Place, cases_of, places, run_case_at, run_cases

from mpitrain.comm import Communicator, abort_on_uncaught, world


def layout(comm: Communicator) -> str:
    """Where the ranks are, by the names of their hosts."""
    ranks = Counter(comm.allgather_object(socket.gethostname()))
    assert set(ranks.values()) == {comm.node.size}, f"nodes are not told apart: {ranks}"
    return f"virtual {len(ranks)} × {comm.node.size}"


def main(report: str) -> None:
    comm = world()
    abort_on_uncaught(comm)
    here, done = [layout(comm)], []

    def run(place: Place, case: Case) -> None:
        assert place.comm.transport == case["transport"]
        run_case_at(place, case)
        done.append(case | {"layout": layout(place.comm)})

    with places(here) as at:
        run_cases(cases_of(here), lambda case: run(at(case), case))
    if comm.rank == 0:
        Path(report).write_text(json.dumps(done))


if __name__ == "__main__":
    main(*sys.argv[1:])
