"""Endless shuffled orders that are a pure function of a key, a step and a host: going on is a number."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator

import numpy as np
from jaxtyping import Int

from ..arrays import integer

_ROUNDS = 6


def shuffled(n: int, places: Int[np.ndarray, "B"], key: int, epoch: int) -> Int[np.ndarray, "B"]:
    """Entries of a permutation of `n` numbers, without making it.

    A Feistel network over the next even number of bits, walked until it lands below `n` (Black and Rogaway 2002, "Ciphers with
    arbitrary finite domains"): a bijection, which looks random and needs no memory.
    """
    half = max(1, (max(n - 1, 1).bit_length() + 1) // 2)
    low = np.uint64((1 << half) - 1)
    seeds = [_seed(key, epoch, i) for i in range(_ROUNDS)]

    def once(x: np.ndarray) -> np.ndarray:
        left, right = x >> np.uint64(half), x & low
        for seed in seeds:
            left, right = right, left ^ (_mixed(right ^ seed) & low)
        return (left << np.uint64(half)) | right

    found = once(np.asarray(places, np.uint64))
    while (outside := found >= n).any():
        found[outside] = once(found[outside])
    return found.astype(np.int64)


def order(
    n: int, size: int, *, key: int = 0, start: int = 0, host: int = 0, n_hosts: int = 1
) -> Iterator[Int[np.ndarray, "B"]]:
    """Batches of numbers below `n`, without end: each once before any twice, over all hosts together.

    Args:
        n: how many there are.
        size: of a batch, on one host.
        key: another one, another order.
        start: the step to begin at.
        host, n_hosts: whose batches, of how many hosts.

    Examples:
        >>> some = data.order(10, 4)
        >>> sorted(np.concatenate([next(some), next(some), next(some)])[:10].tolist())
        [0, 1, 2, 3, 4, 5, 6, 7, 8, 9]
        >>> again = data.order(10, 4, start=2)
        >>> next(some).tolist() == [next(again), next(again)][1].tolist()
        True
    """
    n, size, step = integer(n, "n", 1), integer(size, "size", 1), integer(start, "start", 0)
    n_hosts, key = integer(n_hosts, "n_hosts", 1), integer(key, "key")
    host = integer(host, "host", 0, n_hosts - 1)

    def batches() -> Iterator[np.ndarray]:
        at = step
        while True:
            places = (at * n_hosts + host) * size + np.arange(size, dtype=np.int64)
            found = np.empty(size, np.int64)
            for epoch in np.unique(places // n):
                here = places // n == epoch
                found[here] = shuffled(n, places[here] % n, key, int(epoch))
            yield found
            at += 1

    return batches()


def _seed(*numbers: int) -> np.uint64:
    return np.uint64(int.from_bytes(hashlib.blake2b(repr(numbers).encode(), digest_size=8).digest(), "little"))


def _mixed(x: np.ndarray) -> np.ndarray:
    """Steele, Lea and Flood's finaliser (2014, "Fast splittable pseudorandom number generators")."""
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))
