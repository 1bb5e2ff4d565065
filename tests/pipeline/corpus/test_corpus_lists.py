"""Lists as editors and other systems save them: which are read, and which are refused."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from distinit.pipeline.common.errors import LabelsError, SourceError, TeacherError, UsageError
from distinit.pipeline.corpus.sources import is_video, list_videos
from distinit.pipeline.evaluation.labels import load_labels
from distinit.pipeline.teachers.loaded_model import read_classes

ENCODINGS = ("utf-16", "utf-16-le", "utf-16-be", "utf-32", "utf-32-le", "utf-32-be")


@pytest.fixture
def clips(tmp_path: Path) -> Path:
    for name in ("a.mp4", "b.mp4", "#20_Rhythm_clap_u_nm_np1.avi", "# 7 x.mkv"):
        (tmp_path / name).write_bytes(name.encode())
    return tmp_path


@pytest.mark.parametrize("end", ["\n", "\r\n"])
def test_a_file_whose_name_begins_with_a_number_sign_is_listed(clips: Path, end: str) -> None:
    lines = [
        "# a comment",
        "#a.mp4",
        "a.mp4",
        "#20_Rhythm_clap_u_nm_np1.avi",
        "# 7 x.mkv 3",
        "",
        "b.mp4",
    ]
    (clips / "l.txt").write_bytes(end.join(lines).encode())
    expected = ["a.mp4", "#20_Rhythm_clap_u_nm_np1.avi", "# 7 x.mkv", "b.mp4"]
    assert list_videos([str(clips / "l.txt")]).paths == expected
    assert list_videos([f"@{clips / 'l.txt'}"]).paths == expected


@pytest.mark.parametrize("encoding", ENCODINGS)
@pytest.mark.parametrize("name", ["l.txt", "l.csv", "l.list"])
def test_a_list_that_is_not_utf8_text_is_wrong_use(clips: Path, encoding: str, name: str) -> None:
    (clips / name).write_bytes("path\r\na.mp4\r\nb.mp4\r\n".encode(encoding))
    with pytest.raises(SourceError, match="UTF-8") as error:
        list_videos([str(clips / name)])
    assert error.value.exit_code == 2
    assert name in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("encoding", ENCODINGS)
@pytest.mark.parametrize("form", ["csv", "kinetics"])
def test_labels_that_are_not_utf8_text_are_wrong_use(clips: Path, encoding: str, form: str) -> None:
    text = "path,label,split1\r\na.mp4,x,train\r\nb.mp4,x,test\r\n"
    if form == "kinetics":
        text = "label,youtube_id,time_start,time_end,split\r\nx,abc,1,11,train\r\n"
    (clips / "l.csv").write_bytes(text.encode(encoding))
    with pytest.raises(LabelsError, match=r"l\.csv.*UTF-8") as error:
        load_labels(f"{form}:{clips / 'l.csv'}")
    assert error.value.exit_code == 2


@pytest.mark.parametrize(
    "path", [r"C:\videos\a.mp4", "C:/videos/a.mp4", r"\\host\share\a.mp4", r"sub\c.mp4"]
)
def test_paths_of_windows_are_wrong_use(clips: Path, path: str) -> None:
    (clips / "sub").mkdir()
    (clips / "sub" / "c.mp4").write_bytes(b"c")
    (clips / "l.txt").write_text(f"a.mp4\n{path}\n")
    (clips / "l.csv").write_text(f"path,label,split1\na.mp4,x,train\n{path},x,test\n")
    for read in (
        lambda: list_videos([str(clips / "l.txt")]),
        lambda: load_labels(f"csv:{clips / 'l.csv'}"),
    ):
        with pytest.raises(UsageError, match="Windows") as error:
            read()
        assert error.value.exit_code == 2


def test_a_backslash_may_be_part_of_a_name(clips: Path) -> None:
    (clips / "we\\ird.mp4").write_bytes(b"w")
    (clips / "l.txt").write_text("we\\ird.mp4\ngo\\ne.mp4\n")
    assert list_videos([str(clips / "l.txt")]).paths == ["we\\ird.mp4", "go\\ne.mp4"]


@pytest.mark.parametrize(
    "ending", ["3gpp", "264", "mp4v", "trp", "tp", "h266", "mk3d", "m2p", "MP4"]
)
def test_usual_endings_are_videos(ending: str) -> None:
    assert is_video(f"a.b.{ending}")
    assert not is_video(f"{ending}")
    assert not is_video(f"a.{ending}.txt")


@pytest.mark.parametrize("encoding", [*ENCODINGS, "latin-1"])
def test_class_names_that_are_not_utf8_are_wrong_use(tmp_path: Path, encoding: str) -> None:
    (tmp_path / "classes.txt").write_bytes("tea\r\ncafé\r\n".encode(encoding))
    with pytest.raises(TeacherError, match=r"classes\.txt.*UTF-8"):
        read_classes(tmp_path / "classes.txt")
    (tmp_path / "classes.txt").write_bytes("tea\r\ncafé\r\n".encode("utf-8-sig"))
    assert read_classes(tmp_path / "classes.txt") == ("tea", "café")


def test_a_list_may_hold_names_that_are_not_utf8(clips: Path) -> None:
    name = os.fsdecode(b"\xe9.mp4")
    (clips / name).write_bytes(b"x")
    (clips / "l.txt").write_bytes(b"\xe9.mp4\r\n")
    assert list_videos([str(clips / "l.txt")]).paths == [name]
