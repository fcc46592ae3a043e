"""What the marking pass says, against the probabilities of an eager model."""

from __future__ import annotations

import itertools
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import kvprune
from kvprune import KVPruneError
from kvprune.models.structure import decoder_layers
from kvprune.policies.sdtp import Example, saliency, sharing
from kvprune.policies.sdtp.marks import Marks, standardised
from kvprune.policies.sdtp.shipped import weights_digest
from kvprune.policies.sdtp.targets import TARGETS

from ..support.models import fresh_model, plain_model, prompt, tiny_model

FAMILIES = ["llama", "qwen3", "mistral-window", "gpt_neox", "gemma2"]
IDS = prompt(1, 37)
SIZE = 30
EXAMPLE = Example(tuple(IDS[0, :SIZE].tolist()), tuple(IDS[0, SIZE:].tolist()))
STAGES = (1, 3)


def options(family: str) -> dict[str, Any]:
    """Scores that are capped and every second layer with a window, in gemma2."""
    if family != "gemma2":
        return {}
    return {"head_dim": 8, "sliding_window": 9, "backend": "eager", "dtype": torch.float32}


def marks(family: str, folder: Any, target: str = "removal") -> Marks:
    """Of an attached model, with stages before layers 1 and 3."""
    return Marks(tiny_model(family, **options(family)), STAGES, folder, target)


def inputs(family: str) -> torch.Tensor:
    """What enters the stages' layers of the plain model, `[2, n, C]`."""
    entered: list[torch.Tensor] = []
    model: Any = plain_model(family, **options(family))
    layers = decoder_layers(model.base_model)
    handles = [
        layers[i].register_forward_pre_hook(
            lambda m, a, k: entered.append((a[0] if a else k["hidden_states"])[0, :SIZE]),
            with_kwargs=True,
        )
        for i in STAGES
    ]
    with torch.no_grad():
        model(IDS, use_cache=False)
    for handle in handles:
        handle.remove()
    return torch.stack(entered)


def odds_with_bias(model: Any, first: int, column: int, bias: float) -> float:
    """Log odds of the completion, with a bias on scores of a column in layers from `first` on."""

    def add(module: Any, args: Any, kwargs: Any) -> Any:
        seen, size = kwargs["attention_mask"], IDS.shape[1]
        seen = torch.ones(1, 1, size, size, dtype=torch.bool).tril() if seen is None else seen
        mask = torch.zeros(seen.shape, dtype=torch.float64).masked_fill(~seen, -torch.inf)
        mask[:, :, SIZE - 1 :, column] += bias
        return args, {**kwargs, "attention_mask": mask}

    layers = decoder_layers(model.base_model)[first:]
    handles = [layer.register_forward_pre_hook(add, with_kwargs=True) for layer in layers]
    with torch.no_grad():
        chances = model(IDS, use_cache=False).logits[0, SIZE - 1 : -1].softmax(-1)
    for handle in handles:
        handle.remove()
    chance = chances[torch.arange(IDS.shape[1] - SIZE), IDS[0, SIZE:]]
    return float((chance / (1 - chance)).log().sum())


@pytest.mark.parametrize("family", ["llama", "qwen3", "mistral-window", "gpt_neox"])
def test_removal_is_what_the_log_odds_lose_without_a_token(family, tmp_path):
    """To first order: by finite differences, in float64 (eager models take softmax in float32)."""
    found = marks(family, tmp_path, "removal").of(EXAMPLE)
    model: Any = plain_model(family)
    step = 1e-4
    for stage, first in enumerate(STAGES):
        slopes = [
            (odds_with_bias(model, first, i, step) - odds_with_bias(model, first, i, -step))
            / (2 * step)
            for i in range(SIZE)
        ]
        expected = torch.tensor(slopes).clamp(min=0)
        assert 0 < int((expected > 0).sum()) < SIZE
        torch.testing.assert_close(found.saliency[stage], expected, rtol=1e-4, atol=1e-7)
    torch.testing.assert_close(found.hidden, inputs(family), rtol=1e-6, atol=1e-6)
    assert not found.hidden.requires_grad


