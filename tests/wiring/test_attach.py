"""What `attach` does to a model and to the process: no more than it says, and never for good."""

from __future__ import annotations

import copy
import filecmp
import io
import os
import pickle
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from functools import cache, partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, LlamaModel, LogitsProcessorList, StaticCache

import kvprune
from kvprune import ComposedCache, KVPruneError, TokenPolicy
from kvprune.policies import H2O, SDTP, StreamingLLM

from ..support.models import LAYERS, fresh_model, left_padded, plain_model, prompt, tiny_model
from ..support.strategies import sdtp_heads

FAMILIES = ["llama", "mistral-window", "gpt_neox"]


@pytest.fixture(autouse=True)
def _without_gradients() -> Iterator[None]:
    with torch.no_grad():
        yield


def pipeline() -> list[TokenPolicy]:
    """Prunes before layers 1 and 3, then evicts by attention down to shares of the prompt."""
    pruner = SDTP(sdtp_heads(), 0.7, min_tokens=4)
    return [pruner, H2O(heavy=0.3, recent=0.3)]


class Run:
    """One cache on one model, fed forward by forward; everything that came out is kept."""

    def __init__(self, model: Any, cache: ComposedCache, rows: int = 1, seed: int = 0) -> None:
        self.model, self.cache = model, cache
        self.ids = prompt(rows, 40, seed)
        self.logits: list[Tensor] = []

    def step(self, count: int) -> None:
        """The next tokens."""
        new = self.ids[:, self.cache.seen : self.cache.seen + count]
        self.logits.append(self.model(new, past_key_values=self.cache).logits)

    def steps(self, *counts: int) -> Run:
        """Several forwards."""
        for count in counts:
            self.step(count)
        return self

    def kept(self) -> list[Any]:
        """The columns of every layer."""
        return [self.cache.columns(i).tolist() for i in range(LAYERS)]


def assert_same(got: Run, expected: Run) -> None:
    """The same numbers, bit for bit, and the same columns."""
    assert len(got.logits) == len(expected.logits)
    assert all(torch.equal(a, b) for a, b in zip(got.logits, expected.logits, strict=True))
    assert got.kept() == expected.kept()


def alone(model: Any, *counts: int, rows: int = 1, seed: int = 0) -> Run:
    """A run with nothing beside it."""
    return Run(model, ComposedCache(pipeline()), rows, seed).steps(*counts)


def works(model: Any) -> bool:
    """Whether a model runs with a cache as an attached one does, by forward and by generate."""
    assert_same(alone(model, 9, 1, 3), alone(tiny_model(), 9, 1, 3))
    whole: Any = tiny_model()
    options = {"max_new_tokens": 5}
    got = model.generate(prompt(2, 12), cache=ComposedCache(pipeline()), **options)
    expected = whole.generate(prompt(2, 12), cache=ComposedCache(pipeline()), **options)
    return torch.equal(got, expected)


# Importing.

IMPORT = """
import os, torch, transformers
from transformers import cache_utils, masking_utils, modeling_utils, generation
from transformers.generation.utils import GenerationMixin

CLASSES = [GenerationMixin, transformers.PreTrainedModel, transformers.Cache,
           transformers.DynamicCache, transformers.LlamaForCausalLM, transformers.LlamaModel,
           torch.nn.Module, torch.Tensor]

def snapshot():
    registers = [modeling_utils.ALL_ATTENTION_FUNCTIONS, masking_utils.ALL_MASK_ATTENTION_FUNCTIONS]
    return {
        "registers": [dict(r._global_mapping) | dict(r._local_mapping) for r in registers],
        "names": [sorted(r.valid_keys()) for r in registers],
        "layer types": dict(cache_utils.DYNAMIC_LAYER_TYPE_MAPPING),
        "classes": [dict(c.__dict__) for c in CLASSES],
        "modules": [sorted(vars(m)) for m in (cache_utils, masking_utils, modeling_utils)],
        "torch": [torch.get_default_dtype(), torch.get_num_threads(), torch.is_grad_enabled(),
                  torch.get_num_interop_threads(), torch.get_default_device(),
                  torch.are_deterministic_algorithms_enabled(), torch.initial_seed()],
        "random": torch.get_rng_state().tolist(),
        "hooks": [len(torch.nn.modules.module._global_forward_hooks),
                  len(torch.nn.modules.module._global_forward_pre_hooks)],
        "environment": dict(os.environ),
    }

before = snapshot()
IMPORTS
after = snapshot()
changed = [name for name in before if before[name] != after[name]]
print("changed:", changed)
"""


def changed_by(statements: str) -> str:
    """What a fresh process says that some statements change."""
    script = IMPORT.replace("IMPORTS", statements)
    command = [sys.executable, "-c", script]
    # Without what importing kvprune may have set in this process already.
    names = ("PATH", "HOME", "PYTHONPATH", "LD_LIBRARY_PATH")
    clean = {name: os.environ[name] for name in names if name in os.environ}
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=clean)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip().splitlines()[-1]


def test_importing_changes_nothing():
    """Neither in torch nor in transformers nor in the environment."""
    imports = "import kvprune, kvprune.policies, kvprune.wiring.attach, kvprune.policies.sdtp"
    assert changed_by(imports) == "changed: []"


# Attaching and detaching.


