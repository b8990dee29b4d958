"""The benchmark of the collectives on one node: measured, and shown in ``docs/results/collectives.md``.

    python tests/collectives.py measure [resident] [rewritten] [rotating] [crowded]    # all by default; minutes each
    python tests/collectives.py page                                       # tables and goals, from what was measured

`measure` leaves ``docs/results/collectives/NAME.json`` and ``.png``; `page` writes all below the page's marker anew.
Campaigns on another machine have its name before theirs, as in ``xeon/resident``.
"""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any, NamedTuple

from collectives_tables import goals, left_to_the_library, rows, table

from mpitrain.comm.bench.results import Report

ROOT = Path(__file__).resolve().parent.parent
FOLDER = ROOT / "docs" / "results" / "collectives"
PAGE = FOLDER.with_suffix(".md")
MARKER = "<!-- All below is written by `python tests/collectives.py page`. -->\n"

CALLS = "--variants=checked,checked in place,in place on comm.empty,plan,plan in place"
LARGE = "256K,1M,4M,16M,64M"


class Campaign(NamedTuple):
    """A heading, and the options of ``mpitrain bench collectives``."""

    title: str
    options: tuple[str, ...]


CAMPAIGNS = {
    "resident": Campaign(
        "Two ranks, resident buffers",
        ("-n", "2", "--peers", "--rounds=5", "--time-s=0.1", f"--sizes=4,1K,16K,64K,{LARGE}", CALLS),
    ),
    "rewritten": Campaign(
        "Two ranks, buffers that each rank writes anew before each turn",
        (
            "-n", "2", "--peers", "--time-s=0.1", "--operations=allreduce", "--buffers=rewritten",
            f"--sizes={LARGE}", CALLS,
        ),
    ),
    "rotating": Campaign(
        "Two ranks, buffers that are never in the cache",
        (
            "-n", "2", "--peers", "--time-s=0.1", "--operations=allreduce", "--buffers=rotating",
            f"--sizes={LARGE}", CALLS,
        ),
    ),
    "crowded": Campaign(
        "Four ranks on two cores", ("-n", "4", "--peers", "--rounds=3", "--time-s=0.2", f"--sizes=4,16K,{LARGE}", CALLS)
    ),
}  # fmt: skip


def measure(name: str) -> None:
    """Run one campaign."""
    (FOLDER / name).parent.mkdir(parents=True, exist_ok=True)
    stem = os.path.relpath(FOLDER / name, ROOT)  # the file tells the command: no place on this machine
    files = (f"--json={stem}.json", f"--plot={stem}.png")
    argv = [sys.executable, "-m", "mpitrain", "bench", "collectives", *_campaign(name).options, *files]
    start = time.monotonic()
    subprocess.run(argv, check=True, cwd=ROOT, env=os.environ | {"MPITRAIN_TUNING": "off"})
    print(f"{name}: {time.monotonic() - start:.0f} s", flush=True)


def page(folder: Path = FOLDER) -> str:
    """Return what stands below the marker: a section for each campaign that was measured."""
    machines = ["", *sorted(f"{each.name}/" for each in folder.iterdir() if each.is_dir())]
    names = [f"{machine}{name}" for machine in machines for name in CAMPAIGNS]
    return "\n".join(
        _section(name, Report.from_json((folder / f"{name}.json").read_bytes()))
        for name in names
        if (folder / f"{name}.json").exists()
    )


def _campaign(name: str) -> Campaign:
    return CAMPAIGNS[name.rpartition("/")[2]]


def _section(name: str, report: Report) -> str:
    found, about = list(rows(report)), report.launches[0].about
    machine = name.rpartition("/")[0]
    parts = [
        f"## {_campaign(name).title}" + (f": {machine}" if machine else ""),
        f"`{_command(report)}`: {_machine(about)}. [All figures](collectives/{name}.json).",
        "\n".join(goals(found, about["ranks"])),
        "\n".join(table(found)),
        "\n".join(left_to_the_library(found)),
        "\n".join(f"Left out: {failure}." for failure in report.failures),
        f"![Time and ratio over size](collectives/{name}.png)",
    ]
    return "\n\n".join(part for part in parts if part) + "\n"


def _machine(about: dict[str, Any]) -> str:
    machine = about["machine"]
    versions = ", ".join(f"{library} {version}" for library, version in about["versions"].items())
    where = f"{about['ranks']} ranks on {machine['cpus']} cores ({machine['cpu']}, last cache "
    return f"{where}{machine['last_level_cache_bytes'] >> 20} MiB), {about['mpi_library'].split(',')[0]}, {versions}"


def _command(report: Report) -> str:
    """Return the command as one types it, without the files that it wrote."""
    words = [word for word in report.command[1:] if not word.startswith(("--json", "--plot", "docs/"))]
    return " ".join(["MPITRAIN_TUNING=off mpitrain", *(f'"{word}"' if " " in word else word for word in words)])


def main(task: str = "", *names: str) -> int:
    unknown = [name for name in names if name.rpartition("/")[2] not in CAMPAIGNS]
    if task not in ("measure", "page") or unknown:
        print(__doc__, file=sys.stderr)
        return 2
    for name in names or CAMPAIGNS if task == "measure" else ():
        measure(name)
    if task == "page":
        head = PAGE.read_text().partition(MARKER)[0]
        PAGE.write_text(f"{head}{MARKER}\n{page()}")
    return 0


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
