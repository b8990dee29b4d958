"""The formats by name; one more is one class and one line here."""

from __future__ import annotations

from mpitrain.comm.codecs.format import Format, Full
from mpitrain.comm.codecs.halves import Bf16, Fp16
from mpitrain.comm.codecs.int8 import Int8

FORMATS: dict[str, type[Format]] = {cls.name: cls for cls in (Full, Fp16, Bf16, Int8)}
