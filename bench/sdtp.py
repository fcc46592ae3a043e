"""What pruning hidden states loses: SDTP against everything that needs no training.

    python -m bench.sdtp --out bench/results/sdtp                # all of it: hours
    python -m bench.sdtp --tasks squad --questions 20            # a look

Questions about contexts of 1,000 to 1,500 tokens from splits that nothing was trained on or chosen
by (see `kvprune.evaluation.questions`; `--split choose` is for choosing), by the teacher-forced
negative log-likelihood of the gold answer's tokens; needles, by whether the number is repeated;
and plain text, by the likelihood of its next 128 tokens, which hardly notices what was dropped.
All rows run on the same items; shares and differences are paired, with bootstrap intervals. These
resample questions, not articles: what they say is of these articles (SQuAD's final split has
seven).

Each result is appended to `OUT.jsonl` as it comes: a run that was stopped goes on where it was.
`OUT.json` is the summary, `OUT.md` a table of it.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import platform
import random
import sys
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cache, cached_property, partial
from pathlib import Path
from typing import Any

import numpy
import torch
import transformers
from scipy.stats import bootstrap
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoModelForCausalLM, AutoTokenizer

import kvprune
from kvprune.evaluation.assets import demo_model, ruler_data
from kvprune.evaluation.questions import LongQuestion, hotpotqa, squad
from kvprune.policies import H2O, SDTP, SDTPHeads, StreamingLLM
from kvprune.policies.sdtp import saliency

from .baselines import GivenScores, HiddenNorm, LastQueryAttention, Scheduled
from .tables import sdtp_table

LENGTHS = (1000, 1500)
NEEDLE_LENGTHS = (1024, 2048)
QUESTIONS = ("squad", "hotpotqa")
ORACLES = ("saliency oracle", "signed saliency oracle")
NEXT = 128


@dataclass(frozen=True)
class Item:
    """One prompt `[1, n]` and the tokens to be likely after it `[1, m]`.

    facts: for each of the prompt's columns 1 for a supporting sentence, 0 for another one, -1 for
    what is no sentence of the context; or None where that is not known.
    """

    task: str
    number: int
    prompt: torch.Tensor
    answer: torch.Tensor
    facts: torch.Tensor | None = None


class Bench:
    """A model, and what its rows need."""

    def __init__(self, dtype: torch.dtype, heads: dict[str, Path]) -> None:
        path = demo_model(report=lambda line: print(line, file=sys.stderr))
        self.tokenizer: Any = AutoTokenizer.from_pretrained(path)
        model: Any = AutoModelForCausalLM.from_pretrained(path, dtype=dtype)
        self.model: Any = kvprune.attach(model.eval().requires_grad_(False))
        self.default = SDTP().for_model(self.model)
        assert self.default.heads is not None
        self.others = {
            name: replace(self.default, heads=SDTPHeads.from_pretrained(folder).float())
            for name, folder in heads.items()
        }

    def rows(self, item: Item) -> dict[str, Callable[[], list[Any]]]:
        """Policies by name, made when they are asked for."""
        model, plan = self.model, self.default
        h2o, streaming = H2O(heavy=0.2, recent=0.2), StreamingLLM(sinks=4, window=0.4)
        generator = torch.Generator().manual_seed(item.number)
        heads = plan.heads
        assert heads is not None
        stages, columns = len(heads.layers), item.prompt.shape[1]
        chance = torch.rand(columns, generator=generator).expand(stages, -1)
        oracle: Any = cache(lambda: saliency(model, item.prompt, heads.layers, signed=True)[0])
        return {
            "dense": list,
            "random": lambda: [GivenScores(plan, chance)],
            "SDTP": lambda: [plan],
            **{name: partial(list, [policy]) for name, policy in self.others.items()},
            "SDTP-low": lambda: [replace(plan, stages=5)],
            "newest": lambda: [Scheduled(plan)],
            "hidden norm": lambda: [HiddenNorm(plan)],
            "last-query attention": lambda: [LastQueryAttention(plan, model)],
            ORACLES[0]: lambda: [GivenScores(plan, oracle().abs())],
            ORACLES[1]: lambda: [GivenScores(plan, oracle())],
            "H2O 40 %": lambda: [h2o],
            "SDTP + H2O 40 %": lambda: [plan, h2o],
            "StreamingLLM 40 %": lambda: [streaming],
        }

    @torch.no_grad()
    def nll(self, item: Item, policies: list[kvprune.TokenPolicy]) -> dict[str, float]:
        """Mean over the answer's tokens, and what was kept of the sentences at the last layer.

        The answer is one forward: what evicts does so after it.
        """
        held = kvprune.ComposedCache(policies)
        logits = self.model(item.prompt, past_key_values=held, logits_to_keep=1).logits
        said: dict[str, float] = {}
        if item.facts is not None:
            last = held.columns(len(held) - 1)[0]
            said = {
                name: float((item.facts == fact)[last].float().sum(-1).mean())
                / int((item.facts == fact).sum())
                for name, fact in (("supporting_kept", 1), ("others_kept", 0))
            }
        count = item.answer.shape[1] - 1
        if count:
            # All of them asked for, so that none of them is pruned.
            rest: Any = {"past_key_values": held, "logits_to_keep": count}
            logits = torch.cat([logits, self.model(item.answer[:, :-1], **rest).logits], 1)
        return {"value": float(F.cross_entropy(logits[0].float(), item.answer[0])), **said}

    @torch.no_grad()
    def found(self, item: Item, policies: list[kvprune.TokenPolicy]) -> dict[str, float]:
        """1 if the tokens of the answer are generated, 0 otherwise."""
        count = item.answer.shape[1]
        tokens: Any = self.model.generate(
            item.prompt,
            attention_mask=torch.ones_like(item.prompt),
            cache=kvprune.ComposedCache(policies),
            max_new_tokens=count,
            do_sample=False,
        )[:, item.prompt.shape[1] :]
        said, wanted = (self.tokenizer.decode(t[0]).strip() for t in (tokens, item.answer))
        return {"value": float(said.startswith(wanted))}

    def items(self, task: str, count: int, split: str) -> list[Item]:
        """The first `count` of a task; `split` is of the questions."""
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
        """One seven-digit number in essays, after RULER's template, its prefix as the lead."""
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

    def run(
        self, task: str, count: int, split: str, out: Path, only: list[str], oracles: int
    ) -> None:
        """Appends what is missing; all rows, if none is named, oracles for the first items."""
        found = results(out)
        for r in found:
            setting = self.setting(split, r["row"])
            if {name: r.get(name) for name in setting} != setting:
                raise kvprune.KVPruneError(
                    f"{out}: expected results of {setting}, came {r}; name another file with --out"
                )
        done = {(r["task"], r["number"], r["row"]) for r in found}
        measure = self.found if task.startswith("needle") else self.nll
        for item in self.items(task, count, split):
            for name, policies in self.rows(item).items():
                left_out = name in ORACLES and (task not in QUESTIONS or item.number >= oracles)
                if (only and name not in only) or (task, item.number, name) in done or left_out:
                    continue
                result = {"task": task, "number": item.number, "row": name}
                result |= self.setting(split, name)
                result |= measure(item, policies())
                with out.open("a") as file:
                    file.write(json.dumps(result) + "\n")

    def setting(self, split: str, row: str) -> dict[str, Any]:
        """What results of a row must have in common to be put together."""
        heads = self.others.get(row, self.default).heads
        assert heads is not None
        learned = row in self.others or row.startswith("SDTP")
        return {
            "split": split,
            "dtype": str(self.model.dtype),
            "lengths": list(LENGTHS),
            "schedule": [self.default.share, *heads.layers],
            "heads": _digest(heads) if learned else None,
        }

    @torch.no_grad()
    def heads_flops(self, tokens: int = 1024) -> dict[str, float]:
        """Each kind of heads' FLOPs in a prefill, as a share of the dense model's.

        The rest is the same with scores that cost nothing, since the schedule is.
        """
        ids = torch.arange(tokens)[None] + 1000
        item = Item("flops", 0, ids, ids[:, :1])
        rows = self.rows(item)
        count = {}
        for name in ("dense", "random", "SDTP", *self.others):
            with FlopCounterMode(display=False) as counter:
                held = kvprune.ComposedCache(rows[name]())
                self.model(ids, past_key_values=held, logits_to_keep=1)
            count[name] = counter.get_total_flops()
        plain, dense = count.pop("random"), count.pop("dense")
        return {name: round((n - plain) / dense, 5) for name, n in count.items()}


