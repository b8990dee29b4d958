"""Runs ``mpitrain`` as a user does, alone or under ``mpiexec``, and gives small jobs to run."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from mpitrain.comm.launch import launch_command

TIMEOUT_S = 60.0
MPITRAIN = (sys.executable, "-m", "mpitrain")

JOB = """
[data]
source = "npz"
path = "data.npz"

[model]
kind = "mlp"
hidden = [12]
batch_norm = true
dropout = 0.2

[optimizer]
kind = "adam"
lr = 0.01

[train]
batch_size = 16
steps = 24
log_every_steps = 4
evaluate_every_steps = 6

[train.checkpoint]
every_steps = 6
"""


@dataclass(frozen=True)
class Done:
    """A command that has ended."""

    code: int
    out: str
    err: str
    seconds: float

    @property
    def result(self) -> dict[str, Any]:
        """The one JSON object that ``--json`` leaves on standard output, where nothing else may be."""
        found: dict[str, Any] = json.loads(self.out)
        return found


def mpitrain(*arguments: str | Path, under: int = 0, cwd: Path | None = None, timeout_s: float = TIMEOUT_S) -> Done:
    """Run the command line; with ``under``, as that many ranks of a plain mpiexec."""
    with started(*arguments, under=under, cwd=cwd) as process:
        return process.end(timeout_s)


class Running:
    """A command that was started, and everything that it starts."""

    def __init__(self, argv: Sequence[str], env: dict[str, str], cwd: Path | None) -> None:
        self._began = time.monotonic()
        self.process = subprocess.Popen(
            argv, env=env, cwd=cwd, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )

    def end(self, timeout_s: float = TIMEOUT_S) -> Done:
        """Wait for the end."""
        out, err = self.process.communicate(timeout=timeout_s)
        return Done(self.process.returncode, out, err, time.monotonic() - self._began)

    def wait_for(self, condition: Callable[[], bool], timeout_s: float = TIMEOUT_S) -> None:
        """Wait until something is so, or the command has ended."""
        deadline = time.monotonic() + timeout_s
        while not condition() and self.process.poll() is None:
            assert time.monotonic() < deadline, "nothing happened in time"
            time.sleep(0.005)

    def has_ranks(self) -> bool:
        """Tell whether the launcher has started a rank, however far that has come."""
        mpitrain = "\0".join(MPITRAIN).encode()
        for pid in _descendants(self.process.pid):
            with suppress(FileNotFoundError, ProcessLookupError):  # it has just ended
                line = Path(f"/proc/{pid}/cmdline").read_bytes()
                # what the command forks has the command's own line, without that file, until it is another program
                if line.startswith(mpitrain) and b"--exit-code" in line:
                    return True
        return False

    def kill(self) -> None:
        """Kill the command and all that it has started, at once: what a power cut or the end of a Slurm job does."""
        family = [self.process.pid, *_descendants(self.process.pid)]
        for number in (signal.SIGSTOP, signal.SIGKILL):  # none may see another one die
            for pid in family:
                try:
                    os.kill(pid, number)
                except ProcessLookupError:
                    continue
        self.process.wait()


@contextmanager
def started(
    *arguments: str | Path, under: int = 0, cwd: Path | None = None, program: Sequence[str] = MPITRAIN
) -> Iterator[Running]:
    """Start the command line, or another program; what is left of it at the end of the block is killed."""
    argv, env = [*program, *map(str, arguments)], dict(os.environ)
    if under:
        argv, env = launch_command(under, argv)
    env.setdefault("OMP_NUM_THREADS", "1")  # BLAS threads of small models wait for each other where cores are busy
    env.setdefault("OMPI_MCA_btl", "^ofi")  # Open MPI else looks a second long for networks
    running = Running(argv, env, cwd)
    try:
        yield running
    finally:
        if running.process.poll() is None:
            running.kill()
        for stream in (running.process.stdout, running.process.stderr):
            assert stream is not None
            stream.close()


def _descendants(pid: int) -> list[int]:
    children: dict[int, list[int]] = {}
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            parent = int(stat.read_text().rpartition(")")[2].split()[1])
        except OSError:
            continue  # it has just ended
        children.setdefault(parent, []).append(int(stat.parent.name))
    found = list(children.get(pid, ()))
    for child in found:
        found.extend(children.get(child, ()))
    return found


def write_data(folder: Path, rows: int = 120) -> Path:
    """Write a data set of three classes that a small model learns."""
    rng = np.random.default_rng(0)
    labels = rng.integers(0, 3, rows)
    path = folder / "data.npz"
    np.savez(path, inputs=rng.normal(size=(rows, 5)) + labels[:, None], targets=labels)
    return path


def write_job(folder: Path, text: str = JOB, rows: int = 120) -> Path:
    """Write a job and its data, and return the job file."""
    write_data(folder, rows)
    path = folder / "job.toml"
    path.write_text(text)
    return path


def metrics(run: Path) -> list[dict[str, Any]]:
    """Return the records of a run; a last line that is being written is left out."""
    path = run / "metrics.jsonl"
    lines = path.read_text().splitlines(keepends=True) if path.exists() else []
    return [json.loads(line) for line in lines if line.endswith("\n")]


def settings(**overrides: Any) -> list[str]:
    """Return ``--set`` arguments; ``train__steps=3`` is ``--set=train.steps=3``."""
    return [f"--set={key.replace('__', '.')}={json.dumps(value)}" for key, value in overrides.items()]