def trace(model: nn.Module) -> dict[str, Any]:
    """Everything of a model that wiring could touch, module by module."""
    found: dict[str, Any] = {}
    for name, module in model.named_modules():
        state = vars(module)
        hooks = {k: list(v.items()) for k, v in state.items() if "hook" in k and v is not None}
        found[name] = (sorted(state), hooks, type(module), type(module).forward)
        config = getattr(module, "config", None)
        if config is not None:
            found[name] += (config._attn_implementation, config.to_dict(), sorted(vars(config)))
    return found


def counts(model: nn.Module) -> dict[str, Any]:
    """How many hooks of which kind each module has."""
    found = trace(model)
    return {name: {k: len(v) for k, v in each[1].items()} for name, each in found.items()}


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("backend", ["sdpa", "eager"])
def test_detach_leaves_no_trace(family, backend):
    """Hooks of all kinds, attributes, methods, config; whatever ran in between."""
    model: Any = fresh_model(family, backend=backend)
    before = trace(model)
    for times in (1, 2, 3):
        for _ in range(times):
            assert kvprune.attach(model) is model
        assert trace(model) != before
        model.generate(prompt(1, 8), cache=ComposedCache(pipeline()), max_new_tokens=2)
        assert kvprune.detach(model) is model
        assert trace(model) == before
    assert model.generate.__func__ is type(model).generate
    assert model.generate_batch.__func__ is type(model).generate_batch


def test_detach_after_an_error_leaves_no_trace():
    """A forward that failed in its middle left nothing on the model."""

    class Fails(TokenPolicy):
        def rank_slots(self, slots):
            raise ZeroDivisionError

    model: Any = fresh_model()
    before = trace(model)
    kvprune.attach(model)
    for use in (model, model.generate):
        with pytest.raises(ZeroDivisionError):
            use(prompt(1, 8), past_key_values=ComposedCache([Fails()]))
    kvprune.detach(model)
    assert trace(model) == before


def test_detach_keeps_what_others_put_there():
    """Hooks of other people, before and after ours, and a `generate` of their own."""
    model: Any = fresh_model()
    calls: list[str] = []

    def theirs(name: str) -> Callable[..., None]:
        return lambda *_: calls.append(name)

    model.model.register_forward_pre_hook(theirs("before"))
    kvprune.attach(model)
    model.model.layers[0].self_attn.register_forward_hook(theirs("after"), always_call=True)
    model.generate = mine = lambda *_: "mine"
    kvprune.detach(model)
    model(prompt(1, 3))
    assert calls == ["before", "after"]
    assert model.generate is mine


def test_layer_that_keeps_our_keyword_to_itself_is_refused():
    """A replaced decoder layer, say: attention that knows no layer of ours would hide nothing."""
    model = kvprune.attach(fresh_model("llama"))
    layer = model.model.layers[1]
    whole = layer.forward
    layer.forward = lambda *args, kvprune_layer=None, **kwargs: whole(*args, **kwargs)
    # A mask of the user's own hides the loss from the attention function.
    for mask in (None, torch.ones(1, 1, 6, 6, dtype=torch.bool).tril()):
        cache = ComposedCache([])
        with torch.no_grad(), pytest.raises(KVPruneError, match="not handed the keyword kvprune"):
            model(prompt(1, 6), attention_mask=mask, past_key_values=cache)


def test_detach_of_a_model_that_was_never_attached():
    """Does nothing, twice."""
    model = fresh_model()
    before = trace(model)
    for _ in range(2):
        assert kvprune.detach(model) is model
        assert trace(model) == before


@pytest.mark.parametrize("family", FAMILIES)
def test_attach_twice_is_attach_once(family):
    """As many hooks, the same attributes; caches in use go on."""
    model: Any = fresh_model(family)
    assert kvprune.attach(model) is model
    once, attributes = counts(model), {n: t[0] for n, t in trace(model).items()}
    run = alone(model, 9, 1)
    assert kvprune.attach(kvprune.attach(model)) is model
    assert counts(model) == once
    assert {n: t[0] for n, t in trace(model).items()} == attributes
    assert_same(run.steps(3, 1), alone(model, 9, 1, 3, 1))


def test_detach_and_attach_again_works():
    """As if nothing had been."""
    model = kvprune.attach(kvprune.detach(kvprune.attach(fresh_model())))
    assert works(model)


# Attached models without our cache.


def generated(model: Any, inputs: dict[str, Tensor], **options: Any) -> list[Tensor]:
    """Tokens and the logits of every step."""
    asked = {"output_logits": True, "return_dict_in_generate": True, "max_new_tokens": 6}
    torch.manual_seed(0)
    out = model.generate(**inputs, **asked, **options)
    return [out.sequences, *out.logits]


WAYS: list[dict[str, Any]] = [
    {},
    {"cache_implementation": "static"},
    {"use_cache": False},
    {"num_beams": 3},
    {"num_beams": 2, "num_return_sequences": 2},
    {"do_sample": True, "num_return_sequences": 3},
    {"prefill_chunk_size": 4},
    {"repetition_penalty": 1.3},
]


