"""What can be done with a cache in the middle of something, and after something went wrong."""

from __future__ import annotations

import gc
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import DynamicCache

import kvprune
from kvprune import ComposedCache, KVPruneError
from kvprune.policies import H2O, StreamingLLM
from kvprune.storage.layer import SlotLayer

from ..bad_input.checks import assert_refused, assert_unusable
from ..support.models import fresh_model, prompt, tiny_model


class Broken(Exception):
    """Whatever went wrong."""


class Breaks(kvprune.TokenPolicy):
    """Raises at a layer, once."""

    def __init__(self, error: BaseException, layer: int = 1) -> None:
        super().__init__()
        self.state: dict[str, Any] = {"error": error, "layer": layer}

    def rank_slots(self, slots: kvprune.SlotView) -> None:
        """Or keeps everything."""
        if self.state["error"] is not None and slots.layer == self.state["layer"]:
            error, self.state["error"] = self.state["error"], None
            raise error


def attributes(cache: ComposedCache) -> dict[str, Any]:
    """All that a cache knows, and its parts."""
    parts = ("state", "session", "guard", "_watch")
    return vars(cache) | {part: vars(getattr(cache, part)) for part in parts}


def as_new(cache: ComposedCache) -> None:
    """After a reset it holds what a new one holds, to the last attribute, and works."""
    cache.reset()
    new = ComposedCache(cache.policies)
    assert attributes(cache) == attributes(new) and repr(cache) == repr(new)
    generate: Any = tiny_model().generate
    for each in (cache, new):
        generate(prompt(1, 9), cache=each, max_new_tokens=3)
    assert [cache.columns(i).tolist() for i in range(4)] == [
        new.columns(i).tolist() for i in range(4)
    ]


MOVES: dict[str, Any] = {
    "select_rows": lambda cache, path: cache.reorder_cache(torch.tensor([1, 0])),
    "crop": lambda cache, path: cache.crop(-2),
    "save": lambda cache, path: cache.save(path),
    "forward": lambda cache, path: tiny_model()(prompt(2, 1), past_key_values=cache),
}


@pytest.mark.parametrize("move", MOVES)
def test_an_error_while_layers_move_spoils_the_cache(move, monkeypatch, tmp_path):
    """Some have moved by then, as where memory is short, and others have not."""
    name = move if move == "select_rows" else "settle"
    model, cache, moved = tiny_model(), ComposedCache([H2O(2, 3)]), []
    with torch.no_grad():
        model(prompt(2, 9), past_key_values=cache)
        cache.announce_prompt(0, 9)
        cache.activate_past_recording()
        model(prompt(2, 3), past_key_values=cache)
    plain = getattr(SlotLayer, name)

    def once(layer: SlotLayer, *given: Any) -> None:
        moved.append(layer)
        if len(moved) == 2:
            raise Broken("no memory")
        plain(layer, *given)

    monkeypatch.setattr(SlotLayer, name, once)
    with pytest.raises(Broken):
        MOVES[move](cache, tmp_path / "cache.safetensors")
    assert_unusable(cache, "cannot be used any more: an error ended .* in its middle")
    as_new(cache)


@pytest.mark.parametrize("rows", [[0, 2], [-1, 0]])
def test_rows_that_are_not_there_are_refused(rows):
    model, cache = tiny_model(), ComposedCache([H2O(2, 3)])
    with torch.no_grad():
        model(prompt(2, 9), past_key_values=cache)
    match = f"rows of a cache: expected numbers of its 2 rows, from 0, got {min(rows)} to"
    assert_refused(cache, match, lambda: cache.reorder_cache(torch.tensor(rows)))


WRONG_ROWS = [torch.tensor([1.0, 0.0]), torch.tensor([True, False]), torch.tensor([[1, 0]])]


@pytest.mark.parametrize("rows", WRONG_ROWS, ids=repr)
def test_what_is_no_row_is_refused(rows):
    model, cache = tiny_model(), ComposedCache([H2O(2, 3)])
    with torch.no_grad():
        model(prompt(2, 9), past_key_values=cache)
    match = f"expected their numbers, an int64 tensor .* got {rows.dtype} of shape"
    assert_refused(cache, match, lambda: cache.reorder_cache(rows))


