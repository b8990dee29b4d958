"""Compiles the loops of a `kernel.c` anew, for tests: from changed sources, or with other flags."""

from __future__ import annotations

import ast
import re
import shutil
import subprocess
from dataclasses import replace
from pathlib import Path

import pytest

import mpitrain
from mpitrain.arrays.compiled import CompiledLibrary

PACKAGE = Path(mpitrain.__file__).parent
HOOK = Path(__file__).parents[1] / "hatch_build.py"


def header(name: str) -> str:
    """Return the text of a header of `mpitrain/arrays`."""
    return (PACKAGE / "arrays" / name).read_text()


def rebuild(library: CompiledLibrary, folder: Path, *flags: str, **changed: str) -> CompiledLibrary:
    """Return the library built from a copy of its sources; skip the test where there is no compiler.

    Parameters
    ----------
    library : CompiledLibrary
        Of a `kernel.c` beside it.
    folder : Path
        For the copy.
    flags : str
        For the compiler, behind those of the package.
    changed : str
        The text of sources, by their names without ending.
    """
    compiler = shutil.which("cc") or pytest.skip("no C compiler")
    source = folder / library.path.relative_to(PACKAGE).with_name("kernel.c")
    for each in (library.path.with_name("kernel.c"), *PACKAGE.glob("arrays/*.h")):
        copy = folder / each.relative_to(PACKAGE)
        copy.parent.mkdir(parents=True, exist_ok=True)
        copy.write_text(changed.get(each.stem) or each.read_text())
    built = folder / "rebuilt.so"
    subprocess.run([compiler, *_package_flags(), *flags, "-o", built, source, "-lm"], check=True)
    found = replace(library, path=built)
    assert found.loaded is not None
    return found


def _package_flags() -> tuple[str, ...]:
    """Return what all loops are built with; the build hook itself needs hatchling, which tests do not install."""
    found = re.search(r"^_FLAGS = (\(.*?^\))", HOOK.read_text(), re.DOTALL | re.MULTILINE)
    assert found is not None
    flags: tuple[str, ...] = ast.literal_eval(found[1])
    return flags
