"""For the tests of pages: a page opened in a real browser, skipped where there is none."""

from __future__ import annotations

import re
import shutil
import subprocess
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest

# Counted in the browser: what has come and has a size.
PROBE = """<script>addEventListener("load", () => {
const images = [...document.images];
document.body.dataset.images = images.length;
document.body.dataset.loaded = images.filter(i => i.complete && i.naturalWidth > 0).length;
document.body.dataset.wide = document.documentElement.scrollWidth - innerWidth;
});</script>"""


@dataclass(frozen=True)
class Opened:
    """console: what the browser had to say. images: on the page, and loaded: those shown. wide:
    pixels that stick out to the right of the window."""

    console: list[str]
    images: int
    loaded: int
    wide: int


@pytest.fixture
def open_page(tmp_path: Path) -> Callable[[Path], Opened]:
    """Opens a copy of a page with a probe in it, without network."""
    chromium = shutil.which("chromium") or shutil.which("chromium-browser")
    if chromium is None:
        pytest.skip("no chromium on the PATH")

    def opened(page: Path, width: int = 1100) -> Opened:
        copy = tmp_path / "probed.html"
        copy.write_text(
            page.read_text(encoding="utf-8").replace("</body>", PROBE + "</body>"), encoding="utf-8"
        )
        options = ["--headless", "--no-sandbox", "--disable-gpu", "--enable-logging=stderr"]
        options += [
            "--host-resolver-rules=MAP * ~NOTFOUND",
            f"--user-data-dir={tmp_path / 'profile'}",
        ]
        command = [chromium, *options, f"--window-size={width},900", "--dump-dom", copy.as_uri()]
        shown = subprocess.run(command, capture_output=True, text=True, timeout=300)
        assert shown.returncode == 0, shown.stderr
        found = {
            key: int(n)
            for key, n in re.findall(r'data-(images|loaded|wide)="(-?\d+)"', shown.stdout)
        }
        # Of what the browser logs, the page's part; the rest is of the machine it runs on (no
        # D-Bus, no GPU).
        return Opened([line for line in shown.stderr.splitlines() if "CONSOLE" in line], **found)

    return opened
