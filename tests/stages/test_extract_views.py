"""Views of a frame through extraction, stores and clips, against a forward pass in the test.

The teacher's weights and pixels are whole numbers, so that every order of its sums gives the same
bits.
"""

from __future__ import annotations

import hashlib
import json
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import av
import h5py
import numpy as np
import pytest
import torch

from distinit.pipeline.clips.clip_options import ClipView
from distinit.pipeline.common.console import Console
from distinit.pipeline.common.errors import StoreError, TeacherError, UsageError
from distinit.pipeline.common.numerics import entropy
from distinit.pipeline.extraction.extract_options import ExtractConfig
from distinit.pipeline.store import layout as fmt
from distinit.pipeline.store.digests import digest_bytes
from distinit.pipeline.store.reader import TargetStore
from distinit.pipeline.store.store_options import ExportConfig, MergeConfig, VerifyConfig
from distinit.pipeline.targets.class_head import ClassHead
from distinit.pipeline.targets.dataset import StudentClips, student_clips
from distinit.pipeline.targets.picks import PickRule
from distinit.pipeline.targets.sampler import TargetSampler
from distinit.pipeline.video.encode import write_video
from distinit.pipeline.video.geometry import View, render
from distinit.pipeline.video.sampling import Sampling
from distinit.stages.extract_targets import extract_targets
from distinit.stages.targets_export import targets_export
from distinit.stages.targets_merge import targets_merge
from distinit.stages.targets_verify import targets_verify

pytestmark = pytest.mark.slow

QUIET = Console(quiet=True)
VIEWS = ["center", "grid:4", "flip"]
MODULE = """
import torch
from torch import nn


class Net(nn.Module):
    def __init__(self, plain):
        super().__init__()
        whole = torch.Generator().manual_seed(0)
        self.conv = nn.Conv2d(3, 6, 4, stride=4, bias=False)
        self.conv.weight.data = torch.randint(-2, 3, (6, 3, 4, 4), generator=whole).float()
        self.fc = nn.Linear(6, 5, bias=False)
        self.fc.weight.data = torch.randint(-2, 3, (5, 6), generator=whole).float() / 256
        self.plain = plain

    def forward(self, x):
        with open("runs", "a") as file:
            file.write(str(len(x)) + chr(10))
        maps = self.conv(x)
        pooled = maps.mean((2, 3)) if self.plain else maps.amax((2, 3))
        return {"logits": self.fc(pooled), "features": pooled, "map": maps}


class Bare(nn.Module):
    def forward(self, x):
        return {"features": x.mean((2, 3))}


def net(plain=True):
    return Net(plain)


def bare():
    return Bare()
"""
# Pixels as they are: mean 0, std 1 of 0 … 255.
OPTIONS = {"name": "t", "input_size": "32", "resize": "36", "mean": "0", "std": "0.00392156862745"}
STUDENT = ClipView(size=28)


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Make a folder with two videos of 96 × 64 pixels and the module of the teacher."""
    folder = tmp_path_factory.mktemp("views")
    (folder / "viewed.py").write_text(MODULE)
    (folder / "videos").mkdir()
    for number in range(2):
        blocks = np.random.default_rng(number).integers(0, 255, (24, 8, 12, 3))
        frames = blocks.repeat(8, 1).repeat(8, 2).astype(np.uint8)
        write_video(folder / "videos" / f"v{number}.mp4", frames, fps=25, crf=10)
    sys.path.insert(0, str(folder))
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        yield folder
    sys.path.remove(str(folder))


def spec(views: list[str], name: str = "viewed:net", **more: Any) -> dict[str, Any]:
    return {"name": name, "views": views, "outputs": ["logits", "features"],
            "options": OPTIONS | more.pop("options", {}), **more}  # fmt: skip


def extract(home: Path, out: str, *specs: dict[str, Any], **more: Any) -> dict[str, Any]:
    values = {"sources": [str(home / "videos")], "out": home / out, "teachers": list(specs),
             "batch_size": 4, "decoders": 1, "sampling": Sampling(every=2)}  # fmt: skip
    return extract_targets(ExtractConfig.model_validate({**values, **more}), QUIET)


@pytest.fixture(scope="module")
def stored(home: Path) -> TargetStore:
    """Return all views of logits and features of both videos."""
    extract(home, "all.zarr", spec(VIEWS))
    return TargetStore.open(home / "all.zarr")


def outputs_by_hand(video: Path) -> dict[str, dict[int, np.ndarray]]:
    """Outputs of each frame of a video by its pts, of a plain decode, as the store's are named."""
    from viewed import net  # type: ignore[import-not-found]

    frames_of: dict[str, dict[int, np.ndarray]] = {}
    with av.open(str(video)) as container, torch.inference_mode():
        for frame in container.decode(video=0):
            picture = render(frame, View(resize=36, crop=32))
            for name, seen in (("t", picture), ("t.flip", picture[:, ::-1])):
                x = torch.from_numpy(seen.copy()).permute(2, 0, 1)[None].float()
                given = net()(x)
                # Of 8 × 8 cells of the map, each of 4 × 4 averages 2 × 2.
                cells = given["map"][0].unfold(1, 2, 2).unfold(2, 2, 2).mean((3, 4))
                outputs = {
                    name: given["logits"][0],
                    name.replace("t", "t.features", 1): given["features"][0],
                    name.replace("t", "t.features.grid4", 1): cells.permute(1, 2, 0),
                }
                for key, values in outputs.items():
                    rounded = values.numpy().astype(np.float16).astype(np.float32)
                    frames_of.setdefault(key, {})[frame.pts] = rounded
    return frames_of


