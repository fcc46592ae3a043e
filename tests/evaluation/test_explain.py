"""What `kvprune explain` shows, and both commands from end to end."""

from __future__ import annotations

import html
import io
import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast
from typer.testing import CliRunner

import kvprune
from kvprune import KVPruneError
from kvprune.cli import app, main
from kvprune.evaluation.explain import Explanation, as_page, as_terminal, explain, has_colour
from kvprune.evaluation.measure.reading import read_prompt
from kvprune.models.families import linear_layers
from kvprune.policies import H2O, SDTP, DuoAttention, KVzap, SDTPHeads, StreamingLLM

from ..support.family_models import attached_family
from ..support.models import LAYERS, fresh_model, tiny_model
from ..support.strategies import sdtp_heads

SIZE = 256
TEXTS = [
    "How many layers hold this token? " * 2,
    "na\u00efve \u6f22\u5b57 and \U0001f642, <b>\"bold\" & 'so'</b>\n\n  twice\ttabbed",
    "\U0001f469\u200d\U0001f680" * 6,
    "x",
]


def bytes_tokenizer() -> Any:
    """Each byte is a token."""
    vocabulary = {c: i for i, c in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    assert len(vocabulary) == SIZE
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer)


def words_tokenizer() -> Any:
    """As SentencePiece makes them: a token begins with its space, which decoding strips."""
    words = ["\u2581How", "\u2581many", "\u2581layers", "?", "[UNK]"]
    tokenizer = Tokenizer(models.WordLevel({w: i for i, w in enumerate(words)}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Metaspace(), pre_tokenizers.Punctuation()]
    )
    tokenizer.decoder = decoders.Metaspace()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="[UNK]")


def pruner() -> SDTP:
    """Two stages, before layers 1 and 3."""
    return SDTP(sdtp_heads(), 0.6, sinks=2, local=3, min_tokens=6)


POLICIES: list[Any] = [
    [],
    [pruner()],
    [H2O(4, 4)],
    [StreamingLLM(2, 9, layers=[1])],
    [pruner(), H2O(3, 3)],
]


@pytest.mark.parametrize("text", TEXTS, ids=["ascii", "mixed", "emoji", "x"])
@pytest.mark.parametrize("policies", POLICIES, ids=repr)
def test_counts_are_those_of_the_cache(policies, text):
    """For each token the layers that hold it, each by the share of its heads that do."""
    model, tokenizer = tiny_model(vocab_size=SIZE), bytes_tokenizer()
    found = explain(model, tokenizer, text, policies)
    ids, cache = torch.tensor([list(tokenizer(text)["input_ids"])]), kvprune.ComposedCache(policies)
    read_prompt(model, cache, ids)
    held = [[h.tolist() for h in cache.columns(layer)[0]] for layer in range(LAYERS)]
    wanted = [sum(sum(c in h for h in s) / len(s) for s in held) for c in range(ids.shape[1])]
    assert found.layers == pytest.approx(wanted, abs=1e-5)
    assert found.num_layers == LAYERS and len(found.tokens) == ids.shape[1]
    assert all(type(policy).__name__ in found.policies for policy in policies)


def test_layers_that_keep_a_state_are_not_counted():
    """They hold no token."""
    model = attached_family("qwen3_next")
    found = explain(model, words_tokenizer(), "How many layers?", [H2O(1, 1)])
    slots = len([*linear_layers(model)]) - sum(map(bool, linear_layers(model)))
    assert found.num_layers == slots == max(found.layers)
    assert found.layers.count(slots) == 2


@pytest.mark.parametrize("text", [*TEXTS, "a\ufffdb", "\ufffd", "\u6f22"], ids=ascii)
def test_pieces_are_the_text(text):
    """Joined they are what was read; the bytes of a character go to one of its tokens."""
    found = explain(tiny_model(vocab_size=SIZE), bytes_tokenizer(), text, [])
    assert "".join(found.tokens) == text
    assert "\ufffd" in text or {"", *text} >= set(found.tokens)


