"""Policies as text: what is read, what is written, and what is refused."""

from __future__ import annotations

import sys
import types
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import kvprune
from kvprune import KVPruneError, Quantized
from kvprune.evaluation.specs import cache_of, canonical, parse, store_of
from kvprune.policies import H2O, SDTP, SDTPHeads, StreamingLLM
from kvprune.policy.composition import Union

from ..support.models import prompt, tiny_model
from ..support.strategies import sdtp_heads

shares = st.floats(0.0, 1.0, exclude_min=True)
tokens = st.integers(1, 10**6)
some_layers = st.none() | st.lists(st.integers(0, 40), unique=True).map(sorted)
h2o = st.builds(
    H2O,
    st.just(0) | tokens | shares,
    tokens | shares,
    st.sampled_from(["original", "cache"]),
    layers=some_layers,
)
streaming = st.builds(
    StreamingLLM,
    st.integers(0, 9),
    tokens | shares,
    st.sampled_from(["original", "cache"]),
    layers=some_layers,
)
sdtp = st.builds(
    SDTP,
    st.none() | st.text(),
    keep=st.none() | shares,
    stages=st.none() | st.integers(1, 9),
    local=tokens | shares,
)
union = st.lists(h2o | streaming, min_size=2, max_size=3).map(lambda parts: Union.of(*parts))
pipelines = st.lists(h2o | streaming | sdtp | union, max_size=4)


@given(pipelines)
def test_what_is_written_is_read_again(policies):
    """As equal policies, from the canonical text and from what repr prints of a list."""
    assert parse(canonical(policies)) == policies
    assert parse(repr(policies)) == policies
    assert parse(repr(kvprune.ComposedCache(policies)).removesuffix(": empty")) == policies
    assert canonical(parse(canonical(policies))) == canonical(policies)


READ = {
    "dense": [],
    " Dense ": [],
    "h2o": [H2O()],
    "H2O()": [H2O()],
    "h2o(heavy=256,recent=256)": [H2O(256, 256)],
    "h2o(3, 4)": [H2O(3, 4)],
    "h2o(heavy=1e-1, recent=.5, layers=[0, 2],)": [H2O(0.1, 0.5, layers=[0, 2])],
    "streamingllm": [StreamingLLM()],
    "sdtp+h2o": [SDTP(), H2O()],
    "sdtp(heads='a+b|c), ')": [SDTP("a+b|c), ")],
    "SDTP(heads=..., keep=None, sinks=2)": [SDTP(sinks=2)],
    "sdtp+streaming(window=508)|h2o+h2o(9,9)": [
        SDTP(),
        StreamingLLM(window=508) | H2O(),
        H2O(9, 9),
    ],
    "sdtp\n  + h2o": [SDTP(), H2O()],
    "(sdtp) + (h2o|h2o)": [SDTP(), H2O() | H2O()],
}


@pytest.mark.parametrize("text", READ)
def test_specs_are_read(text):
    """Names in any case; a union binds tighter than a pipeline."""
    assert parse(text) == READ[text]


