"""HMDB-51 and UCF-101 as they unpack: all lists in the official formats, every video a real clip,
and what is refused. The names are made up, the numbers are the official ones."""

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

CLIP = (
    Path(distinit.__file__).parent / "conf/demo_corpus/Standing_Still/test_Standing-Still-001.mp4"
)  # a real clip of 4 KB
SPLITS = (1, 2, 3)

# UCF-101's official numbers of train videos; the rest of the 13320 are tested.
UCF_TRAIN = {1: 9537, 2: 9586, 3: 9624}


def clips() -> Iterator[bytes]:
    """The clip over and over, each a file of its own content and, mostly, size: an MP4 `free` box
    behind it."""
    content = CLIP.read_bytes()
    for number in itertools.count():
        box = number.to_bytes(8, "big") + b"\0" * (number % 2000)
        yield content + (len(box) + 8).to_bytes(4, "big") + b"free" + box


def per_class(total: int, classes: int) -> list[int]:
    return [total // classes + (k < total % classes) for k in range(classes)]


@pytest.fixture(scope="module")
def hmdb(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """51 class folders with 6766 clips, 153 split files; 70 train, 30 test and the rest unused in
    each."""
    root = tmp_path_factory.mktemp("hmdb51")
    lists = root / "testTrainMulti_7030_splits"
    lists.mkdir()
    content = clips()
    for label, count in zip(HMDB51_CLASSES, per_class(6766, 51), strict=True):
        folder = root / "hmdb51_org" / label
        folder.mkdir(parents=True)
        # Odd names as the real ones: a number sign, brackets, an ampersand; three clips a
        # recording.
        names = [
            f"#{i // 3}_A_&_[B](c);d!_{label}_f_cm_np1_ri_med_{i % 3}.avi" for i in range(count)
        ]
        for name in names:
            (folder / name).write_bytes(next(content))
        for split in SPLITS:
            turned = names[30 * split :] + names[: 30 * split]
            tags = [1] * 70 + [2] * 30 + [0] * (count - 100)
            tagged = dict(zip(turned, tags, strict=True))
            text = "".join(f"{name} {tagged[name]} \n" for name in names)
            (lists / f"{label}_test_split{split}.txt").write_text(text)
    assert len(list(lists.iterdir())) == 153
    return root


@pytest.fixture(scope="module")
def ucf(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """101 class folders with 13320 clips, 7 lists with CR LF; HandstandPushups spelt as in the
    archive."""
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
            turned = names[20 * split :] + names[: 20 * split]
            tested = set(turned[: counts[split][k]])
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
def test_hmdb51_is_read_as_its_lists_say(hmdb: Path) -> None:
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
                name for name, own in tagged.items() if own == tag
            }
            assert all(labels.classes[v.label] == v.path.split("/")[0] for v in side), (
                "sit is not situp"
            )
    one = next(v for v in labels.test if v.path.startswith("situp/"))
    assert one.source.startswith("#")
    assert one.source.endswith("_A_&_[B](c);d!"), "the recording, without class and number"


@pytest.mark.slow
def test_a_clip_of_the_official_folders_decodes(hmdb: Path, ucf: Path) -> None:
    for kind, root in (("hmdb51", hmdb), ("ucf101", ucf)):
        labels = labels_of(kind, root)
        row = EvaluationClips(labels, labels.test, ClipView(size=32), clip_frames=4, clips=2)[0, 0]
        assert tuple(row["clips"].shape) == (2, 3, 4, 32, 32)
        assert np.ptp(row["clips"].numpy()) > 50


@pytest.mark.slow
def test_ucf101_is_read_as_its_lists_say(ucf: Path) -> None:
    for split in SPLITS:
        labels = labels_of("ucf101", ucf, split)
        assert (len(labels.classes), len(labels.train)) == (101, UCF_TRAIN[split])
        assert len(labels.train) + len(labels.test) == 13320
        lines = (ucf / f"ucfTrainTestlist/trainlist0{split}.txt").read_text().split("\n")
        numbers = {line.split()[0]: int(line.split()[1]) for line in lines if line}
        assert {v.path: v.label + 1 for v in labels.train} == numbers, "class ids count from 1"
        assert all(labels.classes[v.label] == v.path.split("/")[0] for v in labels.test)
    pushups = labels.classes.index("HandstandPushups")
    found = [v for v in labels.test if v.label == pushups]
    assert found
    assert all(v.path.startswith("HandstandPushups/v_HandStandPushups_g") for v in found)
    assert found[0].source == f"HandStandPushups_g{found[0].path[-11:-8]}".replace("_gg", "_g")


@pytest.mark.slow
def test_case_of_the_disk_does_not_matter(ucf: Path) -> None:
    """Unpacked elsewhere, the folder or its files may have the other spelling; the class keeps its
    own name."""
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
    """Expected, found, and where to get it."""
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
    gone = sorted((hmdb / "hmdb51_org/sit").iterdir())[0]
    with moved(gone, tmp_path / "gone.avi"):
        with pytest.raises(LabelsError, match=r"1 of the 6766 .*--partial"):
            labels_of("hmdb51", hmdb)
        labels = labels_of("hmdb51", hmdb, partial=True)
        lost = 5100 - len(labels.train) - len(labels.test)
        assert lost == int("train" in "".join(labels.notes)), (
            "a missing test video stays, and counts as wrong"
        )
    extra = hmdb / "hmdb51_org/sit/mine.avi"
    extra.write_bytes(b"not listed")
    with pytest.raises(LabelsError, match=r"1 .*'sit/mine\.avi'"):
        labels_of("hmdb51", hmdb)
    extra.unlink()


@pytest.mark.slow
@pytest.mark.parametrize("classes", [("sit",), HMDB51_CLASSES])
def test_videos_converted_to_mp4_are_found(hmdb: Path, classes: tuple[str, ...]) -> None:
    """The tree as people convert it, one class or all; with both of a video, that of the lists
    counts."""
    before = labels_of("hmdb51", hmdb)
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
        assert converted == [video.path.removesuffix(".avi") for video in getattr(before, side)]
    assert [note for note in labels.notes if f"{len(videos)} as .mp4" in note]
    assert not before.notes


def test_wrong_lists_are_refused(hmdb: Path, ucf: Path, tmp_path: Path) -> None:
    lists = hmdb / "testTrainMulti_7030_splits"
    with (
        moved(lists / "sit_test_split2.txt", tmp_path / "list"),
        pytest.raises(LabelsError, match=r"1 of the 153 .*'sit_test_split2\.txt'"),
    ):
        labels_of("hmdb51", hmdb, 1)
    own = lists / "sit_test_split1.txt"
    with (
        changed(own, b".avi 1", b".avi 2"),
        pytest.raises(LabelsError, match="69 train and 31 test"),
    ):
        labels_of("hmdb51", hmdb)
    with (
        changed(own, b".avi 1", b".avi 3"),
        pytest.raises(LabelsError, match=r"NAME\.avi 0\|1\|2"),
    ):
        labels_of("hmdb51", hmdb)
    first = next(line for line in own.read_bytes().splitlines(keepends=True) if b".avi 0" in line)
    with (
        changed(own, first, b""),
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
def test_a_leak_of_an_official_split_is_told_and_kept(hmdb: Path) -> None:
    """Its numbers are compared with others', so the split stays; a user's own list would be
    refused."""
    labels = labels_of("hmdb51", hmdb)
    test, train = (hmdb / "hmdb51_org" / side[0].path for side in (labels.test, labels.train))
    content = test.read_bytes()
    test.write_bytes(train.read_bytes())
    try:
        again = labels_of("hmdb51", hmdb)
    finally:
        test.write_bytes(content)
    assert len(again.test) == 1530
    assert again.notes[0].startswith("1 ")
    assert os.path.basename(labels.test[0].path) in again.notes[0]
