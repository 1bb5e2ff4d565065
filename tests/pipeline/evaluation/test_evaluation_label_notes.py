"""Notes and errors on videos that label lists leave out, repeat or share, and the test side of
labels without the other sides."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import pytest

from distinit.pipeline.common.errors import CheckpointError, LabelsError
from distinit.pipeline.evaluation.labels import load_labels
from distinit.pipeline.evaluation.run_labels import RunLabels

ENDS = b"\x10" * 2**16


def write(root: Path, rows: str, contents: dict[str, bytes] | None = None) -> str:
    """Write a csv and the files that it names, each with other content unless `contents` has it."""
    root.mkdir(exist_ok=True)
    (root / "labels.csv").write_text(rows)
    for line in rows.splitlines()[1:]:
        name = line.split(",")[0]
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes((contents or {}).get(name, name.encode()))
    return f"csv:{root / 'labels.csv'}"


FOUR = "path,label,split1\na.mp4,x,train\nb.mp4,y,train\nc.mp4,x,test\nd.mp4,y,test\n"


def test_files_with_equal_ends_are_different_files(tmp_path: Path) -> None:
    """Raw videos that begin and end in black have equal sizes, heads and tails."""
    contents = {f"{name}.mp4": ENDS + name.encode() * 1000 + ENDS for name in "abcd"}
    labels = load_labels(write(tmp_path, FOUR, contents))
    assert (len(labels.train), len(labels.test)) == (2, 2)
    contents["d.mp4"] = contents["b.mp4"]
    with pytest.raises(LabelsError, match=r"b\.mp4 .*d\.mp4"):
        load_labels(write(tmp_path, FOUR, contents))


@pytest.mark.parametrize("side", ["train", "test"])
def test_a_copy_with_another_label_is_refused(tmp_path: Path, side: str) -> None:
    rows = f"{FOUR}e.mp4,x,{side}\nf.mp4,y,{side}\n"
    contents = dict.fromkeys(("e.mp4", "f.mp4"), b"same content")
    with pytest.raises(LabelsError, match=r"e\.mp4.*'x' \(line 6\).*f\.mp4.*'y' \(line 7\)"):
        load_labels(write(tmp_path, rows, contents))
    equal_labels = write(tmp_path, rows.replace("f.mp4,y", "f.mp4,x"), contents)
    assert len(load_labels(equal_labels).classes) == 2


def test_recordings_on_both_sides_are_counted(tmp_path: Path) -> None:
    rows = "path,label,source,split1\na.mp4,x,s1,train\nb.mp4,y,s2,train\n"
    rows += "c.mp4,x,s1,test\nd.mp4,y,s3,test\ne.mp4,y,,test\n"
    labels = load_labels(write(tmp_path, rows))
    assert labels.shared_sources == 1
    assert len(labels.notes) == 1
    assert "'s1'" in labels.notes[0]
    assert labels.notes[0].startswith("1 of 2 test videos")
    assert load_labels(write(tmp_path, rows.replace("x,s1,test", "x,s4,test"))).notes == ()


def test_one_video_of_youtube_on_both_sides_of_kinetics_is_counted(tmp_path: Path) -> None:
    """Different seconds of a video are counted; equal ones are refused."""
    rows = "label,youtube_id,time_start,time_end,split\nx,abc,1,11,train\nx,abc,21,31,val\nx,def,0,10,val\n"
    (tmp_path / "k.csv").write_text(rows)
    for name in ("abc_000001_000011.mp4", "abc_000021_000031.mp4", "def_000000_000010.mp4"):
        (tmp_path / name).write_bytes(name.encode())
    labels = load_labels(f"kinetics:{tmp_path / 'k.csv'}")
    assert labels.shared_sources == 1
    assert labels.notes[0].startswith("1 of 2 test videos")


def folder(root: Path, *names: str | bytes) -> str:
    for name in names:
        path = Path(os.fsdecode(os.fsencode(root / "set") + b"/" + os.fsencode(name)))
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(os.fsencode(name))
    return f"folder:{root / 'set'}"


def test_ignored_files_of_a_folder_are_named(tmp_path: Path) -> None:
    used = ["train/a/1.mp4", "test/a/2.mp4", "train/b/1.3gpp", "test/b/2.264"]
    ignored = [
        "train/a/noending",
        "test/a/x.weird",
        "train/wave/1.weird",
        "test/wave/2.weird",
        "valid/a/3.mp4",
    ]
    ignored += ["train/a/.hidden", "notes/readme.txt"]
    labels = load_labels(folder(tmp_path, *used, *ignored))
    assert labels.classes == ("a", "b")
    notes = "\n".join(labels.notes)
    for name in (
        "train/a/noending",
        "test/a/x.weird",
        "train/wave/1.weird",
        "test/wave/2.weird",
        "'wave'",
        "valid/",
    ):
        assert name in notes
    for name in ("hidden", "notes", "readme"):
        assert name not in notes
    assert load_labels(folder(tmp_path / "clean", *used)).notes == ()


def test_a_class_with_videos_on_one_side_is_explained(tmp_path: Path) -> None:
    dataset = folder(tmp_path, "train/a/1.mp4", "test/a/2.mp4", "train/b/1.mp4", "test/b/2.weird")
    with pytest.raises(LabelsError, match=r"'b'.*test/b/2\.weird"):
        load_labels(dataset)


def test_class_folders_that_are_not_utf8_are_escaped(tmp_path: Path) -> None:
    dataset = folder(
        tmp_path,
        b"train/caf\xe9/1.mp4",
        b"test/caf\xe9/2.mp4",
        "train/100%/1.mp4",
        "test/100%/2.mp4",
    )
    labels = load_labels(dataset)
    assert labels.classes == ("100%", "caf%E9")
    assert all(os.path.exists(labels.absolute(video)) for video in labels.train)


@pytest.mark.parametrize("column", ["label", "source"])
def test_a_csv_with_cells_that_are_not_utf8_is_refused_with_its_line(
    tmp_path: Path, column: str
) -> None:
    rows = "path,label,source,split1\na.mp4,LABEL,SOURCE,train\nb.mp4,LABEL,SOURCE,test\n"
    write(tmp_path, rows)
    other = {"label": "source", "source": "label"}[column]
    text = rows.replace(column.upper(), "café").replace(other.upper(), "plain")
    (tmp_path / "labels.csv").write_bytes(text.encode("latin-1"))
    with pytest.raises(LabelsError, match=r"labels\.csv: line 2: .*UTF-8"):
        load_labels(f"csv:{tmp_path / 'labels.csv'}")
    (tmp_path / "labels.csv").write_bytes(text.encode("utf-8"))
    assert load_labels(f"csv:{tmp_path / 'labels.csv'}").classes in (("café",), ("plain",))


def test_a_similar_path_is_suggested(tmp_path: Path) -> None:
    dataset = write(tmp_path, FOUR)
    (tmp_path / "c.mp4").rename(tmp_path / "c.webm")
    with pytest.raises(LabelsError, match=r"c\.mp4 \(line 4\).*c\.webm"):
        load_labels(dataset)


def test_the_test_side_for_the_classes_of_a_model(tmp_path: Path) -> None:
    dataset = write(
        tmp_path,
        FOUR.replace("train", "test").replace("b.mp4,y,test\n", "").replace("d.mp4,y,test\n", ""),
    )
    with pytest.raises(LabelsError, match=" train "):
        load_labels(dataset)
    labels = load_labels(dataset, classes=("y", "x"))
    assert [(v.path, v.label) for v in labels.test] == [("a.mp4", 1), ("c.mp4", 1)]
    assert labels.train == ()
    assert labels.classes == ("y", "x")
    assert any("'y'" in note for note in labels.notes)
    with pytest.raises(CheckpointError, match="'x'"):
        load_labels(dataset, classes=("y", "z"))
    with pytest.raises(LabelsError, match=" test "):
        load_labels(write(tmp_path / "n", FOUR.replace("test", "train")), classes=("x", "y"))


def test_a_run_records_its_labels(tmp_path: Path) -> None:
    labels = load_labels(write(tmp_path, FOUR))
    RunLabels.from_labels(labels).write(tmp_path)
    record = RunLabels.read(tmp_path)
    assert record is not None
    shutil.copytree(tmp_path, tmp_path / "moved")
    assert record.difference(load_labels(f"csv:{tmp_path / 'moved/labels.csv'}")) == ""
    for number, (old, new, name) in enumerate(
        (
            ("a.mp4,x,train", "a.mp4,x,test", "a.mp4"),
            ("a.mp4,x,train\n", "a.mp4,x,train\ng.mp4,x,train\n", "g.mp4"),
            ("y", "z", "'z'"),
            ("c.mp4,x", "c.mp4,y", "c.mp4"),
        )
    ):
        text = FOUR.replace(old, new) + "h.mp4,x,train\ni.mp4,x,test\n"
        assert name in record.difference(load_labels(write(tmp_path / str(number), text)))
    assert RunLabels.read(tmp_path / "nowhere") is None
