"""An n-gram model of text, smoothed after Witten and Bell: what a trained model of text must beat.

Witten, Bell, "The zero-frequency problem", IEEE Transactions on Information Theory 37, 1991, method C, interpolated:
the chance of ``c`` after the context ``h`` is (N(h c) + T(h) · P(c | h')) / (N(h) + T(h)), where N counts, T(h) is the
number of different tokens seen after ``h``, and h' is h without its first token; at the end stands 1 / vocabulary.
"""

from __future__ import annotations

import numpy as np


def bits_per_token(tokens: np.ndarray, first: int, order: int, vocabulary: int) -> np.ndarray:
    """Return −log₂ of the chance of each token from position ``first`` on, counts being of those before it.

    ``tokens`` (n,) are integers below ``vocabulary``; each is predicted from the ``order − 1`` before it, of which the
    first ones may lie before ``first``.
    """
    tokens = tokens.astype(np.int64)
    chance = np.full(len(tokens) - first, 1.0 / vocabulary)
    for length in range(order):
        grams = _grams(tokens, length + 1, vocabulary)  # grams[i] ends at token i + length
        seen, wanted = grams[: first - length], grams[first - length :]
        counts = _Counts(seen)
        contexts = _Counts(seen // vocabulary)
        different = _Counts(counts.keys // vocabulary)
        n, t = contexts[wanted // vocabulary], different[wanted // vocabulary]
        chance = np.where(n > 0, (counts[wanted] + t * chance) / np.maximum(n + t, 1), chance)
    bits: np.ndarray = -np.log2(chance)
    return bits


def _grams(tokens: np.ndarray, length: int, vocabulary: int) -> np.ndarray:
    """Return each run of ``length`` tokens as one number."""
    runs = len(tokens) - length + 1
    found = np.zeros(runs, np.int64)
    for position in range(length):
        found = found * vocabulary + tokens[position : position + runs]
    return found


class _Counts:
    """How often each number occurs."""

    def __init__(self, numbers: np.ndarray) -> None:
        self.keys, self.counts = np.unique(numbers, return_counts=True)

    def __getitem__(self, numbers: np.ndarray) -> np.ndarray:
        places = np.minimum(np.searchsorted(self.keys, numbers), len(self.keys) - 1)
        return np.where(self.keys[places] == numbers, self.counts[places], 0)
