"""A cache saved and loaded goes on as if nothing had happened; what is not whole is refused."""

from __future__ import annotations

import copy
import json
from functools import cache
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import kvprune
from kvprune import KVPruneError
from kvprune.cache import saving
from kvprune.cache.opening import drops_slots
from kvprune.policies import H2O, StreamingLLM
from kvprune.statistics import Attention
from kvprune.testing.runs import Run, feed

from ..support.models import LAYERS, fresh_model, left_padded, plain_model, prompt, tiny_model
from ..support.strategies import POLICIES, chunked, pipelines, sdtp_pruner, seeds
from ..support.uneven import Threshold

DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]
ROWS = {"reorder": [1, 0], "repeat": [0, 0, 1, 1], "select": [1]}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """One for all examples of a property."""
    return tmp_path_factory.mktemp("caches")


def reloaded(run: Run, policies, path: Path) -> Run:
    """The run with its cache saved and loaded again."""
    run.cache.save(path)
    twin = copy.copy(run)
    twin.cache = kvprune.ComposedCache.load(path, policies, run.model)
    return twin


@torch.no_grad()
def move(run: Run, what: str) -> torch.Tensor:
    """Moves the rows as a user or beam search would; which rows they were."""
    assert run.mask is not None
    rows = torch.tensor(ROWS.get(what, [0, 1]))
    if what == "reorder":
        run.cache.reorder_cache(rows)
    elif what == "repeat":
        run.cache.batch_repeat_interleave(2)
    elif what == "select":
        run.cache.batch_select_indices(rows)
    elif what == "crop" and not drops_slots(run.cache.policies, run.cache.state):
        run.cache.crop(-2)
        run.mask = run.mask[:, :-2]
    run.mask = run.mask[rows]
    return rows


def contents_of(cache: kvprune.ComposedCache) -> saving.Contents:
    """The contents of the file that `save` would write."""
    assert cache.binding is not None
    return saving.contents_of(cache.state, cache.binding.model, cache.policies, cache.store)


def assert_same_cache(one: kvprune.ComposedCache, two: kvprune.ComposedCache) -> None:
    """Every number and tensor, the order of slots and the room for more included."""
    # A crop leaves padding that is no longer read; it is not saved.
    assert one.seen == two.seen and one.nbytes >= two.nbytes
    mine, other = contents_of(one), contents_of(two)
    assert mine.numbers == other.numbers
    assert list(mine.tensors) == list(other.tensors)
    for name, tensor in mine.tensors.items():
        assert tensor.dtype == other.tensors[name].dtype
        assert torch.equal(tensor, other.tensors[name])


@given(
    pipelines(),
    st.sampled_from(DTYPES),
    st.sampled_from(["llama", "mistral-window", "gpt_neox"]),
    st.sampled_from(["", "crop", *ROWS]),
    st.integers(0, 3),
    st.data(),
    seeds,
)
def test_going_on_after_loading_is_bit_for_bit(
    folder, chosen, dtype, family, moved, ones, data, seed
):
    """Any policies and steps, left padding, rows that were moved, tokens taken back."""
    policies = [p.make(n) for p, n in zip(*chosen, strict=True)]
    length = data.draw(st.integers(3, 30))
    steps = [*data.draw(chunked(length)), *[1] * ones]
    run = Run(tiny_model(family, dtype=dtype), policies)
    ids = prompt(2, sum(steps) + 16, seed)
    mask = left_padded(ids, [0, data.draw(st.integers(0, length - 1))])["attention_mask"]
    feed(run, ids, mask, steps)
    rows = move(run, moved)
    twin = reloaded(run, policies, folder / "cache")
    assert_same_cache(run.cache, twin.cache)
    ids, mask = ids[rows, sum(steps) :], mask[rows, sum(steps) :]
    for one, two in zip(
        *(feed(r, ids, mask, [1, 1, 3, *[1] * 11]) for r in (run, twin)), strict=True
    ):
        assert torch.equal(one, two)
    assert_same_cache(run.cache, twin.cache)