@pytest.mark.parametrize("rows", [[0], torch.tensor([2]), torch.tensor([True, False, True])])
def test_a_selection_of_what_is_not_there_is_refused(rows):
    model, cache = tiny_model(), ComposedCache([H2O(2, 3)])
    with torch.no_grad():
        model(prompt(2, 9), past_key_values=cache)
    match = "batch_select_indices: expected a tensor of numbers of the cache's 2 rows"
    assert_refused(cache, match, lambda: cache.batch_select_indices(rows))


@pytest.mark.parametrize("policies", [[], [H2O(2, 3)], [StreamingLLM(1, 3, positions="cache")]])
def test_a_reset_cache_is_as_new(policies):
    """Whatever was done with it: beams, drafts, padding, a copy of a prompt."""
    cache, ids = ComposedCache(policies), prompt(2, 9)
    mask = torch.ones_like(ids)
    mask[0, :3] = 0
    tiny_model().generate(ids, attention_mask=mask, cache=cache, max_new_tokens=3, num_beams=2)
    cache.activate_past_recording()
    tiny_model()(prompt(4, 2), past_key_values=cache)
    as_new(cache)


# Resets in the middle.


def test_reset_in_the_middle_of_a_forward_is_refused():
    """Which then goes on as if nobody had asked."""
    errors = list[str]()

    class Resets(kvprune.TokenPolicy):
        def rank_slots(self, slots: kvprune.SlotView) -> None:
            with pytest.raises(KVPruneError, match="in the middle of a forward") as error:
                cache.reset()
            errors.append(str(error.value))

    cache, alone = ComposedCache([Resets()]), ComposedCache()
    for each in (cache, alone):
        tiny_model()(prompt(1, 9), past_key_values=each)
    assert len(errors) == 4 and cache.seen == 9
    assert cache.columns(3).tolist() == alone.columns(3).tolist()
    as_reset = cache.reset()
    assert as_reset is None and cache.seen == 0


def test_reset_in_the_middle_of_generate_is_refused():
    """Between two of its forwards, as from a streamer or a processor."""

    def resets(ids: Tensor, scores: Tensor) -> Tensor:
        with pytest.raises(KVPruneError, match="in the middle of a generate"):
            cache.reset()
        return scores

    cache = ComposedCache([H2O(2, 3)])
    got = tiny_model().generate(
        prompt(1, 9), cache=cache, max_new_tokens=4, logits_processor=[resets]
    )
    expected = tiny_model().generate(
        prompt(1, 9), cache=ComposedCache([H2O(2, 3)]), max_new_tokens=4
    )
    assert torch.equal(got, expected)
    cache.reset()


@pytest.mark.parametrize("how", ["forward", "generate"])
@pytest.mark.parametrize("error", [KeyboardInterrupt, SystemExit, ValueError])
def test_what_was_interrupted_can_be_reset(how, error):
    """torch tells nobody of Ctrl-C; the cache says that it cannot be used, and how to mend it."""
    cache = ComposedCache([Breaks(error())])
    options: dict[str, Any] = {"past_key_values": cache}
    options |= {"max_new_tokens": 3} if how == "generate" else {}
    use = tiny_model().generate if how == "generate" else tiny_model()
    with pytest.raises(error):
        use(prompt(1, 9), **options)
    with pytest.raises(KVPruneError, match=r"cache.reset\(\)"):
        tiny_model()(prompt(1, 9), past_key_values=cache)
    as_new(cache)


def test_an_interrupt_between_two_forwards_leaves_a_cache_that_goes_on():
    """Nothing is half done then."""

    def interrupts(ids: Tensor, scores: Tensor) -> Tensor:
        if ids.shape[1] == 11:
            raise KeyboardInterrupt
        return scores

    cache = ComposedCache()
    with pytest.raises(KeyboardInterrupt):
        tiny_model().generate(
            prompt(1, 9), cache=cache, max_new_tokens=5, logits_processor=[interrupts]
        )
    assert cache.seen == 11
    tiny_model()(prompt(1, 1), past_key_values=cache)
    as_new(cache)


