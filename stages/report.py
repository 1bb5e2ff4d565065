"""Report results of runs as tables, Markdown, CSV and one HTML page (`distinit report`)."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

from .. import __version__
from ..pipeline.common.config import write_config
from ..pipeline.common.console import Console
from ..pipeline.common.documents import parse_json, read_bytes
from ..pipeline.common.errors import SourceError, UsageError
from ..pipeline.common.files import write_page
from ..pipeline.common.run_dir import check_page_dir, require_writable
from ..pipeline.reporting.ablation_results import ablation_folders, cell_names, read_ablations
from ..pipeline.reporting.ablation_tables import ablation_numbers, screen_table
from ..pipeline.reporting.accuracy_tables import accuracy_numbers, screen_tables
from ..pipeline.reporting.mistakes import wrong_video_rows
from ..pipeline.reporting.report_contents import Report, make_report
from ..pipeline.reporting.report_page import FIGURES, WRONG_VIDEOS, to_html, to_markdown
from ..pipeline.reporting.run_folders import find_runs
from .options import ReportConfig

PAGE, MARKDOWN, ACCURACY = "report.html", "report.md", "accuracy.csv"
FILES, RECORD = "report-files.json", "report.yaml"


def report(options: ReportConfig, console: Console) -> dict[str, Any]:
    """Write a report of runs into `out`, and show its tables.

    The files are report.html, report.md, accuracy.csv, wrong-videos.csv, figures/ and a CSV per
    ablation.

    Returns:
        The files, and the accuracies of each finetuned run, recomputed from its predictions (None
        if it is not finished). A run with a damaged file is skipped, with a note on the page and a
        line in `skipped`; `ok` is then False.

    Raises:
        SourceError: There is no run.
        UsageError: `out` cannot be written, `pair` names no run, or `features` has other videos.
        WeightsError: `kinetics` cannot be read.
        DistInitError: Every run is damaged; this is the error of the first one.
    """
    out = Path(options.out)
    folders = ablation_folders(options.folders)
    skipped: list[str] = []
    runs = find_runs(options.folders, cell_names(folders), folders, skipped)
    ablations = read_ablations(folders, runs)
    require_writable(out)
    content = make_report(
        runs,
        ablations,
        kinetics=options.kinetics,
        pair=options.pair,
        open_urls=options.open_urls,
        examples=options.examples,
        root=options.root,
        features=options.features,
    )
    content = replace(content, notes=[*(f"run {line}" for line in skipped), *content.notes])
    files = {**_report_files(content, out), out / WRONG_VIDEOS: wrong_video_rows(runs).to_csv()}
    tables = [out / f"ablation-{number}.csv" for number in range(1, len(ablations) + 1)]
    for ablation, file in zip(ablations, tables, strict=True):
        files[file] = ablation_numbers(ablation).to_csv()
        console.table(screen_table(ablation).to_rich())
    page = out / PAGE
    check_page_dir(page, (FILES, RECORD, *(path.relative_to(out).as_posix() for path in files)))
    _write(out, files)
    write_config(out / RECORD, "report", options)
    for table in screen_tables(content.finetuned):
        console.table(table.to_rich())
    for line in skipped:
        console.warn(line)
    for line in content.findings:
        console.info(line)
    console.info(f"report: {page}")
    return {"ok": not skipped, "skipped": skipped, **_result(content, out, tables)}


def _report_files(content: Report, out: Path) -> dict[Path, str | bytes]:
    """Return path and content of the page, which is the first, and of the files with its data."""
    files: dict[Path, str | bytes] = {
        out / PAGE: to_html(content, __version__),
        out / MARKDOWN: to_markdown(content),
        out / ACCURACY: accuracy_numbers(content.finetuned).to_csv(),
    }
    for figure in content.figures:
        files[out / FIGURES / f"{figure.name}.svg"] = figure.svg
        files[out / FIGURES / f"{figure.name}.png"] = figure.png
    return files


def _result(content: Report, out: Path, tables: Sequence[Path]) -> dict[str, Any]:
    """Return paths and numbers of a report; tables: the CSV file of each ablation."""
    return {
        "report": str(out / PAGE),
        "markdown": str(out / MARKDOWN),
        "csv": str(out / ACCURACY),
        "wrong_videos": str(out / WRONG_VIDEOS),
        "figures": [figure.name for figure in content.figures],
        "ablations": [
            {
                "title": ablation.title,
                "folder": str(ablation.folder),
                "csv": str(file),
                "rows": ablation_numbers(ablation).records(),
            }
            for ablation, file in zip(content.ablations, tables, strict=True)
        ],
        "runs": [
            {"name": run.name, "path": str(run.path), "kind": run.kind, "metrics": run.metrics}
            for run in content.runs
        ],
        "differences": [
            {
                "run": difference.run.name,
                "base": difference.base.name,
                "videos": difference.videos,
                **difference.estimate.as_dict(),
            }
            for difference in content.differences
        ],
    }


def _write(out: Path, files: Mapping[Path, str | bytes]) -> None:
    """Write the files, and remove files of an earlier report that are not among them."""
    record = out / FILES
    if (out / FIGURES).is_symlink():
        raise UsageError(f"--out {out}: its {FIGURES} is a link; choose another --out")
    earlier_names = _recorded_names(record)
    names = [path.relative_to(out).as_posix() for path in files]
    # The page is written first, since it identifies the folder as a report. The union of names is
    # recorded before the other files, so that after an interruption the next report knows all.
    page = next(iter(files))
    write_page(page, files[page])
    write_page(record, json.dumps(sorted({*names, *earlier_names})))
    for path, content in files.items():
        write_page(path, content)
    for name in set(earlier_names) - set(names):
        with suppress(FileNotFoundError):
            (out / name).unlink()
    write_page(record, json.dumps(sorted(names)))


def _recorded_names(record: Path) -> list[str]:
    """Return the names in the record of an earlier report, [] if the record is damaged.

    Names that a report does not write are left out, since the files will be removed.
    """
    try:
        names = parse_json(read_bytes(record) or "[]")
    except (SourceError, ValueError):
        return []
    allowed = re.compile(rf"({FIGURES}/)?[\w-]+\.(html|md|csv|svg|png)")
    return (
        [name for name in names if isinstance(name, str) and allowed.fullmatch(name)]
        if isinstance(names, list)
        else []
    )
