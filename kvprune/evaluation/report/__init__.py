"""The report of a comparison: one page that opens from disk, and its figures as files."""

from __future__ import annotations

import os
import re
from functools import partial
from importlib.resources import files
from pathlib import Path
from typing import TYPE_CHECKING

from ...errors import KVPruneError
from ...files import write_text, write_whole
from ..ledger.results import Results
from . import view
from .figures import Plot, need_matplotlib
from .kept_text import SHADES, shown
from .palette import SERIES, dark_rules, styles
from .plots import DENSE_STYLE, context_plots, heat_map, quality_plots
from .summary import labels, tables

if TYPE_CHECKING:
    from jinja2 import Template
    from markupsafe import Markup

PLOTS = "plots"
"""The name of the folder for the figures' files, beside the page."""


def write_report(results: Results, folder: Path, figures: bool = True) -> list[Path]:
    """Writes `report.html`, and each of its figures as SVG and PNG into `plots/` beside it.

    The page needs nothing but itself: no network, no script, no other file.

    Args:
        results: the results to report; may be empty or lack whole cells.
        folder: the folder to write to, made if it is missing; files of the same names are replaced.
        figures: whether to write the figures as files too; the page holds them in any case.

    Returns:
        the paths of the files, the page first.

    Raises:
        KVPruneError: matplotlib is missing, a trace is damaged, or the folder cannot be written.
    """
    need_matplotlib()
    page, plots = _page(results, PLOTS if figures else "")
    _make(folder / PLOTS if figures else folder)
    written = [folder / "report.html"]
    for plot in plots if figures else ():
        vector, pixels = (folder / PLOTS / f"{plot.name}.{kind}" for kind in ("svg", "png"))
        write_text(vector, plot.svg)
        write_whole(pixels, partial(_put, content=plot.png))
        written += [vector, pixels]
    write_text(written[0], page)
    return written


def check_folder(folder: Path) -> None:
    """Refuses a folder in which no report could be written, before there is a report.

    Raises:
        KVPruneError: matplotlib is missing, or something else has the name of the page or of the
            figures' folder.
    """
    need_matplotlib()
    page, plots = folder / "report.html", folder / PLOTS
    # Both are False for a path that is not possible; the results file refuses such a path.
    is_folder, is_file = os.path.isdir(page), os.path.isfile(plots)
    if is_folder or is_file:
        raise KVPruneError(
            f"{page if is_folder else plots}: expected no {'folder' if is_folder else 'file'} of "
            f"this name, as the report is written there. Move it, or name another with --out"
        )


def _put(path: Path, content: bytes) -> None:
    path.write_bytes(content)


def _make(folder: Path) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise KVPruneError(
            f"{folder}: expected a folder for the report, and could not make it: {error}. Name "
            f"one that can be written"
        ) from error


def _page(results: Results, files: str) -> tuple[str, list[Plot]]:
    found, names = tables(results), labels(results)
    style = styles(names)
    quality = [quality_plots(table, style, i) for i, table in enumerate(found, start=1)]
    costs = context_plots(found, style)
    traces = list(shown(results.traces, names))
    maps = [
        heat_map(trace, style.get(trace.cell.label, DENSE_STYLE), i)
        for i, trace in enumerate(traces, start=1)
    ]
    page = _template().render(
        model=str(results.run.get("model", "")),
        about=view.about(results.run),
        sections=view.sections(found, names, quality),
        overview=view.overview(found, names),
        costs=costs,
        kept=view.kept(traces, maps, names),
        failures=view.failures(results),
        samples=f"{len(results.samples):,}",
        shades=list(enumerate(SHADES)),
        style=_style_sheet(),
        plots=files,
    )
    # A file name in an error may hold characters that UTF-8 cannot.
    page = page.encode("utf-8", "replace").decode("utf-8")
    return page, [*(plot for pair in quality for plot in pair), *costs, *maps]


def _template() -> Template:
    # Everything is escaped unless the template says otherwise, as it does for the figures and the
    # style sheet alone.
    from jinja2 import Environment, StrictUndefined

    environment = Environment(
        autoescape=True, trim_blocks=True, lstrip_blocks=True, undefined=StrictUndefined
    )
    environment.filters["breakable"] = _breakable
    return environment.from_string(_packaged("page.html"))


def _breakable(spec: str) -> Markup:
    """A spec, escaped, with places where a long one may go on in the next line."""
    from markupsafe import Markup, escape

    return Markup("<wbr>").join(escape(piece) for piece in re.split(r"(?<=[,|(+])", spec))


def _packaged(name: str) -> str:
    return files(__package__).joinpath(name).read_text(encoding="utf-8")


def _style_sheet() -> str:
    series = "".join(f".c{i}{{color:{light}}}" for i, light in enumerate(SERIES))
    dark = "".join(f".c{i}{{color:{dark}}}" for i, dark in enumerate(SERIES.values()))
    dark = f"@media screen and (prefers-color-scheme: dark){{{dark}}}"
    return _packaged("page.css") + series + dark + dark_rules()
