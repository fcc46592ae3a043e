"""The session of one `generate`: its prompt, its drafts, and the rows that have ended."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..engine.second_reading import Repeat
from ..errors import KVPruneError
from .endings import Endings
from .guard import in_use, this_thread


@dataclass(frozen=True)
class _Generate:
    """One `generate` that is under way.

    thread: the thread that it runs in.
    custom: whether it runs a function of the user's, which may use the cache as it likes, by a
        `generate` of its own too.
    seen, promise, prompt_end, endings, recording: what they were before it.
    """

    thread: int
    custom: bool
    seen: int
    promise: Tensor | int
    prompt_end: int
    endings: Endings | None
    recording: bool


class Session:
    """Facts about the `generate` that is under way, or about a loop of the user's own.

    Attributes:
        promise: valid prompt tokens `[B]` that `generate` has announced and that count as prompt
            with the next forward.
        prompt_end: the column at which the announced prompt ends; 0 where none was announced.
        endings: what watches for rows that end; None where nobody does.
        recording: whether the newest columns may be taken back (drafts).
        pending: drafts of the last forward that nobody has accepted or taken back yet.
        read_again: whether the announced prompt will be read a second time before policies are
            asked at its end.
        repeat: what the next forward reads a second time; None for new tokens.
        in_stock_generate: whether a `generate` that is not ours has taken the cache, and has read
            nothing yet.
    """

    def __init__(self) -> None:
        self.promise: Tensor | int = 0
        self.prompt_end = 0
        self.endings: Endings | None = None
        self.recording = False
        self.pending = 0
        self.read_again = False
        self.repeat: Repeat | None = None
        self.in_stock_generate = False
        # Several where a custom one runs another; the innermost last.
        self._generates: list[_Generate] = []

    @property
    def in_generate(self) -> bool:
        """Whether one of our `generate`s is under way."""
        return bool(self._generates)

    def announce(
        self,
        new: Tensor | int,
        columns: int,
        endings: Endings | None,
        read_again: bool = False,
    ) -> None:
        """Notes an announced prompt; see `WiredCache.announce_prompt`."""
        self.promise, self.prompt_end, self.endings = new, columns, endings
        self.read_again = read_again

    def enter(self, seen: int, custom: bool) -> None:
        """A `generate` begins, with `seen` columns.

        Raises:
            KVPruneError: another one is under way.
        """
        outer = self._generates[-1] if self._generates else None
        if outer is not None and not (outer.custom and outer.thread == this_thread()):
            raise in_use("generate")
        before = self.promise, self.prompt_end, self.endings, self.recording
        self._generates.append(_Generate(this_thread(), custom, seen, *before))
        self.prompt_end, self.endings = 0, None
        # What was read before is not for this `generate` to take back.
        self.pending = 0

    def leave(self, seen: int) -> None:
        """The innermost `generate` is over, with `seen` columns."""
        recording = False
        if self._generates:
            over = self._generates.pop()
            # What one around it promised has come in, if anything has.
            self.promise = over.promise if over.seen == seen else 0
            self.prompt_end, self.endings = over.prompt_end, over.endings
            recording = over.recording
        # Drafts are of a loop of one's own, or of the `generate` whose they were.
        self.recording = self.in_generate and recording

    def past_prompt(self, seen: int) -> bool:
        """Whether `generate` has handed in its whole prompt."""
        return 0 < self.prompt_end <= seen

    def drafts(self, seen: int, count: int) -> int:
        """The number of a forward's `count` tokens, at the end, that may be taken back."""
        return min(count, max(seen + count - self.prompt_end, 0)) * self.recording

    def prompt_tokens(self, seen: int, count: int) -> int:
        """The number of a forward's `count` tokens, at the beginning, that are read as prompt."""
        if self.prompt_end:
            # What is behind the prompt was generated, or are drafts.
            return max(min(count, self.prompt_end - seen), 0)
        return 0 if count == 1 or self.recording else count

    def mask_of_ended(
        self, rows: int, count: int, seen: int, device: torch.device
    ) -> Tensor | None:
        """A mask `[B, seen + 1]` that hides what `generate` appends to rows that have ended.

        None while no row has ended, or where that is not known.
        """
        padded = None if self.endings is None else self.endings.padded
        if padded is None or count > 1 or padded.shape[0] != rows:
            return None
        mask = torch.ones(rows, seen + 1, dtype=torch.bool, device=device)
        mask[:, -1] = ~padded.to(device)
        return mask


def checked_lengths(lengths: Any) -> Tensor:
    """The lengths of an announced prompt: int64, `[B]`, or without an axis where all are alike.

    Raises:
        KVPruneError: no whole numbers of at least 1.
    """
    try:
        found = torch.as_tensor(lengths)
    except (TypeError, ValueError, RuntimeError):
        found = torch.zeros(())
    whole = found.dtype in (torch.int8, torch.uint8, torch.int16, torch.int32, torch.int64)
    if not whole or found.dim() > 1 or not found.numel() or int(found.min()) < 1:
        raise KVPruneError(
            f"prompt({lengths!r}): expected how many new tokens each row has, at least 1: one "
            f"number, or one for each row"
        )
    return found.to(torch.int64)
