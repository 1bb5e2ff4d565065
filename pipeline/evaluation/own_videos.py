"""Videos without labels, as predict and embed use them: paths, clips, and files of results."""

from __future__ import annotations

import csv
import io
import logging
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from ..clips.clip_options import ClipView
from ..common.config import write_config
from ..common.errors import UsageError
from ..common.files import write_page, write_whole
from ..common.plugins import import_extra
from ..common.run_dir import config_next_to, recorded_sections, refuse_existing, require_writable
from ..common.settings import Options
from ..corpus.sources import list_videos
from ..students.student import Student
from .evaluation_options import FrameOrder
from .labelled_clips import EvaluationClips
from .labels import Labelled, Labels

log = logging.getLogger(__name__)


def list_paths(sources: Sequence[str]) -> list[str]:
    """Return the absolute paths of the videos of folders, globs and lists, each once.

    Each source is listed separately, since two folders may have the same name, unlike corpora.

    Raises:
        SourceError: A source has no videos.
    """
    lists = [list_videos([source]) for source in sources]
    paths = (os.path.normpath(videos.absolute(i)) for videos in lists for i in range(len(videos)))
    return list(dict.fromkeys(paths))


def make_clips(
    student: Student,
    paths: Sequence[str],
    *,
    clips: int,
    crops: Literal[1, 3],
    order: FrameOrder = "ordered",
) -> EvaluationClips:
    """Return the dataset of evenly spread clips, with the frames and size of the student."""
    meta = student.meta
    videos = [Labelled(path, -1) for path in paths]
    return EvaluationClips(
        Labels("", 1, "", (), (), tuple(videos)),
        videos,
        ClipView(size=meta.clip_size, resize=meta.resize),
        clip_frames=meta.clip_length,
        clips=clips,
        crops=crops,
        order=order,
        channels=student.options.channels,
    )


def claim_file(
    out: str, endings: Mapping[str, str], command: str, config: Options, second_ending: str = ""
) -> Path:
    """Check that a command may write its result to `out`, and write the config next to it.

    Args:
        out: The file.
        endings: Map from allowed endings to names of formats, "" for none; {} allows all endings.
        command: Name of the command.
        config: Its options.
        second_ending: Ending that is added to the name of a second file, if the command writes one.

    Raises:
        UsageError: The ending is not allowed, the command did not write the existing file, or the
            folder cannot be written.
    """
    path = Path(os.path.abspath(out))
    if endings and path.suffix not in endings:
        allowed = ", ".join(
            f"{ending} ({name})" if name else ending for ending, name in endings.items()
        )
        raise UsageError(f"--out {out}: expected a file that ends in {allowed}")
    require_writable(path.parent)
    config_path = config_next_to(path)
    if recorded_sections(config_path) != {command}:
        refuse_existing(path.parent, (path.name, path.name + second_ending), f"distinit {command}")
    write_config(config_path, command, config)
    return path


def write_rows(path: Path, columns: Mapping[str, str], rows: Sequence[Sequence[Any]]) -> None:
    """Write a table as csv or parquet, depending on the ending of the file.

    Args:
        path: The file.
        columns: Map from the name of each column to its type in pyarrow.
        rows: Cells in the order of the columns; None for an empty cell.

    Raises:
        UsageError: pyarrow is not installed, or the file cannot be written.
    """
    if path.suffix == ".parquet":
        pyarrow, parquet = require_parquet()
        data = io.BytesIO()
        schema = pyarrow.schema(
            [(name, getattr(pyarrow, kind)()) for name, kind in columns.items()]
        )
        cells = [list(column) for column in zip(*rows, strict=True)]
        parquet.write_table(pyarrow.table(cells, schema=schema), data)
        write_whole(path, data.getbuffer(), UsageError)
        return
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(columns)
    writer.writerows(rows)
    write_page(path, text.getvalue())


def require_parquet() -> tuple[Any, Any]:
    """Return pyarrow and its module for parquet; raises UsageError if it is not installed."""
    option = "--out FILE.parquet"
    return import_extra("pyarrow", "parquet", option), import_extra(
        "pyarrow.parquet", "parquet", option
    )


def log_problems(
    failed: Sequence[Mapping[str, str]], truncated: Sequence[Mapping[str, str]]
) -> None:
    """Log the unreadable and the truncated videos, each with the reason."""
    for kind, videos in (("unreadable", failed), ("truncated", truncated)):
        for record in videos:
            log.warning("%s: %s: %s", kind, record["video"], record["reason"])
