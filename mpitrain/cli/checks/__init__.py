"""What ``mpitrain doctor`` looks at, in the order in which it is printed; one function each."""

from mpitrain.cli.checks import devices, host, mpi, python, reductions, slurm, start, world
from mpitrain.cli.checks.finding import Check

BEFORE: tuple[tuple[str, Check], ...] = (
    ("Python", python.python),
    ("mpitrain", python.package),
    ("NumPy", python.numpy),
    ("loops", python.loops),
    ("extras", python.extras),
    ("encoding", python.encoding),
    ("conda", python.conda),
    ("mpi4py", mpi.mpi4py),
    ("MPI library", mpi.library),
    ("launcher", mpi.launcher),
    ("mpiexec", mpi.first_on_path),
    ("MPI settings", mpi.settings),
    ("root", mpi.root),
    ("Slurm", slurm.allocation),
    ("srun", slurm.plugin),
    ("GPU", host.gpu),
    ("transports", devices.transport),
    ("TMPDIR", host.temporary),
    ("memlock", host.locked_memory),
)
"""Checks that start no MPI: what they find is printed even where MPI then takes the process down."""

AFTER: tuple[tuple[str, Check], ...] = (
    ("MPI start", start.start),
    ("launch", start.launch),
    ("versions", world.versions),
    ("ranks", world.layout),
    ("threads", world.threads),
    ("/dev/shm", world.shared_memory),
    ("reductions", reductions.transport),
    ("tuning", reductions.tuning),
)
"""Checks of what the ranks told (`mpitrain.cli.checks.survey.Survey`)."""

PROBE: tuple[tuple[str, Check], ...] = (("GPU probe", devices.probe),)
"""What is tried only where someone asks for it."""
