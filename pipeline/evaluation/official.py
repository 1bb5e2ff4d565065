"""Read HMDB-51 and UCF-101 from their official folders and split files, and check every count.

HMDB-51 has `testTrainMulti_7030_splits/CLASS_test_splitN.txt` with lines `NAME.avi 0|1|2` (unused,
train, test). UCF-101 has `ucfTrainTestlist/{classInd,trainlist0N,testlist0N}.txt`; its test lists
have no labels.
"""

from __future__ import annotations

import os
import re
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass

from ..common.errors import LabelsError, UsageError
from ..corpus.sources import escape_path
from .listing import Listing, NameMatcher, Row, first_few, other_endings, read_lines, videos_in

SPLITS = (1, 2, 3)

_HMDB51_NAMES = """
brush_hair cartwheel catch chew clap climb climb_stairs dive draw_sword dribble drink eat fall_floor fencing flic_flac
golf handstand hit hug jump kick kick_ball kiss laugh pick pour pullup punch push pushup ride_bike ride_horse run
shake_hands shoot_ball shoot_bow shoot_gun sit situp smile smoke somersault stand swing_baseball sword sword_exercise
talk throw turn walk wave
"""
HMDB51_CLASSES = tuple(_HMDB51_NAMES.split())
# RECORDING_CLASS_VISIBLE_MOTION_PEOPLE_VIEW_QUALITY_NUMBER.avi
_HMDB51_NAME = re.compile(r"(.+)_[fhlu]_(?:cm|nm)_np\d+_(?:ba|fr|le|ri)_(?:bad|goo|med)_\d+\.avi")
_UCF101_NAME = re.compile(r"v_(.+_g\d+)_c\d+\.avi", re.IGNORECASE)


@dataclass(frozen=True)
class _Facts:
    """The files and counts of an official data set."""

    name: str
    classes: int
    videos: int
    train: tuple[int, int, int]
    test: tuple[int, int, int]
    lists: tuple[str, ...]
    video_archive: str
    list_archive: str
    page: str

    @property
    def download_hint(self) -> str:
        return f"get {self.video_archive} and {self.list_archive} from {self.page} and unpack both"


HMDB51 = _Facts(
    name="HMDB-51",
    classes=51,
    videos=6766,
    train=(3570, 3570, 3570),
    test=(1530, 1530, 1530),
    lists=tuple(f"{name}_test_split{n}.txt" for name in HMDB51_CLASSES for n in SPLITS),
    video_archive="hmdb51_org.rar",
    list_archive="test_train_splits.rar",
    page="https://serre-lab.clps.brown.edu/resource/hmdb-a-large-human-motion-database/",
)
UCF101 = _Facts(
    name="UCF-101",
    classes=101,
    videos=13320,
    train=(9537, 9586, 9624),
    test=(3783, 3734, 3696),
    lists=("classInd.txt", *(f"{side}list0{n}.txt" for side in ("train", "test") for n in SPLITS)),
    video_archive="UCF101.rar",
    list_archive="UCF101TrainTestSplits-RecognitionTask.zip",
    page="https://www.crcv.ucf.edu/data/UCF101.php",
)


def read_hmdb51(root: str | None, split: int, partial: bool = False) -> Listing:
    """Read HMDB-51 below `root`: 51 class folders of .avi files, and a folder of 153 split files.

    Args:
        root: The folder to search.
        split: 1, 2 or 3.
        partial: Whether some of the 6766 videos may be missing.

    Raises:
        UsageError: `root` is None, or the split is not 1, 2 or 3.
        LabelsError: Files are missing or have unexpected content; the message has the address to
            get them from.
    """
    base, lists, matcher = _find_folders(HMDB51, root, split, HMDB51_CLASSES)
    rows: list[Row] = []
    listed: list[tuple[str, str]] = []
    for label in HMDB51_CLASSES:
        file = os.path.join(lists, f"{label}_test_split{split}.txt")
        counts = Counter[str]()
        for line in read_lines(file):
            name, _, tag = line.rpartition(" ")
            if tag not in ("0", "1", "2") or not name.strip():
                raise LabelsError(f"{file}: expected `NAME.avi 0|1|2`, got {escape_path(line)!r}")
            path = f"{label}/{name.strip()}"
            actual = matcher.find(path) or path
            listed.append((path, actual))
            counts[tag] += 1
            if tag != "0":
                match = _HMDB51_NAME.fullmatch(name.strip())
                source = match[1].removesuffix(f"_{label}") if match else name.strip()
                side = "train" if tag == "1" else "test"
                rows.append(Row(actual, label, side, os.path.basename(file), source))
        if (counts["1"], counts["2"]) != (70, 30):
            raise LabelsError(
                f"{file}: {counts['1']} train and {counts['2']} test videos, expected 70 and 30"
            )
    return _listing(HMDB51, base, lists, split, rows, listed, matcher, HMDB51_CLASSES, partial)


