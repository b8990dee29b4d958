"""The benchmark of training steps on one node: measured, and shown in ``docs/results/training.md``.

    python tests/training.py measure xeon     # two minutes; the name is that of the machine
    python tests/training.py page             # tables and goals, from what was measured

`measure` leaves ``docs/results/training/NAME.json`` and ``.png``; `page` writes all below the page's marker anew.
"""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

from mpitrain.cli.bench.training_tables import columns, header, memory_rows, rows, title
from mpitrain.train.bench.memory import KINDS
from mpitrain.train.bench.results import Trained, TrainingReport

ROOT = Path(__file__).resolve().parent.parent
FOLDER = ROOT / "docs" / "results" / "training"
PAGE = FOLDER.with_suffix(".md")
MARKER = "<!-- All below is written by `python tests/training.py page`. -->\n"

MODELS = ("mlp256", "mlp1024", "mlp2048", "cnn", "gpt")


class Goal(NamedTuple):
    """How much faster some ways to train are to be than another, at least, by model."""

    names: tuple[str, ...]
    rival: str
    least: dict[str, float]


GOALS = (
    Goal(("gradient 1", "data"), "DDP, gloo", dict(zip(MODELS, (2.0, 1.7, 1.3, 1.0, 1.0), strict=True))),
    Goal(("mpitrain.torch",), "DDP, gloo", {"mlp1024": 1.5, "gpt": 1.0}),
    Goal(("gradient 1", "data"), "serial runs", dict.fromkeys(MODELS[:3], 0.95)),
    Goal(("gradient 1",), "data", dict.fromkeys(MODELS[:3], 1.0)),
)


def measure(machine: str) -> None:
    """Train all models in all ways."""
    files = [
        f"--{option}=docs/results/training/{machine}.{kind}" for option, kind in (("json", "json"), ("plot", "png"))
    ]
    options = ["-n", "2", "--peers", "--rounds=15", f"--models={','.join(MODELS)}"]
    subprocess.run([sys.executable, "-m", "mpitrain", "bench", "training", *options, *files], check=True, cwd=ROOT)


def page(folder: Path = FOLDER) -> str:
    """Return what stands below the marker: a section for each machine."""
    return "\n".join(
        _section(file.stem, TrainingReport.from_json(file.read_bytes())) for file in sorted(folder.glob("*.json"))
    )


def _section(machine: str, report: TrainingReport) -> str:
    words = [word for word in report.command if word.startswith("--") and not word.startswith(("--json", "--plot"))]
    command = " ".join([f"mpitrain bench training -n {report.about['ranks']}", *words])
    parts = [
        f"## All models: {machine}",
        f"`{command}`: {'; '.join(header(report))}. [All figures](training/{machine}.json).",
        _table(("goal", *(f"{model.name}" for model in report.models)), goals(report.models)),
        f"![Throughput](training/{machine}.png)",
    ]
    for trained in report.models:
        parts += [f"### {title(trained, report.product_flops_per_s)}", _table(columns(trained), rows(trained))]
        parts += ["MB a rank, measured (predicted):", _table(("", *KINDS), memory_rows(trained))]
    return "\n\n".join(parts) + "\n"


def goals(models: Sequence[Trained]) -> Iterator[tuple[str, ...]]:
    """Yield how much faster what has a goal is, and what is asked for; bold where it is missed."""
    for goal in GOALS:
        for name in goal.names:
            yield (f"{name} to {goal.rival}", *(_against(model, name, goal) for model in models))


def _against(model: Trained, name: str, goal: Goal) -> str:
    least = goal.least.get(model.name)
    if least is None:
        return ""
    (found,) = (each.ratios[goal.rival].p50 for each in model.contestants if each.name == name)
    text = f"{found:.2f} (≥ {least:g})"
    return text if round(found, 2) >= least else f"**{text}**"


def _table(head: Sequence[str], lines: Iterable[Sequence[str]]) -> str:
    return "\n".join(f"| {' | '.join(cells)} |" for cells in (head, ["---"] * len(head), *lines))


def main(task: str = "", *machines: str) -> int:
    if task not in ("measure", "page") or bool(machines) != (task == "measure"):
        print(__doc__, file=sys.stderr)
        return 2
    for machine in machines:
        measure(machine)
    if task == "page":
        head = PAGE.read_text().partition(MARKER)[0]
        PAGE.write_text(f"{head}{MARKER}\n{page()}")
    return 0


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
