"""Merged stores have every row and status of their parts, also after an interruption, and parts
that do not fit are refused."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from distinit.pipeline.common.config import load_config
from distinit.pipeline.common.console import Console
from distinit.pipeline.common.errors import StoreError, StoreMismatchError, UsageError
from distinit.pipeline.corpus.sources import Corpus, Part, VideoList
from distinit.pipeline.store.index import load_index
from distinit.pipeline.store.reader import TargetStore
from distinit.pipeline.store.store_options import MergeConfig
from distinit.pipeline.store.verify import verify
from distinit.pipeline.store.writer import StoreWriter
from distinit.stages.targets_merge import targets_merge
from distinit.tests.thorough import is_thorough

QUIET = Console(quiet=True)
Make = Callable[..., Any]


def content(store: TargetStore) -> dict[tuple[str, str], list[Any]]:
    """Return everything that a store holds of each video, by corpus and path; rows by frame."""
    contents: dict[tuple[str, str], list[Any]] = {}
    for v in range(store.n_videos):
        record = store.video(v)
        index, pts, rows = store.frames(v)
        values = [
            x.tobytes()
            for t in store.teachers
            for x in (store.logits(t, rows), store.entropy(t, rows))
        ]
        metadata = (
            record.size,
            record.digest,
            record.frames,
            record.rows,
            record.status,
            record.reason,
            record.clock,
        )
        contents[record.corpus, record.path] = [metadata, index.tolist(), pts.tolist(), values]
    return contents


@pytest.fixture
def parts(make_store: Make) -> list[Path]:
    """Three parts with two teachers; the second part begins with a failed video."""
    videos = (range(0, 17), range(17, 30), range(30, 40))
    return [make_store(f"p{i}.zarr", videos=v, encoding="int8", teachers={"t": 9, "u": 4})[1] for i, v in
            enumerate(videos)]  # fmt: skip


@pytest.mark.slow
def test_a_merged_store_holds_what_its_parts_hold(
    parts: list[Path], make_store: Make, tmp_path: Path
) -> None:
    out = tmp_path / "all.zarr"
    result = targets_merge(MergeConfig(parts=[str(each) for each in parts], out=str(out)), QUIET)
    merged = TargetStore.open(out)
    used = load_config(MergeConfig, "targets-merge", file=f"{out}.config.yaml")
    assert used.parts == [str(each) for each in parts]
    expected = {key: value for p in parts for key, value in content(TargetStore.open(p)).items()}
    assert content(merged) == expected
    assert (result["videos"], result["ok"], result["failed"]) == (40, 34, 6)
    assert list(verify(out, load_index(out))) == []
    _, whole = make_store("whole.zarr", encoding="int8", teachers={"t": 9, "u": 4})
    assert content(merged) == content(TargetStore.open(whole))
    assert [merged.video(v).path for v in range(40)] == [
        TargetStore.open(whole).video(v).path for v in range(40)
    ]
    first = TargetStore.open(parts[0]).index.n_shards
    for name in ("teachers/t/logits/c/{}/0", "teachers/u/scale/c/{}", "frames/pts/c/{}"):
        source, copy = parts[1] / name.format(0), out / name.format(first)
        assert source.read_bytes() == copy.read_bytes()
    for teacher in ("t", "u"):
        assert merged.encoding_error(teacher)["kl_mean"] > 0
    assert (
        targets_merge(MergeConfig(parts=[str(each) for each in parts], out=str(out)), QUIET)[
            "copied"
        ]
        == 0
    )


@pytest.mark.slow
def test_an_interrupted_merge_is_unfinished_and_continues(
    parts: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A merge that is stopped before one of its writes is unfinished; the same call finishes it."""
    whole = tmp_path / "whole.zarr"
    targets_merge(MergeConfig(parts=[str(each) for each in parts], out=str(whole)), QUIET)
    shards = TargetStore.open(whole).index.n_shards
    expected = content(TargetStore.open(whole))
    stops = {"_plan_node": (0, 3), "commit": (3 * shards - 1,), "_publish": (2,)}
    if is_thorough():
        stops = {"_plan_node": (0, 1, 3), "commit": (4, 3 * shards - 1), "_publish": (2,)}
    for step, after in ((s, n) for s, counts in stops.items() for n in counts):
        out = tmp_path / f"{step}{after}.zarr"
        remaining = [after]
        real = getattr(StoreWriter, step)

        def stop(
            self: StoreWriter,
            *args: Any,
            real: Any = real,
            remaining: list[int] = remaining,
            **options: Any,
        ) -> Any:
            remaining[0] -= 1
            if remaining[0] < 0:
                raise KeyboardInterrupt
            return real(self, *args, **options)

        with monkeypatch.context() as patch:
            patch.setattr(StoreWriter, step, stop)
            with pytest.raises(KeyboardInterrupt):
                targets_merge(MergeConfig(parts=[str(each) for each in parts], out=str(out)), QUIET)
        interrupted = TargetStore.open(out)
        finished = (
            interrupted.n_videos == 40
            and set(interrupted.teachers) == {"t", "u"}
            and len(interrupted.usable()) == 34
        )
        assert not finished
        targets_merge(MergeConfig(parts=[str(each) for each in parts], out=str(out)), QUIET)
        assert list(verify(out, load_index(out))) == []
        assert content(TargetStore.open(out)) == expected


