"""The items that `bench.sdtp` measures by: questions, needles and plain text, with answers."""

from __future__ import annotations

import random
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch

from kvprune.evaluation.data.assets import ruler_data
from kvprune.evaluation.data.questions import LongQuestion, hotpotqa, squad

LENGTHS = (1000, 1500)
QUESTIONS = ("squad", "hotpotqa")
NEXT = 128

_CITIES = ("Lisbon", "Oslo", "Nairobi", "Lima", "Hanoi", "Quito", "Riga", "Perth", "Dakar", "Turin")


@dataclass(frozen=True)
class Item:
    """One prompt, and the tokens that are to be likely after it.

    Attributes:
        task: the task's name.
        number: the item's number in its task, from 0.
        prompt: `[1, n]`.
        answer: `[1, m]`.
        facts: `[n]`, for each of the prompt's columns 1 for a supporting sentence, 0 for another
            sentence, -1 outside the sentences of the context; None where that is not known.
    """

    task: str
    number: int
    prompt: torch.Tensor
    answer: torch.Tensor
    facts: torch.Tensor | None = None


@dataclass(frozen=True)
class Items:
    """The items of each task: "squad", "hotpotqa", "needle-LENGTH" and "text".

    Args:
        tokenizer: the model's tokenizer.
    """

    tokenizer: Any

    def of(self, task: str, count: int, split: str) -> list[Item]:
        """The first `count` items of a task, from a split of its questions or essays."""
        if task in QUESTIONS:
            make = {"squad": squad, "hotpotqa": hotpotqa}[task]
            questions = make(split, count, LENGTHS, self.tokenizer)
            return [self._asked(task, i, q) for i, q in enumerate(questions)]
        if task.startswith("needle"):
            length = int(task.removeprefix("needle-"))
            return [self._needle(length, i, split) for i in range(count)]
        return [self._text(i, split) for i in range(count)]

    def _asked(self, task: str, number: int, question: LongQuestion) -> Item:
        prompt, answer = question.encoded(self.tokenizer)
        facts = self._facts(question) if task == "hotpotqa" else None
        return Item(task, number, torch.tensor([prompt]), torch.tensor([answer]), facts)

    def _facts(self, question: LongQuestion) -> torch.Tensor:
        text = question.prompt(self.tokenizer)
        encoded = self.tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
        starts = torch.tensor([start for start, _ in encoded["offset_mapping"]])
        facts = torch.full_like(starts, -1)
        at = text.index(question.context[0].text)
        for passage in question.context:
            end = at + len(passage.text)
            facts[(starts >= at) & (starts < end)] = int(passage.supporting)
            at = end
        return facts

    def _needle(self, length: int, number: int, split: str) -> Item:
        """One seven-digit number in essays, after RULER's template, whose lead ends the prompt."""
        draw = random.Random(f"needle {split} {length} {number}")
        words = self._essays[split]
        city = draw.choice(_CITIES)
        value = str(draw.randint(10**6, 10**7 - 1))
        room = length - 110
        start = draw.randrange(len(words) - room)
        hay = self.tokenizer.decode(words[start : start + room])
        ends = [i + 2 for i in range(len(hay) - 1) if hay[i : i + 2] == ". "]
        place = ends[int(draw.random() * len(ends))]
        needle = f"One of the special magic numbers for {city} is: {value}. "
        content = (
            "Some special magic numbers are hidden within the following text. Make sure to memorize"
            " it. I will quiz you about the numbers afterwards.\n"
            f"{hay[:place]}{needle}{hay[place:]}"
            f"\nWhat is the special magic number for {city} mentioned in the provided text?"
        )
        text = self.tokenizer.apply_chat_template(
            [{"role": "user", "content": content}], tokenize=False, add_generation_prompt=True
        )
        text += f"The special magic number for {city} mentioned in the provided text is:"
        prompt = self.tokenizer.encode(text, add_special_tokens=False)
        answer = self.tokenizer.encode(f" {value}", add_special_tokens=False)
        return Item(f"needle-{length}", number, torch.tensor([prompt]), torch.tensor([answer]))

    def _text(self, number: int, split: str) -> Item:
        words, start = self._essays[split], number * (1024 + NEXT)
        ids = torch.tensor([words[start : start + 1024 + NEXT]])
        return Item("text", number, ids[:, :1024], ids[:, 1024:])

    @cached_property
    def _essays(self) -> dict[str, list[int]]:
        essays = ruler_data("PaulGrahamEssays.json")["text"]
        parts = {"choose": essays[:400_000], "final": essays[400_000:800_000]}
        return {
            split: self.tokenizer.encode(text, add_special_tokens=False)
            for split, text in parts.items()
        }
