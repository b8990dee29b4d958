"""What kind of machine this is: its processors and GPUs, and the size of its last cache."""

from __future__ import annotations

import os
import platform
import re
from collections import Counter
from pathlib import Path

_CACHES = Path("/sys/devices/system/cpu/cpu0/cache")
_GPUS = Path("/proc/driver/nvidia/gpus")
_UNITS = {"": 1, "K": 2**10, "M": 2**20, "G": 2**30}


def cpu_model() -> str:
    """Return the name of the processor, or of its architecture where it tells no name, as on ARM."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    models = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(models, platform.machine())


def machine() -> str:
    """Name the kind of machine: nodes of one kind share what was measured on one of them."""
    return f"{os.cpu_count()} x {cpu_model()}"


def gpus(folder: Path = _GPUS) -> str:
    """Return the models of the GPUs, as NVIDIA's driver tells without CUDA being started; empty where it tells none.

    Parameters
    ----------
    folder : Path
        Where the driver describes each GPU.
    """
    models = Counter(_model(path) for path in sorted(folder.glob("*/information")))
    return ", ".join(f"{count} x {model}" for model, count in sorted(models.items()))


def last_level_cache_bytes(folder: Path = _CACHES) -> int:
    """Return the size of the last cache before memory, as the first CPU sees it; 0 if the machine does not tell.

    Parameters
    ----------
    folder : Path
        Where the kernel describes the caches of a CPU.
    """
    found = [(_number(cache / "level"), _number(cache / "size")) for cache in folder.glob("index*")]
    return max(found, default=(0, 0))[1] or _configured()


def _model(path: Path) -> str:
    try:
        lines = path.read_text().splitlines()
    except OSError:
        lines = []
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("Model:")), "unknown")


def _number(path: Path) -> int:
    """Return what the kernel wrote, e.g. ``32768K``; 0 if it is nothing of the kind."""
    try:
        match = re.fullmatch(r"(\d+)([KMG]?)\s*", path.read_text())
    except OSError:
        return 0
    return int(match[1]) * _UNITS[match[2]] if match else 0


def _configured() -> int:
    for name in ("SC_LEVEL4_CACHE_SIZE", "SC_LEVEL3_CACHE_SIZE", "SC_LEVEL2_CACHE_SIZE"):
        if name in os.sysconf_names and (size := os.sysconf(name)) > 0:
            return size
    return 0
