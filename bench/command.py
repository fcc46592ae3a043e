"""How a benchmark's command ends: what it said, and its exit code."""

from __future__ import annotations

import signal
import sys
from collections.abc import Callable

from kvprune.errors import KVPruneError

FAILED, STOPPED = 1, 130


def run(name: str, work: Callable[[], None]) -> int:
    """The exit code of work that goes on where it was: what cannot be done ends it with one line.

    Told to stop, it stops as Ctrl-C does, so that processes which it started are taken along.
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