@pytest.mark.slow
@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"every": 2}, r"sampling.every is 4 in .*a.zarr, 2 in .*b.zarr"),
        (
            {"shard_rows": 1024},
            r"shard_rows is 512 in .*a.zarr, 1024 in .*b.zarr.*--shard-rows 512",
        ),
        ({"teachers": {"x": 10}}, r'teachers is \["t"\] in .*a.zarr, \["x"\] in .*b.zarr'),
        ({"teachers": {"t": 11}}, r"teacher 't': classes"),
        ({"identity": 2}, r"teacher 't': identity.w is 1 in .*a.zarr, 2 in .*b.zarr"),
        (
            {"encoding": "int8"},
            r"""teacher 't': encoding is "float16" in .*a.zarr, "int8" in .*b.zarr""",
        ),
        ({"run": {"batch_size": 8}}, r"teacher 't': run"),
        ({"videos": range(9, 15)}, r"b=v09 ü\udcff.mp4: is in .*a.zarr and in .*b.zarr"),
        ({"uncommitted": [0]}, r"b.zarr: .* videos are pending"),
    ],
)
def test_what_does_not_fit_is_refused_by_name(
    make_store: Make, tmp_path: Path, changes: dict[str, Any], words: str
) -> None:
    a = make_store("a.zarr", videos=range(10))[1]
    b = make_store("b.zarr", **{"videos": range(10, 15), **changes})[1]
    kind = StoreError if "uncommitted" in changes else StoreMismatchError
    with pytest.raises(kind, match=words):
        targets_merge(MergeConfig(parts=[str(a), str(b)], out=str(tmp_path / "out.zarr")), QUIET)
    assert not (tmp_path / "out.zarr").exists()
    if "run" in changes:
        assert (
            targets_merge(
                MergeConfig(
                    parts=[str(a), str(b)],
                    out=str(tmp_path / "out.zarr"),
                    allow_different_numerics=True,
                ),
                QUIET,
            )["videos"]
            == 15
        )


@pytest.mark.slow
def test_damage_locks_and_wrong_use_are_named(make_store: Make, tmp_path: Path) -> None:
    recipe, a = make_store("a.zarr", videos=range(10))
    b = make_store("b.zarr", videos=range(10, 15))[1]
    out = tmp_path / "out.zarr"
    with pytest.raises(UsageError, match="given twice"):
        targets_merge(MergeConfig(parts=[str(a), str(a)], out=str(out)), QUIET)
    with pytest.raises(UsageError, match="is one of the parts"):
        targets_merge(MergeConfig(parts=[str(a), str(b)], out=str(b)), QUIET)
    with pytest.raises(UsageError, match="--out s3://bucket/x"):
        targets_merge(MergeConfig(parts=[str(a), str(b)], out="s3://bucket/x.zarr"), QUIET)
    with (
        StoreWriter(b, sampling=recipe.sampling),
        pytest.raises(StoreError, match=r"b.zarr: another process"),
    ):
        targets_merge(MergeConfig(parts=[str(a), str(b)], out=str(out)), QUIET)
    shard = b / "teachers/t/logits/c/0/0"
    data = shard.read_bytes()
    shard.write_bytes(data[:50] + b"x" + data[51:])
    with pytest.raises(
        StoreError, match=r"b.zarr/teachers/t/logits/c/0/0: differs from what was committed"
    ):
        targets_merge(MergeConfig(parts=[str(a), str(b)], out=str(out)), QUIET)
    shard.write_bytes(data)
    assert targets_merge(MergeConfig(parts=[str(a), str(b)], out=str(out)), QUIET)["videos"] == 15
    with pytest.raises(StoreMismatchError, match=r"out.zarr: merged_from"):
        targets_merge(MergeConfig(parts=[str(b)], out=str(out)), QUIET)


def test_shares_cover_a_list_once_and_do_not_shift() -> None:
    def listed(names: list[str]) -> VideoList:
        return VideoList(
            (Corpus("a", "/x"), Corpus("b", "/y")), np.arange(len(names), dtype=np.int32) % 2, names
        )

    names = [f"v{i}\udcff.mp4" for i in range(1000)]
    shares = [Part(i, 3).share(listed(names)) for i in (1, 2, 3)]
    assert sorted(p for s in shares for p in s.paths) == sorted(names)
    assert all(250 < len(s) < 420 for s in shares)
    assert [s.paths == sorted(s.paths, key=names.index) for s in shares] == [True] * 3
    grown = Part(1, 3).share(listed([*names, "new1", "new2"])).paths
    assert [p for p in grown if not p.startswith("new")] == shares[0].paths
    assert str(Part.parse(" 2/8 ")) == "2/8"
    for wrong in ("0/2", "3/2", "1", "a/b", "1/2/3", "-1/2"):
        with pytest.raises(UsageError, match="must be i/n"):
            Part.parse(wrong)
