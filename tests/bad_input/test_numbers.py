"""Numbers out of range, and heads that do not fit."""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import save_file
from torch import Tensor, nn

import kvprune
from kvprune import ComposedCache, KVPruneError
from kvprune.policies import H2O, SDTP, SDTPHeads, StreamingLLM

from ..support.models import (
    LAYERS,
    fresh_model,
    prompt,
    tiny_model,
)
from ..support.strategies import sdtp_heads
from .checks import INF, LENGTH, NAN, assert_refused, h2o, held, pruner

# Numbers out of range.

NO_SHARE: list[Any] = [-1, -0.1, 1.5, 2.0, NAN, INF, -INF, True, "0.5", None, [1], 1j]
TOO_FEW: list[Any] = [0, 0.0]
NO_COUNT: list[Any] = [-1, 2.0, 0.5, NAN, True, "4", [1]]


@pytest.mark.parametrize("value", NO_SHARE, ids=repr)
@pytest.mark.parametrize(
    ("make", "name"),
    [
        (lambda v: H2O(heavy=v), "H2O: heavy"),
        (lambda v: H2O(recent=v), "H2O: recent"),
        (lambda v: StreamingLLM(window=v), "StreamingLLM: window"),
        (lambda v: pruner(local=v), "SDTP: local"),
    ],
)
def test_budget_that_is_neither_tokens_nor_a_share(make, name, value):
    """The error names policy, argument and value, and both ways to put it."""
    with pytest.raises(KVPruneError) as caught:
        make(value)
    message = str(caught.value)
    assert message.startswith(f"{name}={value!r}: expected a number of tokens (an int")
    assert "a share of the prompt (a float above 0.0 and up to 1.0)" in message


@pytest.mark.parametrize("value", TOO_FEW, ids=repr)
@pytest.mark.parametrize(
    ("make", "name"),
    [
        (lambda v: H2O(recent=v), "H2O: recent"),
        (lambda v: H2O(heavy=v, recent=v), "H2O: recent"),
        (lambda v: StreamingLLM(window=v), "StreamingLLM: window"),
        (lambda v: StreamingLLM(sinks=0, window=v), "StreamingLLM: window"),
    ],
)
def test_budget_that_would_not_keep_the_newest_token(make, name, value):
    """So a total of zero cannot be put."""
    with pytest.raises(KVPruneError, match=rf"{name}={value!r}: expected .*int of at least 1"):
        make(value)


@pytest.mark.parametrize("value", [*NO_COUNT, None], ids=repr)
@pytest.mark.parametrize(
    ("make", "name", "least"),
    [
        (lambda v: StreamingLLM(sinks=v), "StreamingLLM: sinks", 0),
        (lambda v: pruner(sinks=v), "SDTP: sinks", 0),
        (lambda v: pruner(min_tokens=v), "SDTP: min_tokens", 1),
    ],
)
def test_count_that_is_none(make, name, least, value):
    """Sinks and the like are whole numbers."""
    with pytest.raises(KVPruneError) as caught:
        make(value)
    assert str(caught.value).startswith(f"{name}={value!r}: expected")
    assert f"int of at least {least}" in str(caught.value)


@pytest.mark.parametrize("value", [*NO_COUNT, 0], ids=repr)
def test_stages_that_are_none(value):
    """None alone is allowed: as many as the heads have."""
    with pytest.raises(KVPruneError, match=r"SDTP: stages=.*expected an int of at least 1"):
        pruner(stages=value)


@pytest.mark.parametrize("value", [0.0, -0.5, 1.1, 2.0, NAN, INF, 0, 2, True, "0.5"], ids=repr)
def test_share_that_sdtp_cannot_keep(value):
    """`keep` is a share, never a count."""
    with pytest.raises(KVPruneError, match=r"SDTP: keep=.*expected a share \(a float in \(0, 1\]"):
        pruner(keep=value)


# The learned heads of SDTP.


@pytest.mark.parametrize(
    "heads", [b"heads", SDTPHeads, nn.Linear(32, 2)], ids=["bytes", "class", "module"]
)
def test_sdtp_heads_that_are_none(heads):
    """A folder is named by a text or a path."""
    with pytest.raises(KVPruneError, match=r"SDTP: heads: .*SDTPHeads\.from_pretrained\(folder\)"):
        SDTP(heads)


SIZES_OF_HEADS: dict[str, Any] = {"hidden_size": 32, "num_layers": 8, "first_layer": 1, "every": 2}


@pytest.mark.parametrize("value", [*NO_COUNT, None], ids=repr)
@pytest.mark.parametrize(
    "name", [*SIZES_OF_HEADS, "query_heads", "query_size", "query_tokens", "window"]
)
def test_heads_of_no_size(name, value):
    """Every size is a whole number."""
    with pytest.raises(KVPruneError, match=f"SDTPHeads: {name}=.*expected an int of at least"):
        SDTPHeads(**{**SIZES_OF_HEADS, name: value})


