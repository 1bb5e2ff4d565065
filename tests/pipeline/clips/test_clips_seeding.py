"""Draws by address: reproducible, disjoint, and every video as often as every other."""

from __future__ import annotations

import numpy as np
import pytest

from distinit.pipeline.clips import seeding


def test_a_draw_depends_on_its_address_alone():
    addresses = [
        (s, e, i, a) for s in (0, 7) for e in (0, 1, 40) for i in (0, 1, 10**9) for a in (0, 1, 100)
    ]
    first = {address: tuple(seeding.rng(*address).integers(2**62, size=3)) for address in addresses}
    again = {
        address: tuple(seeding.rng(*address).integers(2**62, size=3))
        for address in reversed(addresses)
    }
    assert first == again
    assert len(set(first.values())) == len(addresses)
    assert seeding.rng(0, 1, 2).random() != seeding.rng(0, 1, 2, stream=seeding.HELD_OUT).random()


def test_a_moved_generator_gives_the_numbers_of_a_new_one():
    for address in [(7, 0, 3, 0), (2**63 - 1, 40, 10**9, 100), (7, 0, 3, 0)]:
        new, moved = (
            seeding.rng(*address, stream=seeding.ZOOMS),
            seeding.rng_at(*address, stream=seeding.ZOOMS),
        )
        assert [moved.random(), moved.random()] == new.random(2).tolist()
        # 32-bit numbers come in halves of a word, of which none may be left from the address
        # before.
        assert [moved.integers(10) for _ in range(5)] == [new.integers(10) for _ in range(5)]


def test_no_two_streams_share_their_numbers():
    streams = {name: value for name, value in vars(seeding).items() if name.isupper()}
    assert {"EXAMPLES", "HELD_OUT", "PERMUTATIONS"} <= set(streams)
    firsts = {
        name: seeding.rng(3, 1, 2, stream=stream).integers(2**62)
        for name, stream in streams.items()
    }
    assert len(set(firsts.values())) == len(streams), streams


def test_draws_are_uniform_over_neighbouring_addresses():
    values = np.array([seeding.rng(1, e, i).random() for e in range(20) for i in range(500)])
    assert abs(values.mean() - 0.5) < 0.015  # 5 standard errors
    assert abs(np.corrcoef(values[:-1], values[1:])[0, 1]) < 0.05


@pytest.mark.parametrize(("n", "epoch_clips"), [(10, 10), (10, 4), (10, 25), (1, 3)])
def test_the_sequence_of_videos_is_permutation_after_permutation(n, epoch_clips):
    sequence = [
        seeding.epoch_position(5, epoch, sample, epoch_clips=epoch_clips, n=n)
        for epoch in range(8)
        for sample in range(epoch_clips)
    ]
    turns = [sequence[i : i + n] for i in range(0, len(sequence) - n + 1, n)]
    assert turns
    assert all(sorted(turn) == list(range(n)) for turn in turns)
    if n > 1:
        assert turns[0] != turns[1]


def test_held_out_videos_do_not_move_when_a_store_grows():
    small, large = np.arange(2000), np.arange(5000)
    train, held = seeding.split_held_out(small, 0.1, seed=3)
    _, more = seeding.split_held_out(large, 0.1, seed=3)
    assert sorted([*train, *held]) == list(small)
    assert set(held) == {v for v in more if v < 2000}
    assert 150 < len(held) < 250
    assert set(held) != set(seeding.split_held_out(small, 0.1, seed=4)[1])
    assert len(seeding.split_held_out(small, 0.0, seed=3)[1]) == 0


@pytest.mark.parametrize(
    ("videos", "held"),
    [(0, 0), (199, 0), (200, 20), (313, 30), (1500, 30), (5000, 100), (10**6, 1000)],
)
def test_how_many_videos_are_held_out_follows_from_their_number(videos: int, held: int) -> None:
    assert seeding.held_out_share(None, videos) * videos == pytest.approx(held)
    assert seeding.held_out_share(0.3, videos) == 0.3
