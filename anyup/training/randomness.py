"""Draws that depend on a key alone: the same in every process, on every machine, after every resume."""

from __future__ import annotations

import hashlib
import random

Key = int | str


def drawer(*key: Key) -> random.Random:
    """A source of random numbers for a key, such as (seed, "crops", number of the sample)."""
    return random.Random(number(*key))


def number(*key: Key) -> int:
    """63 bits that the key decides: the seed of a generator of another kind."""
    digest = hashlib.blake2b(repr(key).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") >> 1
