"""The command `kvprune`; what a command does is imported when it is run."""

from __future__ import annotations

import signal
import threading
from types import FrameType

import typer

from ..errors import KVPruneError, from_ctrl_c
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
    """Runs the command; an expected error is printed as one line, without a traceback.

    Ctrl-C ends a command with 130, also where a library has made another error of it. Where a
    script has told this process to ignore Ctrl-C, the command goes on.
    """
    hears = signal.getsignal(signal.SIGINT) is signal.default_int_handler
    hears = hears and threading.current_thread() is threading.main_thread()
    if hears:
        signal.signal(signal.SIGINT, _ctrl_c)
    try:
        app()
    except (Exception, KeyboardInterrupt) as error:
        if from_ctrl_c(error):
            typer.echo("kvprune: stopped", err=True)
            raise SystemExit(130) from None
        if not isinstance(error, KVPruneError):
            raise
        typer.echo(f"kvprune: {error}", err=True)
        raise SystemExit(2) from None
    finally:
        if hears:
            signal.signal(signal.SIGINT, signal.default_int_handler)


def _ctrl_c(number: int, frame: FrameType | None) -> None:
    """Raises; a moment later where Python would not let the error out of a destructor."""
    inside = frame
    while inside is not None:
        if inside.f_code.co_name == "__del__":
            # To the main thread, so that what it waits for ends: Windows has no such call.
            if hasattr(signal, "pthread_kill"):
                main_thread = threading.main_thread().ident
                again = threading.Timer(0.05, signal.pthread_kill, [main_thread, number])
            else:
                again = threading.Timer(0.05, signal.raise_signal, [number])
            again.daemon = True
            again.start()
            return
        inside = inside.f_back
    raise KeyboardInterrupt