@pytest.mark.parametrize("options", WAYS, ids=lambda o: "-".join(o) or "greedy")
@pytest.mark.parametrize("backend", ["sdpa", "eager"])
@pytest.mark.parametrize("family", FAMILIES)
def test_generate_without_our_cache_is_unchanged(family, backend, options):
    """The same tokens and bit-equal logits as the twin that is not attached, with padding.

    In float32: in float64 the stock eager backend gives padding NaN.
    """
    inputs = left_padded(prompt(2, 13), [0, 4])
    kind: Any = {"dtype": torch.float32, "backend": backend}
    got = generated(tiny_model(family, **kind), inputs, **options)
    expected = generated(plain_model(family, **kind), inputs, **options)
    assert all(torch.equal(a, b) for a, b in zip(got, expected, strict=True))


@pytest.mark.parametrize("options", [{"prompt_lookup_num_tokens": 3}, {"assistant_model": True}])
def test_assisted_decoding_without_our_cache_is_unchanged(options):
    """Also where the assistant is attached, or the model is its own."""
    inputs: Any = {"input_ids": prompt(1, 13)}
    expected = generated(plain_model(), inputs)[0]
    for model in (plain_model(), tiny_model()):
        for assistant in (plain_model(), tiny_model()):
            more = {"assistant_model": assistant} if "assistant_model" in options else options
            assert torch.equal(generated(model, inputs, **more)[0], expected)


@pytest.mark.parametrize("family", FAMILIES)
def test_forward_without_our_cache_is_unchanged(family):
    """No cache, a static cache, attention and hidden states of the eager backend."""
    batch = left_padded(prompt(2, 13), [0, 4])
    kind: Any = {"dtype": torch.float32, "backend": "eager"}
    tiny, plain = (make(family, **kind) for make in (tiny_model, plain_model))
    asked = {"output_attentions": True, "output_hidden_states": True, "use_cache": False}
    got, expected = tiny(**batch, **asked), plain(**batch, **asked)
    assert len(got.attentions) == len(expected.attentions) == LAYERS
    for name in ("attentions", "hidden_states"):
        pairs = zip(got[name], expected[name], strict=True)
        assert all(torch.equal(a, b) for a, b in pairs)
    for make in (lambda: None, lambda: StaticCache(config=plain.config, max_cache_len=20)):
        got, expected = (m(**batch, past_key_values=make()).logits for m in (tiny, plain))
        assert torch.equal(got, expected)


def test_training_without_our_cache_is_unchanged():
    """Loss and gradients, with gradient checkpointing too."""
    losses, gradients = [], []
    for model in (fresh_model(), kvprune.attach(fresh_model())):
        one: Any = model
        one.activation_checkpointing_enable()
        one.train()
        with torch.enable_grad():
            loss = one(prompt(2, 9), labels=prompt(2, 9), use_cache=False).loss
            loss.backward()
        losses.append(loss.detach())
        gradients.append([p.grad for p in one.parameters()])
    assert torch.equal(*losses)
    assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))


# Saving, copying, pickling.


def test_saved_model_knows_nothing_of_us(tmp_path):
    """The files equal those of an unattached model, and load without us."""
    names = {}
    for name, model in (("attached", kvprune.attach(fresh_model())), ("plain", fresh_model())):
        model.save_pretrained(tmp_path / name)
        names[name] = sorted(p.name for p in (tmp_path / name).iterdir())
    assert names["attached"] == names["plain"]
    equal, *others = filecmp.cmpfiles(
        tmp_path / "attached", tmp_path / "plain", names["plain"], shallow=False
    )
    assert {"config.json", "model.safetensors"} <= set(equal) and others == [[], []]
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "attached")
    assert loaded.config._attn_implementation == "sdpa"
    assert "generate" not in vars(loaded)


def test_saved_model_loads_and_attaches(tmp_path):
    """The stock norms compute in float32, so both sides are loaded ones."""
    runs = []
    for name, model in (("attached", kvprune.attach(fresh_model())), ("plain", fresh_model())):
        model.save_pretrained(tmp_path / name)
        loaded = AutoModelForCausalLM.from_pretrained(tmp_path / name).eval()
        runs.append(alone(kvprune.attach(loaded), 9, 1, 2))
    assert_same(*runs)


def assert_independent(twin: Any, model: Any) -> None:
    """Both work, each by itself; what is done to one does not touch the other."""
    assert twin is not model and twin.config is not model.config
    assert counts(twin) == counts(model)
    for one, other in ((twin, model), (model, twin)):
        cache = ComposedCache(pipeline())
        one.generate(prompt(1, 8), cache=cache, max_new_tokens=2)
        with pytest.raises(KVPruneError, match="belongs to another model"):
            other(prompt(1, 1), past_key_values=cache)
    for one, other in ((twin, model), (model, twin)):
        kvprune.detach(one)
        assert trace(one) == trace(fresh_model())
        assert works(other)
        assert works(kvprune.attach(one))


def test_deepcopy_of_an_attached_model():
    """Is attached as well, and independent."""
    model = kvprune.attach(fresh_model())
    assert_independent(copy.deepcopy(model), model)


def test_cache_of_a_model_is_refused_by_its_copy():
    """The copy is another model, whose weights may part from the first one's."""
    model = kvprune.attach(fresh_model())
    run = alone(model, 9)
    with pytest.raises(KVPruneError, match="belongs to another model"):
        copy.deepcopy(model)(prompt(1, 1), past_key_values=run.cache)
    assert_same(run.steps(1), alone(model, 9, 1))


