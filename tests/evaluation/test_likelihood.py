"""Continuations scored behind contexts that a cache has read, against decoding by hand."""

from __future__ import annotations

import sys

import pytest
import torch

from kvprune import ComposedCache
from kvprune.evaluation.harness import __main__ as harness
from kvprune.evaluation.measure.flops import Flops, counting
from kvprune.evaluation.measure.likelihood import read
from kvprune.evaluation.measure.watch import Watch
from kvprune.policies import H2O, StreamingLLM

from ..support.fake_tasks import AtTheEnd
from ..support.family_models import attached_family
from ..support.models import LAYERS, plain_model, prompt, tiny_model
from ..support.strategies import sdtp_pruner

SETS = {
    "dense": [],
    "h2o": [H2O(heavy=0.2, recent=0.2)],
    # 2.5 of 10 is 3 slots, 2.25 of 9 is 2: a share of the whole prompt would not do.
    "streaming": [StreamingLLM(sinks=1, window=0.25)],
    "at-the-end": [AtTheEnd(4)],
    "at-the-end-share": [AtTheEnd(0.25)],
    "streaming-inside": [StreamingLLM(sinks=1, window=5, positions="cache")],
    "sdtp": [sdtp_pruner(0.5)],
    "sdtp+h2o": [sdtp_pruner(0.5), H2O(heavy=3, recent=3)],
}
LENGTHS = (19, 30, 1, 10)
CONTEXTS = [prompt(1, n, seed=n)[0].tolist() for n in LENGTHS]
TEXTS = [prompt(1, n, seed=50 + n)[0].tolist() for n in (3, 1, 6, 4)]
EXACT = {"rel": 1e-9, "abs": 1e-9}


def by_hand(policies, context, text):
    """Log-likelihood and greediness: the prompt is all but the context's last token.

    That one and the text's are read as decoding reads tokens. `generate` reads the prompt, as a
    prompt of one token is none elsewhere.
    """
    cache, model, logits = ComposedCache(policies), tiny_model(), list[torch.Tensor]()
    lead, rest = context[:-1], [*context[-1:], *text[:-1]]
    if not lead:
        lead, rest = context, text[:-1]
    options = {"max_new_tokens": 1, "output_logits": True, "return_dict_in_generate": True}
    first = model.generate(torch.tensor([lead]), cache=cache, **options).logits[0][0]
    logits += [] if len(context) > 1 else [first]
    with torch.no_grad():
        for token in rest:
            logits.append(model(torch.tensor([[token]]), past_key_values=cache).logits[0, -1])
    rows = torch.stack(logits).to(torch.float64)
    likely = rows.log_softmax(-1)[range(len(text)), text].sum()
    return float(likely), rows.argmax(-1).tolist() == text


@pytest.mark.parametrize("name", SETS)
def test_a_batch_is_each_row_decoded_by_hand(name):
    """Contexts and continuations of any lengths: padding on neither side is seen."""
    contexts = read(tiny_model(), ComposedCache(SETS[name]), CONTEXTS)
    for (likely, greedy), context, text in zip(contexts.score(TEXTS), CONTEXTS, TEXTS, strict=True):
        expected = by_hand(SETS[name], context, text)
        # `generate` hands out its logits in float32.
        assert likely == pytest.approx(expected[0], rel=1e-6)
        assert greedy == expected[1]


@pytest.mark.parametrize("name", SETS)
def test_several_continuations_are_each_one_alone(name):
    """In any order, and a row may have none."""
    together = read(tiny_model(), ComposedCache(SETS[name]), CONTEXTS)
    seen = together.cache.seen
    rounds = [together.score(TEXTS), together.score(TEXTS[::-1]), together.score(TEXTS)]
    assert rounds[0] == rounds[2]
    assert together.cache.seen == seen
    alone = [
        read(tiny_model(), ComposedCache(SETS[name]), [c]).score([t])[0]
        for c, t in zip(CONTEXTS, TEXTS[::-1], strict=True)
    ]
    for (likely, greedy), expected in zip(rounds[1], alone, strict=True):
        assert likely == pytest.approx(expected[0], **EXACT) and greedy == expected[1]
    assert together.score([[], TEXTS[0], [], []])[0] == (0.0, True)


@pytest.mark.parametrize("family", ["gpt2", "bloom"])
def test_positions_do_not_count_padding(family):
    """Absolute ones, and ALiBi, whose forward takes none."""
    model, policies = attached_family(family), [H2O(heavy=3, recent=3)]
    together = read(model, ComposedCache(policies), CONTEXTS).score(TEXTS)
    for (likely, _), context, text in zip(together, CONTEXTS, TEXTS, strict=True):
        ((alone, _),) = read(model, ComposedCache(policies), [context]).score([text])
        assert likely == pytest.approx(alone, rel=1e-6)