def test_pieces_keep_the_spaces_that_decoding_strips():
    """Tokenizers of the SentencePiece kind strip a space from the beginning of what they decode."""
    text = "How many layers?"
    tokenizer = words_tokenizer()
    assert tokenizer.decode(tokenizer.encode(text)) == text
    found = explain(tiny_model(), tokenizer, text, [])
    assert "".join(found.tokens).strip() == text


def test_an_empty_text():
    """There is nothing to explain."""
    with pytest.raises(KVPruneError, match="explain: expected a text of at least one token"):
        explain(tiny_model(vocab_size=SIZE), bytes_tokenizer(), "", [])


def test_the_page_is_self_contained_and_escaped():
    """No other address in it; one span per token, with its count; the text comes back whole."""
    text = TEXTS[1] + "<script>alert(1)</script>{x}</pre>"
    found = explain(tiny_model(vocab_size=SIZE), bytes_tokenizer(), text, [pruner()])
    page = as_page(found)
    assert not re.search(r"https?:|src=|href=|url\(|@import|<link|<script|<b>", page)
    body = page[page.index("<pre>") + 5 : page.index("</pre>")]
    span = r'<span class="s(\d)" title="held by (\d+) of 4 layers">([^<>]*)</span>'
    spans = re.findall(span, body)
    assert "".join(html.unescape(piece) for *_, piece in spans) == text
    assert [int(held) for _, held, _ in spans] == list(found.layers)
    assert all((shade == "4") == (held == "4") for shade, held, _ in spans)
    assert re.sub(r"<span[^>]*>[^<>]*</span>", "", body) == ""


def test_the_page_escapes_what_the_policies_are_called():
    """A policy of somebody's own may have any repr."""
    page = as_page(Explanation(("a",), (4,), 4, "<i>&"))
    assert "&lt;i&gt;&amp;" in page and "<i>" not in page


def test_the_terminal_shows_the_text_first():
    """Then what became of it; what every layer holds has the last style."""
    found = explain(tiny_model(vocab_size=SIZE), bytes_tokenizer(), TEXTS[1], [pruner()])
    shown = as_terminal(found)
    assert shown.plain.startswith(TEXTS[1])
    whole = sum(n == LAYERS for n in found.layers)
    assert 0 < whole < len(found.layers)
    assert f"{len(found.layers)} tokens, {LAYERS} layers" in shown.plain
    assert f"{whole} tokens are in every layer" in shown.plain
    pieces = [p for p, n in zip(found.tokens, found.layers, strict=True) if n == LAYERS]
    best = [s for s in shown.spans if s.style == shown.spans[-1].style and s.end <= len(TEXTS[1])]
    assert "".join(shown.plain[s.start : s.end] for s in best) == "".join(pieces)


def test_without_colour_brackets_show_what_is_kept():
    """In a pipe, or with NO_COLOR; without them it is the text."""
    found = Explanation(("a", "b", " c", "d"), (4, 0, 4, 4), 4, "some")
    shown = as_terminal(found, colour=False)
    assert shown.plain.startswith("[a]b[ cd]\n") and not shown.spans
    assert "In brackets: in 3 layers or more." in shown.plain
    assert as_terminal(replace(found, layers=(0, 0, 0, 0)), colour=False).plain.startswith("ab c")
    assert not has_colour(Console(file=io.StringIO()))
    assert has_colour(Console(file=io.StringIO(), force_terminal=True, no_color=False))
    assert not has_colour(Console(file=io.StringIO(), force_terminal=True, no_color=True))


