"""A cache knows the prompt that it has read: `generate` with another one is refused."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

import kvprune
from kvprune import KVPruneError
from kvprune.cache import saving
from kvprune.policies import H2O, StreamingLLM

from ..support.models import left_padded, prompt, tiny_model
from .test_saving import contents_of

LENGTH = 12
ANOTHER = "the prompt is not the one that this cache has read"


def read(
    rows: int = 1, how: str = "generate", **options: Any
) -> tuple[kvprune.ComposedCache, Tensor]:
    """A cache and all ids of its rows."""
    cache, ids = kvprune.ComposedCache([StreamingLLM(2, 6)]), prompt(rows, LENGTH)
    if how == "generate":
        model: Any = tiny_model()
        return cache, model.generate(ids, cache=cache, max_new_tokens=4, **options)
    with torch.no_grad():
        tiny_model()(ids, past_key_values=cache)
    return cache, ids


def other(ids: Tensor, row: int, column: int) -> Tensor:
    """The same but for one id, and longer."""
    ids = torch.cat([ids, prompt(len(ids), 5, 3)], 1)
    ids[row, column] = ids[row, column] % 50 + 3
    return ids


def refused(cache: kvprune.ComposedCache, ids: Tensor, where: str, **options: Any) -> None:
    """And nothing changed."""
    model: Any = tiny_model()
    before = cache.seen, [cache.columns(i).tolist() for i in range(len(cache))]
    with pytest.raises(KVPruneError, match=f"{ANOTHER}.*{where}"):
        model.generate(ids, cache=cache, max_new_tokens=2, **options)
    assert before == (cache.seen, [cache.columns(i).tolist() for i in range(len(cache))])


def taken(cache: kvprune.ComposedCache, ids: Tensor, **options: Any) -> Tensor:
    """All ids with two more tokens."""
    model: Any = tiny_model()
    found: Tensor = model.generate(ids, cache=cache, max_new_tokens=2, **options)
    return found


HOW: dict[str, dict[str, Any]] = {
    "generate": {},
    "chunks": {"prefill_chunk_size": 5},
    "chunks of one": {"prefill_chunk_size": 1},
    "forward": {"how": "forward"},
}


@pytest.mark.parametrize("how", HOW.values(), ids=HOW)
@pytest.mark.parametrize(("row", "column"), [(0, 0), (1, 4), (1, LENGTH - 1)])
def test_another_prompt_is_refused_with_its_rows(how, row, column):
    """Whichever id it is, before anything changes; the right one is taken afterwards."""
    cache, ids = read(2, **how)
    refused(cache, other(ids, row, column), rf"rows \[{row}\], first at column {column} of the")
    taken(cache, torch.cat([ids, prompt(2, 5)], 1))


def test_every_turn_is_known():
    """What was generated in between is not: generate knows it, a cache does not."""
    cache, ids = read()
    ids = taken(cache, torch.cat([ids, prompt(1, 5)], 1))
    for column in (3, LENGTH + 4, LENGTH + 8):
        refused(cache, other(ids, 0, column), f"first at column {column} of")
    taken(cache, other(ids, 0, LENGTH + 1))


def test_new_ids_alone_are_not_compared():
    """They may be any."""
    cache, _ = read()
    mask = torch.ones(1, cache.seen + 5, dtype=torch.long)
    taken(cache, prompt(1, 5, 8), attention_mask=mask)


def test_padding_does_not_matter():
    """Neither that of the first prompt, nor what a later mask hides."""
    cache, inputs = kvprune.ComposedCache(), left_padded(prompt(2, LENGTH), [0, 5])
    ids = tiny_model().generate(**inputs, cache=cache, max_new_tokens=4)
    longer = torch.cat([ids, prompt(2, 5)], 1)
    mask = torch.ones_like(longer)
    mask[1, :5] = 0
    longer[1, 2] = 17
    refused(copy.deepcopy(cache), other(ids, 1, 6), r"rows \[1\]", attention_mask=mask)
    longer = taken(cache, longer, attention_mask=mask)
    longer, mask = (
        torch.cat([longer, prompt(2, 3)], 1),
        torch.nn.functional.pad(mask, (0, 5), value=1),
    )
    longer[0, 1], mask[0, :3] = 19, 0
    longer = taken(cache, longer, attention_mask=mask)
    # It was hidden, and stays so.
    taken(
        cache,
        torch.cat([longer, prompt(2, 3)], 1),
        attention_mask=torch.ones(2, longer.shape[1] + 3),
    )


@pytest.mark.parametrize("move", ["copy", "reorder", "repeat", "select", "mask", "file", "crop"])
def test_ids_go_with_their_rows(move, tmp_path):
    """Through whatever a cache can go through."""
    cache = kvprune.ComposedCache()
    ids = prompt(3, LENGTH)
    with torch.no_grad():
        tiny_model()(ids, past_key_values=cache)
    rows = {"reorder": [2, 0, 1], "repeat": [0, 0, 1, 1, 2, 2], "select": [2, 1], "mask": [0, 2]}
    if move == "copy":
        cache = copy.deepcopy(cache)
    elif move == "reorder":
        # As beams do, step by step.
        cache.reorder_cache(torch.tensor([1, 2, 0]))
        cache.reorder_cache(torch.tensor([1, 2, 0]))
    elif move == "repeat":
        cache.batch_repeat_interleave(2)
    elif move == "select":
        cache.batch_select_indices(torch.tensor([2, 1]))
    elif move == "mask":
        cache.batch_select_indices(torch.tensor([True, False, True]))
    elif move == "file":
        cache.save(tmp_path / "cache")
        cache = kvprune.ComposedCache.load(tmp_path / "cache", [], tiny_model())
    elif move == "crop":
        cache.crop(-4)
        # What was taken back may be another.
        taken(copy.deepcopy(cache), other(ids, 1, LENGTH - 4))
    ids = ids[rows.get(move, [0, 1, 2])]
    last = len(ids) - 1
    refused(copy.deepcopy(cache), other(ids, last, 7), rf"rows \[{last}\], first at column 7")
    taken(cache, other(ids, 0, LENGTH))


def test_beams_know_their_prompt():
    """Each of a row's beams."""
    cache, ids = kvprune.ComposedCache(), prompt(2, LENGTH)
    how = {"num_beams": 3, "num_return_sequences": 3, "max_new_tokens": 4}
    said: Any = tiny_model().generate(ids, cache=cache, **how)
    assert cache.batch_size == 6
    refused(cache, other(said, 4, 2), r"rows \[4\], first at column 2")
    short = torch.cat([ids, prompt(2, 9)], 1)
    refused(cache, other(short, 1, 2), r"rows \[3, 4, 5\]", num_beams=3)
    taken(cache, short, num_beams=3)


