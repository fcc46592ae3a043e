"""A second reading of a prompt, behind which policies are asked that were due at its end."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

from ..engine.second_reading import Repeat
from ..policy.base import TokenPolicy
from ..statistics import SecondReading, parts_of
from .wired import WiredCache


def second_readings(policies: Sequence[TokenPolicy]) -> list[SecondReading]:
    """The statistics of policies that go by a second reading, each once."""
    wanted = parts_of(part for policy in policies for part in policy.statistics)
    return [part for part in wanted if isinstance(part, SecondReading)]


@contextmanager
def second_reading(cache: WiredCache) -> Iterator[Callable[[Repeat], None]]:
    """Behind a prompt that was announced with `read_again`: forwards that read it a second time.

    Each is told what it repeats, by the function that is handed over. At the end the policies are
    asked that were due when the prompt ended. An error leaves the cache unusable.
    """

    def tell(repeat: Repeat) -> None:
        cache.session.repeat = repeat

    done = False
    try:
        yield tell
        cache.state.end_second_reading()
        done = True
    finally:
        cache.session.repeat = None
        if not done:
            cache.state.give_up_second_reading()
            cache.guard.failure = cache.guard.failure or "an error ended a second reading"