@pytest.mark.parametrize("policy", [None, *POLICIES], ids=repr)
def test_generate_goes_on_with_the_tokens_of_no_break(tmp_path, policy):
    """A prefix read once: each question starts from the file."""
    policies = [policy.make(8)] if policy else []
    model, prefix = tiny_model(), prompt(2, 30)
    kept = kvprune.ComposedCache(policies)
    with torch.no_grad():
        model(prefix, past_key_values=kept)
    kept.save(tmp_path / "prefix")
    for seed in (1, 2):
        ids = torch.cat([prefix, prompt(2, 6, seed)], 1)
        caches = [copy.deepcopy(kept)]
        caches.append(kvprune.ComposedCache.load(tmp_path / "prefix", policies, model))
        tokens = [model.generate(ids, cache=c, max_new_tokens=8, do_sample=False) for c in caches]
        assert torch.equal(*tokens)


def test_a_prompt_read_in_inference_mode_can_be_saved_and_gone_on_with_outside(tmp_path):
    """As after `generate`, which runs in no_grad; and with gradients, which are not saved."""
    ids, logits = prompt(1, 20), []
    for mode in (torch.inference_mode, torch.enable_grad):
        cache = kvprune.ComposedCache([H2O(3, 3)])
        with mode():
            tiny_model()(ids, past_key_values=cache)
            cache.save(tmp_path / "cache")
        again = kvprune.ComposedCache.load(tmp_path / "cache", [H2O(3, 3)], tiny_model())
        assert not any(t.requires_grad for layer in again.layers for t in layer.tensors())
        with torch.no_grad():
            logits.append(tiny_model()(ids[:, :1], past_key_values=again).logits)
    torch.testing.assert_close(*logits, rtol=1e-12, atol=1e-12)


# Files that are not whole.


KINDS: dict[str, tuple[list[kvprune.TokenPolicy], kvprune.Quantized | None]] = {
    "plain": ([sdtp_pruner(0.6), H2O(3, 3)], None),
    "codes": ([sdtp_pruner(0.6), H2O(3, 3)], kvprune.Quantized(8, 4)),
    "several rectangles of codes": ([Threshold(0.5, 2)], kvprune.Quantized(4, 8)),
}
"""Policies and store of a cache, by the kind of its file."""


@cache
def written(kind: str = "plain") -> tuple[bytes, kvprune.ComposedCache]:
    """A file with all kinds of tensors, and the cache that it is of."""
    policies, store = KINDS[kind]
    run = Run(tiny_model(), policies, store, parting=True)
    ids = prompt(2, 20)
    feed(run, ids, left_padded(ids, [0, 5])["attention_mask"], [18, 1])
    path = Path(__file__).parent / ".test_saving"
    try:
        run.cache.save(path)
        assert (run.cache.layers[0].lanes is not None) == (kind == "several rectangles of codes")
        return path.read_bytes(), run.cache
    finally:
        path.unlink(missing_ok=True)


def load(path: Path, kind: str = "plain") -> kvprune.ComposedCache:
    """With the policies and the model of `written`."""
    policies, store = KINDS[kind]
    return kvprune.ComposedCache.load(path, policies, tiny_model(), store)


@pytest.mark.parametrize("kind", KINDS)
@given(data=st.data())
def test_a_truncated_file_is_refused(folder, kind, data):
    """Wherever it ends."""
    whole, _ = written(kind)
    path = folder / "cut"
    path.write_bytes(whole[: data.draw(st.integers(0, len(whole) - 1))])
    with pytest.raises(KVPruneError, match="damaged or cut short"):
        load(path)


@pytest.mark.parametrize("kind", KINDS)
@given(data=st.data())
def test_flipped_bits_are_found(folder, kind, data):
    """Any bytes; refused, but where they change nothing that is read (blanks in the header)."""
    whole, original = written(kind)
    header = 8 + int.from_bytes(whole[:8], "little")
    most = data.draw(st.sampled_from([8, header, len(whole)]))
    start = data.draw(st.integers(0, most - 1))
    flips = data.draw(st.binary(min_size=1, max_size=9).filter(any))[: len(whole) - start]
    path, damaged = folder / "flipped", bytearray(whole)
    for place, flip in enumerate(flips, start):
        damaged[place] ^= flip
    path.write_bytes(bytes(damaged))
    try:
        again = load(path, kind)
    except KVPruneError:
        return
    assert_same_cache(again, original)


