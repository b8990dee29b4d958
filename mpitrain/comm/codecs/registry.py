"""The codecs by the names that job files use.  One more is one class and one line here."""

from __future__ import annotations

from typing import Any

from mpitrain._options import construct
from mpitrain.comm.codecs.codec import Codec
from mpitrain.comm.codecs.halves import Bf16, Fp16
from mpitrain.comm.codecs.int8 import Int8
from mpitrain.comm.codecs.powersgd import PowerSGD
from mpitrain.comm.codecs.topk import TopK

CODECS: dict[str, type[Codec]] = {cls.name: cls for cls in (Fp16, Bf16, Int8, TopK, PowerSGD)}


def make_codec(name: str, **options: Any) -> Codec:
    """Return the codec that ``name`` stands for.

    Parameters
    ----------
    name : str
        A key of `CODECS`.
    **options
        Its options.

    Raises
    ------
    InputError
        The name or an option is unknown, or a value is not allowed.
    """
    return construct("codec", CODECS, name, options)