@pytest.mark.parametrize("family", ["llama", "gpt_neox"])
def test_gradient_is_the_signed_saliency_of_the_whole_example(family, tmp_path):
    """Its part that is about the prompt."""
    found = marks(family, tmp_path, "gradient").of(EXAMPLE)
    expected = saliency(plain_model(family), IDS, STAGES, signed=True)[0, :, :SIZE]
    torch.testing.assert_close(found.saliency, expected, rtol=1e-5, atol=1e-6)
    assert bool((found.saliency < 0).any())
    torch.testing.assert_close(found.hidden, inputs(family), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("target", list(TARGETS))
def test_the_second_call_reads_from_disk(target, tmp_path, monkeypatch):
    """The same numbers, and nothing is marked again; one file per example and target."""
    first = marks("llama", tmp_path, target).of(EXAMPLE)
    monkeypatch.setattr("kvprune.policies.sdtp.marks.TARGETS", {})
    second = marks("llama", tmp_path, target).of(EXAMPLE)
    assert torch.equal(first.saliency, second.saliency)
    assert torch.equal(first.hidden, second.hidden)
    assert len(list(tmp_path.iterdir())) == 1


@pytest.mark.parametrize("target", list(TARGETS))
def test_hidden_states_are_kept_where_that_is_asked_for(target, tmp_path, monkeypatch):
    """Also beside a mark that was kept without; then the model is not run again."""
    plain = marks("llama", tmp_path, target)
    first, keeping = plain.of(EXAMPLE), replace(plain, keep_hidden=True)
    again = keeping.of(EXAMPLE)
    monkeypatch.setattr("kvprune.policies.sdtp.marks.hidden_states", None)
    for found in (again, keeping.of(EXAMPLE), plain.of(EXAMPLE)):
        assert torch.equal(found.saliency, first.saliency)
        assert torch.equal(found.hidden, first.hidden)
    assert len(list(tmp_path.iterdir())) == 1


def group(count: int = 3) -> list[Example]:
    """Examples that begin alike, with questions and answers of different lengths."""
    ends = [prompt(1, 9 + i, seed=20 + i)[0].tolist() for i in range(count)]
    return sharing([Example((*EXAMPLE.prompt, *end[:-3]), tuple(end[-3:])) for end in ends])


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("target", list(TARGETS))
def test_what_examples_share_is_marked_as_if_they_did_not(family, target, tmp_path):
    """Within rounding; once made and once from disk, in whatever order."""
    shared, examples = (
        Marks(
            tiny_model(family, **options(family)), STAGES, tmp_path / "a", target, keep_hidden=True
        ),
        group(),
    )
    alone = marks(family, tmp_path / "b", target)
    for folder in (shared.folder, alone.folder):
        folder.mkdir()
    rtol, atol = (1e-4, 1e-6) if family == "gemma2" else (1e-9, 1e-12)
    for example in (*examples, examples[1], *examples):
        found, expected = shared.of(example), alone.of(replace(example, shared=0))
        torch.testing.assert_close(found.hidden, expected.hidden, rtol=rtol, atol=atol)
        # The target is float32 whatever the model's precision.
        torch.testing.assert_close(found.saliency, expected.saliency, rtol=1e-4, atol=1e-6)


def test_what_examples_share_is_not_continued_where_that_would_change_it(tmp_path):
    """Dynamic rotary frequencies depend on the whole length, here beyond what was trained."""
    scaling = {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 4.0}
    limit = {"max_position_embeddings": SIZE + 2, "rope_parameters": scaling}
    model = kvprune.attach(fresh_model("llama", **limit))
    shared = Marks(model, STAGES, tmp_path / "a", "removal", keep_hidden=True)
    alone = Marks(model, STAGES, tmp_path / "b", "removal")
    for folder in (shared.folder, alone.folder):
        folder.mkdir()
    for example in group():
        found, expected = shared.of(example), alone.of(replace(example, shared=0))
        assert torch.equal(found.hidden, expected.hidden)
        assert torch.equal(found.saliency, expected.saliency)


def test_what_examples_share_keeps_no_graph(tmp_path):
    """Of the example before."""
    keeping = Marks(tiny_model("llama"), STAGES, tmp_path, "removal", keep_hidden=True)
    keeping.of(group()[0])
    (cache,) = keeping._last.values()
    layers: list[Any] = list(cache.layers)
    assert not any(t.requires_grad for layer in layers for t in (layer.keys, layer.values))


def test_what_examples_share_is_read_and_kept_once(tmp_path, monkeypatch):
    """One after the other; and the files of the examples hold the rest alone."""
    model, read = tiny_model("llama"), list[int]()
    handle = model.base_model.register_forward_pre_hook(
        lambda m, args, kwargs: read.append((args or [kwargs["input_ids"]])[0].shape[1]),
        with_kwargs=True,
    )
    examples = group()
    keeping = Marks(model, STAGES, tmp_path, "removal", keep_hidden=True)
    for example in examples:
        keeping.ensure(example)
    # Each one's rest, and once more what its completion comes from.
    lengths = [(len(e.prompt) + len(e.completion) - SIZE, len(e.completion) + 1) for e in examples]
    assert read == [SIZE, *itertools.chain(*lengths)] and len(list(tmp_path.iterdir())) == 4
    for example in examples:
        keeping.ensure(example)
        assert keeping.of(example).hidden.shape[1] == len(example.prompt)
    handle.remove()
    assert len(read) == 7


def test_a_beginning_that_is_gone_is_made_again(tmp_path):
    """Nor must an example say that it shares what is kept apart."""
    keeping = Marks(tiny_model("llama"), STAGES, tmp_path, "removal", keep_hidden=True)
    example = group()[0]
    whole = keeping.of(example)
    found = keeping.of(replace(example, shared=0))
    assert torch.equal(found.hidden, whole.hidden)
    keeping._named(example.prompt[:SIZE]).unlink()
    for shared in (SIZE, 0):
        found = replace(keeping).of(replace(example, shared=shared))
        torch.testing.assert_close(found.hidden, whole.hidden, rtol=1e-9, atol=1e-12)


def test_an_error_leaves_no_longer_beginning_behind(tmp_path, monkeypatch):
    """What was read of an example that failed is not taken for shared."""
    keeping = Marks(tiny_model("llama"), STAGES, tmp_path, "removal", keep_hidden=True)
    one, two, _ = group()
    keeping.of(one)
    with monkeypatch.context() as patch:
        patch.setitem(TARGETS, "removal", _fail_after(TARGETS["removal"]))
        with pytest.raises(RuntimeError):
            keeping.of(two)
    found, expected = keeping.of(two), marks("llama", tmp_path).of(replace(two, shared=0))
    torch.testing.assert_close(found.saliency, expected.saliency, rtol=1e-4, atol=1e-6)


def _fail_after(work: Any) -> Any:
    def failing(*args: Any) -> None:
        work(*args)
        raise RuntimeError

    return failing


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_model_is_known_by_all_of_its_weights(dtype):
    """One bit of one of them is enough; where it runs and what it is called is not."""
    one, two = (fresh_model(dtype=dtype) for _ in range(2))
    assert weights_digest(one) == weights_digest(two)
    weight = two.model.layers[2].mlp.up_proj.weight
    weight.data[3, 5] = torch.nextafter(weight.data[3, 5], torch.tensor(9.0, dtype=dtype))
    assert weights_digest(one) != weights_digest(two)


def test_another_model_example_target_or_stage_is_marked_anew(tmp_path):
    """None of them finds the file of another; where the completion begins counts as well."""
    other = Example(EXAMPLE.prompt + EXAMPLE.completion[:1], EXAMPLE.completion[1:])
    marks("llama", tmp_path).of(EXAMPLE)
    marks("llama", tmp_path).of(other)
    marks("llama", tmp_path, "gradient").of(EXAMPLE)
    marks("qwen3", tmp_path).of(EXAMPLE)
    Marks(tiny_model("llama"), (1,), tmp_path, "removal").of(EXAMPLE)
    assert len(list(tmp_path.iterdir())) == 5


@pytest.mark.parametrize("share", [0.0, 0.1, 0.9])
def test_a_mark_that_is_cut_off(share, tmp_path):
    """The error names the file to remove."""
    marks("llama", tmp_path).of(EXAMPLE)
    (path,) = tmp_path.iterdir()
    whole = path.read_bytes()
    path.write_bytes(whole[: int(share * len(whole))])
    with pytest.raises(KVPruneError, match=rf"{path.name}: expected a mark, got .*; remove it"):
        marks("llama", tmp_path).of(EXAMPLE)


def test_no_hook_is_left_on_the_model(tmp_path):
    """Neither by marking nor by reading."""
    model = tiny_model("llama")
    before = [list(m._forward_pre_hooks) for m in model.modules()]
    for target in (*TARGETS, "removal"):
        marks("llama", tmp_path, target).of(EXAMPLE)
    assert before == [list(m._forward_pre_hooks) for m in model.modules()]


SALIENCIES = st.lists(
    st.one_of(st.floats(-100, 100, width=32), st.just(0.0)), min_size=8, max_size=8
)


@given(SALIENCIES, SALIENCIES, st.integers(0, 5), st.booleans())
def test_standardised_has_mean_0_and_variance_1_and_keeps_the_order(one, two, sinks, signed):
    """Per stage, without the sinks; constant ones become 0, and all are finite."""
    given_ = torch.tensor([one, two])
    found = standardised(given_, sinks, signed)
    assert found.shape == (2, 8 - sinks) and bool(found.isfinite().all())
    torch.testing.assert_close(found.mean(1), torch.zeros(2), rtol=0, atol=1e-3)
    for row, values in zip(found.tolist(), given_[:, sinks:].tolist(), strict=True):
        size = values if signed else [abs(v) for v in values]
        pairs = sorted(zip(size, row, strict=True))
        assert all(a[1] <= b[1] + 1e-5 for a, b in itertools.pairwise(pairs))
        if max(size) - min(size) > 1e-3 * max(map(abs, size)) > 1e-3:
            assert torch.tensor(row).std().item() == pytest.approx(1.0, abs=1e-3)


def test_standardised_takes_the_logarithm_of_unsigned_saliency():
    """Equal ratios become about equal steps, and next to nothing is as good as nothing.

    Signed saliency keeps equal differences.
    """
    many = torch.tensor([[99.0, *[1.0] * 40, *[-10.0] * 40, *[100.0] * 40]])
    low, middle, high = standardised(many, 1, signed=False)[0, ::40]
    assert (middle - low).item() == pytest.approx((high - middle).item(), rel=0.2)
    zeros = standardised(torch.tensor([[99.0, *[0.0] * 50, 1e-3, *[1.0] * 49]]), 1, signed=False)[0]
    assert (zeros[50] - zeros[0]).item() < 0.1 * (zeros[51] - zeros[0]).item()
    steps = standardised(torch.tensor([[99.0, -10.0, 0.0, 10.0]]), 1, signed=True)[0]
    torch.testing.assert_close(steps, torch.tensor([-1.0, 0.0, 1.0]), rtol=0, atol=1e-5)
