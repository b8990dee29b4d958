"""``mpitrain bench job``: the command as people run it, on a tiny job."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from commands import mpitrain, settings, write_job

QUICK = ("--rounds=2", "--round-s=0")
PRODUCTS = [10 * 12, 12 * 9, 9 * 3]


@pytest.fixture
def job(tmp_path: Path) -> Path:
    return write_job(tmp_path)


def measured(job: Path, ranks: int, **changes: Any) -> tuple[dict[str, Any], list[str]]:
    path = job.with_name("found.json")
    done = mpitrain("bench", "job", job, f"-n{ranks}", *QUICK, f"--json={path}", *settings(**changes))
    assert (done.code, done.err) == (0, "")
    return json.loads(path.read_bytes()), done.out.splitlines()


def test_a_pipeline_is_told_in_figures_and_in_words(job):
    found, (title, *told) = measured(job, 2, mesh__pipe=2, method__microbatches=4)
    assert title == found["title"]
    assert title.endswith("on 2 ranks, data 1 × pipe 2, cut at [3] of 6 layers by counted cost")
    assert (found["ranks"], found["batch_size"], found["seconds"]["count"]) == (2, 16, 2)
    assert found["samples_per_s"] == pytest.approx(16 / found["seconds"]["p50"], rel=1e-3)
    assert found["tokens_per_s"] is None
    rate = found["flops"] / found["seconds"]["p50"] / 2
    assert found["utilisation"] == pytest.approx(rate / found["product_flops_per_s"], rel=1e-3)
    assert 0 < found["communication_share"] < 1
    assert found["pipeline"]["formula"] == 1 / 4
    assert found["pipeline"]["measured"] > 0
    assert [line.split()[0] for line in told] == [
        "step", "operations", "communication", "pipeline", "memory", "MB",
    ]  # fmt: skip


@pytest.mark.slow
def test_shared_parameters_count_once(job):
    found, _ = measured(job, 2, method__kind="gradient", method__stage=2, train__batch_size=12)
    whole, _ = measured(job, 1)
    assert found["pipeline"] is None
    assert found["memory"]["parameters"]["measured_bytes"] == whole["memory"]["parameters"]["measured_bytes"] / 2
    for kind in ("parameters", "gradients", "optimizer"):
        memory = found["memory"][kind]
        assert memory["measured_bytes"] == pytest.approx(memory["predicted_bytes"], rel=0.1)
    assert (found["batch_size"], whole["batch_size"]) == (12, 16)
    assert found["flops"] / whole["flops"] == 12 / 16


@pytest.mark.slow
def test_what_cannot_be_counted_is_said(job):
    job.with_name("my.py").write_text(
        "from mpitrain import nn\nclass Mine(nn.Linear): pass\nclass Own(nn.Layer):\n"
        "    def forward(self, params, x, call): return x, call.context()\n"
        "    def backward_input(self, params, context, dy, call): return dy\n"
        "def build(): return nn.Sequential(nn.Linear(5, 4), Own(), nn.Linear(4, 3))\n"
    )
    text = job.read_text()
    model = text[text.index("[model]") : text.index("[optimizer]")]
    job.write_text(text.replace(model, '[model]\nbuild = "my.py:build"\n\n'))
    found, told = measured(job, 1)
    assert (found["flops"], found["utilisation"]) == (None, None)
    activations = found["memory"].pop("activations")
    assert (activations["measured_bytes"] > 0, activations["predicted_bytes"]) == (True, None)
    for memory in found["memory"].values():
        assert memory["measured_bytes"] == memory["predicted_bytes"] > 0
    assert told[-1] == found["notes"][0]
    assert "operations are not counted" in told[-1]
    assert "got Own" in told[-1]


def test_figures_of_a_run_are_kept_in_it_and_told_by_its_report(job):
    run = job.parent
    done = mpitrain("bench", "job", run, *QUICK, *settings(train__batch_size=8))
    assert (done.code, (run / "costs.json").exists()) == (0, False)  # of another job
    done = mpitrain("bench", "job", run, *QUICK)
    assert (done.code, done.err) == (0, "")
    assert done.out.splitlines()[-1] == f"report         {run / 'report.html'}"
    costs = json.loads((run / "costs.json").read_bytes())
    assert f"{costs['communication_share']:.1%} of a step" in (run / "report.html").read_text()


def test_a_mistake_in_the_job_is_one_line(job):
    done = mpitrain("bench", "job", job, "-n2", "--set", "mesh.pipes=2")
    assert done.code == 2
    (line,) = done.err.splitlines()
    assert "mesh.pipes: unknown key" in line