@pytest.mark.parametrize("how", ["pickle", "torch.save"])
def test_pickled_attached_model(how):
    """Comes back attached, and independent."""
    model, file = kvprune.attach(fresh_model()), io.BytesIO()
    if how == "pickle":
        twin = pickle.loads(pickle.dumps(model))
    else:
        torch.save(model, file)
        file.seek(0)
        twin = torch.load(file, weights_only=False)
    assert_independent(twin, model)


# Several caches, threads and models.


@pytest.mark.parametrize("family", FAMILIES)
def test_caches_interleaved_on_one_model_do_not_meet(family):
    """Step by step, with other lengths, rows and policies."""
    model = tiny_model(family)
    first = Run(model, ComposedCache(pipeline()), rows=2)
    second = Run(model, ComposedCache([StreamingLLM(1, 4)]), rows=1, seed=5)
    sizes = ([9, 1, 1, 4, 1], [3, 7, 1, 1, 1])
    for a, b in zip(*sizes, strict=True):
        first.step(a)
        second.step(b)
        model(prompt(3, 5))
    assert_same(first, alone(model, *sizes[0], rows=2))
    assert_same(second, Run(model, ComposedCache([StreamingLLM(1, 4)]), seed=5).steps(*sizes[1]))


def in_threads(*works: Callable[[], Any]) -> list[Any]:
    """Runs all at once, each in a thread; what each returned or raised."""
    results: list[Any] = [None] * len(works)

    def work(index: int) -> None:
        try:
            with torch.no_grad():
                results[index] = works[index]()
        except Exception as error:
            results[index] = error

    threads = [threading.Thread(target=work, args=(i,)) for i in range(len(works))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=30)
    return results


def test_threads_with_a_cache_each():
    """On one attached model, with shared policies: the results of a single thread."""
    model, policies = tiny_model(), pipeline()
    steps = [(9, 1, 1, 1, 3, 1), (5, 1, 6, 1, 1, 1), (1, 1, 12, 1, 1, 1), (14, 1, 1, 1, 1, 1)]
    barrier = threading.Barrier(len(steps))

    def work(seed: int) -> Run:
        run = Run(model, ComposedCache(policies), seed=seed)
        for count in steps[seed]:
            barrier.wait(timeout=30)
            run.step(count)
        return run

    runs = in_threads(*(partial(work, s) for s in range(len(steps))))
    for seed, run in enumerate(runs):
        assert_same(run, alone(model, *steps[seed], seed=seed))


def test_threads_that_generate():
    """`generate` at once in several threads, with our caches and with stock ones."""
    model, policies = tiny_model(), pipeline()

    def work(seed: int) -> Tensor:
        cache = ComposedCache(policies) if seed % 3 else None
        return model.generate(prompt(2, 10 + seed, seed), cache=cache, max_new_tokens=12)

    expected = [work(seed) for seed in range(6)]
    got = in_threads(*(partial(work, s) for s in range(6)))
    assert all(torch.equal(a, b) for a, b in zip(got, expected, strict=True))


class Meanwhile(TokenPolicy):
    """Keeps the last six, and does something in the middle of the first forward."""

    def __init__(self) -> None:
        super().__init__()
        self.action: Callable[[], Any] = lambda: None
        self.done: list[Any] = []

    def rank_slots(self, slots):
        """The action runs once, in layer 1."""
        if slots.layer == 1 and not self.done:
            self.done.append("running")
            self.done.append(self.action())
        return StreamingLLM(0, 6).rank_slots(slots)


@cache
def other_model() -> Any:
    """An attached model that is not `tiny_model`."""
    return kvprune.attach(fresh_model())


IN_USE = "in the middle of a forward: expected one forward at a time"
OTHERS = "belongs to another model"

SECOND_USES: dict[str, tuple[str, Callable[[Any, ComposedCache], Any]]] = {
    "prompt": (IN_USE, lambda m, c: m(prompt(1, 9), past_key_values=c)),
    "token": (IN_USE, lambda m, c: m(prompt(1, 1), past_key_values=c)),
    "logits": (IN_USE, lambda m, c: m(prompt(1, 9), past_key_values=c, logits_to_keep=9)),
    "base": (IN_USE, lambda m, c: m.model(prompt(1, 9), past_key_values=c)),
    "generate": (IN_USE, lambda m, c: m.generate(prompt(1, 30), cache=c, max_new_tokens=2)),
    "crop": (IN_USE, lambda m, c: c.crop(0)),
    "reorder": (IN_USE, lambda m, c: c.reorder_cache(torch.tensor([0]))),
    "deepcopy": (IN_USE, lambda m, c: copy.deepcopy(c)),
    "other model": (OTHERS, lambda m, c: other_model()(prompt(1, 1), past_key_values=c)),
    "no tensor": ("no attribute", lambda m, c: m([[3]], past_key_values=c)),
    "no cache": ("use_cache", lambda m, c: m(prompt(1, 1), past_key_values=c, use_cache=False)),
}


def attempted(use: Callable[[], Any]) -> Any:
    """What came, be it an error."""
    try:
        return use()
    except Exception as error:
        return error


