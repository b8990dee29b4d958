"""``mpitrain run``: train a job, as one rank of a world, or as the parent that starts the world."""

from __future__ import annotations

import json
import shlex
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from tempfile import TemporaryDirectory
from types import FrameType
from typing import TYPE_CHECKING, Any

import click

from mpitrain import _env
from mpitrain._errors import INTERRUPTED, JobError, LaunchError, NonFiniteError
from mpitrain.cli.display import STYLES, headline, observer
from mpitrain.cli.init import job_names

if TYPE_CHECKING:
    from mpitrain.comm import Communicator

_SHOW_CURSOR = "\x1b[?25h"

_NOT_BEGUN = "interrupted before the first step; nothing was written"

_BY_SIGUSR1 = (128 + signal.SIGUSR1, signal.SIGUSR1, -signal.SIGUSR1, INTERRUPTED)
"""How a launcher ends for ranks that SIGUSR1 ended: one not as far as `take_part` (Open MPI's launcher, then MPICH's);
the launcher itself, which has started none; a rank on its way into MPI."""

_TWICE = "twice"
"""What is noted of a second Ctrl-C."""


@click.command("run", short_help="Train: run a job file on one rank, on N, or under mpirun and srun.")
@click.argument("job")
@click.option("-n", "--ranks", type=click.IntRange(min=1), help="Start N ranks with the MPI library's own mpiexec.")
@click.option("--set", "overrides", multiple=True, metavar="KEY=VALUE", help="Override a key, e.g. optimizer.lr=0.01.")
@click.option("--run-dir", type=click.Path(path_type=Path), help="Where the run is kept  [default: runs/NAME/…]")
@click.option("--resume", type=click.Path(path_type=Path), metavar="RUN", help="Continue the run in this directory.")
@click.option("--trace", is_flag=True, help="Write the timeline of all ranks to trace.json in the run's directory.")
@click.option("--quiet", is_flag=True, help="Show nothing until the end.")
@click.option("--json", "as_json", is_flag=True, help="End with one JSON object on standard output.")
@click.option("--progress", type=click.Choice(STYLES), default="auto", show_default=True,
              help="A bar on a terminal, else a line for each record.")  # fmt: skip
@click.option("--width", type=int, hidden=True, help="Columns of the terminal that the launcher hides.")
@click.option("--exit-code", type=click.Path(path_type=Path), hidden=True, help="File that takes the exit code.")
def command(ranks: int | None, quiet: bool, exit_code: Path | None, **options: Any) -> None:
    """Train what the file JOB (TOML) says.

    Without -n this is one rank, or one of those that mpirun or srun has started.
    """
    if options["run_dir"] and options["resume"]:
        raise click.UsageError("--resume goes on in the run's own directory; leave out --run-dir.")
    check_no_launcher(ranks)
    if quiet:
        options["progress"] = "none"
    if ranks is None or ranks == 1:
        take_part(exit_code, lambda comm: _train(comm, exit_code=exit_code, **options))
    else:
        sys.exit(_start(ranks, options))


def _start(ranks: int, options: dict[str, Any]) -> int:
    """Start the ranks, unless the job file is wrong; return the exit code."""
    try:
        from mpitrain.train import Job

        check_job_file(options["job"], ranks)
        Job.load(options["job"], options["overrides"])  # a mistake in it ends here, in one line
        return launch(ranks, ["run", *_arguments(options)])
    except KeyboardInterrupt:  # once there are ranks, they are told
        click.echo(_NOT_BEGUN, err=True)
        return INTERRUPTED


def check_no_launcher(ranks: int | None) -> None:
    """Refuse ``-n`` on a rank that a launcher has started: each would start ranks of its own."""
    launched = _env.launched_size()
    if ranks is not None and launched is not None and launched[1] > 1:
        raise LaunchError(
            "-n starts ranks, but a launcher has already started some", got=f"{launched[0]}={launched[1]}",
            remedy="leave out -n under mpirun or srun",
        )  # fmt: skip


def take_part(exit_code: Path | None, work: Callable[[Communicator], int]) -> None:
    """Work as one rank of the world, and leave together with the others.

    Parameters
    ----------
    exit_code : Path, optional
        Where the parent that has started the ranks looks for an exit code other than 0.
    work : callable
        Returns the exit code, the same on all ranks.
    """
    import numpy as np

    from mpitrain.comm import abort_on_uncaught, leave_together, world

    sys.argv = _typed(exit_code)  # which the record of a run has
    signal.signal(signal.SIGUSR1, signal.default_int_handler)  # until training begins, there is nothing to save
    np.seterr(all="ignore")  # what is not finite ends the run, and that error names step, ranks and tensors
    comm = world()
    abort_on_uncaught(comm)
    try:
        with leave_together(comm):
            code = work(comm)
        if code:
            comm.barrier()  # launchers end all ranks, rank 0 perhaps before it has spoken, once the first has left
            sys.exit(code)
    except SystemExit as leaving:
        if exit_code is None or not hand_over(comm, leaving, exit_code):
            raise


