"""The macros of the pages: escaped values, tables with links, charts as well-formed SVG."""

from __future__ import annotations

import re
from xml.etree import ElementTree

import numpy as np
import pytest

from distinit.pipeline.common.tables import Column, Table
from distinit.pipeline.reporting.charts import Chart, Line, entropy_curves, entropy_histogram
from distinit.pipeline.reporting.html_page import _ENVIRONMENT, as_yaml

SVG = "{http://www.w3.org/2000/svg}"


def macro(name: str, *values: object) -> str:
    return str(getattr(_ENVIRONMENT.get_template("macros.html.j2").module, name)(*values))


def test_cells_titles_and_notes_of_a_table_are_escaped() -> None:
    table = Table("t & u", [Column("na<me"), Column("n, %", True)], notes=["a < b"])
    table.add("<i>|x", "1,5")
    table.head("<b>below</b>")
    table.add("linked", "2")
    page = macro("table", table, {"linked": '#a"b', "1,5": "#never"})
    assert '<td class="number">1,5</td>' in page
    assert "<td>&lt;i&gt;|x</td>" in page
    assert '<td><a href="#a&#34;b">linked</a></td>' in page
    assert "#never" not in page
    assert "n, %</th>" in page
    assert page.index("&lt;b&gt;below") < page.index("linked</a>")
    tags = set(re.findall(r"<(\w+)", page))
    assert tags == {"div", "table", "caption", "span", "thead", "tr", "th", "tbody", "td", "a", "p"}


@pytest.mark.parametrize("legend", [True, False])
def test_a_chart_is_well_formed_and_names_its_curves(legend: bool) -> None:
    x = np.arange(5.0)
    lines = [Line("<a>", x, x), Line("dot", x[:1], x[:1])]
    svg = drawn(entropy_curves(lines, 4.0, legend=legend))
    texts = [text.text for text in svg.iter(f"{SVG}text")]
    assert ("<a>" in texts) == ("dot" in texts) == legend
    assert "entropy, nats" in texts
    assert len(list(svg.iter(f"{SVG}polyline"))) == 2
    assert len(list(svg.iter(f"{SVG}circle"))) == 1, "the curve with a single point"


def test_a_histogram_is_drawn_and_no_chart_is_nothing() -> None:
    svg = drawn(entropy_histogram(np.array([1, 2]), np.arange(3.0)))
    assert len(list(svg.iter(f"{SVG}rect"))) == 2
    assert macro("chart", None).strip() == ""


def test_yaml_keeps_what_is_no_plain_data_as_text() -> None:
    assert as_yaml({"b": 1, "a": {2: object}}) == "b: 1\na:\n  '2': <class 'object'>\n"


def drawn(chart: Chart | None) -> ElementTree.Element:
    """Return the parsed SVG of a chart."""
    svg = re.search(r"<svg.*</svg>", macro("chart", chart), re.S)
    assert svg is not None
    return ElementTree.fromstring(svg[0])