@pytest.mark.parametrize("where", ["same thread", "other thread"])
@pytest.mark.parametrize("name", SECOND_USES)
def test_second_use_in_the_middle_of_a_forward_is_refused(name, where):
    """And does not hurt the first, which goes on as if nothing had been."""
    policy = Meanwhile()
    run = Run(tiny_model(), ComposedCache([policy]))
    match, second = SECOND_USES[name]
    use = partial(second, tiny_model(), run.cache)
    policy.action = (
        partial(attempted, use) if where == "same thread" else lambda: in_threads(use)[0]
    )
    run.steps(9, 1, 4)
    expected = AttributeError if name == "no tensor" else KVPruneError
    assert isinstance(policy.done[1], expected) and match in str(policy.done[1])
    assert_same(run, Run(tiny_model(), ComposedCache([Meanwhile()])).steps(9, 1, 4))


@pytest.mark.parametrize("where", ["same thread", "other thread"])
def test_second_use_in_the_middle_of_generate_is_refused(where):
    """The first `generate` comes to its end with its own tokens."""
    policy, model, ids = Meanwhile(), tiny_model(), prompt(1, 9)
    cache, options = ComposedCache([policy]), {"max_new_tokens": 8}
    use = partial(model.generate, prompt(1, 30), cache=cache, **options)
    policy.action = (
        partial(attempted, use) if where == "same thread" else lambda: in_threads(use)[0]
    )
    got = model.generate(ids, cache=cache, **options)
    assert isinstance(policy.done[1], KVPruneError) and IN_USE in str(policy.done[1])
    expected = model.generate(ids, cache=ComposedCache([Meanwhile()]), **options)
    assert torch.equal(got, expected)


def test_second_generate_between_two_forwards_is_refused():
    """Its tokens would come in among those of the first, silently."""
    model, cache = tiny_model(), ComposedCache([StreamingLLM(1, 5)])
    seconds: list[Any] = []

    def second(ids: Tensor, scores: Tensor) -> Tensor:
        use = partial(model.generate, prompt(1, 30), cache=cache, max_new_tokens=2)
        seconds.append(attempted(use))
        return scores

    between: Any = LogitsProcessorList([second])
    options = {"max_new_tokens": 4}
    got = model.generate(prompt(1, 9), cache=cache, logits_processor=between, **options)
    assert all(isinstance(s, KVPruneError) for s in seconds) and len(seconds) == 4
    expected = model.generate(prompt(1, 9), cache=ComposedCache([StreamingLLM(1, 5)]), **options)
    assert torch.equal(got, expected)


@pytest.mark.parametrize("where", ["same thread", "other thread"])
def test_another_cache_in_the_middle_of_a_forward_is_fine(where):
    """On the same model: neither meets the other."""
    policy = Meanwhile()
    run = Run(tiny_model(), ComposedCache([policy]))
    other = partial(alone, tiny_model(), 9, 1, rows=2, seed=3)
    policy.action = other if where == "same thread" else lambda: in_threads(other)[0]
    run.steps(9, 1, 4)
    assert_same(policy.done[1], other())
    assert_same(run, Run(tiny_model(), ComposedCache([Meanwhile()])).steps(9, 1, 4))


# Copies of caches.


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("prefix", [(), (9,), (9, 1, 1)])
def test_copies_of_a_cache_continue_as_if_alone(family, prefix):
    """A prefix read once, gone on with in three ways, interleaved."""
    model = tiny_model(family)
    origin = alone(model, *prefix)
    runs = [origin, *(copy.deepcopy(Run(None, origin.cache)) for _ in range(2))]
    steps = [(1, 1, 4), (5, 1, 1), (2, 3, 1)]
    for run in runs[1:]:
        run.model = model
    for step in range(3):
        for run, sizes in zip(runs, steps, strict=True):
            run.step(sizes[step])
    for run, sizes in zip(runs, steps, strict=True):
        expected = alone(model, *prefix, *sizes)
        expected.logits = expected.logits[-len(run.logits) :]
        assert_same(run, expected)


def test_prefix_reused_by_generate():
    """What is done to the copies leaves the origin as it was."""
    model: Any = tiny_model()
    origin, texts = (
        alone(model, 9),
        [torch.cat([prompt(1, 40)[:, :9], prompt(1, 5, s)], 1) for s in (1, 2)],
    )
    kept = origin.kept()
    for text in texts:
        twin = copy.deepcopy(origin.cache)
        got = model.generate(text, cache=twin, max_new_tokens=6)
        expected = model.generate(text, cache=alone(model, 9).cache, max_new_tokens=6)
        assert torch.equal(got, expected)
        twin.reset()
        assert (origin.kept(), origin.cache.seen) == (kept, 9)
    assert_same(origin.steps(1), alone(model, 9, 1))


# Models that share something.


def test_model_on_the_same_config_is_not_disturbed():
    """Not attached, it computes what it did, whatever is done to the other."""
    model: Any = fresh_model()
    other: Any = type(model)(model.config).double().eval()
    inputs = left_padded(prompt(2, 13), [0, 4])
    expected, before = generated(other, inputs), counts(other)
    for change in (kvprune.attach, kvprune.detach, kvprune.attach):
        change(model)
        got = generated(other, inputs)
        assert all(torch.equal(a, b) for a, b in zip(got, expected, strict=True))
        assert counts(other) == before
    with pytest.raises(KVPruneError, match=r"kvprune\.attach\(model\)"):
        other(prompt(1, 3), past_key_values=ComposedCache())
    assert works(model)