@pytest.fixture(scope="module")
def by_hand(home: Path) -> list[dict[str, dict[int, np.ndarray]]]:
    return [outputs_by_hand(home / "videos" / f"v{number}.mp4") for number in range(2)]


def sampler(store: TargetStore, *teachers: str, **more: Any) -> TargetSampler:
    given: dict[str, Any] = {
        "picks": PickRule.parse("random"), "clip_frames": 8, "videos": store.usable(teachers),
        "seed": 3, "epoch_clips": 40, "view": STUDENT,
    }  # fmt: skip
    return TargetSampler(store, teachers=teachers, **{**given, **more})


def test_each_view_is_stored_of_each_frame(stored: TargetStore, by_hand: Any) -> None:
    names = ["t", "t.flip", "t.features", "t.features.flip", "t.features.grid4",
             "t.features.grid4.flip"]  # fmt: skip
    assert list(stored.teachers) == names
    assert stored.attributes["requires"] == ["flip", "features", "grid"]
    assert stored.target_names() == ("t", "t.features", "t.features.grid4")
    assert stored.teachers["t.features.grid4"].width == 6
    for video in range(2):
        _, pts, rows = stored.frames(video)
        for name in names:
            read = stored.cells if "grid" in name else stored.outputs
            expected = np.stack([by_hand[video][name][t] for t in pts.tolist()])
            np.testing.assert_array_equal(read(name, rows), expected)
        # Mirrored frames are others.
        assert (stored.outputs("t", rows) != stored.outputs("t.flip", rows)).any()
    for name in names[4:]:
        x = np.concatenate([stored.cells(name, stored.frames(v)[2]) for v in range(2)])
        mean, scale = stored.statistics(name)
        np.testing.assert_allclose(mean, x.mean((0, 1, 2)), rtol=1e-5)
        np.testing.assert_allclose(scale, np.sqrt(((x - mean) ** 2).mean()), rtol=1e-5)


