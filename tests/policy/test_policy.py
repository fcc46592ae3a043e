"""The strategy interface: budgets, helpers, what a policy may look like."""

from __future__ import annotations

from dataclasses import dataclass
from decimal import Decimal

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import kvprune
from kvprune.policies import H2O, StreamingLLM
from kvprune.policy import Budget, newest
from kvprune.statistics import Attention

from ..support.models import LAYERS, prompt, tiny_model
from ..support.oracles import budget_oracle

HUNDREDTHS = [float(Decimal(i) / 100) for i in range(1, 101)]


@pytest.mark.parametrize("part", [0, 1, 5, 1000, *HUNDREDTHS, 0.125, 0.0625, 0.333, 1 / 3, 2 / 3])
def test_budgets_are_exact_over_all_small_prompts(part):
    """A share is rounded to the nearest token, halves up; never `int(100 * (1 - 0.8))`."""
    lengths = list(range(301))
    tokens = Budget(part, least=0).of(torch.tensor(lengths)).tolist()
    assert tokens == [budget_oracle(part, n) for n in lengths]


def test_a_share_of_a_very_long_prompt_does_not_overflow():
    """A third of four billion tokens."""
    assert Budget(1 / 3).of(torch.tensor([4 * 10**9])).tolist() == [1_333_333_333]


@given(
    st.lists(st.permutations(range(-2, 9)), min_size=4, max_size=4),
    st.lists(st.integers(0, 12), min_size=4, max_size=4),
    st.sampled_from(["row", "head", "same"]),
    st.lists(st.lists(st.integers(1, 2), min_size=9, max_size=9), min_size=4, max_size=4),
    st.lists(st.integers(0, 3), min_size=4, max_size=4),
)
def test_newest_is_by_column_whatever_the_order(columns, counts, kind, apart, empty):
    """Empty slots do not count. In every row and head other gaps, or none, and other numbers."""
    nth = torch.cat([torch.full((4, 1), -1), torch.tensor(apart).cumsum(-1)], -1)
    place = (torch.tensor(columns) - torch.tensor(empty)[:, None]).clamp(min=-1) + 1
    shown = nth.gather(1, place).view(2, 2, -1)
    count = torch.tensor(counts).view(2, 2)
    count = {"row": count[:, 0], "head": count, "same": count[:1, 0].expand(2)}[kind]
    mask = newest(shown, count)
    for row in range(2):
        for head in range(2):
            n = int(count[row] if count.dim() == 1 else count[row, head])
            kept = shown[row, head][mask[row, head]].tolist()
            there = sorted(c for c in shown[row, head].tolist() if c >= 0)
            assert sorted(kept) == there[max(len(there) - n, 0) :]


def test_repr_can_be_read_and_typed():
    """Fields in the order of the constructor; `layers` only where it restricts."""
    assert repr(H2O()) == "H2O(heavy=0.1, recent=0.1, positions='original')"
    assert repr(H2O(3, 4, layers=[1])) == "H2O(heavy=3, recent=4, positions='original', layers=[1])"
    assert repr(H2O() | StreamingLLM()) == (
        "H2O(heavy=0.1, recent=0.1, positions='original') | "
        "StreamingLLM(sinks=4, window=1020, positions='original')"
    )
    assert eval(repr(H2O(3, 4, layers=[1]))) == H2O(3, 4, layers=[1])


class Ordinary(kvprune.TokenPolicy):
    """Keeps the newest; an ordinary class with an `__init__` of its own."""

    def __init__(self, count, layers=None):
        super().__init__(layers=layers)
        self.count = count

    def rank_slots(self, slots):
        """Columns rank."""
        budget = torch.full_like(slots.first, self.count)
        return kvprune.Ranking(slots.columns.double(), torch.zeros_like(slots.valid), budget)


class WithoutInit(Ordinary):
    """An `__init__` that hands nothing on."""

    def __init__(self):
        self.count = 5


@dataclass(frozen=True)
class Frozen(kvprune.TokenPolicy):
    """The same as a frozen dataclass, which need not name `layers`."""

    count: int = 5

    rank_slots = Ordinary.rank_slots


@pytest.mark.parametrize(
    ("policy", "expected"),
    [
        (Ordinary(5), [5, 5, 5, 5]),
        (WithoutInit(), [5, 5, 5, 5]),
        (Frozen(), [5, 5, 5, 5]),
        (Ordinary(5, layers=[1, 3]), [20, 5, 20, 5]),
        (Frozen(layers=range(2)), [5, 5, 20, 20]),
        (H2O(2, 3, layers=(0,)), [5, 20, 20, 20]),
        (StreamingLLM(1, 4, layers={2}), [20, 20, 5, 20]),
        (Frozen(layers=[1, 2]) | Ordinary(7, layers=[2]), [20, 20, 7, 20]),
    ],
    ids=repr,
)
def test_classes_dataclasses_and_layers(policy, expected):
    """What a policy may look like, and that `layers` restricts any of them."""
    cache = kvprune.ComposedCache([policy])
    with torch.no_grad():
        tiny_model()(prompt(1, 20), past_key_values=cache)
    assert [cache.columns(i).shape[-1] for i in range(LAYERS)] == expected


class Looks(kvprune.TokenPolicy):
    """Writes down what it is shown."""

    statistics = (Attention(),)

    def __init__(self):
        super().__init__()
        self.tokens, self.slots = [], []

    def rank_hidden(self, tokens):
        """Keeps everything."""
        received = tokens.statistic(Attention()) if tokens.layer else None
        self.tokens.append((tokens, received))

    def rank_slots(self, slots):
        """Keeps everything."""
        self.slots.append((slots, slots.statistic(Attention()).clone()))


