"""Label files and labelled folders: their labels, and every reason to refuse them."""

from __future__ import annotations

import os
import re
from pathlib import Path

import pytest

from distinit.pipeline.common.errors import DistInitError, LabelsError, UsageError
from distinit.pipeline.evaluation.labels import available_splits, load_labels

GOOD = """path,label,source,split1,split2
a/1.mp4,run,s1,train,test
a/2.mp4,run,s2,test,train
b/3.mp4,sit,s3,train,test
b/4.mp4,sit,s4,test,train
b/5.mp4,sit,s5,,
"""


def dataset(tmp_path: Path, text: str = GOOD, *, missing: tuple[str, ...] = ()) -> str:
    """Write a csv and the files that it names, with any content."""
    (tmp_path / "labels.csv").write_text(text, encoding="utf-8")
    for row in text.splitlines()[1:]:
        name = row.split(",")[0]
        if name and name not in missing:
            (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / name).write_bytes(name.encode())
    return f"csv:{tmp_path / 'labels.csv'}"


def test_csv_gives_both_sides_of_a_split(tmp_path: Path) -> None:
    spec = dataset(tmp_path)
    first, second = load_labels(spec), load_labels(spec, 2)
    assert first.classes == second.classes == ("run", "sit")
    assert [(v.path, first.classes[v.label]) for v in first.train] == [
        ("a/1.mp4", "run"),
        ("b/3.mp4", "sit"),
    ]
    assert [v.source for v in first.train] == ["s1", "s3"]
    assert available_splits(spec) == (1, 2)
    assert second.train == first.test
    assert second.test == first.train
    assert first.absolute(first.train[0]) == str(tmp_path / "a/1.mp4")
    assert "train[2]" in repr(first)


def test_csv_spellings(tmp_path: Path) -> None:
    """A byte order mark, spaces after commas, capitals, repeated rows, quoted commas, and bytes in
    names that are not UTF-8."""
    odd = os.fsdecode(b"\xff-odd.mp4")
    rows = ["path, label, split1", "./x.mp4, 10, Train", "x.mp4,10,train", '"y, z.mp4",9,TRAIN']
    rows += ["-dash.mp4,10,test", f"{odd},9,test"]
    (tmp_path / "l.csv").write_bytes(b"\xef\xbb\xbf" + os.fsencode("\n".join(rows)))
    for name in ("x.mp4", "y, z.mp4", "-dash.mp4", odd):
        (tmp_path / name).write_bytes(os.fsencode(name))
    labels = load_labels(f"csv:{tmp_path / 'l.csv'}")
    assert labels.classes == ("9", "10"), "numeric classes are sorted by value"
    assert [v.path for v in labels.train] == ["x.mp4", "y, z.mp4"]
    assert [v.path for v in labels.test] == ["-dash.mp4", odd]


@pytest.mark.parametrize(
    ("old", "new", "split", "message"),
    [
        (
            "path,label",
            "file,label",
            1,
            r"labels.csv.*'path'.*file, label, source, split1, split2",
        ),
        ("path,label", "path,class", 1, "'label'"),
        ("", "", 3, r"'split3'.*1, 2"),
        ("split1,split2", "a,b", 1, "'split1'"),
        (",test,train", ",,", 1, "split 1.* test "),
        (",train,test", ",,", 1, "split 1.* train "),
        (
            ",train,test",
            ",trian,test",
            1,
            r"line 2.*split1.*'trian'.*train, test",
        ),
        (
            "a/2.mp4,run",
            "a/2.mp4,jump",
            1,
            "2 of 3 classes.*'run'.*'jump'",
        ),
        ("sit,s5,,", "lie,s5,train,", 1, "1 of 3 classes.*train.*'lie'"),
        (
            "a/2.mp4,run",
            "a/1.mp4,run",
            1,
            r"a/1.mp4 \(line 2, train\).*a/1.mp4 \(line 3, test\)",
        ),
        (
            "a/2.mp4,run",
            "a/1.mp4,sit",
            1,
            r"a/1.mp4.*'run' \(line 2\).*'sit' \(line 3\)",
        ),
        ("a/2.mp4,run", "a/2.mp4,", 1, "line 3.* label"),
        ("a/2.mp4,run", ",run", 1, "line 3.* path"),
    ],
)
def test_csv_refusals(tmp_path: Path, old: str, new: str, split: int, message: str) -> None:
    spec = dataset(tmp_path, GOOD.replace(old, new))
    with pytest.raises(LabelsError, match=message) as error:
        load_labels(spec, split)
    assert "\n" not in str(error.value)
    assert "labels.csv" in str(error.value)


