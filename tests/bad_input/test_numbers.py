"""Numbers out of range, and heads that do not fit."""

from __future__ import annotations

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

from ..models import (
    LAYERS,
    fresh_model,
    prompt,
    tiny_model,
)
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
        (lambda v: pruner(first_layer=v), "SDTP: first_layer", 0),
        (lambda v: pruner(every=v), "SDTP: every", 1),
        (lambda v: pruner(min_tokens=v), "SDTP: min_tokens", 1),
    ],
)
def test_count_that_is_none(make, name, least, value):
    """Sinks, layers and stages are whole numbers."""
    with pytest.raises(KVPruneError) as caught:
        make(value)
    assert str(caught.value).startswith(f"{name}={value!r}: expected")
    assert f"int of at least {least}" in str(caught.value)


@pytest.mark.parametrize("value", [*NO_COUNT, 0], ids=repr)
def test_stages_that_are_none(value):
    """None alone is allowed: as many as fit."""
    with pytest.raises(KVPruneError, match=r"SDTP: stages=.*expected an int of at least 1"):
        pruner(stages=value)


@pytest.mark.parametrize(
    "value", [0.0, -0.5, 1.1, 2.0, NAN, INF, 0, 2, True, "0.5", None], ids=repr
)
def test_share_that_sdtp_cannot_keep(value):
    """`keep` is a share, never a count."""
    with pytest.raises(KVPruneError, match=r"SDTP: keep=.*expected a share \(a float in \(0, 1\]"):
        pruner(keep=value)


# The learned heads of SDTP.


@pytest.mark.parametrize("heads", [None, "heads.safetensors", SDTPHeads, nn.Linear(32, 2)])
def test_sdtp_without_heads_says_where_to_get_them(heads):
    """Also where the path is passed instead of the heads."""
    with pytest.raises(KVPruneError, match=r"SDTP\(SDTPHeads\.load\(path\)\).*or untrained"):
        SDTP(heads)
    with pytest.raises(KVPruneError, match=r"SDTP\(SDTPHeads\.load\(path\)\).*or untrained"):
        SDTP()


@pytest.mark.parametrize("sizes", [(0, 4, 2), (32, -1, 2), (32, 4, 0), (32.0, 4, 2), (32, 4, "2")])
def test_sdtp_heads_of_no_size(sizes):
    """Every size is a whole number of at least 1."""
    with pytest.raises(KVPruneError, match="SDTPHeads: expected whole numbers of at least 1"):
        SDTPHeads(*sizes)


@pytest.mark.parametrize(
    ("policy", "match"),
    [
        (lambda: pruner(stages=3), r"stages=3 do not fit: .* has room for 2"),
        (lambda: pruner(first_layer=LAYERS), r"do not fit: .* has room for 0"),
        (lambda: pruner(heads=SDTPHeads(16, LAYERS, 2)), "hidden_size.*Load the heads"),
        (lambda: pruner(heads=SDTPHeads(32, LAYERS + 1, 2)), "num_layers.*Load the heads"),
        (lambda: pruner(heads=SDTPHeads(32, LAYERS, 1)), "stages.*Load the heads"),
        (lambda: pruner(heads=SDTPHeads(32, LAYERS, 3)), "stages.*Load the heads"),
        (lambda: pruner(stages=1), "stages.*Load the heads"),
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
    cache = ComposedCache([pruner(heads=SDTPHeads(16, LAYERS, 2).double())])
    fitting: Any = kvprune.attach(fresh_model(hidden_size=16))
    ids = prompt(1, LENGTH)
    assert_refused(
        cache,
        "hidden_size",
        lambda: tiny_model()(ids, past_key_values=cache),
        lambda: tiny_model().generate(ids, cache=cache, max_new_tokens=2),
        model=fitting,
    )


def whole_file(path: Path) -> bytes:
    """The bytes of a file of heads."""
    SDTPHeads(8, 4, 1).save(path)
    SDTPHeads.load(path)
    return path.read_bytes()


@pytest.mark.parametrize("share", [0.0, 0.01, 0.3, 0.9, 0.999])
def test_heads_file_that_is_cut_off(tmp_path, share):
    """In its header or in its tensors."""
    path = tmp_path / "heads.safetensors"
    whole = whole_file(path)
    path.write_bytes(whole[: int(share * len(whole))])
    with pytest.raises(KVPruneError, match=r"heads\.safetensors.*expected a file that SDTPHeads.s"):
        SDTPHeads.load(path)


SIZES = '{"hidden_size": 8, "num_layers": 4, "stages": 1}'
OURS = {"format": "kvprune.SDTPHeads"}
ALL_BUT_ONE = dict(list(SDTPHeads(8, 4, 1).state_dict().items())[1:])


def _file(tensors: dict[str, Tensor], **metadata: str) -> Callable[[Path], None]:
    return lambda path: save_file(tensors, path, metadata=metadata or None)


def _header(**metadata: str) -> Callable[[Path], None]:
    return _file(SDTPHeads(8, 4, 1).state_dict(), **metadata)


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
        _header(**OURS, configuration=SIZES.replace("stages", "steps")),
        _header(**OURS, configuration=SIZES.replace("8", "16")),
    ],
)
def test_heads_file_of_something_else(tmp_path, write):
    """Missing, a folder, a text, or safetensors with another content."""
    path = tmp_path / "heads.safetensors"
    write(path)
    with pytest.raises(KVPruneError, match=r"heads\.safetensors.*expected a file that SDTPHeads.s"):
        SDTPHeads.load(path)