@cache
def _digest(heads: SDTPHeads) -> str:
    weights = b"".join(t.numpy().tobytes() for t in heads.state_dict().values())
    return hashlib.sha256(weights).hexdigest()[:16]


_CITIES = ("Lisbon", "Oslo", "Nairobi", "Lima", "Hanoi", "Quito", "Riga", "Perth", "Dakar", "Turin")


def results(path: Path) -> list[dict[str, Any]]:
    """What was measured so far; a last line that a kill cut off is removed."""
    if not path.exists():
        return []
    lines = path.read_text().splitlines(keepends=True)
    if lines and not lines[-1].endswith("\n"):
        path.write_text("".join(lines[:-1]))
    return [json.loads(line) for line in lines if line.endswith("\n")]


def values(found: list[dict[str, Any]], task: str, name: str = "value") -> dict[str, Any]:
    """By row, one number for each item that was measured."""
    rows: dict[str, dict[int, float]] = {}
    for r in found:
        if r["task"] == task and name in r:
            rows.setdefault(r["row"], {})[r["number"]] = r[name]
    return rows


def paired(*rows: dict[int, float]) -> tuple[Any, ...]:
    """Those of the items that all of the rows have."""
    numbers = sorted(set.intersection(*(set(r) for r in rows)))
    return tuple(numpy.array([r[n] for n in numbers]) for r in rows)


