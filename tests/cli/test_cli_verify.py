"""``mpitrain verify``: what it prints and returns, of methods that are right and of a model that is not."""

from pathlib import Path

import pytest
from commands import mpitrain, settings, write_job

from mpitrain.cli.verify import Side, _settings, side
from mpitrain.train import Job

MODEL = """
import mpitrain
from mpitrain import nn

class Partial(nn.Network):
    '''Its last bias has a gradient that depends on how the batch is shared out.'''

    def loss_and_gradients(self, params, batch, grads, rng, reduce=None):
        found = super().loss_and_gradients(params, batch, grads, rng, reduce)
        grads.tree["2"]["bias"][...] += mpitrain.world().rank
        return found

def build():
    layer = nn.Sequential(nn.Linear(5, 4), nn.ReLU(), nn.Linear(4, 3))
    return Partial(layer, nn.CrossEntropy(), "float64")
"""


@pytest.fixture
def job(tmp_path):
    return write_job(tmp_path)


@pytest.fixture
def broken(job):
    job.with_name("my.py").write_text(MODEL)
    text = job.read_text()
    model = text[text.index("[model]") : text.index("[optimizer]")]
    job.write_text(text.replace(model, '[model]\nbuild = "my.py:build"\n\n'))
    return job


def test_a_model_that_depends_on_the_rank_is_found_and_its_tensor_named(broken):
    done = mpitrain("verify", broken, "-n", "2", "--steps", "3", "--json", *settings(model__loss="cross_entropy"))
    assert (done.code, done.err) == (1, "")
    result = done.result
    assert result["equal"] is False
    assert (result["first"]["what"], result["first"]["tensor"], result["first"]["step"]) == ("gradient", "2.bias", 1)
    assert result["first"]["size"] == pytest.approx(3**0.5 / 16)  # 1 too much in three elements, of 16 samples
    assert {each["name"] for each in result["tensors"] if each["gradient"] > result["tolerance"]} == {"2.bias"}
    assert len(result["losses"]) == len(result["norms"]) == 3


@pytest.mark.slow
def test_the_same_in_words(broken):
    done = mpitrain("verify", broken, "-n", "2", "--steps", "3")
    assert done.code == 1
    *_, row, _, verdict = done.out.splitlines()
    assert row.split("│")[1].strip() == "2.bias"
    assert "✗" in row
    assert verdict.startswith("DIFFERS first at step 1 in the gradient of 2.bias: off by 0.108, ")


@pytest.mark.slow
@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"method__kind": "gradient", "method__stage": 2},
        {"mesh__tensor": 3},
        {"mesh__pipe": 3, "method__kind": "pipeline", "method__cuts": [1, 2]},
    ],
    ids=["data-parallel", "gradient-parallel", "tensor-parallel", "pipeline"],
)
def test_a_method_is_the_serial_run(job, changes):
    done = mpitrain("verify", job, "-n", "3", "--steps", "8", *settings(**changes))
    assert (done.code, done.err) == (0, "")
    title, loss, *_, verdict = done.out.splitlines()
    assert title == f"{job}, 3 ranks against serial: 8 steps in float64, equal if within 1e-10 of the norm"
    assert loss.startswith("loss: largest difference ")
    assert verdict == "equal"
    assert "✗" not in done.out


@pytest.mark.parametrize(("cuts", "other"), [("[1, 2]", ("method.cuts=counted",)), ('"measured"', ())])
def test_cuts_that_fit_one_number_of_stages_are_those_of_the_parallel_run(job, cuts, other):
    given = ('method.kind="pipeline"', f"method.cuts={cuts}")
    sides = Side("3 ranks", 3), side("serial")
    parallel, serial = _settings(Job.load(job, given), given, sides)
    assert parallel == given
    assert serial == (*given, "mesh={}", "mesh.pipe=1", *other)


def test_a_layout_that_divides_tensors_divides_the_sequence_as_the_job_does():
    given = ("mesh.tensor=2", "mesh.sequence_parallel=true")
    job = Path(__file__).resolve().parents[2] / "jobs" / "gpt_pydoc.toml"
    sides = side("data=2,tensor=2"), side("serial")
    meshes = [Job.load(job, each).mesh for each in _settings(Job.load(job, given), given, sides)]
    assert [(mesh.tensor, mesh.sequence_parallel) for mesh in meshes] == [(2, True), (1, False)]
    plain = _settings(Job.load(job), (), sides)
    assert not any(Job.load(job, each).mesh.sequence_parallel for each in plain)


@pytest.mark.slow
def test_a_reproducible_job_is_compared_to_the_bit(job):
    fixed = ["--steps", "6", "--json", *settings(reproducible=True, lanes=4)]
    done = mpitrain("verify", job, "--mesh", "data=3", "--against", "data=2", *fixed)
    assert done.code == 0, done.err
    assert (done.result["tolerance"], done.result["dtype"]) == (0, "float32")
    assert (done.result["layout"], done.result["against"]) == ("data=3", "data=2")
    assert all(each["gradient"] == each["weights"] == 0 for each in done.result["tensors"])


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["data_parallel", "gradient"])
def test_ranks_and_their_layout_may_both_be_said(job, kind):
    """A schedule of pipelines is no mistake where the other run has one stage."""
    pipeline = settings(mesh__pipe=4, method__schedule="zb-h1", method__microbatches=2, method__kind=kind)
    fixed = ["--steps", "3", "--json", *pipeline]
    done = mpitrain("verify", job, "-n", "4", "--mesh", "data=2,pipe=2", *fixed)
    assert done.code == 0, done.err
    assert (done.result["layout"], done.result["against"], done.result["equal"]) == ("data=2,pipe=2", "serial", True)


@pytest.mark.slow
def test_the_user_chooses_the_tolerance_and_the_dtype(job):
    fixed = ["-n", "2", "--steps", "3", "--json", *settings(dtype="float32")]
    assert mpitrain("verify", job, *fixed).result["tolerance"] == 1e-3
    done = mpitrain("verify", job, *fixed, "--tolerance", "0")
    assert done.code == 1
    assert 0 < done.result["first"]["relative"] < 1e-5


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["-n", "2", "--mesh", "data=3"], "--mesh data=3 has 3 ranks, not the 2 of -n; leave out one of them"),
        (["--mesh", "data"], "layout 'data': cannot be understood"),
        (
            ["--set", "method.average_every=5"],
            "method.average_every: the result of local SGD depends on the number of ranks; got 5; verify the rest",
        ),
        pytest.param(["--against", "data=2,data=2"], "layout 'data=2,data=2': cannot", marks=pytest.mark.slow),
        pytest.param(["--set", "train.batch=3"], "train.batch: unknown key", marks=pytest.mark.slow),
    ],
)
def test_what_is_wrong_is_said_in_one_line(job, arguments, message):
    done = mpitrain("verify", job, *arguments)
    assert done.code == 2
    assert message in done.err
    assert "Traceback" not in done.err


@pytest.mark.slow
def test_what_ranks_find_wrong_is_said_once(job):
    done = mpitrain("verify", job, "-n", "3", *settings(reproducible=True, lanes=2))
    assert done.code == 2
    (line,) = done.err.splitlines()
    assert "more ranks than lanes; got 3 ranks, 2 lanes" in line


@pytest.mark.slow
def test_ranks_that_a_launcher_started_do_not_start_others(job, monkeypatch):
    monkeypatch.setenv("OMPI_COMM_WORLD_SIZE", "2")
    done = mpitrain("verify", job)
    assert done.code == 2
    assert "a launcher has already started some" in done.err
