"""What README and CONTRIBUTING say is true today."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path
from typing import Any

import torch
import yaml

import kvprune
from kvprune.evaluation import demo
from kvprune.policies import H2O

from .bad_input.test_models import REFUSED
from .support.code_blocks import GIVEN, blocks_of
from .support.family_cells import CELLS
from .support.family_models import CANNOT_PRUNE, FAMILIES
from .support.models import prompt, tiny_model
from .support.strategies import sdtp_heads

ROOT = Path(__file__).parent.parent


def code_blocks(name: str) -> list[str]:
    """The Python blocks of a document, dedented."""
    blocks = blocks_of(name, (ROOT / name).read_text())
    return [block.code for block in blocks if block.language == "python"]


def test_the_readme_s_tree_is_true():
    """Each folder and file at the top of the package is in it, and each that it names is there."""
    text = (ROOT / "README.md").read_text()
    tree = text[text.index("## Where things are") :]
    lines = re.findall(r"^  (\w+\.py|\w+/|\w+) ", tree, re.MULTILINE)
    on_disk = {p.name + ("/" if p.is_dir() and not p.is_symlink() else "") for p in entries()}
    assert on_disk == set(lines)
    folders = re.search(r"^  evaluation/ (.*)$", tree, re.M)
    assert folders is not None
    found = {p.name for p in (ROOT / "kvprune" / "evaluation").iterdir() if p.is_dir()}
    assert found - {"__pycache__"} == set(re.findall(r"(\w+)/", folders[1]))


INTERNALS = (
    "cli",
    "wiring",
    "cache",
    "engine",
    "positions",
    "storage",
    "attention",
    "policy",
    "models",
)


def test_the_internals_page_lists_every_file():
    """Of the engine's folders, those that are there and no other; paths that it names are there."""
    text = (ROOT / "docs" / "internals.md").read_text()
    table = text[: text.index("## The way of a token")]
    named = set(re.findall(r"`(\w+\.py)`", table))
    there = {p.name for f in INTERNALS for p in (ROOT / "kvprune" / f).glob("*.py")}
    tops = {p.name for p in (ROOT / "kvprune").glob("*.py")}
    assert named == (there | tops) - {"__init__.py"}
    for path in re.findall(r"`(\w+/\w+\.py)`", text):
        assert (ROOT / path).exists() or (ROOT / "kvprune" / path).exists(), path


def test_the_table_of_families_lists_what_is_tested():
    """A row for each family of the tests, a column for each kind of cell, and the refused ones."""
    text = (ROOT / "docs" / "families.md").read_text()
    works, refused = text.split("## Refused")
    columns = re.search(r"^\| family \| class \| (.*) \| notes \|$", works, re.M)
    assert columns is not None
    assert columns[1].split(" | ") == ["roomy = dense", *CELLS]
    rows = dict(re.findall(r"^\| `([\w-]+)` \| \w+ \| (.*) \| .*\|$", works, re.M))
    assert list(rows) == list(FAMILIES)
    for family, cells in rows.items():
        prunes = "-" if family in CANNOT_PRUNE else "exact"
        expected = ["exact", *(prunes if "SDTP" in cell else "exact" for cell in CELLS)]
        assert cells.split(" | ") == expected
    names = re.findall(r"^\| `(\w+)` \| \w.* \|$", refused, re.M)
    assert names == [family for family in REFUSED if "-" not in family]
    assert "(docs/families.md)" in (ROOT / "README.md").read_text()


def entries() -> list[Path]:
    """What lies in the package's folder, but for what Python itself puts there."""
    ignored = {"__init__.py", "__pycache__", "py.typed"}
    return [p for p in (ROOT / "kvprune").iterdir() if p.name not in ignored]


def test_the_readme_s_first_commands_exist():
    """`make demo` and `make test` come first, and the Makefile has both."""
    first = re.findall(r"make ([\w-]+)", (ROOT / "README.md").read_text())[:2]
    assert first == ["demo", "test"]
    targets = re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE)
    assert set(first) <= set(targets)


def test_the_readme_shows_the_demo_s_table():
    """A row for each configuration of the demo."""
    text = (ROOT / "README.md").read_text()
    table = text[text.index("<!-- demo -->") : text.index("<!-- /demo -->")]
    for row in demo.WITH_HEADS:
        numbers = r"[\d.]+ \| [\d.]+ \| [\d.]+ \| [\d.]+% \| \d of 3 \|$"
        assert re.search(rf"^\| {re.escape(row.name)} \| {numbers}", table, re.MULTILINE), row.name


def test_the_readme_s_ten_lines_run(tmp_path, monkeypatch, capsys):
    """As they stand, on a tiny model with a tiny tokenizer."""
    monkeypatch.chdir(tmp_path)
    given: dict[str, Any] = {name: GIVEN[name](tmp_path) for name in ("name", "long_text")}
    block = code_blocks("README.md")[0]
    assert len(block.strip().splitlines()) <= 12
    # No heads ship for the tiny model.
    given["heads"] = sdtp_heads().float()
    exec(block.replace("SDTP()", "SDTP(heads)"), given)
    assert given["cache"].seen == 150 + 127
    assert "layers 0-3: 30/277 slots" in capsys.readouterr().out


def test_a_saved_prompt_goes_on(tmp_path, monkeypatch):
    """As docs/saving.md has it: the tokens are those of a cache that was never saved."""
    monkeypatch.chdir(tmp_path)
    model: Any = tiny_model()
    ids = {"system_ids": prompt(1, 40), "question_ids": prompt(1, 6, 1)}
    (block,) = code_blocks("docs/saving.md")
    given: dict[str, Any] = {"model": model, **ids}
    exec(block, given)
    cache = kvprune.ComposedCache([H2O(heavy=0.1, recent=0.1)])
    with torch.no_grad():
        model(ids["system_ids"], past_key_values=cache, logits_to_keep=1)
    whole = torch.cat([*ids.values()], 1)
    model.generate(whole, cache=cache, max_new_tokens=64)
    assert given["cache"].seen == cache.seen == 109
    assert torch.equal(given["cache"].columns(2), cache.columns(2))


def test_the_citation_is_of_this_version():
    """In CITATION.cff and in BibTeX."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert citation["version"] == project["version"] and citation["license"] == project["license"]
    assert {"cff-version", "message", "title", "authors"} <= set(citation)
    assert f"version = {{{project['version']}}}" in (ROOT / "docs" / "citing.md").read_text()
