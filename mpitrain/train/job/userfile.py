"""Gets an object out of a user's own Python file: ``"my_model.py:build"``.

The file is run like a script: its folder is on the import path, so that it can import the files beside it.  What
goes wrong in it becomes one line that names the file and the line of the file.
"""

from __future__ import annotations

import hashlib
import inspect
import sys
import traceback
from collections.abc import Mapping
from pathlib import Path
from types import CodeType, ModuleType
from typing import Any

from mpitrain._errors import JobError
from mpitrain._names import did_you_mean

_EXTRAS = {"jax": "jax", "matplotlib": "plot", "sklearn": "datasets", "torch": "torch"}
"""Which extra brings which library that a user's file may import."""


def load_object(spec: str) -> Any:
    """Run a Python file and return one of its objects.

    Parameters
    ----------
    spec : str
        ``"file.py:name"``; a relative file is looked for in the current folder.

    Raises
    ------
    JobError
        There is no such file or no such name in it, the file is not Python, or an exception ended it.

    Notes
    -----
    Not collective: each rank runs the file.  A file with the same content is run once in a process, so that all that
    is taken from it belongs together.
    """
    file, colon, name = spec.rpartition(":")
    if not (colon and file and name.isidentifier()):
        raise JobError("does not name an object", operation="build", got=spec, expected='"file.py:name"')
    path = Path(file)
    module = _run(path, _read(path))
    if not hasattr(module, name):
        names = [other for other in vars(module) if not other.startswith("_")]
        raise JobError(
            f'there is no "{name}"', operation=str(path), expected=", ".join(names) or "a function",
            remedy=did_you_mean(name, names),
        )  # fmt: skip
    return getattr(module, name)


def call_object(spec: str, options: Mapping[str, Any]) -> Any:
    """Return what the function ``"file.py:name"`` gives for options.

    Raises
    ------
    JobError
        See `load_object`; or the function does not take these options.
    """
    function = load_object(spec)
    try:
        inspect.signature(function).bind(**options)
    except (TypeError, ValueError) as error:
        got = ", ".join(options) or "no options"
        raise JobError(f"cannot be called with the job's options: {error}", operation=spec, got=got) from error
    return function(**options)


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except FileNotFoundError as error:
        neighbours = sorted(other.name for other in path.parent.glob("*.py"))
        remedy = did_you_mean(path.name, neighbours)
        raise JobError("no such file", operation=str(path), expected="a Python file", remedy=remedy) from error
    except (OSError, ValueError) as error:
        raise JobError(f"cannot be read: {error}", operation=repr(str(path)), expected="a Python file") from error


def _run(path: Path, source: bytes) -> ModuleType:
    digest = hashlib.sha256(str(path).encode(errors="surrogateescape") + b"\0" + source).hexdigest()[:12]
    name = f"{path.stem}_{digest}"
    if name in sys.modules:
        return sys.modules[name]
    module = ModuleType(name)
    module.__file__ = str(path)
    code = _compile(path, source)
    if str(path.parent) not in sys.path:
        sys.path.append(str(path.parent))
    sys.modules[name] = module  # dataclasses and pickle look a class's module up there
    try:
        exec(code, module.__dict__)
    except (Exception, SystemExit) as error:
        del sys.modules[name]
        at = f"{path}{_line_in(path, error)}"
        raise JobError(_ended_by(error), operation=at, remedy=_remedy(error)) from error
    return module


def _compile(path: Path, source: bytes) -> CodeType:
    try:
        return compile(source, str(path), "exec", dont_inherit=True)
    except SyntaxError as error:
        line = f", line {error.lineno}" if error.lineno else ""
        raise JobError(f"is not Python: {error.msg}", operation=f"{path}{line}") from error
    except ValueError as error:  # a null byte
        raise JobError(f"is not Python: {error}", operation=str(path)) from error


def _ended_by(error: BaseException) -> str:
    text = " ".join(str(error).split())
    return f"ended by {type(error).__name__}: {text}" if text else f"ended by {type(error).__name__}"


def _remedy(error: BaseException) -> str | None:
    """Return what brings the library that is missing, if an extra of this package does."""
    missing = (error.name or "").partition(".")[0] if isinstance(error, ModuleNotFoundError) else ""
    return f"pip install 'mpitrain[{_EXTRAS[missing]}]'" if missing in _EXTRAS else None


def _line_in(path: Path, error: BaseException) -> str:
    lines = [frame.lineno for frame in traceback.extract_tb(error.__traceback__) if frame.filename == str(path)]
    return f", line {lines[-1]}" if lines else ""
