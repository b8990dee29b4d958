"""How these ranks reduce arrays: over which transport, and by which algorithms."""

from __future__ import annotations

from mpitrain import _env
from mpitrain.cli.checks.finding import Finding, ok, warn
from mpitrain.cli.checks.survey import Survey
from mpitrain.cli.checks.world import plural
from mpitrain.comm import tuning as tables

_MEASURE = "measure: mpitrain bench collectives --tune"
_SHOWN = 4


def transport(survey: Survey) -> Finding | None:
    """Whether large arrays are reduced in shared memory, and why, or why not."""
    if survey.transport is None:
        return None  # no ranks were tried, or they did not start, which others tell
    name, why = survey.transport
    return ok(f"{name}: {why}" if why else name)


def tuning(survey: Survey) -> Finding:
    """Which algorithms a table in the cache chooses."""
    if not _env.tuning():
        return ok("off, by MPITRAIN_TUNING: calls that name no algorithm are left to the MPI library")
    if survey.tuning is None:
        return _everything()
    if survey.tuning.refused:
        return warn(survey.tuning.note, f"{_MEASURE} on ranks placed like these")
    table = survey.tuning.table
    return ok(
        f"{survey.tuning.note}: {'; '.join(table.describe())}" if table else f"{survey.tuning.note} in {_folder()}"
    )


def _everything() -> Finding:
    """Tell of all tables, for no launcher says how ranks will be placed."""
    kept = tables.kept()
    damaged = [path for path, table in kept.items() if table is None]
    if damaged:
        return warn(f"{damaged[0]} cannot be read and is ignored", f"remove it; or {_MEASURE}")
    found = [f"layout {table.key.layout}: {'; '.join(table.describe())}" for table in kept.values() if table]
    if not found:
        return ok(f"no table in {_folder()}: calls are left to the MPI library; to {_MEASURE} -n N")
    more = [f"and {len(found) - _SHOWN} more"] if len(found) > _SHOWN else []
    return ok(f"{plural(len(found), 'table')} in {_folder()}; {' | '.join([*found[:_SHOWN], *more])}")


def _folder() -> str:
    return str(tables.folder())
