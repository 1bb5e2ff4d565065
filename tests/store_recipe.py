"""Stores without videos or teachers: rows from given logits, written by the writer of
extraction."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from distinit.pipeline.common.numerics import entropy
from distinit.pipeline.store import layout as fmt
from distinit.pipeline.store.encoding import Codec, Sums, error_record
from distinit.pipeline.store.planning import FrameRange
from distinit.pipeline.store.staging import (
    FramesPart,
    ShardResult,
    TeacherPart,
    new_staging,
    stage_array,
)
from distinit.pipeline.store.store_options import Encoding
from distinit.pipeline.store.writer import StoreWriter


def read_node(path: Path) -> dict[str, Any]:
    """Return the attributes of the node whose zarr.json is `path`."""
    return fmt.parse_node(str(path), path.read_bytes())


RUN = {"batch_size": 4, "precision": "fp32", "torch": "x", "device": "cpu"}


def in_pca(width: int) -> Codec:
    """Return the codec of pca:4 with a different basis for each width."""
    random = np.random.default_rng(width)
    basis = np.linalg.qr(random.normal(0, 1, (width, 4)))[0].T.astype(np.float32, order="C")
    return Codec("features", "pca:4", width, basis, random.normal(0, 1, width).astype(np.float32))


@dataclass(frozen=True)
class Recipe:
    """The content of a store.

    videos: Numbers, each of which determines a file and its outputs. teachers: Number of classes by
    teacher. features: Width of teachers whose output is features, in `features_encoding`. pca:
    Width of teachers whose features are in pca:4.
    """

    videos: Sequence[int] = range(40)
    teachers: Mapping[str, int] = field(default_factory=lambda: {"t": 10})
    shard_rows: int = 512
    every: int = 4
    identity: int = 1
    uncommitted: Sequence[int] = ()
    run: Mapping[str, object] = field(default_factory=lambda: RUN)
    encoding: Encoding = "float16"
    features: Mapping[str, int] = field(default_factory=dict)
    features_encoding: Encoding = "float16"
    pca: Mapping[str, int] = field(default_factory=dict)

    @property
    def sampling(self) -> dict[str, object]:
        return {"every": self.every, "fps": None, "keyframes": False}

    @staticmethod
    def rows(video: int) -> int:
        """Return the number of rows, 0 for videos that cannot be read."""
        return 0 if video % 7 == 3 else 20 + video

    @staticmethod
    def path(video: int) -> str:
        return f"v{video:02d} ü%FF.mp4"

    @staticmethod
    def corpus(video: int) -> int:
        return video % 2

    def logits(self, video: int, teacher: str) -> np.ndarray:
        width = {**self.teachers, **self.features, **self.pca}[teacher]
        random = np.random.default_rng([video, len(teacher), width])
        return random.normal(0, 3, (self.rows(video), width)).astype(np.float32)

    @property
    def codecs(self) -> dict[str, Codec]:
        """Return the codec of each teacher."""
        logits = {name: Codec("logits", self.encoding, n) for name, n in self.teachers.items()}
        features = {
            name: Codec("features", self.features_encoding, n) for name, n in self.features.items()
        }
        return logits | features | {name: in_pca(n) for name, n in self.pca.items()}

    def make(self, root: Path) -> Path:
        """Write the store, except for the `uncommitted` shards."""
        with StoreWriter(root, sampling=self.sampling, shard_rows=self.shard_rows) as writer:
            self._list(writer)
            writer.add_segments(
                [FrameRange(i, 0, -1, self.rows(v)) for i, v in enumerate(self.videos)]
            )
            for name, codec in self.codecs.items():
                attributes = {"name": name, "identity": {"w": self.identity}, "run": self.run}
                classes = [f"class {k}" for k in range(self.teachers.get(name, 0))]
                writer.add_teacher(name, classes, attributes, codec=codec)
            for shard in range(writer.index.n_shards):
                if shard not in self.uncommitted:
                    writer.commit(self.stage(writer, shard), self.run)
        return root

    def _list(self, writer: StoreWriter) -> None:
        n = len(self.videos)
        columns = {
            "corpus": [self.corpus(v) for v in self.videos],
            "path": [self.path(v) for v in self.videos],
            "size": [1000 + v for v in self.videos],
            "digest": [[v % 255 + 1] * 16 for v in self.videos],
            "rows_bound": [self.rows(v) for v in self.videos],
            "duration": [1.5] * n, "fps": [25.0] * n, "width": [64] * n, "height": [48] * n,
            "time_base_num": [1] * n, "time_base_den": [12800] * n,
        }  # fmt: skip
        writer.add_videos(
            columns, [{"name": "a", "root": "/data/a"}, {"name": "b", "root": "/data/b"}]
        )

    def stage(self, writer: StoreWriter, shard: int) -> ShardResult:
        """Stage one shard as a worker does, and return its result."""
        ids = [int(s) for s in np.flatnonzero(writer.index.shard == shard)]
        videos = [self.videos[int(writer.index.video[s])] for s in ids]
        folder = new_staging(writer.root, shard)
        counts = np.array([self.rows(v) for v in videos])
        frame = np.concatenate([4 * np.arange(n) for n in counts])
        part = FramesPart(
            segment=ids,
            first_row=np.where(counts > 0, np.cumsum(counts) - counts, 0).tolist(),
            rows=counts.tolist(),
            frames=np.where(counts > 0, 4 * counts, -1).tolist(),
            failed={
                s: "no video stream (audio only)"
                for s, n in zip(ids, counts, strict=True)
                if n == 0
            },
        )
        data = {
            "video": np.repeat(writer.index.video[ids], counts),
            "index": frame,
            "pts": frame * 512,
        }
        for spec in fmt.frame_specs():
            part.files += stage_array(folder, spec, shard, data[spec.name], self.shard_rows)
        parts = {}
        for name, codec in self.codecs.items():
            z = np.concatenate([self.logits(v, name) for v in videos])
            stored = codec.encode(z)
            error = codec.error(z, codec.decode(stored))
            parts[name] = TeacherPart(rows=len(z), error=error_record(error, codec.output))
            if codec.output == "features":
                parts[name].sums = Sums.of(codec, stored)
            else:
                stored["entropy"] = entropy(z)
            for spec in fmt.teacher_specs(name, codec.width, codec.encoding, codec.output):
                values = stored[spec.name]
                parts[name].files += stage_array(folder, spec, shard, values, self.shard_rows)
        return ShardResult(shard, part, parts, str(folder))


@pytest.fixture(scope="session")
def recipe_stores(tmp_path_factory: pytest.TempPathFactory) -> Callable[[Recipe], Path]:
    """Return a function from a recipe to its store, which is made once and must not be changed."""
    made: dict[str, Path] = {}

    def store_of(recipe: Recipe) -> Path:
        key = repr(recipe)
        if key not in made:
            made[key] = recipe.make(tmp_path_factory.mktemp("recipe") / "s.zarr")
        return made[key]

    return store_of


@pytest.fixture
def make_store(
    tmp_path: Path, recipe_stores: Callable[[Recipe], Path]
) -> Callable[..., tuple[Recipe, Path]]:
    """Return `make_store("name", videos=…)` → the recipe and a new store that a test may change."""

    def make(name: str = "s.zarr", **changes: object) -> tuple[Recipe, Path]:
        recipe = Recipe(**changes)  # type: ignore[arg-type]
        # A copy takes a tenth of the time of writing a store and syncing each of its files.
        return recipe, shutil.copytree(recipe_stores(recipe), tmp_path / name)

    return make