def test_a_reset_cache_takes_any_prompt():
    """It has read none."""
    cache, ids = read()
    cache.reset()
    taken(cache, other(ids, 0, 3))


def test_a_file_of_an_earlier_release_is_taken(tmp_path: Path):
    """It does not say what was read: nothing is compared."""
    cache, ids = read(how="forward")
    saving.write(tmp_path / "cache", without_ids(contents_of(cache)))
    assert "rows.prompt_ids" not in load_file(tmp_path / "cache")
    loaded = kvprune.ComposedCache.load(tmp_path / "cache", [StreamingLLM(2, 6)], tiny_model())
    taken(loaded, other(ids, 0, 3))


def without_ids(contents: saving.Contents) -> saving.Contents:
    """As files were written before."""
    tensors = {n: t for n, t in contents.tensors.items() if n != "rows.prompt_ids"}
    return saving.Contents(contents.numbers, tensors)


def test_embeddings_are_not_compared():
    """They are no ids."""
    cache, model = kvprune.ComposedCache(), tiny_model()
    embeds = model.get_input_embeddings()(prompt(1, LENGTH + 4)).detach()
    with torch.no_grad():
        model(inputs_embeds=embeds[:, :LENGTH], past_key_values=cache)
    model.generate(inputs_embeds=embeds, cache=copy.deepcopy(cache), max_new_tokens=2)
    taken(cache, prompt(1, LENGTH + 4, 5))


def test_drafts_are_no_prompt():
    """Assisted decoding reads several tokens at once behind the prompt."""
    cache, ids = kvprune.ComposedCache([H2O(4, 4)]), prompt(1, 6).repeat(1, 4)
    said = taken(cache, ids, prompt_lookup_num_tokens=3)
    assert said.shape[1] == 26
    known = cache.state.read
    assert known is not None and known.ids.tolist() == ids.tolist()


def test_no_step_of_decoding_reads_or_keeps_ids():
    """They are looked at once for each prompt."""
    cache, _ = read()
    known = cache.state.read
    with torch.no_grad():
        tiny_model()(prompt(1, 1), past_key_values=cache)
    assert cache.state.read is known and known is not None and known.ids.dtype == torch.int32
