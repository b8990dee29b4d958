"""What a check finds, and how checks are run so that none can take the others down with it."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from typing import Any, Literal

from mpitrain._errors import MpitrainError

Status = Literal["ok", "warn", "FAIL"]


@dataclass(frozen=True)
class Finding:
    """One line of ``mpitrain doctor``.

    Parameters
    ----------
    status : {"ok", "warn", "FAIL"}
        ``FAIL``: training over MPI does not work; ``warn``: it works, but not as well or not in every way.
    what : str
        What was looked at; filled in by `examine`.
    found : str
        What the machine is like, in one line.
    remedy : str
        What to do about it; empty if ok, or if ``found`` is an error message that ends with it.
    """

    status: Status
    what: str
    found: str
    remedy: str = ""


Check = Callable[..., Finding | None]
"""Looks at one thing; None where that thing does not concern this machine."""


def ok(found: str) -> Finding:
    """Return a finding that asks for nothing."""
    return Finding("ok", "", found)


def warn(found: str, remedy: str) -> Finding:
    """Return a finding that works, but not well."""
    return Finding("warn", "", found, remedy)


def fail(found: str, remedy: str = "") -> Finding:
    """Return a finding that breaks training."""
    return Finding("FAIL", "", found, remedy)


def examine(checks: Iterable[tuple[str, Check]], *subject: Any) -> Iterator[Finding]:
    """Run checks one by one and yield what they find; what breaks several checks is told once.

    Parameters
    ----------
    checks : iterable of (str, Check)
        What is looked at, and the function that looks.
    *subject
        What every check is called with.
    """
    errors = set()
    for what, check in checks:
        finding = _guarded(check, *subject)
        if finding is None or finding.found in errors:
            continue
        if finding.status == "FAIL":
            errors.add(finding.found)
        yield replace(finding, what=what)


def _guarded(check: Check, *subject: Any) -> Finding | None:
    """Run a check; one that crashes has found something broken too."""
    try:
        return check(*subject)
    except MpitrainError as error:
        return fail(str(error))
    except Exception as error:
        message = " ".join(f"{type(error).__name__}: {error}".split())
        return fail(f"the check itself failed: {message}", "mend what the message names, or report it as a bug")
