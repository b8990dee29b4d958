"""How well the shipped jobs learn: `python tests/accuracy.py` prints the table of docs/results/accuracy.md."""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from sklearn.linear_model import Ridge

from mpitrain import data

JOBS = Path(__file__).resolve().parents[1] / "jobs"
RANKS = 2
SEEDS = (0, 1, 2)


def run(job: str, *settings: str, ranks: int = RANKS) -> dict[str, float]:
    """Train a shipped job with the command line; return its metrics and seconds."""
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "mpitrain", "run", str(JOBS / f"{job}.toml"), "-n", str(ranks)]
        command += ["--quiet", "--json", "--run-dir", f"{folder}/run", *(f"--set={setting}" for setting in settings)]
        done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
        if done.returncode:
            raise RuntimeError(f"{job}: exit code {done.returncode}\n{done.stderr}")
    result = json.loads(done.stdout)
    return {**result["metrics"], "seconds": result["seconds"]}


def over_seeds(job: str) -> list[dict[str, float]]:
    return [run(job, f"seed={seed}") for seed in SEEDS]


def over_folds(job: str, folds: int = 5) -> list[dict[str, float]]:
    return [run(job, f"data.folds={folds}", f"data.fold={fold}") for fold in range(folds)]


def ridge(seed: int) -> float:
    """R² of scikit-learn's ridge regression on the split of the job `diabetes`."""
    train, test = data.split(data.load("diabetes"), 0.2, seed=seed)
    scale = data.Standardise.fit(train)
    train, test = scale(train), scale(test)
    return float(Ridge(alpha=1.0).fit(train.inputs, train.targets).score(test.inputs, test.targets))


def rows() -> Iterator[tuple[str, str, str, str, float]]:
    """Yield job, what is measured, each value, the goal, and the longest run in seconds."""
    for job, goal in (("digits_cnn", "≥ 98.0"), ("digits_mlp", "≥ 96.5")):
        found = over_seeds(job)
        yield _row(job, "test accuracy in %, seeds 0 1 2", [100 * one["test_accuracy"] for one in found], goal, found)
    found = over_folds("breast_cancer")
    accuracies = [100 * one["test_accuracy"] for one in found]
    yield _row("breast_cancer", "test accuracy in %, 5 folds", accuracies, "≥ 96.0", found)
    found = over_seeds("diabetes")
    goal = "within 0.02 of ridge: " + " ".join(f"{ridge(seed):.4f}" for seed in SEEDS)
    yield _row("diabetes", "R², seeds 0 1 2", [one["test_r2"] for one in found], goal, found, digits=4)


def _row(
    job: str, what: str, values: list[float], goal: str, found: list[dict[str, float]], digits: int = 2
) -> tuple[str, str, str, str, float]:
    shown = " ".join(f"{value:.{digits}f}" for value in values)
    return job, what, f"{shown}; mean {np.mean(values):.{digits}f}", goal, max(one["seconds"] for one in found)


if __name__ == "__main__":
    print("| job | measured | found | goal | longest run |")
    print("|---|---|---|---|---|")
    for job, what, values, goal, seconds in rows():
        print(f"| {job} | {what} | {values} | {goal} | {seconds:.1f} s |", flush=True)
