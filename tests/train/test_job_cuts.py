"""Where a job's pipeline is cut: what the file may say, who measures what, what is kept, and runs that change it."""

from __future__ import annotations

import json
from collections.abc import Sequence
from itertools import combinations, count, pairwise
from pathlib import Path
from statistics import fmean
from typing import Any

import numpy as np
import pytest

from mpitrain._errors import InputError, JobError
from mpitrain.arrays import Batch
from mpitrain.comm import Communicator, LocalWorld
from mpitrain.parallel import PipelineParallel
from mpitrain.parallel.pipeline import UnitTimes
from mpitrain.train import cutting
from mpitrain.train.assembly import assemble
from mpitrain.train.bench.job import memory_of
from mpitrain.train.job import Job
from mpitrain.train.report import write_report
from mpitrain.train.session import train_job

TOML = """
[data]
source = "digits"
[model]
kind = "cnn"
channels = [4, 4]
hidden = 8
[optimizer]
kind = "adam"
[method]
microbatches = 4
[train]
steps = 4
batch_size = 64
"""

LAYERS = 12


def job(*settings: str) -> Job:
    return Job.from_toml(TOML, "a.toml", settings)


PIPELINE = 'method.kind="pipeline"'


@pytest.mark.parametrize("cuts", ["counted", "measured", (3,), (3, 7), ()])
def test_the_resolved_file_says_the_same(cuts):
    said = f'"{cuts}"' if isinstance(cuts, str) else str(list(cuts))
    found = job(PIPELINE, f"method.cuts={said}")
    assert found.method.cuts == cuts
    assert Job.from_toml(found.to_toml(), "b.toml").method.cuts == cuts
    assert job().method.cuts == "counted"


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (
            [PIPELINE, 'method.cuts="measure"'],
            'method.cuts: is not where a model can be cut; got "measure"; expected "counted", "measured" or array of '
            'ascending (integer ≥ 1); did you mean "measured"?',
        ),
        ([PIPELINE, "method.cuts=3"], "method.cuts: is not where a model can be cut; got 3; expected"),
        (
            [PIPELINE, "method.cuts=[7, 3]"],
            "method.cuts: are not numbers of layers in ascending order; got [7, 3]; expected",
        ),
        ([PIPELINE, "method.cuts=[0, 3]"], "are not numbers of layers in ascending order; got [0, 3]"),
        ([PIPELINE, "method.cuts=[true]"], "are not numbers of layers in ascending order; got [true]"),
        (["method.cuts=[3]"], "is where a pipeline is cut; got [3]; expected method.kind"),
        (['method.cuts="measured"'], 'is where a pipeline is cut; got "measured"; expected method.kind'),
        ([PIPELINE, 'method.cuts="measured"', 'device="gpu"'], 'is timed on the CPU only; got "measured"'),
        ([PIPELINE, "method.cut=[3]"], 'did you mean "cuts"?'),
    ],
)
def test_what_does_not_fit_is_said_in_one_line(settings: list[str], message: str):
    with pytest.raises(JobError) as caught:
        job(*settings)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_cuts_for_other_ranks_or_layers_are_said():
    given = job(PIPELINE, "method.cuts=[3]")
    with pytest.raises(InputError, match=r"do not make 3 stages of 12 layers; got \[3\]; expected 2 ascending"):
        LocalWorld(3, timeout_s=10).run(lambda comm: assemble(given, comm))


def largest(costs: Sequence[float], cuts: Sequence[int]) -> float:
    return max(sum(costs[start:stop]) for start, stop in pairwise((0, *cuts, len(costs))))


@pytest.mark.parametrize(
    ("settings", "own", "rows"),
    [
        ([], [[*range(3)], [*range(3, LAYERS)]], 8),
        (["reproducible=true", "lanes=3"], [[*range(3)], [*range(3, LAYERS)]], 6),
        (['method.schedule="interleaved"', "method.chunks=2"], [[0, 3], [1, 2, *range(4, LAYERS)]], 8),
        (['precision.compute="float16"', "precision.emulate=true"], [[*range(3)], [*range(3, LAYERS)]], 8),
    ],
    ids=["two stages", "lanes", "four stages", "float16"],
)
def test_ranks_measure_the_stages_of_counted_cost_and_agree(monkeypatch, settings, own, rows):
    """Four ranks, no two of which find the same times; the cuts are the best that there are for the mean of these."""
    numbers, found = count(), list[tuple[list[int], int, int]]()

    def measured(network: Any, batch: Batch, repeats: int, *, only: list[int], dtype: Any) -> list[UnitTimes]:
        assert dtype == (np.float16 if "precision.emulate=true" in settings else None)
        slower = next(numbers)
        found.append((only, slower, len(batch)))
        return [UnitTimes(1.0 + layer * 7 % 5, slower, 0.0) for layer in only]

    def assembled(comm: Communicator) -> PipelineParallel:
        parts = assemble(job("mesh.pipe=2", "mesh.data=2", 'method.cuts="measured"', *settings), comm)
        assert isinstance(parts.method, PipelineParallel)
        return parts.method

    monkeypatch.setattr(cutting, "measured", measured)
    methods = LocalWorld(4, timeout_s=20).run(assembled)
    assert sorted(only for only, _, _ in found) == sorted(own * 2)
    assert {each for _, _, each in found} == {rows}
    costs = [1.0 + layer * 7 % 5 + fmean(s for only, s, _ in found if layer in only) for layer in range(LAYERS)]
    every = combinations(range(1, LAYERS), methods[0].sizes.stages - 1)
    best = min(largest(costs, cuts) for cuts in every)
    for method in methods:
        assert method.costs == pytest.approx(costs)
        assert method.cuts == methods[0].cuts
        assert largest(costs, method.cuts) == pytest.approx(best)


