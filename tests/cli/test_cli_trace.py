"""``mpitrain run --trace``: one file in the run directory that shows what each rank did."""

import json
from collections import Counter
from pathlib import Path

import pytest
from commands import metrics, mpitrain, settings, write_job
from traces import check_format, read, told

PHASES = {
    "data": 24, "step": 24, "gradients": 24, "reduce": 24, "check": 24, "update": 24, "evaluate test": 4,
    "checkpoint": 4,
}  # fmt: skip


@pytest.mark.parametrize(("arguments", "under", "ranks"), [(("-n", "2"), 0, 2), ((), 0, 1), ((), 3, 3)])
def test_a_traced_job_shows_all_ranks(tmp_path: Path, arguments, under, ranks):
    run = tmp_path / "run"
    done = mpitrain("run", *arguments, "--trace", write_job(tmp_path), "--run-dir", run, under=under)
    assert done.code == 0, done.err
    assert f"trace     {run / 'trace.json'} (opens in ui.perfetto.dev)\n" in done.out
    assert [path.name for path in run.glob("*trace*")] == ["trace.json"]
    events = read(run / "trace.json")
    check_format(events, ranks)
    for rank in range(ranks):
        phases = Counter(e["name"] for e in events if e["pid"] == rank and e.get("cat") == "phase")
        assert phases.items() >= PHASES.items()
        assert phases["log"] == len(metrics(run))
        assert told(events, rank)["world", "allreduce"] > 24
    sites = "mpitrain/method/steps", "mpitrain/parallel/in_place"
    summed = "reduce_scatter" if ranks > 1 else "allreduce"  # of one replica, whose shards the ranks update
    sums = [e for e in events if e["name"].startswith(summed)]
    gradients = [e for e in sums if e["args"].get("at", "").startswith(sites) and "dtype" in e["args"]]
    assert len(gradients) == 24 * ranks
    assert {e["args"]["dtype"] for e in gradients} == {"float32"}


def test_no_trace_without_being_asked(tmp_path):
    done = mpitrain("run", write_job(tmp_path), *settings(train__steps=2), "--run-dir", tmp_path / "run", "--json")
    assert done.code == 0, done.err
    assert not list((tmp_path / "run").glob("*trace*"))


FAILS = """
import time
from mpitrain import nn


class Fails(nn.Network):
    steps = 0

    def loss_and_gradients(self, *arguments):
        self.steps += 1
        if self.steps == 20:
            raise RuntimeError("on purpose")
        time.sleep(0.01)
        return super().loss_and_gradients(*arguments)


def build():
    return Fails(nn.Sequential(nn.Linear(5, 3)), nn.CrossEntropy())
"""


def test_a_job_that_fails_leaves_what_each_rank_did(tmp_path):
    (tmp_path / "model.py").write_text(FAILS)
    job = write_job(tmp_path)
    head, _, tail = job.read_text().partition('kind = "mlp"')
    job.write_text(head + 'build = "model.py:build"\n' + tail.partition("dropout = 0.2\n")[2])
    done = mpitrain("run", "-n", "2", "--trace", job, "--run-dir", tmp_path / "run", cwd=tmp_path)
    assert done.code == 1
    assert "on purpose" in done.err
    parts = sorted((tmp_path / "run").glob("trace*"))
    assert [part.name for part in parts] == ["trace.rank0.json", "trace.rank1.json"]
    for rank, part in enumerate(parts):
        phases = Counter(e["name"] for e in read(part) if e["ph"] == "X")
        assert (phases["gradients"], phases["update"]) == (20, 19)
        assert {event["pid"] for event in read(part)} == {rank}
    joined = "[" + "".join(part.read_text().removeprefix("[") for part in parts)  # as the documentation says
    check_format(json.loads(joined.rstrip().removesuffix(",") + "]"), 2)
