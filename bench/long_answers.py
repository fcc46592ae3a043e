"""What a long answer loses if its cache evicts while it decodes, or holds fewer bits.

    python -m bench.long_answers          # an hour of two cores; goes on where it stopped
    python -m bench.long_answers --page   # the page anew, from the results

What was measured is kept in build/long-answers.jsonl: remove it after a change of code.

Prompts and answers have about 1,000 tokens each. All is read and said by `generate`. *forced*: the
answer is given, token by token, and its log-likelihood is noted; *free*: the model says it. Bytes
are those that a cache holds at the end, keys and values in bfloat16; see `bench/held.py`.
"""

from __future__ import annotations

import argparse
import json
import random
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from statistics import fmean
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, LogitsProcessor

import kvprune
from kvprune.errors import KVPruneError
from kvprune.evaluation.data.assets import demo_model
from kvprune.evaluation.report.figures import canvas, finished, look
from kvprune.evaluation.report.palette import styles
from kvprune.evaluation.report.statistics import interval
from kvprune.evaluation.tasks.texts import vocabulary
from kvprune.files import write_text
from kvprune.policies import DMS, H2O, RKV, TOVA, KeyDiff, StreamingLLM

from .about import write
from .command import run
from .held import as_bfloat16, numbers_of

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "bench" / "results" / "long-answers.json"
PAGE = ROOT / "docs" / "long-answers.md"
TOKENS, TEXTS, EVERY = 1024, 6, 64
"""An answer's tokens; how many texts are read in a batch; how often bytes are noted."""

MODES = "forced", "free"

GIVEN = 4
"""The lines of an answer that stand in its prompt."""

