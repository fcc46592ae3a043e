"""The examples that SDTP's heads are trained on: prompts with completions, from common formats."""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from kvprune.errors import KVPruneError

SUFFIXES = (".txt", ".md", ".jsonl")


@dataclass(frozen=True)
class Example:
    """The token ids of a prompt, which is pruned, and of its completion, which the loss is over.

    Attributes:
        prompt: ids of the tokens that may be pruned.
        completion: ids of the tokens that follow the prompt.
        shared: how many of the prompt's first tokens other examples begin with as well; fewer
            than the prompt has; see `sharing`.

    Raises:
        KVPruneError: as many shared tokens as the prompt has, or more.
    """

    prompt: tuple[int, ...]
    completion: tuple[int, ...]
    shared: int = field(default=0, compare=False)

    def __post_init__(self) -> None:
        for name in ("prompt", "completion"):
            object.__setattr__(self, name, tuple(getattr(self, name)))
        if self.shared and not 0 < self.shared < len(self.prompt):
            raise KVPruneError(
                f"Example: shared={self.shared!r}: expected 0, or less than the prompt's "
                f"{len(self.prompt)} tokens; `sharing` finds how many they are"
            )


def sharing(group: Sequence[Example]) -> list[Example]:
    """The same examples, each with the number of first tokens that all of them have in common.

    With this number, several questions about one text are marked much faster where hidden states
    are kept: the model reads the text once (see `Marks`). Nothing else changes.
    """
    if len(group) < 2:
        return list(group)
    # The last token of a prompt is never shared: the completion is predicted from this token.
    least = max(min(len(e.prompt) for e in group) - 1, 0)
    places = enumerate(zip(*(e.prompt for e in group), strict=False))
    common = next((i for i, tokens in places if len(set(tokens)) > 1), least)
    return [replace(e, shared=min(common, least)) for e in group]


def read_examples(
    source: str | Path | Iterable[str | Mapping[str, Any]],
    tokenizer: Any,
    tokens: int = 1024,
    completion: int = 64,
    least: int = 64,
    limit: int | None = None,
    progress: bool = False,
) -> list[Example]:
    """Reads training examples.

    A record is one of the following, with the keys that TRL uses:

    * a text, or a mapping with `text`;
    * a mapping with `prompt` and `completion`, which are texts or lists of messages;
    * a mapping with `messages`, of which the last one is the completion.

    A text is cut into stretches of `tokens` tokens, whose last `completion` tokens are the
    completion. Left out are the tokens behind a text's last whole stretch, and records whose
    prompt has fewer than `least` tokens or that are longer than `tokens`.

    Args:
        source: a text file, a JSON-lines file, a folder of these, the name of a dataset that
            the `datasets` library loads, or any iterable of records, such as one of its datasets.
        tokenizer: the model's tokenizer.
        tokens: the most tokens of an example, prompt and completion together.
        completion: how many tokens at the end of a stretch of text are its completion.
        least: the fewest tokens of a prompt.
        limit: the number of examples at which reading stops; None to read all.
        progress: whether to count the records on stderr as they are read.

    Raises:
        KVPruneError: numbers that do not fit together, no such file or dataset, a record of
            another kind, or nothing left to train on.
    """
    if not 0 < completion <= tokens - least or least < 2:
        raise KVPruneError(
            f"examples: tokens={tokens}, completion={completion}, least={least}: expected at least "
            f"1 token of completion and {max(least, 2)} of prompt within {tokens}"
        )
    if limit is not None and limit < 1:
        raise KVPruneError(f"examples: limit={limit}: expected at least 1, or None for all")
    found, left_out = list[Example](), 0
    records = _records(source)
    if progress:
        from tqdm import tqdm

        records = iter(tqdm(records, desc="reading", unit=" records"))
    for number, record in enumerate(records, 1):
        fitting = [
            e
            for e in _examples(record, number, tokenizer, tokens, completion)
            if len(e.prompt) >= least and e.completion and len(e.prompt + e.completion) <= tokens
        ]
        left_out += not fitting
        found += fitting
        if limit is not None and len(found) >= limit:
            return found[:limit]
    if not found:
        raise KVPruneError(
            f"examples: nothing to train on: of {left_out} records in {_name(source)} none has a "
            f"prompt of at least {least} tokens (what is protected is never pruned) and is at most "
            f"{tokens} tokens long. Name longer texts, or another number of tokens"
        )
    return found


def _name(source: Any) -> str:
    return repr(str(source)) if isinstance(source, str | Path) else "what was given"


