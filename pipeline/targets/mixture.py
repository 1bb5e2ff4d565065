"""Choose the video of a sample where each corpus has a share of the clips."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

from ..clips import seeding
from ..common.errors import UsageError

BLOCK = 1000  # clips in which the shares come out exactly; they are rounded to a thousandth


class Mixture:
    """Groups of videos, each visited in its own seeded permutations, mixed by their shares.

    Every 1000 clips in a row hold the same number of each group, in a seeded order:

        shares 2 : 1, blocks of 6:   a b a a b a | b a a a a b | …
        counted from 0, clip 3 is the third of a, clip 6 the third of b

    So a sample's video is a function of (seed, epoch, sample) alone, and every video of a group
    comes equally often. With one group it is `seeding.epoch_position` itself.
    """

    def __init__(
        self,
        groups: Sequence[NDArray[np.int64]],
        shares: Sequence[float],
        *,
        seed: int,
        epoch_clips: int,
    ) -> None:
        self.groups = tuple(groups)
        self.quotas = _quotas(shares)
        self.seed = seed
        self.epoch_clips = epoch_clips

    def first(self, epoch: int, sample: int) -> tuple[NDArray[np.int64], int]:
        """Return the videos of a sample's group, and which it takes before any is rejected."""
        if len(self.groups) == 1:
            n = len(self.groups[0])
            position = seeding.epoch_position(
                self.seed, epoch, sample, epoch_clips=self.epoch_clips, n=n
            )
            return self.groups[0], position
        block, place = divmod(epoch * self.epoch_clips + sample, BLOCK)
        order = _order(self.seed, block, self.quotas)
        group = int(order[place])
        nth = block * self.quotas[group] + int((order[:place] == group).sum())
        n = len(self.groups[group])
        return self.groups[group], seeding.position(self.seed, nth, n=n, group=group)


def by_corpus(
    videos: NDArray[np.int64],
    corpus: NDArray[np.int64],
    names: Sequence[str],
    weights: Mapping[str, float],
) -> tuple[list[NDArray[np.int64]], list[float]]:
    """Return the groups of videos of a mixture, one per corpus, and their shares.

    They are in the order of `names`, so that the order of `weights` changes no draw.

    Args:
        videos: Ids to draw from.
        corpus: Place in `names` of the corpus of each video of the store.
        names: Corpora of the store.
        weights: corpus → its share, in any unit.

    Raises:
        UsageError: The store has no such corpus, or it has no video to draw from.
    """
    groups, shares = [], []
    for name in weights:
        if name not in names:
            raise UsageError(f"targets.corpora names {name!r}; the store has: {', '.join(names)}")
    for name in (name for name in names if name in weights):
        members = videos[corpus[videos] == list(names).index(name)]
        if len(members) == 0:
            raise UsageError(f"targets.corpora: {name!r} has no video to draw from")
        groups.append(members)
        shares.append(weights[name])
    return groups, shares


def _quotas(shares: Sequence[float]) -> tuple[int, ...]:
    """Return the clips of each group in a block, by largest remainders, at least one each."""
    exact = np.array(shares, float) / sum(shares) * BLOCK
    quotas = np.maximum(np.floor(exact), 1).astype(int)
    for group in np.argsort(quotas - exact, kind="stable")[: max(0, BLOCK - quotas.sum())]:
        quotas[group] += 1
    quotas[np.argmax(quotas)] -= quotas.sum() - BLOCK
    return tuple(int(quota) for quota in quotas)


@lru_cache(maxsize=4)
def _order(seed: int, block: int, quotas: tuple[int, ...]) -> NDArray[np.int64]:
    groups = np.repeat(np.arange(len(quotas)), quotas)
    return seeding.rng(seed, block, 0, stream=seeding.MIXTURE).permutation(groups)
