"""The command that compares policies."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Annotated

import typer

from .given import model_path

_WHAT, _HOW = "What is compared", "How it is run"
_TASKS = ["needle", "squad"]
_CONTEXTS = [1024]
_BUDGETS = list[float]()
_STORES = list[str]()


def compare_policies(
    policies: Annotated[
        list[str],
        typer.Option(
            help="Specs, as dense, h2o(heavy=256,recent=256), sdtp+h2o, a|b.", rich_help_panel=_WHAT
        ),
    ],
    out: Annotated[
        Path, typer.Option(help="Folder for results.jsonl, report.html.", rich_help_panel=_HOW)
    ],
    model: Annotated[
        str | None, typer.Option(help="Name or path; the demo model.", rich_help_panel=_HOW)
    ] = None,
    tasks: Annotated[
        list[str], typer.Option(help="Names, or paths of JSON lines.", rich_help_panel=_WHAT)
    ] = _TASKS,
    context: Annotated[
        list[int], typer.Option(help="The most tokens of a prompt.", rich_help_panel=_WHAT)
    ] = _CONTEXTS,
    budgets: Annotated[
        list[float],
        typer.Option(
            help="Shares of the prompt; the policies' own budgets.", rich_help_panel=_WHAT
        ),
    ] = _BUDGETS,
    samples: Annotated[int, typer.Option(help="Of each cell.", rich_help_panel=_WHAT)] = 20,
    seed: Annotated[int, typer.Option(help="Of the samples.", rich_help_panel=_WHAT)] = 0,
    question: Annotated[
        str,
        typer.Option(
            help="Before the context is compressed: known, unknown, both.", rich_help_panel=_WHAT
        ),
    ] = "known",
    questions: Annotated[
        int, typer.Option(help="The most questions about one context.", rich_help_panel=_WHAT)
    ] = 1,
    stores: Annotated[
        list[str],
        typer.Option(
            help="How slots are held: plain, quantized, quantized(bits=8).", rich_help_panel=_WHAT
        ),
    ] = _STORES,
    dtype: Annotated[
        str, typer.Option(help="auto, float32, bfloat16, float16.", rich_help_panel=_HOW)
    ] = "auto",
    device: Annotated[str, typer.Option(help="cpu, cuda, ...", rich_help_panel=_HOW)] = "cpu",
    executor: Annotated[
        str, typer.Option(help="local, shared (prompts read once), ray.", rich_help_panel=_HOW)
    ] = "local",
) -> None:
    """Compares policies: quality and cost on each task, at each context length and budget.

    Stopped, it goes on where it was when called again; more of everything but questions may then
    be asked for.
    Ends with 1 if a cell failed (the others are run), with 2 if something was asked for that
    cannot be, and with 130 if it was stopped.
    """
    from ..evaluation.compare.compare import Run, measured
    from ..evaluation.compare.plan import Plan
    from ..evaluation.compare.progress import described, stage
    from ..evaluation.report import write_report
    from ..evaluation.report.console import show

    _see_current_folder()
    plan = Plan(policies, tasks, context, budgets, samples, seed, question, stores, questions)
    path = model_path(model)
    run = Run(path, dtype=dtype, device=device, executor=executor)
    try:
        found = measured(plan, run, out, progress=True)
        # The table is shown first, so that it is there even if the report fails.
        show(found.rows)
        with stage("writing the report"):
            write_report(found.results, out)
    except KeyboardInterrupt:
        typer.echo(f"stopped; the same command goes on with what is in {out}", err=True)
        raise typer.Exit(130) from None
    typer.echo(f"{out / 'report.html'}, {out / 'results.jsonl'}")
    for failure in found.failures:
        typer.echo(f"failed: {described(failure.cell)}: {failure.error}", err=True)
    if found.failures:
        raise typer.Exit(1)


def _see_current_folder() -> None:
    """Lets a policy `module:Class` be found in the current folder, where commands do not look."""
    here = os.getcwd()
    if here not in sys.path:
        # The folder goes last, so that no file in it hides a package.
        sys.path.append(here)
