"""Comparison of teachers: measures against their definitions, and the page."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
from scipy.spatial.distance import jensenshannon
from scipy.stats import ortho_group, spearmanr

from distinit.pipeline.common.console import Console
from distinit.pipeline.common.errors import UsageError
from distinit.pipeline.common.numerics import softmax
from distinit.pipeline.evaluation.evaluation_options import CompareConfig
from distinit.pipeline.evaluation.teacher_comparison import (
    compare_teachers,
    linear_cka,
    neighbour_overlap,
)
from distinit.pipeline.store.reader import TargetStore
from distinit.stages.targets_compare import targets_compare
from distinit.tests.store_recipe import Recipe

CLASSES = 8


@dataclass(frozen=True)
class Related(Recipe):
    """`b` is `a` except on one video; `sharp` has twice the logits of `a`; `other` is unrelated."""

    disputed: int = 12

    def logits(self, video: int, teacher: str) -> np.ndarray:
        random = np.random.default_rng(video)
        base = random.normal(0, 3, (1, CLASSES)) + random.normal(
            0, 0.3, (self.rows(video), CLASSES)
        )
        if teacher == "b" and video == self.disputed:
            base = base[:, ::-1] * 2
        if teacher == "sharp":
            base = base * 2
        if teacher == "other":
            return super().logits(video, teacher)
        return base.astype(np.float32)


@pytest.fixture(scope="module")
def related(tmp_path_factory: pytest.TempPathFactory) -> Path:
    teachers = {"a": CLASSES, "b": CLASSES, "sharp": CLASSES, "other": 5}
    return Related(videos=range(30), teachers=teachers).make(
        tmp_path_factory.mktemp("related") / "s.zarr"
    )


def test_measures_of_pairs(related: Path) -> None:
    store = TargetStore.open(related)
    comparison = compare_teachers(store, ["a", "b", "sharp", "other"])
    pairs = {(pair.first, pair.second): pair for pair in comparison.pairs}
    assert len(pairs) == 6
    a, b = (store.logits(name, comparison.rows) for name in ("a", "b"))
    assert pairs["a", "b"].agreement == pytest.approx((a.argmax(1) == b.argmax(1)).mean())
    sharp, other = pairs["a", "sharp"], pairs["a", "other"]
    assert sharp.agreement == 1
    assert sharp.cka == pytest.approx(1, abs=1e-4)
    assert sharp.neighbours > 0.98
    assert sharp.first_more_confident == 0
    nats = (store.entropy(name, comparison.rows) for name in ("a", "sharp"))
    assert sharp.entropy_correlation == pytest.approx(spearmanr(*nats).statistic)
    assert other.agreement is None
    assert other.cka < 0.2
    assert other.neighbours == pytest.approx(other.neighbours_by_chance, abs=0.03)
    # The classes of `b` are reversed on one video. SciPy computes the distance of stored logits.
    (index, _), *_ = compare_teachers(store, ["a", "b"]).most_disputed(3)
    assert comparison.videos[index] == Related.disputed
    for i, video in enumerate(comparison.videos.tolist()):
        rows = store.frames(video)[2]
        middles = ((np.arange(6) + 0.5) * len(rows) / 6).astype(int)
        p, q = (softmax(store.logits(n, rows[middles]).mean(axis=0)) for n in ("a", "b"))
        expected = jensenshannon(p, q, base=2) ** 2
        assert pairs["a", "b"].disagreement[i] == pytest.approx(expected, abs=1e-4)


def test_cka_and_neighbours_ignore_rotation_and_scale() -> None:
    random = np.random.default_rng(2)
    x = random.normal(0, 1, (300, 12)).astype(np.float32)
    y = (x @ ortho_group.rvs(12, random_state=3) * 5 + 1).astype(np.float32)
    assert linear_cka(x, y) == pytest.approx(1, abs=1e-5)
    assert neighbour_overlap(x, y, np.arange(300))[0].mean() > 0.99
    gram = [z @ z.T for z in (x - x.mean(0), random.normal(0, 1, (300, 7)))]
    centre = np.eye(300) - 1 / 300
    hsic = lambda k, m: np.trace(k @ centre @ m @ centre)  # noqa: E731
    other = random.normal(0, 1, (300, 7)).astype(np.float32)
    gram[1] = (other - other.mean(0)) @ (other - other.mean(0)).T
    expected = hsic(*gram) / np.sqrt(hsic(gram[0], gram[0]) * hsic(gram[1], gram[1]))
    assert linear_cka(x, other) == pytest.approx(expected, rel=1e-4)


def test_frames_of_one_video_are_not_neighbours() -> None:
    random = np.random.default_rng(4)
    x = np.repeat(random.normal(0, 1, (40, 6)), 5, axis=0).astype(np.float32)
    y = np.repeat(random.normal(0, 1, (40, 6)), 5, axis=0).astype(np.float32)
    overlap, chance = neighbour_overlap(x, y, np.repeat(np.arange(40), 5))
    assert overlap.mean() < 3 * chance


def test_the_page_and_the_result(related: Path, tmp_path: Path) -> None:
    options = CompareConfig(store=str(related), out=str(tmp_path / "look"), videos=2)
    result = targets_compare(options, Console(quiet=True))
    page = Path(result["page"]).read_text()
    assert len(result["disputed"]) == 2
    for video in result["disputed"]:
        assert video["path"].partition(" ")[0] in page
    assert {teacher["name"] for teacher in result["teachers"]} == {"a", "b", "sharp", "other"}
    assert "http" not in page.replace("http://www.w3.org", "")


def test_one_teacher_is_not_compared(related: Path) -> None:
    with pytest.raises(UsageError, match="at least 2"):
        compare_teachers(TargetStore.open(related), ["a"])