@pytest.mark.parametrize("picks", ["random", "random:3"])
def test_a_mirrored_clip_takes_the_mirrored_frames(
    stored: TargetStore, by_hand: Any, picks: str
) -> None:
    drawn = sampler(stored, "t", "t.features", picks=PickRule.parse(picks))
    samples = [drawn.draw(0, i) for i in range(20)]
    assert len({s.flip for s in samples}) == 2
    for s in samples:
        for name in ("t", "t.features"):
            key = f"{name}.flip" if s.flip else name
            frames = [by_hand[s.video][key][t] for t in s.picked_pts.tolist()]
            np.testing.assert_array_equal(
                s.targets[name], np.mean(frames, axis=0, dtype=np.float32)
            )
    held_out = sampler(stored, "t", fixed=True).draw(0, 0)
    assert not held_out.flip
    frames = [by_hand[held_out.video]["t"][t] for t in held_out.picked_pts.tolist()]
    np.testing.assert_array_equal(held_out.targets["t"], frames[0])


def test_the_filter_judges_the_row_that_is_taken(stored: TargetStore) -> None:
    plain = sampler(stored, "t")
    sample = next(i for i in range(40) if plain.draw(0, i).flip)
    row = _rows(stored, plain.draw(0, sample))
    as_it_is, mirrored = (float(stored.entropy(n, row)[0]) for n in ("t", "t.flip"))
    between = (as_it_is + mirrored) / 2
    drawn = sampler(stored, "t", max_entropy={"t": between}, filter_mode="zero-weight")
    assert drawn.draw(0, sample).weight["t"] == float(mirrored < as_it_is)
    assert drawn.entropies(0, sample) == pytest.approx([mirrored])
    three = sampler(stored, "t", picks=PickRule.parse("random:3"))
    nats = entropy(three.draw(0, sample).targets["t"])
    assert three.entropies(0, sample) == pytest.approx([float(nats)])


def _rows(store: TargetStore, sample: Any) -> np.ndarray:
    index, _, rows = store.frames(sample.video)
    return rows[np.isin(index, sample.picked)]


def roi(cells: np.ndarray, box: tuple[float, float, float, float]) -> np.ndarray:
    """Average cells [4, 4, D] of a unit square under a box, weighted by area."""
    top, left, bottom, right = box
    total, area = np.zeros(cells.shape[2]), 0.0
    for i in range(4):
        for j in range(4):
            high = max(0.0, min(bottom, (i + 1) / 4) - max(top, i / 4))
            wide = max(0.0, min(right, (j + 1) / 4) - max(left, j / 4))
            total += high * wide * cells[i, j]
            area += high * wide
    return total / area


@pytest.mark.parametrize("name", ["t.features.grid4", "mirrorless.features.grid4"])
def test_cells_are_averaged_under_the_crop(
    home: Path, stored: TargetStore, by_hand: Any, name: str
) -> None:
    store = stored
    if name.startswith("mirrorless"):
        one = spec(["grid:4"], outputs=["features"], options={"name": "mirrorless"})
        extract(home, "mirrorless.zarr", one)
        store = TargetStore.open(home / "mirrorless.zarr")
        assert list(store.teachers) == [name]
    view = ClipView(size=28, scale=(1.0, 1.5))
    drawn = sampler(store, name, view=view)
    flips = set()
    for i in range(20):
        s = drawn.draw(0, i)
        flips.add(s.flip)
        # The student: 32 × 43 pixels of the whole frame, or up to 1.5 times that, 28 cut out.
        factor = 1 + 0.5 * drawn.zoom(0, i, s.attempt)
        height, width = round(32 * factor), round(43 * factor)
        top, left = int(s.top * (height - 27)), int(s.left * (width - 27))
        # The teacher: 36 × 54 pixels of a frame of 64 × 96, of which the middle 32 × 32.
        rows = [(36 * y / height - 2) / 32 for y in (top, top + 28)]
        columns = [(54 * x / width - 11) / 32 for x in (left, left + 28)]
        mirrored = s.flip and store is stored
        if mirrored:
            columns = [1 - columns[1], 1 - columns[0]]
        key = f"t.features.grid4{'.flip' if mirrored else ''}"
        (pts,) = s.picked_pts.tolist()
        expected = roi(by_hand[s.video][key][pts], (rows[0], columns[0], rows[1], columns[1]))
        np.testing.assert_allclose(s.targets[name], expected, rtol=1e-4, atol=1e-3)
        assert np.abs(s.targets[name] - store.outputs(name, _rows(store, s))[0]).max() > 0.1
    assert flips == {False, True}
    # Held-out clips are cut from the middle.
    s = sampler(store, name, view=view, fixed=True).draw(0, 1)
    rows, columns = ([(36 * y / 32 - 2) / 32 for y in (2, 30)],
                     [(54 * x / 43 - 11) / 32 for x in (8, 36)])  # fmt: skip
    cells = by_hand[s.video]["t.features.grid4"][s.picked_pts.tolist()[0]]
    expected = roi(cells, (rows[0], columns[0], rows[1], columns[1]))
    np.testing.assert_allclose(s.targets[name], expected, rtol=1e-4, atol=1e-3)


