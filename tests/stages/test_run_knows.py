"""A run knows what it was trained on: wherever the videos are now, whatever the label file says by
now."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml

from distinit.pipeline.common.console import Console
from distinit.pipeline.common.errors import CheckpointError, LabelsError, UsageError
from distinit.pipeline.evaluation.evaluation_options import EvaluateConfig, PredictConfig
from distinit.pipeline.evaluation.finetune_options import FinetuneConfig
from distinit.pipeline.evaluation.store_labels import exclude
from distinit.pipeline.store.reader import TargetStore
from distinit.pipeline.training.distillation_options import TrainConfig
from distinit.pipeline.training.seen_videos import SeenVideos
from distinit.pipeline.video.container import digest
from distinit.pipeline.video.encode import write_video
from distinit.stages.evaluate import evaluate
from distinit.stages.finetune import finetune
from distinit.stages.options import ReportConfig
from distinit.stages.predict import predict
from distinit.stages.report import report
from distinit.stages.train_student import train_student
from distinit.tests import warm

pytestmark = pytest.mark.slow

QUIET = Console(quiet=True)
TINY: dict[str, Any] = {
    "student": {"architecture": "r3d_18", "width": 0.0625},
    "clips": {"size": 32, "clip_frames": 4},
    "loop": {"batch_size": 4, "epochs": 2, "epoch_clips": 4, "workers": 0, "device": "cpu"},
    "test": {"clips": 1, "workers": 0},
}
SIDES = ("train", "train", "train", "train", "test", "test")


def write_labels(
    root: Path, sides: tuple[str, ...] = SIDES, prefix: str = "", column: str = "split1"
) -> str:
    rows = [f"{prefix}{i}.mp4,{'red' if i % 2 else 'blue'},{side}" for i, side in enumerate(sides)]
    (root / "labels.csv").write_text("\n".join([f"path,label,{column}", *rows]) + "\n")
    return f"csv:{root / 'labels.csv'}"


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Six videos of two classes, four to train on."""
    root = tmp_path_factory.mktemp("data")
    random = np.random.default_rng(3)
    for i in range(6):
        images = random.integers(0, 60, (6, 32, 48, 3)).astype(np.uint8)
        images[..., 0 if i % 2 else 2] += 150
        write_video(root / f"{i}.mp4", images, fps=8)
    write_labels(root)
    return root


def tuned(dataset: str, out: Path, **changes: Any) -> dict[str, Any]:
    loop = TINY["loop"] | changes.pop("loop", {})
    return finetune(
        FinetuneConfig.model_validate(
            TINY | {"dataset": dataset, "out": str(out), "loop": loop} | changes
        ),
        QUIET,
    )


@pytest.fixture(scope="module")
def run(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("runs") / "run"
    tuned(f"csv:{data / 'labels.csv'}", out)
    return out


@pytest.fixture
def mine(data: Path, run: Path, tmp_path: Path) -> tuple[Path, Path]:
    """A data set and a run of it that a test may change; the run was trained where the data set is
    now."""
    shutil.copytree(data, tmp_path / "data")
    shutil.copytree(run, tmp_path / "run")
    used = yaml.safe_load((run / "config.yaml").read_text())
    used["finetune"]["dataset"] = f"csv:{tmp_path / 'data/labels.csv'}"
    (tmp_path / "run/config.yaml").write_text(yaml.safe_dump(used))
    return tmp_path / "data", tmp_path / "run"


def files(folder: Path) -> dict[str, bytes]:
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file()
    }


def evaluated(run: Path, **given: Any) -> dict[str, Any]:
    with Console() as console:
        return evaluate(
            EvaluateConfig.model_validate({"runs": [str(run)], "device": "cpu", **given}), console
        )


