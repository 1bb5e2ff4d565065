"""HTML pages from the templates in templates/: one file each, without network or scripts.

Every value is escaped for HTML. Names of classes, videos and runs may come from other people, so
that control characters of terminals and of text direction are escaped as well.
"""

from __future__ import annotations

import base64
import io
import json
import math
import re
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup
from numpy.typing import NDArray
from PIL import Image

from ..common.streams import printable


def render(template: str, **values: Any) -> str:
    """Return the page of a template."""
    page = _ENVIRONMENT.get_template(template).render(values)
    # Keep a per cent sign on the line of its number.
    return printable(re.sub(r"(?<=\d) %", "\u00a0%", page), lines=True)


def jpeg_url(image: NDArray[np.uint8], quality: int) -> str:
    """Encode RGB uint8 [h, w, 3] as the data URL of a JPEG."""
    out = io.BytesIO()
    Image.fromarray(image).save(out, "JPEG", quality=quality, optimize=True)
    return "data:image/jpeg;base64," + base64.b64encode(out.getvalue()).decode()


def as_yaml(values: Any) -> str:
    """Return values as readable YAML; objects that are not plain data become text."""
    plain = json.loads(json.dumps(values, default=str))
    return yaml.safe_dump(plain, sort_keys=False, allow_unicode=True, width=100)


def headings(body: str) -> list[tuple[str, Markup]]:
    """Return anchor and title of each section of a rendered page, for its table of contents."""
    sections = re.findall(r'<h2 id="([^"]+)">(.*?)</h2>', body, re.S)
    return [(anchor, Markup(title)) for anchor, title in sections]


_ENVIRONMENT = Environment(
    loader=FileSystemLoader(Path(__file__).parent / "templates"),
    autoescape=True,
    undefined=StrictUndefined,
    trim_blocks=True,
    lstrip_blocks=True,
)
_ENVIRONMENT.filters["base64"] = lambda content: base64.b64encode(content).decode()
_ENVIRONMENT.filters["thousands"] = "{:,}".format
_ENVIRONMENT.filters["headings"] = headings
_ENVIRONMENT.filters["yaml"] = as_yaml
_ENVIRONMENT.tests["finite"] = math.isfinite
