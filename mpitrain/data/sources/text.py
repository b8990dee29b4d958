"""Text as tokens, of which each is to be predicted from those before it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

from mpitrain._errors import DataError
from mpitrain.data.dataset import Dataset
from mpitrain.data.sources.files import PathLike, reading
from mpitrain.data.tokenizer import Tokenizer, check_unit
from mpitrain.data.windows import windows

TextUnit = Literal["character", "byte"]


def text(
    *,
    path: PathLike,
    unit: TextUnit = "character",
    context: int = 1,
    stride: int | None = None,
    vocabulary: Sequence[str] = (),
) -> Dataset:
    """Return the next-token pairs of a text file; every rank reads it.

    Parameters
    ----------
    path : path
        The file; UTF-8 if the unit is the character.
    unit : {"character", "byte"}
        What a token is.
    context : int
        1: inputs and targets are (n,), a token and its successor (the pairs of a bigram model).  More: they are
        windows (n, context) of the text, the targets one token further on.  Windows are views, not copies.
    stride : int, optional
        Tokens from the start of one window to the next; ``context`` (windows side by side) if None.
    vocabulary : sequence of str, optional
        The tokens of a vocabulary made before, in its order; by default the sorted tokens of this text.  Bytes are
        named in hexadecimal: ``"0a"``.

    Returns
    -------
    Dataset
        A ``sequence``; its ``class_names`` are the vocabulary.
    """
    check_unit(str(path), unit, ("character", "byte"))
    with reading(path, "text in UTF-8" if unit == "character" else "bytes") as file:
        content = file.read_bytes()
        tokenizer = Tokenizer(unit, tuple(vocabulary)) if vocabulary else Tokenizer.of(content, unit)
        tokens = tokenizer.encode(content, str(path))
    return windows(tokens, str(path), context, stride, tokenizer.vocabulary)


def pydoc(*, unit: TextUnit = "character", context: int = 1, stride: int | None = None) -> Dataset:
    """Return the next-token pairs of the texts behind Python's ``help()``: 460 kB of English, in every Python.

    Parameters
    ----------
    unit, context, stride
        As for `text`.

    Raises
    ------
    DataError
        This Python was installed without them.
    """
    check_unit("pydoc", unit, ("character", "byte"))
    try:
        from pydoc_data.topics import topics
    except ImportError as error:
        raise DataError("pydoc: this Python has no module pydoc_data", remedy="take a text of your own") from error
    content = "\n".join(topics[name] for name in sorted(topics)).encode()
    tokenizer = Tokenizer.of(content, unit)
    return windows(tokenizer.encode(content), "pydoc", context, stride, tokenizer.vocabulary)