def test_detach_of_one_of_two_models_on_the_same_config_is_noticed_by_the_other():
    """The config names the attention for both: an error says so, and attach mends it."""
    model: Any = fresh_model()
    other: Any = type(model)(model.config).double().eval()
    kvprune.attach(other)
    expected = alone(other, 9, 1)
    kvprune.attach(model)
    assert_same(alone(other, 9, 1), expected)
    kvprune.detach(model)
    with pytest.raises(KVPruneError, match=r"call kvprune\.attach\(model\) again"):
        alone(other, 9, 1)
    assert_same(alone(kvprune.attach(other), 9, 1), expected)


def test_model_made_from_an_attached_model_s_config():
    """Is an ordinary model, that can be attached."""
    model: Any = kvprune.attach(fresh_model())
    other: Any = AutoModelForCausalLM.from_config(model.config).double().eval()
    plain: Any = AutoModelForCausalLM.from_config(fresh_model().config).double().eval()
    plain.load_state_dict(other.state_dict())
    inputs = left_padded(prompt(2, 13), [0, 4])
    got, expected = generated(other, inputs), generated(plain, inputs)
    assert all(torch.equal(a, b) for a, b in zip(got, expected, strict=True))
    assert_same(alone(kvprune.attach(other), 9, 1), alone(kvprune.attach(plain), 9, 1))


@pytest.mark.parametrize("family", FAMILIES)
def test_base_model_attached_directly(family):
    """Without a language-model head: the same hidden states, and detachable."""
    whole: Any = fresh_model(family)
    base, head = whole.base_model, whole.get_output_embeddings()
    before = trace(base)
    assert kvprune.attach(base) is base
    assert "generate" not in vars(base)
    cache, expected = ComposedCache(pipeline()), alone(tiny_model(family), 9, 1, 4)
    start = 0
    for logits in expected.logits:
        new = expected.ids[:, start : start + logits.shape[1]]
        assert torch.equal(head(base(new, past_key_values=cache).last_hidden_state), logits)
        start += logits.shape[1]
    assert [cache.columns(i).tolist() for i in range(LAYERS)] == expected.kept()
    kvprune.detach(base)
    assert trace(base) == before


def test_base_model_made_by_itself():
    """A `LlamaModel` that never had a head."""
    model: Any = LlamaModel(fresh_model().config).double().eval()
    cache = ComposedCache([StreamingLLM(1, 4)])
    kvprune.attach(model)
    got = model(prompt(1, 9), past_key_values=cache).last_hidden_state
    kvprune.detach(model)
    assert torch.equal(got, model(prompt(1, 9)).last_hidden_state)
    assert cache.columns(0).tolist() == [[[0, 5, 6, 7, 8]]]


# The forward itself, past all hooks.


def _without_hooks(model: Any, way: str) -> Any:
    """Another way to call a model."""
    return {"forward": model.forward, "compiled": torch.compile(model.forward, backend="eager")}[
        way
    ]


@pytest.mark.parametrize("way", ["forward", pytest.param("compiled", marks=pytest.mark.slow)])
@pytest.mark.parametrize("asked", [8, torch.tensor([3, 20, 29])])
def test_forward_called_directly_protects_what_is_asked_for(way, asked):
    """Hooks do not run there; the tokens whose logits are asked for are not pruned all the same."""
    torch._dynamo.reset()
    model = tiny_model()
    caches = [ComposedCache([SDTP(sdtp_heads(), 0.4, min_tokens=4)]) for _ in range(2)]
    expected = model(prompt(1, 30), past_key_values=caches[0], logits_to_keep=asked).logits
    run = _without_hooks(model, way)
    got = run(prompt(1, 30), past_key_values=caches[1], logits_to_keep=asked).logits
    assert torch.equal(got, expected)
    last = torch.arange(30)[-asked:] if isinstance(asked, int) else asked
    for used in caches:
        kept = used.columns(3).flatten()
        assert torch.isin(last, kept).all()
        assert len(kept) < 30


def test_forward_called_directly_refuses_labels():
    """Dropped tokens have no loss, however the model is called."""
    model, cache = tiny_model(), ComposedCache(pipeline())
    for run in (model, model.forward):
        with pytest.raises(KVPruneError, match=r"^labels with a policy that prunes"):
            run(prompt(1, 20), past_key_values=cache, labels=prompt(1, 20))
    assert cache.seen == 0
    # Eviction alone gives the loss of what each token saw.
    model.forward(prompt(1, 20), past_key_values=ComposedCache([H2O(30, 30)]), labels=prompt(1, 20))


def test_forward_of_the_base_model_called_directly():
    """As through the module."""
    model: Any = tiny_model()
    caches = [ComposedCache([H2O(3, 3)]) for _ in range(2)]
    for ids in prompt(1, 20).split([14, 1, 5], 1):
        one = model.model(ids, past_key_values=caches[0]).last_hidden_state
        two = model.model.forward(ids, past_key_values=caches[1]).last_hidden_state
        assert torch.equal(one, two)


