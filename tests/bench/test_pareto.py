"""docs/pareto.md says what was measured; a run goes on; bytes are of what stays."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

import kvprune
from bench import pareto
from bench.pareto import Cell
from kvprune.policies import AdaKV, SnapKV

from ..support.models import LAYERS, prompt, tiny_model


def test_the_page_says_what_the_results_say():
    """And its picture."""
    found = json.loads(pareto.RESULTS.read_text())["rows"]
    said = "run python -m bench.pareto --page"
    assert pareto.PAGE.read_text() == pareto.page(found), said
    assert pareto.PAGE.with_suffix(".svg").read_text() == pareto.picture(found), said
    assert all(row["samples"] >= 10 for row in found)


def test_what_is_measured():
    """Each policy at each share in each store; those that evict nothing once, and dense never."""
    found = pareto.cells(["none", "SDTP", "H2O"], [0.5, 0.25], ["plain", "quantized"])
    assert found[:3] == [("none", 1, "quantized"), ("SDTP", 1, "plain"), ("SDTP", 1, "quantized")]
    assert [cell.share for cell in found[3:]] == [0.5, 0.5, 0.25, 0.25]


@pytest.mark.parametrize("policies", [[SnapKV(0.25, window=2)], [AdaKV(SnapKV(0.25, window=2))]])
def test_bytes_count_keys_and_values_at_two_bytes_a_number(policies):
    """Of each head what it keeps; columns as they are."""
    model: Any = tiny_model()
    ids = prompt(1, 41)[0].tolist()
    cache = kvprune.ComposedCache(policies)
    _, share = pareto.scored(model, ids, [3, 4], cache)
    # Bytes are those behind 40 tokens, of which each head keeps 10 in the mean.
    slot = 2 * LAYERS * model.config.num_key_value_heads * model.config.head_dim
    again = kvprune.ComposedCache(policies)
    with torch.no_grad():
        model(torch.tensor([ids[:-1]]), past_key_values=again)
    whole, kept = 2 * 40 * slot, 10 * slot
    rest = again.nbytes - kept * model.dtype.itemsize
    assert share == pytest.approx((2 * kept + rest) / whole)


def line(task: str, policy: str, lost: float, held: float, share: float = 0.5) -> dict[str, Any]:
    """A row of the results."""
    row = {"task": task, "policy": policy, "share": share, "store": "plain", "samples": 10}
    return row | {"lost": lost, "low": lost - 0.1, "high": lost + 0.1, "bytes": held}


def test_the_front():
    """The mean of both tasks counts; a cell that lacks one is left out."""
    found = [
        line("squad", "SnapKV", 0.1, 0.25),
        line("hotpotqa", "SnapKV", 0.3, 0.25),
        line("squad", "H2O", 0.1, 0.5),
        line("hotpotqa", "H2O", 0.5, 0.5),
        line("squad", "Saliency", 0.0, 0.5),
        line("hotpotqa", "Saliency", 0.1, 0.5),
        line("squad", "SDTP", -1.0, 0.01),
    ]
    each = pareto.together(found)
    assert each[Cell("SnapKV", 0.5, "plain")]["lost"] == pytest.approx(0.2)
    assert [cell.policy for cell in pareto.best(each)] == ["SnapKV", "Saliency"]
    page = pareto.page(found)
    assert "| 0.250 | SnapKV | 0.5 | `plain` | 0.20 | 0.10 (0.00 to 0.20), 10 | 0.30" in page
    assert page.index("## All of them") < page.index("| 0.500 | H2O |")


def test_a_run_goes_on_where_it_was(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """What a file has is not measured again; another length is not counted."""
    work, asked = tmp_path / "work.jsonl", list[tuple[int, int]]()

    class Sample:
        def __init__(self, number: int) -> None:
            self.prompt, self.answers = [number, number + 1], ["yes"]

    class Task:
        @staticmethod
        def samples(tokenizer: Any, context: int, count: int, seed: int) -> list[Sample]:
            return [Sample(number) for number in range(count)]

    class Tokenizer:
        @staticmethod
        def encode(text: str, add_special_tokens: bool) -> list[int]:
            return [len(text)]

    def scored(model: Any, prompt: list[int], answer: list[int], cache: Any) -> tuple[float, float]:
        asked.append((prompt[0], len(cache.policies)))
        return -float(len(cache.policies)), 0.5

    monkeypatch.setattr(pareto, "task", lambda name: Task)
    monkeypatch.setattr(pareto, "scored", scored)
    cells = pareto.cells(["SnapKV"], [0.5], ["plain"])
    pareto.measured(None, Tokenizer, cells, 1, 64, work)
    assert asked == [(0, 0), (0, 1)] * 2  # dense and SnapKV, for both tasks
    pareto.measured(None, Tokenizer, cells, 2, 64, work)
    assert asked[4:] == [(1, 0), (1, 1)] * 2
    assert list(pareto.lines(work, 128)) == []
    found = pareto.rows(pareto.lines(work, 64))
    assert [(row["task"], row["samples"], row["lost"]) for row in found] == [
        ("squad", 2, 1.0),
        ("hotpotqa", 2, 1.0),
    ]
