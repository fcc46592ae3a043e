"""The code blocks of README and docs: found, run, and where they cannot be run, checked.

What a page says to this, in HTML comments that no reader sees:

* `<!-- given: name, model -->`: what its Python blocks find there already (`GIVEN`).
* `<!-- not run: reason -->` before a block: it is left out, and the reason is shown.
* `<!-- file: path -->` before a block: it is written to that file of a scratch copy of the
  repository; a `diff` block is applied to the file.
* `<!-- run -->` before a `bash` block: it is run, in that copy.

Python blocks of a page run in order in one namespace. Commands that are not run must exist, with
their options, targets, extras and files.
"""

from __future__ import annotations

import importlib.util
import json
import re
import shlex
import shutil
import subprocess
import sys
import tomllib
import types
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import typer
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast

import kvprune
from kvprune.cli import app
from kvprune.policies.duoattention import HeadScores
from kvprune.policies.kvzap import KVzapGates

from .models import LAYERS, VOCAB, fresh_model, prompt
from .strategies import sdtp_heads

ROOT = Path(__file__).parents[2]
PAGES = sorted(
    str(path.relative_to(ROOT))
    for pattern in ("*.md", "docs/**/*.md", "policies/**/*.md")
    for path in ROOT.glob(pattern)
)
LANGUAGES = {"python", "bash", "diff", "toml", "json", "text", "math"}
COPIED = ("kvprune", "policies", "tests", "pyproject.toml", "README.md")
READERS: dict[str, Callable[[str], Any]] = {"toml": tomllib.loads, "json": json.loads}
TEXT = " ".join(["5 6 7 8 9"] * 30)


class BrokenBlock(AssertionError):
    """A page says what is not so; the message begins with the page and the line."""


@dataclass(frozen=True)
class Block:
    """A fenced block: where its code begins, and what the page says of it."""

    page: str
    line: int
    language: str
    code: str
    orders: dict[str, str] = field(default_factory=dict)

    @property
    def where(self) -> str:
        return f"{self.page}:{self.line}"


FENCE = re.compile(r"^( *)```(\w*)[^\n]*\n(.*?)^\1```$", re.DOTALL | re.MULTILINE)
ORDER = re.compile(r"<!-- (not run|file|run|given)(?:: ?(.*?))? -->\s*$")


def blocks_of(page: str, text: str) -> list[Block]:
    """The blocks of a page, dedented, each with the orders that stand right before it."""
    found = []
    for fence in FENCE.finditer(text):
        line = text.count("\n", 0, fence.start(3)) + 1
        code = re.sub(rf"^{fence[1]}", "", fence[3], flags=re.MULTILINE)
        before, orders = text[: fence.start()], {}
        while order := ORDER.search(before):
            orders[order[1]] = order[2] or ""
            before = before[: order.start()]
        found.append(Block(page, line, fence[2], code, orders))
    return found


# What a page may ask for.


def _name(folder: Path) -> str:
    """The path of a tiny model with a tokenizer, whose words are numbers."""
    place = folder / "model"
    if not place.exists():
        fresh_model(dtype=torch.float32).save_pretrained(place)
        words = {"[UNK]": 0, **{str(i): i for i in range(1, VOCAB)}}
        tokenizer = Tokenizer(models.WordLevel(words, unk_token="[UNK]"))
        tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
        fast = PreTrainedTokenizerFast(
            tokenizer_object=tokenizer, unk_token="[UNK]", pad_token="[UNK]", padding_side="left"
        )
        fast.save_pretrained(place)
    return str(place)


def _model(folder: Path) -> Any:
    return kvprune.attach(AutoModelForCausalLM.from_pretrained(_name(folder)))


def _heads(folder: Path) -> Path:
    sdtp_heads().float().save_pretrained(folder / "heads")
    return folder / "heads"


def _gates(folder: Path) -> Path:
    KVzapGates(LAYERS, 32, 2, hidden=4).save(folder / "gates")
    return folder / "gates"


def _scores(folder: Path) -> HeadScores:
    scores = HeadScores(torch.rand(LAYERS, 2))
    scores.save(folder / "heads.safetensors")
    return scores


GIVEN: dict[str, Callable[[Path], Any]] = {
    "name": _name,
    "model": _model,
    "tokenizer": lambda folder: AutoTokenizer.from_pretrained(_name(folder)),
    "inputs": lambda folder: {"input_ids": prompt(1, 150)},
    "ids": lambda folder: prompt(1, 150),
    "long_text": lambda folder: TEXT,
    "prompts": lambda folder: [TEXT, TEXT[:80]],
    "system_ids": lambda folder: prompt(1, 40),
    "question_ids": lambda folder: prompt(1, 6, 1),
    "heads": _heads,
    "gates": _gates,
    "scores": _scores,
}


def given(text: str, folder: Path) -> dict[str, Any]:
    """What the page says is there."""
    asked = re.search(r"^<!-- given: (.*?) -->$", text, re.MULTILINE)
    names = asked[1].split(", ") if asked else []
    if unknown := sorted(set(names) - set(GIVEN)):
        raise BrokenBlock(f"given: {unknown}: expected some of {sorted(GIVEN)}")
    return {name: GIVEN[name](folder) for name in names}


# Running a page.


