"""The report as one HTML page that needs nothing but itself, and the same as Markdown."""

from __future__ import annotations

import html
import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import yaml

from .ablation import Ablation
from .ablation_tables import ablation_table, cells_table
from .accuracy import DASH, Difference, accuracy_table, differences, how_little, percent
from .charts import Line, Whisker, line_chart, whisker_chart
from .runs import Run
from .style import document
from .tables import Column, Table, markdown_text


@dataclass(frozen=True)
class Report:
    """Everything that is shown, computed once for all forms."""

    runs: Sequence[Run]
    accuracy: Table
    differences: Sequence[Difference]
    findings: Sequence[str]
    students: Table | None
    ablations: Sequence[Ablation]

    @property
    def finetuned(self) -> list[Run]:
        """The finetuned runs that stand alone; those of an ablation's cells are in its table."""
        return alone(self.runs, self.ablations)


def alone(runs: Sequence[Run], ablations: Sequence[Ablation]) -> list[Run]:
    """The finetuned runs that belong to no ablation."""
    taken = {(ablation.folder / cell.record.finetune).resolve() for ablation in ablations for cell in ablation.cells}
    return [run for run in runs if run.kind == "finetune" and run.path not in taken]


def make_report(runs: Sequence[Run], ablations: Sequence[Ablation] = ()) -> Report:
    """Recomputes every number from the runs' predictions."""
    finetuned = alone(runs, ablations)
    found = differences(finetuned)
    findings = how_little(finetuned, found)
    return Report(runs, accuracy_table(finetuned), found, findings, student_table(runs), ablations)


def student_table(runs: Sequence[Run]) -> Table | None:
    """One row a student run; None where there is none."""
    students = [run for run in runs if run.kind == "student"]
    if not students:
        return None
    columns = [Column("run"), Column("student"), Column("teachers"), Column("steps", True)]
    table = Table(
        "Distillation from cached targets", [*columns, Column("loss of last epoch", True), Column("clips/s", True)]
    )
    for run in students:
        if not run.finished:
            table.add(run.name, _architecture(run), *["missing"] * 4)
            continue
        epoch, rates = run.last("epoch"), run.curve("clips_per_s").y
        table.add(
            run.name,
            _architecture(run),
            ", ".join(run.heads),
            str(epoch.get("step", DASH)),
            f"{epoch['loss']:.3f}" if epoch.get("loss") is not None else DASH,
            f"{np.median(rates):.1f}" if len(rates) else DASH,
        )
    return table


def _architecture(run: Run) -> str:
    student = run.config.get("student") or {}
    words = [str(student.get("architecture", "–"))]
    if student.get("variant") == "vmz":
        words.append("vmz")
    if student.get("width", 1.0) != 1.0:
        words.append(f"width {student['width']}")
    return ", ".join(words)


def to_markdown(report: Report) -> str:
    parts = ["# DistInit report\n"]
    if report.finetuned:
        parts += [report.accuracy.to_markdown(), "### What these numbers show\n"]
        parts += [f"- {markdown_text(line)}" for line in report.findings] + [""]
    parts += [ablation_table(ablation).to_markdown() for ablation in report.ablations]
    if report.students is not None:
        parts.append(report.students.to_markdown())
    for run in report.runs:
        for failure in run.metrics["failed"] if run.metrics else []:
            line = f"{run.name}: counted as wrong, could not be read: {failure['video']}: {failure['reason']}"
            parts.append(f"- {markdown_text(line)}")
    return "\n".join(parts).rstrip() + "\n"


def to_html(report: Report, version: str) -> str:
    sections = []
    if report.finetuned:
        sections += [_accuracy_section(report), _findings_section(report)]
    sections += [_ablation_section(ablation) for ablation in report.ablations]
    if report.students is not None:
        sections.append(f"<h2>Students</h2><div class=scroll>{report.students.to_html()}</div>")
    sections += [_curves_section(report), _details_section(report)]
    lead = (
        f"{len(report.runs)} runs, distinit {html.escape(version)}. Every accuracy is recomputed from the run’s "
        "<code>predictions.h5</code>; the settings and identities behind it are at the end of the page."
    )
    return document("DistInit report", lead, sections)


