"""`distinit report DIR… --out DIR`: results of runs as tables, Markdown, CSV and one HTML page."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
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
from ..pipeline.reporting.report_contents import make_report
from ..pipeline.reporting.report_page import FIGURES, WRONG_VIDEOS, to_html, to_markdown
from ..pipeline.reporting.run_folders import find_runs
from .options import ReportConfig

FILES, RECORD = "report-files.json", "report.yaml"


def report(options: ReportConfig, console: Console) -> dict[str, Any]:
    """Write a report of runs into `out`, and show its tables.

    The report has report.html, report.md, accuracy.csv, wrong-videos.csv, figures/ and a CSV per
    ablation.

    Returns:
        The files, and the accuracies of each finetuned run as recomputed from its predictions (None
        if it is not finished). A run with a damaged file is skipped, with a note on the page and in
        `skipped`, and `ok` is False.

    Raises:
        SourceError: There is no run.
        UsageError: `out` cannot be written, `pair` names no run, or `features` are of other videos.
        WeightsError: `kinetics` cannot be read.
        DistInitError: Every run is damaged; the error is that of the first.
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
    page, markdown, table = (out / name for name in ("report.html", "report.md", "accuracy.csv"))
    files: dict[Path, str | bytes] = {
        page: to_html(content, __version__),
        markdown: to_markdown(content),
        table: accuracy_numbers(content.finetuned).to_csv(),
        out / WRONG_VIDEOS: wrong_video_rows(runs).to_csv(),
    }
    for figure in content.figures:
        files[out / FIGURES / f"{figure.name}.svg"] = figure.svg
        files[out / FIGURES / f"{figure.name}.png"] = figure.png
    written = []
    for number, ablation in enumerate(ablations, start=1):
        written.append(out / f"ablation-{number}.csv")
        files[written[-1]] = ablation_numbers(ablation).to_csv()
        console.table(screen_table(ablation).to_rich())
    check_page_dir(page, (FILES, RECORD, *(path.relative_to(out).as_posix() for path in files)))
    _write(out, files)
    write_config(out / RECORD, "report", options)
    for part in screen_tables(content.finetuned):
        console.table(part.to_rich())
    for line in skipped:
        console.warn(line)
    for line in content.findings:
        console.info(line)
    console.info(f"report: {page}")
    return {
        "ok": not skipped,
        "skipped": skipped,
        "report": str(page),
        "markdown": str(markdown),
        "csv": str(table),
        "wrong_videos": str(out / WRONG_VIDEOS),
        "figures": [figure.name for figure in content.figures],
        "ablations": [
            {
                "title": a.title,
                "folder": str(a.folder),
                "csv": str(file),
                "rows": ablation_numbers(a).records(),
            }
            for a, file in zip(ablations, written, strict=True)
        ],
        "runs": [
            {"name": run.name, "path": str(run.path), "kind": run.kind, "metrics": run.metrics}
            for run in runs
        ],
        "differences": [
            {"run": d.run.name, "base": d.base.name, "videos": d.videos, **d.estimate.as_dict()}
            for d in content.differences
        ],
    }


def _write(out: Path, files: Mapping[Path, str | bytes]) -> None:
    """Write the files, and remove those of an earlier report that this one does not have."""
    record = out / FILES
    if (out / FIGURES).is_symlink():
        raise UsageError(f"--out {out}: its {FIGURES} is a link; choose another --out")
    earlier = _earlier(record)
    names = [path.relative_to(out).as_posix() for path in files]
    # The page first, since it identifies the folder. Then the union of names, so that after an
    # interruption the next report knows the files of both.
    page = next(iter(files))
    write_page(page, files[page])
    write_page(record, json.dumps(sorted({*names, *earlier})))
    for path, content in files.items():
        write_page(path, content)
    for name in set(earlier) - set(names):
        with suppress(FileNotFoundError):
            (out / name).unlink()
    write_page(record, json.dumps(sorted(names)))


def _earlier(record: Path) -> list[str]:
    """Return the files of an earlier report from its record, [] if the record is damaged.

    Only names that a report may write are returned.
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
