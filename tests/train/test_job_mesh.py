"""Ranks on a mesh by job file: what a line gives, what is refused, and runs that are divided in other ways later."""

from __future__ import annotations

from contextlib import nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mpitrain._errors import JobError
from mpitrain.comm import Communicator, LocalWorld
from mpitrain.parallel import DataParallel, GradientParallel, GradientPipelineParallel, PipelineParallel
from mpitrain.parallel.tensor import TensorNetwork
from mpitrain.train.assembly import assemble
from mpitrain.train.comparison import compare
from mpitrain.train.generate import generate
from mpitrain.train.job import Job
from mpitrain.train.predictor import Predictor
from mpitrain.train.record import record
from mpitrain.train.resumption import check_same_job
from mpitrain.train.session import train_job

TOML = """
dtype = "float64"
[data]
source = "text"
path = "TEXT"
hold_out = "end"
test = 0.2
[data.options]
context = 6
[model]
kind = "gpt"
layers = 1
width = 12
heads = 3
dropout = 0.1
[optimizer]
kind = "adam"
[train]
batch_size = 5
steps = 4
evaluate_every_steps = 2
"""


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "text.txt"
    path.write_text("the quick brown fox jumps over the lazy dog; " * 12)
    return path


def job(file: Path, *settings: str) -> Job:
    return Job.from_toml(TOML.replace("TEXT", str(file)), "a.toml", settings)


@pytest.mark.parametrize(
    ("settings", "size", "data", "tensor"),
    [
        ([], 3, 3, None),
        (["mesh.tensor=2"], 4, 2, 2),
        (["mesh.tensor=2", "mesh.data=2", 'method.kind="gradient"', "method.stage=2"], 4, 2, 2),
        (["mesh.tensor=3", "mesh.sequence_parallel=true", "train.batch_size=2"], 3, 1, 3),
    ],
)
def test_a_line_puts_the_ranks_on_a_mesh(file: Path, settings: list[str], size: int, data: int, tensor: int | None):
    def check(comm: Communicator) -> None:
        parts = assemble(job(file, *settings), comm)
        method: Any = parts.method
        assert isinstance(method, GradientParallel if "method.stage=2" in settings else DataParallel)
        assert method.comm.size == data
        assert (method.across.size if method.across else None) == tensor
        assert isinstance(parts.model, TensorNetwork) == (tensor is not None)
        assert f"{parts.model.layout.global_parameter_count:,} parameters" in parts.title
        if tensor:
            assert f"on {size} ranks, data {data} × tensor {tensor}" in parts.title
            terms = {name for each in parts.model.layout for name in each.axes if name != "data"}
            assert terms == ({"tensor"} if "mesh.sequence_parallel=true" in settings else set())

    LocalWorld(size).run(check)
    assert Job.from_toml(job(file, *settings).to_toml(), "b.toml").mesh == job(file, *settings).mesh


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (
            ["mesh.data=2", "mesh.tensor=3"],
            "mesh.data = 2, mesh.tensor = 3: mesh 2×3 needs 6 ranks, got 4; start 6 ranks, or leave out mesh.data",
        ),
        (["mesh.tensor=3"], "4 ranks are no multiple of mesh.tensor = 3; start a multiple of 3 ranks"),
        (["mesh.data=3"], "mesh.data = 3, mesh.tensor = 1: mesh 3×1 needs 3 ranks, got 4; start 3 ranks"),
        (["mesh.pipe=3"], "4 ranks are no multiple of mesh.pipe = 3; start a multiple of 3 ranks"),
        (
            ["mesh.pipe=2", "mesh.tensor=3"],
            "4 ranks are no multiple of mesh.pipe = 2 × mesh.tensor = 3; start a multiple of 6",
        ),
        (["mesh.pipe=2", "mesh.data=3"], "mesh.pipe = 2, mesh.data = 3: mesh 2×3 needs 6 ranks, got 4; start 6 ranks"),
        (['method.kind="pipeline"', "mesh.data=3"], "4 ranks are no multiple of mesh.data = 3; start a multiple"),
    ],
)
def test_another_number_of_ranks_than_the_mesh_needs_is_said(file: Path, settings: list[str], message: str):
    with pytest.raises(JobError) as caught:
        LocalWorld(4).run(lambda comm: assemble(job(file, *settings), comm))
    assert message in str(caught.value)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (["mesh.tensor=4"], "--set: mesh.tensor: is more than the attention heads; got 4; expected at most 3"),
        (["mesh.tensor=0"], "mesh.tensor: is too small; got 0; expected integer ≥ 1"),
        (
            ["mesh.tensors=2"],
            "mesh.tensors: unknown key; expected one of data, pipe, tensor, sequence_parallel; did you mean",
        ),
        (["mesh.sequence_parallel=true"], "mesh.sequence_parallel: needs ranks that divide the model; got true"),
        (["mesh.tensor=2", 'method.codec="fp16"'], "method.codec.kind: does not go with mesh.tensor > 1; got "),
        (["mesh.tensor=2", "reproducible=true"], "reproducible: does not go with mesh.tensor > 1; got true; expected "),
        (["mesh.tensor=2", "method.average_every=2"], "method.average_every: does not go with mesh.tensor > 1"),
        (
            ["mesh.tensor=2", "mesh.sequence_parallel=true", 'method.kind="gradient"', "method.stage=2"],
            "mesh.sequence_parallel: does not go with method.stage = 2; got true; expected false, or method.stage = 1",
        ),
        (["mesh.tensor=2", 'model.loss="my.py:loss"'], "model.loss: is not for scores that ranks divide, as mesh"),
        (["mesh.pipe=0"], "mesh.pipe: is too small; got 0; expected integer ≥ 1"),
        (
            ["mesh.pipe=2", 'method.kind="gradient"', "method.stage=2"],
            "method.stage: does not go with mesh.pipe > 1, where gradients are complete only after the last microbatch"
            "; got 2; expected 1; 1 divides the optimizer state of each stage; or leave out mesh.pipe",
        ),
        (["mesh.pipe=2", 'method.kind="gradient"', "method.stage=3"], "method.stage: does not go with mesh.pipe > 1"),
        (["mesh.pipe=2", 'method.codec="fp16"'], "method.codec.kind: does not go with mesh.pipe > 1; got "),
        (["mesh.pipe=2", "method.average_every=2"], "method.average_every: does not go with mesh.pipe > 1; got 2"),
        (
            ["mesh.pipe=2", "mesh.tensor=2", "reproducible=true"],
            "reproducible: does not go with mesh.tensor > 1; got true; expected false",
        ),
    ],
)
def test_what_does_not_fit_is_said_in_one_line(file: Path, settings: list[str], message: str):
    with pytest.raises(JobError) as caught:
        job(file, *settings)
    assert message in str(caught.value)