def test_one_stage_measures_nothing(monkeypatch):
    monkeypatch.delattr(cutting, "measured")
    (cuts,) = LocalWorld(1).run(lambda comm: cuts_of(comm, job(PIPELINE, 'method.cuts="measured"')))
    assert cuts == ()


def cuts_of(comm: Communicator, job: Job) -> tuple[int, ...]:
    method = assemble(job, comm).method
    assert isinstance(method, PipelineParallel)
    return method.cuts


def trained(ranks: int, settings: Sequence[str], **options: Any) -> dict[str, Any]:
    return LocalWorld(ranks, timeout_s=20).run(lambda comm: train_job(job(*settings), comm, report=False, **options))[0]


def test_a_run_says_where_it_is_cut(tmp_path: Path):
    for name, cuts, by in (("given", "[3]", "given"), ("measured", '"measured"', "measured")):
        found = trained(2, [PIPELINE, f"method.cuts={cuts}"], run_dir=tmp_path / name)
        facts = json.loads((tmp_path / name / "environment.json").read_bytes())["pipeline"]
        assert facts["by"] == by
        assert facts["cuts"] == found["cuts"]
        assert facts["layers"][:3] == ["0 Conv2d", "1 BatchNorm", "2 ReLU"]
        assert len(facts["layers"]) == LAYERS
        assert ("costs" in facts) == (by == "measured")
        if by == "measured":
            assert sum(facts["costs"]) == pytest.approx(1)
        row = f"<th>pipeline cut at layers</th><td>{found['cuts'][0]}</td>"
        assert row in write_report(tmp_path / name).read_text()
    assert "cuts" not in trained(1, [], run_dir=tmp_path / "alone")
    assert "pipeline" not in json.loads((tmp_path / "alone" / "environment.json").read_bytes())


def test_so_does_the_title():
    def title(comm: Communicator, *settings: str) -> str:
        return assemble(job(*settings), comm).title

    assert LocalWorld(3).run(title, PIPELINE, "method.cuts=[3, 7]")[0].endswith("pipe 3, cut at [3, 7] of 12 layers")
    assert LocalWorld(2).run(title, PIPELINE)[0].endswith("data 1 × pipe 2, cut at [3] of 12 layers by counted cost")
    assert LocalWorld(1).run(title, PIPELINE)[0].endswith("data 1 × pipe 1")


def test_a_run_goes_on_with_other_cuts_and_ends_with_the_same_bits(tmp_path: Path):
    bits, run = ["reproducible=true", "lanes=4"], tmp_path / "run"
    trained(2, [PIPELINE, "method.cuts=[9]", "train.steps=2", *bits], run_dir=run)
    trained(3, [PIPELINE, "method.cuts=[1, 2]", "train.steps=3", *bits], resume=run)
    resumed = trained(2, [PIPELINE, 'method.cuts="measured"', *bits], resume=run)
    assert resumed["steps"] == 4
    assert resumed["weights_sha256"] == trained(1, bits, run_dir=tmp_path / "alone")["weights_sha256"]


def test_predicted_memory_is_that_of_the_stages_that_there_are():
    """Under 1F1B the first rank keeps two microbatches: little where it has one layer, and much where it has eleven."""

    def activations(comm: Communicator, cut: int) -> Any:
        small = job("mesh.pipe=2", f"method.cuts=[{cut}]")
        return memory_of(comm, small, assemble(small, comm))["activations"].predicted_bytes

    early, late = (LocalWorld(2, timeout_s=20).run(activations, cut)[0] for cut in (1, 11))
    assert 1.5 * early < late < 2 * early


@pytest.mark.mpi
def test_ranks_of_a_world_agree_on_what_they_measured(world, tmp_path):
    """And no bit depends on it."""
    bits = ["reproducible=true", "lanes=4", "train.steps=2"]
    given = job(PIPELINE, 'method.cuts="measured"', *bits)
    cuts = world.allgather_object(cuts_of(world, given))
    assert cuts == [cuts[0]] * world.size
    found = train_job(given, world, run_dir=world.broadcast_object(tmp_path / "run"), report=False)
    (alone,) = LocalWorld(1).run(
        lambda comm: train_job(job(*bits), comm, run_dir=tmp_path / f"alone-{world.rank}", report=False)
    )
    assert found["weights_sha256"] == alone["weights_sha256"]