# The commands.


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """A model of 6 layers with its tokenizer, and texts to train on."""
    path: Path = tmp_path_factory.mktemp("tiny")
    model = fresh_model(vocab_size=SIZE, num_hidden_layers=6, dtype=torch.float32)
    model.save_pretrained(path / "model")
    bytes_tokenizer().save_pretrained(path / "model")
    texts = [f"{i} is followed by {i + 1}, and {i * i} is its square. " * 2 for i in range(9)]
    (path / "texts.jsonl").write_text("\n".join(json.dumps({"text": t}) for t in texts))
    return path


def run(*arguments: object) -> Any:
    """A command, as from a shell but for the last resort in `main`."""
    return CliRunner().invoke(app, [str(a) for a in arguments], env={"COLUMNS": "200"})


TRAIN = ["train-sdtp", "--tokens", 120, "--completion", 6, "--keep", 0.5, "--query-heads", 1]


def test_heads_are_measured_for_duoattention(folder, tmp_path):
    """A file that the policy reads, and a line for each layer."""
    out = tmp_path / "heads.safetensors"
    text = "One follows another, and a third comes behind it. " * 4
    how = ["--model", folder / "model", "--out", out, "--sinks", 2, "--recent", 16]
    done = run("measure-heads", text, *how)
    assert done.exception is None and done.output.count("layer ") == 6
    assert f"DuoAttention('{out}')" in done.output
    policy = DuoAttention(out, share=0.25)
    assert sum(len(heads) for _, heads in policy.heads) == round(0.25 * 6 * 2)
    said = run("measure-heads", "too short", *how).exception
    assert "expected one text of more than 18 tokens" in str(said)


def test_gates_are_trained_for_kvzap(folder, tmp_path):
    """A folder that the policy reads, and how much of KVzip+'s scores they explain."""
    out, text = tmp_path / "gates", "One follows another, and a third comes behind it. " * 4
    how = ["--model", folder / "model", "--out", out, "--tokens", 24, "--texts", 3, "--hidden", 4]
    done = run("train-gates", text, *how)
    assert done.exception is None and "R squared" in done.output
    assert f"KVzap({str(out)!r})" in done.output
    policy = KVzap(out, 0.5)
    assert policy.with_budget(0.25).budget == 0.25
    said = run("train-gates", "too short", *how).exception
    assert "expected a text of at least 48 tokens, for two pieces of --tokens 24, got" in str(said)
    taken = tmp_path / "taken"
    taken.touch()
    said = run("train-gates", text, "--out", taken).exception
    assert "expected a folder that can be written" in str(said)


def test_heads_are_trained_for_saliency(folder, tmp_path):
    """A folder that the policy reads, what was measured, and errors before anything is read."""
    model, data, out = folder / "model", folder / "texts.jsonl", tmp_path / "heads"
    how = ["--model", model, "--out", out, "--limit", 6, "--held-out", 2, "--tokens", 110]
    how += ["--completion", 8]
    done = run("train-saliency", data, *how, "--epochs", 1)
    assert done.exception is None and f"Saliency(heads={str(out)!r})" in done.output
    account = json.loads((out / "saliency.json").read_text())
    assert account["examples"] == 4 and account["held_out"] == 2
    shown, page = " ".join(done.output.split()), (out / "saliency.html").read_text()
    for share in ("0.25", "0.125"):
        mine, chance = (
            sum(a - b for a, b in zip(account["each"][name], account["each"]["dense"], strict=True))
            for name in (f"saliency {share}", f"random {share}")
        )
        assert account["prompt_tokens"] == 76
        said = f"With {share} of a prompt's slots ({float(share) * 76:.0f} of 76 tokens)"
        assert f"{said}, completions lose {mine / 2:.2f} nats a token (" in shown
        recovered = f": {1 - mine / chance:.0%} of that is recovered" if chance > 0 else ""
        assert f"and {chance / 2:.2f} where slots stay by chance{recovered}." in shown
        assert f"saliency {share}" in page and f"random {share}" in page
    assert "Heads for Saliency on model" in page and page.count("<circle") == 4
    assert not re.search(r"https?:|src=|href=|url\(|@import|<link|<script", page)
    assert re.search(r"Scores cost \d+\.\d% of the FLOPs", shown)
    said = run("train-saliency", data, *how, "--pruning", "nothing").exception
    assert "nothing" in str(said) and isinstance(said, KVPruneError)
    said = run("train-saliency", data, *how, "--held-out", 6).exception
    assert "more examples than the 6" in str(said)