# Budgets are a quarter of prompt and answer.
QUARTER = TOKENS // 2
METHODS: Mapping[str, Callable[[], kvprune.ComposedCache]] = {
    "dense": lambda: kvprune.ComposedCache(),
    "5 and 4 bits": lambda: kvprune.ComposedCache(store=kvprune.Quantized()),
    "StreamingLLM": lambda: kvprune.ComposedCache([StreamingLLM(sinks=4, window=QUARTER - 4)]),
    "H2O": lambda: kvprune.ComposedCache([H2O(heavy=QUARTER // 2, recent=QUARTER // 2)]),
    "TOVA": lambda: kvprune.ComposedCache([TOVA(QUARTER)]),
    # It holds up to 127 slots more than its budget, and at the answer's end nearly so many.
    "RKV": lambda: kvprune.ComposedCache([RKV(QUARTER - 64)]),
    "DMS(KeyDiff)": lambda: kvprune.ComposedCache([DMS(KeyDiff(when=None), THRESHOLD)]),
    "H2O, half, in 5 and 4 bits": lambda: kvprune.ComposedCache(
        [H2O(heavy=QUARTER, recent=QUARTER)], store=kvprune.Quantized()
    ),
}
THRESHOLD = -0.69
"""At which a quarter of the keys of another text (number 100) would stay."""


class Text:
    """A prompt, and the answer that belongs to it.

    Args:
        tokenizer: the model's tokenizer.
        number: the number of the text, by which it is drawn.

    Attributes:
        prompt, answer: token ids; the answer has `tokens`.
        lines: the lines of the answer that end within it.
    """

    def __init__(self, tokenizer: Any, number: int, tokens: int = TOKENS) -> None:
        draw = random.Random(f"retell {number}")
        # A line has about ten tokens, so that this is enough.
        words = draw.sample(vocabulary(), tokens // 9)
        entries = [f"{word}: code {draw.randrange(1000, 10000)}" for word in words]
        # With fewer lines of the answer, the free model begins something else.
        given, said = entries[:GIVEN], entries[GIVEN:]
        asked = ["A list:", "", *entries, "", "The same list again:", "", *given, ""]
        self.prompt: list[int] = tokenizer.encode("\n".join(asked), add_special_tokens=False)
        answer = tokenizer.encode("\n".join(said), add_special_tokens=False)
        if len(answer) < tokens:
            raise KVPruneError(f"an answer: expected {tokens} tokens, got {len(answer)}")
        self.answer: list[int] = answer[:tokens]
        self.lines: list[str] = tokenizer.decode(self.answer).split("\n")[:-1]

    def right(self, said: str) -> float:
        """The share of the answer's lines that a text has."""
        return len(set(self.lines) & set(said.split("\n"))) / len(self.lines)


class Noting(LogitsProcessor):  # type: ignore[misc]
    """Notes what is likely and what is held, and says the answers where they are given.

    Args:
        model: an attached model.
        cache: the cache that `generate` fills.
        answers: `[B, tokens]`, the token ids to be said; None if the model says what it likes.

    Attributes:
        held: the tokens said, and the bytes held then for one text.
        likely, first: for each token `[B]`, its log-likelihood, and whether it is the likeliest.
    """

    def __init__(self, model: Any, cache: kvprune.ComposedCache, answers: Tensor | None) -> None:
        self._model, self._cache, self._answers = model, cache, answers
        self._said = 0
        self.held = list[tuple[int, float]]()
        self.likely, self.first = list[Tensor](), list[Tensor]()

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """See transformers' `LogitsProcessor`; scores `[B, V]`."""
        if self._said % EVERY == 0:
            self.note()
        self._said += 1
        if self._answers is None:
            return scores
        token = self._answers[:, self._said - 1 : self._said]
        self.likely.append(scores.log_softmax(-1).gather(1, token)[:, 0])
        self.first.append(scores.argmax(-1) == token[:, 0])
        return torch.full_like(scores, -torch.inf).scatter(1, token, 0.0)

    def note(self) -> None:
        """Notes the bytes that are held now."""
        held = as_bfloat16(self._model, self._cache) / self._cache.batch_size
        self.held.append((self._said, held))


@torch.no_grad()
def answered(
    model: Any, tokenizer: Any, texts: Sequence[Text], mode: str, cache: kvprune.ComposedCache
) -> dict[str, Any]:
    """Reads the prompts in one batch and answers them.

    Returns:
        by text the mean log-likelihood of a token (`nats`, forced) and the share that is right:
        of tokens that would be said (forced), or of lines that are (free); and the bytes of a text.
    """
    size = max(len(text.prompt) for text in texts)
    ids = torch.tensor(
        [[tokenizer.pad_token_id] * (size - len(t.prompt)) + t.prompt for t in texts]
    )
    mask = torch.tensor([[0] * (size - len(t.prompt)) + [1] * len(t.prompt) for t in texts])
    answers = torch.tensor([text.answer for text in texts])
    noting = Noting(model, cache, answers if mode == "forced" else None)
    said = model.generate(
        input_ids=ids,
        attention_mask=mask,
        cache=cache,
        logits_processor=[noting],
        max_new_tokens=answers.shape[1],
        do_sample=False,
        pad_token_id=tokenizer.pad_token_id,
    )
    noting.note()
    columns = fmean(len(text.prompt) for text in texts) + noting.held[-1][0]
    found: dict[str, Any] = {"held": noting.held, "columns": columns}
    if mode == "forced":
        found["nats"] = torch.stack(noting.likely, 1).double().mean(1).tolist()
        found["right"] = torch.stack(noting.first, 1).double().mean(1).tolist()
    else:
        new = tokenizer.batch_decode(said[:, size:], skip_special_tokens=True)
        found["right"] = [text.right(one) for text, one in zip(texts, new, strict=True)]
    return found


def measured(model: Any, tokenizer: Any, args: argparse.Namespace) -> None:
    """Adds a line to a file for each method and mode that it does not have yet."""
    done = {_key(line) for line in lines(args.work)}
    args.work.parent.mkdir(parents=True, exist_ok=True)
    numbers = range(args.first, args.first + args.texts)
    texts = [Text(tokenizer, number, args.tokens) for number in numbers]
    for mode in MODES:
        for method in args.methods:
            cell = {"mode": mode, "method": method, "first": args.first}
            cell |= {"texts": args.texts, "tokens": args.tokens}
            if _key(cell) in done:
                continue
            found = answered(model, tokenizer, texts, mode, METHODS[method]())
            # Written as a whole, so that no run that was killed leaves a part of a line.
            before = args.work.read_text(encoding="utf-8") if args.work.exists() else ""
            write_text(args.work, before + json.dumps(cell | found) + "\n")
            share = found["held"][-1][1] / dense_bytes(model, found["columns"])
            print(f"{mode}, {method}: {fmean(found['right']):.3f}, {share:.3f}", flush=True)


def dense_bytes(model: Any, columns: float) -> float:
    """The bytes of the keys and values of so many tokens in bfloat16."""
    return 2.0 * numbers_of(model) * model.config.num_hidden_layers * columns


def lines(work: Path) -> Iterator[dict[str, Any]]:
    """What is measured; none if there is no such file."""
    if work.exists():
        yield from map(json.loads, work.read_text(encoding="utf-8").splitlines())


def _key(line: Mapping[str, Any]) -> tuple[Any, ...]:
    return tuple(line[name] for name in ("mode", "method", "first", "texts", "tokens"))


def rows(model: Any, found: Iterable[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """A row for each line: means over texts with their intervals, paired with the dense model."""
    each = {(line["mode"], line["method"]): line for line in found}
    said = []
    for (mode, method), line in each.items():
        row = {"mode": mode, "method": method, "texts": len(line["right"])}
        row |= {"right": fmean(line["right"]), "right_interval": interval(line["right"])}
        if mode == "forced":
            if (mode, "dense") not in each:
                raise KVPruneError("expected dense among --methods, to compare with")
            dense = each[mode, "dense"]["nats"]
            lost = [a - b for a, b in zip(dense, line["nats"], strict=True)]
            row |= {"nats": fmean(line["nats"]), "lost": fmean(lost), "interval": interval(lost)}
        row["bytes"] = line["held"][-1][1] / dense_bytes(model, line["columns"])
        row["held"] = [[at, round(held)] for at, held in line["held"]]
        said.append(row)
    return said


HEAD = """# Long answers

What does a long answer lose if its cache evicts while it decodes, or holds fewer bits? The task
is one that needs all that was read. SmolLM2-135M-Instruct reads a list of {lines} words, each
with a code of four digits, and the first four lines again; the answer is the rest of the list,
{tokens:,} tokens behind a prompt of about as many. {texts} texts are read in one batch, all by
`generate`.

*Forced*: the answer is given token by token. *Lost* is its log-likelihood against the dense
model's, in nats a token, paired. *Tokens right* are those that the model would have said. Nearly
half of a line's tokens are its form (`: code`, the line's end), which a model says right without
the list. *Free*: the model says the list itself, and *lines right* are those that it says as they
were. Intervals are 95 % bootstrap intervals over texts; of {texts} texts they are rather too
narrow. *Bytes* are those held at the answer's end, room for more tokens included, over those of
dense keys and values in bfloat16.

`StreamingLLM`, `H2O` and `TOVA` hold {quarter} slots, about a quarter of prompt and answer; the
last line's H2O holds twice as many, in few bits. `RKV` evicts every 128 tokens down to {rkv}
slots, and holds the most just at the end. `DMS` has a threshold and no budget; the threshold was
chosen on another text, so that a quarter of its prompt and answer would stay, and less stays
while an answer is said. `python -m bench.long_answers` measures all of it and makes this page.

![Bytes held while an answer grows, by method](long-answers.svg)

The picture has the bytes of one text. What is evicted cannot be told, and every line is needed: no
policy comes near the dense model, but few bits do. Of the policies, those that keep keys which
differ from the others (`RKV`, `DMS(KeyDiff)`) keep most.

"""


def page(found: Sequence[Mapping[str, Any]]) -> str:
    """The text of the page."""
    numbers = {"tokens": TOKENS, "lines": TOKENS // 9, "quarter": QUARTER, "rkv": QUARTER - 64}
    return HEAD.format(texts=found[0]["texts"], **numbers) + table(found)


def table(found: Sequence[Mapping[str, Any]]) -> str:
    """A line for each method, in their order: what it holds, and what is left of the answer."""
    each = {(row["mode"], row["method"]): row for row in found}
    lines = [
        "| method | bytes | forced: lost | forced: tokens right | free: lines right |",
        "| --- | ---: | --- | --- | --- |",
    ]
    for method in METHODS:
        forced, free = (each.get((mode, method)) for mode in MODES)
        if forced is not None:
            cells = [method, f"{forced['bytes']:.3f}", _ranged(forced, "lost", "interval")]
            cells += [_ranged(row, "right", "right_interval") for row in (forced, free)]
            lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def _ranged(row: Mapping[str, Any] | None, name: str, interval_of: str) -> str:
    if row is None:
        return "-"
    low, high = row[interval_of]
    return f"{row[name]:.2f} ({low:.2f} to {high:.2f})"


def picture(found: Sequence[Mapping[str, Any]]) -> str:
    """The SVG of the page: a line for each method."""
    from matplotlib.lines import Line2D

    mine = {row["method"]: row["held"] for row in found if row["mode"] == "forced"}
    looks: dict[str, dict[str, Any]] = {
        name: {"color": one.colour, "marker": one.marker, "markersize": 4}
        for name, one in styles(list(mine)).items()
    }
    legend = [(Line2D([], [], **drawn), name) for name, drawn in looks.items()]
    title = "Bytes held while an answer grows"
    with look("long-answers"):
        figure, axes = canvas(title, 2.8, legend)
        for number, (name, held) in enumerate(mine.items()):
            # Lines may lie on each other: each has its markers at other places.
            axes.plot(
                [at for at, _ in held],
                [of / 2**20 for _, of in held],
                markevery=(number % 4, 4),
                **looks[name],
            )
        axes.set(xlabel="tokens of the answer", ylabel="MiB, bfloat16", ylim=(0, None))
        return finished(figure, "long-answers", title).svg


def main() -> int:
    """Measures, and writes what was found; returns the exit code."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--texts", type=int, default=TEXTS)
    parser.add_argument("--first", type=int, default=0, help="the number of the first text")
    parser.add_argument("--tokens", type=int, default=TOKENS)
    parser.add_argument("--methods", nargs="+", default=list(METHODS), choices=list(METHODS))
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--page", action="store_true", help="the page alone, from the results")
    parser.add_argument("--work", type=Path, default=ROOT / "build" / "long-answers.jsonl")
    parser.add_argument("--out", type=Path, default=RESULTS)
    args = parser.parse_args()
    if args.out == RESULTS and (args.tokens, args.first) != (TOKENS, 0):
        parser.error("--out: expected another file, as the page has other --tokens or --first")
    return run("long_answers", partial(_all, args))


def _all(args: argparse.Namespace) -> None:
    if not args.page:
        torch.set_num_threads(args.threads)
        path = demo_model(report=print)
        tokenizer = AutoTokenizer.from_pretrained(path)
        model = kvprune.attach(AutoModelForCausalLM.from_pretrained(path))
        measured(model, tokenizer, args)
        found = [line for line in lines(args.work) if _key(line)[2:] == _size(args)]
        write(args.out, args, model, rows(model, found))
    if args.out == RESULTS:
        found = json.loads(args.out.read_text())["rows"]
        write_text(PAGE, page(found))
        write_text(PAGE.with_suffix(".svg"), picture(found))


def _size(args: argparse.Namespace) -> tuple[int, int, int]:
    return args.first, args.texts, args.tokens


if __name__ == "__main__":
    sys.exit(main())
