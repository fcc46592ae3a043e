"""The guard of a cache: one forward at a time, and none after one that failed."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from ..engine.step import Step
from ..errors import KVPruneError


class Guard:
    """The state of use of a cache: who uses it now, and whether it can be used at all.

    Attributes:
        failure: why the cache cannot be used any more; empty while it can.
    """

    def __init__(self) -> None:
        self.failure = ""
        # A dict, since its setdefault is atomic: two threads cannot both open a step. (A lock
        # could be neither deep-copied nor pickled.)
        self._open: dict[str, tuple[int, Step | None]] = {}
        # Each thread has an entry of its own: a refused call must not change that of another.
        self._logits_to_keep: dict[int, int | Tensor] = {}

    def __deepcopy__(self, memo: dict[int, object]) -> Guard:
        # Nobody uses a copy yet.
        twin = Guard()
        twin.failure = self.failure
        return twin

    @property
    def in_forward(self) -> bool:
        """Whether a forward is under way."""
        return bool(self._open)

    @property
    def step(self) -> Step:
        """The forward that is under way.

        Raises:
            KVPruneError: there is none, so the model is not attached.
        """
        self.check_in_forward()
        step = self._open["step"][1]
        assert step is not None
        return step

    def claim(self) -> None:
        """Takes the one place for a step, or for a copy.

        Raises:
            KVPruneError: it is taken.
        """
        mine = (this_thread(), None)
        if self._open.setdefault("step", mine) is not mine:
            raise in_use()

    def begin(self, step: Step) -> None:
        """The place that was claimed is this step's."""
        self._open["step"] = (this_thread(), step)

    def release(self) -> None:
        """Gives the place back."""
        del self._open["step"]

    def own_step(self) -> Step | None:
        """The forward that this thread began, if it did."""
        owner, step = self._open.get("step", (0, None))
        return step if owner == this_thread() else None

    def ask_logits(self, logits_to_keep: int | Tensor | None) -> None:
        """Notes the tokens whose logits are asked for; see `WiredCache.ask_logits`."""
        if logits_to_keep is None:
            self._logits_to_keep.pop(this_thread(), None)
        else:
            self._logits_to_keep[this_thread()] = logits_to_keep

    @property
    def logits_to_keep(self) -> int | Tensor:
        """The tokens whose logits this thread's forward is asked for; 0 for the last one alone."""
        return self._logits_to_keep.get(this_thread(), 0)

    @contextmanager
    def moving(self, what: str) -> Iterator[None]:
        """While slots move, one layer after the other: an error there spoils the cache.

        Args:
            what: what is done, for later errors: "a crop".
        """
        try:
            yield
        except BaseException:
            self.failure = f"an error ended {what} in its middle"
            raise

    def check_in_forward(self) -> None:
        """Refuses what can be done in a forward of an attached model alone."""
        if "step" not in self._open:
            raise KVPruneError(
                "this cache is in no forward of a model that kvprune is attached to: expected "
                "kvprune.attach(model) first, and then a call of that model or its generate"
            )

    def check_usable(self) -> None:
        """Refuses a cache that is in use or failed."""
        if self._open:
            raise in_use()
        self.check_whole()

    def check_whole(self) -> None:
        """Refuses a cache that failed."""
        if self.failure:
            raise KVPruneError(
                f"this cache cannot be used any more: {self.failure}, and its layers may hold "
                f"different tokens. Call cache.reset() and hand in the prompt again"
            )


def in_use(what: str = "forward") -> KVPruneError:
    """The error of a cache that is used twice at once."""
    return KVPruneError(
        f"this cache is in the middle of a {what}: expected one {what} at a time. Wait until "
        f"it is over, or use one cache per sequence (copy.deepcopy makes more)"
    )


def this_thread() -> int:
    """The thread's number."""
    # Unknown to compiled code, which is of one thread.
    return 0 if torch.compiler.is_compiling() else threading.get_ident()