def test_heads_are_trained_and_explain_a_text(folder, tmp_path):
    """Both commands, one after the other, on files alone."""
    model, data, out = folder / "model", folder / "texts.jsonl", folder / "heads"
    done = run(*TRAIN, "--model", model, "--data", data, "--out", out, "--limit", 6, "--seed", 3)
    assert done.exception is None and f"SDTPHeads.from_pretrained('{out}')" in done.output
    account = json.loads((out / "training.json").read_text())
    assert account["split"] == {"training": 5, "held_out": 1}
    assert account["model_name"] == str(model) and account["data"] == str(data)
    assert account["options"]["seed"] == 3
    heads = SDTPHeads.from_pretrained(out)
    assert heads.layers == (4,) and heads.keep == 0.5
    text, page = "As long as it has 64 tokens, what it says is of no concern. " * 2, tmp_path / "p"
    (tmp_path / "text").write_text(text)
    how = ["--policies", f"sdtp(heads={str(out)!r})"]
    for given in (text, tmp_path / "text"):
        done = run("explain", given, "--model", model, *how, "--html", page)
        # What is kept stands in brackets, as this is no terminal.
        bare = re.sub(r"[\[\]]", "", done.stdout)
        assert done.exception is None and bare.startswith(text[:60]) and bare != done.stdout
        shown = " ".join(done.stdout.split())
        assert "120 tokens, 6 layers" in shown and "61 tokens are in every layer" in shown
    assert page.read_text(encoding="utf-8").count("of 6 layers") == 120


def test_expected_errors_are_one_line(folder, tmp_path, monkeypatch, capsys):
    """With no traceback, and an exit status of 2."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    model, out = str(folder / "model"), str(tmp_path / "out")
    for arguments, match in (
        (["explain", "text", "--model", str(tmp_path / "none")], "--model .*none: expected"),
        (["explain", "x", "--model", model, "--policies", f"sdtp(heads={out!r})"], "from_pretra"),
        (["explain", "x", "--model", model, "--policies", "sdpt"], "did you mean 'sdtp'"),
        (["explain", "x", "--model", model], "no heads ship"),
        ([*TRAIN, "--model", model, "--data", model, "--out", out], "nothing to train on"),
    ):
        monkeypatch.setattr("sys.argv", ["kvprune", *map(str, arguments)])
        with pytest.raises(SystemExit) as caught:
            main()
        said = capsys.readouterr().err
        assert caught.value.code == 2
        assert re.search(rf"^kvprune: .*{match}", said, re.MULTILINE) and "Traceback" not in said


BOUNDS = [
    ("train-gates", "--tokens", 0, "expected at least 1"),
    ("train-gates", "--texts", -1, "expected at least 2"),
    ("train-gates", "--hidden", -1, "expected at least 0"),
    ("measure-heads", "--tokens", -5, "expected at least 1"),
    ("measure-heads", "--sinks", -1, "expected at least 0"),
    ("measure-heads", "--recent", 0, "expected at least 1"),
]


@pytest.mark.parametrize(("command", "option", "number", "said"), BOUNDS)
def test_numbers_out_of_bounds_are_refused_before_anything_is_read(
    command, option, number, said, tmp_path
):
    """Neither the model, which is not there, nor the text."""
    how = ["--model", tmp_path / "none", "--out", tmp_path / "out", option, number]
    error = run(command, tmp_path / "none.txt", *how).exception
    assert isinstance(error, KVPruneError)
    assert str(error) == f"{command}: {option} {number}: {said}"
