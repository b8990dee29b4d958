"""The ``[method.codec]`` section: how gradients are compressed on the wire; a name alone takes the defaults."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field

from mpitrain.train.job.section import Count, KindSection


class Codec(KindSection):
    """How gradients are compressed on the wire; by default not at all.

    `codec = "powersgd"` in `[method]` takes a codec with its defaults, `codec = { kind = "topk", ratio = 0.05 }` sets
    options. What a codec leaves out of a step is kept, also in checkpoints, and added to the next.
    """

    min_size: Count = Field(1024, description="Tensors of fewer elements travel uncompressed.")


class Fp16(Codec):
    """Gradients as 16-bit floats with 10 bits of mantissa."""

    kind: Literal["fp16"]


class Bf16(Codec):
    """Gradients as 16-bit floats with the range of float32 and 7 bits of mantissa."""

    kind: Literal["bf16"]


class Int8(Codec):
    """Gradients as 8-bit integers, with one scale per block, rounded at random."""

    kind: Literal["int8"]
    block: int = Field(256, ge=8, description="Values that share a scale.")


class TopK(Codec):
    """Only the largest gradients of each rank, as indices and values."""

    kind: Literal["topk"]
    ratio: float = Field(0.01, gt=0, le=1, description="Share of the gradients that is sent.")
    values: Literal["full", "fp16", "bf16", "int8"] = Field(
        "full", description="How the values travel: as they are, or compressed in turn."
    )


class PowerSgd(Codec):
    """Each matrix of gradients as the product of two thin ones; only where these are smaller."""

    kind: Literal["powersgd"]
    rank: Count = Field(4, description="Columns of the thin matrices.")


def _named(value: Any) -> Any:
    """Take a name alone for the codec with its defaults."""
    return {"kind": value} if isinstance(value, str) else value


CodecSection = Annotated[Fp16 | Bf16 | Int8 | TopK | PowerSgd, Field(discriminator="kind"), BeforeValidator(_named)]
