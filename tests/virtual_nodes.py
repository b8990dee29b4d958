"""Nodes made of network namespaces, and what is measured on them: tables for ``docs/results/virtual-nodes.md``.

    python tests/virtual_nodes.py [--rate 1gbit] [--rounds 7] [--json FILE]

Needs root, ``ip``, ``tc``, Open MPI, and ``virtual-nodes.sh`` in the folder ``shared`` beside the repository.  The
namespaces are taken down however it ends, but for SIGKILL.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import IO, Any

from processes import run_limited

from mpitrain.comm.launch import find_launcher

ROOT = Path(__file__).resolve().parent.parent
SCRIPT = ROOT.parent / "shared" / "virtual-nodes.sh"


def missing() -> str:
    """What virtual nodes lack here; empty if nothing."""
    if not SCRIPT.exists():
        return "no shared/virtual-nodes.sh beside the repository"
    if os.geteuid() != 0:
        return "network namespaces need root"
    lacking = [name for name in ("ip", "tc") if shutil.which(name) is None]
    if lacking:
        return f"no {' and no '.join(lacking)} (iproute2)"
    if find_launcher().kind != "openmpi":
        return f"the launcher is {find_launcher().kind}'s, not Open MPI's"
    made = subprocess.run(["ip", "netns", "list"], check=False, capture_output=True, text=True)
    return "" if made.returncode == 0 else f"ip netns: {made.stderr.strip()}"


class VirtualNodes:
    """Some nodes for as long as a ``with`` lasts.

    Parameters
    ----------
    nodes : int
        How many.
    rate : str
        Of each one's link, as ``tc`` writes it, e.g. ``1gbit``; empty: unlimited.
    """

    def __init__(self, nodes: int = 2, rate: str = "") -> None:
        self._nodes, self._rate = nodes, rate
        self.env = os.environ | {"PATH": f"{find_launcher().path.parent}:{os.environ['PATH']}"}

    def __enter__(self) -> VirtualNodes:
        self._folder = tempfile.mkdtemp(prefix="mpitrain-nodes-")
        try:
            self._script("up", str(self._nodes), self._rate)
        except BaseException:
            self.__exit__(None, None, None)
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:  # fmt: skip
        Path(self._folder, "nodes").write_text(str(self._nodes))  # making them may have failed before it was there
        self._script("down")

    def run(
        self, ranks_per_node: int, argv: Sequence[str], timeout_s: float, output: IO[bytes] | None = None, **env: str
    ) -> int | None:
        """Run a command on the ranks; returns the exit code, or None if it had to be killed."""
        return run_limited([*self.launcher(ranks_per_node), *argv], self.env | env, timeout_s, output)

    def launcher(self, ranks_per_node: int) -> list[str]:
        """Return what starts ranks if a rank's command follows it, with the environment `env`."""
        return ["bash", str(SCRIPT), "run", self._folder, str(ranks_per_node)]

    def _script(self, command: str, *arguments: str) -> None:
        subprocess.run(["bash", str(SCRIPT), command, self._folder, *arguments], check=True, env=self.env)


def measure(rate: str, rounds: int) -> list[dict[str, Any]]:
    """All figures, as the ranks give them."""
    figures = []
    with VirtualNodes(2, rate) as nodes, tempfile.TemporaryDirectory() as folder:
        for ranks_per_node in (1, 2):
            report = Path(folder, f"{ranks_per_node}.json")
            argv = [sys.executable, str(ROOT / "tests" / "virtual_nodes_figures.py"), str(report), str(rounds)]
            code = nodes.run(
                ranks_per_node, argv, timeout_s=900, PYTHONPATH=str(ROOT), OPENBLAS_NUM_THREADS="1"
            )  # nodes share CPUs
            if code != 0:
                raise SystemExit(f"error: the ranks ended with {code}")
            figures.append(json.loads(report.read_text()))
    return figures


def bytes_per_s(rate: str) -> float:
    """Of a rate as ``tc`` writes it."""
    units = {"kbit": 1e3, "mbit": 1e6, "gbit": 1e9}
    return float(rate[:-4]) * units[rate[-4:]] / 8


def tables(figures: Sequence[dict[str, Any]], rate: str) -> str:
    """Markdown."""
    link = bytes_per_s(rate)
    lines = [f"{figures[0]['versions']}, load average {figures[0]['load']:.1f}", ""]
    lines += ["| ranks | MiB | what | ms: median (all) | % of the link's limit | × the library's |", "|" + "---|" * 6]
    for found in figures:
        for row in found["allreduce"]:
            limit_ms = 1e3 * row["nbytes"] / link
            for what, times in row["ms"].items():
                lines.append(
                    f"| 2 × {found['ranks_per_node']} | {row['nbytes'] >> 20} | {what} | {_spread(times)} "
                    f"| {100 * limit_ms / _median(times):.1f} | {_median(times) / _median(row['ms']['library']):.2f} |"
                )
    head = ("codec", "step, ms", "compute", "codec", "KiB through the link", "1.25 × their time", "bound", "within")
    lines += ["", f"| {' | '.join(head)} |", "|" + "---|" * len(head)]
    for row in figures[0]["steps"]:
        wire = 1.25e3 * row["nbytes"] / link
        bound = row["compute_ms"] + row["codec_ms"] + wire
        cells = [f"{row[name]:.1f}" for name in ("step_ms", "compute_ms", "codec_ms")]
        cells += [
            f"{row['nbytes'] / 1024:,.0f}",
            f"{wire:.1f}",
            f"{bound:.1f}",
            "yes" if row["step_ms"] <= bound else "no",
        ]
        lines.append(f"| {row['codec']} | {' | '.join(cells)} |")
    return "\n".join(lines)


def _median(times: Sequence[float]) -> float:
    return sorted(times)[len(times) // 2]


def _spread(times: Sequence[float]) -> str:
    return f"{_median(times):.0f} ({min(times):.0f}–{max(times):.0f})"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rate", default="1gbit", help="of each node's link")
    parser.add_argument("--rounds", type=int, default=7, help="how often each is timed, in turn")
    parser.add_argument("--json", type=Path, help="where to write the figures")
    options = parser.parse_args()
    if missing():
        print(f"error: no virtual nodes: {missing()}", file=sys.stderr)
        return 2
    for number in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, lambda *_: sys.exit(1))  # by way of the context managers
    figures = measure(options.rate, options.rounds)
    print(tables(figures, options.rate))
    if options.json:
        options.json.write_text(json.dumps({"rate": options.rate, "figures": figures}, indent=1))
    return 0


if __name__ == "__main__":
    sys.exit(main())