def test_clips_come_with_targets_of_their_crop(stored: TargetStore, home: Path) -> None:
    data = student_clips(stored, teachers=["t.features.grid4"], frames=8, size=28, seed=3)
    example = data[0, 4]
    assert example["targets"]["t.features.grid4"].shape == (6,)
    with pytest.raises(ValueError, match="view"):
        StudentClips(sampler(stored, "t.features.grid4"), ClipView(size=24))


def test_draws_do_not_depend_on_views(home: Path, stored: TargetStore) -> None:
    extract(home, "center.zarr", spec(["center"]))
    plain = TargetStore.open(home / "center.zarr")
    assert plain.attributes["requires"] == ["features"]
    assert not {"grid", "mirror_of"} & set(fmt.read_nodes(plain.files, "teachers", ["t"])["t"])
    a, b = (sampler(s, "t") for s in (plain, stored))
    for i in range(10):
        one, other = a.draw(0, i), b.draw(0, i)
        assert (one.video, one.start, one.top, one.left, one.flip) == (
            other.video, other.start, other.top, other.left, other.flip)  # fmt: skip
        assert (one.picked == other.picked).all()
        assert one.flip or (one.targets["t"] == other.targets["t"]).all()
        # Without mirrored frames a mirrored clip takes the frames as they are.
        assert (one.targets["t"] == plain.outputs("t", _rows(plain, one))[0]).all()


def tree(root: Path, below: str) -> dict[str, str]:
    files = sorted(p for p in (root / below).rglob("*") if p.is_file())
    return {str(p.relative_to(root)): hashlib.sha256(p.read_bytes()).hexdigest() for p in files}


def test_views_are_added_later(home: Path, stored: TargetStore) -> None:
    logits = {"outputs": ["logits"]}
    extract(home, "grown.zarr", spec(["center"], **logits))
    before = tree(home / "grown.zarr", "teachers/t")
    assert TargetStore.open(home / "grown.zarr").attributes["requires"] == []
    (home / "runs").unlink()
    extract(home, "grown.zarr", spec(["center", "flip"], **logits))
    grown = TargetStore.open(home / "grown.zarr")
    assert grown.attributes["requires"] == ["flip"]
    assert tree(home / "grown.zarr", "teachers/t") == before
    rows = grown.rows_of(np.arange(2))
    np.testing.assert_array_equal(grown.outputs("t.flip", rows), stored.outputs("t.flip", rows))
    # 24 rows in batches of 4, of mirrored frames alone: no pass for the others.
    assert (home / "runs").read_text().split().count("4") == 6


def test_videos_without_mirrored_rows_are_not_drawn(home: Path, stored: TargetStore) -> None:
    copy = home / "lost.zarr"
    shutil.copytree(home / "all.zarr", copy)
    shutil.rmtree(copy / "commits/teachers/t.flip/000000")
    store = TargetStore.open(copy)
    assert len(store.usable(["t"])) == 0
    assert len(store.usable(["t.features"])) == 2


