"""Prompts of a wanted length: a question around a context, as a chat if the tokenizer knows one."""

from __future__ import annotations

import itertools
import random
from abc import abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

from ...errors import KVPruneError
from .base import Sample, Task


@dataclass(frozen=True)
class Ask:
    """A question around a context, and the beginning of its answer.

    Attributes:
        before: the text before the context.
        after: the text after the context.
        lead: the beginning of the assistant's turn, so that a small model answers and does not
            chat. It ends without a space, since the answer brings its own.
    """

    before: str
    after: str
    lead: str

    def ids(self, tokenizer: Any, context: str = "") -> tuple[int, ...]:
        """The prompt's token ids, with the chat template or with the tokens that begin a text."""
        content = f"{self.before}{context}{self.after}"
        if not getattr(tokenizer, "chat_template", None):
            return plain(tokenizer, f"{content}\n{self.lead}")
        message = [{"role": "user", "content": content}]
        text = tokenizer.apply_chat_template(message, tokenize=False, add_generation_prompt=True)
        return tuple(tokenizer.encode(text + self.lead, add_special_tokens=False))

    def before_question(self, tokenizer: Any, context: str) -> int:
        """How many tokens of the prompt stand before what is behind the context."""
        asked, bare = self.ids(tokenizer, context), replace(self, after="").ids(tokenizer, context)
        pairs = enumerate(zip(asked, bare, strict=False))
        return next((i for i, (one, other) in pairs if one != other), 0)


def plain(tokenizer: Any, text: str) -> tuple[int, ...]:
    """The token ids of a text, with the tokens that begin a text and nothing at its end."""
    return (*opening(tokenizer), *tokenizer.encode(text, add_special_tokens=False))


def opening(tokenizer: Any) -> tuple[int, ...]:
    """The tokens with which the tokenizer begins a text: its bos, or none."""
    bare = tokenizer.encode("a", add_special_tokens=False)
    whole = tokenizer.encode("a", add_special_tokens=True)
    found = (i for i in range(len(whole)) if whole[i : i + len(bare)] == bare)
    return tuple(whole[: next(found, 0)])


def seeded(name: str, context: int, seed: int, number: int) -> random.Random:
    """The random numbers of a sample, which depend on nothing but these arguments."""
    return random.Random(f"{name} {context} {seed} {number}")


def refuse_short(name: str, context: int, needed: int) -> None:
    """Refuses a context of less than `needed` tokens.

    Raises:
        KVPruneError: the context is too short.
    """
    if context < needed:
        raise KVPruneError(
            f"{name}: expected a context of at least {needed} tokens, got {context}: what is asked"
            " for does not fit into less"
        )


def refuse_few(name: str, context: int, found: int, count: int, questions: int = 1) -> None:
    """Refuses fewer samples than asked for.

    Args:
        name, context: the task's name, and the context length.
        found, count: the samples that there are, and those asked for.
        questions: the most questions about one context.

    Raises:
        KVPruneError: there are too few samples.
    """
    if found < count:
        several = questions > 1
        otherwise = "fewer --questions" if several else "a longer context"
        raise KVPruneError(
            f"{name}: expected {count} samples that fit into {context} tokens, and there are"
            f" {found}; ask for fewer samples"
            + (f" or {otherwise}" if found == 0 or several else "")
        )


@dataclass(frozen=True)
class Plan:
    """A sample before its length is known.

    Attributes:
        ask: the question.
        text: makes the context of a number of units (words, pairs); always the same for one number.
        answers: see `Sample`.
        least: the fewest units that hold what is asked for.
    """

    ask: Ask
    text: Callable[[int], str]
    answers: tuple[str, ...]
    least: int = 0

    def prompt(self, tokenizer: Any, units: int) -> tuple[int, ...]:
        """The token ids of the whole prompt with this number of units."""
        return self.ask.ids(tokenizer, self.text(units))


class Filled(Task):
    """A task with a made-up context, which can have any length."""

    @abstractmethod
    def plan(self, draw: random.Random) -> Plan:
        """Draws one sample."""

    def samples(self, tokenizer: Any, context: int, count: int, seed: int) -> Sequence[Sample]:
        """See `Task.samples`; each context has as many units as fit."""
        plans = [self.plan(seeded(self.name, context, seed, i)) for i in range(count)]
        needed = max((len(p.prompt(tokenizer, p.least)) for p in plans), default=0)
        refuse_short(self.name, context, needed)
        return [_filled(plan, number, tokenizer, context) for number, plan in enumerate(plans)]


def _filled(plan: Plan, number: int, tokenizer: Any, context: int) -> Sample:
    units = most(lambda n: len(plan.prompt(tokenizer, n)), plan.least, context)
    prompt = plan.prompt(tokenizer, units)
    before = plan.ask.before_question(tokenizer, plan.text(units))
    return Sample(number, prompt, plan.ask.ids(tokenizer), plan.answers, before)


def most(length: Callable[[int], int], least: int, limit: int) -> int:
    """A number whose length is within the limit while the next number's length is not.

    The length of `least` must be within the limit. If lengths grow with the number, the result is
    the largest such number; if they grow evenly, it is found in a few steps.

    Args:
        length: the length of a number.
        least: the least number.
        limit: the most that a length may be.
    """
    low, high, base = least, None, length(least)
    number = least + 64
    for turn in itertools.count():
        found = length(number)
        low, high = (number, high) if found <= limit else (low, number)
        if high is not None and high - low == 1:
            break
        # The growth so far says where the limit is reached.
        rate = max((found - base) / (number - least), 1e-3)
        number = max(low + 1, number + int((limit - found) / rate))
        if high is not None:
            # After eight turns, lengths grow too unevenly for that: the interval is halved instead.
            number = min(number, high - 1) if turn < 8 else (low + high) // 2
    return low