def test_the_signature_of_forward_stays():
    """transformers, pipelines and trainers read off it what a model takes."""
    import inspect

    model, plain = kvprune.attach(fresh_model()), fresh_model()
    got, expected = (inspect.signature(m.forward).parameters for m in (model, plain))
    assert list(got) == list(expected)
    kvprune.detach(model)
    assert "forward" not in model.__dict__ and "forward" not in model.base_model.__dict__


def test_the_name_and_the_docstring_of_forward_stay():
    """Libraries that wrap or document a model read them off."""
    model, plain = kvprune.attach(fresh_model()), fresh_model()
    for mine, stock in ((model, plain), (model.base_model, plain.base_model)):
        for name in ("__module__", "__name__", "__qualname__", "__doc__"):
            assert getattr(mine.forward, name) == getattr(stock.forward, name)


def replica(model: Any, other: Any) -> Any:
    """A copy with the parameters of another model, as `torch.nn.DataParallel` makes them."""
    copies = {name: m._replicate_for_data_parallel() for name, m in model.named_modules()}
    for name, module in copies.items():
        for child in module._modules:
            module._modules[child] = copies[f"{name}.{child}".lstrip(".")]
        module._parameters.update(other.get_submodule(name)._parameters)
        module._buffers.update(other.get_submodule(name)._buffers)
    return copies[""]


@pytest.mark.parametrize("family", FAMILIES)
def test_a_replica_computes_with_its_own_weights(family):
    """On a GPU of its own, say."""
    other = fresh_model(family)
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.mul_(1.1)
    ids = prompt(2, 9)
    expected = other(ids).logits
    copied = replica(kvprune.attach(fresh_model(family)), other)
    torch.testing.assert_close(copied(ids).logits, expected, rtol=1e-9, atol=1e-10)


def test_forward_that_accelerate_wrapped_before_or_after():
    """Its hooks stay, and detaching leaves them in place."""
    hooks = pytest.importorskip("accelerate.hooks")

    class Counts(hooks.ModelHook):
        def __init__(self) -> None:
            super().__init__()
            self.calls = 0

        def pre_forward(self, module, *args, **kwargs):
            self.calls += 1
            return args, kwargs

    expected = tiny_model()(prompt(1, 20), past_key_values=ComposedCache(pipeline())).logits
    for first in ("accelerate", "kvprune"):
        model, counts = fresh_model(), Counts()
        if first == "kvprune":
            kvprune.attach(model)
        hooks.add_hook_to_module(model, counts)
        kvprune.attach(model)
        cache = ComposedCache(pipeline())
        assert torch.equal(model(prompt(1, 20), past_key_values=cache).logits, expected)
        kvprune.detach(model)
        plain = model(prompt(1, 20)).logits
        assert counts.calls == 2
        hooks.remove_hook_from_module(model)
        assert torch.equal(model(prompt(1, 20)).logits, plain) and counts.calls == 2


def test_a_generate_of_the_models_own_stays():
    """As a model folder with a custom_generate has it, which transformers puts on the model."""
    calls = []

    def custom(model, *args, **kwargs):
        calls.append(sorted(kwargs))
        return type(model).generate(model, *args, **kwargs)

    model, whole = fresh_model(), tiny_model()
    model.generate = partial(custom, model=model)
    kvprune.attach(kvprune.attach(model))
    options = {"input_ids": prompt(1, 12), "max_new_tokens": 5}
    got = model.generate(cache=ComposedCache([H2O(4, 4)]), **options)
    assert torch.equal(got, whole.generate(cache=ComposedCache([H2O(4, 4)]), **options))
    model.generate(**options)
    kvprune.detach(model)
    model.generate(**options)
    assert len(calls) == 3 and ("past_key_values" in calls[0] or "cache" in calls[0])
    assert model.__dict__["generate"].func is custom


def test_a_replica_runs_by_itself():
    """`nn.DataParallel` runs copies of a module's attributes, which must not run the original."""
    model: Any = kvprune.attach(fresh_model())
    for module in (model, model.model):
        replica = module._replicate_for_data_parallel()
        assert not {"forward", "generate", "_get_stopping_criteria"} & set(replica.__dict__)
        assert replica.forward.__func__ is type(module).forward
    assert works(model)


def test_a_forward_that_the_user_compiled_is_taken_back():
    """`model.forward = torch.compile(model.forward)` hides ours within."""
    model: Any = kvprune.attach(fresh_model())
    model.model.forward = torch.compile(model.model.forward, backend="eager")
    kvprune.attach(model)
    assert works(model)
    model.forward = torch.compile(model.forward, backend="eager")
    kvprune.detach(model)
    assert "forward" not in model.__dict__ and "forward" not in model.model.__dict__


def test_attention_that_runs_twice_is_refused():
    """It would observe and evict twice, with the step of one layer."""
    model: Any = kvprune.attach(fresh_model())
    attention = model.model.layers[1].self_attn
    once = attention.forward
    attention.forward = lambda *args, **kwargs: (once(*args, **kwargs), once(*args, **kwargs))[0]
    with pytest.raises(KVPruneError, match="was not handed the keyword"):
        model(prompt(1, 9), past_key_values=ComposedCache([StreamingLLM(1, 4)]))


