"""The report as one HTML page that needs nothing but itself, and the same as Markdown."""

from __future__ import annotations

import base64
import dataclasses
import html
import json
from collections.abc import Mapping
from typing import Any

import yaml

from ..common.tables import Column, Table, markdown_text
from ..evaluation.listing import short_dataset
from .ablation_results import Ablation
from .ablation_tables import ablation_tables, cells_table
from .accuracy_tables import DASH, percent
from .figures.canvas import Figure
from .html_page import document
from .report_contents import Report
from .runs import Run

FIGURES = "figures"  # folder beside the page

Links = Mapping[str, str]
"""Name of a run → where its settings and identity are on the page."""


def to_markdown(report: Report) -> str:
    parts = ["# DistInit report\n"]
    if report.finetuned:
        parts += [report.accuracy.to_markdown(), "### What these numbers show\n"]
        parts += [f"- {markdown_text(line)}" for line in report.findings] + [""]
    parts += [
        table.to_markdown() for ablation in report.ablations for table in ablation_tables(ablation)
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
            line = f"{run.name}: counted as wrong, could not be read: {failure['video']}: {failure['reason']}"
            parts.append(f"- {markdown_text(line)}")
    parts += [f"- {markdown_text(note)}" for note in report.notes]
    return "\n".join(parts).rstrip() + "\n"


def to_html(report: Report, version: str) -> str:
    links = {run.name: f"#run-{number}" for number, run in enumerate(report.runs, start=1)}
    drawn = {figure.name: _figure(figure, links) for figure in report.figures}

    def take(*beginnings: str) -> str:
        return "".join(drawn.pop(name) for name in list(drawn) if name.startswith(beginnings))

    sections = []
    if report.finetuned:
        content = f"{_scroll(report.accuracy, links)}{take('accuracy')}"
        sections += [f"<h2>Accuracy</h2>{content}", _findings_section(report, take("differences"))]
    sections += [
        _ablation_section(ablation, take(f"ablation-{number}"), links)
        for number, ablation in enumerate(report.ablations, start=1)
    ]
    training = "".join(
        _scroll(table, links) for table in (report.students, report.costs) if table is not None
    )
    training += take("curves")
    figures = take("")
    sections += [f"<h2>Figures</h2>{figures}" if figures else ""]
    sections += [
        f"<h2>Training and costs</h2>{training}" if training else "",
        _details_section(report),
    ]
    lead = (
        f"{len(report.runs)} runs, distinit {html.escape(version)}. Every accuracy is recomputed from the run’s "
        "<code>predictions.h5</code>; a run’s name leads to the settings and identities behind it."
    )
    notes = "".join(f"<p class=note>Not shown: {html.escape(note)}</p>" for note in report.notes)
    return document("DistInit report", lead, [notes, *sections])


def _scroll(table: Table, links: Links) -> str:
    return f"<div class=scroll>{table.to_html(links)}</div>"


def _findings_section(report: Report, figure: str) -> str:
    if not report.findings:
        return figure
    items = "".join(f"<li>{html.escape(line)}</li>" for line in report.findings)
    return f"<h2>What these numbers show</h2><ul class=findings>{items}</ul>{figure}"


def _ablation_section(ablation: Ablation, figure: str, links: Links) -> str:
    rows = {
        cell.record.row: links[cell.run.name]
        for cell in reversed(ablation.cells)
        if cell.run is not None
    }
    # The section's heading is what the tables' titles have in common.
    tables = [
        dataclasses.replace(table, title=f"Accuracy on {short_dataset(dataset)}")
        for table, dataset in zip(ablation_tables(ablation), ablation.datasets, strict=True)
    ]
    return (
        f"<h2>{html.escape(ablation.title)}</h2>{''.join(_scroll(table, rows) for table in tables)}{figure}"
        f"<details><summary>Every run behind these numbers</summary>{_scroll(cells_table(ablation), links)}</details>"
    )


def _figure(figure: Figure, links: Links) -> str:
    """The picture inside the page, its files beside it, and the runs behind it."""
    data = base64.b64encode(figure.svg).decode()
    title, caption = html.escape(figure.title), html.escape(figure.caption)
    files = " ".join(
        f'<a href="{FIGURES}/{figure.name}.{kind}">{kind.upper()}</a>' for kind in ("svg", "png")
    )
    behind = ", ".join(
        f'<a href="{links[name]}">{html.escape(name)}</a>' for name in figure.about if name in links
    )
    about = f" · runs: {behind}" if behind else ""
    table = ""
    if figure.table is not None:
        inside = _scroll(figure.table, links)
        table = f"<details><summary>{html.escape(figure.table.title)}, every run</summary>{inside}</details>"
    return (
        f'<figure id="{figure.name}"><div class=scroll>'
        f'<img src="data:image/svg+xml;base64,{data}" alt="{title}: {caption}"></div>'
        f"<figcaption><b>{title}.</b> {caption} <span class=files>{files}{about}</span>"
        f"</figcaption></figure>{table}"
    )


def _details_section(report: Report) -> str:
    stores = {path: f"store-{number}" for number, path in enumerate(report.stores, start=1)}
    places = {
        str(run.path): (f"#run-{number}", run.name)
        for number, run in enumerate(report.runs, start=1)
    }
    places |= {path: (f"#{anchor}", f"store {path}") for path, anchor in stores.items()}
    runs = [_details(run, number, places) for number, run in enumerate(report.runs, start=1)]
    shown = [
        f"<details><summary>store {html.escape(path)}</summary><p class=note id={stores[path]}>{html.escape(path)}</p>"
        f"{_block('Identity', _yaml(identity))}</details>"
        for path, identity in report.stores.items()
    ]
    return "<h2>Settings and identities</h2>" + "\n".join(runs + shown)


def _details(run: Run, number: int, places: Mapping[str, tuple[str, str]]) -> str:
    """One run. places: path of a run or store → its anchor and name."""
    # A link to something inside a closed <details> opens it; one to the <details> itself would not.
    parts = [f'<p class=note id="run-{number}">{html.escape(str(run.path))}</p>']
    origin = places.get(str(run.config.get("store" if run.kind == "student" else "init")))
    if origin is not None:
        verb = "Learned from" if run.kind == "student" else "Began from"
        parts.append(f'<p>{verb} <a href="{origin[0]}">{html.escape(origin[1])}</a>.</p>')
    if run.metrics is not None:
        parts.append(
            _reasons("Test videos that could not be read, counted as wrong", run.metrics["failed"])
        )
        parts.append(
            _reasons("Test videos that were tested although damaged", run.metrics["damaged"])
        )
        parts.append(f"<div class=scroll>{_class_table(run.metrics['per_class']).to_html()}</div>")
        parts.append(_block("Test protocol", _yaml(run.metrics["protocol"])))
    if run.predictions is not None:
        parts.append(_block("Identity of what was tested", _yaml(run.predictions.identity)))
    header = {
        key: value for key, value in run.header.items() if key in ("options", "heads", "meta")
    }
    if run.kind == "student" and header:
        header["meta"] = {
            key: value for key, value in dict(header.get("meta") or {}).items() if key != "classes"
        }
        parts.append(_block("Identity of the exported student", _yaml(header)))
    parts.append(_block("Configuration as used", _yaml(run.config)))
    result = {key: value for key, value in run.result.items() if key not in ("metrics", "config")}
    if result:
        parts.append(_block("Result", _yaml(result)))
    shown = f", top 1 {percent(run.metrics['top1'])}" if run.metrics else ""
    return f"<details><summary>{html.escape(run.name + shown)}</summary>{''.join(parts)}</details>"


def _reasons(title: str, rows: list[dict[str, str]]) -> str:
    if not rows:
        return ""
    table = Table(title, [Column("video"), Column("reason")])
    for row in rows:
        table.add(row["video"], row["reason"])
    return f"<div class=scroll>{table.to_html()}</div>"


def _class_table(per_class: dict[str, dict[str, int]]) -> Table:
    columns = [
        Column("class"),
        Column("right", True),
        Column("test videos", True),
        Column("top 1, %", True),
    ]
    table = Table("Each class", columns)
    for name, count in per_class.items():
        share = f"{100 * count['right'] / count['videos']:.1f}" if count["videos"] else DASH
        table.add(name, str(count["right"]), str(count["videos"]), share)
    return table


def _yaml(values: dict[str, Any]) -> str:
    plain = json.loads(json.dumps(values, default=str))
    return yaml.safe_dump(plain, sort_keys=False, allow_unicode=True, width=100)


def _block(title: str, text: str) -> str:
    return f"<h3>{html.escape(title)}</h3><pre>{html.escape(text)}</pre>"
