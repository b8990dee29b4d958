"""The manifest of a checkpoint: what is in its files, sealed by a checksum; knows JSON, and neither arrays nor ranks.

It is one JSON object in canonical form (sorted keys, no superfluous byte), so that any change of any byte is noticed:
either the text is no longer what its own contents would be written as, or the checksum differs.
"""

from __future__ import annotations

import hashlib
import json
import sys
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass
from itertools import combinations
from math import prod
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

import numpy as np
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from mpitrain._errors import CheckpointError, InputError
from mpitrain._typing import DType
from mpitrain.arrays import Box
from mpitrain.arrays.box import box_size, inside
from mpitrain.method.state import Kind

MANIFEST = "manifest.json"
FORMAT = "mpitrain-checkpoint"
VERSION = 1

_INTEGERS = [f"{sign}int{bits}" for sign in ("", "u") for bits in (8, 16, 32, 64)]
_DTYPES = frozenset(["bool", *_INTEGERS, "float16", "bfloat16", "float32", "float64", "complex64", "complex128"])

_Count = Annotated[int, Field(ge=0)]
_Checksum = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]


class _Strict(BaseModel, strict=True, extra="forbid", frozen=True):
    """No conversions ("3" is not 3), no unknown keys."""


class PieceEntry(_Strict):
    """Where the values of one piece lie: bytes of a file, elements of a tensor (see `mpitrain.method.state.Piece`)."""

    file: Annotated[str, Field(pattern=r"^rank-[0-9]{5,9}\.bin$")]
    offset: _Count
    nbytes: _Count
    box: tuple[tuple[_Count, _Count], ...]
    flat: tuple[_Count, _Count]
    checksum: _Checksum

    @property
    def rank(self) -> int:
        """The rank that wrote it."""
        return int(self.file[len("rank-") : -len(".bin")])

    @property
    def end(self) -> int:
        """Where its bytes end in the file."""
        return self.offset + self.nbytes

    @property
    def size(self) -> int:
        """Number of elements."""
        return self.flat[1] - self.flat[0]


class TensorEntry(_Strict):
    """One tensor, and the pieces it is made of."""

    dtype: str
    shape: tuple[_Count, ...]
    kind: Kind
    pieces: tuple[PieceEntry, ...]


@dataclass(frozen=True)
class Score:
    """How good the model is by the metric that picks the best checkpoint.

    Parameters
    ----------
    metric : str
        Its name.
    value : float
        Its value.
    higher_is_better : bool
        Which way is up.
    """

    __pydantic_config__: ClassVar[ConfigDict] = ConfigDict(strict=True, extra="forbid")

    metric: str
    value: float
    higher_is_better: bool

    def beats(self, other: Score | None) -> bool:
        """Tell whether this is better than ``other``; a score of another metric does not count."""
        if other is None or (other.metric, other.higher_is_better) != (self.metric, self.higher_is_better):
            return True
        return self.value > other.value if self.higher_is_better else self.value < other.value


class Best(_Strict):
    """The record of which checkpoint is best."""

    checkpoint: Annotated[str, Field(pattern=r"^step-[0-9]{8,}$")]
    score: Score


class LayoutTensorEntry(_Strict):
    """One tensor of the model."""

    shape: tuple[_Count, ...]
    group: str


class LayoutEntry(_Strict):
    """The model's layout, as `mpitrain.arrays.Layout.manifest` says it."""

    dtype: str
    ties: dict[str, str]
    tensors: dict[str, LayoutTensorEntry]


class Manifest(_Strict):
    """Everything but the values."""

    format: str
    version: int
    byteorder: Literal["little", "big"]
    step: _Count
    ranks: Annotated[int, Field(ge=1)]
    fingerprint: _Checksum
    layout: LayoutEntry
    score: Score | None
    scalars: dict[str, Any]
    tensors: dict[str, TensorEntry]


def file_name(rank: int) -> str:
    """Return the name of the file that a rank writes."""
    return f"rank-{rank:05d}.bin"


def checksum(chunks: Iterable[bytes | memoryview]) -> str:
    """Return 32 bytes of BLAKE2b over all chunks, in hexadecimal."""
    digest = hashlib.blake2b(digest_size=32)
    for chunk in chunks:
        digest.update(chunk)
    return digest.hexdigest()


def dtype_of(name: str) -> DType:
    """Return the dtype of a name.

    Raises
    ------
    CheckpointError
        It is not among those that checkpoints hold, or is bfloat16 and ``ml_dtypes`` is not installed.
    """
    if name not in _DTYPES:
        raise CheckpointError("dtype that checkpoints do not hold", got=repr(name), expected=", ".join(sorted(_DTYPES)))
    if name == "bfloat16":
        try:
            import ml_dtypes  # noqa: F401  (it registers bfloat16 with NumPy)
        except ImportError as error:
            raise CheckpointError("tensors are bfloat16", remedy="pip install ml_dtypes") from error
    found: DType = np.dtype(name)
    return found


