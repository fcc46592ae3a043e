"""Writes docs/all-families.md: every model type that transformers builds as a causal LM.

    python -m bench.all_families                 # all types, and the page
    python -m bench.all_families jetmoe beam     # some types, and no page

Each type is built tiny, with random weights in float64, and tried as
`tests/support/all_families.py` says; a type that takes too long is stopped. Nothing on the page is
written by hand.
"""

from __future__ import annotations

import sys
import warnings
from collections import defaultdict
from collections.abc import Iterable
from pathlib import Path

import torch
import transformers

from tests.support.all_families import COLUMNS, MODEL_TYPES, Outcome, outcome_of

PAGE = Path(__file__).parent.parent / "docs" / "all-families.md"

HEAD = """# All families

Every model type that transformers builds as a causal language model (`AutoModelForCausalLM`), tried
on a tiny random model in float64. Made by `python -m bench.all_families` (transformers
{transformers}, torch {torch}, CPU). Of {all} model types kvprune accepts {accepted} and refuses
{refused}; {unbuilt} could not be built tiny. [Model families](families.md) says more of those that
every change is tested on.

## Accepted

* **roomy = dense**: in `generate` with a padded row, with no policy and with budgets that are never
  reached: the tokens and logits of `DynamicCache`.
* **row alone**: a row in a padded batch gives the logits, and keeps the columns, that it does
  alone. "as stock": without kvprune the model itself does not, since it counts positions or chunks
  from the padding on.
* **the others**: the logits of every step, and the columns that are kept, are those of the
  [dense model in which what is gone is masked out](families.md).

"exact" means to a relative 1e-9 in float64; "-" that `attach` accepts the family, but not with that
policy, with an error that says why.

"""

REFUSED = """
## Refused

By `kvprune.attach`, with the reason in the error.

| reason | model types |
| --- | --- |
"""

UNBUILT = """
## Not built

As a tiny model alone, in the words of transformers.

| model type | why |
| --- | --- |
"""


def page(found: dict[str, Outcome]) -> str:
    """The text of the whole page."""
    accepted = {kind: o for kind, o in found.items() if o.accepted}
    refused = {kind: o for kind, o in found.items() if o.built and not o.accepted}
    unbuilt = {kind: o for kind, o in found.items() if not o.built}
    head = HEAD.format(
        transformers=transformers.__version__,
        torch=torch.__version__.split("+")[0],
        all=len(found),
        accepted=len(accepted),
        refused=len(refused),
        unbuilt=len(unbuilt),
    )
    lines = [_line(["model types", *COLUMNS, "notes"]), _line(["---"] * (len(COLUMNS) + 2))]
    by_cells = defaultdict(list)
    for kind, outcome in accepted.items():
        by_cells[(*(outcome.cells.get(c, "") for c in COLUMNS), _notes(outcome))].append(kind)
    lines += [_line([_names(kinds), *cells]) for cells, kinds in by_cells.items()]
    by_reason = defaultdict(list)
    for kind, outcome in refused.items():
        by_reason[outcome.reason].append(kind)
    reasons = [_line([reason, _names(kinds)]) for reason, kinds in by_reason.items()]
    whys = [_line([f"`{kind}`", outcome.reason]) for kind, outcome in unbuilt.items()]
    parts = ["\n".join(lines), REFUSED + "\n".join(reasons)]
    parts += [UNBUILT + "\n".join(whys)] if whys else []
    return head + "\n".join(parts) + "\n"


def _notes(outcome: Outcome) -> str:
    wrong = "; ".join(f"{column}: {error}" for column, error in outcome.wrong.items())
    return wrong or outcome.note


def _names(kinds: Iterable[str]) -> str:
    return ", ".join(f"`{kind}`" for kind in kinds)


def _line(cells: Iterable[str]) -> str:
    return f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in cells)} |"


def main(kinds: list[str]) -> int:
    """Tries the types, and writes the page if all were tried; returns 0, or 1 for a wrong one."""
    warnings.filterwarnings("ignore")
    transformers.logging.set_verbosity(50)  # type: ignore[attr-defined]
    torch.set_num_threads(1)
    found = {}
    for kind in kinds or MODEL_TYPES:
        outcome = found[kind] = outcome_of(kind)
        kept = ", ".join(outcome.cells.values()) or outcome.reason
        print(f"{kind}: {kept} {_notes(outcome)}".rstrip(), flush=True)
    if not kinds:
        PAGE.write_text(page(found))
        print(f"wrote {PAGE}")
    return int(any(outcome.wrong for outcome in found.values()))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
