"""Training examples from every format that is read, cut by hand for comparison."""

from __future__ import annotations

import importlib.machinery
import itertools
import json
import sys
import types
from pathlib import Path
from typing import Any

import jinja2
import pytest

from kvprune import KVPruneError
from kvprune.policies.sdtp import Example, read_examples, sharing

START = 1
"""What the tokenizer puts before a text."""


class Letters:
    """A tokenizer whose tokens are characters, with a start token and a chat template."""

    def __call__(self, text: Any) -> dict[str, Any]:
        if isinstance(text, list):
            return {"input_ids": [self(t)["input_ids"] for t in text]}
        return {"input_ids": [START, *self.encode(text, add_special_tokens=False)]}

    def encode(self, text: str, *, add_special_tokens: bool) -> list[int]:
        if not isinstance(text, str):
            raise TypeError("a text, please")
        assert not add_special_tokens
        return [ord(c) for c in text]

    def apply_chat_template(self, messages: Any, tokenize: bool, add_generation_prompt: bool):
        assert not tokenize and add_generation_prompt
        if messages and messages[0]["role"] != "user":
            raise jinja2.TemplateError("Conversation roles must alternate")
        return "".join(f"<{m['role']}>{m['content']}" for m in messages) + "<assistant>"


def read(source: Any, tokens: int = 10, completion: int = 3, least: int = 2) -> list[Example]:
    """With numbers that fit short texts."""
    return read_examples(source, Letters(), tokens, completion, least)


def ids(text: str) -> tuple[int, ...]:
    """The tokens of a text without the start token."""
    return tuple(map(ord, text))


ALPHABET = "abcdefghijklmnopqrstuvwxyz"
FIRST = Example((START, *ids("abcdef")), ids("ghi"))
SECOND = Example(ids("jklmnop"), ids("qrs"))
PAIR = {"prompt": "what?", "completion": "that"}
OF_PAIR = Example((START, *ids("what?")), ids("that"))


@pytest.mark.parametrize("suffix", [".txt", ".md", ".rst", ""])
@pytest.mark.parametrize("kind", [str, Path])
def test_a_text_file_is_cut_into_stretches(tmp_path, suffix, kind):
    """Each of `tokens`, the last ones its completion; what is left at the end is left out."""
    path = tmp_path / f"text{suffix}"
    path.write_text(ALPHABET, encoding="utf-8")
    assert read(kind(path)) == [FIRST, SECOND]


