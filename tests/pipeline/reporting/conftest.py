"""For the tests of pages: a page opened in a real browser, skipped where there is none."""

from __future__ import annotations

import re
import shutil
import subprocess
from collections.abc import Callable
from dataclasses import dataclass, fields
from pathlib import Path

import pytest

# Run in the page: what has come and has a size, and what does not fit into the window.
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
# A window is at least 500 pixels wide; a frame has any width.
FRAME = """<!doctype html><title>probe</title><body style="margin:0"><script>
addEventListener("message", (event) => Object.assign(document.body.dataset, event.data));
</script><iframe src="{page}" style="width:{width}px;height:900px;border:0"></iframe></body>"""


@dataclass(frozen=True)
class Opened:
    """What a browser found.

    Attributes:
        console: Its messages about the page.
        width: Width of the window.
        images: Pictures of the page.
        loaded: Those that could be decoded.
        uses: Places that show a picture that is elsewhere on the page.
        dangling: Such places, and links inside of the page, that lead nowhere.
        wide: Pixels that stick out to the right of the window.
        requests: Anything that was fetched.
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
        """Whether nothing is missing, sticks out, is fetched or complained about."""
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

    def opened(page: Path, width: int = 1100) -> Opened:
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
        shown = subprocess.run(command, capture_output=True, text=True, timeout=300)
        assert shown.returncode == 0, shown.stderr
        names = [field.name for field in fields(Opened) if field.name != "console"]
        found = {key: int(n) for key, n in re.findall(r'data-(\w+)="(-?\d+)"', shown.stdout)}
        # Of what the browser logs, the page's part; the rest is of the machine it runs on (no
        # D-Bus, no GPU).
        console = [line for line in shown.stderr.splitlines() if "CONSOLE" in line]
        return Opened(console, **{name: found[name] for name in names})

    return opened