def _train(
    comm: Communicator, job: str, overrides: tuple[str, ...], run_dir: Path | None, resume: Path | None, as_json: bool,
    progress: str, width: int | None, trace: bool, exit_code: Path | None,
) -> int:  # fmt: skip
    from mpitrain.train import Observer, load_job, train_job

    check_job_file(job, comm.size)
    loaded = load_job(job, overrides, comm)
    note = _begun(exit_code) if exit_code is not None else None
    watcher = observer(progress, width, note) if comm.rank == 0 else Observer()
    try:
        result = train_job(
            loaded, comm, run_dir=run_dir, resume=resume, observer=watcher, traced=trace, name_signal=sender(exit_code)
        )
    except NonFiniteError:
        if note is not None:
            note.unlink(missing_ok=True)  # gone on with, the run would meet the same numbers again
        raise
    if comm.rank == 0:
        _print_result(result, as_json, trace)
    return INTERRUPTED if result["stopped"].endswith(signal.SIGINT.name) else 0


def sender(exit_code: Path | None) -> Callable[[signal.Signals], str]:
    """Return a function that names the signal a user sent: `launch` passes Ctrl-C on as SIGUSR1.

    Parameters
    ----------
    exit_code : Path, optional
        As for `take_part`.
    """

    def name(number: signal.Signals) -> str:
        passed_on = number == signal.SIGUSR1 and exit_code is not None and _interrupted(exit_code).exists()
        return signal.SIGINT.name if passed_on else number.name

    return name


def _typed(exit_code: Path | None) -> list[str]:
    """Return the command as the user typed it: the parent's; this process's own without one, or one on another node."""
    if exit_code is not None:
        with suppress(OSError):
            return _command(exit_code).read_text().split("\0")
    return ["mpitrain", *sys.argv[1:]]


def _command(exit_code: Path) -> Path:
    """Return the file in which the parent says what the user typed."""
    return exit_code.with_name("command")


def _begun(exit_code: Path) -> Path:
    """Return the file that says, once training has begun, where the run is kept."""
    return exit_code.with_name("begun")


def _interrupted(exit_code: Path) -> Path:
    """Return the file that is there once the parent was told to stop by Ctrl-C."""
    return exit_code.with_name("interrupted")


def check_job_file(job: str, ranks: int) -> None:
    """Refuse a Python script in the place of a job file, and a shipped job that is not here."""
    if Path(job).suffix == ".py":
        launcher = f"mpirun -n {ranks} " if ranks > 1 else ""
        raise JobError(
            "is a Python script", operation=job, expected="a job file (TOML)",
            remedy=f"start it with: {launcher}python {shlex.quote(job)}",
        )  # fmt: skip
    name = Path(job).stem
    # not under a launcher: there only rank 0 reads the file, and others' nodes may not have it
    if _env.launched_size() is None and not Path(job).exists() and name in job_names():
        raise JobError(
            "no such file", operation=job, expected="a job file (TOML)",
            remedy=f"to copy the one that is shipped: mpitrain init {name}",
        )  # fmt: skip


def hand_over(comm: Communicator, leaving: SystemExit, path: Path) -> bool:
    """Write the exit code to a file for the parent, since launchers print pages about any other than 0.  Collective.

    Returns
    -------
    bool
        Whether it was written, so that this rank may end with 0.
    """
    written = False
    if comm.rank == 0:
        with suppress(OSError):  # the parent may be on another node
            path.write_text(str(leaving.code))
            written = True
    return bool(comm.broadcast_object(written))


def _print_result(result: dict[str, Any], as_json: bool, traced: bool) -> None:
    if as_json:
        click.echo(json.dumps(result))
        return
    ranks = "1 rank" if result["ranks"] == 1 else f"{result['ranks']} ranks"
    click.echo(
        f"{result['job']}: {result['steps']} steps on {ranks} in {result['seconds']:.1f} s ({result['stopped']})"
    )
    click.echo(f"{headline(result['metrics'])}")
    click.echo(f"weights   {result['weights_sha256']}")
    run_dir = shlex.quote(result["run_dir"])
    why = f"not written; why: mpitrain report {run_dir}"
    click.echo(f"report    {result['report'] or why}")
    if traced:
        click.echo(f"trace     {Path(result['run_dir']) / 'trace.json'} (opens in ui.perfetto.dev)")
    if not result["completed"]:
        click.echo(_go_on(result["ranks"], result["run_dir"]))


def _go_on(ranks: int, run_dir: str) -> str:
    """Return the line that says how a run goes on, to be typed in a shell."""
    start = "" if ranks == 1 else f"-n {ranks} "
    return f"go on     mpitrain run {start}{shlex.quote(f'{run_dir}/job.toml')} --resume {shlex.quote(run_dir)}"


