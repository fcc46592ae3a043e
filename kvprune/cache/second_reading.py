"""A second reading of a prompt, behind which policies are asked that were due at its end."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from ..engine.second_reading import Repeat
from ..policy.moment import Moment
from ..statistics import SecondReading, parts_of
from .wired import WiredCache


def second_readings(cache: WiredCache) -> list[SecondReading]:
    """What the next prompt is to be read a second time for, each once: for policies that are due.

    And for what is observed though no policy wants it.
    """
    end = Moment(1, ends=True, first=cache.state.prompts == 0, read_again=True)
    due = [policy for policy in cache.policies if policy.is_due(end)]
    wanted = [part for policy in due for part in policy.statistics]
    return [part for part in parts_of([*wanted, *cache.observe]) if isinstance(part, SecondReading)]


@contextmanager
def second_reading(cache: WiredCache) -> Iterator[Callable[[Repeat], None]]:
    """Around a prompt that is announced with `read_again`, and forwards that read it again.

    Each of these is told what it repeats, by the function that is handed over. At the end the
    policies are asked that were due when the prompt ended. An error leaves the cache unusable, if
    anything was read.
    """
    before = cache.seen

    def tell(repeat: Repeat) -> None:
        cache.session.repeat = repeat

    done = False
    try:
        yield tell
        cache.end_second_reading()
        done = True
    finally:
        cache.session.repeat = None
        if not done:
            cache.state.give_up_second_reading()
            if cache.seen > before:
                cache.guard.failure = cache.guard.failure or "an error ended a second reading"