# What is said of a cache that failed.


@pytest.mark.parametrize("layer", range(4))
@pytest.mark.parametrize("again", [False, True])
def test_a_cache_that_failed_can_be_printed(layer, again):
    """In its first forward some layers hold nothing; whoever looks for the error prints it."""
    cache, policy = ComposedCache(), Breaks(Broken(), layer)
    if again:
        cache = ComposedCache([Breaks(None, layer)])  # type: ignore[arg-type]
        tiny_model()(prompt(1, 9), past_key_values=cache)
        policy = cache.policies[0]  # type: ignore[assignment]
        policy.state["error"] = Broken()
    else:
        cache = ComposedCache([policy])
    with pytest.raises(Broken):
        tiny_model()(prompt(1, 5), past_key_values=cache)
    said = repr(cache)
    assert f"seen {9 if again else 0} columns" in said and "cannot be used any more" in said


def test_a_cache_can_be_printed_in_the_middle_of_a_forward():
    """As a debugger does."""
    said = list[str]()

    class Prints(kvprune.TokenPolicy):
        def rank_slots(self, slots: kvprune.SlotView) -> None:
            said.append(repr(cache))

    cache = ComposedCache([Prints()])
    tiny_model()(prompt(1, 9), past_key_values=cache)
    assert len(said) == 4 and all("seen 0 columns" in s for s in said)


def test_a_layer_that_is_half_made_does_not_keep_a_cache_from_being_printed():
    """Whatever an error left of it."""
    cache = ComposedCache([H2O(2, 3)])
    tiny_model()(prompt(1, 9), past_key_values=cache)
    cache.layers[2].rectangles[0].held_columns = None
    assert "seen 9 columns" in repr(cache)


def test_a_failed_cache_says_so_whatever_it_is_handed():
    """It is not the prompt that is wrong, nor the mask."""
    cache = ComposedCache([Breaks(Broken(), 3)])
    with pytest.raises(Broken):
        tiny_model()(prompt(1, 9), past_key_values=cache)
    cache.state.seen = 9
    ids = prompt(1, 4)
    for use in (
        lambda: tiny_model().generate(ids, cache=cache, max_new_tokens=2),
        lambda: tiny_model().generate(
            ids, attention_mask=torch.ones(1, 7), cache=cache, max_new_tokens=2
        ),
        lambda: tiny_model().generate(cache=cache, max_new_tokens=2),
        lambda: tiny_model()(ids, attention_mask=torch.ones(1, 7), past_key_values=cache),
    ):
        with pytest.raises(KVPruneError, match="cannot be used any more"):
            use()


# generate inside generate.


FUNCTIONS = {
    "generate": "return model.generate(**kwargs)",
    "by turns": """
    ids, new = kwargs["input_ids"], kwargs["max_new_tokens"]
    cache = kwargs.get("cache", kwargs.get("past_key_values"))
    for _ in range(new):
        ids = model.generate(ids, past_key_values=cache, max_new_tokens=1)
    return ids""",
    "loop": """
    import torch
    ids, cache = kwargs["input_ids"], kwargs.get("cache", kwargs.get("past_key_values"))
    for _ in range(kwargs["max_new_tokens"]):
        new = ids[:, cache.get_seq_length():]
        logits = model(new, past_key_values=cache).logits
        ids = torch.cat([ids, logits[:, -1:].argmax(-1)], 1)
    return ids""",
    "both": """
    ids, cache = kwargs["input_ids"], kwargs.get("cache", kwargs.get("past_key_values"))
    model(ids[:, :-1], past_key_values=cache)
    return model.generate(ids, past_key_values=cache, max_new_tokens=kwargs["max_new_tokens"])""",
}


