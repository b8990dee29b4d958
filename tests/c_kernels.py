"""CuPy's elementwise and reduction kernels, compiled as C for the CPU: the expressions that a GPU would run."""

from __future__ import annotations

import ctypes
import hashlib
import os
import shutil
import subprocess
import tempfile
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

COMPILER = shutil.which(os.environ.get("CC", "cc"))

_TYPES = {"float32": "float", "float64": "double"} | {
    f"{sign}int{bits}": f"{sign}int{bits}_t" for sign in ("u", "") for bits in (8, 16, 32, 64)
}
_BEGIN = """
#include <math.h>
#include <stdint.h>
#include <string.h>
#include <tgmath.h>
static inline float __uint_as_float(uint32_t bits) { float x; memcpy(&x, &bits, 4); return x; }
static inline uint32_t __float_as_uint(float x) { uint32_t bits; memcpy(&bits, &x, 4); return bits; }
"""
_ELEMENTWISE = """
void run(int64_t n, void **_at) {{
  for (int64_t i = 0; i < n; i++) {{
{loads}
{{ {code}; }}
{stores}
  }}
}}
"""
_REDUCTION = """
void run(int64_t n, int64_t length, void **_at) {{
  for (int64_t _row = 0; _row < n; _row++) {{
    T _sum = {identity};
    for (int64_t _each = 0; _each < length; _each++) {{
      const int64_t i = _row * length + _each;
{loads}
      const T a = _sum, b = {term};
      _sum = {combine};
    }}
    const T a = _sum;
    T {name};
    {result};
    (({type} *)_at[{last}])[_row] = {name};
  }}
}}
"""


class Parameter(NamedTuple):
    """A type, ``T`` for any, and a name."""

    type: str
    name: str


def _parameters(text: str) -> list[Parameter]:
    return [Parameter(*each.split()) for each in text.split(",")]


class _Kernel:
    """What both kinds share: they take the memory of arrays, which others stand for, and numbers."""

    def __init__(self, ins: str, outs: str) -> None:
        self._ins, self._outs = _parameters(ins), _parameters(outs)
        self._all = [*self._ins, *self._outs]

    def _dtypes(self, hosts: Sequence[Any]) -> list[np.dtype]:
        """Return the dtype of each argument, which arrays must have."""
        generic = next((h.dtype for p, h in zip(self._all, hosts, strict=True) if p.type == "T" and _is_array(h)), None)
        dtypes = [np.dtype(generic if each.type == "T" else each.type) for each in self._all]
        for parameter, host, dtype in zip(self._all, hosts, dtypes, strict=True):
            if _is_array(host) and host.dtype != dtype:
                raise TypeError(f"{parameter.name}: {host.dtype} for {dtype}")
        return dtypes

    def _typedef(self, dtypes: Sequence[np.dtype]) -> str:
        found = [dtype for parameter, dtype in zip(self._all, dtypes, strict=True) if parameter.type == "T"]
        return f"typedef {_TYPES[found[0].name]} T;\n" if found else ""

    def _loads(self, parameters: Sequence[Parameter], dtypes: Sequence[np.dtype], const: str = "const ") -> str:
        lines = []
        for parameter, dtype in zip(parameters, dtypes, strict=True):
            kind, place = _TYPES[dtype.name], self._all.index(parameter)
            lines.append(f"{const}{kind} {parameter.name} = (({kind} *)_at[{place}])[i];")
        return "\n".join(lines)


class ElementwiseKernel(_Kernel):
    """CuPy's: arrays and numbers are broadcast, outputs may be read."""

    def __init__(self, ins: str, outs: str, code: str, name: str) -> None:
        super().__init__(ins, outs)
        self._code = code

    def __call__(self, *arguments: Any) -> None:
        hosts = [getattr(each, "_host", each) for each in arguments]
        dtypes = self._dtypes(hosts)
        outs = hosts[len(self._ins) :]
        shape = np.broadcast_shapes(*(np.shape(each) for each in hosts))
        assert all(each.shape == shape for each in outs), "an output would have to be broadcast"
        memory = _contiguous(hosts, dtypes, shape)
        loads = self._loads(self._ins, dtypes[: len(self._ins)])
        loads += "\n" + self._loads(self._outs, dtypes[len(self._ins) :], const="")
        stores = "\n".join(
            f"(({_TYPES[dtype.name]} *)_at[{place}])[i] = {self._all[place].name};"
            for place, dtype in enumerate(dtypes)
            if place >= len(self._ins)
        )
        source = self._typedef(dtypes) + _ELEMENTWISE.format(loads=loads, code=self._code, stores=stores)
        _compiled(source)(ctypes.c_int64(memory[-1].size), _addresses(memory))
        for out, found in zip(outs, memory[len(self._ins) :], strict=True):
            out[...] = found


class ReductionKernel(_Kernel):
    """CuPy's, over the last axis, which is kept: sums and the like of one output."""

    def __init__(
        self, ins: str, outs: str, term: str, combine: str, result: str, identity: str, name: str
    ) -> None:  # fmt: skip
        super().__init__(ins, outs)
        self._expressions = {"term": term, "combine": combine, "result": result, "identity": identity}

    def __call__(self, *arguments: Any, axis: int, keepdims: bool) -> None:
        assert axis == -1, "not needed so far"
        assert keepdims, "not needed so far"
        hosts = [getattr(each, "_host", each) for each in arguments]
        dtypes = self._dtypes(hosts)
        *ins, out = hosts
        shape = np.broadcast_shapes(*(np.shape(each) for each in ins))
        assert out.shape == (*shape[:-1], 1), "the output does not fit"
        memory = [*_contiguous(ins, dtypes[:-1], shape), np.empty(out.shape, out.dtype)]
        source = self._typedef(dtypes) + _REDUCTION.format(
            loads=self._loads(self._ins, dtypes[:-1]), name=self._outs[0].name, last=len(ins),
            type=_TYPES[dtypes[-1].name], **self._expressions,
        )  # fmt: skip
        _compiled(source)(ctypes.c_int64(out.size), ctypes.c_int64(shape[-1]), _addresses(memory))
        out[...] = memory[-1]


def _is_array(x: Any) -> bool:
    return isinstance(x, np.ndarray)


def _contiguous(hosts: Sequence[Any], dtypes: Sequence[np.dtype], shape: tuple[int, ...]) -> list[np.ndarray]:
    """Return copies of one shape: what is written cannot change what is read."""
    return [
        np.array(np.broadcast_to(np.asarray(host, dtype), shape), order="C")
        for host, dtype in zip(hosts, dtypes, strict=True)
    ]


def _addresses(memory: Sequence[np.ndarray]) -> Any:
    return (ctypes.c_void_p * len(memory))(*(each.ctypes.data for each in memory))


@cache
def _compiled(source: str) -> Any:
    assert COMPILER, "no C compiler"
    with tempfile.TemporaryDirectory() as folder:
        library = Path(folder, hashlib.sha256(source.encode()).hexdigest()[:16])
        command = [COMPILER, "-std=c11", "-O1", "-ffp-contract=off", "-shared", "-fPIC", "-x", "c", "-", "-o", library]
        subprocess.run([*map(str, command), "-lm"], input=_BEGIN + source, text=True, check=True)
        return ctypes.CDLL(str(library)).run
