"""One page on a run that can be mailed: result, curves, job and environment, with everything in one file.

It reads a run directory as it is, also of a run that goes on or was cut short, and knows nothing of training.
"""

from __future__ import annotations

import base64
import json
import re
from collections.abc import Iterable, Iterator, Mapping
from html import escape
from pathlib import Path
from typing import Any

import numpy as np

from mpitrain._errors import InputError
from mpitrain._typing import Array
from mpitrain.train import plots
from mpitrain.train.report_costs import costs_part
from mpitrain.train.rundir import RunDirectory
from mpitrain.train.storage import write_atomic

_KINDS = ("train", "valid", "test")
_DRAWN_CLASSES = 30
"""Most classes of which the confusion matrix is drawn."""

_PAIRS = 12
"""Most pairs of confused classes that are told of more."""

_NOT_METRICS = ("step", "epoch", "kind", "loss", "lr", "samples_per_s", "tokens_per_s", "seconds")
_STYLE = """
:root { color-scheme: light dark; --ink: #1d2733; --soft: #5c6b7a; --line: #d9e0e7; --page: #f6f8fa; --card: #fff; }
@media (prefers-color-scheme: dark) {
  :root { --ink: #e4e9ee; --soft: #9aa7b4; --line: #333d48; --page: #12171d; --card: #1b222a; }
}
* { box-sizing: border-box; }
body { margin: 0 auto; padding: 2rem 1rem 4rem; max-width: 76rem; background: var(--page); color: var(--ink);
  font: 16px/1.5 system-ui, sans-serif; }
h1 { margin: 0; font-size: 1.7rem; overflow-wrap: anywhere; } h2 { margin: 2.2rem 0 .8rem; font-size: 1.15rem; }
.state { margin: .2rem 0 1.4rem; color: var(--soft); }
.tiles { display: flex; flex-wrap: wrap; gap: .8rem; margin-bottom: 1rem; }
.tile, .figure, .facts, details { background: var(--card); border: 1px solid var(--line); border-radius: .5rem; }
.tile { padding: .7rem 1.1rem; min-width: 9rem; }
.tile b { display: block; font-size: 1.6rem; line-height: 1.25; font-variant-numeric: tabular-nums; }
.tile span, th { color: var(--soft); font-weight: 400; }
.facts { width: 100%; margin-top: .8rem; padding: .4rem .6rem; border-collapse: separate; border-spacing: 0; }
th, td { padding: .25rem .6rem; text-align: left; vertical-align: top; } th { width: 10rem; white-space: nowrap; }
td { overflow-wrap: anywhere; font-variant-numeric: tabular-nums; }
pre { font: .86em/1.5 ui-monospace, monospace; }
.figures { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 30rem), 1fr)); gap: .8rem; }
.figure { margin: 0; padding: .6rem; background: #fff; text-align: center; }
.figure img { max-width: 100%; max-height: 36rem; }
details { margin-top: .8rem; padding: .7rem 1.1rem; } summary { cursor: pointer; font-weight: 600; }
pre { overflow-x: auto; margin: .8rem 0 .2rem; }
@media print {
  :root { --ink: #000; --soft: #444; --line: #bbb; --page: #fff; --card: #fff; }
  body { padding: 0; font-size: 11pt; } .figure, .tile, tr { break-inside: avoid; }
  .figures { grid-template-columns: 1fr 1fr; } pre { white-space: pre-wrap; }
}
"""


def write_report(run_dir: Path) -> Path:
    """Write ``report.html`` and its pictures, as PNG, into a run directory.

    Parameters
    ----------
    run_dir : Path
        Of a run that is finished, goes on, or was cut short.

    Returns
    -------
    Path
        The report: one file that needs no other, nor the network.

    Raises
    ------
    InputError
        The directory holds no run, or one of its files is damaged.
    MissingExtraError
        matplotlib is not installed.
    StorageError
        The report cannot be written.
    """
    run = RunDirectory(Path(run_dir))
    if not run.job.is_file():
        raise InputError(f"{run.path}: holds no run", operation="report", remedy="name the directory with its job.toml")
    records, result = run.read_metrics(), _read_json(run.result)
    pictures = dict(_pictures(records, result))
    for name, png in pictures.items():
        write_atomic(run.path / f"{name}.png", png)
    write_atomic(run.report, _page(run, records, result, pictures).encode())
    return run.report


def _pictures(records: list[dict[str, Any]], result: Mapping[str, Any]) -> Iterator[tuple[str, bytes]]:
    """Give the name and the PNG of each picture for which there is something to draw."""
    if losses := _by_kind(records, "loss"):
        yield "loss", plots.curve("Loss", losses, smooth=True, log=True)
    for metric in _metric_names(records):
        if values := _by_kind(records, metric):
            yield _file_name(metric), plots.curve(_title(metric), values)
    unit = "tokens" if _by_kind(records, "tokens_per_s") else "samples"
    if rates := _by_kind(records, f"{unit}_per_s"):
        yield "throughput", plots.curve(f"Throughput ({unit}/s)", rates, smooth=True, from_zero=True)
    if lrs := _by_kind(records, "lr"):
        yield "learning_rate", plots.curve("Learning rate", lrs, from_zero=True)
    if 0 < len(result.get("confusion") or ()) <= _DRAWN_CLASSES:
        yield "confusion", plots.confusion(*_confusion(result))


def _confusion(result: Mapping[str, Any]) -> tuple[Array, list[str]]:
    """Return the confusion matrix of a result, and the names of its classes."""
    matrix = np.asarray(result["confusion"])
    return matrix, [str(name) for name in result.get("classes") or range(len(matrix))]