@pytest.mark.parametrize("kind", KINDS)
def test_every_byte_of_keys_and_header_is_watched(tmp_path, kind):
    """One flip in each stretch of the file, none of which is blank."""
    whole, _ = written(kind)
    path = tmp_path / "flipped"
    header = 8 + int.from_bytes(whole[:8], "little")
    places = [*range(0, header, 61), *range(header, len(whole), 997)]
    for place in (p for p in places if whole[p] != ord(" ")):
        path.write_bytes(whole[:place] + bytes([whole[place] ^ 1]) + whole[place + 1 :])
        with pytest.raises(KVPruneError):
            load(path, kind)


@pytest.mark.parametrize("kind", KINDS)
def test_a_crash_while_writing_leaves_the_old_file(tmp_path, monkeypatch, kind):
    """And nothing beside it."""
    whole, cache = written(kind)
    path = tmp_path / "cache"
    path.write_bytes(whole)

    def crash(tensors, scratch, metadata):
        Path(scratch).write_bytes(whole[:100])
        raise RuntimeError("no space left")

    monkeypatch.setattr(saving, "save_file", crash)
    with pytest.raises(KVPruneError, match="no space left"):
        cache.save(path)
    assert path.read_bytes() == whole and list(tmp_path.iterdir()) == [path]
    assert_same_cache(load(path, kind), cache)


def rewritten(path: Path, **changes: str) -> None:
    """The file with other metadata."""
    with safe_open(path, framework="pt") as file:
        metadata = {**file.metadata(), **changes}
    save_file(load_file(path), path, metadata)


def test_another_version_and_other_files_are_refused(tmp_path):
    """Each says what was expected and what came."""
    path = tmp_path / "cache"
    path.write_bytes(written()[0])
    rewritten(path, kvprune_cache="4")
    with pytest.raises(KVPruneError, match=r"expected version 2 or 3 .* got '4'"):
        load(path)
    save_file({"weight": torch.ones(3)}, path)
    with pytest.raises(KVPruneError, match="got another"):
        load(path)
    for nothing in (tmp_path / "none", tmp_path):
        with pytest.raises(KVPruneError, match="found none"):
            load(nothing)


def test_the_numbers_are_json_and_say_what_was_saved(tmp_path):
    """No pickle anywhere."""
    path = tmp_path / "cache"
    path.write_bytes(written()[0])
    with safe_open(path, framework="pt") as file:
        numbers = json.loads(file.metadata()["numbers"])
    assert numbers["seen"] == 19 and len(numbers["layers"]) == LAYERS
    assert numbers["policies"][1] == "H2O(heavy=3, recent=3, positions='original')"
    assert numbers["model"]["name"] == "LlamaModel"


# Files of another model, and other policies.


def tuned():
    """One weight in 16 of one matrix moved a little, as fine-tuning moves them all."""
    model = fresh_model()
    with torch.no_grad():
        model.model.layers[2].mlp.down_proj.weight.mul_(1.001)
    return model


OTHERS = {
    "weights": tuned,
    "precision": lambda: fresh_model(dtype=torch.float32),
    "rotary base": lambda: fresh_model(rope_theta=500.0),
    "layers": lambda: fresh_model(num_hidden_layers=3),
    "heads": lambda: fresh_model(kv_heads=4),
    "family": lambda: fresh_model("qwen3"),
}


@pytest.mark.parametrize("other", OTHERS)
def test_a_file_of_another_model_is_refused(tmp_path, other):
    """Also where only weights, precision or the config differ."""
    (tmp_path / "cache").write_bytes(written()[0])
    model = kvprune.attach(OTHERS[other]())
    with pytest.raises(KVPruneError, match=r"expected a cache of this model .* got one of another"):
        kvprune.ComposedCache.load(tmp_path / "cache", [H2O(3, 3)], model)


