"""No page of the site is wider than its window.

Chromium opens each page in a frame, as wide as a desk's screen and as a telephone, and says what is
wider than it. Code and tables may be: they scroll by themselves.
"""

from __future__ import annotations

import functools
import http.server
import json
import re
import subprocess
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from .evaluation.test_report_browser import FOUND, pytestmark
from .test_site import ROOT, build

__all__ = ["pytestmark"]

WIDTHS = {"wide": 1280, "telephone": 390}
SECONDS = 180

HARNESS = """<!doctype html><meta charset="utf-8"><body><pre id="told"></pre><script>
const pages = PAGES, width = WIDTH, told = [];
document.documentElement.className = matchMedia("(prefers-color-scheme: dark)").matches;
function wider(frame) {
  const page = frame.contentDocument, root = page.documentElement;
  if (root.scrollWidth <= width) return [];
  const out = [];
  for (const one of page.querySelectorAll("body *")) {
    if (one.getBoundingClientRect().right > width + 1) out.push(one.tagName + "." + one.className);
  }
  return [root.scrollWidth, ...out.slice(0, 3)];
}
function next() {
  if (!pages.length) { document.title = "done"; return; }
  const page = pages.shift(), frame = document.createElement("iframe");
  frame.style = `width:${width}px;height:900px;border:0`;
  frame.onload = () => setTimeout(() => {
    const found = wider(frame);
    told.push([page, frame.contentDocument.body.innerText.length, found]);
    document.getElementById("told").textContent = JSON.stringify(told);
    frame.remove();
    next();
  }, 150);
  frame.src = page;
  document.body.append(frame);
}
next();
</script>"""


class Quiet(http.server.SimpleHTTPRequestHandler):
    """Serves files, and says nothing."""

    def log_message(self, *args: object) -> None: ...


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The site, with the pages that kvprune has written and that are published with it."""
    folder = tmp_path_factory.mktemp("site")
    assert build(ROOT, folder).returncode == 0
    return folder


@pytest.fixture(scope="module")
def address(site: Path) -> Iterator[str]:
    """Where it is served."""
    handler = functools.partial(Quiet, directory=str(site))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
@pytest.mark.parametrize("width", WIDTHS.values(), ids=WIDTHS)
def test_nothing_is_wider_than_its_window(site, address, width, dark, tmp_path):
    """On any page."""
    pages = [str(page.relative_to(site)) for page in sorted(site.rglob("*.html"))]
    pages = [page for page in pages if not page.startswith("harness")]
    text = HARNESS.replace("PAGES", json.dumps(pages)).replace("WIDTH", str(width))
    (site / "harness.html").write_text(text)
    command = [str(FOUND), "--headless", "--no-sandbox", "--disable-gpu", "--dump-dom"]
    command += [f"--user-data-dir={tmp_path}", f"--virtual-time-budget={len(pages) * 2000}"]
    command += [f"--window-size={width + 40},1000"]
    command += ["--blink-settings=preferredColorScheme=0"] if dark else []
    done = subprocess.run(
        [*command, f"{address}/harness.html"], capture_output=True, text=True, timeout=SECONDS
    )
    found = re.search(r'<pre id="told">(.*?)</pre>', done.stdout, re.DOTALL)
    assert found and "<title>done</title>" in done.stdout, done.stderr[-2000:]
    assert f'<html class="{str(dark).lower()}">' in done.stdout
    told = json.loads(found[1].replace("&lt;", "<").replace("&gt;", ">").replace("&amp;", "&"))
    assert [page for page, *_ in told] == pages
    assert all(length > 40 for _, length, _ in told)
    assert {page: wider for page, _, wider in told if wider} == {}