@pytest.mark.parametrize("stages", [0, -1, 5, 2.0, "2"])
def test_heads_with_stages_that_do_not_fit(stages):
    """A model of 8 layers has room for 4, before layers 1, 3, 5, 7."""
    with pytest.raises(KVPruneError, match=r"stages=.*room for 4 .*expected 1 to 4"):
        SDTPHeads(**SIZES_OF_HEADS, stages=stages)


@pytest.mark.parametrize("keep", [0.0, 1.5, 1, NAN, None, "0.9"])
def test_heads_with_a_share_that_is_none(keep):
    """`keep` is a share, never a count."""
    with pytest.raises(KVPruneError, match=r"SDTPHeads: keep=.*expected a share"):
        SDTPHeads(**SIZES_OF_HEADS, keep=keep)


@pytest.mark.parametrize(
    ("policy", "match"),
    [
        (lambda: pruner(stages=3), r"stages=3: the heads have 2"),
        (lambda: pruner(heads=sdtp_heads(hidden_size=16)), "hidden_size.*Load the heads"),
        (lambda: pruner(heads=SDTPHeads(32, LAYERS + 1)), "num_layers.*Load the heads"),
        (lambda: pruner(heads=sdtp_heads().to("meta")), r"on meta.*move them with heads.to"),
        (lambda: pruner(heads=None), r"no heads ship.*Llama.*kvprune train-sdtp --model"),
    ],
)
def test_sdtp_that_does_not_fit_the_model(policy, match):
    """Told on first use, whichever that is, alone or in a pipeline; nothing is bound then."""
    ids, model = prompt(1, LENGTH), tiny_model()
    for policies in ([policy()], [h2o(), policy()]):
        cache = ComposedCache(policies)
        for use in (model, partial(model.generate, max_new_tokens=2)):
            with pytest.raises(KVPruneError, match=match):
                use(ids, past_key_values=cache)
            assert held(cache) == (0, 0, -1, []) and len(cache) == 0


def test_cache_refused_by_one_model_works_with_another():
    """Heads of another hidden size leave the cache free for the model that they fit."""
    cache = ComposedCache([pruner(heads=sdtp_heads(hidden_size=16))])
    fitting: Any = kvprune.attach(fresh_model(hidden_size=16))
    ids = prompt(1, LENGTH)
    assert_refused(
        cache,
        "hidden_size",
        lambda: tiny_model()(ids, past_key_values=cache),
        lambda: tiny_model().generate(ids, cache=cache, max_new_tokens=2),
        model=fitting,
    )


EIGHT: dict[str, Any] = {"hidden_size": 8, "num_layers": 6}
NOT_HEADS = r"from_pretrained\(.*expected a folder.*that SDTPHeads\.save_pretrained wrote"


@pytest.mark.parametrize("share", [0.0, 0.01, 0.3, 0.9, 0.999])
def test_heads_file_that_is_cut_off(tmp_path, share):
    """In its header or in its tensors."""
    SDTPHeads(**EIGHT).save_pretrained(tmp_path)
    path = tmp_path / "model.safetensors"
    whole = path.read_bytes()
    path.write_bytes(whole[: int(share * len(whole))])
    with pytest.raises(KVPruneError, match=NOT_HEADS):
        SDTPHeads.from_pretrained(tmp_path)


SIZES = json.dumps(EIGHT)
OURS = {"format": "kvprune.SDTPHeads"}
ALL_BUT_ONE = dict(list(SDTPHeads(**EIGHT).state_dict().items())[1:])


def _file(tensors: dict[str, Tensor], **metadata: str) -> Callable[[Path], None]:
    return lambda path: save_file(tensors, path, metadata=metadata or None)


def _header(**metadata: str) -> Callable[[Path], None]:
    return _file(SDTPHeads(**EIGHT).state_dict(), **metadata)


@pytest.mark.parametrize(
    "write",
    [
        lambda path: None,
        lambda path: path.mkdir(),
        lambda path: path.write_text("keep the salient tokens, drop the others\n" * 9),
        _file({}, **OURS, configuration=SIZES),
        _file(ALL_BUT_ONE, **OURS, configuration=SIZES),
        _header(),
        _header(format="pt"),
        _header(format="another", configuration=SIZES),
        _header(**OURS),
        _header(**OURS, configuration="not JSON"),
        _header(**OURS, configuration="[8, 4, 1]"),
        _header(**OURS, configuration=SIZES.replace("8", "0")),
        _header(**OURS, configuration=SIZES.replace("num_layers", "steps")),
        _header(**OURS, configuration=SIZES.replace("8", "16")),
    ],
)
def test_heads_file_of_something_else(tmp_path, write):
    """Missing, a folder, a text, or safetensors with another content."""
    write(tmp_path / "model.safetensors")
    with pytest.raises(KVPruneError, match=NOT_HEADS):
        SDTPHeads.from_pretrained(tmp_path)


@pytest.mark.parametrize("name", ["nowhere", "no/such/repository/at/all", ""])
def test_heads_that_are_nowhere(name, monkeypatch):
    """Neither a folder nor a name that a hub could know."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(KVPruneError, match=NOT_HEADS):
        SDTPHeads.from_pretrained(name)
