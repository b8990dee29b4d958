"""Compiles the loops of shared transport and optimizers while the package is built; without a C compiler, without them.

``CC`` and ``CFLAGS`` are heeded.  `mpitrain doctor` tells whether an installation has the loops.
"""

import os
import shlex
import shutil
import subprocess
import sysconfig
from pathlib import Path
from typing import Any

from hatchling.builders.hooks.plugin.interface import BuildHookInterface

_FLAGS = ("-std=c11", "-O3", "-ffp-contract=off", "-fno-math-errno", "-shared", "-fPIC")
_FOLDERS = ("mpitrain/comm/transports", "mpitrain/optim")


class KernelHook(BuildHookInterface):
    """Builds ``_kernel.so`` beside each ``kernel.c``."""

    def initialize(self, version: str, build_data: dict[str, Any]) -> None:
        """Compile, and make the wheel one for this platform if that succeeded."""
        if self.target_name != "wheel":
            return
        for folder in _FOLDERS:
            library = Path(self.root, folder, "_kernel.so")
            library.unlink(missing_ok=True)
            if self._compile(Path(self.root, folder, "kernel.c"), library):
                build_data["pure_python"] = False
                build_data["tag"] = f"py3-none-{sysconfig.get_platform().replace('-', '_').replace('.', '_')}"
                build_data["artifacts"].append(f"{folder}/_kernel.so")

    def _compile(self, source: Path, library: Path) -> bool:
        compiler = shlex.split(os.environ.get("CC", "cc"))
        if shutil.which(compiler[0]) is None:
            self.app.display_warning(f"no C compiler ({compiler[0]}): mpitrain is built without its compiled loops")
            return False
        flags = shlex.split(os.environ.get("CFLAGS", ""))
        made = library.with_suffix(f".{os.getpid()}.tmp")
        try:
            subprocess.run([*compiler, *_FLAGS, *flags, str(source), "-o", str(made), "-lm"], check=True)
        except subprocess.CalledProcessError:
            self.app.display_warning("the C compiler failed: mpitrain is built without its compiled loops")
            return False
        made.replace(library)
        return True
