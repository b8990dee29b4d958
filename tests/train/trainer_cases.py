"""What the trainer's tests share: jobs that run on threads or crash, and records to compare."""

from mpitrain.comm import LocalWorld
from mpitrain.train import train_job

PATIENCE_S = 30.0


def train(job, ranks=2, **options):
    """Run a job on threads; return rank 0's result, which all have."""
    results = LocalWorld(ranks, timeout_s=PATIENCE_S).run(lambda comm: train_job(job, comm, **options))
    assert all(result == results[0] for result in results)
    return results[0]


def without_clock(records):
    """Return the losses and metrics by kind and step, of which there is one each."""
    clock = ("seconds", "samples_per_s")
    found = {(r["kind"], r["step"]): {k: v for k, v in r.items() if k not in clock} for r in records}
    assert len(found) == len(records), "a step is there twice"
    return found


class Crash(BaseException):
    """Ends a rank as a kill does: nothing may catch it and tidy up."""


def crash_at(phase, occurrence):
    """Return an ``on_phase`` that crashes at some phase of a checkpoint."""
    told = []

    def on_phase(found):
        told.append(found)
        if told.count(phase) == occurrence:
            raise Crash

    return on_phase
