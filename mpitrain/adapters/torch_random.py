"""PyTorch's global random state, set from a key for a while and put back afterwards."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from mpitrain.arrays import Key


@contextmanager
def seeded(key: Key) -> Iterator[None]:
    """Seed PyTorch's generator of the CPU for what happens inside: the same values on every rank, whatever came before.

    Parameters
    ----------
    key : Key
        Names the stream: 63 bits of its words are the seed.
    """
    low, high = key.words
    generator = torch.default_generator
    before = generator.get_state()
    generator.manual_seed(((low | high << 32) ^ key.step) & (1 << 63) - 1)
    try:
        yield
    finally:
        generator.set_state(before)