def run_page(page: str, text: str, folder: Path) -> dict[str, Any]:
    """Runs and checks every block of a page, in order.

    Args:
        page: its name, for messages.
        text: its Markdown.
        folder: an empty one, which is the current one.

    Returns:
        what its Python blocks have made.

    Raises:
        BrokenBlock: at the first block that is not right.
    """
    module = types.ModuleType(f"page_{abs(hash(page))}")
    sys.modules[module.__name__] = module  # where a dataclass looks for its names
    try:
        module.__dict__.update(given(text, folder))
        for block in blocks_of(page, text):
            _do(block, module.__dict__, folder)
        return dict(module.__dict__)
    finally:
        del sys.modules[module.__name__]


def _do(block: Block, names: dict[str, Any], folder: Path) -> None:
    try:
        if block.language not in LANGUAGES:
            raise BrokenBlock(f"expected a block of {sorted(LANGUAGES)}, to be sure what it is")
        if "not run" in block.orders:
            if not block.orders["not run"].strip():
                raise BrokenBlock("not run: expected a reason")
        elif "file" in block.orders:
            _write(block, _copy(folder) / block.orders["file"])
        elif "run" in block.orders:
            _run(block.code, _copy(folder))
        elif block.language == "bash":
            for command in commands(block.code):
                check_command(command)
        elif block.language in READERS:
            READERS[block.language](block.code)
        elif block.language == "python":
            # Empty lines first, so that a traceback names the page's own lines.
            exec(compile("\n" * (block.line - 1) + block.code, block.page, "exec"), names)
    except Exception as error:
        # Some of typer's errors name the option here alone.
        said = getattr(error, "format_message", error.__str__)()
        raise BrokenBlock(f"{block.where}: {type(error).__name__}: {said}") from error


def _copy(folder: Path) -> Path:
    """The scratch copy of the repository, made when it is first asked for."""
    copy = folder / "repository"
    for name in COPIED if not copy.exists() else ():
        if (ROOT / name).is_dir():
            ignored = shutil.ignore_patterns("__pycache__")
            shutil.copytree(ROOT / name, copy / name, symlinks=True, ignore=ignored)
        else:
            shutil.copy(ROOT / name, copy / name)
    return copy


def _write(block: Block, place: Path) -> None:
    if block.language != "diff":
        if place.exists():
            raise BrokenBlock(f"{place.name} is there already")
        place.write_text(block.code)
        return
    lines = block.code.splitlines(keepends=True)
    old = "\n" + "".join(line[1:] for line in lines if line[0] != "+")
    new = "\n" + "".join(line[1:] for line in lines if line[0] != "-")
    text = place.read_text()
    if text.count(old) != 1:
        raise BrokenBlock(f"{place.name} has these lines {text.count(old)} times: {old!r}")
    place.write_text(text.replace(old, new))


def _run(code: str, where: Path) -> None:
    path = f'export PATH={shlex.quote(str(Path(sys.executable).parent))}:"$PATH"\n'
    done = subprocess.run(
        ["bash", "-euc", path + code], cwd=where, capture_output=True, text=True, check=False
    )
    if done.returncode != 0:
        raise BrokenBlock(f"exit status {done.returncode}\n{done.stdout}{done.stderr}")


# Commands that are looked at, not run.


def commands(code: str) -> Iterator[list[str]]:
    """The words of each command of a shell block."""
    for line in code.replace("\\\n", " ").splitlines():
        if words := shlex.split(line, comments=True):
            yield words


def check_command(words: list[str], whole: bool = True) -> None:
    """Refuses a command that is not there.

    Args:
        words: the command and its arguments.
        whole: whether all that it needs must be among them, or it is only named.

    Raises:
        BrokenBlock: no such command, target, extra, module, option or file.
    """
    checks = {"make": _make, "pip": _pip, "kvprune": _kvprune, "python": _python}
    if words[0] not in checks:
        raise BrokenBlock(f"{words[0]!r}: expected one of {sorted(checks)}")
    if words[0] == "kvprune" and not whole:
        _kvprune([*words[1:2], "--help"])
    else:
        checks[words[0]](words[1:])


def _make(words: list[str]) -> None:
    targets = re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE)
    for word in words:
        if "=" not in word and word not in targets:
            raise BrokenBlock(f"make {word}: expected one of {targets}")


def _pip(words: list[str]) -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = set(project["optional-dependencies"])
    named = set(re.findall(r"[\w-]+", "".join(re.findall(r"\[(.*?)\]", " ".join(words)))))
    if words[:1] != ["install"] or not named <= extras:
        raise BrokenBlock(f"pip {' '.join(words)}: expected install, and extras of {extras}")
    for word in words:
        if word.endswith(".txt") and not (ROOT / word).exists():
            raise BrokenBlock(f"pip: there is no {word}")


def _kvprune(words: list[str]) -> None:
    group: Any = typer.main.get_command(app)
    if not words or words[0] not in group.commands:
        raise BrokenBlock(f"kvprune {' '.join(words)}: expected one of {list(group.commands)}")
    if words[1:] != ["--help"]:
        # Reads the options, and calls nothing.
        group.commands[words[0]].make_context(words[0], list(words[1:]))


def _python(words: list[str]) -> None:
    if words[:1] != ["-m"]:
        raise BrokenBlock(f"python {' '.join(words)}: expected -m and a module")
    spec = importlib.util.find_spec(words[1])
    if spec is None or spec.origin is None:
        raise BrokenBlock(f"python -m {words[1]}: there is no such module")
    if words[1].startswith("bench."):
        source = Path(spec.origin).read_text()
        for option in (w for w in words[2:] if w.startswith("--")):
            if f'"{option}"' not in source:
                raise BrokenBlock(f"python -m {words[1]}: it has no option {option}")
