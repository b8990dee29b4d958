"""Codecs: sums of gradients with fewer bytes on the wire, and error feedback for what they leave out."""

from mpitrain.comm.codecs.codec import Codec, State
from mpitrain.comm.codecs.compressed import CompressedSum, Kept
from mpitrain.comm.codecs.format import Format, Full, Wire
from mpitrain.comm.codecs.formats import FORMATS
from mpitrain.comm.codecs.halves import Bf16, Fp16
from mpitrain.comm.codecs.int8 import Int8
from mpitrain.comm.codecs.powersgd import PowerSGD
from mpitrain.comm.codecs.registry import CODECS, make_codec
from mpitrain.comm.codecs.topk import TopK

__all__ = [
    "CODECS",
    "FORMATS",
    "Bf16",
    "Codec",
    "CompressedSum",
    "Format",
    "Fp16",
    "Full",
    "Int8",
    "Kept",
    "PowerSGD",
    "State",
    "TopK",
    "Wire",
    "make_codec",
]
