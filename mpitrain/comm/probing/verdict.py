"""What came of a probe: kept in the user's cache for the machine, MPI library and CuPy that it was made with.

A file that is damaged, or of anything else, counts as no probe.
"""

from __future__ import annotations

import json
from dataclasses import asdict, astuple, dataclass, fields
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import NamedTuple

from mpitrain._errors import InputError
from mpitrain.comm import cache
from mpitrain.comm.machine import gpus, machine

_KIND = "devices"
_VERSION = 2
_PACKAGES = ("cupy-cuda13x", "cupy-cuda12x", "cupy-cuda11x", "cupy")


@dataclass(frozen=True)
class Setting:
    """What a verdict holds for.

    Parameters
    ----------
    machine : str
        Kind of machine, with its GPUs as far as the driver tells.
    library : str
        What the MPI library calls itself.
    cupy : str
        Package and version.
    """

    machine: str
    library: str
    cupy: str


@dataclass(frozen=True)
class Verdict:
    """Whether messages, broadcasts and reductions on memory of a device were right.

    Parameters
    ----------
    setting : Setting
        Where that was tried.
    problems : dict of str to str
        By transport: what went wrong, in a line; empty if nothing did.
    date : str
        When, to the second, UTC.
    """

    setting: Setting
    problems: dict[str, str]
    date: str

    @classmethod
    def now(cls, where: Setting, problems: dict[str, str]) -> Verdict:
        """Return a verdict of today's."""
        return cls(where, problems, datetime.now(UTC).isoformat(timespec="seconds"))

    @property
    def right(self) -> list[str]:
        """The transports with which everything was right."""
        return [name for name, problem in self.problems.items() if not problem]

    def __str__(self) -> str:
        """Say what came of it in a line."""
        told = "; ".join(f"{name}: {problem or 'right'}" for name, problem in self.problems.items())
        return f"probed on {self.date}: {told}"

    def to_json(self) -> str:
        """Return it as text for people and programs."""
        return json.dumps({"version": _VERSION, **asdict(self)}, indent=1)

    @classmethod
    def from_json(cls, text: str) -> Verdict:
        """Return the verdict that `to_json` wrote.

        Raises
        ------
        InputError
            The text is anything else.
        """
        found = cache.parse(text, _VERSION, {"setting": dict, "problems": dict, "date": str}, _WHAT)
        where = cache.typed(found["setting"], {field.name: str for field in fields(Setting)}, "the setting", _WHAT)
        problems = cache.typed(found["problems"], dict.fromkeys(found["problems"], str), "the problems", _WHAT)
        return cls(Setting(**where), problems, found["date"])


_WHAT = "verdict on device memory"


class Known(NamedTuple):
    """What the cache tells: a verdict or None, and one line that says which."""

    verdict: Verdict | None
    note: str


def setting(library: str) -> Setting:
    """Return the setting of this process; CuPy is not imported.

    Parameters
    ----------
    library : str
        The first line of what the MPI library calls itself.
    """
    devices = gpus()
    return Setting(f"{machine()}{f', {devices}' if devices else ''}", library, _cupy())


def save(verdict: Verdict) -> Path:
    """Keep a verdict.

    Raises
    ------
    StorageError
        The cache cannot be written.
    """
    return cache.write(_path(verdict.setting), verdict.to_json(), "the verdict on device memory")


def known(library: str) -> Known:
    """Return what was found for this machine, MPI library and CuPy."""
    nothing = Known(None, "not probed here: mpitrain doctor --probe-gpu finds out what may be used")
    if not cache.files(_KIND):  # the common case, at the cost of looking for the folder
        return nothing
    where = setting(library)
    path = _path(where)
    try:
        verdict = Verdict.from_json(path.read_text())
    except FileNotFoundError:
        return nothing
    except (InputError, OSError, UnicodeDecodeError) as error:
        return Known(None, f"{path} cannot be read, which counts as not probed: {error}")
    if verdict.setting != where:
        return Known(None, f"{path} is of another setting, which counts as not probed")
    return Known(verdict, str(verdict))


def _path(where: Setting) -> Path:
    return cache.path_of(_KIND, astuple(where))


def _cupy() -> str:
    for name in _PACKAGES:
        try:
            return f"{name} {version(name)}"
        except PackageNotFoundError:
            continue
    return "none"
