"""How an answer is judged: what of it was found, or how likely it was."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

from .base import Reader, Sample, Score

RECALL = "recall"
LIKELIHOOD = "nats a token"


def recall(sample: Sample, reader: Reader, tokens: int) -> Score:
    """The share of the answers that stand in up to `tokens` generated tokens, after RULER.

    In upper or lower case, but not inside a longer word or number, where RULER counts it too.
    """
    text = reader.generate(tokens)
    found = sum(_stands_in(answer, text) for answer in sample.answers)
    return Score(found / len(sample.answers), answer=text)


def likelihood(sample: Sample, reader: Reader) -> Score:
    """The mean log-likelihood of the answer's tokens, which follows the prompt with a space."""
    (answer,) = sample.answers
    return Score(mean(reader.log_likelihood(f" {answer}")))


def answer_tokens(sample: Sample, tokenizer: Any) -> int:
    """How many tokens `likelihood` scores."""
    (answer,) = sample.answers
    return len(tokenizer.encode(f" {answer}", add_special_tokens=False))


def mean(values: Sequence[float]) -> float:
    """Of at least one value."""
    return sum(values) / len(values)


def _stands_in(answer: str, text: str) -> bool:
    # Letters and digits of ASCII alone make a word here: Chinese has no spaces.
    pattern = rf"(?<![a-z0-9]){re.escape(answer.casefold())}(?![a-z0-9])"
    return re.search(pattern, text.casefold()) is not None