def test_dense_is_one_forward_over_all():
    context, text = CONTEXTS[0], TEXTS[2]
    with torch.no_grad():
        logits = plain_model()(torch.tensor([context + text])).logits[0, len(context) - 1 : -1]
    expected = logits.log_softmax(-1)[range(len(text)), text].sum()
    ((likely, _),) = read(tiny_model(), ComposedCache(), [context]).score([text])
    assert likely == pytest.approx(float(expected), **EXACT)


def test_what_decoding_says_greedily_is_greedy():
    cache, ids = ComposedCache(SETS["h2o"]), torch.tensor([CONTEXTS[1]])
    said = tiny_model().generate(ids, cache=cache, max_new_tokens=7, prefill_chunk_size=29)
    new = said[0, LENGTHS[1] :].tolist()
    other = [*new[:-1], (new[-1] + 1) % 61]
    contexts = read(tiny_model(), ComposedCache(SETS["h2o"]), [CONTEXTS[1]])
    assert contexts.score([new])[0][1] is True
    assert contexts.score([other])[0][1] is False


@pytest.mark.parametrize("name", sorted(SETS.keys() - {"dense"}))
def test_an_answer_of_one_token_sees_what_is_left_alone(name):
    """The known way to fail: the cache shrinks, and the scores do not change."""
    dense = read(tiny_model(), ComposedCache(), CONTEXTS).logits.log_softmax(-1)
    left = read(tiny_model(), ComposedCache(SETS[name]), CONTEXTS).logits.log_softmax(-1)
    assert ((dense - left).abs().amax(-1) > 0.01).tolist() == [True, True, False, True]


def test_a_share_is_of_what_is_given():
    """A window of a text has one token before it, and a share of that would be nothing."""
    for given, kept in ((None, 2), ([20], 8)):
        contexts = read(tiny_model(), ComposedCache(SETS["h2o"]), [[5]], given)
        contexts.score([prompt(1, 15)[0].tolist()])
        cache = contexts.cache
        with torch.no_grad():
            for token in prompt(1, 15)[0]:
                tiny_model()(token.view(1, 1), past_key_values=cache)
        assert cache.columns(0).shape[-1] == kept


@pytest.mark.parametrize("generates", [False, True])
def test_what_reading_cost_is_noted_by_row(generates):
    """Tokens, who entered each layer, what it holds and in how many bytes."""
    cache = ComposedCache(SETS["sdtp+h2o"])
    padded = torch.tensor([[0] * (30 - n) + c for n, c in zip(LENGTHS, CONTEXTS, strict=True)])
    mask = torch.tensor([[0] * (30 - n) + [1] * n for n in LENGTHS])
    with Watch(tiny_model(), cache, 30) as watch:
        if generates:
            tiny_model().generate(padded, attention_mask=mask, cache=cache, max_new_tokens=4)
        else:
            read(tiny_model(), cache, CONTEXTS)
    flops = Flops.measured(tiny_model())
    costs = watch.costs(flops, 4)
    # Stages before layers 1 and 3 keep half each, but no fewer than the sinks and the newest.
    assert [c.prompt_tokens for c in costs] == list(LENGTHS)
    assert [c.entered[0] for c in costs] == list(LENGTHS)
    assert costs[1].entered[1:] == ((15, 15, 8) if generates else (16, 16, 8))
    assert costs[1].kept == (6.0,) * LAYERS and costs[2].kept == (1.0,) * LAYERS
    if not generates:
        assert {c.bytes_held for c in costs} == {cache.nbytes // 4}
    assert costs[0].bytes_peak >= costs[0].bytes_held > 0
    assert costs[1].prefill_flops == flops.of_prompt(30, costs[1].entered)
    assert not tiny_model().model._forward_hooks.keys() & {h.id for h in watch._handles}


def test_a_layer_with_a_state_has_no_part_in_what_is_kept():
    """It has its place among the layers all the same."""
    model, cache = attached_family("qwen3_next"), ComposedCache(SETS["h2o"])
    with Watch(model, cache, 30) as watch:
        read(model, cache, [CONTEXTS[1]])
    (cost,) = watch.costs(Flops.measured(model), 1)
    assert cost.kept == (None, 12.0, None, 12.0) and cost.entered == (30,) * LAYERS


def test_without_lm_eval_its_command_says_so(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "lm_eval.__main__", None)
    with pytest.raises(SystemExit) as ended:
        harness.main()
    assert ended.value.code == 2
    assert "pip install kvprune[lm-eval]" in capsys.readouterr().err


def test_flops_of_a_dense_prompt_are_what_torch_counts():
    ids = prompt(1, 100)
    with counting() as counter, torch.no_grad():
        tiny_model()(ids, past_key_values=ComposedCache(), logits_to_keep=1)
    flops = Flops.measured(tiny_model())
    assert flops.of_prompt(100, (100,) * LAYERS) == pytest.approx(counter.get_total_flops())