def _records(source: Any) -> Iterator[Any]:
    if not isinstance(source, str | Path):
        if not isinstance(source, Iterable):
            raise KVPruneError(f"examples: expected a path or records, got {source!r}")
        yield from source
        return
    if not str(source):
        raise KVPruneError("examples: expected the name of a file, a folder or a dataset, got ''")
    path = Path(source)
    try:
        folder, file = path.is_dir(), path.is_file()
    except OSError as error:
        raise KVPruneError(f"examples: {str(source)[:80]!r} is no path: {error}") from error
    if folder:
        for found in sorted(p for p in path.rglob("*") if p.suffix in SUFFIXES and p.is_file()):
            yield from _file(found)
    elif file:
        yield from _file(path)
    else:
        yield from _dataset(str(source))


def _file(path: Path) -> Iterator[Any]:
    try:
        text = path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise KVPruneError(f"{path}: expected a text in UTF-8, got {error}") from error
    if path.suffix != ".jsonl":
        yield text
        return
    for number, line in enumerate(text.split("\n"), 1):
        if line.strip():
            try:
                yield json.loads(line)
            except (ValueError, RecursionError) as error:
                raise KVPruneError(f"{path}:{number}: expected JSON, got {error}") from error


def _dataset(name: str) -> Iterator[Any]:
    if importlib.util.find_spec("datasets") is None:
        raise KVPruneError(
            f"examples: {name!r} is no file or folder. If it is a dataset on the hub, install the "
            f"library that loads it: pip install datasets"
        )
    import datasets

    try:
        yield from datasets.load_dataset(name, split="train")
    except Exception as error:
        raise KVPruneError(
            f"examples: expected a file, a folder or a dataset, got {name!r}: {error}"
        ) from error


def _examples(
    record: Any, number: int, tokenizer: Any, tokens: int, completion: int
) -> Iterator[Example]:
    record = {"text": record} if isinstance(record, str) else record
    try:
        if "text" in record:
            ids = _ids(tokenizer, record["text"])
            # A token that begins every text is put before every stretch of it.
            begin = ids[:1] if ids[:1] == (getattr(tokenizer, "bos_token_id", None),) else ()
            yield from _stretches(begin, ids[len(begin) :], tokens, completion)
        elif "messages" in record:
            yield _conversation(record["messages"][:-1], record["messages"][-1:], tokenizer)
        elif isinstance(record["prompt"], list):
            yield _conversation(record["prompt"], record["completion"], tokenizer)
        else:
            yield _pair(_ids(tokenizer, record["prompt"]), record["completion"], tokenizer)
    # A chat template that refuses a conversation may raise any error.
    except Exception as error:
        raise KVPruneError(
            f"examples: record {number}: expected a text, or a mapping with `text`, `prompt` and "
            f"`completion`, or `messages`, got {str(record)[:80]!r} ({error!r})"
        ) from error


def _ids(tokenizer: Any, text: Any) -> tuple[int, ...]:
    """The ids of a text, with the special tokens that the tokenizer adds by itself."""
    if not isinstance(text, str):
        raise TypeError(f"expected a text, got {type(text).__name__}")
    return tuple(tokenizer(text)["input_ids"])


def _stretches(
    begin: tuple[int, ...], ids: tuple[int, ...], tokens: int, completion: int
) -> Iterator[Example]:
    """The stretches of a text's `ids`, each of which begins with `begin`, as the text does."""
    size = tokens - len(begin)
    # A text shorter than a stretch is a stretch by itself; the rest of a longer one is not.
    for start in range(0, max(len(ids) - size, 0) + 1, size):
        stretch = begin + ids[start : start + size]
        yield Example(stretch[:-completion], stretch[-completion:])


def _conversation(before: list[dict[str, str]], after: Any, tokenizer: Any) -> Example:
    (last,) = after
    if last["role"] != "assistant":
        raise ValueError(f"expected a completion by the assistant, got one by {last['role']!r}")
    text = tokenizer.apply_chat_template(before, tokenize=False, add_generation_prompt=True)
    ids = tokenizer.encode(text, add_special_tokens=False)
    return _pair(tuple(ids), last["content"], tokenizer)


def _pair(prompt: tuple[int, ...], completion: Any, tokenizer: Any) -> Example:
    if not isinstance(completion, str):
        raise TypeError(f"expected a text as completion, got {type(completion).__name__}")
    return Example(prompt, tuple(tokenizer.encode(completion, add_special_tokens=False)))