def verify(store: Path, **more: Any) -> dict[str, Any]:
    return targets_verify(VerifyConfig(store=str(store), **more), QUIET)


def test_verification_sees_every_view(home: Path, stored: TargetStore) -> None:
    deep = {"deep": 2, "allow_teachers": ["viewed:net"]}
    result = verify(home / "all.zarr", **deep)
    assert result["findings"] == []
    assert {name: t["bit_equal"] for name, t in result["deep"]["teachers"].items()} == (
        dict.fromkeys(stored.teachers, 1.0)
    )
    # Rows of the frames as they are in the place of mirrored ones, with fitting commits.
    for kind, wrong in (("", "t.flip"), (".features.grid4", "t.features.grid4.flip")):
        copy = home / f"swapped{kind}.zarr"
        shutil.copytree(home / "all.zarr", copy)
        node = f"commits/teachers/{wrong}/000000"
        record = json.loads((copy / node / "zarr.json").read_text())["attributes"]["distinit"]
        record.pop("blake2b")
        for file in record["files"]:
            data = (copy / file.replace(wrong, f"t{kind}")).read_bytes()
            (copy / file).write_bytes(data)
            record["files"][file] = {"size": len(data), "blake2b": digest_bytes(data)}
        fmt.write_node(copy, node, record)
        if "features" in wrong:
            sums = "statistics/000000/zarr.json"
            shutil.copy(copy / f"teachers/t{kind}" / sums, copy / f"teachers/{wrong}" / sums)
        assert verify(copy)["findings"] == []
        findings = verify(copy, **deep)["findings"]
        assert {f["teacher"] for f in findings} == {wrong}


def test_repair_fills_a_view_again(home: Path, stored: TargetStore) -> None:
    copy = home / "damaged.zarr"
    shutil.copytree(home / "all.zarr", copy)
    file = copy / "teachers/t.features.grid4/features/c/0/0"
    data = bytearray(file.read_bytes())
    data[100] ^= 1
    file.write_bytes(data)
    result = verify(copy, repair=True)
    assert {f["teacher"] for f in result["findings"]} == {"t.features.grid4"}
    extract(home, "damaged.zarr", spec(VIEWS))
    assert tree(copy, "teachers") == tree(home / "all.zarr", "teachers")


def test_views_are_exported_and_merged(home: Path, stored: TargetStore) -> None:
    def export(out: str, **more: Any) -> TargetStore:
        targets_export(
            ExportConfig(store=str(home / "all.zarr"), out=str(home / out), **more), QUIET
        )
        return TargetStore.open(home / out)

    (home / "one.txt").write_text("v0.mp4\n")
    (home / "two.txt").write_text("v1.mp4\n")
    parts = [
        export(f"{n}.zarr", videos_from=str(home / f"{n}.txt"), shard_rows=256)
        for n in ("one", "two")
    ]
    whole = home / "merged.zarr"
    targets_merge(MergeConfig(parts=[p.name for p in parts], out=str(whole)), QUIET)
    merged, rows = TargetStore.open(whole), stored.rows_of(np.arange(2))
    assert merged.target_names() == stored.target_names()
    assert set(merged.attributes["requires"]) == {"flip", "features", "grid"}
    small = export("int8.zarr", encoding="int8")
    for name in stored.teachers:
        merged_values = merged.values(name, merged.rows_of(np.arange(2)))
        np.testing.assert_array_equal(merged_values, stored.values(name, rows))
        assert small.teachers[name].view == stored.teachers[name].view
        expected = stored.values(name, rows)
        step = (expected.max(1) - expected.min(1)) / 255
        assert (np.abs(small.values(name, rows) - expected).max(1) <= step).all()
    targets_export(ExportConfig(store=str(home / "all.zarr"), out=str(home / "all.h5")), QUIET)
    with h5py.File(home / "all.h5") as file:
        for name in stored.teachers:
            values = file[f"teachers/{name}/{stored.teachers[name].output}"]
            np.testing.assert_array_equal(values[:], stored.values(name, rows))
        assert file["teachers/t.features.grid4.flip"].attrs["grid"] == 4
    with pytest.raises(UsageError, match=r"t\.flip.*'t'"):
        export("lonely.zarr", teachers=["t.flip"])
    with pytest.raises(UsageError, match=r"pca:2.*t\.features\.grid4"):
        export("pca.zarr", teachers=["t.features.grid4"], encoding="pca:2")
    exported = export("pca.zarr", teachers=["t.features.flip", "t.features"], encoding="pca:2")
    assert {t.encoding for t in exported.teachers.values()} == {"pca:2"}


