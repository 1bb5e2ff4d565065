"""Sources: listed files, their names and order, and errors."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from distinit.pipeline.common.errors import SourceError
from distinit.pipeline.corpus.sources import escape_path, list_videos, unescape_path


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Make a folder with videos, other files, odd names and a link to itself."""
    root = tmp_path / "clips"
    for name in (
        "b/2.mp4",
        "a.MKV",
        "-dash.avi",
        "with space.webm",
        "b/.hidden.mp4",
        "notes.txt",
        "b/x.jpg",
    ):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(b"x")
    Path(os.fsdecode(os.fsencode(root) + b"/\xff\xfe.mp4")).write_bytes(b"x")
    (root / "b" / "again").symlink_to(root)
    return root


def test_a_folder_is_searched_in_byte_order(folder: Path) -> None:
    videos = list_videos([str(folder)])
    assert videos.paths == [
        "-dash.avi",
        "a.MKV",
        "b/2.mp4",
        "with space.webm",
        os.fsdecode(b"\xff\xfe.mp4"),
    ]
    assert videos.corpora[0].name == "clips"
    assert videos.corpora[0].root == str(folder)
    assert videos.ignored == {".txt": 1, ".jpg": 1}
    assert all(os.path.isfile(videos.absolute(i)) for i in range(len(videos)))


def test_a_folder_counts_under_its_own_name_and_prepared_copies_are_no_videos(
    tmp_path: Path,
) -> None:
    root = tmp_path / "clips"
    for name in ("v/1.mp4", "copies/prepared.json", "copies/clips/1.mp4"):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(b"x")
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / "2.mp4").write_bytes(b"x")
    (root / "a_link").symlink_to("v")
    (root / "v" / "far").symlink_to(tmp_path / "elsewhere")
    videos = list_videos([str(root)])
    assert videos.paths == ["v/1.mp4", "v/far/2.mp4"]
    assert videos.ignored == {"folder of prepared copies": 1}
    # A folder of prepared copies that is named as a source is listed.
    assert list_videos([str(root / "copies")]).paths == ["clips/1.mp4"]


def test_lists_csv_globs_and_names(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "list.txt").write_text(
        f"# comment\nclips/b/2.mp4 3\nclips/with space.webm\n\n{folder}/a.MKV,12\nclips/gone.mp4\n"
    )
    (tmp_path / "labels.csv").write_text('path,label\n"clips/a.MKV",x\n')
    lists = list_videos(
        [f"k=@{tmp_path}/list.txt", str(tmp_path / "labels.csv"), f"g={folder}/b/*.mp4"]
    )
    assert [c.name for c in lists.corpora] == ["k", "labels", "g"]
    assert lists.paths == [
        "clips/b/2.mp4", "clips/with space.webm", "clips/a.MKV", "clips/gone.mp4", "clips/a.MKV", "2.mp4",
    ]  # fmt: skip
    assert lists.corpus.tolist() == [0, 0, 0, 0, 1, 2]


def test_one_file_and_the_same_source_twice(folder: Path) -> None:
    videos = list_videos([str(folder / "a.MKV"), str(folder)])
    assert videos.paths.count("a.MKV") == 1
    assert len(videos.corpora) == 1


def test_a_folder_with_an_equals_sign_in_its_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "x=y").mkdir()
    (tmp_path / "x=y" / "v.mp4").write_bytes(b"x")
    monkeypatch.chdir(tmp_path)
    assert list_videos(["x=y"]).corpora[0].name == "x=y"


def test_a_glob_in_a_folder_whose_name_looks_like_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "a[1]" / "v").mkdir(parents=True)
    (tmp_path / "a[1]" / "v" / "x.mp4").write_bytes(b"x")
    monkeypatch.chdir(tmp_path / "a[1]")
    videos = list_videos(["v/*.mp4"])
    assert (videos.corpora[0].name, videos.paths) == ("v", ["x.mp4"])
    assert videos.corpora[0].root == str(tmp_path / "a[1]" / "v")
    with pytest.raises(SourceError, match="no videos found"):
        list_videos(["v/*/.."])


def test_an_error_counts_only_the_other_files_of_its_source(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(SourceError, match=r"empty: no videos found$"):
        list_videos([str(folder), str(tmp_path / "empty")])


def test_sources_without_videos_are_refused(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "bad.csv").write_text("file,label\na,b\n")
    for source, message in (
        (str(tmp_path / "nowhere"), "no such folder"),
        (str(tmp_path / "empty"), "no videos found"),
        (str(tmp_path / "bad.csv"), "requires a column `path`"),
        (str(tmp_path / "@nolist"), "no such"),
    ):
        with pytest.raises(SourceError, match=message):
            list_videos([source])
    with pytest.raises(SourceError, match="another name"):
        list_videos([f"c={folder}", f"c={folder}/b"])


@given(st.binary(min_size=1).filter(lambda b: b"\0" not in b))
def test_every_file_name_round_trips_through_utf8(name: bytes) -> None:
    text = os.fsdecode(name)
    escaped = escape_path(text)
    escaped.encode("utf-8")
    assert escaped.isprintable()
    assert unescape_path(escaped) == text


@pytest.mark.parametrize("text", ["a%00b.mp4", "a\0b.mp4", "%00"])
def test_an_escaped_zero_byte_names_a_file_that_does_not_exist(tmp_path: Path, text: str) -> None:
    assert not os.path.exists(tmp_path / unescape_path(text))
    assert unescape_path("50%2500.mp4") == "50%00.mp4"
