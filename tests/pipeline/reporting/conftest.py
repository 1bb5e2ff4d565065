"""Open pages in a real browser; tests that do so are skipped without one."""

from __future__ import annotations

import re
import shutil
import subprocess
from collections.abc import Callable
from dataclasses import dataclass, fields
from pathlib import Path

import pytest

# Runs in the page: counts the pictures and links, and measures what exceeds the window.
PROBE = """<script>addEventListener("load", async () => {
const shown = (href) => new Promise((done) => {
  const image = new Image();
  image.onload = () => done(image.naturalWidth > 0); image.onerror = () => done(false);
  image.src = href; });
const inner = [...document.querySelectorAll("svg image")].map(i => i.getAttribute("href"));
const pictures = [...document.images].map(i => i.src).concat(inner);
const loaded = (await Promise.all(pictures.map(shown))).filter(Boolean).length;
const uses = [...document.querySelectorAll("use")].map(u => u.getAttribute("href"));
const links = [...document.querySelectorAll('a[href^="#"]')].map(a => a.getAttribute("href"));
const dangling = uses.concat(links).filter(to => !document.getElementById(to.slice(1))).length;
const requests = performance.getEntriesByType("resource").filter(r => !r.name.startsWith("data:"));
const wide = document.documentElement.scrollWidth - innerWidth;
parent.postMessage({images: pictures.length, loaded, uses: uses.length, dangling, wide,
  width: innerWidth, requests: requests.length}, "*");
});</script>"""
# A window is at least 500 pixels wide; a frame can have any width.
FRAME = """<!doctype html><title>probe</title><body style="margin:0"><script>
addEventListener("message", (event) => Object.assign(document.body.dataset, event.data));
</script><iframe src="{page}" style="width:{width}px;height:900px;border:0"></iframe></body>"""


@dataclass(frozen=True)
class Opened:
    """The state of a page in a browser.

    Attributes:
        console: Messages of the browser about the page.
        width: Width of the window.
        images: Number of pictures.
        loaded: Number of pictures that could be decoded.
        uses: Number of references to pictures elsewhere on the page.
        dangling: Number of references and links inside the page without a target.
        wide: Pixels by which the page exceeds the window on the right.
        requests: Number of requests to the network.
    """

    console: list[str]
    width: int
    images: int
    loaded: int
    uses: int
    dangling: int
    wide: int
    requests: int

    def holds(self) -> bool:
        """Check that nothing is missing, too wide, fetched or reported by the browser."""
        assert self.console == []
        assert self.images == self.loaded
        assert self.dangling == self.requests == 0
        assert self.wide <= 0
        return True


@pytest.fixture
def open_page(tmp_path: Path) -> Callable[..., Opened]:
    """Open a copy of a page with a probe in it, without network."""
    chromium = shutil.which("chromium") or shutil.which("chromium-browser")
    if chromium is None:
        pytest.skip("no chromium on the PATH: the page is not opened in a browser")

    def open_in_browser(page: Path, width: int = 1100) -> Opened:
        copy, frame = tmp_path / "probed.html", tmp_path / "frame.html"
        text = page.read_text(encoding="utf-8").replace("</body>", PROBE + "</body>")
        copy.write_text(text, encoding="utf-8")
        frame.write_text(FRAME.format(page=copy.as_uri(), width=width), encoding="utf-8")
        options = ["--headless=new", "--no-sandbox", "--disable-gpu", "--enable-logging=stderr"]
        options += [
            "--host-resolver-rules=MAP * ~NOTFOUND",
            f"--user-data-dir={tmp_path / 'profile'}",
            "--virtual-time-budget=20000",
            f"--window-size={max(width, 500)},1000",
        ]
        command = [chromium, *options, "--dump-dom", frame.as_uri()]
        process = subprocess.run(command, capture_output=True, text=True, timeout=300)
        assert process.returncode == 0, process.stderr
        names = [field.name for field in fields(Opened) if field.name != "console"]
        counts = {key: int(n) for key, n in re.findall(r'data-(\w+)="(-?\d+)"', process.stdout)}
        # The other messages of the browser concern the machine (no D-Bus, no GPU).
        console = [line for line in process.stderr.splitlines() if "CONSOLE" in line]
        return Opened(console, **{name: counts[name] for name in names})

    return open_in_browser
