"""Counter-based random numbers: every draw is a pure function of (seed, epoch, sample, attempt).

Philox is counter-based: the seed is its key and (epoch, sample, attempt) its counter, so that two
draws never share a number. No state travels between workers, processes or a run and its resume.
"""

from __future__ import annotations

import threading
from functools import lru_cache
from typing import Any

import numpy as np
from numpy.typing import NDArray

Key = tuple[int, int]
"""(epoch, sample): sample counts from 0 in each epoch."""

# Streams keep draws of different purposes apart, all from one seed.
EXAMPLES = 0
HELD_OUT = 1
PERMUTATIONS = 2
MIXTURE = 3
ZOOMS = 4
SHUFFLES = 5
DROPPED_TEACHERS = 6


def rng(
    seed: int, epoch: int, sample: int, attempt: int = 0, *, stream: int = EXAMPLES
) -> np.random.Generator:
    """Return the generator of one attempt at one sample of one epoch, each in [0, 2**64)."""
    counter = np.array([0, attempt, sample, epoch], np.uint64)  # word 0 counts the numbers drawn
    return np.random.Generator(
        np.random.Philox(counter=counter, key=np.array([seed, stream], np.uint64))
    )


class _Movable(threading.local):
    """One generator per thread, which `rng_at` moves, and its buffer, of which no word is left."""

    def __init__(self) -> None:
        self.bits = np.random.Philox(0)
        self.generator = np.random.Generator(self.bits)
        self.buffer = np.zeros(4, np.uint64)


_movable = _Movable()


def rng_at(
    seed: int, epoch: int, sample: int, attempt: int = 0, *, stream: int = EXAMPLES
) -> np.random.Generator:
    """Return a generator with the numbers of `rng`, in a tenth of its time.

    It is this thread's one generator: valid until the next call.
    """
    state: Any = {  # tuples do as well as the arrays that NumPy declares, in less time
        "bit_generator": "Philox",
        "state": {"counter": (0, attempt, sample, epoch), "key": (seed, stream)},
        "buffer": _movable.buffer,
        "buffer_pos": 4,
        "has_uint32": 0,
        "uinteger": 0,
    }
    _movable.bits.state = state
    return _movable.generator


def epoch_position(seed: int, epoch: int, sample: int, *, epoch_clips: int, n: int) -> int:
    """Return which of n videos (0 … n - 1) a sample takes before any is rejected.

    The videos are visited in seeded permutations, one after the other, and an epoch is a range of
    `epoch_clips` of that sequence: epochs shorter or longer than the corpus still visit all videos
    equally often.

        n = 5, epoch_clips = 3:   permutation 0: 2 4 0 1 3   permutation 1: 1 3 2 0 4
                                  epoch 0 |2 4 0|1 3    1| 3 2 0| …
                                  epoch 1 = 1 3 1, epoch 2 = 3 2 0
    """
    return position(seed, epoch * epoch_clips + sample, n=n)


def position(seed: int, nth: int, *, n: int, group: int = 0) -> int:
    """Return which of n videos the nth clip takes.

    Each group of videos has its own permutations.
    """
    turn, place = divmod(nth, n)
    return int(_permutation(seed, turn, n, group)[place])


def held_out_share(share: float | None, n: int) -> float:
    """Return the share of `n` videos to hold out, decided by their number where it is None.

    A fiftieth, at least 30 videos, since fewer tell little, at most 1000, and never more than a
    tenth. Fewer than 200 videos are all trained on.
    """
    if share is not None:
        return share
    return 0.0 if n < 200 else min(0.1, min(1000, max(30, n / 50)) / n)


def split_held_out(
    videos: NDArray[np.int64], share: float, seed: int
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Return (train, held-out) video ids.

    A video is held out if a hash of (seed, id) is below `share`, so that videos added to a store
    later do not move the others. Held-out ids come in the order of the hash, so that the first few
    of them are a sample of all.
    """
    if share <= 0:
        return videos, videos[:0]
    hashes = _hash(videos.astype(np.uint64), seed)
    is_held_out = hashes < np.uint64(int(share * 2.0**53))
    return videos[~is_held_out], videos[is_held_out][np.argsort(hashes[is_held_out], kind="stable")]


def _hash(ids: NDArray[np.uint64], seed: int) -> NDArray[np.uint64]:
    """Return the top 53 bits of splitmix64 of id + the hash of the seed."""
    x = ids + np.uint64(((seed + 1) * 0x9E3779B97F4A7C15) % 2**64)
    for _ in range(2):
        x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        x = x ^ (x >> np.uint64(31))
    return x >> np.uint64(11)


# Workers that read ahead straddle two permutations of a group at most.
@lru_cache(maxsize=8)
def _permutation(seed: int, turn: int, n: int, group: int) -> NDArray[np.integer]:
    order = rng(seed, turn, group, stream=PERMUTATIONS).permutation(n)
    return order.astype(np.int32) if n < 2**31 else order