def test_unknown_paths_are_counted_and_the_first_is_named(tmp_path: Path) -> None:
    spec = dataset(tmp_path, missing=("a/2.mp4", "b/4.mp4", "b/5.mp4"))
    with pytest.raises(LabelsError, match=r"2 of 4 .*a/2.mp4 \(line 3\)"):
        load_labels(spec)


def test_a_link_to_a_training_video_leaks(tmp_path: Path) -> None:
    spec = dataset(tmp_path)
    (tmp_path / "a/2.mp4").unlink()
    (tmp_path / "a/2.mp4").symlink_to(tmp_path / "a/1.mp4")
    with pytest.raises(LabelsError, match=r"a/1\.mp4.*a/2\.mp4"):
        load_labels(spec)


def test_missing_and_invalid_files(tmp_path: Path) -> None:
    with pytest.raises(LabelsError, match=r"none\.csv"):
        load_labels(f"csv:{tmp_path / 'none.csv'}")
    (tmp_path / "noise.csv").write_bytes(bytes(range(256)) * 4)
    with pytest.raises(LabelsError, match=r"noise\.csv"):
        load_labels(f"csv:{tmp_path / 'noise.csv'}")
    for wrong in ("labels.csv", "hmdb51:x", "csv:"):
        with pytest.raises(
            UsageError, match="csv:FILE, folder:DIR, kinetics:FILE, hmdb51 or ucf101"
        ):
            load_labels(wrong)


def test_a_copy_of_a_training_video_leaks(tmp_path: Path) -> None:
    """A leak is equal content under another name; equal sizes are not enough."""
    spec = dataset(tmp_path)
    content = b"\0" * 200_000 + b"one"
    (tmp_path / "a/1.mp4").write_bytes(content)
    (tmp_path / "b/4.mp4").write_bytes(content[:-3] + b"two")
    assert len(load_labels(spec).test) == 2
    (tmp_path / "a/2.mp4").write_bytes(content)
    with pytest.raises(LabelsError, match=r"a/1\.mp4 .*a/2\.mp4"):
        load_labels(spec)


def test_missing_labels_and_videos_are_refused_or_noted(tmp_path: Path) -> None:
    spec = dataset(tmp_path, missing=("b/3.mp4", "b/4.mp4"))
    (tmp_path / "b/another.mp4").write_bytes(b"unlisted")
    (tmp_path / "a/notes.txt").write_bytes(b"no video")
    with pytest.raises(LabelsError, match="2 of 4 "):
        load_labels(spec)
    (tmp_path / "a/0.mp4").write_bytes(b"sit 0")
    extended = dataset(
        tmp_path, GOOD + "a/0.mp4,sit,s6,train,test\n", missing=("b/3.mp4", "b/4.mp4")
    )
    labels = load_labels(extended, partial=True)
    assert [v.path for v in labels.train] == ["a/1.mp4", "a/0.mp4"]
    assert [v.path for v in labels.test] == ["a/2.mp4", "b/4.mp4"], (
        "a missing test video counts as wrong"
    )
    counted = [re.match(r"1 (?:(train|test) )?videos?\b", note) for note in labels.notes]
    assert [match and match[1] for match in counted] == ["train", "test", None]
    assert all(counted)
    for name in ("b/3.mp4", "b/4.mp4"):
        (tmp_path / name).write_bytes(name.encode())
    notes = load_labels(extended).notes
    assert len(notes) == 1, "a list may name a part of a folder, with a note"
    assert notes[0].endswith("'b/another.mp4'")


def test_videos_may_be_in_another_folder(tmp_path: Path) -> None:
    (tmp_path / "videos").mkdir()
    dataset(tmp_path / "videos")
    (tmp_path / "labels.csv").write_text(GOOD)
    labels = load_labels(f"csv:{tmp_path / 'labels.csv'}", root=str(tmp_path / "videos"))
    assert labels.absolute(labels.train[0]) == str(tmp_path / "videos/a/1.mp4")
    with pytest.raises(LabelsError, match="4 of 4 "):
        load_labels(f"csv:{tmp_path / 'labels.csv'}")
    with pytest.raises(UsageError, match="--root"):
        load_labels("folder:x", root="y")


