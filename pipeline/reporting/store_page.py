"""The look into a store as one HTML page: pictures inline, charts as SVG, nothing fetched, no
script."""

from __future__ import annotations

import html
import json
import math
from collections import Counter
from collections.abc import Sequence

import numpy as np

from ..common.tables import Column, Table
from .charts import Bars, Line, bar_chart, line_chart
from .html_page import document
from .store_summary import Picture, StoreSummary, TeacherSummary, VideoSummary

FREQUENT = 10  # classes of the table of frequencies
LISTED = 1000  # failures
STYLE = """<style>
.strip { display: grid; grid-template-columns: repeat(8, minmax(0, 1fr)); gap: .6rem; margin: .5rem 0; }
@media screen and (max-width: 50rem) { .strip { grid-template-columns: repeat(4, minmax(0, 1fr)); } }
.shot { font-size: .74rem; line-height: 1.3; break-inside: avoid; }
.shot img { width: 100%; height: 4.8rem; object-fit: contain; background: #e9ebed; border-radius: 3px; display: block; }
.gone { height: 4.8rem; box-sizing: border-box; border: 1px dashed #999; border-radius: 3px; display: flex;
  align-items: center; justify-content: center; text-align: center; color: var(--soft); padding: 0 .3rem;
  overflow: hidden; }
.shot .when { color: var(--soft); font-variant-numeric: tabular-nums; }
.shot .says { display: flex; justify-content: space-between; gap: .3rem; }
.says span:first-child { overflow: hidden; text-overflow: ellipsis; white-space: nowrap; }
.says span + span { white-space: nowrap; font-variant-numeric: tabular-nums; }
.shot .who { font-weight: 600; margin-top: .2rem; }
.video { break-inside: avoid; margin: 1.4rem 0; }
.video h3 { font-size: 1rem; margin: 0; overflow-wrap: anywhere; }
.pair { display: flex; flex-wrap: wrap; gap: 0 2.5rem; align-items: flex-start; }
.pair figure { flex: 1 1 26rem; min-width: 0; max-width: 40rem; }
.problem { color: #a33d00; }
@media print { .strip { gap: .3rem; } .strip .shot { font-size: 6.5pt; } .strip .when span { display: none; }
  .shot img { height: auto; max-height: 4.8rem; outline: 1px solid var(--rule); outline-offset: -1px; }
  .pair { break-inside: avoid; } .video { margin: .8rem 0; } .video .note { margin: 0; } }
</style>"""


def store_page(summary: StoreSummary, version: str) -> str:
    """The whole page as HTML."""
    store = summary.store
    states = ", ".join(f"{n:,} {name}" for name, n in summary.states.items() if n)
    names = ", ".join(
        f"{html.escape(t.teacher_stats.teacher)} ({len(t.teacher_stats.classes):,} classes)"
        for t in summary.teachers
    )
    lead = (
        f"{html.escape(store.name)}: {store.n_videos:,} videos ({states or 'none'}), {store.n_rows:,} cached frames, "
        f"{store.sampling.describe()}; teachers: {names or 'none'}. distinit {html.escape(version)}. Entropies are in "
        "nats, of the softmax at τ = 1: 0 where a teacher is sure, ln K where it cannot tell its K classes apart."
    )
    sections = [
        STYLE,
        _videos_section(summary),
        *(_teacher_section(teacher) for teacher in summary.teachers),
        _failures_section(summary),
        _identity_section(summary),
    ]
    return document("A look into the store", lead, sections)


def _videos_section(summary: StoreSummary) -> str:
    if not summary.videos:
        return "<h2>Sampled videos</h2><p>None: no video with cached frames was asked for, or the store has none.</p>"
    missing = sum(video.problem is not None for video in summary.videos)
    # One scale for all videos, so that their curves compare.
    limit = max(
        (math.log(len(teacher.teacher_stats.classes)) for teacher in summary.teachers), default=1.0
    )
    note = (
        f" {missing} of them cannot be read here and are shown without pictures." if missing else ""
    )
    return (
        f"<h2>Sampled videos</h2><p>{len(summary.videos)} random videos with cached frames.{note} Under a picture: its "
        "time, each teacher’s best classes with their probabilities, and the entropy H. The curve shows how sure each "
        "teacher is over the whole video; where it jumps, there is usually a cut or a new thing in view.</p>"
        + "".join(
            _video(video, limit, legend=len(summary.teachers) > 1) for video in summary.videos
        )
    )


def _video(video: VideoSummary, limit: float, *, legend: bool) -> str:
    lines = [Line(name, seconds, nats) for name, (seconds, nats) in video.curves.items()]
    chart = line_chart(
        lines,
        x_label="seconds",
        y_label="entropy, nats",
        width=1040,
        height=160,
        y_range=(0.0, limit),
        legend=legend,
    )
    length = f"{video.duration:.1f} s, " if np.isfinite(video.duration) else ""
    problem = (
        f"<p class=problem>missing here: {html.escape(video.problem)}</p>" if video.problem else ""
    )
    return (
        f"<div class=video><h3>{html.escape(video.corpus)}: {html.escape(video.path)}</h3>"
        f"<p class=note>{length}{video.frames:,} cached frames</p>{problem}"
        f"{_strip(video.pictures)}<div class=scroll>{chart}</div></div>"
    )


