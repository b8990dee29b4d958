"""A small job that the trainer's tests load with changes."""

import json

import pytest
from commands import write_job

from mpitrain.train import Job, session


@pytest.fixture
def no_pictures(monkeypatch):
    """The report has tests of its own, and pictures take long."""
    monkeypatch.setattr(session, "write_report", lambda path: path / "report.html")


@pytest.fixture
def job_file(tmp_path):
    return write_job(tmp_path)


@pytest.fixture
def load(job_file):
    """Return a function that loads the job with changes: ``load(train__steps=3)``."""

    def load(**changes):
        text = [f"{key.replace('__', '.')}={json.dumps(value)}" for key, value in changes.items()]
        return Job.load(job_file, text)

    return load
