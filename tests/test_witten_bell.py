"""The n-gram model that trained models of text are compared with, against its definition and by hand."""

from fractions import Fraction

import numpy as np
import pytest
from witten_bell import bits_per_token


def by_definition(seen: list[int], context: list[int], token: int, vocabulary: int) -> Fraction:
    """The chance of a token after a context, by counting."""
    shorter = by_definition(seen, context[1:], token, vocabulary) if context else Fraction(1, vocabulary)
    length = len(context)
    followers = [seen[i + length] for i in range(len(seen) - length) if seen[i : i + length] == context]
    total = len(followers) + len(set(followers))
    return (followers.count(token) + len(set(followers)) * shorter) / total if total else shorter


@pytest.mark.parametrize("order", [1, 2, 3, 5])
def test_it_is_what_counting_gives(order):
    tokens = np.random.default_rng(order).integers(0, 4, 60) ** 2 % 5
    found = bits_per_token(tokens, 40, order, vocabulary=6)
    seen, all_tokens = tokens[:40].tolist(), tokens.tolist()
    expected = [by_definition(seen, all_tokens[i - order + 1 : i], all_tokens[i], 6) for i in range(40, 60)]
    np.testing.assert_allclose(2.0**-found, np.array(expected, float), rtol=1e-12)


def test_the_chances_of_all_tokens_add_up_to_one():
    tokens = np.random.default_rng(0).integers(0, 3, 50)
    ends = [bits_per_token(np.append(tokens, last), 50, 3, vocabulary=4)[0] for last in range(4)]
    assert sum(2.0 ** -np.array(ends)) == pytest.approx(1.0, rel=1e-12)