def read_ucf101(root: str | None, split: int, partial: bool = False) -> Listing:
    """Read UCF-101 below `root`: 101 class folders of .avi files, and a folder of 7 lists.

    Arguments and exceptions are those of `read_hmdb51`.
    """
    if root is not None and (folder := _folder_of(root, UCF101.lists)) is not None:
        classes = _class_index(os.path.join(folder, "classInd.txt"))
    else:
        classes = ()
    base, lists, matcher = _find_folders(UCF101, root, split, classes)
    by_folded_name = {name.casefold(): name for name in classes}
    rows: list[Row] = []
    listed: list[tuple[str, str]] = []
    for side in ("train", "test"):
        file = os.path.join(lists, f"{side}list0{split}.txt")
        for line in read_lines(file):
            path, _, number = line.partition(" ")
            folder, slash, name = path.partition("/")
            label = by_folded_name.get(folder.casefold())
            if not slash or label is None:
                raise LabelsError(f"{file}: {escape_path(line)!r} names no class of classInd.txt")
            if number and number.strip() != str(classes.index(label) + 1):
                raise LabelsError(
                    f"{file}: {escape_path(line)!r}: expected {classes.index(label) + 1}, the number of {label!r} in "
                    "classInd.txt"
                )
            match = _UCF101_NAME.fullmatch(name)
            actual = matcher.find(path) or path
            listed.append((path, actual))
            source = match[1] if match else name
            rows.append(Row(actual, label, side, os.path.basename(file), source))
    return _listing(UCF101, base, lists, split, rows, listed, matcher, classes, partial)


def _class_index(path: str) -> tuple[str, ...]:
    """Read classInd.txt: `1 ApplyEyeMakeup` … `101 YoYo`, numbered from 1."""
    classes = []
    for number, line in enumerate(read_lines(path), start=1):
        first, _, name = line.partition(" ")
        if first != str(number) or not name.strip():
            raise LabelsError(
                f"{path}: line {number}: expected `{number} CLASS`, got {escape_path(line)!r}"
            )
        classes.append(name.strip())
    if len(set(classes)) != UCF101.classes:
        raise LabelsError(f"{path}: {len(set(classes))} classes, expected {UCF101.classes}")
    return tuple(classes)


def _find_folders(
    facts: _Facts, root: str | None, split: int, classes: tuple[str, ...]
) -> tuple[str, str, NameMatcher]:
    """Return the folder of class folders, the folder of lists, and the matcher of videos.

    Raises:
        UsageError: `root` is None, or the split is not 1, 2 or 3.
        LabelsError: Files are missing; the message names archives that are not unpacked.
    """
    if root is None:
        raise UsageError(
            f"--root: required by {facts.name}: the folder of its videos and lists ({facts.download_hint})"
        )
    if split not in SPLITS:
        raise UsageError(f"--split: expected 1, 2 or 3 for {facts.name}, got {split}")
    root = os.path.abspath(root)
    if not os.path.isdir(root):
        raise LabelsError(f"--root {root}: no such folder; {facts.download_hint}")
    lists = _folder_of(root, facts.lists)
    if lists is None:
        archive = _find_archive(root, facts.list_archive)
        state = (
            f"{archive} is not unpacked"
            if archive
            else f"found: {_contents(root)}; {facts.download_hint}"
        )
        raise LabelsError(
            f"--root {root}: has none of the {len(facts.lists)} lists of {facts.name}; {state}"
        )
    missing = [name for name in facts.lists if not os.path.isfile(os.path.join(lists, name))]
    if missing:
        raise LabelsError(
            f"{lists}: {len(missing)} of the {len(facts.lists)} lists of {facts.name} are missing, "
            f"{first_few(missing)}; get {facts.list_archive} from {facts.page}"
        )
    base = _videos_folder(facts, root, classes)
    folders = [name for name in os.listdir(base) if os.path.isdir(os.path.join(base, name))]
    folded = {name.casefold() for name in classes}
    videos = videos_in(base, (name for name in folders if name.casefold() in folded))
    return base, lists, NameMatcher(videos)


