"""What mkdocs does beyond its plugins: the repository's own pages, links as in it, formulas."""

from __future__ import annotations

import os.path
import re
from pathlib import Path
from typing import Any

import latex2mathml.converter
from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

ROOT = Path(__file__).parent.parent

# Files outside docs/ that are pages as they are, so that nothing is written down twice.
PAGES = {
    "README.md": "index.md",
    "CONTRIBUTING.md": "contributing.md",
    "CHANGELOG.md": "changes.md",
    "policies/sdtp/pretrained/SmolLM2-135M-Instruct/README.md": "sdtp-heads.md",
}


def on_config(config: MkDocsConfig) -> MkDocsConfig:
    """A fence named `math`, which GitHub knows too, becomes MathML: no script, no font."""
    fences = [{"name": "math", "class": "math", "format": formula}]
    config.mdx_configs.setdefault("pymdownx.superfences", {})["custom_fences"] = fences
    return config


def formula(source: str, *where: Any, **more: Any) -> str:
    """A custom fence's formatter: LaTeX to MathML."""
    math = latex2mathml.converter.convert(source, display="block")
    return f'<div style="overflow-x: auto">{math}</div>'


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Adds the pages that are not under docs/."""
    for source, page in PAGES.items():
        files.append(File.generated(config, page, content=(ROOT / source).read_text()))
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Links are written as they are right in the repository; here they become the site's."""
    here = page.file.src_uri
    in_repository = {site: source for source, site in PAGES.items()}.get(here, f"docs/{here}")

    def of_site(link: re.Match[str]) -> str:
        target = os.path.normpath(os.path.join(os.path.dirname(in_repository), link[1]))
        site = PAGES.get(target, target.removeprefix("docs/"))
        if site == target:
            return link[0]
        return f"]({os.path.relpath(site, os.path.dirname(here) or '.')}{link[2] or ''})"

    return re.sub(r"\]\(([\w./-]+)(#[\w-]+)?\)", of_site, markdown)
