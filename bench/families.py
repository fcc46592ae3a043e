"""Writes docs/families.md: which model families work, as the tests find it.

    python -m bench.families

The command runs `tests/models/test_families.py`, one test per cell, and tries the refusals of
`tests/bad_input/test_models.py`; only the notes in the table are written by hand.
"""

from __future__ import annotations

import json
import sys
from collections import defaultdict
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from transformers import AutoModel

import kvprune
from tests.bad_input.test_models import REFUSED
from tests.support import family_models as models
from tests.support.family_cells import CELLS
from tests.support.models import tiny_config

from . import releases

ROOT = Path(__file__).parent.parent
TABLE = ROOT / "docs" / "families.md"
DENSE = "roomy = dense"
COLUMNS = (DENSE, *CELLS)
CELL_TESTS = {
    "test_roomy_equals_the_dense_model": "roomy",
    "test_family_against_the_oracle": "cell",
}

HEAD = """# Model families

Made by `python -m bench.families` from the tests' outcomes (transformers {transformers}, torch
{torch}, CPU). Each cell is a test on a tiny random model of four layers in float64, with a padded
row, through `generate` and a second turn:

* **roomy = dense**: with no policy, and with budgets that are never reached, the tokens and logits
  of `DynamicCache`.
* **the others**: every step's logits, and the columns that every layer, row and head holds, are
  those of a naive oracle: the dense model reading everything anew without a cache, where a mask in
  each layer hides from each query what had been dropped before.

"exact" means to a relative 1e-9 in float64; "-" that the family refuses that policy, with an error
that says why. The kept set is by key/value head as the cache stores it; the notes say where that
is not the model's own number of key/value heads.

[All families](all-families.md) says of every model type in transformers whether it is accepted,
with the same cells.

"""

RELEASES = """
## transformers releases

Tests that passed on each supported release, by test file (`python -m bench.releases all --record`).

"""

COMPOSITIONS = """
## Compositions

Six pipelines of the policies that ship, unions and `layers=` splits among them, run in `generate`
on every family above: a row in a padded batch as it does alone, with beams, and with drafts (prompt
lookup) as without. Refused by name are, on `bloom` and the three `falcon`, policies that read
queries (`SnapKV`, `PyramidKV`, `FastKV`, `ExpectedAttention`), since their attention shows none;
`ExpectedAttention` on `deepseek_v3`, which stores latent keys; drafts on all of these, and on
models with linear layers; pruning where the table has "-".
"""

PICTURES = """
## Vision-language models

`attach` takes `llava`, `qwen2_vl`, `qwen2_5_vl`, `gemma3` and `smolvlm` whole, and prunes and
evicts in the language model within, tokens of pictures among others: dense, `SnapKV` then `H2O`,
`FastKV` then `TOVA`, `SDTP` then `Knorm`, `ExpectedAttention` and positions inside the cache, each
as a row alone and padded, with beams and with drafts (tests/models/test_pictures.py). Where each
token of a picture has several positions (mrope, in `qwen2_vl` and `qwen2_5_vl`), the last two are
refused with pictures, and run on text. Other vision-language models are refused by name: attach the
language model within by itself.
"""

REFUSALS = """
## Refused

`kvprune.attach` refuses these by name, and says why; so it does other families whose layers it
cannot follow.

| model type | reason |
| --- | --- |
"""


class Outcomes:
    """A pytest plugin that notes the outcomes of each cell, in `found[family][column]`."""

    def __init__(self) -> None:
        self.found: dict[str, dict[str, list[str]]] = defaultdict(lambda: defaultdict(list))
        self._cells: dict[str, tuple[str, str]] = {}

    def pytest_collection_modifyitems(self, items: list[Any]) -> None:
        """Notes which test belongs to which cell."""
        for item in items:
            parameter = CELL_TESTS.get(getattr(item, "originalname", ""))
            if parameter is not None:
                values = item.callspec.params
                column = DENSE if parameter == "roomy" else values[parameter]
                self._cells[item.nodeid] = (values["family"], column)

    def pytest_runtest_logreport(self, report: Any) -> None:
        """Notes the outcome of a test."""
        if report.when == "call" and report.nodeid in self._cells:
            family, column = self._cells[report.nodeid]
            self.found[family][column].append(report.outcome)


def row(family: str, found: dict[str, list[str]]) -> str:
    """One family's line of the table."""
    name = type(models.plain_family(family)).__name__
    cells = [_cell(family, column, found[column]) for column in COLUMNS]
    return f"| `{family}` | {name} | {' | '.join(cells)} | {models.NOTES.get(family, '')} |"


def _cell(family: str, column: str, outcomes: list[str]) -> str:
    if set(outcomes) != {"passed"}:
        return "**fails**"
    return "-" if "SDTP" in column and family in models.CANNOT_PRUNE else "exact"


def reason(family: str) -> str:
    """The reason why a family is refused, in the words of the error."""
    model = AutoModel.from_config(tiny_config(family, **REFUSED[family][1]))
    with pytest.raises(kvprune.KVPruneError) as refused:
        kvprune.attach(model)
    message = str(refused.value)
    return message.partition("is not supported: ")[2].partition(". Expected")[0]


def table(found: dict[str, dict[str, list[str]]]) -> str:
    """The text of the whole page."""
    header = ["family", "class", *COLUMNS, "notes"]
    lines = [f"| {' | '.join(header)} |", f"|{' --- |' * len(header)}"]
    lines += [row(family, found[family]) for family in models.FAMILIES]
    head = HEAD.format(transformers=transformers.__version__, torch=torch.__version__.split("+")[0])
    refused = [f"| `{f}` | {reason(f)} |" for f in REFUSED if "-" not in f]
    run = releases.table(json.loads(releases.RESULTS.read_text()))
    found_on = RELEASES + run + "\n" + COMPOSITIONS + PICTURES
    return head + "\n".join(lines) + "\n" + found_on + REFUSALS + "\n".join(refused) + "\n"


def main() -> int:
    """Runs the tests and writes the page; the exit code is not 0 where a cell fails."""
    outcomes = Outcomes()
    torch.set_num_threads(1)
    tests = str(ROOT / "tests" / "models" / "test_families.py")
    status = pytest.main(
        ["-q", "-m", "", "-p", "no:cacheprovider", tests],
        plugins=[outcomes],
    )
    TABLE.parent.mkdir(exist_ok=True)
    TABLE.write_text(table(outcomes.found))
    print(f"wrote {TABLE}")
    return int(status)


if __name__ == "__main__":
    sys.exit(main())