def interval(statistic: Callable[..., Any], *samples: Any) -> list[float]:
    """95 %, by items, paired."""
    low, high = bootstrap(
        samples, statistic, paired=True, n_resamples=5000, method="percentile", rng=0
    ).confidence_interval
    return [round(float(low), 4), round(float(high), 4)]


def recovered(random: Any, row: Any, dense: Any, axis: int = -1) -> Any:
    """The share of what random scores lose that a row does not lose."""
    return (random - row).mean(axis) / (random - dense).mean(axis)


def summary(found: list[dict[str, Any]], tasks: list[str]) -> dict[str, Any]:
    """All figures of the tasks that were measured."""
    return {task: _summary(found, task) for task in tasks if values(found, task)}


def _summary(found: list[dict[str, Any]], task: str) -> dict[str, Any]:
    rows = values(found, task)
    said: dict[str, Any] = {"rows": {name: _row(rows, name, task) for name in rows}}
    if task == "hotpotqa":
        for name in ("supporting_kept", "others_kept"):
            for row, kept in values(found, task, name).items():
                said["rows"][row][name] = round(float(numpy.nanmean(list(kept.values()))), 4)
    four = ("SDTP + H2O 40 %", "SDTP", "H2O 40 %", "dense")
    if set(four) <= set(rows) and task in QUESTIONS:
        samples = paired(*(rows[name] for name in four))
        said["compound_error"] = round(float(_compound(*samples)), 4)
        said["compound_error_95"] = interval(_compound, *samples)
    return said


def _row(rows: dict[str, dict[int, float]], name: str, task: str) -> dict[str, Any]:
    row: dict[str, Any] = {
        "items": len(rows[name]),
        "mean": round(float(numpy.mean(list(rows[name].values()))), 4),
    }
    if task not in QUESTIONS or name in ("dense", "random") or not {"dense", "random"} <= set(rows):
        return row
    share = paired(rows["random"], rows[name], rows["dense"])
    row["recovered"] = round(float(recovered(*share)), 4)
    row["recovered_95"] = interval(recovered, *share)
    row["few"] = len(rows[name]) < len(rows["dense"])
    for other in ("SDTP", "paper's head"):
        if other in rows and other != name:
            row[f"minus {other}_95"] = interval(_difference, *paired(rows[name], rows[other]))
    return row


def _difference(one: Any, two: Any, axis: int = -1) -> Any:
    return (one - two).mean(axis)


def _compound(both: Any, sdtp: Any, h2o: Any, dense: Any, axis: int = -1) -> Any:
    """How much more H2O costs after SDTP than it costs alone."""
    return (both - sdtp - h2o + dense).mean(axis)


def main() -> None:
    """See the module."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=_Formatter)
    tasks = [*QUESTIONS, *(f"needle-{n}" for n in NEEDLE_LENGTHS), "text"]
    parser.add_argument("--tasks", nargs="*", default=tasks, choices=tasks)
    parser.add_argument("--questions", type=int, default=120, help="of each of the two data sets")
    parser.add_argument("--oracles", type=int, default=40, help="of these, those with oracles")
    parser.add_argument("--needles", type=int, default=30, help="of each length, and texts")
    parser.add_argument("--heads", nargs="*", default=[], metavar="NAME=FOLDER", help="more rows")
    parser.add_argument("--rows", nargs="*", default=[], help="only these")
    parser.add_argument("--split", default="final", choices=["choose", "final"])
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--out", type=Path, default=Path("bench/results/sdtp"))
    asked = parser.parse_args()
    torch.set_num_threads(asked.threads)
    heads = {name: Path(folder) for name, folder in (h.split("=", 1) for h in asked.heads)}
    bench = Bench(getattr(torch, asked.dtype), heads)
    lines = asked.out.with_suffix(".jsonl")
    known = set(bench.rows(Item("", 0, torch.zeros(1, 1), torch.zeros(1, 1))))
    if not set(asked.rows) <= known:
        parser.error(f"--rows {asked.rows}: expected some of {sorted(known)}")
    for task in asked.tasks:
        count = asked.questions if task in QUESTIONS else asked.needles
        bench.run(task, count, asked.split, lines, asked.rows, asked.oracles)
    report = {
        "command": " ".join(sys.argv),
        "dtype": asked.dtype,
        "machine": platform.processor() or platform.machine(),
        "versions": {"torch": torch.__version__, "transformers": transformers.__version__},
        "heads_flops": bench.heads_flops(),
        "tasks": summary(results(lines), tasks),
    }
    asked.out.with_suffix(".json").write_text(json.dumps(report, indent=1) + "\n")
    asked.out.with_suffix(".md").write_text(sdtp_table(report))
    print(sdtp_table(report))


class _Formatter(argparse.RawDescriptionHelpFormatter):
    pass


if __name__ == "__main__":
    main()