def _videos_folder(facts: _Facts, root: str, classes: tuple[str, ...]) -> str:
    """Return the folder with the most class folders.

    Raises:
        LabelsError: It lacks class folders.
    """
    folded = {name.casefold() for name in classes}
    best, existing = root, set[str]()
    for folder in _candidate_folders(root):
        candidates = {name.casefold() for name in _subfolders(folder)} & folded
        if len(candidates) > len(existing):
            best, existing = folder, candidates
    missing = [name for name in classes if name.casefold() not in existing]
    if not missing:
        return best
    archives = [f"{name}.rar" for name in missing if _find_archive(root, f"{name}.rar")]
    if archives:
        state = f"{len(archives)} class archives are not unpacked, such as {archives[0]}"
    elif archive := _find_archive(root, facts.video_archive):
        state = f"{archive} is not unpacked"
    else:
        state = f"found: {_contents(root)}; get {facts.video_archive} from {facts.page}"
    raise LabelsError(
        f"--root {root}: {len(missing)} of the {len(classes)} class folders of {facts.name} are missing, "
        f"{first_few(missing)}; {state}"
    )


def _listing(
    facts: _Facts,
    base: str,
    lists: str,
    split: int,
    rows: list[Row],
    listed: list[tuple[str, str]],
    matcher: NameMatcher,
    classes: tuple[str, ...],
    partial: bool,
) -> Listing:
    """Check the counts of a split, and return its listing.

    `listed` has (name in the lists, name on the disk) of each video.
    """
    actual_names = {actual for _, actual in listed}
    counts: dict[str, tuple[int, int]] = {
        "videos": (len(actual_names), facts.videos),
        "train videos": (sum(row.side == "train" for row in rows), facts.train[split - 1]),
        "test videos": (sum(row.side == "test" for row in rows), facts.test[split - 1]),
    }
    for kind, (count, expected) in counts.items():
        if count != expected:
            raise LabelsError(
                f"{lists}: split {split} lists {count} {kind}, expected {expected}: not the official lists of "
                f"{facts.name}, or damaged ones; get {facts.list_archive} from {facts.page}"
            )
    missing = [actual for _, actual in listed if actual not in matcher.exact]
    if missing and not partial:
        raise LabelsError(
            f"{base}: {len(missing)} of the {facts.videos} videos of {facts.name} are missing, {first_few(missing)}; "
            f"get {facts.video_archive} from {facts.page}, or give --partial"
        )
    unlabelled = tuple(sorted(matcher.exact - actual_names))
    return Listing(
        lists,
        base,
        rows,
        classes,
        unlabelled,
        official=True,
        download_hint=facts.download_hint,
        notes=other_endings(listed),
    )


def _candidate_folders(root: str) -> list[str]:
    """Return `root` and the folders up to two levels below it, where archives are unpacked."""
    first = [os.path.join(root, name) for name in _subfolders(root)]
    return [
        root,
        *first,
        *(os.path.join(folder, name) for folder in first for name in _subfolders(folder)),
    ]


def _subfolders(folder: str) -> list[str]:
    try:
        return sorted(entry.name for entry in os.scandir(folder) if entry.is_dir())
    except OSError:
        return []


def _folder_of(root: str, files: tuple[str, ...]) -> str | None:
    """Return the folder at or below `root` that has the most of `files`; None if none has any."""

    def count(folder: str) -> int:
        try:
            return len(set(os.listdir(folder)) & set(files))
        except OSError:
            return 0

    best = max(_candidate_folders(root), key=count, default=root)
    return best if count(best) else None


def _find_archive(root: str, archive: str) -> str | None:
    """Return the path of an archive at or below `root`, None if it does not exist."""
    return next(
        (
            path
            for folder in _candidate_folders(root)
            if os.path.isfile(path := os.path.join(folder, archive))
        ),
        None,
    )


def _contents(root: str) -> str:
    names = sorted(os.listdir(root))
    return first_few(names, 5) if names else "an empty folder"


READERS: dict[str, Callable[[str | None, int, bool], Listing]] = {
    "hmdb51": read_hmdb51,
    "ucf101": read_ucf101,
}
