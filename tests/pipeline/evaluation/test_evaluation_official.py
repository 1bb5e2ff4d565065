"""HMDB-51 and UCF-101 as they unpack: all lists in the official formats, a real clip per video, and
every reason to refuse them. Names are invented, counts are the official ones."""

from __future__ import annotations

import itertools
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest

import distinit
from distinit.pipeline.clips.clip_options import ClipView
from distinit.pipeline.common.errors import LabelsError, UsageError
from distinit.pipeline.evaluation.labelled_clips import EvaluationClips
from distinit.pipeline.evaluation.labels import Labels, available_splits, load_labels
from distinit.pipeline.evaluation.official import HMDB51_CLASSES

# A real clip of 4 KB.
CLIP = (
    Path(distinit.__file__).parent / "conf/demo_corpus/Standing_Still/test_Standing-Still-001.mp4"
)
SPLITS = (1, 2, 3)

# Official numbers of train videos of UCF-101; the others of its 13320 videos are tested.
UCF_TRAIN = {1: 9537, 2: 9586, 3: 9624}


def clips() -> Iterator[bytes]:
    """Yield copies of the clip with different content, and mostly different size.

    An MP4 `free` box is appended to each.
    """
    content = CLIP.read_bytes()
    for number in itertools.count():
        box = number.to_bytes(8, "big") + b"\0" * (number % 2000)
        yield content + (len(box) + 8).to_bytes(4, "big") + b"free" + box