def _strip(pictures: Sequence[Picture], *, named: bool = False) -> str:
    return "<div class=strip>" + "".join(_shot(picture, named) for picture in pictures) + "</div>"


def _shot(picture: Picture, named: bool) -> str:
    when = f"{picture.seconds:.2f} s, frame {picture.index}"
    path = picture.video
    if picture.jpeg is None:
        # The strip of a video says once, above it, why it is missing; pictures of many videos each
        # say it.
        shown = (
            f"<div class=gone>{html.escape(picture.problem or '') if named else 'missing'}</div>"
        )
    else:
        shown = f'<img src="{picture.jpeg}" alt="{html.escape(f"{path}, {when}")}">'
    several = len(picture.predictions) > 1
    words = []
    for teacher, prediction in picture.predictions.items():
        head = html.escape(teacher) if several else ""
        words.append(
            f"<div class='says who'><span>{head}</span><span>H {prediction.entropy:.2f}</span></div>"
        )
        for label, share in prediction.labels:
            name = html.escape(label)
            words.append(
                f'<div class=says><span title="{name}">{name}</span><span>{100 * share:.0f} %</span></div>'
            )
    name = (
        f'<div class=says><span title="{html.escape(path)}">{html.escape(_tail(path))}</span></div>'
        if named
        else ""
    )
    time = f"<div class=when>{picture.seconds:.2f} s<span>, frame\u00a0{picture.index}</span></div>"
    return f"<div class=shot>{shown}{time}{name}{''.join(words)}</div>"


def _teacher_section(teacher: TeacherSummary) -> str:
    found = teacher.teacher_stats
    if not len(found.rows):
        return f"<h2>{html.escape(found.teacher)}</h2><p>No cached frame yet.</p>"
    counts, edges = found.histogram()
    quantiles = found.quantiles()
    chart = bar_chart(Bars(edges, counts), x_label="entropy, nats", y_label="frames")
    part = (
        ""
        if len(found.rows) == found.total
        else f" of {len(found.rows):,} frames spread over the store,"
    )
    frequent = Table(
        "Most frequent best class", [Column("class"), Column("share of frames, %", True)]
    )
    for label, share in found.most_frequent(FREQUENT):
        frequent.add(label, f"{100 * share:.1f}")
    distinct = len(np.unique(found.top))
    frequent.notes = [
        f"{distinct:,} of {len(found.classes):,} classes are the best one of some frame."
    ]
    caption = (
        f"How sure the teacher is: entropies{part} from 0 to ln {len(found.classes):,} = {edges[-1]:.2f} nats. Median "
        f"{quantiles[0.5]:.2f}; 5 to 95 %: {quantiles[0.05]:.2f} to {quantiles[0.95]:.2f}. A filter max_entropy keeps "
        "what lies to its left."
    )
    return (
        f"<h2>{html.escape(found.teacher)}</h2>"
        f"<div class=pair><figure><div class=scroll>{chart}</div><figcaption>{caption}</figcaption></figure>"
        f"<div class=scroll>{frequent.to_html()}</div></div>"
        f"<h3>Most confident frames</h3><p class=note>Lowest entropy, at most one frame of a video.</p>"
        f"{_strip(teacher.lowest_entropy, named=True)}"
        f"<h3>Least confident frames</h3><p class=note>Highest entropy, at most one frame of a video.</p>"
        f"{_strip(teacher.highest_entropy, named=True)}"
    )


def _failures_section(summary: StoreSummary) -> str:
    if not summary.failures:
        return "<h2>Failures</h2><p>No video failed.</p>"
    reasons = Table("Reasons", [Column("reason"), Column("videos", True)])
    for reason, count in Counter(failure.reason for failure in summary.failures).most_common(20):
        reasons.add(reason, f"{count:,}")
    each = Table("Videos that failed", [Column("corpus"), Column("video"), Column("reason")])
    for failure in summary.failures[:LISTED]:
        each.add(failure.corpus, failure.path, failure.reason)
    if len(summary.failures) > LISTED:
        each.notes = [
            f"{len(summary.failures) - LISTED:,} more: distinit targets info STORE --failed --json lists all."
        ]
    return (
        f"<h2>Failures</h2><div class=scroll>{reasons.to_html()}</div>"
        f"<details><summary>Every video that failed</summary><div class=scroll>{each.to_html()}</div></details>"
    )


def _identity_section(summary: StoreSummary) -> str:
    text = json.dumps(summary.store.identity(), indent=1, ensure_ascii=False)
    return (
        "<h2>Identity</h2><details><summary>The store’s id, sampling and teachers</summary>"
        f"<pre>{html.escape(text)}</pre></details>"
    )


def _tail(path: str) -> str:
    return path.rsplit("/", 1)[-1]