@pytest.mark.parametrize("how", ["video_roots", "renamed"])
def test_trained_videos_are_known_after_they_moved(
    mine: tuple[Path, Path], tmp_path: Path, how: str, capfd: pytest.CaptureFixture[str]
) -> None:
    data, run = mine
    (tmp_path / "data").rename(tmp_path / "elsewhere")
    data = tmp_path / "elsewhere"
    prefix = "x" if how == "renamed" else ""
    for i in range(6 if prefix else 0):
        (data / f"{i}.mp4").rename(data / f"x{i}.mp4")
    other = write_labels(data, ("test",) * 4 + ("train",) * 2, prefix, "split2")
    result = evaluated(run, dataset=other, split=2, out=str(tmp_path / "out"))
    assert result["overlap"]["test_videos_trained_on"] == 4
    assert json.loads((tmp_path / "out/result.json").read_text())["overlap"] == result["overlap"]
    assert "4 of 4 test videos" in capfd.readouterr().err
    unseen = write_labels(data, ("train",) * 4 + ("test",) * 2, prefix, "split2")
    result = evaluated(run, dataset=unseen, split=2, out=str(tmp_path / "unseen"))
    assert result["overlap"]["test_videos_trained_on"] == 0


def test_a_rewritten_label_file_does_not_overwrite_the_result(
    mine: tuple[Path, Path], tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    data, run = mine
    before = files(run)
    dataset = write_labels(data, ("test", "test", "train", "train", "train", "train"))
    with pytest.raises(CheckpointError, match=r"labels\.csv.*--out"):
        evaluated(run)
    with pytest.raises(CheckpointError, match=r"labels\.csv.*--out"):
        tuned(dataset, run, resume=True)
    assert files(run) == before
    capfd.readouterr()
    result = evaluated(run, out=str(tmp_path / "out"))
    assert result["overlap"]["test_videos_trained_on"] == 2
    stderr = capfd.readouterr().err
    assert "labels.csv" in stderr
    assert "2 of 2 test videos are among" in stderr
    assert files(run) == before
    write_labels(data)
    assert evaluated(run)["metrics"]["videos"] == 2


def test_a_run_that_recorded_nothing_refuses_other_labels_by_its_checkpoint(
    mine: tuple[Path, Path],
) -> None:
    """Remove what runs of version 0.1 do not have."""
    data, run = mine
    for name in ("labels.json", "seen_videos.npz"):
        (run / name).unlink()
    assert evaluated(run)["metrics"]["videos"] == 2
    write_labels(data, ("test", "test", "train", "train", "train", "train"))
    with pytest.raises(CheckpointError, match="--out"):
        evaluated(run)


def test_a_test_list_alone_and_one_class_alone_are_tested(
    mine: tuple[Path, Path], tmp_path: Path
) -> None:
    data, run = mine
    only = write_labels(data, ("", "", "", "", "test", "test"))
    assert evaluated(run, dataset=only, out=str(tmp_path / "a"))["metrics"]["videos"] == 2
    one = write_labels(data, ("", "", "", "", "test", ""))
    metrics = evaluated(run, dataset=one, out=str(tmp_path / "b"))["metrics"]
    assert metrics["videos"] == 1
    assert metrics["class_mean"]["value"] == metrics["top1"]["value"]
    assert metrics["per_class"]["red"]["videos"] == 0


def test_equal_ends_are_no_leak_of_another_data_set(
    mine: tuple[Path, Path], tmp_path: Path
) -> None:
    """Where both files are there their whole content decides; the recorded digest alone would say
    that they are one."""
    ends = b"\x10" * 2**16
    paths = [str(tmp_path / f"{name}.y4m") for name in "ab"]
    for name, path in zip("ab", paths, strict=True):
        Path(path).write_bytes(ends + name.encode() * 1000 + ends)
    seen_videos = SeenVideos.from_digests(["ab" * 16], paths[:1])
    seen_videos.write(tmp_path)
    again = SeenVideos.read(tmp_path)
    assert again is not None
    digests = [digest(path) for path in paths]
    assert digests[0] == digests[1]
    own_videos = SeenVideos.from_digests(digests[:1], paths[:1])
    assert own_videos.stages(digests, paths) == [{1}, set()]
    os.unlink(paths[0])
    assert own_videos.stages(digests[1:], paths[1:]) == [{1}], (
        "the digest is all that is left of it"
    )


@pytest.mark.parametrize("damage", [b"", b"PK\3\4"])
def test_a_damaged_record_of_videos_is_named(tmp_path: Path, damage: bytes) -> None:
    (tmp_path / "seen_videos.npz").write_bytes(damage)
    with pytest.raises(CheckpointError, match=r"seen_videos\.npz"):
        SeenVideos.read(tmp_path)


def test_all_splits_are_read_before_the_first_is_trained(data: Path, tmp_path: Path) -> None:
    text = (data / "labels.csv").read_text().splitlines()
    rows = [f"{line},{line.rpartition(',')[2]}" for line in text[1:]]
    rows[4] = rows[4].removesuffix("test") + "valid"
    (data / "late.csv").write_text("\n".join([f"{text[0]},split2", *rows]))
    with pytest.raises(LabelsError, match=r"line 6.*split2.*'valid'"):
        tuned(f"csv:{data / 'late.csv'}", tmp_path / "all", split="all")
    assert not (tmp_path / "all").exists()


def test_a_resume_takes_no_fewer_epochs(data: Path, mine: tuple[Path, Path]) -> None:
    run = mine[1]
    before = files(run)
    with pytest.raises(UsageError, match="--epochs 1"):
        tuned(f"csv:{mine[0] / 'labels.csv'}", run, resume=True, loop={"epochs": 1})
    assert files(run) == before


@pytest.mark.parametrize("encoding", ["latin-1", "ascii"])
def test_the_terminal_does_not_end_a_job(
    mine: tuple[Path, Path], tmp_path: Path, encoding: str
) -> None:
    words = ("evaluate", mine[1], "--out", tmp_path / "out", "--device", "cpu")
    process = warm.Process(*words, env={"PYTHONIOENCODING": encoding})
    assert process.wait() == 0, process.stderr
    assert json.loads((tmp_path / "out/result.json").read_text())["metrics"]["videos"] == 2
    assert "accuracy" in process.stdout.decode(encoding)


def test_what_cannot_be_written_is_found_before_the_test(
    mine: tuple[Path, Path], tmp_path: Path
) -> None:
    """No file of this process may hold a byte: a stand-in for a read-only mount that root meets
    too."""
    # The streams are files, too, unless they are a pipe.
    ours, theirs = os.pipe()
    for words, place in (
        (("evaluate", mine[1], "--device", "cpu"), mine[1]),
        (("report", mine[1], "--out", tmp_path / "r"), tmp_path / "r"),
    ):
        process = warm.Process(*words, limits={"RLIMIT_FSIZE": (0, 0)}, terminal=theirs)
        assert process.wait() == 2
        message = os.read(ours, 1 << 16)
        assert b"testing" not in message
        assert str(place).encode() in message.splitlines()[-1]
    os.close(ours)
    os.close(theirs)


def test_folders_that_are_not_utf8_are_trained_on(data: Path, tmp_path: Path) -> None:
    root = os.fsencode(tmp_path) + b"/dat\xe9"
    for side, numbers in (("train", (0, 1)), ("test", (4, 5))):
        for i in numbers:
            place = Path(
                os.fsdecode(root + f"/{side}/".encode() + (b"caf\xe9" if i % 2 else b"tea"))
            )
            place.mkdir(parents=True, exist_ok=True)
            shutil.copy(data / f"{i}.mp4", place)
    result = tuned(f"folder:{os.fsdecode(root)}", tmp_path / "run")
    assert set(result["metrics"]["per_class"]) == {"caf%E9", "tea"}
    assert evaluated(tmp_path / "run")["metrics"]["failed"] == []
    report(ReportConfig(folders=[str(tmp_path / "run")], out=str(tmp_path / "report")), QUIET)
    with pytest.raises(UsageError, match="--out"):
        tuned(f"folder:{os.fsdecode(root)}", Path(os.fsdecode(os.fsencode(tmp_path) + b"/r\xe9")))


def test_predict_takes_two_folders_of_one_name(data: Path, run: Path, tmp_path: Path) -> None:
    for name in "ab":
        (tmp_path / name / "clips").mkdir(parents=True)
        shutil.copy(data / "0.mp4", tmp_path / name / "clips/1.mp4")
    sources = [
        str(tmp_path / "a/clips/1.mp4"),
        str(tmp_path / "b/clips"),
        str(tmp_path / "a/clips"),
    ]
    values = {"model": str(run), "sources": sources, "device": "cpu", "test": TINY["test"]}
    result = predict(PredictConfig.model_validate(values), QUIET)
    assert [row["video"] for row in result["videos"]] == [
        str(tmp_path / name / "clips/1.mp4") for name in "ab"
    ]


def test_a_report_removes_what_an_earlier_one_wrote(data: Path, run: Path, tmp_path: Path) -> None:
    shutil.copytree(run, tmp_path / "second")
    out = tmp_path / "report"
    report(ReportConfig(folders=[str(run), str(tmp_path / "second")], out=str(out)), QUIET)
    (out / "figures/mine.svg").write_text("not of the report")
    both = set(files(out))
    report(ReportConfig(folders=[str(run)], out=str(out)), QUIET)
    fresh = tmp_path / "fresh"
    report(ReportConfig(folders=[str(run)], out=str(fresh)), QUIET)
    assert set(files(out)) == {*files(fresh), "figures/mine.svg"}
    assert set(files(out)) <= both


def trained(store: Any, out: Path, **changes: Any) -> dict[str, Any]:
    values = {
        "store": str(store.path), "out": str(out), "student": TINY["student"],
        "clips": {"clip_frames": 8, "size": 32, "resize": [40, 60]}, "loop": TINY["loop"],
    }  # fmt: skip
    with Console() as console:
        return train_student(TrainConfig.model_validate(values | changes), console)


def test_test_videos_of_a_students_corpus_are_counted(
    tiny_store: Any, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """By content, for the labelled set is a renamed copy; and what is left out or held out is not
    counted."""
    root = tmp_path / "labelled"
    root.mkdir()
    videos = sorted(tiny_store.videos.iterdir())
    for i in range(6):
        shutil.copy(videos[i], root / f"{i}.mp4")
    dataset = write_labels(root)
    trained(tiny_store, tmp_path / "student")
    result = tuned(
        dataset, tmp_path / "tuned", init=str(tmp_path / "student"), clips={}, student=None
    )
    assert result["overlap"]["test_videos_seen_by_init"] == 2
    strict: dict[str, Any] = {"strict": True, "clips": {}, "student": None}
    with pytest.raises(LabelsError, match=r"--strict: 2 of 2 .*--exclude csv:"):
        tuned(dataset, tmp_path / "refused", init=str(tmp_path / "student"), **strict)
    alone = tmp_path / "alone.safetensors"
    shutil.copy(tmp_path / "student/student.safetensors", alone)
    with pytest.raises(LabelsError, match=r"--strict: .*alone.safetensors"):
        tuned(dataset, tmp_path / "refused", init=str(alone), **strict)
    assert not (tmp_path / "refused").exists()
    tuned(dataset, tmp_path / "again", init=str(tmp_path / "tuned"), clips={}, student=None)
    swapped = write_labels(root, ("test", "test", "train", "train", "train", "train"))
    result = tuned(
        swapped, tmp_path / "third", init=str(tmp_path / "tuned"), clips={}, student=None
    )
    assert result["overlap"]["test_videos_seen_by_init"] == 2, "of the finetuned run before, too"

    dataset = write_labels(root)
    capfd.readouterr()
    summary = trained(tiny_store, tmp_path / "careful", exclude=dataset, exclude_split=1)
    assert summary["excluded_videos"] == 2
    assert "2 of 12 videos" in capfd.readouterr().err
    assert json.loads((tmp_path / "careful/result.json").read_text())["excluded_videos"] == 2
    seen_videos = SeenVideos.read(tmp_path / "careful")
    assert seen_videos is not None
    assert {os.path.basename(path) for path in seen_videos.paths} == {
        v.name for v in videos[:4] + videos[6:]
    }
    result = tuned(dataset, tmp_path / "clean", init=str(tmp_path / "careful"), **strict)
    assert result["overlap"]["test_videos_seen_by_init"] == 0


def test_leave_out_takes_lists_and_labels_and_refuses_what_names_nothing(
    tiny_store: Any, tmp_path: Path
) -> None:
    store = TargetStore.open(str(tiny_store.path))
    names = ["/".join(store.place(i)) for i in range(3)]
    for text in ("", "\r\n\r\n", "# only a comment\n"):
        (tmp_path / "l.txt").write_text(text)
        with pytest.raises(UsageError, match=r"l\.txt"):
            exclude(store, str(tmp_path / "l.txt"), None, {})
    (tmp_path / "l.txt").write_bytes(("# comment\r\n" + "\r\n".join(names) + "\r\n\r\n").encode())
    excluded = exclude(store, str(tmp_path / "l.txt"), None, {})
    assert excluded.videos.tolist() == [0, 1, 2]
    with pytest.raises(UsageError, match="--split 1"):
        exclude(store, str(tmp_path / "l.txt"), 1, {})
    (tmp_path / "l.txt").write_bytes("\r\n".join(names).encode("utf-16"))
    with pytest.raises(UsageError, match="UTF-8"):
        exclude(store, str(tmp_path / "l.txt"), None, {})
    (tmp_path / "l.txt").write_text(f"{names[0]}\nnowhere/x.mp4\n")
    with pytest.raises(UsageError, match=r"'nowhere/x\.mp4'"):
        exclude(store, str(tmp_path / "l.txt"), None, {})

    labelled = [store.video_path(i) for i in range(4)]
    sides = ("train,test", "train,test", "test,train", "test,train")
    rows = [f"{path},{'ab'[i % 2]},{sides[i]}" for i, path in enumerate(labelled)]
    (tmp_path / "l.csv").write_text("\r\n".join(["path,label,split1,split2", *rows]))
    source = f"csv:{tmp_path / 'l.csv'}"
    assert exclude(store, source, None, {}).videos.tolist() == [2, 3]
    assert exclude(store, source, 2, {}).videos.tolist() == [0, 1]
    assert exclude(store, source, "all", {}).videos.tolist() == [0, 1, 2, 3]
    for i in range(4):
        (tmp_path / f"{i}.mp4").write_bytes(b"another video" * (i + 1))
    foreign = write_labels(tmp_path, SIDES[2:])
    with pytest.raises(UsageError, match="2 test videos"):
        exclude(store, foreign, None, {})
    with pytest.raises(UsageError, match="--split 1"):
        trained(tiny_store, tmp_path / "run", exclude_split=1)


def test_no_run_goes_into_a_store(tiny_store: Any, run: Path) -> None:
    for place in (tiny_store.path / "x", tiny_store.path / "a/b"):
        with pytest.raises(UsageError, match="--out"):
            trained(tiny_store, place)
        with pytest.raises(UsageError, match="--out"):
            evaluated(run, out=str(place))
        with pytest.raises(UsageError, match="--out"):
            report(ReportConfig(folders=[str(run)], out=str(place)), QUIET)
        assert not place.exists()


def test_a_student_is_not_resumed_with_fewer_epochs(tiny_store: Any, tmp_path: Path) -> None:
    trained(tiny_store, tmp_path / "run")
    config = (tmp_path / "run/config.yaml").read_bytes()
    with pytest.raises(UsageError, match="--epochs 1"):
        trained(tiny_store, tmp_path / "run", resume=True, loop={**TINY["loop"], "epochs": 1})
    assert (tmp_path / "run/config.yaml").read_bytes() == config
