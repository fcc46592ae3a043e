"""The command `kvprune`; what a command does is imported when it is run."""

from __future__ import annotations

import typer

from ..errors import KVPruneError
from .comparing import compare_policies
from .looking import demo, doctor, explain_text
from .several import Several
from .training import measure_heads, train_gates, train_saliency, train_sdtp

__all__ = ["app", "main"]

app = typer.Typer(
    add_completion=False,
    no_args_is_help=True,
    help="Token pruning and KV-cache eviction as composable policies inside generate.",
)
app.command()(demo)
app.command("compare", cls=Several)(compare_policies)
app.command("explain")(explain_text)
app.command("train-saliency")(train_saliency)
app.command("train-sdtp")(train_sdtp)
app.command("train-gates")(train_gates)
app.command("measure-heads")(measure_heads)
app.command()(doctor)


def main() -> None:
    """Runs the command; an expected error is printed as one line, without a traceback."""
    try:
        app()
    except KVPruneError as error:
        typer.echo(f"kvprune: {error}", err=True)
        raise SystemExit(2) from None
