"""The prompts of both sides, as token ids in a JSON file: a text, and questions with answers."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

from transformers import AutoTokenizer

from kvprune.evaluation.data.assets import ruler_data
from kvprune.evaluation.data.questions import LongQuestion, squad
from kvprune.files import write_text

from .protocol import Question

CONTEXT = (1000, 1200)
"""The least and the most tokens of a question's context, from SQuAD's final split, which no heads
were trained on."""


def export(path: Path, model: Path, text: int, questions: int) -> dict[str, Any]:
    """Writes, and returns, the first `text` tokens of essays, and questions.

    Raises:
        KVPruneError: the texts cannot be had, or the file cannot be written.
    """
    tokenizer: Any = AutoTokenizer.from_pretrained(model)
    # Six characters for each token are plenty: a token has between four and five.
    essays = ruler_data("PaulGrahamEssays.json")["text"][: 6 * text]
    found = squad("final", questions, CONTEXT, tokenizer)
    prompts = {
        "text": tokenizer.encode(essays, add_special_tokens=False)[:text],
        "questions": [asdict(_question(i, q, tokenizer)) for i, q in enumerate(found)],
    }
    write_text(path, json.dumps(prompts))
    return prompts


def _question(number: int, question: LongQuestion, tokenizer: Any) -> Question:
    prompt, answer = question.encoded(tokenizer)
    text = question.prompt(tokenizer)
    encoded = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
    end = text.index(question.text) + len(question.text)
    context = sum(stop <= end for _, stop in encoded["offset_mapping"])
    return Question(number, prompt, context, answer)