def _accuracy_section(report: Report) -> str:
    whiskers = [
        Whisker(f"{run.name}", *(100 * run.metrics["top1"][end] for end in ("value", "low", "high")))
        for run in report.finetuned
        if run.metrics
    ]
    chart = whisker_chart(whiskers, x_label="top 1 accuracy, %")
    figure = _figure(chart, "Top 1 of each run (dot) and its 95 % bootstrap interval over the test videos (line).")
    return f"<h2>Accuracy</h2><div class=scroll>{report.accuracy.to_html()}</div>{figure}"


def _findings_section(report: Report) -> str:
    if not report.findings:
        return ""
    items = "".join(f"<li>{html.escape(line)}</li>" for line in report.findings)
    rows = [
        Whisker(
            f"{d.run.name} − {d.base.name}", *(100 * v for v in (d.estimate.value, d.estimate.low, d.estimate.high))
        )
        for d in report.differences
    ]
    chart = whisker_chart(rows, x_label="difference in top 1, points", zero=True)
    figure = _figure(
        chart,
        "Paired differences on the same test videos with their 95 % intervals. "
        "A line that crosses zero leaves open which run is better.",
    )
    return f"<h2>What these numbers show</h2><ul class=findings>{items}</ul>{figure}"


def _ablation_section(ablation: Ablation) -> str:
    rows = [
        Whisker(f"{entry.row}", *(100 * value for value in (e.value, e.low, e.high)))
        for entry in ablation.entries()
        if entry.gain is not None and len(ablation.datasets) == 1
        for e in (entry.gain.estimate,)
    ]
    chart = whisker_chart(rows, x_label=f"difference in top 1 to {ablation.rows[0]}, points", zero=True)
    figure = _figure(
        chart, "What each row gains over the first, with its 95 % interval: one that crosses zero leaves it open."
    )
    return (
        f"<h2>{html.escape(ablation.title)}</h2><div class=scroll>{ablation_table(ablation).to_html()}</div>{figure}"
        "<details><summary>Every run behind these numbers</summary>"
        f"<div class=scroll>{cells_table(ablation).to_html()}</div></details>"
    )


def _curves_section(report: Report) -> str:
    figures = []
    for kind, title in (("student", "Distillation loss"), ("finetune", "Finetuning loss")):
        runs = [run for run in report.runs if run.kind == kind]
        lines: list[Line] = [run.curve("loss") for run in runs]
        chart = line_chart(lines, x_label="step", y_label="loss")
        figures.append(_figure(chart, f"{title} by step of each {kind} run, as logged during training."))
    content = "".join(figures)
    return f"<h2>Training</h2>{content}" if content else ""


def _figure(svg: str, caption: str) -> str:
    return f"<figure>{svg}<figcaption>{html.escape(caption)}</figcaption></figure>" if svg else ""


def _details_section(report: Report) -> str:
    return "<h2>Settings and identities</h2>" + "\n".join(_details(run) for run in report.runs)


def _details(run: Run) -> str:
    parts = [f"<p class=note>{html.escape(str(run.path))}</p>"]
    if run.metrics is not None:
        parts.append(_reasons("Test videos that could not be read, counted as wrong", run.metrics["failed"]))
        parts.append(_reasons("Test videos that were tested although damaged", run.metrics["damaged"]))
        parts.append(f"<div class=scroll>{_class_table(run.metrics['per_class']).to_html()}</div>")
        parts.append(_block("Test protocol", _yaml(run.metrics["protocol"])))
    if run.predictions is not None:
        parts.append(_block("Identity of what was tested", _yaml(run.predictions.identity)))
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
    columns = [Column("class"), Column("right", True), Column("test videos", True), Column("top 1, %", True)]
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
