"""docs/parity.md says what was measured, and pairs that differ are counted right."""

from __future__ import annotations

import json

import torch

from bench import parity


def test_the_page_says_what_the_results_say():
    """Each method has a row, and each number of the table is from the results."""
    rows = json.loads(parity.RESULTS.read_text())["rows"]
    assert [row["name"] for row in rows] == list(parity.ROWS)
    assert parity.PAGE.read_text() == parity.page(rows), "run python -m bench.parity --page"


def test_equal_methods_keep_the_same():
    """Where nothing is said to differ, only ties do."""
    rows = {row["name"]: row for row in json.loads(parity.RESULTS.read_text())["rows"]}
    equal = [name for name, row in parity.ROWS.items() if not row.differs]
    assert len(equal) == 12 and set(parity.ROWS) == set(parity.PRESSES)
    for name in equal:
        assert rows[name]["untied"] == 0 and rows[name]["kept"] == rows[name]["theirs"] > 0


def test_rows_are_policies():
    """Every spec of a row can be read."""

    class Tokenizer:
        chat_template = None

        @staticmethod
        def decode() -> None: ...

        @staticmethod
        def encode(text: str, add_special_tokens: bool) -> list[int]:
            return [len(text)]

    for row in parity.ROWS.values():
        assert parity.policy_of(row, Tokenizer()).evicts


def test_pairs_that_differ():
    """Those with a score like that of the last pair kept are ties, the others are not."""
    scores = torch.tensor([[[3.0, 2.0, 2.0, 1.0]]])
    theirs = torch.tensor([[[True, True, False, False]]])
    for mine, differ, untied in (
        ([True, True, False, False], 0, 0),
        ([True, False, True, False], 2, 0),
        ([True, False, False, True], 2, 1),
        ([False, True, True, False], 2, 1),
    ):
        found = {"some": theirs, "some.scores": scores}
        row = parity.compared("some", torch.tensor([[mine]]), found)
        assert (row["differ"], row["untied"]) == (differ, untied)
    # Without scores nothing can be said; a score that is no number is no tie.
    mine = torch.tensor([[[True, False, True, False]]])
    assert parity.compared("some", mine, {"some": theirs})["untied"] is None
    assert parity.compared("some", theirs, {"some": theirs})["untied"] == 0
    broken = scores.masked_fill(~theirs, torch.nan)
    assert parity.compared("some", mine, {"some": theirs, "some.scores": broken})["untied"] == 1