def per_class(total: int, classes: int) -> list[int]:
    return [total // classes + (k < total % classes) for k in range(classes)]


@pytest.fixture(scope="module")
def hmdb(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Write 51 class folders with 6766 clips, and 153 split files with 70 train, 30 test and some
    unused videos each."""
    root = tmp_path_factory.mktemp("hmdb51")
    lists = root / "testTrainMulti_7030_splits"
    lists.mkdir()
    content = clips()
    for label, count in zip(HMDB51_CLASSES, per_class(6766, 51), strict=True):
        folder = root / "hmdb51_org" / label
        folder.mkdir(parents=True)
        # Names are as odd as the real ones, with number signs, brackets and ampersands. A recording
        # has three clips.
        names = [
            f"#{i // 3}_A_&_[B](c);d!_{label}_f_cm_np1_ri_med_{i % 3}.avi" for i in range(count)
        ]
        for name in names:
            (folder / name).write_bytes(next(content))
        for split in SPLITS:
            rotated = names[30 * split :] + names[: 30 * split]
            tags = [1] * 70 + [2] * 30 + [0] * (count - 100)
            tagged = dict(zip(rotated, tags, strict=True))
            text = "".join(f"{name} {tagged[name]} \n" for name in names)
            (lists / f"{label}_test_split{split}.txt").write_text(text)
    assert len(list(lists.iterdir())) == 153
    return root


@pytest.fixture(scope="module")
def ucf(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Write 101 class folders with 13320 clips, and 7 lists with CR LF; HandstandPushups is spelt
    as in the archive."""
    root = tmp_path_factory.mktemp("ucf101")
    lists = root / "ucfTrainTestlist"
    lists.mkdir()
    classes = sorted(["HandstandPushups", "HammerThrow", *(f"Class{k:02d}" for k in range(99))])
    (lists / "classInd.txt").write_bytes(
        b"".join(f"{k} {name}\r\n".encode() for k, name in enumerate(classes, 1))
    )
    content = clips()
    train, test = ({s: [] for s in SPLITS} for _ in range(2))
    counts = {s: per_class(13320 - UCF_TRAIN[s], 101) for s in SPLITS}
    for k, (label, count) in enumerate(zip(classes, per_class(13320, 101), strict=True)):
        folder = root / "UCF-101" / label
        folder.mkdir(parents=True)
        stem = label.replace("HandstandPushups", "HandStandPushups")
        names = [f"v_{stem}_g{i // 5 + 1:02d}_c{i % 5 + 1:02d}.avi" for i in range(count)]
        for name in names:
            (folder / name).write_bytes(next(content))
        for split in SPLITS:
            rotated = names[20 * split :] + names[: 20 * split]
            tested = set(rotated[: counts[split][k]])
            train[split] += [f"{label}/{name} {k + 1}" for name in names if name not in tested]
            test[split] += [f"{label}/{name}" for name in names if name in tested]
    for split in SPLITS:
        (lists / f"trainlist0{split}.txt").write_bytes(
            "".join(f"{x}\r\n" for x in train[split]).encode()
        )
        (lists / f"testlist0{split}.txt").write_bytes(
            "".join(f"{x}\r\n" for x in test[split]).encode()
        )
    assert len(list(lists.iterdir())) == 7
    return root


def labels_of(kind: str, root: Path, split: int = 1, partial: bool = False) -> Labels:
    return load_labels(kind, split, root=str(root), partial=partial)


@contextmanager
def moved(path: Path, to: Path) -> Iterator[None]:
    path.rename(to)
    try:
        yield
    finally:
        to.rename(path)


@contextmanager
def changed(path: Path, old: bytes, new: bytes) -> Iterator[None]:
    content = path.read_bytes()
    assert old in content
    path.write_bytes(content.replace(old, new, 1))
    try:
        yield
    finally:
        path.write_bytes(content)


@pytest.mark.slow
def test_hmdb51_has_the_sides_of_its_lists(hmdb: Path) -> None:
    assert available_splits("hmdb51", str(hmdb)) == SPLITS
    for split in SPLITS:
        labels = labels_of("hmdb51", hmdb, split)
        assert labels.classes == HMDB51_CLASSES
        assert (len(labels.train), len(labels.test), labels.notes) == (3570, 1530, ())
        tagged = {}
        for label in HMDB51_CLASSES:
            text = (hmdb / f"testTrainMulti_7030_splits/{label}_test_split{split}.txt").read_text()
            tagged |= {
                (label, line.split(".avi ")[0] + ".avi"): line.split()[-1]
                for line in text.splitlines()
            }
        for side, tag in ((labels.train, "1"), (labels.test, "2")):
            assert {(v.path.split("/")[0], v.path.split("/")[1]) for v in side} == {
                name for name, video_tag in tagged.items() if video_tag == tag
            }
            assert all(labels.classes[v.label] == v.path.split("/")[0] for v in side), (
                "sit and situp are different classes"
            )
    situp = next(v for v in labels.test if v.path.startswith("situp/"))
    assert situp.source.startswith("#")
    assert situp.source.endswith("_A_&_[B](c);d!"), "the recording has neither class nor number"


@pytest.mark.slow
def test_a_clip_of_the_official_folders_decodes(hmdb: Path, ucf: Path) -> None:
    for kind, root in (("hmdb51", hmdb), ("ucf101", ucf)):
        labels = labels_of(kind, root)
        row = EvaluationClips(labels, labels.test, ClipView(size=32), clip_frames=4, clips=2)[0, 0]
        assert tuple(row["clips"].shape) == (2, 3, 4, 32, 32)
        assert np.ptp(row["clips"].numpy()) > 50


@pytest.mark.slow
def test_ucf101_has_the_sides_of_its_lists(ucf: Path) -> None:
    for split in SPLITS:
        labels = labels_of("ucf101", ucf, split)
        assert (len(labels.classes), len(labels.train)) == (101, UCF_TRAIN[split])
        assert len(labels.train) + len(labels.test) == 13320
        lines = (ucf / f"ucfTrainTestlist/trainlist0{split}.txt").read_text().split("\n")
        numbers = {line.split()[0]: int(line.split()[1]) for line in lines if line}
        assert {v.path: v.label + 1 for v in labels.train} == numbers, "class ids count from 1"
        assert all(labels.classes[v.label] == v.path.split("/")[0] for v in labels.test)
    pushups = labels.classes.index("HandstandPushups")
    videos = [v for v in labels.test if v.label == pushups]
    assert videos
    assert all(v.path.startswith("HandstandPushups/v_HandStandPushups_g") for v in videos)
    assert videos[0].source == f"HandStandPushups_g{videos[0].path[-11:-8]}".replace("_gg", "_g")


@pytest.mark.slow
def test_case_of_the_disk_does_not_matter(ucf: Path) -> None:
    """On other disks, the folder or its files may have the other spelling. The name of the class
    does not change."""
    folder = ucf / "UCF-101/HandstandPushups"
    with moved(folder, ucf / "UCF-101/HandStandPushups"):
        labels = labels_of("ucf101", ucf)
        assert len(labels.train) == UCF_TRAIN[1]
        assert "HandstandPushups" in labels.classes
        assert sum(v.path.startswith("HandStandPushups/") for v in labels.test) > 20
    with moved(
        folder / "v_HandStandPushups_g01_c01.avi", folder / "v_HandstandPushups_g01_c01.avi"
    ):
        labels = labels_of("ucf101", ucf)
        assert any(
            v.path.endswith("v_HandstandPushups_g01_c01.avi") for v in (*labels.train, *labels.test)
        )


def test_roots_and_archives(hmdb: Path, ucf: Path, tmp_path: Path) -> None:
    """Errors have the expected and the existing files, and where to get them."""
    with pytest.raises(
        UsageError,
        match=r"--root.*hmdb51_org\.rar.*test_train_splits",
    ):
        load_labels("hmdb51")
    with pytest.raises(UsageError, match=r"1, 2 or 3.*4"):
        labels_of("ucf101", ucf, 4)
    with pytest.raises(LabelsError, match=r"none.*UCF101\.rar"):
        labels_of("ucf101", tmp_path / "none")
    shutil.copytree(ucf / "ucfTrainTestlist", tmp_path / "wrong/ucfTrainTestlist")
    with pytest.raises(LabelsError, match=r"153 .*'ucfTrain.*serre-lab"):
        labels_of("hmdb51", tmp_path / "wrong")
    (tmp_path / "wrong/test_train_splits.rar").write_bytes(b"Rar!")
    with pytest.raises(LabelsError, match=r"wrong/test_train_splits\.rar"):
        labels_of("hmdb51", tmp_path / "wrong")
    with pytest.raises(
        LabelsError,
        match=r"101 of the 101 .*UCF101\.rar.*https://www.crcv",
    ):
        labels_of("ucf101", tmp_path / "wrong")
    (tmp_path / "wrong/UCF101.rar").write_bytes(b"Rar!")
    with pytest.raises(LabelsError, match=r"wrong/UCF101\.rar"):
        labels_of("ucf101", tmp_path / "wrong")
    videos = hmdb / "hmdb51_org"
    with moved(videos / "wave", tmp_path / "wave"):
        (videos / "wave.rar").write_bytes(b"Rar!")
        with pytest.raises(LabelsError, match=r"1 of the 51 .*'wave'.*wave\.rar"):
            labels_of("hmdb51", hmdb)
        (videos / "wave.rar").unlink()
        with pytest.raises(LabelsError, match=r"1 of the 51 .*'wave'(?!.*rar\))"):
            labels_of("hmdb51", hmdb)


def test_an_incomplete_download_is_counted(hmdb: Path, tmp_path: Path) -> None:
    missing = sorted((hmdb / "hmdb51_org/sit").iterdir())[0]
    with moved(missing, tmp_path / "gone.avi"):
        with pytest.raises(LabelsError, match=r"1 of the 6766 .*--partial"):
            labels_of("hmdb51", hmdb)
        labels = labels_of("hmdb51", hmdb, partial=True)
        num_lost = 5100 - len(labels.train) - len(labels.test)
        assert num_lost == int("train" in "".join(labels.notes)), (
            "a missing test video stays in the list and counts as wrong"
        )
    extra = hmdb / "hmdb51_org/sit/mine.avi"
    extra.write_bytes(b"not listed")
    with pytest.raises(LabelsError, match=r"1 .*'sit/mine\.avi'"):
        labels_of("hmdb51", hmdb)
    extra.unlink()


@pytest.mark.slow
@pytest.mark.parametrize("classes", [("sit",), HMDB51_CLASSES])
def test_videos_converted_to_mp4_are_matched(hmdb: Path, classes: tuple[str, ...]) -> None:
    """One class or all are converted. If a video has both files, the listed one is used."""
    original = labels_of("hmdb51", hmdb)
    videos = [video for label in classes for video in (hmdb / "hmdb51_org" / label).iterdir()]
    try:
        for video in videos:
            video.rename(video.with_suffix(".mp4"))
        labels = labels_of("hmdb51", hmdb)
        first = labels.absolute(labels.test[0])
        if first.endswith(".mp4"):
            shutil.copy(first, first.removesuffix(".mp4") + ".avi")
            with pytest.raises(LabelsError, match="1 "):
                labels_of("hmdb51", hmdb)
            os.unlink(first.removesuffix(".mp4") + ".avi")
    finally:
        for video in videos:
            video.with_suffix(".mp4").rename(video)
    for side in ("train", "test"):
        converted = [
            video.path.removesuffix(".mp4").removesuffix(".avi") for video in getattr(labels, side)
        ]
        assert converted == [video.path.removesuffix(".avi") for video in getattr(original, side)]
    assert [note for note in labels.notes if f"{len(videos)} as .mp4" in note]
    assert not original.notes


def test_wrong_lists_are_refused(hmdb: Path, ucf: Path, tmp_path: Path) -> None:
    lists = hmdb / "testTrainMulti_7030_splits"
    with (
        moved(lists / "sit_test_split2.txt", tmp_path / "list"),
        pytest.raises(LabelsError, match=r"1 of the 153 .*'sit_test_split2\.txt'"),
    ):
        labels_of("hmdb51", hmdb, 1)
    split_file = lists / "sit_test_split1.txt"
    with (
        changed(split_file, b".avi 1", b".avi 2"),
        pytest.raises(LabelsError, match="69 train and 31 test"),
    ):
        labels_of("hmdb51", hmdb)
    with (
        changed(split_file, b".avi 1", b".avi 3"),
        pytest.raises(LabelsError, match=r"NAME\.avi 0\|1\|2"),
    ):
        labels_of("hmdb51", hmdb)
    first = next(
        line for line in split_file.read_bytes().splitlines(keepends=True) if b".avi 0" in line
    )
    with (
        changed(split_file, first, b""),
        pytest.raises(LabelsError, match=r"split 1 .*6765 .*6766"),
    ):
        labels_of("hmdb51", hmdb)
    train = ucf / "ucfTrainTestlist/trainlist01.txt"
    line = train.read_bytes().splitlines(keepends=True)[5]
    with (
        changed(train, line, b""),
        pytest.raises(LabelsError, match=r"13319 .*13320"),
    ):
        labels_of("ucf101", ucf)
    wrong = line.replace(b" 1\r", b" 2\r")
    with (
        changed(train, line, wrong),
        pytest.raises(LabelsError, match=r"expected 1, .*'Class00'.*classInd\.txt"),
    ):
        labels_of("ucf101", ucf)
    with (
        changed(train, line, b"Clas/" + line),
        pytest.raises(LabelsError, match=r"Clas/.*classInd\.txt"),
    ):
        labels_of("ucf101", ucf)
    index = ucf / "ucfTrainTestlist/classInd.txt"
    with (
        changed(index, b"1 Class00", b"0 Class00"),
        pytest.raises(LabelsError, match=r"line 1.*'0 Class00'"),
    ):
        labels_of("ucf101", ucf)
    with (
        changed(index, b"100 Ham", b"99 Ham"),
        pytest.raises(LabelsError, match=r"classInd\.txt: line 100"),
    ):
        labels_of("ucf101", ucf)
    with (
        changed(index, b"101 HandstandPushups", b""),
        pytest.raises(LabelsError, match="100 classes"),
    ):
        labels_of("ucf101", ucf)


@pytest.mark.slow
def test_a_leak_of_an_official_split_is_noted_and_kept(hmdb: Path) -> None:
    """The split is not changed, so that accuracies can be compared; a user's list is refused."""
    labels = labels_of("hmdb51", hmdb)
    test, train = (hmdb / "hmdb51_org" / side[0].path for side in (labels.test, labels.train))
    content = test.read_bytes()
    test.write_bytes(train.read_bytes())
    try:
        leaking = labels_of("hmdb51", hmdb)
    finally:
        test.write_bytes(content)
    assert len(leaking.test) == 1530
    assert leaking.notes[0].startswith("1 ")
    assert os.path.basename(labels.test[0].path) in leaking.notes[0]
