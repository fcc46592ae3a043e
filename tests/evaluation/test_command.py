"""The command that a result is published with: no path of the machine that gave it."""

from __future__ import annotations

import argparse
import json
import re
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from bench import about
from kvprune.evaluation.command import command_line, without_places
from kvprune.evaluation.compare.worker import failed
from kvprune.evaluation.ledger.results import Cell

ROOT = Path(__file__).parents[2]
ON_A_MACHINE = re.compile(r"(?<![\w.])/(?:tmp|root|home|work)/[A-Za-z]")


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ("/home/me/out", "out"),
        ("/home/me/my out/", "my out"),
        ("--out=/home/me/out", "--out=out"),
        ("mine=/home/me/heads", "mine=heads"),
        ("sdtp(heads='/home/me/a',min_tokens=8)+h2o", "sdtp(heads='a',min_tokens=8)+h2o"),
        ("build/comparison", "build/comparison"),
        ("someone/model", "someone/model"),
        ("../out", "../out"),
        ("h2o|streaming", "h2o|streaming"),
        ("0.5", "0.5"),
        ("", ""),
        ("/", "/"),
    ],
)
def test_a_path_loses_its_place(given, said):
    """What is relative says nothing of a machine, nor do a model's names and specs."""
    assert without_places(given) == said


def test_a_path_below_the_current_folder_is_relative_to_it(tmp_path, monkeypatch):
    """The same command works there; one that is elsewhere keeps its last name."""
    monkeypatch.chdir(tmp_path)
    given = ["kvprune", "--out", f"{tmp_path}/a b/c", f"--tasks={tmp_path}/x.jsonl", f"{tmp_path}"]
    assert command_line(given) == "kvprune --out 'a b/c' --tasks=x.jsonl ."


def test_an_error_does_not_say_where_the_code_is():
    """But in which file, and in which line."""
    try:
        json.loads("{")
    except ValueError as error:
        said = failed(Cell("dense", "dense", None, "echo", 20), error).error
    assert re.search(r"\(decoder\.py:\d+\)$", said)


def test_a_benchmark_says_its_module_and_no_path(tmp_path, monkeypatch):
    """Where it is run with -m, as all of them are, and where it is not."""
    model = SimpleNamespace(dtype=torch.float32, device=torch.device("cpu"))
    monkeypatch.setattr(sys, "argv", [str(ROOT / "bench" / "saved.py"), "--out", "/home/me/x.json"])
    monkeypatch.setitem(sys.modules, "__main__", SimpleNamespace(__spec__=None))
    assert about.command() == "saved.py --out x.json"
    for name in ("bench.saved", "bench.saved.__main__"):
        main = SimpleNamespace(__spec__=SimpleNamespace(name=name))
        monkeypatch.setitem(sys.modules, "__main__", main)
        assert about.command() == "python -m bench.saved --out x.json"
    about.write(tmp_path / "x.json", argparse.Namespace(out=tmp_path / "x.json"), model, [])
    assert not ON_A_MACHINE.search((tmp_path / "x.json").read_text())


def test_nothing_that_is_published_names_a_place_on_a_machine():
    """Results, reports and pages."""
    folders = [ROOT / "docs", ROOT / "bench"]
    paths = [path for folder in folders for path in folder.rglob("*") if path.is_file()]
    texts = [p for p in paths if p.suffix in {".json", ".jsonl", ".html", ".md", ".svg", ".py"}]
    assert len(texts) > 50
    for path in [ROOT / "README.md", *texts]:
        found = ON_A_MACHINE.search(path.read_text(encoding="utf-8"))
        assert found is None, f"{path}: {found}"
