"""The documentation builds as a site, without a warning and without a network."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
SOURCES = (
    "mkdocs.yml",
    "docs",
    "kvprune",
    "policies",
    "README.md",
    "CONTRIBUTING.md",
    "CHANGELOG.md",
)
ADDRESS = re.compile(r"^(https?:)?//")
# Never asked for by these pages: for repositories on GitHub, diagrams, and old browsers.
UNUSED = {
    "https://api.github.com/repos/",
    "https://api.github.com/users/",
    "https://unpkg.com/mermaid",
    "https://unpkg.com/resize-observer-polyfill",
    "https://clipboardjs.com/",  # in a comment
}


class Fetched(HTMLParser):
    """What a browser loads for a page without being asked to: all but what one clicks on."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.found: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        names = ("src", "srcset", "data", "poster") + (("href",) if tag != "a" else ())
        self.found += [value for name, value in attrs if name in names and value]


def build(source: Path, site: Path) -> subprocess.CompletedProcess[str]:
    """As `make docs` does. (Not quietly: mkdocs counts the warnings that it prints.)"""
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(site)]
    return subprocess.run(command, cwd=source, capture_output=True, text=True, check=False)


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("site")
    done = build(ROOT, folder)
    assert done.returncode == 0, done.stdout + done.stderr
    return folder


def pages(site: Path) -> Iterator[tuple[str, str]]:
    for page in sorted(site.rglob("*.html")):
        yield str(page.relative_to(site)), page.read_text()


def test_every_document_is_a_page(site: Path) -> None:
    """README, CONTRIBUTING and the model card as well."""
    built = {name for name, _ in pages(site)}
    documents = (ROOT / "docs").rglob("*.md")
    expected = {str(d.relative_to(ROOT / "docs").with_suffix(".html")) for d in documents}
    reports = {str(r.relative_to(ROOT / "docs")) for r in (ROOT / "docs").rglob("*.html")}
    others = {"index.html", "contributing.html", "changes.html", "sdtp-heads.html", "404.html"}
    assert built == expected | reports | others


def test_nothing_is_fetched_from_elsewhere(site: Path) -> None:
    """No font, script, style or picture of another host."""
    for name, text in pages(site):
        # A report of a comparison needs nothing but itself.
        assert Fetched(text).found or name.endswith("/report.html"), name
        assert [f for f in Fetched(text).found if ADDRESS.match(f)] == [], name
    for style in site.rglob("*.css"):
        assert not re.search(r"(url\(|@import)\s*['\"]?(https?:)?//", style.read_text()), style
    for script in (site / "assets" / "javascripts").glob("bundle.*.js"):
        assert set(re.findall(r"https?://[\w./-]+", script.read_text())) <= UNUSED
    assert not re.search(r'class="mermaid|api.github', "".join(text for _, text in pages(site)))


def test_the_pages_hold_what_is_not_written_in_them(site: Path) -> None:
    """Formulas as MathML, policies' arguments from their docstrings, links as on the site."""
    h2o = (site / "policies" / "h2o.html").read_text()
    assert "<math" in h2o and "how many heavy hitters" in h2o and "two variants" in h2o
    front = (site / "index.html").read_text()
    assert 'href="holds.html"' in front and ".md" not in re.findall(r'href="[^"]*', front)
    assert 'src="h2o.svg"' in h2o and (site / "policies" / "h2o.svg").exists()
    assert "ComposedCache" in (site / "search" / "search_index.json").read_text()


def test_pictures_are_for_light_and_dark(site: Path) -> None:
    drawn = [p for p in (ROOT / "docs").rglob("*.svg") if p.name != "streams.svg"]
    assert len(drawn) >= 6
    for picture in drawn:
        assert "(prefers-color-scheme: dark)" in picture.read_text(), picture


BROKEN = {
    "a link to nowhere": "[there](nowhere.md)",
    "a link to no heading": "[there](holds.md#nothing)",
    "a picture that is missing": "![there](nothing.svg)",
    "a name that is not in the package": "::: kvprune.Nothing",
}


def test_a_copy_that_is_not_broken_builds(tmp_path: Path) -> None:
    """So that the tests below fail for what they break."""
    copied(tmp_path)
    done = build(tmp_path, tmp_path / "site")
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize("broken", BROKEN.values(), ids=BROKEN)
def test_a_broken_page_does_not_build(broken: str, tmp_path: Path) -> None:
    copied(tmp_path)
    with (tmp_path / "docs" / "concepts.md").open("a") as page:
        page.write(f"\n{broken}\n")
    assert build(tmp_path, tmp_path / "site").returncode != 0


def test_a_page_that_nothing_leads_to_does_not_build(tmp_path: Path) -> None:
    copied(tmp_path)
    (tmp_path / "docs" / "lost.md").write_text("# Lost\n")
    assert build(tmp_path, tmp_path / "site").returncode != 0


def copied(folder: Path) -> None:
    for name in SOURCES:
        if (ROOT / name).is_dir():
            shutil.copytree(ROOT / name, folder / name, symlinks=True)
        else:
            shutil.copy(ROOT / name, folder / name)