def test_the_same_model_loaded_again_is_the_same(tmp_path):
    """Another object, in another process as it were, and in eager attention."""
    model = kvprune.attach(fresh_model(dtype=torch.float32))
    cache = kvprune.ComposedCache([H2O(3, 3)])
    with torch.no_grad():
        model(prompt(1, 12), past_key_values=cache)
    cache.save(tmp_path / "cache")
    kvprune.detach(model).save_pretrained(tmp_path / "model")
    again = type(model).from_pretrained(tmp_path / "model", attn_implementation="eager")
    again = kvprune.attach(again)
    loaded = kvprune.ComposedCache.load(tmp_path / "cache", [H2O(3, 3)], again)
    assert loaded.seen == 12


def test_a_model_that_is_not_attached_is_refused(tmp_path):
    """Before the file is read."""
    with pytest.raises(KVPruneError, match=r"kvprune\.attach\(model\) first"):
        kvprune.ComposedCache.load(tmp_path / "none", [], fresh_model())


def test_a_statistic_that_was_not_observed_is_refused(tmp_path):
    """The error says what was saved; so do layers of which a policy was kept away."""
    for policy in (StreamingLLM(2, 4), H2O(3, 3, layers=[0])):
        cache = kvprune.ComposedCache([policy])
        with torch.no_grad():
            tiny_model()(prompt(1, 12), past_key_values=cache)
        cache.save(tmp_path / "cache")
        with pytest.raises(KVPruneError) as caught:
            kvprune.ComposedCache.load(tmp_path / "cache", [H2O(4, 4)], tiny_model())
        assert repr(policy) in str(
            caught.value
        ) and "H2O(heavy=4, recent=4, positions='original')" in str(caught.value)


def test_other_policies_count_from_the_next_step_on(tmp_path):
    """Smaller budgets, or less that is observed: what is not wanted is not even held."""
    cache = kvprune.ComposedCache([H2O(6, 6)])
    ids = prompt(2, 30)
    with torch.no_grad():
        tiny_model()(ids, past_key_values=cache)
        cache.save(tmp_path / "cache")
        for policy, names in ((H2O(2, 2), (Attention(),)), (StreamingLLM(1, 3), ())):
            again = kvprune.ComposedCache.load(tmp_path / "cache", [policy], tiny_model())
            assert again.columns(0).shape[-1] == 12
            tiny_model()(ids[:, :1], past_key_values=again)
            assert again.columns(0).shape[-1] == 4
            assert all(tuple(layer.statistics) == names for layer in again.layers)


# When a cache cannot be saved.


def test_saving_inside_a_forward_or_generate_is_refused(tmp_path):
    """Where layers are out of step with each other, or promises are open."""
    cache = kvprune.ComposedCache([])
    caught = []

    class Saves(kvprune.TokenPolicy):
        def rank_slots(self, slots):
            with pytest.raises(KVPruneError, match="in the middle of a forward"):
                cache.save(tmp_path / "cache")
            caught.append("forward")

    def save(ids, scores):
        with pytest.raises(KVPruneError, match="in the middle of a generate"):
            cache.save(tmp_path / "cache")
        caught.append("generate")
        return scores

    cache = kvprune.ComposedCache([Saves()])
    tiny_model().generate(prompt(1, 9), cache=cache, max_new_tokens=2, logits_processor=[save])
    assert {"forward", "generate"} == set(caught) and not list(tmp_path.iterdir())
    cache.save(tmp_path / "cache")


def test_an_empty_or_a_failed_cache_is_not_saved(tmp_path):
    """Nothing is written."""
    cache = kvprune.ComposedCache([])
    with pytest.raises(KVPruneError, match="empty"):
        cache.save(tmp_path / "cache")

    class Fails(kvprune.TokenPolicy):
        def rank_slots(self, slots):
            raise RuntimeError("as planned")

    cache = kvprune.ComposedCache([Fails()])
    with pytest.raises(RuntimeError, match="as planned"):
        tiny_model()(prompt(1, 9), past_key_values=cache)
    with pytest.raises(KVPruneError, match="reset"):
        cache.save(tmp_path / "cache")
    assert not list(tmp_path.iterdir())


