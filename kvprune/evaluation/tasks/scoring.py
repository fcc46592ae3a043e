"""The scores of an answer: the share of the wanted texts in it, or its likelihood."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

from .base import Reader, Sample, Score

RECALL = "recall"
LIKELIHOOD = "nats a token"


def recall(sample: Sample, reader: Reader, tokens: int) -> Score:
    """The share of the answers that stand in up to `tokens` generated tokens, after RULER.

    Upper and lower case count alike. An answer inside a longer word or number does not count,
    although RULER counts it.
    """
    text = reader.generate(tokens)
    found = sum(stands_in(answer, text) for answer in sample.answers)
    return Score(found / len(sample.answers), answer=text)


def likelihood(sample: Sample, reader: Reader) -> Score:
    """The mean log-likelihood of the answer's tokens, with a space between prompt and answer."""
    (answer,) = sample.answers
    return Score(mean(reader.log_likelihood(f" {answer}")))


def answer_tokens(sample: Sample, tokenizer: Any) -> int:
    """The number of tokens that `likelihood` scores."""
    (answer,) = sample.answers
    return len(tokenizer.encode(f" {answer}", add_special_tokens=False))


def mean(values: Sequence[float]) -> float:
    """The mean of at least one value."""
    return sum(values) / len(values)


def stands_in(answer: str, text: str) -> bool:
    """Whether an answer stands in a text, and not inside a longer word."""
    # Only letters and digits of ASCII make a longer word here, since Chinese has no spaces.
    pattern = rf"(?<![a-z0-9]){re.escape(answer.casefold())}(?![a-z0-9])"
    return re.search(pattern, text.casefold()) is not None