@pytest.mark.parametrize("letters", range(4, 21))
def test_every_stretch_but_that_of_a_short_text_is_full(letters):
    """A text shorter than a stretch is one of its own, unless its prompt is too short."""
    found = read([ALPHABET[:letters], ALPHABET])[:-2]
    size = letters + 1
    assert [len(e.prompt) + len(e.completion) for e in found] == (
        [10] * (size // 10) if size >= 10 else [size]
    )
    assert all(len(e.completion) == 3 for e in found)


def test_a_folder_is_all_of_its_files_in_order(tmp_path):
    """Folders within it, too; files of another kind are passed over."""
    (tmp_path / "b").mkdir()
    (tmp_path / "b" / "one.md").write_text("other words")
    (tmp_path / "a.txt").write_text(ALPHABET)
    (tmp_path / "c.jsonl").write_text(json.dumps(PAIR))
    (tmp_path / "model.bin").write_bytes(b"\xff\xfe")
    found = read(tmp_path)
    assert found == [FIRST, SECOND, Example((START, *ids("other ")), ids("wor")), OF_PAIR]


MESSAGES = [
    {"role": "user", "content": "2+2?"},
    {"role": "assistant", "content": "four"},
]


def test_json_lines_of_every_kind(tmp_path):
    """`text`, `prompt` with `completion`, `messages`; empty lines and other keys are ignored."""
    records: list[Any] = [{"text": ALPHABET, "id": 3}, PAIR, {"messages": MESSAGES}, "just a text"]
    path = tmp_path / "data.jsonl"
    path.write_text("\n\n".join(json.dumps(r) for r in records) + "\n", encoding="utf-8")
    chat = Example(ids("<user>2+2?<assistant>"), ids("four"))
    texts = Example((START, *ids("just a")), ids(" te"))
    assert read(path, tokens=30) == [
        Example((START, *ids(ALPHABET[:-3])), ids("xyz")),
        OF_PAIR,
        chat,
        Example((START, *ids("just a t")), ids("ext")),
    ]
    assert read(path) == [FIRST, SECOND, OF_PAIR, texts]


@pytest.mark.parametrize("inside", ["\u2028", "\u2029", "\x85"], ids=ascii)
def test_a_json_line_ends_at_a_newline_alone(tmp_path, inside):
    """Other line separators may stand in JSON strings as they are."""
    path = tmp_path / "data.jsonl"
    record = {"prompt": f"wh{inside}at", "completion": "that"}
    path.write_text(json.dumps(record, ensure_ascii=False) + "\n", encoding="utf-8")
    assert read(path) == [Example((START, *ids(f"wh{inside}at")), ids("that"))]


@pytest.mark.parametrize("wrap", [list, tuple, iter])
def test_any_iterable_of_records(wrap):
    """Texts and mappings, mixed."""
    assert read(wrap([ALPHABET, PAIR])) == [FIRST, SECOND, OF_PAIR]


def test_records_that_are_too_short_or_too_long_are_left_out():
    """By the prompt's tokens, and by those of both."""
    prompts = [{"prompt": "x" * n, "completion": "yes"} for n in (3, 4, 6, 7)]
    found = read([*prompts, {"prompt": "xxxxx", "completion": ""}], least=5)
    assert [len(e.prompt) for e in found] == [5, 7]


def fake_datasets(monkeypatch: pytest.MonkeyPatch, load: Any) -> None:
    """Puts a module named datasets in place."""
    module: Any = types.ModuleType("datasets")
    module.__spec__ = importlib.machinery.ModuleSpec("datasets", None)
    module.load_dataset = load
    monkeypatch.setitem(sys.modules, "datasets", module)


def test_a_name_is_that_of_a_dataset(monkeypatch):
    """Loaded by `datasets`, its training split."""
    asked = []

    def load(name: str, split: str) -> list[Any]:
        asked.append((name, split))
        return [{"text": ALPHABET}, PAIR]

    fake_datasets(monkeypatch, load)
    assert read("someone/texts") == [FIRST, SECOND, OF_PAIR]
    assert asked == [("someone/texts", "train")]


def test_a_dataset_that_cannot_be_loaded(monkeypatch):
    """Whatever its library raises."""

    def load(name: str, split: str) -> list[Any]:
        raise RuntimeError("no such split")

    fake_datasets(monkeypatch, load)
    with pytest.raises(KVPruneError, match=r"a dataset, got 'someone/texts': no such split"):
        read("someone/texts")


def test_no_such_path_without_datasets(monkeypatch):
    """The error names both what was given and the library to install."""
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(KVPruneError, match=r"'nowhere\.txt' is no file.*pip install datasets"):
        read("nowhere.txt")


def test_a_line_that_is_not_json(tmp_path):
    """The error names the file and the line, empty ones counted."""
    path = tmp_path / "data.jsonl"
    path.write_text(json.dumps(PAIR) + '\n\n{"text": \n', encoding="utf-8")
    with pytest.raises(KVPruneError, match=r"data\.jsonl:3: expected JSON, got "):
        read(path)


@pytest.mark.parametrize("suffix", [".txt", ".jsonl"])
def test_a_file_that_is_not_utf_8(tmp_path, suffix):
    """Alone or in a folder."""
    path = tmp_path / f"data{suffix}"
    path.write_bytes("na\u00efve".encode("latin-1"))
    for source in (path, tmp_path):
        with pytest.raises(KVPruneError, match=rf"data\{suffix}: expected a text in UTF-8"):
            read(source)


@pytest.mark.parametrize(
    "record",
    [
        {"txt": "..."},
        {"prompt": "what?"},
        {"completion": "that"},
        {"prompt": "what?", "completion": None},
        {"prompt": 5, "completion": "that"},
        {"text": None},
        {"text": ["several"] * 9},
        {"prompt": ["several"] * 9, "completion": "that"},
        {"messages": []},
        {"messages": [MESSAGES[1], MESSAGES[1]]},
        {"messages": "hello"},
        {"messages": [{"role": "user"}, {"role": "assistant", "content": "x"}]},
        {"messages": [MESSAGES[0], {"role": "assistant"}]},
        {},
        [],
        ["text"],
        None,
        7,
    ],
    ids=lambda record: str(record)[:60],
)
def test_a_record_that_is_none(record):
    """The error says which one, and what was expected."""
    with pytest.raises(KVPruneError, match=r"record 2: expected a text, or a mapping with `text`"):
        read([PAIR, record])


@pytest.mark.parametrize("source", [[], ["a"], [{"prompt": "", "completion": "x"}]])
def test_nothing_left(source):
    """The error says how many there were, and what would do."""
    with pytest.raises(KVPruneError, match=rf"of {len(source)} records in what was given none"):
        read(source)


def test_a_folder_without_texts(tmp_path):
    """Nothing to train on, and the error names the folder."""
    (tmp_path / "image.png").write_bytes(b"\x89PNG")
    with pytest.raises(KVPruneError, match=rf"of 0 records in '{tmp_path}' none has a prompt"):
        read(tmp_path)


@pytest.mark.parametrize(
    ("tokens", "completion", "least"),
    [(10, 0, 2), (10, -1, 2), (10, 9, 2), (10, 3, 8), (10, 3, 1), (0, 1, 2), (3, 2, 2)],
)
def test_numbers_that_do_not_fit(tokens, completion, least):
    """All three are named."""
    match = f"tokens={tokens}, completion={completion}, least={least}: expected at least 1 token"
    with pytest.raises(KVPruneError, match=match):
        read([ALPHABET], tokens, completion, least)


def test_numbers_that_just_fit():
    """A prompt of `least` and a completion fill a stretch."""
    assert read([ALPHABET], 5, 3, 2)[0] == Example((START, *ids("a")), ids("bcd"))


def test_reading_stops_at_the_limit():
    """What comes after is not even looked at."""
    endless = itertools.repeat({"prompt": "what?", "completion": "that"})
    assert read_examples(endless, Letters(), 10, 3, 2, limit=3) == [OF_PAIR] * 3


def test_prompts_and_completions_may_be_conversations():
    """As TRL has them; the completion is the assistant's."""
    asked, said = {"role": "user", "content": "eh"}, {"role": "assistant", "content": "oh"}
    whole = read([{"messages": [asked, said]}], tokens=40)
    assert read([{"prompt": [asked], "completion": [said]}], tokens=40) == whole
    assert whole == [Example(ids("<user>eh<assistant>"), ids("oh"))]
    for wrong in ([asked], [], [said, said]):
        with pytest.raises(KVPruneError, match="record 1: expected a text"):
            read([{"prompt": [asked], "completion": wrong}], tokens=40)


class Begun(Letters):
    """Says that what it puts before a text begins every sequence."""

    bos_token_id = START


def test_each_stretch_begins_as_a_text_does():
    """Where that is a token of its own; it counts, and no letter is lost."""
    found = read_examples([ALPHABET], Begun(), 10, 3, 2)
    assert found == [
        Example((START, *ids("abcdef")), ids("ghi")),
        Example((START, *ids("jklmno")), ids("pqr")),
    ]


@pytest.mark.parametrize(
    ("prompts", "shared"),
    [
        ([(1, 2, 3, 4), (1, 2, 5)], [2, 2]),
        ([(1, 2), (1, 2, 3)], [1, 1]),
        ([(1, 2), (3, 4)], [0, 0]),
        ([(1, 2, 3)], [0]),
        ([], []),
    ],
)
def test_sharing_tells_what_all_have_in_common(prompts, shared):
    """The last token of a prompt is never among it; all else stays."""
    given = [Example(p, (9,)) for p in prompts]
    found = sharing(given)
    assert [e.shared for e in found] == shared
    assert [(e.prompt, e.completion) for e in found] == [(p, (9,)) for p in prompts]


@pytest.mark.parametrize("shared", [-1, 3, 4])
def test_what_is_shared_is_less_than_a_prompt(shared):
    """The completion comes from the last token: that one is the example's own."""
    with pytest.raises(KVPruneError, match=f"shared={shared}: expected 0, or less than .* 3"):
        Example((1, 2, 3), (4,), shared)
    assert Example([1, 2, 3], [4], 2) == Example((1, 2, 3), (4,))


@pytest.mark.parametrize("limit", [0, -1])
def test_limits_that_are_none(limit):
    """At least one example."""
    with pytest.raises(KVPruneError, match=f"limit={limit}: expected at least 1"):
        read_examples([ALPHABET], Letters(), 10, 3, 2, limit=limit)


@pytest.mark.parametrize("source", ["", 5, "word " * 2000])
def test_sources_that_are_none(source):
    """An unset variable is not this folder; a text is not its own file."""
    with pytest.raises(KVPruneError, match=r"expected|no path"):
        read(source)


def test_folders_named_like_texts_and_byte_order_marks(tmp_path):
    """The one holds no text; the other is none of it."""
    (tmp_path / "notes.md").mkdir()
    (tmp_path / "a.jsonl").write_text("\ufeff" + json.dumps(PAIR), encoding="utf-8")
    assert read(tmp_path) == [OF_PAIR]


@pytest.mark.parametrize("line", ["[" * 100_000, '{"text": ' + "1" * 5000 + "}"])
def test_json_that_python_does_not_take(line, tmp_path):
    """The error names the line."""
    (tmp_path / "a.jsonl").write_text(line)
    with pytest.raises(KVPruneError, match=r"a\.jsonl:1: expected JSON"):
        read(tmp_path / "a.jsonl")