def test_what_was_evicted_before_saving_cannot_come_back(tmp_path):
    """Not with other policies either; what is read afterwards can be taken back."""
    model, ids = tiny_model(), prompt(1, 20)
    cache = kvprune.ComposedCache([StreamingLLM(1, 4)])
    with torch.no_grad():
        model(ids, past_key_values=cache)
    cache.save(tmp_path / "a")
    for _ in range(2):
        loaded = kvprune.ComposedCache.load(tmp_path / "a", [], model)
        with torch.no_grad():
            model(ids[:, :3], past_key_values=loaded)
        with pytest.raises(kvprune.KVPruneError, match="evicted cannot come back"):
            loaded.crop(-4)
        loaded.crop(-3)
        assert loaded.columns(0)[0, 0].tolist() == [0, 16, 17, 18, 19]
        loaded.save(tmp_path / "a")


def test_weights_that_changed_since_make_another_model(tmp_path):
    """In place, on the same attached object, after its caches were told what it is."""
    model = kvprune.attach(fresh_model())
    cache = kvprune.ComposedCache([])
    with torch.no_grad():
        model(prompt(1, 5), past_key_values=cache)
        cache.save(tmp_path / "a")
        kvprune.ComposedCache.load(tmp_path / "a", [], model)
        model.get_input_embeddings().weight.mul_(2)
    with pytest.raises(kvprune.KVPruneError, match="got one of another"):
        kvprune.ComposedCache.load(tmp_path / "a", [], model)


def test_positions_must_be_assigned_in_the_same_way(tmp_path):
    """Inside the cache or as they came; the keys in the file are turned for one of the two."""
    model = tiny_model()
    cache = kvprune.ComposedCache([StreamingLLM(2, 4, positions="cache")])
    with torch.no_grad():
        model(prompt(1, 12), past_key_values=cache)
    cache.save(tmp_path / "a")
    for other in (StreamingLLM(2, 4), StreamingLLM(3, 4, positions="cache")):
        with pytest.raises(kvprune.KVPruneError, match="assign positions in the same way"):
            kvprune.ComposedCache.load(tmp_path / "a", [other], model)


@pytest.mark.parametrize("model", [None, "llama", plain_model()], ids=["None", "str", "detached"])
def test_what_is_no_attached_model_is_refused(tmp_path, model):
    """Also what is no model at all."""
    with pytest.raises(kvprune.KVPruneError, match="expected a model that kvprune is attached to"):
        kvprune.ComposedCache.load(tmp_path / "a", [], model)


@torch.no_grad()
def test_a_file_of_an_earlier_format_goes_on(tmp_path):
    """It calls accumulated attention by a text, and knows nothing of prompts, nor of their ids."""
    model, ids = tiny_model(), prompt(2, 30)
    cache = kvprune.ComposedCache([H2O(6, 6)])
    model(ids[:, :20], past_key_values=cache, logits_to_keep=1)
    assert cache.binding is not None
    contents = saving.contents_of(cache.state, cache.binding.model, cache.policies, cache.store)
    numbers, tensors = contents.numbers, contents.tensors
    for name in ("prompt_end", "prompts"):
        del numbers[name]
    del tensors["rows.prompt_ids"]
    for layer in numbers["layers"]:
        layer["statistics"] = ["attention"] * len(layer["statistics"])
    part = f".statistics.{Attention()!r}"
    old = {n.replace(part, ".statistics.attention"): tensor for n, tensor in tensors.items()}
    assert old.keys() != tensors.keys()
    saving.write(tmp_path / "old", saving.Contents(numbers, old))
    loaded = kvprune.ComposedCache.load(tmp_path / "old", cache.policies, model)
    for at in range(20, 30):
        new = ids[:, at : at + 1]
        logits = [model(new, past_key_values=each).logits for each in (cache, loaded)]
        assert torch.equal(*logits)
    for layer in range(LAYERS):
        assert torch.equal(cache.columns(layer), loaded.columns(layer))
