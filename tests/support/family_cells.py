"""What is tried of a model family: one check, one cell of the tables in the docs.

A check raises where the family comes out wrong. `test_families.py` runs them for the families of
docs/families.md, `test_all_families.py` and `bench.all_families` for every model type.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

import kvprune
from kvprune.policies import H2O, StreamingLLM

from .family_oracle import FamilyOracle, Keeper, Local, RowByRow, h2o_keeper, streaming_keeper
from .models import LAYERS, left_padded, positions, prompt
from .strategies import sdtp_pruner

Policies = Callable[[], list[Any]]

CELLS: dict[str, tuple[Policies, Keeper | None]] = {
    "SDTP": (lambda: [sdtp_pruner(0.6)], None),
    "H2O": (lambda: [H2O(3, 3)], h2o_keeper(3, 3)),
    "StreamingLLM": (lambda: [StreamingLLM(2, 4)], streaming_keeper(2, 4)),
    "SDTP + H2O": (lambda: [sdtp_pruner(0.6), H2O(3, 3)], h2o_keeper(3, 3)),
}

ROOMY: dict[str, Policies] = {
    "no policy": list,
    "H2O": lambda: [H2O(500, 500)],
    "StreamingLLM": lambda: [StreamingLLM(4, 1000)],
    "SDTP": lambda: [sdtp_pruner(1.0)],
}


@dataclass(frozen=True, eq=False)
class Subject:
    """A family's models, all with the same weights, and what its caches hold.

    plain: not attached. attached: with kvprune. eager: not attached, with the eager backend, whose
    attention modules return probabilities. slots: by layer, how many key/value heads a cache
    holds. local: by layer, what its queries can see; None for everything. linear: the layers that
    keep a state instead of slots. tiled: query head i reads key/value head i modulo their number.
    """

    plain: PreTrainedModel
    attached: PreTrainedModel
    eager: PreTrainedModel
    slots: Sequence[int]
    local: Sequence[Local | None]
    linear: Sequence[int] = ()
    tiled: bool = False


def close(got: Tensor, expected: Tensor) -> None:
    """Within what float64 rounding explains, through four layers of weights this large."""
    torch.testing.assert_close(got, expected, rtol=1e-9, atol=1e-10)


def check_roomy(subject: Subject, policies: list[Any]) -> None:
    """In `generate`: the tokens and the logits of DynamicCache, with a padded row."""
    inputs = left_padded(prompt(2, 14), [0, 5])
    options = {"max_new_tokens": 6, "output_logits": True, "return_dict_in_generate": True}
    plain: Any = subject.plain
    expected = plain.generate(**inputs, **options)
    got = _generate(subject, inputs, kvprune.ComposedCache(policies), **options)
    assert torch.equal(got.sequences, expected.sequences)
    for mine, dense in zip(got.logits, expected.logits, strict=True):
        close(mine, dense)


def check_row(subject: Subject, policies: list[Any]) -> None:
    """A row in a padded batch gives the logits, and keeps the columns, that it does alone."""
    ids = prompt(2, 14)
    options = {"max_new_tokens": 6, "output_logits": True, "return_dict_in_generate": True}
    together, alone = kvprune.ComposedCache(policies), kvprune.ComposedCache(policies)
    both = _generate(subject, left_padded(ids, [0, 5]), together, **options)
    one = _generate(subject, left_padded(ids[1:, 5:], [0]), alone, **options)
    for mine, single in zip(both.logits, one.logits, strict=True):
        close(mine[1:], single)
    for layer in set(range(len(subject.slots))) - set(subject.linear):
        # Heads part ways where another row's do.
        heads = subject.slots[layer]
        columns, kept = (c.columns(layer)[-1:].expand(-1, heads, -1) for c in (together, alone))
        assert torch.equal(columns[columns >= 0], kept[kept >= 0] + 5)


def stock_rows_stand_alone(subject: Subject) -> bool:
    """Whether the model itself gives a row in a padded batch the logits that it has alone.

    Not those that count positions, or chunks of attention, from the padding on.
    """
    ids, plain = prompt(2, 14), subject.plain
    options = {"max_new_tokens": 2, "output_logits": True, "return_dict_in_generate": True}
    both: Any = plain.generate(**left_padded(ids, [0, 5]), **options)  # type: ignore[operator]
    one: Any = plain.generate(ids[1:, 5:], **options)  # type: ignore[operator]
    return all(torch.allclose(a[1:], b) for a, b in zip(both.logits, one.logits, strict=True))


def oracle_of(subject: Subject, cell: str, rows: int = 2) -> FamilyOracle | RowByRow:
    """The dense model with masks; where layers keep a state, one without the pruned tokens."""
    make, keeper = CELLS[cell]
    pruner = make()[0] if "SDTP" in cell else None
    arguments = (subject.eager, subject.slots, pruner, keeper, subject.local, subject.linear)
    if subject.linear and pruner is not None:
        return RowByRow(*arguments, subject.tiled, rows=rows)
    return FamilyOracle(*arguments, subject.tiled)


def check_against_the_oracle(subject: Subject, cell: str) -> None:
    """`generate`, then a second turn of several tokens: logits and columns of every step."""
    policies = CELLS[cell][0]()
    # With states, a second turn is pruned in a single row only.
    for rows in (2, 1) if subject.linear else (2,):
        oracle = oracle_of(subject, cell, rows)
        cache = kvprune.ComposedCache(policies)
        _check_generate(subject, cache, oracle, left_padded(prompt(rows, 16), [0, 5][:rows]))
        _check_columns(subject, cache, oracle)
        if isinstance(oracle, FamilyOracle) or rows == 1:
            _check_second_turn(subject, cache, oracle)
            _check_columns(subject, cache, oracle)


def _generate(subject: Subject, inputs: Any, cache: Any, **options: Any) -> Any:
    model: Any = subject.attached
    return model.generate(**inputs, cache=cache, **options)


def _check_generate(subject: Subject, cache: Any, oracle: Any, inputs: dict[str, Tensor]) -> None:
    """Five tokens of `generate`, logits step by step."""
    options = {"max_new_tokens": 5, "output_logits": True, "return_dict_in_generate": True}
    out = _generate(subject, inputs, cache, **options)
    close(out.logits[0], oracle.forward(inputs["input_ids"], inputs["attention_mask"])[:, -1])
    one = torch.ones_like(inputs["input_ids"][:, :1])
    for step in range(1, 5):
        token = out.sequences[:, 15 + step : 16 + step]
        close(out.logits[step], oracle.forward(token, one)[:, -1])


def _check_second_turn(subject: Subject, cache: Any, oracle: Any) -> None:
    """A forward of several tokens, and one of a single token."""
    for count in (8, 1):
        new = prompt(oracle.mask.shape[0], count, seed=count)
        expected = oracle.forward(new, torch.ones_like(new))[:, -1]
        options = {"attention_mask": oracle.mask}
        if oracle.takes_positions:
            options["position_ids"] = positions(oracle.mask)[:, -count:]
        output = subject.attached(new, past_key_values=cache, logits_to_keep=1, **options)
        close(output.logits[:, -1], expected)


def _check_columns(subject: Subject, cache: Any, oracle: Any) -> None:
    """Every layer with slots, row and head."""
    for layer in set(range(LAYERS)) - set(subject.linear):
        heads = subject.slots[layer]
        columns = cache.columns(layer).expand(-1, heads, -1)
        for row in range(oracle.mask.shape[0]):
            for head in range(heads):
                kept = [int(c) for c in columns[row, head] if c >= 0]
                assert kept == oracle.kept(layer, row, head)