def seal(manifest: dict[str, Any]) -> bytes:
    """Return the text of a manifest, checksum included.

    Raises
    ------
    InputError
        It holds what JSON cannot say: NaN, infinity, an array, keys that are not strings.
    """
    try:
        body = _canonical(manifest)
    except (TypeError, ValueError, RecursionError) as error:
        raise InputError("a scalar of the state cannot be written as JSON", got=str(error)) from error
    if not _keys_are_strings(manifest):
        raise InputError("a scalar of the state has keys that JSON would change", expected="strings")
    return _canonical(manifest | {"checksum": checksum([body])})


def unseal(text: bytes) -> Manifest:
    """Return the manifest of a text.

    Raises
    ------
    CheckpointError
        It is damaged, of an unknown version, or says what cannot be.
    """
    try:
        document = json.loads(text)
        whole = isinstance(document, dict) and _canonical(document) == text
    except (ValueError, RecursionError) as error:
        raise CheckpointError("damaged: not valid JSON", got=str(error)) from error
    if not whole:
        raise CheckpointError("damaged: its bytes are not as they were written")
    if document.get("format") != FORMAT or document.get("version") != VERSION:
        raise CheckpointError(
            "unknown format", got=f"{document.get('format')!r}, version {document.get('version')!r}",
            expected=f"{FORMAT!r}, version {VERSION}", remedy="read it with the version of mpitrain that wrote it",
        )  # fmt: skip
    if document.pop("checksum", None) != checksum([_canonical(document)]):
        raise CheckpointError("damaged: its checksum differs")
    return _parse(document)


def read_manifest(checkpoint: Path) -> Manifest:
    """Return the manifest of a checkpoint.

    Raises
    ------
    CheckpointError
        It cannot be read, or `unseal` refuses it; the message names the file.
    """
    file = checkpoint / MANIFEST
    try:
        return unseal(file.read_bytes())
    except OSError as error:
        raise CheckpointError(f"{file}: {error.strerror}") from error
    except CheckpointError as error:
        raise CheckpointError(f"{file}: {error}") from error


def check_tensor(name: str, tensor: TensorEntry) -> None:
    """Check that the pieces of a tensor make it up: they tile it, or, when they are summed, may also overlap.

    Raises
    ------
    CheckpointError
        They do not.
    """
    itemsize = dtype_of(tensor.dtype).itemsize
    for piece in tensor.pieces:
        low, high = piece.flat
        if not (inside(piece.box, tensor.shape) and low < high <= box_size(piece.box)):
            raise _misfit(name, f"a piece lies outside it: box {piece.box}, range {piece.flat}")
        if piece.nbytes != piece.size * itemsize:
            raise _misfit(name, f"a piece of {piece.size} values has {piece.nbytes} bytes")
    covered, size = sum(piece.size for piece in tensor.pieces), prod(tensor.shape)
    if covered < size or (tensor.kind != "summed" and covered > size):
        raise _misfit(name, f"its pieces hold {covered} values, not {size}")
    if tensor.kind != "summed":
        _check_tiling(name, tensor)


def _check_tiling(name: str, tensor: TensorEntry) -> None:
    """Check that no element is in two pieces; with the right number of them, each is then in one.

    Notes
    -----
    Exact without a map of the elements: the pieces of one box follow each other without gap, and boxes are disjoint.
    """
    spans: dict[Box, list[tuple[int, int]]] = defaultdict(list)
    for piece in tensor.pieces:
        spans[piece.box].append(piece.flat)
    for box, ranges in spans.items():
        ranges.sort()
        starts, stops = [low for low, _ in ranges], [high for _, high in ranges]
        if [*starts, box_size(box)] != [0, *stops]:
            raise _misfit(name, f"the pieces of box {box} overlap or leave gaps: {ranges[:4]}")
    for one, two in combinations(spans, 2):
        if all(a[0] < b[1] and b[0] < a[1] for a, b in zip(one, two, strict=True)):
            raise _misfit(name, f"boxes {one} and {two} overlap")


def _canonical(document: Any) -> bytes:
    return json.dumps(document, sort_keys=True, allow_nan=False, separators=(",", ":")).encode("ascii")


def _keys_are_strings(value: Any) -> bool:
    if isinstance(value, dict):
        return all(isinstance(key, str) and _keys_are_strings(item) for key, item in value.items())
    return all(map(_keys_are_strings, value)) if isinstance(value, list | tuple) else True


def _parse(document: dict[str, Any]) -> Manifest:
    try:
        manifest = Manifest.model_validate_json(_canonical(document))
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        where = ".".join(str(part) for part in first["loc"])
        raise CheckpointError(f"{where}: {first['msg']}", got=repr(first["input"])[:80]) from error
    if manifest.byteorder != sys.byteorder:
        raise CheckpointError(
            "written on a machine of other byte order", got=manifest.byteorder, expected=sys.byteorder
        )
    for name, tensor in manifest.tensors.items():
        check_tensor(name, tensor)
    return manifest


def _misfit(name: str, problem: str) -> CheckpointError:
    return CheckpointError(f"tensor {name!r}: {problem}")