@pytest.mark.parametrize("model", ['kind = "cnn"', 'build = "my.py:build"'])
def test_a_model_that_cannot_be_divided_is_told_what_can_be_done(model: str):
    text = f'[data]\nsource = "digits"\n[model]\n{model}\n[optimizer]\nkind = "sgd"\n[train]\nsteps = 1\n'
    with pytest.raises(JobError) as caught:
        Job.from_toml(f"{text}[mesh]\ntensor = 2", "a.toml")
    kind = "build" if "build" in model else "cnn"
    assert f'mesh.tensor: cannot divide a model of kind "{kind}" (gpt and mlp can); got 2; expected 1; ' in (
        str(caught.value)
    )
    assert 'method.kind = "gradient" divides gradients and optimizer state of any model' in str(caught.value)


@pytest.mark.parametrize(("settings", "allowed"), [(["mesh.tensor=2"], True), (["model.width=15"], False)])
def test_a_run_may_go_on_on_another_mesh(tmp_path: Path, file: Path, settings: list[str], allowed: bool):
    (tmp_path / "job.toml").write_text(job(file).to_toml())
    with nullcontext() if allowed else pytest.raises(JobError, match="the job is not the one"):
        check_same_job(job(file, *settings), tmp_path)


def axes(comm: Communicator, job: Job) -> tuple[dict[str, int], str]:
    parts = assemble(job, comm)
    method: Any = parts.method
    assert isinstance(method, GradientPipelineParallel if job.method.kind == "gradient" else PipelineParallel)
    groups = {"data": method.data, "pipe": method.pipe, "tensor": method.across}
    return {name: group.size for name, group in groups.items() if group}, parts.title


