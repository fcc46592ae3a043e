"""JetMoE, whose query head i reads key/value head i modulo their number, beyond the matrix."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

import kvprune
from kvprune.models import families
from kvprune.models.heads import as_before, neighbours
from kvprune.policies import H2O, StreamingLLM

from ..support.family_cells import close
from ..support.family_models import StaysDouble, attached_family, eager_family, family_model
from ..support.models import left_padded, prompt


@pytest.fixture(autouse=True)
def _exact() -> Iterator[None]:
    with torch.no_grad(), StaysDouble():
        yield


def test_the_order_of_heads():
    """From (copy, head) to (head, copy), and back."""
    heads = torch.arange(6).view(1, 6)
    assert neighbours(heads, 2).tolist() == [[0, 3, 1, 4, 2, 5]]
    assert torch.equal(as_before(neighbours(heads, 2), 2, axis=1), heads)


@pytest.mark.parametrize("policies", [[], [StreamingLLM(2, 4)], [H2O(500, 500)]], ids=str)
def test_shares_of_a_padded_batch_and_drafts(policies):
    """Prompt lookup: each draft is stored when its turn comes, and by its own heads."""
    model, ids = attached_family("jetmoe"), prompt(1, 6).repeat(1, 3)
    caches = [kvprune.ComposedCache(policies) for _ in range(2)]
    plain = model.generate(ids, cache=caches[0], max_new_tokens=8)
    drafts = model.generate(ids, cache=caches[1], max_new_tokens=8, prompt_lookup_num_tokens=3)
    assert torch.equal(plain, drafts)
    for layer in range(4):
        assert torch.equal(caches[0].columns(layer), caches[1].columns(layer))


def test_drafts_with_a_policy_that_observes():
    """Each key/value head keeps the same, and the tokens are the same."""
    model, ids = attached_family("jetmoe"), prompt(1, 6).repeat(1, 3)
    caches = [kvprune.ComposedCache([H2O(3, 3)]) for _ in range(2)]
    plain = model.generate(ids, cache=caches[0], max_new_tokens=8)
    drafts = model.generate(ids, cache=caches[1], max_new_tokens=8, prompt_lookup_num_tokens=3)
    assert torch.equal(plain, drafts)
    assert all(torch.equal(caches[0].columns(i), caches[1].columns(i)) for i in range(4))
    assert caches[0].columns(0).shape[1] == 2


def test_shares_with_a_padded_row():
    """A budget by row, and heads that part ways: as each row alone."""
    model, ids = attached_family("jetmoe"), prompt(2, 14)
    together = kvprune.ComposedCache([H2O(0.2, 0.2)])
    options = {"max_new_tokens": 3, "output_logits": True, "return_dict_in_generate": True}
    both = model.generate(**left_padded(ids, [0, 4]), cache=together, **options)
    alone = kvprune.ComposedCache([H2O(0.2, 0.2)])
    one = model.generate(ids[1:, 4:], cache=alone, **options)
    for mine, single in zip(both.logits, one.logits, strict=True):
        close(mine[1:], single)


@pytest.mark.parametrize("policies", [[], [H2O(500, 500)]], ids=str)
def test_mask_for_each_query_head(policies):
    """A 4-D one that the user gives is in the order of the model's query heads."""
    ids, generator = prompt(1, 9), torch.Generator().manual_seed(0)
    mask = torch.rand(1, 4, 9, 9, generator=generator) > 0.4
    mask = (mask | torch.eye(9, dtype=torch.bool)).tril()
    dense = torch.zeros(mask.shape, dtype=torch.float64).masked_fill(~mask, -1e9)
    expected = eager_family("jetmoe")(ids, attention_mask=dense).logits
    cache = kvprune.ComposedCache(policies)
    got = attached_family("jetmoe")(ids, attention_mask=mask, past_key_values=cache).logits
    close(got, expected)


def test_probabilities_are_in_the_model_s_order():
    """With the eager backend, which returns them."""
    ids, model = prompt(1, 9), kvprune.attach(family_model("jetmoe", "eager"))
    expected = eager_family("jetmoe")(ids, output_attentions=True).attentions
    cache = kvprune.ComposedCache()
    got = model(ids, past_key_values=cache, output_attentions=True).attentions
    for mine, dense in zip(got, expected, strict=True):
        close(mine, dense)


def test_heads_repeated_in_an_unknown_order(monkeypatch):
    """Refused with the reason, where a policy observes who reads what."""
    monkeypatch.setattr(families, "TILES_HEADS", set())
    model = kvprune.attach(family_model("jetmoe"))
    cache = kvprune.ComposedCache([H2O(3, 3)])
    with pytest.raises(kvprune.KVPruneError, match="stores 2 key/value heads and attends to 4"):
        model(prompt(1, 9), past_key_values=cache)
