"""The memory that this process holds, and held at the most, as Linux counts it."""

from __future__ import annotations

import ctypes
import gc
from pathlib import Path


def forget_peak() -> int | None:
    """Has the system count the peak anew; returns the bytes held now.

    Returns None where the system does not say (not Linux).
    """
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return None
    return held("VmRSS")


def peak() -> int | None:
    """The most bytes since `forget_peak`; None where the system does not say."""
    return held("VmHWM")


def held(name: str) -> int | None:
    """The bytes in a line of /proc/self/status, such as `VmRSS`; None without such a line."""
    try:
        lines = Path("/proc/self/status").read_text().splitlines()
    except OSError:
        return None
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith(name)), None)


def give_back() -> None:
    """Returns freed memory to the system, so that it does not look like memory in use."""
    gc.collect()
    try:
        ctypes.CDLL(None).malloc_trim(0)
    except (AttributeError, OSError, TypeError):
        # Another kind of allocator cannot be told to: its peaks are an upper bound.
        return
