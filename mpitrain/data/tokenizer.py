"""Between text and the numbers of its tokens."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal, get_args

import numpy as np

from mpitrain._errors import DataError, InputError
from mpitrain._options import Interval, check
from mpitrain._typing import Array

Unit = Literal["character", "byte", "token"]
"""What a token is.  ``token``: a number that some other program has given it; its text is written as such numbers."""


@dataclass(frozen=True)
class Tokenizer:
    """Knows a vocabulary.

    Parameters
    ----------
    unit : {"character", "byte", "token"}
        What a token is.
    vocabulary : tuple of str
        The name of each token, in the order of their numbers: the character, or the byte in hexadecimal (``"0a"``).

    Raises
    ------
    InputError
        There is no such unit, or a name is that of two tokens.
    """

    unit: Unit
    vocabulary: tuple[str, ...]

    def __post_init__(self) -> None:
        check_unit("Tokenizer", self.unit)
        if len(set(self.vocabulary)) < len(self.vocabulary):
            twice = next(name for name, count in Counter(self.vocabulary).items() if count > 1)
            raise InputError("Tokenizer: two tokens of the vocabulary have one name", got=repr(twice))

    @classmethod
    def of(cls, content: bytes, unit: Unit) -> Tokenizer:
        """Return the tokenizer of the characters or bytes that ``content`` has, in sorted order.

        Raises
        ------
        InputError
            The unit is another: which tokens a tokenizer of the user's has, a text does not show.
        UnicodeDecodeError
            The content is not text.
        """
        check_unit("Tokenizer.of", unit, tuple(_NAMES))
        names = np.unique(_codes(content, unit)).tolist()
        return cls(unit, tuple(map(_NAMES[unit], names)))

    def encode(self, content: bytes, what: str = "text") -> Array:
        """Return the numbers of the tokens of ``content``, text in UTF-8 unless the unit is the byte: int32.

        Raises
        ------
        DataError
            A token is not in the vocabulary.
        UnicodeDecodeError
            The content is not text.
        """
        names, inverse = self._distinct(content)
        position = {name: number for number, name in enumerate(self.vocabulary)}
        strange = [name for name in names if name not in position]
        if strange:
            got = " ".join(map(repr, strange[:10]))
            raise DataError(f"{what}: the text has tokens that are not in the vocabulary", got=got)
        return np.array([position[name] for name in names], np.int32)[inverse]

    def decode(self, tokens: Sequence[int]) -> str:
        """Return the text of some tokens; bytes that are not UTF-8 become the replacement character.

        Raises
        ------
        InputError
            A token is not in the vocabulary.
        """
        known = Interval(0, len(self.vocabulary), whole=True)
        for token in tokens:
            check("Tokenizer.decode", "token", token, known)
        names = [self.vocabulary[token] for token in tokens]
        if self.unit == "byte":
            return bytes.fromhex("".join(names)).decode("utf-8", errors="replace")
        return (" " if self.unit == "token" else "").join(names)

    def _distinct(self, content: bytes) -> tuple[Sequence[str], Array]:
        """Return the names of the different tokens, and where in them each token is."""
        if self.unit == "token":
            names = content.decode().split()
            return names, np.arange(len(names))
        codes, inverse = np.unique(_codes(content, self.unit), return_inverse=True)
        return [_NAMES[self.unit](code) for code in codes.tolist()], inverse


def check_unit(what: str, unit: str, allowed: Sequence[str] = get_args(Unit)) -> None:
    """Require that there is such a unit."""
    if unit not in allowed:
        raise InputError(f"{what}: unknown unit of text", got=repr(unit), expected=" or ".join(sorted(allowed)))


_NAMES: dict[str, Callable[[int], str]] = {"byte": "{:02x}".format, "character": chr}
"""How a unit's code is named in the vocabulary."""


def _codes(content: bytes, unit: str) -> Array:
    if unit == "byte":
        return np.frombuffer(content, np.uint8)
    return np.frombuffer(content.decode("utf-8-sig").encode("utf-32-le"), np.uint32)
