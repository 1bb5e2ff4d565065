"""`embed`, and the files of `predict`: own videos through a student, against plain torch."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import h5py
import numpy as np
import pytest
import torch

import distinit
from distinit.cli import main
from distinit.pipeline.common.errors import DistInitError, SourceError, UsageError
from distinit.pipeline.common.sealed import check_seal
from distinit.pipeline.students.student import build_student
from distinit.pipeline.students.student_files import load_student, save_student
from distinit.pipeline.students.student_options import StudentOptions
from distinit.pipeline.video.encode import write_video
from distinit.pipeline.video.frames import read_frames
from distinit.pipeline.video.geometry import View

pytestmark = pytest.mark.slow

T, SIZE, CLIPS = 4, 32, 3
RESIZE = (37, 49)  # for 112 it is 128x171; in proportion, rounded
LENGTHS = {"a.mp4": 11, "b.mp4": 6, "c.mp4": 3}  # the last is shorter than a clip
FEW = {"clips": CLIPS, "device": "cpu", "quiet": True, "set": {"workers": 0}}


@pytest.fixture(scope="module")
def videos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Make a folder with three videos, an unreadable one between them, and a list of all."""
    root = tmp_path_factory.mktemp("videos")
    random = np.random.default_rng(5)
    for name, length in LENGTHS.items():
        images = random.integers(0, 255, (length, 5, 8, 3)).repeat(8, 1).repeat(8, 2)
        write_video(root / name, images.astype(np.uint8), fps=8)
    (root / "bad.mp4").write_bytes(b"this is no video")
    (root / "list.txt").write_text("# all\nbad.mp4\na.mp4\nb.mp4\nc.mp4\nmissing.mp4\n")
    return root


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Make a student of two teachers and one of labels, in run folders."""
    root = tmp_path_factory.mktemp("models")
    torch.manual_seed(0)
    options = StudentOptions(architecture="r3d_18", width=0.0625)
    student = build_student(options, {"x": 3, "y": 2})
    meta = {"clip_length": T, "clip_size": SIZE}
    save_student(root / "student" / "student.safetensors", student, meta)
    finetuned = build_student(options, {"label": 3})
    torch.nn.init.normal_(finetuned.head("label").weight)  # type: ignore[arg-type]
    named = meta | {"classes": {"label": ["up", "down", 'a,"b']}}
    save_student(root / "finetuned" / "model.safetensors", finetuned, named)
    return root


def clips_of(path: Path) -> torch.Tensor:
    """Return the clips [N, C, T, H, W] of a video, as the documentation describes them."""
    total = LENGTHS[path.name]
    clips = []
    for i in range(CLIPS):
        start = i * max(total - T, 0) // (CLIPS - 1)
        indices = np.minimum(np.arange(start, start + T), total - 1)
        images = read_frames(str(path), indices, View(resize=RESIZE)).images
        # As torchvision's CenterCrop.
        top, left = (round((length - SIZE) / 2) for length in RESIZE)
        clips.append(images[:, top : top + SIZE, left : left + SIZE])
    pixels = torch.from_numpy(np.stack(clips)).permute(0, 4, 1, 2, 3).double() / 255
    mean, std = (
        torch.tensor(values).view(3, 1, 1, 1)
        for values in ((0.43216, 0.394666, 0.37645), (0.22803, 0.22145, 0.216989))
    )
    return ((pixels - mean) / std).float()


@torch.no_grad()
def expected(model: Path, video: Path) -> np.ndarray:
    """Return the features [N, D], by torch alone."""
    return load_student(model).backbone(clips_of(video)).numpy()


@pytest.mark.parametrize(
    ("kind", "per_clip"),
    [("student", False), ("student/student.safetensors", True), ("finetuned", False)],
)
def test_features_are_those_of_the_backbone(
    kind: str, per_clip: bool, videos: Path, models: Path, tmp_path: Path
) -> None:
    out = tmp_path / "new" / "features.h5"
    sources = [videos / "list.txt", str(videos / "[ab].mp4")]  # the glob adds nothing new
    result = distinit.embed(models / kind, sources=sources, out=out, per_clip=per_clip, **FEW)
    assert not result.ok
    assert [Path(each["video"]).name for each in result.failed] == ["bad.mp4", "missing.mp4"]
    names = ["bad.mp4", "a.mp4", "b.mp4", "c.mp4", "missing.mp4"]
    assert check_seal(out, DistInitError)
    with h5py.File(out) as file:
        assert [Path(name).name for name in file["videos"].asstr()] == names
        assert list(file["status"].asstr()) == ["failed", "ok", "ok", "ok", "failed"]
        assert all(file["reasons"].asstr()[i] for i in (0, 4))
        assert list(file["frames"]) == [-1, *LENGTHS.values(), -1]
        assert file["starts"][1].tolist() == [0, 3, 7]
        features = file["features"][:]
        assert json.loads(file.attrs["about"])["clips"] == CLIPS
    assert list(features.shape) == result.features
    assert np.isnan(features[[0, 4]]).all()
    for name, actual in zip(names[1:4], features[1:4], strict=True):
        want = expected(models / kind, videos / name)
        np.testing.assert_allclose(actual, want if per_clip else want.mean(0), atol=1e-5)
    again = tmp_path / "features.npz"
    distinit.embed(models / kind, sources=sources, out=again, per_clip=per_clip, **FEW)
    with np.load(again) as arrays:
        np.testing.assert_array_equal(arrays["features"], features)
        assert arrays["status"].tolist() == ["failed", "ok", "ok", "ok", "failed"]


def test_predictions_are_written_in_each_form(
    videos: Path, models: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["predict", str(models / "finetuned"), str(videos), "--device", "cpu", "--top", "2"]
    command += ["--test-clips", f"{CLIPS}", "--set", "test.workers=0"]
    with pytest.raises(SystemExit) as end:
        main([*command, "--json", "--out", str(tmp_path / "p.json")])
    assert end.value.code == 1, "one of the four cannot be read"
    printed = json.loads(capsys.readouterr().out)
    assert json.loads((tmp_path / "p.json").read_text()) == printed
    with pytest.raises(SystemExit):
        main([*command, "--quiet", "--out", str(tmp_path / "p.csv")])
    rows = list(csv.DictReader((tmp_path / "p.csv").open()))
    assert [Path(row["video"]).name for row in rows] == ["a.mp4", "b.mp4", "bad.mp4", "c.mp4"]
    assert (rows[2]["status"], rows[2]["class1"], rows[2]["probability2"]) == ("failed", "", "")
    head = load_student(models / "finetuned").head("label")
    for row in rows[:2] + rows[3:]:
        features = torch.from_numpy(expected(models / "finetuned", Path(row["video"])))
        scores = head(features).softmax(1).mean(0)
        best = scores.argsort(descending=True)[:2]
        assert [row["class1"], row["class2"]] == [["up", "down", 'a,"b'][k] for k in best]
        probabilities = [float(row["probability1"]), float(row["probability2"])]
        assert probabilities == pytest.approx(scores[best].tolist(), abs=1e-5)
        assert row["frames"] == str(LENGTHS[Path(row["video"]).name])


def test_parquet_holds_the_table_of_the_csv(videos: Path, models: Path, tmp_path: Path) -> None:
    parquet = pytest.importorskip("pyarrow.parquet")
    values = {"sources": [str(videos)], "top": 2, "test_clips": 1, "device": "cpu", "quiet": True}
    for ending in ("csv", "parquet"):
        out = tmp_path / f"p.{ending}"
        distinit.predict(models / "finetuned", out=out, set={"test.workers": 0}, **values)
    table = parquet.read_table(tmp_path / "p.parquet")
    rows = list(csv.DictReader((tmp_path / "p.csv").open()))
    assert table.column_names == list(rows[0])
    assert [str(kind) for kind in table.schema.types[3:6]] == ["int64", "string", "double"]
    parquet_rows = [{name: str(v or "") for name, v in row.items()} for row in table.to_pylist()]
    assert parquet_rows == rows


def test_wrong_files_and_sources_are_named_before_the_work(
    videos: Path, models: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    output = tmp_path / "mine.h5"
    output.write_bytes(b"of another program")
    values = {"sources": [videos / "a.mp4"], **FEW}
    for out in (output, tmp_path / "features.parquet"):
        with pytest.raises(UsageError, match=r"--out.*" + out.name):
            distinit.embed(models / "student", out=out, **values)
    assert output.read_bytes() == b"of another program"
    with pytest.raises(SourceError, match=r"none\*"):
        distinit.embed(
            models / "student", out=tmp_path / "f.h5", **values | {"sources": [tmp_path / "none*"]}
        )
    monkeypatch.setitem(__import__("sys").modules, "pyarrow", None)
    with pytest.raises(UsageError, match=r"pyarrow.*distinit\[parquet\]"):
        distinit.predict(
            models / "finetuned",
            sources=[videos / "a.mp4"],
            out=tmp_path / "p.parquet",
            quiet=True,
        )
    assert sorted(path.name for path in tmp_path.glob("*.*") if "config" not in path.name) == [
        "mine.h5"
    ]
    out = tmp_path / "features.h5"
    for _ in range(2):  # one's own file is written again
        assert distinit.embed(models / "student", out=out, **values).ok
