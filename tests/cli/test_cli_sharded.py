"""A fully sharded job from one end to the other: trained, continued in other ways on other ranks, and made use of."""

import pytest
from commands import mpitrain, settings

JOB = """
dtype = "float64"

[data]
source = "text"
path = "a.txt"
hold_out = "end"

[data.options]
context = 8
stride = 4

[model]
kind = "gpt"
layers = 2
width = 8
heads = 2
dropout = 0.1

[optimizer]
kind = "adamw"

[train]
batch_size = 8

[train.checkpoint]
every_steps = 3
"""


def run(folder, ranks, steps, stage, *options):
    method = {"method__kind": "gradient", "method__stage": stage} if stage else {}
    launched = ("-n", str(ranks)) if ranks > 1 else ()
    fixed = (*settings(train__steps=steps, **method), "--json", "--quiet")
    done = mpitrain("run", *launched, "job.toml", *fixed, *options, cwd=folder)
    assert done.code == 0, done.err
    return done.result


@pytest.mark.slow
def test_a_sharded_run_goes_on_as_any_other_and_ends_as_on_one_rank(tmp_path):
    """On three ranks a batch of eight is uneven."""
    (tmp_path / "a.txt").write_text("the cat sat on the mat and the dog sat on the log. " * 40)
    (tmp_path / "job.toml").write_text(JOB)
    run(tmp_path, 3, 3, 2, "--run-dir", "run")
    last = run(tmp_path, 2, 6, 3, "--resume", "run")
    alone = run(tmp_path, 1, 6, None, "--run-dir", "alone")
    assert last["steps"] == 6
    assert last["loss"] == pytest.approx(alone["loss"], rel=1e-10)
    assert last["metrics"] == pytest.approx(alone["metrics"], rel=1e-10)
    text = mpitrain("generate", "run", "the cat", "--length", "9", cwd=tmp_path).out
    assert text.startswith("the cat")
    assert len(text) == len("the cat") + 9 + 1
