"""Compiles loops (transports, codecs, optimizers, layers, random words) and the short way of collectives at build time.

Without a C compiler the package is built without all of them; without Python's headers, without the way.  ``CC`` and
``CFLAGS`` are heeded, but for what would change a value.  `mpitrain doctor` tells what an installation has.
"""

import os
import shlex
import shutil
import subprocess
import sysconfig
from pathlib import Path
from typing import Any

from hatchling.builders.hooks.plugin.interface import BuildHookInterface

_FLAGS = (
    "-std=c11", "-O3", "-fno-fast-math", "-fno-unsafe-math-optimizations", "-ffp-contract=off", "-fno-math-errno",
    "-fno-trapping-math", "-shared", "-fPIC",
)  # fmt: skip
"""After the user's, whose -ffast-math would lose NaNs, and flush subnormal numbers in all of the process."""
_LOOPS = (
    ("mpitrain/comm/transports/kernel.c", "mpitrain/comm/transports/_kernel.so"),
    ("mpitrain/optim/kernel.c", "mpitrain/optim/_kernel.so"),
    ("mpitrain/arrays/kernel.c", "mpitrain/arrays/_kernel.so"),
    ("mpitrain/nn/kernel.c", "mpitrain/nn/_kernel.so", "-fno-thread-jumps"),  # else bounds split loops, see there
    ("mpitrain/comm/codecs/kernel.c", "mpitrain/comm/codecs/_kernel.so"),
)
_ENTRY = ("mpitrain/comm/transports/entry.c", "mpitrain/comm/transports/_entry.abi3.so")


class KernelHook(BuildHookInterface):
    """Builds the libraries beside their sources."""

    def initialize(self, version: str, build_data: dict[str, Any]) -> None:
        """Compile, and make the wheel one for this platform if that succeeded."""
        if self.target_name != "wheel":
            return
        for _, library, *_ in (*_LOOPS, _ENTRY):
            Path(self.root, library).unlink(missing_ok=True)
        built = [library for library in (*(self._compile(*each) for each in _LOOPS), self._entry()) if library]
        if built:
            build_data["pure_python"] = False
            build_data["tag"] = f"py3-none-{sysconfig.get_platform().replace('-', '_').replace('.', '_')}"
            build_data["artifacts"] += built

    def _entry(self) -> str | None:
        headers = sysconfig.get_path("include")
        if not Path(headers, "Python.h").exists():
            self.app.display_warning("no Python headers: mpitrain is built without the short way of its collectives")
            return None
        return self._compile(*_ENTRY, f"-I{headers}")

    def _compile(self, source: str, library: str, *flags: str) -> str | None:
        compiler = shlex.split(os.environ.get("CC", "cc"))
        if shutil.which(compiler[0]) is None:
            self.app.display_warning(f"no C compiler ({compiler[0]}): mpitrain is built without {source}")
            return None
        target = Path(self.root, library)
        made = target.with_suffix(f".{os.getpid()}.tmp")
        flags = (*shlex.split(os.environ.get("CFLAGS", "")), *_FLAGS, *flags)
        try:
            subprocess.run([*compiler, *flags, str(Path(self.root, source)), "-o", str(made), "-lm"], check=True)
        except subprocess.CalledProcessError:
            self.app.display_warning(f"the C compiler failed: mpitrain is built without {source}")
            return None
        made.replace(target)
        return library
