"""``mpitrain init``: copy what the package ships, for people who came by pip."""

from __future__ import annotations

from pathlib import Path

import click

from mpitrain._errors import InputError


def shipped(kind: str) -> Path:
    """Return the folder of shipped ``jobs`` or ``slurm`` files: in the wheel, or beside a source checkout."""
    package = Path(__file__).resolve().parents[1]
    for folder in (package / "_shipped" / kind, package.parent / kind):
        if folder.is_dir():
            return folder
    raise InputError(f"the shipped {kind} files are missing", got=str(package), remedy="install mpitrain again")


def job_names() -> dict[str, Path]:
    """Return the shipped job files by name."""
    return {path.stem: path for path in sorted(shipped("jobs").iterdir()) if path.suffix in (".toml", ".py")}


def _first_comment(path: Path) -> str:
    text = path.read_text(encoding="utf-8").lstrip('#" \n')
    return text.splitlines()[0].rstrip('" ')


def _beside(job: Path) -> list[Path]:
    """Return the Python file of a job's own model, if it has one: it bears the job's name."""
    own = job.with_suffix(".py")
    return [own] if own != job and own.is_file() else []


@click.command("init", short_help="Copy a job file and its sbatch file into this folder.")
@click.argument("name", required=False)
@click.option("--gpu", is_flag=True, help="The sbatch file for GPUs instead of the one for CPUs.")
@click.option("--force", is_flag=True, help="Overwrite files that are there.")
def command(name: str | None, gpu: bool, force: bool) -> None:
    """Copy the job file NAME and its sbatch file into this folder.  Without NAME: list what there is."""
    from mpitrain._names import did_you_mean
    from mpitrain.train.storage import disk, write_atomic

    jobs = job_names()
    if name is None:
        width = max(map(len, jobs))
        for job, path in jobs.items():
            click.echo(f"{job:{width}}  {_first_comment(path)}")
        return
    if name not in jobs:
        raise InputError(
            "no such job is shipped", got=name, expected=", ".join(jobs), remedy=did_you_mean(name, list(jobs))
        )
    sbatch = shipped("slurm") / ("gpu.sbatch" if gpu else "cpu.sbatch")
    sources = [jobs[name], *_beside(jobs[name]), *([sbatch] if jobs[name].suffix == ".toml" else [])]
    there = [path.name for path in sources if Path(path.name).exists()]
    if there and not force:
        raise InputError(f"{', '.join(there)} already in this folder", remedy="pass --force to overwrite")
    for path in sources:
        with disk("read", path):
            text = path.read_bytes()
        write_atomic(Path(path.name), text)
    click.echo(f"wrote {' and '.join(path.name for path in sources)}")
    if sbatch in sources:
        click.echo(f"run it:  mpitrain run -n 2 {sources[0].name}    or    sbatch {sbatch.name} {sources[0].name}")
    else:
        click.echo(f"run it:  mpirun -n 2 python {sources[0].name}")
