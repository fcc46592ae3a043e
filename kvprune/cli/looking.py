"""Commands that show what there is: demo, explain, doctor."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from .given import model_path, read_text

_ASK = list[str]()


def demo(
    model: Annotated[str | None, typer.Option(help="Name or path; the demo model.")] = None,
    text: Annotated[
        str | None, typer.Option(help="A document, or a file that holds it; an article.")
    ] = None,
    ask: Annotated[list[str], typer.Option(help="A question about it; may be repeated.")] = _ASK,
    html: Annotated[Path | None, typer.Option(help="Write what is kept as a page.")] = None,
) -> None:
    """One long document and questions about it, with several configurations: one table."""
    from ..evaluation.demo import run_demo

    run_demo(model=model, text=None if text is None else read_text(text), ask=ask, html=html)


def explain_text(
    text: Annotated[str, typer.Argument(help="What to read, or a file that holds it.")],
    model: Annotated[str | None, typer.Option(help="Name or path; the demo model.")] = None,
    policies: Annotated[
        str, typer.Option(help="A pipeline, as sdtp+saliency(0.25) or sdtp(heads='folder').")
    ] = "sdtp",
    html: Annotated[Path | None, typer.Option(help="Write a page as well.")] = None,
) -> None:
    """Shows which tokens of a text policies keep, and in how many layers."""
    from rich.console import Console

    from ..evaluation.compare.progress import stage
    from ..evaluation.data.loading import loaded as load
    from ..evaluation.explain import as_page, as_terminal, explain, has_colour
    from ..evaluation.specs import parse
    from ..files import check_file, write_text
    from ..wiring.attach import attach

    read = read_text(text)
    if html is not None:
        check_file(html)
    pipeline = parse(policies)
    path = model_path(model)
    tokenizer, loaded = load(path)
    with stage("reading the text"):
        explained = explain(attach(loaded), tokenizer, read, pipeline)
    console = Console()
    console.print(as_terminal(explained, has_colour(console)), soft_wrap=not console.is_terminal)
    if html is not None:
        write_text(html, as_page(explained))


def doctor(
    model: Annotated[str | None, typer.Option(help="Name or path of a model to try.")] = None,
    dtype: Annotated[str, typer.Option(help="Of the model: auto, float32, bfloat16.")] = "auto",
) -> None:
    """Says what is installed, and what works with a model: what to send with a question.

    Ends with 1 if this transformers release lacks what kvprune needs, or a model is refused.
    """
    from ..evaluation.doctor import examined

    well = True
    for line in examined(model, dtype):
        typer.echo(f"{line.name:20} {line.found}")
        well = well and line.well
    if not well:
        raise typer.Exit(1)
