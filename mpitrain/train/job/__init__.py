"""The job file: what to run, validated wholly before anything starts.  One file per section, and one for errors."""

from mpitrain.train.job.job import Job, job_reference
from mpitrain.train.job.userfile import load_object

__all__ = ["Job", "job_reference", "load_object"]
