"""Finding the MPI library and its launcher, and starting more ranks than there are CPUs."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from mpitrain._errors import InputError, LaunchError
from mpitrain.comm import launch as launching

Launch = Callable[..., tuple[int | None, str]]


def executable(path: Path, says: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"#!/bin/sh\necho '{says}'\n")
    path.chmod(0o755)
    return path


@pytest.fixture
def site(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A machine whose MPI library is an MPICH under a prefix of its own."""
    found = launching.Library("MPICH Version: 4.2.0", "mpich", tmp_path / "site/lib/libmpi.so.12")
    monkeypatch.setattr(launching, "library", lambda: found)
    monkeypatch.setenv("PATH", str(tmp_path / "path"))
    launching.find_launcher.cache_clear()
    yield tmp_path
    launching.find_launcher.cache_clear()


def test_library_starts_no_mpi() -> None:
    code = "import sys\nfrom mpitrain.comm import launch\nprint(launch.library().kind, 'mpi4py' in sys.modules)"
    printed = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()
    assert printed == [launching.library().kind, "False"]
    assert launching.library().path.name.startswith("libmpi")


def test_the_launcher_of_the_library_is_taken_and_not_the_first_on_the_path(site: Path) -> None:
    executable(site / "path/mpiexec", "mpiexec (OpenRTE) 4.1.4")
    own = executable(site / "site/bin/mpiexec", "HYDRA build details:")
    assert launching.find_launcher() == launching.Launcher(own, "mpich")
    argv, _ = launching.launch_command(3, ["python", "job.py"])
    assert argv == [str(own), "-n", "3", "python", "job.py"]


def test_a_launcher_on_the_path_of_the_right_kind(site: Path) -> None:
    own = executable(site / "path/mpiexec", "HYDRA build details:")
    assert launching.find_launcher().path == own


def test_no_launcher_of_the_right_kind_is_an_error(site: Path) -> None:
    executable(site / "path/mpiexec", "mpiexec (Open MPI) 5.0.8")
    with pytest.raises(LaunchError, match=r"no mpiexec found.*MPICH Version: 4\.2\.0.*srun"):
        launching.find_launcher()


@pytest.mark.parametrize(
    ("says", "kind"),
    [
        ("mpiexec (Open MPI) 5.0.8", "openmpi"),
        ("mpirun (Open MPI) 4.1.4", "openmpi"),
        ("HYDRA build details:\n  Version: 4.2", "mpich"),
        ("Intel(R) MPI Library for Linux* OS, based on MPICH", "intelmpi"),
        ("something else", "unknown"),
    ],
)
def test_kinds(says: str, kind: str) -> None:
    assert launching._kind(says) == kind


def test_crowded_and_roomy_open_mpi(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(launching, "find_launcher", lambda: launching.Launcher(Path("/mpiexec"), "openmpi"))
    monkeypatch.setattr(launching.os, "sched_getaffinity", lambda pid: {0, 1})
    monkeypatch.delenv("SLURM_JOB_NUM_NODES", raising=False)
    monkeypatch.delenv("OMPI_MCA_mpi_yield_when_idle", raising=False)
    argv, env = launching.launch_command(2, ["x"])
    assert argv == ["/mpiexec", "-n", "2", "--bind-to", "none", "x"]
    assert "OMPI_MCA_mpi_yield_when_idle" not in env
    argv, env = launching.launch_command(3, ["x"])
    assert argv == ["/mpiexec", "-n", "3", "--map-by", ":OVERSUBSCRIBE", "--bind-to", "none", "x"]
    assert env["OMPI_MCA_mpi_yield_when_idle"] == "1"
    monkeypatch.setenv("SLURM_JOB_NUM_NODES", "2")
    assert "--map-by" not in launching.launch_command(3, ["x"])[0]
    monkeypatch.setattr(launching.os, "geteuid", lambda: 0)
    assert launching.launch_command(1, ["x"])[1]["OMPI_ALLOW_RUN_AS_ROOT"] == "1"


def test_refuses_no_ranks() -> None:
    with pytest.raises(InputError, match="got 0"):
        launching.launch_command(0, ["x"])


def test_one_world_of_more_ranks_than_cpus_under_a_long_tmpdir(launch: Launch, tmp_path: Path) -> None:
    long = tmp_path / ("x" * 60) / ("y" * 60)
    long.mkdir(parents=True)
    code, output = launch(
        5, "from mpitrain.comm import world\nprint(f'{world().allreduce(1)} ', end='')", TMPDIR=str(long)
    )
    assert (code, output.split()) == (0, ["5"] * 5)


def test_a_hung_launch_is_killed_with_all_its_ranks(launch: Launch, tmp_path: Path) -> None:
    source = "import time, sys\nfrom mpitrain.comm import world\nworld().barrier()\ntime.sleep(600)"
    code, _ = launch(2, source, timeout_s=3)
    assert code is None
    left = [p for p in Path("/proc").glob("[0-9]*/cmdline") if str(tmp_path).encode() in _read(p)]
    assert left == []


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError:
        return b""
