"""The report as one self-contained HTML page, and as Markdown."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

from ..common.tables import Table, columns, markdown_text
from ..evaluation.listing import short_dataset
from .ablation_results import Ablation
from .ablation_tables import ablation_tables, cells_table
from .accuracy_tables import DASH, percent
from .figures.canvas import Figure
from .html_page import as_yaml, render
from .report_contents import Report
from .runs import Run
from .teacher_baselines import TeacherProbe

# Folder and file next to the page.
FIGURES = "figures"
WRONG_VIDEOS = "wrong-videos.csv"


def to_markdown(report: Report) -> str:
    """Return the report as Markdown."""
    parts = ["# DistInit report\n"]
    if report.finetuned:
        parts += [report.accuracy.to_markdown(), "### What these numbers show\n"]
        if report.comparisons is not None:
            parts.append(report.comparisons.to_markdown())
        parts += [f"- {markdown_text(line)}" for line in report.sentences] + [""]
    if report.teachers is not None:
        parts.append(report.teachers.to_markdown())
    parts += [
        table.to_markdown()
        for ablation in report.ablations
        for table in ablation_tables(ablation, report.probes)
    ]
    parts += [
        f"## {markdown_text(change.run.name)} compared with {markdown_text(change.base.name)}\n\n"
        + change.table.to_markdown()
        for change in report.changes
    ]
    parts += [
        f"## {mistakes.num_wrong} of {mistakes.num_videos} test videos wrong: "
        f"{markdown_text(mistakes.run.name)}\n\n{mistakes.confusions.to_markdown()}"
        for mistakes in report.mistakes
        if mistakes.confusions is not None
    ]
    parts += [table.to_markdown() for table in (report.students, report.costs) if table is not None]
    for figure in report.figures:
        title = markdown_text(figure.title)
        parts.append(f"### {title}\n\n![{title}]({FIGURES}/{figure.name}.png)\n")
        parts.append(markdown_text(figure.caption) + "\n")
        if figure.table is not None:
            parts.append(figure.table.to_markdown())
    for run in report.runs:
        for failure in run.metrics["failed"] if run.metrics else []:
            line = (
                f"{run.name}: unreadable, counted as wrong: {failure['video']}: {failure['reason']}"
            )
            parts.append(f"- {markdown_text(line)}")
    parts += [f"- {markdown_text(note)}" for note in report.notes]
    return "\n".join(parts).rstrip() + "\n"


def to_html(report: Report, version: str) -> str:
    """Return the report as one HTML page."""
    links = {run.name: f"#run-{number}" for number, run in enumerate(report.runs, start=1)}
    figures: dict[str, list[Figure]] = {
        "other": [],
        "accuracy": [],
        "differences": [],
        "curves": [],
    }
    figures |= {f"ablation-{number}": [] for number in range(1, len(report.ablations) + 1)}
    for figure in report.figures:
        name = "curves" if figure.name.startswith("curves") else figure.name
        figures[name if name in figures else "other"].append(figure)
    return render(
        "report.html.j2",
        title="DistInit report",
        version=version,
        report=report,
        links=links,
        figures=figures,
        folder=FIGURES,
        wrong_videos=WRONG_VIDEOS,
        ablations=[_ablation(ablation, links, report.probes) for ablation in report.ablations],
        runs=[_details(run, report, links) for run in report.runs],
    )


def _ablation(
    ablation: Ablation, links: Mapping[str, str], probes: Sequence[TeacherProbe]
) -> dict[str, Any]:
    """Return the values of an ablation for the template; each row links to its first run."""
    rows = {
        cell.record.row: links[cell.run.name]
        for cell in reversed(ablation.cells)
        if cell.run is not None
    }
    # The section already has the title of the ablation.
    tables = [
        dataclasses.replace(table, title=f"Accuracy on {short_dataset(dataset)}")
        for table, dataset in zip(ablation_tables(ablation, probes), ablation.datasets, strict=True)
    ]
    return {
        "title": ablation.title,
        "tables": tables,
        "links": rows,
        "cells": cells_table(ablation),
    }


def _details(run: Run, report: Report, links: Mapping[str, str]) -> dict[str, Any]:
    """Return the values of a run for the template: its origin, tables and blocks of YAML."""
    tables: list[Table] = []
    blocks: list[tuple[str, Any]] = []
    if run.metrics is not None:
        for title, key in (
            ("Unreadable test videos, counted as wrong", "failed"),
            ("Truncated test videos, tested as far as they can be read", "damaged"),
        ):
            tables += _reason_tables(title, run.metrics[key])
        tables.append(_class_table(run.metrics["per_class"]))
        blocks.append(("Test protocol", run.metrics["protocol"]))
    if run.predictions is not None:
        blocks.append(("Identity of what was tested", run.predictions.identity))
    header = {
        key: value for key, value in run.header.items() if key in ("options", "heads", "meta")
    }
    if run.kind == "student" and header:
        meta = dict(header.get("meta") or {})
        header["meta"] = {key: value for key, value in meta.items() if key != "classes"}
        blocks.append(("Identity of the exported student", header))
    blocks.append(("Configuration as used", run.config))
    result = {key: value for key, value in run.result.items() if key not in ("metrics", "config")}
    if result:
        blocks.append(("Result", result))
    accuracy = f", top 1 {percent(run.metrics['top1'])}" if run.metrics else ""
    return {
        "title": run.name + accuracy,
        "path": run.path,
        "origin": _origin(run, report, links),
        "tables": tables,
        "blocks": [(title, as_yaml(values)) for title, values in blocks],
    }


def _origin(run: Run, report: Report, links: Mapping[str, str]) -> dict[str, str] | None:
    """Return the store or run that a run was trained from, None if it is not on the page."""
    verb, key = ("Trained on", "store") if run.kind == "student" else ("Initialised from", "init")
    path = str(run.config.get(key))
    for number, store in enumerate(report.stores, start=1):
        if store == path:
            return {"verb": verb, "address": f"#store-{number}", "name": f"store {path}"}
    for other in report.runs:
        if str(other.path) == path:
            return {"verb": verb, "address": links[other.name], "name": other.name}
    return None


def _reason_tables(title: str, rows: Sequence[Mapping[str, str]]) -> list[Table]:
    """Return a list of one table of videos with reasons, [] without rows."""
    table = Table(title, columns("video", "reason"))
    for row in rows:
        table.add(row["video"], row["reason"])
    return [table] if rows else []


def _class_table(per_class: dict[str, dict[str, int]]) -> Table:
    table = Table("Each class", columns("class", ">right", ">test videos", ">top 1, %"))
    for name, count in per_class.items():
        share = f"{100 * count['right'] / count['videos']:.1f}" if count["videos"] else DASH
        table.add(name, str(count["right"]), str(count["videos"]), share)
    return table
