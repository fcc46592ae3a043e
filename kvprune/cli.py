"""The command `kvprune`."""

from __future__ import annotations

import typer

from .errors import KVPruneError

app = typer.Typer(
    add_completion=False,
    no_args_is_help=True,
    help="Token pruning and KV-cache eviction as composable policies inside generate.",
)


@app.callback()
def _commands() -> None:
    """Keeps `demo` a command of its own while it is the only one."""


@app.command()
def demo() -> None:
    """A real prompt of 2,000 tokens and a question, with each policy: one table."""
    from .evaluation.demo import run_demo

    run_demo()


def main() -> None:
    """Runs the command; an expected error is one line, not a traceback."""
    try:
        app()
    except KVPruneError as error:
        typer.echo(f"kvprune: {error}", err=True)
        raise SystemExit(2) from None