@pytest.mark.parametrize(
    ("settings", "size", "expected", "words"),
    [
        (["mesh.pipe=2"], 2, {"data": 1, "pipe": 2}, "data 1 × pipe 2"),
        (["mesh.pipe=2"], 4, {"data": 2, "pipe": 2}, "data 2 × pipe 2"),
        (['method.kind="pipeline"'], 3, {"data": 1, "pipe": 3}, "data 1 × pipe 3"),
        (['method.kind="pipeline"', "mesh.data=2"], 4, {"data": 2, "pipe": 2}, "data 2 × pipe 2"),
        (['method.kind="pipeline"', "mesh.pipe=2", "mesh.data=2"], 4, {"data": 2, "pipe": 2}, "data 2 × pipe 2"),
        (["mesh.pipe=2", "mesh.data=2", 'method.kind="gradient"'], 4, {"data": 2, "pipe": 2}, "data 2 × pipe 2"),
        (["mesh.pipe=2", "mesh.tensor=2"], 4, {"data": 1, "pipe": 2, "tensor": 2}, "data 1 × pipe 2 × tensor 2"),
        (
            ["mesh.pipe=2", 'method.schedule="zb-h1"', "method.microbatches=2"],
            2,
            {"data": 1, "pipe": 2},
            "data 1 × pipe 2",
        ),
        (['method.kind="pipeline"'], 1, {"data": 1, "pipe": 1}, "data 1 × pipe 1"),
    ],
)
def test_a_line_cuts_the_model_into_stages(
    file: Path, settings: list[str], size: int, expected: dict[str, int], words: str
):
    found = LocalWorld(size).run(axes, job(file, *settings))
    assert found == [found[0]] * size
    assert found[0][0] == expected
    assert found[0][1].partition(", cut at ")[0].endswith(f"on {size} rank{'s' if size > 1 else ''}, {words}")


def test_neighbouring_ranks_share_a_stage(file: Path):
    """Along tensor, and then along data, for that is where most is sent."""

    def check(comm: Communicator) -> tuple[int, int, int]:
        method: Any = assemble(job(file, "mesh.pipe=2", "mesh.tensor=2", "mesh.data=2"), comm).method
        return method.pipe.rank, method.data.rank, method.across.rank

    assert LocalWorld(8).run(check) == list(np.ndindex(2, 2, 2))


def test_one_stage_is_no_pipeline(file: Path):
    def check(comm: Communicator) -> None:
        assert isinstance(assemble(job(file, "mesh.pipe=1", 'method.kind="gradient"'), comm).method, GradientParallel)

    LocalWorld(2).run(check)


DIVIDED = ('method.kind="gradient"',)
CLIPPED_LAMB = ("optimizer.clip_norm=0.1", 'optimizer.kind="lamb"')

PIPES: list[tuple[int, list[str]]] = [
    (4, ["mesh.data=2", "mesh.pipe=2"]),
    (6, ["mesh.pipe=3", "mesh.tensor=2", "optimizer.clip_norm=0.1", 'optimizer.kind="lamb"']),
    (8, ["mesh.data=2", "mesh.pipe=2", "mesh.tensor=2", "mesh.sequence_parallel=true", 'method.schedule="zb-h1"']),
    (4, ["mesh.data=2", "mesh.pipe=2", *DIVIDED, "optimizer.clip_norm=0.1"]),
    (8, ["mesh.data=2", "mesh.pipe=2", *DIVIDED, "mesh.tensor=2", "mesh.sequence_parallel=true", *CLIPPED_LAMB]),
]


@pytest.mark.parametrize(("size", "settings"), PIPES)
def test_every_tensor_of_a_model_in_stages_is_that_of_one_rank(file: Path, size: int, settings: list[str]):
    """With gradients of tied tensors, norms for clipping and of tensors, and terms of gradients, over all axes."""

    def recorded(comm: Communicator, *given: str) -> Any:
        return record(job(file, "method.microbatches=2", *given), comm, 2)

    ordinary = [each for each in settings if not each.startswith(("mesh", "method"))]
    (expected,) = LocalWorld(1).run(recorded, *ordinary)
    found, *_ = LocalWorld(size).run(recorded, *settings)
    assert compare(found, expected, 1e-10).first is None


