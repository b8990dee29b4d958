from __future__ import annotations

import runpy
from pathlib import Path

import numpy as np
import pytest

from mpitrain.comm import LocalWorld
from mpitrain.train.job import Job

JOBS = Path(__file__).parents[2] / "jobs"
FILES = sorted(JOBS.glob("*.toml"))


def test_the_jobs_are_there():
    expected = {"breast_cancer", "diabetes", "digits_cnn", "digits_mlp", "gpt_pydoc", "text_bigram", "wine_by_feature"}
    assert expected <= {file.stem for file in FILES}


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
def test_a_shipped_job_is_valid_and_says_what_it_shows(file: Path):
    job = Job.load(file)
    assert job.name == file.stem
    assert Job.from_toml(job.to_toml(), "/elsewhere/other.toml") == job
    comment = file.read_text().split("\n\n[")[0]
    assert comment.startswith("# ")
    assert "It shows" in comment


def test_the_research_script_finds_the_first_component(monkeypatch: pytest.MonkeyPatch):
    script = runpy.run_path(str(JOBS / "research_allreduce.py"))
    data = script["measurements"](400, 5)
    eigenvalues = np.linalg.eigvalsh(np.cov(data.T, bias=True))
    for size in (1, 3):
        found = LocalWorld(size).run(lambda comm: script["first_component"](comm, data[comm.rank :: comm.size]))
        assert [variance for variance, _, _ in found] == pytest.approx([eigenvalues[-1]] * size, rel=1e-9)
