"""Options that take several values, as `--tasks a b`."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

from typer.core import TyperCommand

from ..errors import KVPruneError


class Several(TyperCommand):
    """A command whose repeatable options also take several values: `--tasks a b`.

    The command must have no arguments of its own. Then everything between a value and the next
    option can only be one more value.
    """

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """Writes the option's name before each further value, then parses as usual."""
        several = {name for p in self.params if getattr(p, "multiple", False) for name in p.opts}
        names = {name for p in self.params for name in p.opts}
        return super().parse_args(ctx, _repeated(args, several, names))


def _repeated(args: list[str], several: Collection[str], names: Collection[str]) -> list[str]:
    """The arguments, with `--tasks a b` written as `--tasks a --tasks b`.

    Args:
        args: the arguments as the user gave them.
        several: the names of the options that take several values.
        names: the names of all options.

    Raises:
        KVPruneError: an option is followed by another option and not by a value.
    """
    spelled, option, has_value = list[str](), None, False
    for arg in args:
        name, equals, _ = arg.partition("=")
        # Otherwise the next option's name would be taken for the value.
        if option and not has_value and name in names:
            raise KVPruneError(f"{option}: expected at least one value, got {name} right behind it")
        if arg.startswith("-"):
            option, has_value = name if name in several else None, bool(equals)
        else:
            spelled += [option] if option and has_value else []
            has_value = True
        spelled.append(arg)
    return spelled
