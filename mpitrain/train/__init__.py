"""Training: `Job` (what to run) → `Trainer` → run directory (metrics, checkpoints, report)."""

from mpitrain.train.assembly import Assembly, assemble
from mpitrain.train.job import Job, job_reference
from mpitrain.train.observer import Observer
from mpitrain.train.predictor import Predictor
from mpitrain.train.rundir import RunDirectory
from mpitrain.train.session import load_job, train_job
from mpitrain.train.sweep import sweep_job
from mpitrain.train.trainer import Trainer

__all__ = [
    "Assembly",
    "Job",
    "Observer",
    "Predictor",
    "RunDirectory",
    "Trainer",
    "assemble",
    "job_reference",
    "load_job",
    "sweep_job",
    "train_job",
]