REFUSED = {
    "h20": "no policy 'h20'.*did you mean 'h2o'",
    "stream": "did you mean 'streaming'",
    "h2o(heavvy=1)": "H2O has no argument 'heavvy'.*did you mean 'heavy'",
    "h2o(heavy=2.0)": r"policy 'h2o\(heavy=2.0\)': H2O: heavy=2.0: expected",
    "h2o|sdtp": r"policy 'h2o\|sdtp': .*share no hook",
    "h2o(1, heavy=2)": "multiple values",
    "h2o(heavy=1, heavy=2)": "twice",
    "h2o(heavy=..., heavy=3)": "twice",
    "h2o(heavy recent 3)": "Python's syntax.*forgot a comma",
    f"{__name__}:Broken": "RuntimeError: a mistake",
    "h2o(heavy=1, 2)": "positional argument follows keyword argument",
    "h2o(": "closed",
    "h2o(heavy='x": "unterminated string",
    "h2o)": r"unmatched '\)'",
    "h2o(heavy=1 2)": "Python's syntax.*forgot a comma",
    "h2o(heavy=open('x'))": "expected a number, a text in quotes, None, a list or a policy",
    "h2o(heavy=x)": "expected a number",
    "h2o h2o": "Python's syntax",
    "h2o+": "Python's syntax",
    " ": "got no text",
    "h2o(...)": "with their names",
    "h2o(**{})": "no argument '\\*\\*'",
    "h2o(*[1])": "expected a number",
    "3": "expected the name of a policy, or module:Class, got '3'",
    "(h2o+h2o)|h2o": r"expected the name.*got 'h2o \+ h2o'",
    "sdtp h2o|'x": "Python's syntax",
    "h2o+dense": "dense to stand alone",
    "os:getcwd": "subclass of kvprune.TokenPolicy",
    "no_such_module:Class": "No module named 'no_such_module'",
    "sdtpheads": "no policy 'sdtpheads'",
}


@pytest.mark.parametrize("text", REFUSED)
def test_what_is_no_spec_is_refused(text):
    """With what is wrong with it, and nothing is ever run."""
    with pytest.raises(KVPruneError, match=f"(?s){REFUSED[text]}"):
        parse(text)


def test_a_spec_may_name_a_store():
    """As the text of a cache does; and that text is read as an equal cache."""
    for text in ("ComposedCache([sdtp, h2o(3, 4)], store=quantized(bits=8))", "Quantized(8)"):
        store = cache_of(text).store if "[" in text else store_of(text)
        assert store == Quantized(bits=8)
    cache = cache_of("ComposedCache([h2o(3, 4)], store=Quantized(bits=(8, 4), group=32))")
    assert cache.policies == (H2O(3, 4),) and cache.store == Quantized((8, 4), 32)
    text = canonical(cache.policies, cache.store)
    for said in (text, repr(cache).removesuffix(": empty")):
        assert (cache_of(said).policies, cache_of(said).store) == (cache.policies, cache.store)
    assert cache_of(canonical([], Quantized())).policies == () == cache_of("dense").policies
    assert store_of(" Plain") is None and store_of("quantized") == Quantized()
    assert cache_of("h2o").store is None


NO_STORES = {
    "ComposedCache([h2o], store=h2o)": "expected the store quantized, as .*got h2o",
    "ComposedCache([h2o], store='plain')": "expected the name of a policy.*got",
    "ComposedCache([h2o], store=quantized(bits=3))": "Quantized: bits=3: expected 4, 5 or 8",
    "ComposedCache([h2o], store=quantized(bit=4))": "no argument 'bit'.*did you mean 'bits'",
    "ComposedCache([h2o], stores=quantized)": r"expected ComposedCache\(\[policies\], store=",
    "ComposedCache([h2o], quantized)": r"expected ComposedCache\(\[policies\], store=",
    "h2o + quantized": "there is no policy 'quantized'",
}


@pytest.mark.parametrize("text", NO_STORES)
def test_what_is_no_store_is_refused(text):
    """With what is wrong with it."""
    with pytest.raises(KVPruneError, match=f"(?s){NO_STORES[text]}"):
        cache_of(text)


def test_stores_where_there_are_none_are_refused():
    """By a command that takes policies alone; and names of stores that there are not."""
    with pytest.raises(KVPruneError, match="expected policies alone, got a store: Quantized"):
        parse("ComposedCache([h2o], store=quantized)")
    refused = (("h2o", "got h2o"), ("", "Python's syntax"), ("quantized(bits=3)", "bits=3"))
    for wrong, why in refused:
        with pytest.raises(KVPruneError, match=f"(?s)^store '.*': expected plain, or .*{why}"):
            store_of(wrong)
    assert cache_of("ComposedCache([h2o], store=None)").store is None
    with pytest.raises(KVPruneError, match="store None: expected a text"):
        store_of(None)  # type: ignore[arg-type]