def test_what_the_views_show():
    """Shapes and values as documented, over a padded prompt, a decode step and a turn."""
    looks, model = Looks(), tiny_model()
    cache, ids = kvprune.ComposedCache([looks]), prompt(2, 14)
    mask = torch.ones_like(ids)
    mask[1, :4] = 0
    with torch.no_grad():
        for stop, new in ((8, 8), (9, 1), (14, 5)):
            now = {"attention_mask": mask[:, :stop], "past_key_values": cache}
            model(ids[:, stop - new : stop], **now)
    assert [t.layer for t, _ in looks.tokens] == [*range(LAYERS)] * 2  # not in the decode step
    tokens, received = looks.tokens[5]
    assert tokens.num_layers == LAYERS and tokens.hidden.shape == (2, 5, 32)
    assert tokens.columns.tolist() == [[9, 10, 11, 12, 13]] * 2 and bool(tokens.valid.all())
    assert tokens.first.tolist() == [0, 4] and tokens.length.tolist() == [5, 5]
    first, _ = looks.tokens[0]
    assert first.length.tolist() == [8, 4]
    assert first.columns[1].tolist() == [-1] * 4 + [4, 5, 6, 7]
    assert received.shape == (2, 2, 5)
    slots, attention = looks.slots[2 * LAYERS]
    assert (slots.seen, slots.layer) == (14, 0)
    assert slots.prompt_length.tolist() == [13, 9]
    assert slots.keys.shape == slots.values.shape == (2, 2, 14, 8)
    # Every valid query of both query heads of a key/value head gave one in all.
    votes = [14 * 2, 10 * 2]
    torch.testing.assert_close(attention.sum(-1).mean(1), torch.tensor(votes).double())
    # Aligned: the newest token has received from itself alone.
    newest_token = looks.slots[2 * LAYERS][1][..., -1]
    torch.testing.assert_close(looks.tokens[5][1][..., -1], newest_token)


class OneLeft(kvprune.TokenPolicy):
    """Lets only the token whose logits are asked for enter layer 1."""

    def rank_hidden(self, tokens):
        """Nothing is worth keeping."""
        if tokens.layer != 1:
            return None
        score = torch.zeros_like(tokens.valid[:, None], dtype=torch.float64)
        return kvprune.Ranking(score, score > 0, torch.ones_like(tokens.first))


def test_the_statistic_is_that_of_the_tokens_when_one_is_left():
    """Of several tokens, one that is left does not take a freed slot: they stay in order."""
    looks, model = Looks(), tiny_model()
    cache, ids = kvprune.ComposedCache([looks, OneLeft(), H2O(1, 1)]), prompt(2, 16)
    with torch.no_grad():
        for stop, new in ((10, 10), (11, 1), (12, 1), (16, 4)):
            model(ids[:, stop - new : stop], past_key_values=cache)
    tokens, received = looks.tokens[-LAYERS + 2]
    slots, attention = looks.slots[-LAYERS + 1]
    assert (tokens.layer, slots.layer) == (2, 1)
    assert tokens.columns.tolist() == [[15], [15]]
    here = slots.columns.expand(-1, 2, -1) == 15
    assert torch.equal(received.flatten(), attention[here])


class DropsOne(kvprune.TokenPolicy):
    """Keeps all but the oldest slot."""

    def rank_slots(self, slots):
        """Columns rank."""
        count = slots.valid.sum(-1) - 1
        return kvprune.Ranking(slots.columns.double(), torch.zeros_like(slots.valid), count)


def test_one_object_twice_in_a_pipeline_is_two_policies():
    """The second sees what the first left."""
    one = DropsOne()
    columns = []
    for policies in ([one, one], [DropsOne(), DropsOne()]):
        cache = kvprune.ComposedCache(policies)
        with torch.no_grad():
            tiny_model()(prompt(1, 12), past_key_values=cache)
        columns.append(cache.columns(0)[0, 0].tolist())
    assert columns[0] == columns[1] == list(range(2, 12))


class NanOnPadding(kvprune.TokenPolicy):
    """Divides by what padding has none of."""

    def rank_slots(self, slots):
        """Columns rank."""
        score = slots.columns.double().masked_fill(~slots.valid, torch.nan)
        return kvprune.Ranking(score, ~slots.valid, torch.full_like(slots.first, 5))


@pytest.mark.parametrize(
    "policy", [NanOnPadding(), NanOnPadding() | NanOnPadding()], ids=["alone", "united"]
)
def test_scores_of_padding_do_not_matter(policy):
    """Not even NaN: what is not valid neither counts nor stays."""
    ids = prompt(2, 20)
    mask = torch.ones_like(ids)
    mask[1, :12] = 0
    cache = kvprune.ComposedCache([policy])
    with torch.no_grad():
        tiny_model()(ids, attention_mask=mask, past_key_values=cache)
    assert cache.columns(0)[:, 0].tolist() == [[15, 16, 17, 18, 19]] * 2


@pytest.mark.parametrize("seed", range(4))
def test_what_one_evicts_may_lower_the_budget_of_another(seed):
    """A sink that H2O drops leaves StreamingLLM with its window alone, in decoding too."""

    @dataclass(frozen=True, repr=False)
    class PromisesNothing(StreamingLLM):
        constant_budget = False

    held = []
    for streaming in (StreamingLLM(2, 2), PromisesNothing(2, 2)):
        cache = kvprune.ComposedCache([H2O(2, 2), streaming])
        tiny_model().generate(prompt(1, 2, seed), cache=cache, max_new_tokens=20)
        held.append([cache.columns(layer).tolist() for layer in range(LAYERS)])
    assert held[0] == held[1]
