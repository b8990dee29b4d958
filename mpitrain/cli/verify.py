"""``mpitrain verify``: run a job on several ranks and serially, and compare what they did."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from math import prod
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

import click

from mpitrain import _env
from mpitrain._errors import JobError
from mpitrain.cli.run import check_no_launcher, take_part

if TYPE_CHECKING:
    from mpitrain.comm import Communicator
    from mpitrain.train import Job
    from mpitrain.train.comparison import Comparison
    from mpitrain.train.record import Record


@click.command("verify", short_help="Show that a job on N ranks does what it does on one.")
@click.argument("job")
@click.option("-n", "--ranks", type=click.IntRange(min=1), help="Ranks of the parallel run  [default: 2]")
@click.option("--mesh", metavar="AXES", help="Or its layout, e.g. data=2,tensor=2.")
@click.option("--against", default="serial", show_default=True, metavar="LAYOUT", help="serial, or another layout.")
@click.option("--steps", type=click.IntRange(min=1), default=10, show_default=True, help="Steps to take.")
@click.option("--set", "overrides", multiple=True, metavar="KEY=VALUE", help="Override a key, e.g. optimizer.lr=0.01.")
@click.option(
    "--tolerance", type=click.FloatRange(min=0), help="Relative difference that counts as none  [default: by dtype]"
)
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object instead of tables.")
@click.option("--record", type=click.Path(path_type=Path), hidden=True, help="As a rank: write a record to this file.")
def command(job: str, overrides: tuple[str, ...], steps: int, record: Path | None, **options: Any) -> None:
    """Run the job in the file JOB twice for some steps, in parallel and serially, and compare them.

    Both begin with the same seed.  Losses, norms of the gradients, the gradient of the first step and the weights after
    the last are compared, tensor by tensor.  Exit code 0 if all are equal within the tolerance, 1 if not.

    A job that is not reproducible runs in float64, unless --set dtype=… says otherwise: there, what rounding makes of
    a few steps is far smaller than any mistake.  Of a reproducible job, every bit must be equal.
    """
    if record is not None:
        _record(job, overrides, steps, record)
    else:
        sys.exit(_verify(job, overrides, steps, **options))


@dataclass(frozen=True)
class Side:
    """One of the two runs.

    Parameters
    ----------
    layout : str
        As the user names it.
    ranks : int
        How many it takes.
    axes : dict of str to int, optional
        The sizes of the mesh's axes, in place of what the job says; None: as the job says.
    """

    layout: str
    ranks: int
    axes: Mapping[str, int] | None = None

    def overrides(self, given: Job) -> tuple[str, ...]:
        """Return what the layout changes of a job: the axes of its mesh, or nothing."""
        if self.axes is None:
            return ()
        axes = {"pipe": 1, **self.axes}  # said, so that a schedule of pipelines may stay
        sizes = [f"mesh.{axis}={size}" for axis, size in axes.items()]
        divides = given.mesh.sequence_parallel and axes.get("tensor", 1) > 1  # else there is nothing to divide
        return ("mesh={}", *sizes, *(["mesh.sequence_parallel=true"] if divides else []))


def side(layout: str) -> Side:
    """Return the side of a layout: ``serial``, or the sizes of axes, as ``data=2``.

    Raises
    ------
    JobError
        It is neither.
    """
    if layout == "serial":
        return Side(layout, 1, {})
    sizes: dict[str, int] = {}
    for part in layout.split(","):
        axis, _, size = part.strip().partition("=")
        if not axis.isidentifier() or not size.isdecimal() or int(size) < 1 or axis in sizes:
            raise JobError("cannot be understood", operation=f"layout {layout!r}", expected="serial, or e.g. data=2")
        sizes[axis] = int(size)
    return Side(layout, prod(sizes.values()), sizes)


def _verify(
    job: str, overrides: tuple[str, ...], steps: int, ranks: int | None, mesh: str | None, against: str,
    tolerance: float | None, as_json: bool,
) -> int:  # fmt: skip
    from mpitrain.train import Job
    from mpitrain.train.comparison import compare, default_tolerance

    check_no_launcher(ranks or 2)
    given = Job.load(job, overrides)
    _check_comparable(given)
    if not given.reproducible and not any(each.partition("=")[0].strip() == "dtype" for each in overrides):
        overrides = ("dtype=float64", *overrides)
    sides = side(mesh) if mesh else Side(f"{ranks or 2} ranks", ranks or 2), side(against)
    if ranks not in (None, sides[0].ranks):
        raise click.UsageError(
            f"--mesh {mesh} has {sides[0].ranks} ranks, not the {ranks} of -n; leave out one of them."
        )
    settings = _settings(given, overrides, sides)
    for each in settings:
        Job.load(job, each)  # a mistake ends here, in one line
    records = []
    for each, which in zip(settings, sides, strict=True):
        if sys.stderr.isatty():
            click.echo(f"{which.layout}: {steps} {'step' if steps == 1 else 'steps'} …", err=True)
        records.append(_run(job, each, steps, which.ranks))
    found, expected = records
    bound = default_tolerance(expected, given.reproducible) if tolerance is None else tolerance
    compared = compare(found, expected, bound)
    (_print_json if as_json else _print_tables)(job, sides, bound, expected, compared)
    return 0 if compared.first is None else 1


def _check_comparable(given: Job) -> None:
    """Refuse a job whose layouts are meant to differ, by more than the tolerance."""
    if given.precision.mixed:
        raise JobError(
            "in 16 bits layouts differ by rounding, and skipped steps have no gradients to compare",
            operation="precision.compute", got=given.precision.compute,
            remedy="verify the layouts in full precision: --set 'precision={}'",
        )  # fmt: skip
    if given.method.average_every:
        raise JobError(
            "the result of local SGD depends on the number of ranks", operation="method.average_every",
            got=given.method.average_every, remedy="verify the rest of the job: --set method.average_every=0",
        )  # fmt: skip


def _settings(given: Job, overrides: tuple[str, ...], sides: tuple[Side, Side]) -> list[tuple[str, ...]]:
    """Return what each side overrides; where the job says where it is cut, the other one is cut by counted cost."""
    other = () if isinstance(given.method.cuts, str) else ("method.cuts=counted",)
    return [(*overrides, *sides[0].overrides(given)), (*overrides, *sides[1].overrides(given), *other)]


def _run(job: str, overrides: Sequence[str], steps: int, ranks: int) -> Record:
    """Run a side to its end, and return what was recorded; if it fails, end as it did."""
    from mpitrain.comm.launch import launch_command
    from mpitrain.train.record import Record

    with TemporaryDirectory(prefix="mpitrain-verify-") as folder:
        path = Path(folder) / "record.npz"
        settings = [f"--set={each}" for each in overrides]
        argv = [sys.executable, "-m", "mpitrain", "verify", job, f"--steps={steps}", f"--record={path}", *settings]
        env = _env.snapshot()
        if ranks > 1:
            argv, env = launch_command(ranks, argv)
        code = subprocess.run(argv, env=env, check=False).returncode
        told = _told(path)
        if code == 0 and told.exists():
            code = int(told.read_text())
        if code != 0:
            sys.exit(code if code in (1, 2) else 1)
        return Record.read(path)


def _told(path: Path) -> Path:
    """Return the file in which ranks leave an exit code, on which launchers would comment."""
    return path.with_suffix(".exit-code")


def _record(job: str, overrides: tuple[str, ...], steps: int, path: Path) -> None:
    """Take part in one of the runs, as a rank of its world."""
    from mpitrain.comm.guard import agree
    from mpitrain.train import load_job
    from mpitrain.train.record import record

    def work(comm: Communicator) -> int:
        seen = record(load_job(job, overrides, comm), comm, steps)
        with agree(comm):
            if seen is not None:
                seen.write(path)
        return 0

    take_part(_told(path), work)


def _print_json(job: str, sides: tuple[Side, Side], tolerance: float, expected: Record, compared: Comparison) -> None:
    tensors = [
        {"name": gradient.tensor, "gradient": gradient.relative, "weights": weights.relative}
        for gradient, weights in zip(compared.gradients, compared.weights, strict=True)
    ]
    found = {
        "job": job,
        "layout": sides[0].layout,
        "against": sides[1].layout,
        "steps": len(expected.losses),
        "dtype": next(iter(expected.weights.values())).dtype.name,
        "tolerance": tolerance,
        "equal": compared.first is None,
        "first": asdict(compared.first) if compared.first else None,
        "losses": [each.relative for each in compared.losses],
        "norms": [each.relative for each in compared.totals],
        "tensors": tensors,
    }
    click.echo(json.dumps(_without_nan(found)))


def _without_nan(value: Any) -> Any:
    """Return JSON values, in which NaN and infinities, which JSON lacks, are null."""
    if isinstance(value, dict):
        return {key: _without_nan(each) for key, each in value.items()}
    if isinstance(value, list):
        return [_without_nan(each) for each in value]
    return None if isinstance(value, float) and value - value != 0 else value


def _print_tables(job: str, sides: tuple[Side, Side], tolerance: float, expected: Record, compared: Comparison) -> None:
    from rich.console import Console

    from mpitrain.cli.verdict import show

    console = Console(width=None if sys.stdout.isatty() else max(100, shutil.get_terminal_size().columns))
    show(console, f"{job}, {sides[0].layout} against {sides[1].layout}", tolerance, expected, compared)
