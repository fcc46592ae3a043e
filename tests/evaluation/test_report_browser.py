"""The report as a browser shows it: on a light screen and a dark one, on a phone, on paper."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

from kvprune.evaluation.report import write_report
from kvprune.evaluation.report.palette import GROUND, PAPER

from ..support.made_up_results import made_up

BROWSERS = ("chromium", "chromium-browser", "google-chrome", "chrome")
FOUND = next((path for name in BROWSERS if (path := shutil.which(name))), None)

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        FOUND is None,
        reason="expected a Chromium to look at the report with, none was found: "
        "apt-get install chromium",
    ),
]

PHONE = 375
# Asks the page, from inside a frame as wide as a phone, how wide it is, and how wide its tables.
FRAME = """<body style="margin:0">
<iframe id="f" src="report.html" style="width:{width}px;height:800px;border:0"></iframe>
<p id="found"></p><script>
document.getElementById("f").onload = e => {{
  const page = e.target.contentDocument, wide = [...page.querySelectorAll(".scroll")];
  document.getElementById("found").textContent = [page.documentElement.scrollWidth,
    wide.filter(t => t.scrollWidth > t.clientWidth).length, wide.length,
    [...page.querySelectorAll("figure svg")].every(s => s.getBoundingClientRect().height > 90),
    [...page.querySelectorAll("svg text")].every(t => !t.textContent ||
      t.getBoundingClientRect().right <= t.ownerSVGElement.getBoundingClientRect().right)].join();
}};</script>"""


def browse(folder: Path, *options: str, page: str = "report.html") -> str:
    """What Chromium prints."""
    command = [str(FOUND), "--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars",
               "--disable-dev-shm-usage", f"--user-data-dir={folder / 'profile'}",
               *options, (folder / page).as_uri()]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A report with all its parts."""
    path = tmp_path_factory.mktemp("report")
    write_report(made_up(samples=4), path)
    return path


def picture(folder: Path, *options: str, page: str = "report.html") -> NDArray[np.uint8]:
    """A screenshot, `[height, width, 3]`."""
    from matplotlib.image import imread

    out = folder / "screen.png"
    out.unlink(missing_ok=True)
    browse(folder, f"--screenshot={out}", "--window-size=1280,2400", *options, page=page)
    return np.rint(255 * imread(out)[..., :3]).astype(np.uint8)


def test_a_page_on_a_light_screen_and_on_a_dark_one(folder):
    """The ground follows, figures with it: on both there is as much ink."""
    light = picture(folder)
    dark = picture(folder, "--blink-settings=preferredColorScheme=0")
    assert tuple(light[2, 2]) == (255, 255, 255)
    assert "#{:02x}{:02x}{:02x}".format(*dark[2, 2]) == GROUND[PAPER]
    ink = [(np.abs(p.astype(int) - p[2, 2]).sum(-1) > 200).mean() for p in (light, dark)]
    assert ink[0] > 0.01 and ink[1] == pytest.approx(ink[0], rel=0.5)
    # In the dark nothing is left of the paper but rounded letters.
    assert (dark.min(-1) > 250).mean() < 0.002


@pytest.mark.parametrize("name", ["quality-bytes-1-needle-1024", "kept-1-h2o-heavy-0-1-recent-0-1"])
def test_a_figure_by_itself_follows_as_well(folder, name):
    """Opened as a file."""
    page = f"plots/{name}.svg"
    light = picture(folder, page=page)
    dark = picture(folder, "--blink-settings=preferredColorScheme=0", page=page)
    assert light[2, 2].min() == 255 and dark[2, 2].max() < 30
    # Words in ink, and in what takes its place.
    assert (light.max(-1) < 120).sum() > 300 and (dark.min(-1) > 140).sum() > 300


def test_a_phone_scrolls_tables_and_never_the_page(folder):
    """At 375 pixels; figures fit in whole, with their text."""
    (folder / "phone.html").write_text(FRAME.format(width=PHONE))
    shown = browse(folder, "--dump-dom", "--allow-file-access-from-files",
                   "--virtual-time-budget=5000", page="phone.html")  # fmt: skip
    found = re.search(r'id="found">(\d+),(\d+),(\d+),(\w+),(\w+)<', shown)
    assert found is not None, shown[-500:]
    assert int(found[1]) == PHONE
    assert 7 <= int(found[2]) <= int(found[3])
    assert found[4] == found[5] == "true"


def test_it_prints(folder):
    """On several pages of A4, lying."""
    out = folder / "report.pdf"
    browse(folder, f"--print-to-pdf={out}", "--no-pdf-header-footer")
    pdf = out.read_bytes()
    assert pdf.startswith(b"%PDF")
    boxes = re.findall(rb"/MediaBox \[0 0 ([\d.]+) ([\d.]+)\]", pdf)
    assert 5 < len(boxes) < 40
    assert all(abs(float(w) - 842) < 2 and abs(float(h) - 595) < 2 for w, h in boxes)