def test_mirrored_teachers_are_not_learned_from(stored: TargetStore) -> None:
    with pytest.raises(UsageError, match=r"'t\.flip'.*'t'"):
        student_clips(stored, teachers=["t.flip"])


def test_cells_that_are_not_the_feature_have_no_head(home: Path, stored: TargetStore) -> None:
    extract(home, "max.zarr", spec(["grid:2"], options={"plain": "false"}, outputs=["features"]))
    store = TargetStore.open(home / "max.zarr")
    assert not store.teachers["t.features.grid2"].plain_mean
    head = ClassHead(np.ones((2, 6), np.float32), None, ("a", "b"))
    head.write(home / "head.safetensors")
    with pytest.raises(UsageError, match=r"--head t\.features\.grid2"):
        student_clips(store, heads={"t.features.grid2": home / "head.safetensors"})
    name = "t.features.grid4"
    data = student_clips(stored, teachers=[name], heads={name: home / "head.safetensors"}, size=28)
    sample = data.sampler.draw(0, 0)
    row = stored.outputs(f"{name}.flip" if sample.flip else name, _rows(stored, sample))
    np.testing.assert_allclose(sample.targets[name], head(row)[0], rtol=1e-5)


@pytest.mark.parametrize(
    ("given", "named"),
    [
        (spec(["grid:9"]), "grid:9"),
        (spec(["flip"]), "flip"),
        (spec(["grid:4"], outputs=["logits"]), "grid:4"),
        (spec(["grid:4"], name="viewed:bare", outputs=["features"]), "grid:4"),
    ],
)
def test_what_cannot_be_viewed_is_refused(home: Path, given: dict[str, Any], named: str) -> None:
    with pytest.raises((ValueError, TeacherError), match=f"--views .*{named}"):
        extract(home, "refused.zarr", given)
    assert not (home / "refused.zarr").exists()


def test_a_store_of_impossible_views_is_refused(home: Path, stored: TargetStore) -> None:
    for changes in ({"mirror_of": "other"}, {"grid": {"cells": 5, "plain_mean": True}}):
        copy = home / "impossible.zarr"
        shutil.rmtree(copy, ignore_errors=True)
        shutil.copytree(home / "all.zarr", copy)
        name = "teachers/t.features.grid4.flip"
        record = json.loads((copy / name / "zarr.json").read_text())["attributes"]["distinit"]
        record.pop("blake2b")
        fmt.write_node(copy, name, {**record, **changes})
        with pytest.raises(StoreError, match=next(iter(changes))):
            TargetStore.open(copy)
        assert any(name in f["what"] for f in verify(copy)["findings"])


def test_a_dry_run_shows_what_each_view_takes(home: Path) -> None:
    result = extract(home, "none.zarr", spec(VIEWS), dry_run=True)
    costs = result["costs"][0]
    assert set(costs["gigabytes_of"]) == set(costs["hours_of"])
    assert costs["gigabytes_of"]["t.features.grid4"] == 16 * costs["gigabytes_of"]["t.features"]
    assert costs["gigabytes_of"]["t.flip"] == costs["gigabytes_of"]["t"]