@pytest.mark.parametrize("kind", [(), DIVIDED], ids=["replicated", "divided"])
def test_a_run_in_stages_goes_on_on_another_mesh(tmp_path: Path, file: Path, kind: tuple[str, ...]):
    def trained(comm: Communicator, *settings: str, **options: Any) -> dict[str, Any]:
        return train_job(job(file, *settings), comm, report=False, **options)

    whole = LocalWorld(1).run(lambda comm: trained(comm, run_dir=tmp_path / "whole"))[0]
    run, first = tmp_path / "run", ("mesh.pipe=2", "mesh.tensor=2", "mesh.data=2", "train.steps=1")
    LocalWorld(8).run(lambda comm: trained(comm, *first, *kind, run_dir=run))
    LocalWorld(3).run(lambda comm: trained(comm, "mesh.pipe=3", "train.steps=2", resume=run))
    LocalWorld(2).run(lambda comm: trained(comm, 'method.kind="gradient"', "train.steps=3", resume=run))
    results = LocalWorld(8).run(lambda comm: trained(comm, "mesh.pipe=2", "mesh.tensor=2", *kind, resume=run))
    assert results == [results[0]] * 8
    assert (results[0]["steps"], results[0]["ranks"]) == (4, 8)
    assert results[0]["metrics"] == pytest.approx(whole["metrics"], rel=1e-9)
    one, other = Predictor(tmp_path / "whole"), Predictor(run)
    np.testing.assert_allclose(other.params.flat, one.params.flat, rtol=1e-9, atol=1e-12)
    assert other.params.sha256() == results[0]["weights_sha256"]


def test_a_run_is_the_same_on_every_mesh_and_goes_on_on_another(tmp_path: Path, file: Path):
    def trained(comm: Communicator, *settings: str, **options: Any) -> dict[str, Any]:
        return train_job(job(file, *settings), comm, **options)

    whole = LocalWorld(1).run(lambda comm: trained(comm, run_dir=tmp_path / "whole"))[0]
    run, tensor = tmp_path / "run", ("mesh.tensor=2", 'method.kind="gradient"')
    LocalWorld(4).run(lambda comm: trained(comm, *tensor, "train.steps=2", run_dir=run))
    sequence = ("mesh.tensor=3", "mesh.sequence_parallel=true")
    results = LocalWorld(3).run(lambda comm: trained(comm, *sequence, resume=run))
    for result in results:
        assert result["steps"] == whole["steps"] == 4
        assert result["metrics"] == pytest.approx(whole["metrics"], rel=1e-9)
        assert result["weights_sha256"] == results[0]["weights_sha256"]
    one, other = Predictor(tmp_path / "whole"), Predictor(run)
    np.testing.assert_allclose(other.params.flat, one.params.flat, rtol=1e-9, atol=1e-12)
    assert other.params.sha256() == results[0]["weights_sha256"]
    assert generate(other, "the ", 9) == generate(one, "the ", 9)


def test_norms_of_tensors_that_ranks_hold_in_other_pieces_are_verified(file: Path):
    """The shards along data are cut elsewhere on each of the ranks that divide the model, here within positions."""
    settings = ["data.options.context=40", "model.width=6", 'method.kind="gradient"', "mesh.tensor=2"]

    def recorded(comm: Communicator, *more: str) -> Any:
        return record(job(file, *settings, *more), comm, 2)

    (found, *_), (expected,) = LocalWorld(4).run(recorded), LocalWorld(1).run(recorded, "mesh.tensor=1")
    assert compare(found, expected, 1e-10).first is None


@pytest.mark.slow
def test_a_perceptron_is_divided_by_a_job_too(tmp_path: Path):
    pytest.importorskip("sklearn")
    text = (
        'dtype = "float64"\n[data]\nsource = "wine"\n[model]\nkind = "mlp"\nhidden = [7, 5]\nbatch_norm = true\n'
        'dropout = 0.2\n[optimizer]\nkind = "adam"\n[train]\nsteps = 3\n'
    )

    def trained(comm: Communicator, *settings: str) -> dict[str, Any]:
        return train_job(Job.from_toml(text, "a.toml", settings), comm, run_dir=tmp_path / str(comm.size))

    made = [LocalWorld(1).run(trained)[0], LocalWorld(4).run(trained, "mesh.tensor=2")[0]]
    assert made[1]["metrics"] == pytest.approx(made[0]["metrics"], rel=1e-9)
    assert made[1]["confusion"] == made[0]["confusion"]