def test_a_file_that_is_too_large_for_labels_is_refused(tmp_path: Path) -> None:
    (tmp_path / "ID_000010_000020.mp4").touch()
    for spec in ("csv", "kinetics"):
        path = tmp_path / f"{spec}.csv"
        path.touch()
        # A sparse file of 1 TiB.
        os.truncate(path, 1 << 40)
        with pytest.raises(DistInitError, match=rf"{spec}\.csv: "):
            load_labels(f"{spec}:{path}", root=str(tmp_path))
    (tmp_path / "many.csv").write_text(f"path,label,split{'9' * 5000}\n")
    with pytest.raises(DistInitError, match=r"many\.csv"):
        load_labels(f"csv:{tmp_path / 'many.csv'}", root=str(tmp_path))


KINETICS = """label,youtube_id,time_start,time_end,split
riding a bike,-abc_123,4,14,train
riding a bike,defghijk,10,20,validate
abseiling,00000001,0,10,train
abseiling,00000002,120,130,val
abseiling,00000003,5,15,test
"""


def test_kinetics(tmp_path: Path) -> None:
    """Files have names of common downloaders, anywhere below the root; other splits are ignored."""
    names = ["riding a bike/-abc_123_000004_000014.mp4", "val/defghijk_000010_000020.mkv"]
    names += ["abseiling/00000001_000000_000010.mp4", "abseiling/00000002_000120_000130.mp4"]
    for name in names:
        (tmp_path / "v" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "v" / name).write_bytes(name.encode())
    (tmp_path / "k.csv").write_text(KINETICS)
    spec, root = f"kinetics:{tmp_path / 'k.csv'}", str(tmp_path / "v")
    labels = load_labels(spec, root=root)
    assert labels.classes == ("abseiling", "riding a bike")
    assert [(v.path, v.label, v.source) for v in labels.train] == [
        (names[0], 1, "-abc_123"),
        (names[2], 0, "00000001"),
    ]
    assert [v.path for v in labels.test] == [names[1], names[3]]
    head, *rows = KINETICS.splitlines(keepends=True)
    for side in ("train", "val"):
        (tmp_path / f"{side}.csv").write_text(
            head + "".join(row for row in rows if f",{side}" in row)
        )
    both = load_labels(f"kinetics:{tmp_path}", root=root)
    assert (both.train, both.test) == (labels.train, labels.test)
    (tmp_path / "v" / names[3]).unlink()
    with pytest.raises(LabelsError, match=r"1 of 4 .*_000120_000130\.mp4 \(k\.csv line 5\)"):
        load_labels(spec, root=root)
    assert len(load_labels(spec, root=root, partial=True).test) == 2
    (tmp_path / "k.csv").write_text(KINETICS.replace("time_end", "end"))
    with pytest.raises(LabelsError, match="'time_end'"):
        load_labels(spec, root=root)
    (tmp_path / "k.csv").write_text(KINETICS.replace(",4,14,", ",1e999,14,"))
    with pytest.raises(LabelsError, match=r"k\.csv.*line 2.*'1e999'"):
        load_labels(spec, root=root)
    with pytest.raises(UsageError, match="split 1"):
        load_labels(spec, 2, root=root)


def folder(tmp_path: Path, *names: str) -> str:
    for name in names:
        path = tmp_path / "set" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(name.encode())
    return f"folder:{tmp_path / 'set'}"


def test_folder(tmp_path: Path) -> None:
    spec = folder(
        tmp_path,
        "train/b/2.mp4",
        "train/a/deep/1.mp4",
        "test/a/3.avi",
        "test/b/4.mp4",
        "test/b/notes.txt",
    )
    labels = load_labels(spec)
    assert labels.classes == ("a", "b")
    assert [(v.path, v.label) for v in labels.train] == [
        ("train/a/deep/1.mp4", 0),
        ("train/b/2.mp4", 1),
    ]
    assert [(v.path, v.label) for v in labels.test] == [("test/a/3.avi", 0), ("test/b/4.mp4", 1)]
    with pytest.raises(LabelsError, match="--split 2"):
        load_labels(spec, 2)


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (["train/a/1.mp4"], "'test'"),
        (["train/a/1.mp4", "test/a/notes.txt"], " test "),
        (["train/a/1.mp4", "test/a/2.mp4", "test/b/3.mp4"], "test.*'b'"),
        (["train/a/1.mp4", "train/0.mp4", "test/a/2.mp4"], "0.mp4"),
    ],
)
def test_folder_refusals(tmp_path: Path, names: list[str], message: str) -> None:
    with pytest.raises(LabelsError, match=message):
        load_labels(folder(tmp_path, *names))