@pytest.mark.parametrize("name", FUNCTIONS)
@pytest.mark.parametrize("policies", [[], [H2O(2, 3)], [H2O(0.3, 0.2)]], ids=repr)
def test_a_custom_generate_may_use_its_cache_as_it_likes(name, policies, tmp_path: Path):
    """As without it: the same tokens, and the same columns kept."""
    model: Any = fresh_model()
    model.save_pretrained(tmp_path)
    (tmp_path / "custom_generate").mkdir()
    source = f"def generate(model, **kwargs):\n    {FUNCTIONS[name].strip()}\n"
    (tmp_path / "custom_generate" / "generate.py").write_text(source)
    kvprune.attach(model)
    cache, expected = ComposedCache(policies), ComposedCache(policies)
    options: dict[str, Any] = {"input_ids": prompt(1, 12), "max_new_tokens": 5}
    got = model.generate(
        **options, cache=cache, custom_generate=str(tmp_path), trust_remote_code=True
    )
    said = model.generate(**options, cache=expected)
    if not policies:
        dense = model.generate(**options, past_key_values=DynamicCache())
        assert torch.equal(got, dense)
    if name in ("generate", "loop"):
        assert torch.equal(got, said)
        held = [[c.columns(i).tolist() for i in range(4)] for c in (cache, expected)]
        assert held[0] == held[1]
    assert not cache.session.in_generate and cache.session.prompt_end == 0
    tiny = torch.cat([got, prompt(1, 3)], 1)
    assert model.generate(tiny, cache=cache, max_new_tokens=2).shape[1] == tiny.shape[1] + 2


def test_a_custom_function_may_generate_inside():
    """One that is handed over as such; the loop around it goes on with what was read."""

    def twice(model: Any, input_ids: Tensor, **kwargs: Any) -> Any:
        cache = kwargs.get("cache", kwargs.get("past_key_values"))
        first = model.generate(input_ids, past_key_values=cache, max_new_tokens=2)
        return model.generate(first, past_key_values=cache, max_new_tokens=3)

    model, cache = tiny_model(), ComposedCache([StreamingLLM(2, 6)])
    got = model.generate(prompt(1, 9), cache=cache, max_new_tokens=5, custom_generate=twice)
    expected = model.generate(
        prompt(1, 9), cache=ComposedCache([StreamingLLM(2, 6)]), max_new_tokens=5
    )
    assert torch.equal(got, expected) and cache.seen == 13


def test_what_is_assisted_inside_leaves_no_drafts_outside():
    """The state of the inner `generate` ends with it."""

    def inside(model: Any, input_ids: Tensor, **kwargs: Any) -> Any:
        cache = kwargs.get("cache", kwargs.get("past_key_values"))
        said = model.generate(
            input_ids, past_key_values=cache, max_new_tokens=4, prompt_lookup_num_tokens=2
        )
        assert isinstance(cache, ComposedCache)
        assert cache.session.in_generate and not cache.session.recording
        return said

    model, cache = tiny_model(), ComposedCache([H2O(3, 4)])
    ids = prompt(1, 5).repeat(1, 3)
    got = model.generate(ids, cache=cache, max_new_tokens=4, custom_generate=inside)
    assert torch.equal(got, model.generate(ids, cache=ComposedCache([H2O(3, 4)]), max_new_tokens=4))


# What is left behind.


@pytest.mark.parametrize("eos", [None, 3])
@pytest.mark.parametrize("policies", [[], [H2O(3, 3)], [H2O(3, 3, positions="cache")]], ids=repr)
def test_a_cache_that_nobody_has_frees_its_memory_at_once(policies, eos):
    """Keys and values do not wait for the garbage collector, as those of DynamicCache do not."""
    gc.collect()
    gc.disable()
    try:
        cache = ComposedCache(policies)
        options = {"max_new_tokens": 4, "eos_token_id": eos, "pad_token_id": 0}
        tiny_model().generate(prompt(2, 12), cache=cache, **options)
        held = [weakref.ref(layer.keys.untyped_storage()) for layer in cache.layers]
        held += [weakref.ref(layer) for layer in cache.layers] + [weakref.ref(cache)]
        assert all(reference() is not None for reference in held[-5:])
        del cache
        assert not [reference() for reference in held if reference() is not None]
    finally:
        gc.enable()
