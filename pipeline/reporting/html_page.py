"""What all pages share: one style for screen and print, and the document around their sections."""

from __future__ import annotations

import html
import re
from collections.abc import Iterable

from ..common.streams import printable

STYLE = """
:root { --ink: #1a1a1a; --soft: #5c5c5c; --rule: #d9d9d9; --band: #f6f7f8; }
body { font: 16px/1.5 system-ui, "Segoe UI", Roboto, "Helvetica Neue", Arial, sans-serif; color: var(--ink);
  background: #fff; margin: 0 auto; padding: 2rem 1.25rem 4rem; max-width: 78rem; }
h1 { font-size: 1.7rem; line-height: 1.2; margin: 0 0 .3rem; }
h2 { font-size: 1.2rem; margin: 2.4rem 0 .6rem; padding-top: .6rem; border-top: 1px solid var(--rule); }
p { margin: .4rem 0; max-width: 48rem; }
.lead, .note, figcaption { color: var(--soft); }
.note, figcaption { font-size: .88rem; }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; margin: .6rem 0; font-size: .92rem; }
caption { text-align: left; font-weight: 600; padding: .2rem 0 .4rem; }
th, td { padding: .32rem .8rem .32rem 0; text-align: left; vertical-align: top; }
thead th { border-bottom: 2px solid var(--ink); font-weight: 600; white-space: nowrap; vertical-align: bottom; }
tr.heading th { padding-top: 1rem; border-bottom: 1px solid var(--ink); font-weight: 600; }
tbody td { border-bottom: 1px solid var(--rule); overflow-wrap: break-word; }
td:first-child:not(.number) { min-width: 8rem; }
.number { text-align: right; font-variant-numeric: tabular-nums; white-space: nowrap; }
ul.findings { padding-left: 1.2rem; max-width: 48rem; }
ul.findings li { margin: .4rem 0; }
figure { margin: 1rem 0 1.8rem; }
figure img { max-width: 100%; height: auto; display: block; }
figcaption { max-width: 48rem; margin-top: .35rem; }
figcaption b { color: var(--ink); }
a { color: #00598f; text-decoration-thickness: 1px; text-underline-offset: 2px; }
:target { background: #fff3cf; }
svg { max-width: 100%; height: auto; display: block; font: 12px system-ui, Arial, sans-serif; }
svg text { fill: var(--ink); }
svg .grid { stroke: var(--rule); stroke-width: 1; }
details { margin: .5rem 0; border: 1px solid var(--rule); border-radius: 4px; padding: .4rem .8rem; }
summary { cursor: pointer; font-weight: 600; }
details h3 { font-size: .95rem; margin: .9rem 0 .2rem; }
pre { background: var(--band); padding: .7rem; overflow-x: auto; font-size: .8rem; line-height: 1.4; }
@media screen and (max-width: 40rem) { figure > .scroll > img { max-width: 38rem; }
  .scroll > svg { max-width: none; width: 38rem; }
  .scroll tr > :first-child { position: sticky; left: 0; background: #fff; } }
@media print { body { max-width: none; padding: 0; font-size: 10pt; } a { color: inherit; text-decoration: none; }
  .files { display: none; } figure, tr, details { break-inside: avoid; } h2, h3, caption, thead { break-after: avoid; }
  .scroll { overflow: visible; } thead { display: table-header-group; } tr.heading { break-after: avoid; }
  table, .note, figcaption { font-size: 8.5pt; } th, td { padding-right: .5rem; }
  details:not([open]) { border: 0; padding: 0; margin: 0; } details:not([open]) > summary { font-weight: 400; } }
"""


def document(title: str, lead: str, sections: Iterable[str]) -> str:
    """A whole page that needs nothing but itself. `title` is text; `lead` and `sections` are
    HTML."""
    page = (
        "<!doctype html>\n<html lang=en><head><meta charset=utf-8><meta name=generator content=distinit>"
        '<meta name=viewport content="width=device-width, initial-scale=1">'
        f"<title>{html.escape(title)}</title><style>{STYLE}</style></head><body>\n"
        f"<h1>{html.escape(title)}</h1><p class=lead>{lead}</p>\n"
        + "\n".join(section for section in sections if section)
        + "\n</body></html>\n"
    )
    return printable(
        re.sub(r"(?<=\d) %", "\u00a0%", page), lines=True
    )  # a line never begins with %