def test_an_interrupt_as_a_forward_begins_leaves_a_cache_that_can_be_reset(monkeypatch):
    """Whatever is done between the beginning of a step and the model itself."""
    model, cache = tiny_model(), ComposedCache([H2O(4, 4)])

    def interrupted(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(ComposedCache, "note_ids", interrupted)
    with pytest.raises(KeyboardInterrupt):
        model(prompt(1, 9), past_key_values=cache)
    monkeypatch.undo()
    cache.reset()
    model(prompt(1, 9), past_key_values=cache)
    assert cache.seen == 9


def test_none_by_one_name_beside_a_cache_by_the_other():
    """Wrappers hand on all names that they know."""
    model, caches = tiny_model(), [ComposedCache(pipeline()) for _ in range(2)]
    ids = prompt(1, 20)
    expected = model(ids, past_key_values=caches[0], logits_to_keep=6).logits
    got = model(ids, cache=None, past_key_values=caches[1], logits_to_keep=6).logits
    assert torch.equal(got, expected)


# What an attached model's caches know of it.


def test_a_second_attach_sees_layers_that_were_cut():
    """A forward before it is refused; after it the model is a model of two layers."""
    model: Any = kvprune.attach(fresh_model())
    cache = ComposedCache([H2O(4, 4)])
    model(prompt(1, 12), past_key_values=cache)
    model.model.layers = model.model.layers[:2]
    with pytest.raises(KVPruneError, match=r"had 4 decoder layers .* has 2 now.*attach\(model\)"):
        model(prompt(1, 12), past_key_values=ComposedCache())
    model.config.num_hidden_layers = 2
    kvprune.attach(model)
    short = ComposedCache([H2O(4, 4)])
    model.generate(prompt(1, 20), cache=short, max_new_tokens=3)
    assert len(short) == 2 and short.columns(1).shape[-1] == 8
    with pytest.raises(KVPruneError, match="belongs to another model"):
        model(prompt(1, 1), past_key_values=cache)
    with pytest.raises(KVPruneError, match="layers of 0 to 1"):
        model(prompt(1, 9), past_key_values=ComposedCache([H2O(4, 4, layers=[3])]))


def test_a_second_attach_sees_a_window_that_was_changed():
    """What layers see is read off the model anew."""
    model: Any = kvprune.attach(fresh_model("mistral-window"))
    cache = ComposedCache()
    model(prompt(1, 40), past_key_values=cache)
    assert cache.columns(0).shape[-1] == 11
    model.config.sliding_window = 6
    kvprune.attach(model)
    other = ComposedCache()
    model(prompt(1, 40), past_key_values=other)
    assert other.columns(0).shape[-1] == 5


def test_a_second_attach_of_the_same_model_leaves_its_caches():
    """As after `set_attn_implementation`; what was found out about weights is forgotten."""
    model: Any = kvprune.attach(fresh_model())
    run = Run(model, ComposedCache([H2O(4, 4, positions="cache")])).steps(12, 1)
    before = model.base_model._kvprune
    assert before.memory
    kvprune.attach(model)
    assert model.base_model._kvprune is before and not before.memory
    run.steps(1, 3)


# A model around one that is attached.


def test_drafts_by_a_generate_around_the_attached_model_are_refused():
    """Only the outer model's generate knows where the prompt ends."""
    model: Any = fresh_model()
    kvprune.attach(model.model)
    cache, ids = ComposedCache([H2O(4, 4)]), prompt(1, 10).repeat(1, 2)
    with pytest.raises(KVPruneError, match="generate of a model that kvprune is not attached to"):
        model.generate(ids, past_key_values=cache, prompt_lookup_num_tokens=3, max_new_tokens=4)
    assert cache.seen == 0
    # Without drafts it works, and its end leaves a loop of one's own its drafts.
    tokens = model.generate(ids, past_key_values=cache, max_new_tokens=4)
    whole = tiny_model().generate(ids, cache=ComposedCache([H2O(4, 4)]), max_new_tokens=4)
    assert torch.equal(tokens, whole)
    cache.activate_past_recording()
    model(prompt(1, 3), past_key_values=cache)
    cache.crop(-2)
    kvprune.attach(model)
    cache = ComposedCache([H2O(4, 4)])
    model.generate(ids, cache=cache, prompt_lookup_num_tokens=3, max_new_tokens=4)
    assert cache.columns(0).shape[-1] == 8


@pytest.mark.parametrize("where", ["argument", "config"])
def test_router_logits_with_pruned_hidden_states_are_refused(where):
    """The auxiliary loss would be of other tokens in each layer; eviction alone leaves it."""
    sizes = {"num_local_experts": 4, "num_experts_per_tok": 2}
    model: Any = kvprune.attach(fresh_model("mixtral", dtype=torch.float32, **sizes))
    asked = {"output_router_logits": True}
    if where == "config":
        model.config.output_router_logits = True
        asked = {}
    cache = ComposedCache(pipeline())
    with pytest.raises(KVPruneError, match=r"^output_router_logits=True with a policy that prunes"):
        model(prompt(1, 20), past_key_values=cache, **asked)
    assert cache.seen == 0
    loss = model(prompt(1, 20), past_key_values=ComposedCache([H2O(3, 3)]), **asked).aux_loss
    expected = model(prompt(1, 20), output_router_logits=True).aux_loss
    torch.testing.assert_close(loss, expected)