def _confused(result: Mapping[str, Any]) -> str:
    """Return the pairs of classes that are confused most, where these are too many for a picture of all."""
    if len(result.get("confusion") or ()) <= _DRAWN_CLASSES:
        return ""
    matrix, names = _confusion(result)
    wrong, totals = matrix - np.diag(np.diag(matrix)), matrix.sum(axis=1)
    pairs = [divmod(int(place), len(matrix)) for place in np.argsort(-wrong, axis=None, kind="stable")[:_PAIRS]]
    rows = "".join(
        f"<tr><td>{escape(names[row])}</td><td>{escape(names[column])}</td>"
        f"<td>{wrong[row, column]:,} of {totals[row]:,}</td></tr>"
        for row, column in pairs
        if wrong[row, column]
    )
    head = "<tr><th>class</th><th>was taken for</th><th>samples</th></tr>"
    table = f'<table class="facts">{head}{rows}</table>' if rows else "<p>None</p>"
    return f"<h2>Classes confused most often (test)</h2>\n{table}"


def _by_kind(records: Iterable[Mapping[str, Any]], key: str) -> dict[str, plots.Series]:
    """Return the values of ``key`` over the steps, for each kind of record that has any; none if no two make a line."""
    found: dict[str, plots.Series] = {}
    for kind in _KINDS:
        points = [(r["step"], r[key]) for r in records if r.get("kind") == kind and _is_number(r.get(key))]
        if points:
            steps, values = zip(*points, strict=True)
            found[kind] = (steps, values)
    return found if any(len(steps) > 1 for steps, _ in found.values()) else {}


def _metric_names(records: Iterable[Mapping[str, Any]]) -> list[str]:
    names = dict.fromkeys(key for record in records for key, value in record.items() if _is_number(value))
    return [name for name in names if name not in _NOT_METRICS]


def _page(
    run: RunDirectory, records: list[dict[str, Any]], result: Mapping[str, Any], pictures: Mapping[str, bytes]
) -> str:
    name = str(result.get("job") or run.path.name)
    figures = "\n".join(_figure(title, png) for title, png in pictures.items())
    environment = json.dumps(_read_json(run.environment), indent=2, ensure_ascii=False)
    return f"""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{escape(name)} · mpitrain</title>
<style>{_STYLE}</style>
</head>
<body>
<h1>{escape(name)}</h1>
<p class="state">{escape(_state(records, result))}</p>
{_tiles(result)}
{_facts(run, records, result)}
<h2>Cost</h2>
{costs_part(run, records, result.get("ranks"))}
<h2>Curves</h2>
<div class="figures">
{figures or "<p>No metrics yet.</p>"}
</div>
{_confused(result)}
<h2>How it was run</h2>
{_details("Job", run.job.read_text(encoding="utf-8", errors="replace"))}
{_details("Environment", environment)}
</body>
</html>
"""


def _state(records: list[dict[str, Any]], result: Mapping[str, Any]) -> str:
    if result:
        reason = result.get("stopped")
        return f"Finished: {reason}" if reason else "Finished"
    last = f"last metrics at step {records[-1]['step']}" if records else "no metrics yet"
    return f"Not finished: still running, or cut short; {last}"


def _tiles(result: Mapping[str, Any]) -> str:
    metrics = result.get("metrics") or {}
    shown = {name: value for name, value in metrics.items() if _is_number(value)}
    tiles = [
        f'<div class="tile"><b>{_number(n, v)}</b><span>{escape(_title(n))}</span></div>' for n, v in shown.items()
    ]
    return f'<div class="tiles">{"".join(tiles)}</div>' if tiles else ""


def _facts(run: RunDirectory, records: list[dict[str, Any]], result: Mapping[str, Any]) -> str:
    last = records[-1] if records else {}
    facts = {
        "ranks": result.get("ranks"),
        "pipeline cut at layers": ", ".join(map(str, result.get("cuts") or [])) or None,
        "steps": result.get("steps", last.get("step")),
        "seconds": result.get("seconds", last.get("seconds")),
        "loss": result.get("loss", last.get("loss")),
        "weights (SHA-256)": result.get("weights_sha256"),
        "run directory": str(run.path.resolve()),
    }
    rows = [f"<tr><th>{k}</th><td>{_number(k, v)}</td></tr>" for k, v in facts.items() if v is not None]
    return f'<table class="facts">{"".join(rows)}</table>'


def _figure(name: str, png: bytes) -> str:
    data = base64.b64encode(png).decode("ascii")
    return f'<figure class="figure"><img alt="{escape(_title(name))}" src="data:image/png;base64,{data}"></figure>'


def _details(title: str, text: str) -> str:
    return f"<details><summary>{escape(title)}</summary><pre>{escape(text)}</pre></details>"


def _number(name: str, value: Any) -> str:
    """Return a value as it is shown, escaped: accuracies in per cent, other floats with five digits."""
    if isinstance(value, float):
        return f"{100 * value:.2f} %" if name.endswith("accuracy") else f"{value:.5g}"
    return escape(str(value))


def _title(name: str) -> str:
    words = name.replace("_", " ")
    return words[:1].upper() + words[1:]


def _file_name(metric: str) -> str:
    """Return a file name for a metric, which a user may have named anything."""
    return re.sub(r"[^A-Za-z0-9_-]+", "-", metric)


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _read_json(path: Path) -> dict[str, Any]:
    """Return the object in a file; empty if there is none yet."""
    if not path.exists():
        return {}
    try:
        found = json.loads(path.read_bytes())
    except (OSError, ValueError) as error:
        raise InputError(f"{path}: cannot be read", operation="report", got=str(error)) from error
    if not isinstance(found, dict):
        raise InputError(f"{path}: no JSON object", operation="report", got=type(found).__name__)
    return found
