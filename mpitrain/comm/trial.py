"""What ``mpitrain doctor`` starts on every rank, as ``python -m mpitrain.comm.trial SECONDS``: the smallest MPI job.

Rank 0 of each world prints one JSON object, so that ranks which do not see each other give themselves away.
"""

from __future__ import annotations

import faulthandler
import json
import sys
from dataclasses import asdict

from mpitrain._errors import MpitrainError
from mpitrain.comm.guard import abort_on_uncaught
from mpitrain.comm.start import world
from mpitrain.comm.support import support


def main(limit_s: float) -> None:
    """Reduce one number over all ranks and print what came of it; end by itself after ``limit_s`` seconds."""
    faulthandler.dump_traceback_later(limit_s, exit=True)  # tells where it hung, and leaves no rank behind
    try:
        comm = world()
    except MpitrainError as error:
        sys.exit(f"error: {error}")
    abort_on_uncaught(comm)
    total = int(comm.allreduce(comm.rank + 1))
    moves = {"transport": comm.transport, "why": comm.transport_reason}
    if comm.rank == 0:
        print(json.dumps({"size": comm.size, "total": total, **moves, **asdict(support())}), flush=True)


if __name__ == "__main__":
    main(float(sys.argv[1]))
