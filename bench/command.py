"""The end of a benchmark's command: its message and its exit code."""

from __future__ import annotations

import signal
import sys
from collections.abc import Callable

from kvprune.errors import KVPruneError

FAILED, STOPPED = 1, 130


def run(name: str, work: Callable[[], None]) -> int:
    """Runs `work`, which goes on where it was stopped, and returns the command's exit code.

    Work that cannot be done ends the command with one line. On SIGTERM the command stops as on
    Ctrl-C, so that processes which it started are stopped as well.
    """
    before = signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        work()
    except KVPruneError as error:
        print(error, file=sys.stderr)
        return FAILED
    except KeyboardInterrupt:
        print(f"{name}: stopped; the same command goes on where it was", file=sys.stderr)
        return STOPPED
    finally:
        signal.signal(signal.SIGTERM, before)
    return 0