def _after_an_end(ranks: int, begun: Path) -> None:
    """Say how a run goes on that was broken off, and has not said so itself: a rank was killed, or the disk is full."""
    from mpitrain.train import checkpoint
    from mpitrain.train.rundir import RunDirectory

    if begun.exists():
        run = RunDirectory(Path(begun.read_text()))
        if not run.result.exists() and checkpoint.latest(run.checkpoints):
            click.echo(_go_on(ranks, str(run.path)), err=True)


def launch(ranks: int, arguments: Sequence[str]) -> int:
    """Start ``mpiexec`` with a command of ours on ``ranks`` ranks, wait for it, and return its exit code.

    Parameters
    ----------
    ranks : int
        How many.
    arguments : sequence of str
        Of the command line; ``--exit-code=FILE`` is added.
    """
    from mpitrain.comm.launch import launch_command

    with TemporaryDirectory(prefix="mpitrain-") as folder:
        told = Path(folder) / "exit-code"
        _command(told).write_text("\0".join(_typed(None)))
        argv = [sys.executable, "-m", "mpitrain", *arguments, f"--exit-code={told}"]
        command_line, env = launch_command(ranks, argv)
        signals = _Forwarding(_interrupted(told))
        # A session of its own: Ctrl-C reaches this process alone, which asks the ranks to stop at the next step.
        with subprocess.Popen(command_line, env=env, start_new_session=True) as child:
            signals.send_to(child)
            code = _wait(child)
        if sys.stderr.isatty():
            sys.stderr.write(_SHOW_CURSOR)  # a rank that was killed had no time to
        _after_an_end(ranks, _begun(told))
        if code in _BY_SIGUSR1 and _interrupted(told).exists() and not _begun(told).exists():
            click.echo(_NOT_BEGUN, err=True)
        if code == 0:
            return int(told.read_text()) if told.exists() else 0
        return INTERRUPTED if _ended_by_hand(_interrupted(told), code) else _exit_code(code)


def _arguments(options: dict[str, Any]) -> list[str]:
    found = [options["job"], *(f"--set={override}" for override in options["overrides"])]
    found += [f"--{name.replace('_', '-')}={options[name]}" for name in ("run_dir", "resume") if options[name]]
    found += [flag for flag, name in (("--json", "as_json"), ("--trace", "trace")) if options[name]]
    style = options["progress"]
    if style == "auto" and sys.stderr.isatty():
        style = "bar"
    return [*found, f"--progress={style}", f"--width={shutil.get_terminal_size().columns}"]


def _wait(child: subprocess.Popen[bytes]) -> int:
    """Wait in slices: a signal may reach a thread of the BLAS library, and is acted on when this thread next wakes."""
    while True:
        with suppress(subprocess.TimeoutExpired):
            return child.wait(1.0)


class _Forwarding:
    """Turns the first Ctrl-C into SIGUSR1, which every launcher passes on; the second ends the job.

    It listens before the launcher is started, lest a signal end this process and leave the ranks to themselves.  What
    arrives until `send_to` is sent then.
    """

    def __init__(self, interrupted: Path) -> None:
        self._interrupted = interrupted
        self._child: subprocess.Popen[bytes] | None = None
        self._early: list[int] = []
        signal.signal(signal.SIGINT, self._interrupt)
        signal.signal(signal.SIGUSR1, lambda *_: self._send(signal.SIGUSR1))
        for number in (signal.SIGTERM, signal.SIGHUP):
            if signal.getsignal(number) != signal.SIG_IGN:  # as nohup sets it
                signal.signal(number, lambda *_: self._send(signal.SIGTERM))

    def send_to(self, child: subprocess.Popen[bytes]) -> None:
        """Send what has arrived, and from now on what arrives, to the launcher."""
        self._child = child
        for number in self._early:
            child.send_signal(number)

    def _send(self, number: int) -> None:
        if self._child is None:
            self._early.append(number)
        else:
            self._child.send_signal(number)

    def _interrupt(self, number: int, frame: FrameType | None) -> None:
        signal.signal(signal.SIGINT, self._end)
        click.echo("stopping at the next step; Ctrl-C again to end at once", err=True)
        self._interrupted.touch()
        self._send(signal.SIGUSR1)

    def _end(self, number: int, frame: FrameType | None) -> None:
        self._interrupted.write_text(_TWICE)
        self._send(signal.SIGTERM)


def _ended_by_hand(interrupted: Path, code: int) -> bool:
    """Tell whether Ctrl-C ended a job, and not an error while it stopped, which has an exit code of ours."""
    return interrupted.exists() and (interrupted.read_text() == _TWICE or code not in (1, 2))


def _exit_code(code: int) -> int:
    """Map what a launcher returns other than 0 to 2 for a user's error, 1 else."""
    return 2 if code == 2 else 1