@pytest.mark.parametrize("value", [None, 3, ["h2o"]])
def test_no_text_is_refused(value):
    """A list of policies is not a spec."""
    with pytest.raises(KVPruneError, match="expected a spec"):
        parse(value)


@dataclass(frozen=True, repr=False)
class Mine(H2O):
    """A user's policy, with an argument of its own."""

    colour: str = "red"


class Broken(H2O):
    """Cannot be made."""

    def __post_init__(self):
        raise RuntimeError("a mistake")


class Hidden(kvprune.TokenPolicy):
    """An ordinary class, whose repr does not say its argument."""

    def __init__(self, secret: int = 1) -> None:
        super().__init__()
        self.secret = secret


def test_a_policy_of_the_user_s_own_needs_no_registration():
    """`module:Class` names it, and is what is written of it."""
    spec = f"{__name__}:Mine(heavy=3, colour='blue')|h2o"
    assert parse(spec) == [Mine(3, colour="blue") | H2O()]
    assert canonical(parse(spec)).startswith(
        f"{__name__}:Mine(heavy=3, recent=0.1, positions='original', "
    )
    assert parse(canonical(parse(spec))) == parse(spec)


def test_a_package_adds_policies_by_an_entry_point(tmp_path, monkeypatch):
    """It is loaded when a spec names it, and not before; one that is broken says so."""
    (tmp_path / "theirs-1.dist-info").mkdir()
    (tmp_path / "theirs-1.dist-info" / "entry_points.txt").write_text(
        "[kvprune.policies]\nBlue = theirs_policies:Mine\nbroken = theirs_policies:Nothing\n"
    )
    (tmp_path / "theirs-1.dist-info" / "METADATA").write_text("Name: theirs\nVersion: 1\n")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(KVPruneError, match="blue to be a class"):
        parse("blue")
    module = types.ModuleType("theirs_policies")
    module.Mine = Mine  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "theirs_policies", module)
    assert parse("blue(heavy=3)+h2o") == [Mine(3), H2O()]
    with pytest.raises(KVPruneError, match="broken to be a class"):
        parse("broken")
    with pytest.raises(KVPruneError, match="did you mean 'blue'"):
        parse("blu")


def test_what_a_text_cannot_say_is_not_written():
    """Rather than as another policy."""
    for policy in (SDTP(sdtp_heads()), Hidden(2)):
        with pytest.raises(KVPruneError, match=r"folder|__repr__"):
            canonical([policy])
    assert parse(canonical([H2O(layers=range(2))])) == [H2O(layers=[0, 1])]


def test_heads_in_a_folder_are_those_of_the_object(tmp_path):
    """Read on first use, in float32; anew once they have changed; refused where there are none."""
    model = tiny_model(dtype=torch.float32)
    ids = prompt(1, 80)

    def kept(policy: SDTP) -> list[int]:
        cache = kvprune.ComposedCache([policy])
        with torch.no_grad():
            model(ids, past_key_values=cache)
        return cache.columns(3).flatten().tolist()

    by_name = parse(f"sdtp(heads={str(tmp_path)!r}, min_tokens=8)")[0]
    assert isinstance(by_name, SDTP)
    for stages in (2, 1):
        sdtp_heads(stages, keep=0.5).save_pretrained(tmp_path)
        heads = SDTPHeads.from_pretrained(tmp_path).float()
        assert kept(by_name) == kept(SDTP(heads, min_tokens=8))
        assert len(kept(by_name)) == 80 // 2**stages
        assert SDTP(Path(tmp_path), min_tokens=8) == by_name
    with pytest.raises(KVPruneError, match="from_pretrained"):
        kept(SDTP(str(Path(tmp_path) / "none")))
