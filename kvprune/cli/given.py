"""What several commands share: the model and the text they are given, and how far they are."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import typer

from ..errors import KVPruneError


def model_path(given: str | None) -> str:
    """The name or path of a model; that of the demo model, which is fetched, for None."""
    from ..evaluation.data.assets import demo_model

    if given is not None:
        return given
    return str(demo_model(report=lambda line: typer.echo(line, err=True)))


def read_text(given: str) -> str:
    """A text that a command reads: the argument itself, or the contents of the file that it names.

    Raises:
        KVPruneError: an empty text, a file that is not UTF-8, or a name that only a file can have
            while there is no such file.
    """
    # An empty path would mean the current folder.
    if not given:
        raise KVPruneError("expected a text of at least one token, got an empty one")
    try:
        path = Path(given)
        if path.is_file():
            return path.read_text(encoding="utf-8-sig")
        missing = path.suffix in (".txt", ".md") and not any(c.isspace() for c in given)
        given.encode()
    except UnicodeError as error:
        raise KVPruneError(f"expected a text in UTF-8, got {error}") from error
    except (OSError, ValueError):
        # The text cannot be the name of a file, for example because it is too long.
        return given
    if missing or path.is_dir():
        raise KVPruneError(f"{given}: expected a text or a file, and there is no such file")
    return given


def percent() -> Callable[[str, float], None]:
    """What says how much of a stage is done, each percent once."""
    said = ""

    def tell(what: str, done: float) -> None:
        nonlocal said
        if (now := f"{what}: {done:.0%}") != said:
            typer.echo(now, err=True)
        said = now

    return tell


def at_least(command: str, least: int, **given: int) -> None:
    """Refuses numbers that are too small, before anything is read.

    Args:
        command: the command, as an error names it.
        least: the least number that there can be.
        given: the options with their numbers.

    Raises:
        KVPruneError: a number is smaller; the message names its option.
    """
    for name, number in given.items():
        if number < least:
            raise KVPruneError(f"{command}: --{name} {number}: expected at least {least}")
