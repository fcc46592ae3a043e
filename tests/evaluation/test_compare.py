"""The comparison: every cell once, whatever happens; costs and rows; what is refused."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections import Counter, namedtuple
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from filelock import FileLock
from hypothesis import given, settings
from hypothesis import strategies as st

import kvprune
from kvprune import KVPruneError, Quantized
from kvprune.evaluation import tasks
from kvprune.evaluation.compare.compare import Comparison
from kvprune.evaluation.compare.worker import texts_of
from kvprune.evaluation.data.loading import loaded
from kvprune.evaluation.explain import pieces
from kvprune.evaluation.ledger.ledger import LOCK, NAME, read
from kvprune.evaluation.measure.traces import levels
from kvprune.evaluation.specs import cache_of, canonical
from kvprune.policies import H2O, SDTP

from ..policies.test_kvzap import gates
from ..support import fake_tasks
from ..support.fake_tasks import Echo, Killed, Likely, saved_model
from ..support.models import LAYERS
from ..support.strategies import sdtp_heads
from .test_explain import run, words_tokenizer

SPECS = ["h2o", "streaming(window=9)"]
FAILING = f"{fake_tasks.__name__}:Failing(heavy=3, recent=3)"


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """A model and a tokenizer."""
    return saved_model(tmp_path_factory.mktemp("model"))


@cache
def model_of(folder: Path) -> Any:
    """The folder's model, loaded once."""
    return loaded(str(folder))[1]


@pytest.fixture(autouse=True)
def no_report(monkeypatch):
    """The report has tests of its own."""
    monkeypatch.setattr("kvprune.evaluation.report.write_report", lambda results, folder: [])


def small(model: Any, **given: Any) -> Comparison:
    """A comparison of twelve samples."""
    options: dict[str, Any] = {"tasks": [Echo()], "contexts": [20], "samples": 3, **given}
    return kvprune.compare(model, options.pop("policies", SPECS), **options)


def lines(out: Path) -> list[dict[str, Any]]:
    """The results file."""
    return [json.loads(line) for line in (out / NAME).read_text().splitlines()]


def said(out: Path) -> Counter[Any]:
    """How often each sample stands there, with what came of it."""
    found = [line for line in lines(out) if line["kind"] == "sample"]
    return Counter((json.dumps(x["cell"]), x["sample"], x["score"], x["answer"]) for x in found)


def test_every_cell_is_run_and_written(folder, tmp_path):
    """Two lines, each policy at each budget or once; what is written is what is returned."""
    policies = ["h2o", "sdtp(heads='x', min_tokens=99)+h2o", "streaming(window=9)", "H2O( )"]
    sdtp_heads().float().save_pretrained(tmp_path / "x")
    policies[1] = policies[1].replace("'x'", repr(str(tmp_path / "x")))
    found = small(
        folder,
        policies=policies,
        budgets=[0.5, 0.25],
        tasks=[Echo(), Likely()],
        contexts=[20, 30],
        out=tmp_path / "out",
        samples=2,
    )
    assert found.results == read(tmp_path / "out") and not found.failures
    cells = {r.cell for r in found.results.samples}
    assert len(cells) == 2 * 2 * (2 + 2 * 3) and len(found.results.samples) == 2 * len(cells)
    of_one = [c for c in cells if (c.task, c.context) == ("likely", 30)]
    by_label = Counter((c.label, c.budget) for c in of_one)
    assert by_label == Counter(
        [("dense", None), ("no context", None)]
        + [(" ".join(p.split()), b) for p in policies[:3] for b in (0.5, 0.25)]
    )
    assert {c.policy for c in of_one if c.label == "h2o"} == {
        "H2O(heavy=0.25, recent=0.25, positions='original')",
        "H2O(heavy=0.125, recent=0.125, positions='original')",
    }
    assert found.results.units == {"echo": "letters", "likely": "nats a token"}
    assert found.results.floors == {"echo": 0.25}
    run_of = found.results.run
    assert run_of["seed"] == 0 and run_of["dtype"] == "float32" and run_of["model"] == folder.name


def test_samples_are_what_the_model_says(folder, tmp_path):
    """Those of `generate` that reads the last token by itself; costs and traces of its cache."""
    found = small(folder, policies=["h2o(heavy=3,recent=4)"], out=tmp_path)
    tokenizer, model = loaded(str(folder))
    kvprune.attach(model)
    for sample in Echo().samples(tokenizer, 20, 3, 0):
        mine = {r.cell.label: r for r in found.results.samples if r.sample == sample.number}
        asked = {"dense": ([], sample.prompt), "no context": ([], sample.bare)}
        asked["h2o(heavy=3,recent=4)"] = ([H2O(3, 4)], sample.prompt)
        assert mine.keys() == asked.keys()
        for label, (policies, prompt) in asked.items():
            ids = torch.tensor([prompt])
            options = {"max_new_tokens": 3, "prefill_chunk_size": len(prompt) - 1}
            cache = kvprune.ComposedCache(policies)
            tokens = model.generate(ids, cache=cache, do_sample=False, **options)
            assert mine[label].answer == tokenizer.decode(tokens[0, ids.shape[1] :])
            assert mine[label].cost.prompt_tokens == len(prompt)
            assert mine[label].cost.kept == (7.0 if policies else len(prompt),) * LAYERS
    (trace,) = found.results.traces
    assert (trace.sample, trace.cell.label) == (0, "h2o(heavy=3,recent=4)")
    assert len(trace.tokens) == 20
    assert "".join(trace.tokens) == tokenizer.decode(Echo().samples(tokenizer, 20, 1, 0)[0].prompt)
    assert ((levels(trace) > 0).sum(-1) >= 7).all()


def test_a_model_object_is_as_it_was(folder):
    """Attached for the time being; with its own tokenizer, or one that is given."""
    tokenizer, model = loaded(str(folder))
    expected = [r.answer for r in small(folder).results.samples]
    assert [r.answer for r in small(model).results.samples] == expected
    assert not model._forward_pre_hooks and "generate" not in model.__dict__
    kvprune.attach(model)
    found = small(model, tokenizer=tokenizer, policies=[H2O(), [H2O()], "streaming(window=9)"])
    assert [r.answer for r in found.results.samples] == expected
    assert "generate" in model.__dict__
    with pytest.raises(KVPruneError, match="training"):
        small(model.train())


# Stopped and started again.


@pytest.mark.slow
def test_more_may_be_asked_for(folder, tmp_path, monkeypatch):
    """Of everything; what is there is not run again, and stays as it is."""
    small(folder, out=tmp_path)
    before = (tmp_path / NAME).read_bytes()
    with monkeypatch.context() as patch:
        patch.setattr("kvprune.evaluation.compare.worker.CacheReader", lambda *_: 1 / 0)
        assert not small(folder, out=tmp_path).failures
    assert (tmp_path / NAME).read_bytes() == before
    more: dict[str, Any] = {
        "policies": [*SPECS, "h2o(layers=[0])"],
        "tasks": [Likely(), Echo()],
        "contexts": [30, 20],
        "budgets": [0.5],
        "samples": 4,
    }
    found = small(folder, out=tmp_path, **more)
    after = (tmp_path / NAME).read_bytes()
    assert after.startswith(before) and len(said(tmp_path)) == 4 * 4 * (2 + 3) + 2 * 3
    assert set(said(tmp_path).values()) == {1}
    small(folder, out=tmp_path / "anew", **more)
    assert said(tmp_path / "anew").keys() <= said(tmp_path).keys()
    # Fewer are no harm.
    assert small(folder, out=tmp_path, samples=1).results == found.results


@pytest.fixture(scope="module")
def whole(folder, tmp_path_factory) -> Path:
    """A results file of a run that was not stopped."""
    out = tmp_path_factory.mktemp("whole")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("kvprune.evaluation.report.write_report", lambda results, folder: [])
        small(folder, out=out)
    return out


@settings(max_examples=8)
@given(data=st.data())
def test_a_file_cut_anywhere_goes_on(folder, whole, tmp_path_factory, data):
    """Nothing is lost that was whole, and nothing is there twice."""
    out = tmp_path_factory.mktemp("cut")
    content = (whole / NAME).read_bytes()
    ends = [i for i, byte in enumerate(content) if byte == ord("\n")]
    near = st.sampled_from(ends).flatmap(lambda end: st.sampled_from([end - 1, end, end + 1]))
    cut = content[: data.draw(near | st.integers(0, len(content)))]
    (out / NAME).write_bytes(cut)
    small(model_of(folder), out=out)
    kept = cut[: cut.rfind(b"\n") + 1]
    assert (out / NAME).read_bytes().startswith(kept)
    assert said(out) == said(whole)


def stopping(model: Path, out: Path, how: int) -> int:
    """How a process ends in whose second cell's second sample it is stopped."""
    program = (
        "import kvprune; from kvprune.evaluation import compare, report; "
        "from tests.support.fake_tasks import Killed; report.write_report = lambda *_: []; "
        f"kvprune.compare({str(model)!r}, {SPECS}, tasks=[Killed('', 1, {str(out / 'x')!r}, {how})]"
        f", contexts=[20], samples=3, out={str(out)!r})"
    )
    # Output is not kept: Ctrl-C leaves a traceback.
    root = Path(__file__).parents[2]
    done = subprocess.run([sys.executable, "-c", program], cwd=root, capture_output=True)
    return done.returncode


@pytest.fixture
def hears_ctrl_c():
    """Also where the tests run in the background of a script, which ignores it."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.usefixtures("hears_ctrl_c")
@pytest.mark.parametrize(
    "how",
    [signal.SIGKILL, pytest.param(signal.SIGINT, marks=pytest.mark.slow)],
    ids=["kill -9", "ctrl-c"],
)
def test_a_process_that_was_stopped_goes_on(folder, whole, tmp_path, how):
    """Its lock is gone with it, and what it had finished is there."""
    out = tmp_path
    assert stopping(folder, out, how) != 0
    before = said(out)
    assert len(before) == 1 and set(before.values()) == {1}
    small(folder, out=out, tasks=[Killed(there=str(out / "x"))])
    assert before.keys() <= said(out).keys() and said(out) == said(whole)


def test_a_cell_that_fails_stops_no_other_and_is_tried_again(folder, tmp_path, monkeypatch):
    """What it had finished is kept; once it is mended nothing says that it ever failed."""
    monkeypatch.setitem(fake_tasks.FAILING, "now", True)
    policies = [FAILING, "h2o"]
    for _ in range(2):
        found = small(folder, policies=policies, out=tmp_path)
        (failure,) = found.failures
        assert failure.cell.label == FAILING
        assert "RuntimeError: a mistake" in failure.error and "fake_tasks.py" in failure.error
        assert len(found.results.samples) == 3 * 3 + 2
        row = next(row for row in found.rows if row["label"] == FAILING)
        assert "a mistake" in row["error"] and row["samples"] == 2
    monkeypatch.setitem(fake_tasks.FAILING, "now", False)
    found = small(folder, policies=policies, out=tmp_path)
    assert not found.failures and set(said(tmp_path).values()) == {1}
    assert len(said(tmp_path)) == 4 * 3 and not any(row["error"] for row in found.rows)


def test_a_cell_that_fails_at_once_has_a_row(folder, monkeypatch):
    """With nothing but its error."""
    monkeypatch.setattr("kvprune.evaluation.compare.worker.own_prefill_flops", lambda *_: 1 / 0)
    rows = small(folder).rows
    assert len(rows) == 4 and all("ZeroDivisionError" in row["error"] for row in rows)
    assert {row["score"] for row in rows} == {None} and {row["samples"] for row in rows} == {0}


def test_a_full_disk_loses_nothing(folder, whole, tmp_path, monkeypatch):
    """Half a line is no line."""
    from kvprune.evaluation.ledger import ledger

    write, count = ledger._all_of, [0]

    def full(file: Any, data: bytes) -> None:
        count[0] += 1
        if count[0] == 7:
            write(file, data[:20])
            raise OSError(28, "No space left on device")
        write(file, data)

    monkeypatch.setattr(ledger, "_all_of", full)
    with pytest.raises(KVPruneError, match=r"No space left.*what is finished is kept"):
        small(folder, out=tmp_path)
    assert not (tmp_path / NAME).read_bytes().endswith(b"\n")
    assert len(read(tmp_path).samples) == 4
    small(folder, out=tmp_path)
    assert said(tmp_path) == said(whole)


def test_each_policy_is_run_in_each_store(folder, tmp_path):
    """Dense as well; codes take fewer bytes, and a cell's answers are those of its cache."""
    stores = ["plain", "quantized(bits=8, group=8)", Quantized(4, 8)]
    given: dict[str, Any] = {"policies": ["dense", "h2o"], "budgets": [0.5], "tasks": [Likely()]}
    found = small(folder, **given, stores=stores, out=tmp_path)
    assert not found.failures
    tokenizer, model = loaded(str(folder))
    kvprune.attach(model)
    sample = Likely().samples(tokenizer, 20, 3, 0)[1]
    mine = {(r.cell.label, r.cell.budget): r for r in found.results.samples if r.sample == 1}
    eight, four = " in quantized(bits=8, group=8)", f" in {stores[2]!r}"
    lines = {("dense", None), ("no context", None), ("dense" + eight, None), ("dense" + four, None)}
    assert mine.keys() == lines | {("h2o" + end, 0.5) for end in ("", eight, four)}
    for (label, budget), result in mine.items():
        if label == "no context":
            continue
        named = cache_of(result.cell.policy)
        store = None if " in " not in label else Quantized(8 if label.endswith(eight) else 4, 8)
        assert named.store == store
        policies = [H2O(0.25, 0.25)] if budget else []
        assert canonical(named.policies) == canonical(policies)
        cache = kvprune.ComposedCache(policies, store=store)
        kvprune.read(model, cache, torch.tensor([sample.prompt[:-1]]))
        assert result.cost.bytes_held == cache.nbytes
    held = [mine["dense" + end, None].cost.bytes_held for end in ("", eight, four)]
    assert held == sorted(held, reverse=True) and len(set(held)) == 3
    scores = {r.score for (label, _), r in mine.items() if label.startswith("dense")}
    assert len(scores) == 3
    again = small(folder, **given, stores=stores[1:], out=tmp_path)
    assert again.results.samples == found.results.samples


# What is refused, before any work.


def refused(model: Any, match: str, **given: Any) -> None:
    """And no line is written."""
    out = given.get("out")
    before = out and (out / NAME).exists() and (out / NAME).read_bytes()
    with pytest.raises(KVPruneError, match=f"(?s){match}"):
        small(model, **given)
    assert (out and (out / NAME).exists() and (out / NAME).read_bytes()) == before


@dataclass(frozen=True)
class Goes(Echo):
    """Goes on for a while."""

    on: int = 0

    def following(self, sample, tokenizer):
        """As long as is said."""
        return self.on


CHOICES: list[tuple[str, dict[str, Any]]] = [
    ("did you mean 'h2o'", {"policies": ["h20"]}),
    ("list of specs", {"policies": "h2o"}),
    ("a budget of 1024 tokens is beyond the context of 20", {"policies": ["streaming"]}),
    ("a budget of 21 tokens", {"policies": ["h2o(heavy=11,recent=10)|h2o"], "contexts": [30, 20]}),
    ("layers=\\[9\\]: expected layers of 0 to 3", {"policies": ["h2o(layers=[9])"]}),
    ("no heads ship", {"policies": ["sdtp"]}),
    ("--budgets 1.5: expected shares", {"budgets": [0.5, 1.5]}),
    ("--budgets 0.0: ", {"budgets": [0.0]}),
    ("--budgets 12: ", {"budgets": [12]}),
    ("--context 0: ", {"contexts": [0]}),
    ("--context ", {"contexts": []}),
    ("--context 513: expected at most the 512", {"contexts": [20, 513]}),
    ("context of at least 8 tokens, got 4", {"contexts": [20, 4], "policies": ["h2o"]}),
    ("--samples 0", {"samples": 0}),
    ("--seed -1", {"seed": -1}),
    ("--dtype 'int8': expected one of auto", {"dtype": "int8"}),
    ("--device 'tpu'", {"device": "tpu"}),
    ("--executor 'slurm': expected one of local, shared, ray", {"executor": "slurm"}),
    ("at least one task", {"tasks": []}),
    ("echo comes twice", {"tasks": [Echo(), Echo("other")]}),
    ("policies: expected specs .*got <class", {"policies": [H2O]}),
    ("policies: expected specs .*got None", {"policies": [None]}),
    ("policies: expected specs .*ComposedCache", {"policies": [kvprune.ComposedCache([H2O()])]}),
    ("policies: expected a list .*got H2O", {"policies": H2O()}),
    ("contexts: expected a list .*got 20", {"contexts": 20}),
    ("budgets: expected a list .*got 0.5", {"budgets": 0.5}),
    ("budgets: expected a list .*got None", {"budgets": None}),
    ("tasks: expected a list .*got Echo", {"tasks": Echo()}),
    ("tasks: expected names, .*got 3", {"tasks": [3]}),
    ("the same at a budget of 0.5", {"policies": ["h2o", "h2o(2, 2)"], "budgets": [0.5]}),
    ("--device ''", {"device": ""}),
    ("tokenizer: expected none .*brings its own", {"tokenizer": object()}),
    ("H2O: layers=0: expected numbers of layers", {"policies": ["h2o(layers=0)"]}),
    ("H2O: layers={0: 1}: expected numbers", {"policies": ["h2o(layers={0:1})"]}),
    ("H2O: layers=3: expected numbers", {"policies": [H2O(layers=3)]}),  # type: ignore[arg-type]
    ("store 'h2o': expected plain, or quantized", {"stores": ["h2o"]}),
    ("store=3: expected a store", {"stores": [3]}),
    ("stores: expected a list", {"stores": "plain"}),
    (
        "expected policies alone where --stores names stores",
        {"policies": ["ComposedCache([h2o], store=quantized(group=8))"], "stores": ["plain"]},
    ),
    ("group=6.*expected", {"policies": ["h2o"], "stores": ["quantized(group=6)"]}),
    ("20 tokens, and 500 that may follow it: expected at most the 512", {"tasks": [Goes("", 500)]}),
]


@pytest.mark.parametrize(("match", "given"), CHOICES, ids=[c[0] for c in CHOICES])
def test_choices_that_cannot_be_are_refused(folder, tmp_path, match, given):
    """With what was expected."""
    refused(folder, match, out=tmp_path, **given)


def test_no_model_and_no_folder(folder, tmp_path, monkeypatch):
    """Each by its name."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    refused(str(tmp_path / "none"), "--model .*none")
    refused(3, "a name, a folder or a model, got 3")
    (tmp_path / "file").touch()
    with pytest.raises(KVPruneError, match="folder that can be written"):
        small(folder, out=tmp_path / "file" / "out")
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr("shutil.disk_usage", lambda _: usage(1, 1, 2**20))
    refused(folder, "expected 16 MiB of room.*found 1", out=tmp_path)


class TooLong(Echo):
    """Breaks what a task promises."""

    def samples(self, tokenizer, context, count, seed):
        """Longer than asked for."""
        return super().samples(tokenizer, context + 5, count, seed)


def test_a_task_that_breaks_its_promises_is_refused(folder):
    """Rather than compared with others."""
    refused(folder, "echo: sample 0 has 25 tokens.*expected 1 to 20", tasks=[TooLong()])


def test_a_file_of_another_run_is_refused(folder, tmp_path, monkeypatch):
    """Naming what differs."""
    small(folder, out=tmp_path)
    other = saved_model(tmp_path / "other", seed=1)
    refused(other, "another: digest '", out=tmp_path)
    refused(folder, "seed 0, not 1", out=tmp_path, seed=1)
    refused(folder, "dtype 'float32', not 'float64'", out=tmp_path, dtype="float64")
    refused(folder, "number 0 of echo at 20 tokens was another", out=tmp_path, tasks=[Echo("x")])
    with monkeypatch.context() as patch:
        patch.setattr("kvprune.evaluation.compare.compare.version", lambda _: "9.9")
        refused(folder, "versions .*not .*9.9", out=tmp_path)
    small(folder, out=tmp_path)


def test_other_heads_under_the_same_name_are_refused(folder, tmp_path):
    """A policy is more than its spec."""
    spec = f"sdtp(heads={str(tmp_path / 'heads')!r})"
    for seed in (1, 2):
        sdtp_heads(seed).float().save_pretrained(tmp_path / "heads")
        if seed == 1:
            small(folder, out=tmp_path, policies=[spec])
    refused(folder, "weights, and those of SDTP.*have changed", out=tmp_path, policies=[spec])


def test_other_gates_under_the_same_name_are_refused(folder, tmp_path):
    """They are within a statistic."""
    spec = f"kvzap(gates={str(tmp_path / 'gates')!r})"
    made = gates()
    made.save(tmp_path / "gates")
    small(folder, out=tmp_path, policies=[spec])
    with torch.no_grad():
        next(made.parameters()).add_(1)
    made.save(tmp_path / "gates")
    refused(folder, "weights, and those of KVzap.*have changed", out=tmp_path, policies=[spec])


@pytest.mark.parametrize("place", ["first", "middle", "last", "none"])
def test_what_is_no_results_file_is_left_alone(folder, whole, tmp_path, place):
    """Also where its last line has no end."""
    some = (whole / NAME).read_text().splitlines(keepends=True)
    damaged = {
        "first": some[1:],
        "middle": [*some[:2], '{"kind": "sample"}\n', *some[2:]],
        "last": [*some, "my notes"],
        "none": ["my notes"],
    }
    (tmp_path / NAME).write_text("".join(damaged[place]))
    refused(folder, "line \\d+: expected what `kvprune compare` writes", out=tmp_path)


def test_two_processes_do_not_write_the_same_folder(folder, tmp_path):
    """The second is refused."""
    with FileLock(tmp_path / LOCK):
        refused(folder, "another `kvprune compare` writes there", out=tmp_path)
    small(folder, out=tmp_path)
    with pytest.raises(KVPruneError, match=r"found no results\.jsonl"):
        read(tmp_path / "none")


# Rows and texts.


def test_rows_are_flat_and_paired(folder):
    """As a data frame takes them."""
    found = small(folder, policies=["h2o(heavy=3,recent=4)"], tasks=[Likely()], samples=6)
    rows = {row["label"]: row for row in found.rows}
    scores = {
        label: [r.score for r in found.results.samples if r.cell.label == label] for label in rows
    }
    mine, dense = rows["h2o(heavy=3,recent=4)"], rows["dense"]
    apart = [a - b for a, b in zip(scores[mine["label"]], scores["dense"], strict=True)]
    assert mine["difference"] == pytest.approx(sum(apart) / 6)
    assert min(apart) <= mine["difference_low"] <= mine["difference"] <= mine["difference_high"]
    assert dense["difference"] is None and dense["share_kept"] == 1.0
    assert dense["score_low"] <= dense["score"] <= dense["score_high"]
    assert mine["pruned"] == [0.0] * LAYERS and mine["unit"] == "nats a token"
    assert mine["share_kept"] == pytest.approx(7 * sum(1 / n for n in (20, 19, 18)) / 3)
    # The last token attends to less.
    assert 0.99 * dense["prefill_flops"] < mine["prefill_flops"] < dense["prefill_flops"]
    assert mine["bytes_held"] < dense["bytes_held"] <= dense["bytes_peak"]
    assert mine["decode_tokens_per_second"] is None and mine["error"] is None
    one = small(folder, samples=1).rows
    assert one[-1]["score_low"] is None and one[-1]["difference"] is not None


def test_pruned_tokens_are_counted_by_layer(folder, tmp_path):
    """And what the heads compute is in the FLOPs."""
    sdtp_heads(keep=0.5).float().save_pretrained(tmp_path)
    spec = f"sdtp(heads={str(tmp_path)!r}, min_tokens=8)"
    rows = {r["label"]: r for r in small(folder, policies=[spec], contexts=[64], samples=1).rows}
    # Of 63 tokens 32 and then 16 stay, and the last one comes after.
    assert rows[spec]["pruned"] == [0.0, 31.0, 31.0, 47.0]
    assert rows[spec]["share_kept"] == (64 + 33 + 33 + 17) / 4 / 64
    _, model = loaded(str(folder))
    from kvprune.evaluation.measure.flops import Flops
    from kvprune.evaluation.measure.reader import own_prefill_flops

    flops = Flops.measured(kvprune.attach(model))
    read = flops.of_prompt(63, (63, 32, 32, 16))
    read += flops.of_prompt(1, (1,) * LAYERS, (64, 33, 33, 17))
    own = own_prefill_flops(model, [5] * 64, [SDTP(str(tmp_path), min_tokens=8)])
    assert rows[spec]["prefill_flops"] == read + own > read


def test_the_texts_of_tokens():
    """Joined they are the prompt; token by token where the tokenizer cannot say."""
    assert pieces("ab c", [(0, 1), (1, 2), (3, 4)]) == ("a", "b", " c")
    words = words_tokenizer()
    ids = words("How many layers?")["input_ids"]
    assert "".join(texts_of(words, ids)) == words.decode(ids)
    # What is read again is not what it was: each token for itself.
    assert len(texts_of(words, [3, 0, 0])) == 3


# The command.


@pytest.fixture
def named(monkeypatch):
    """The registry of tasks."""
    found = {"echo": Echo(), "likely": Likely()}
    monkeypatch.setattr(tasks, "task", found.__getitem__, raising=False)


COMMAND = ["compare", "--samples", 2, "--context", 20]


def test_the_command_takes_several_values(folder, tmp_path, named):
    """After one option, after each, or with an equals sign."""
    spelled = [
        ["--policies", "h2o", "streaming(window=9)", "--tasks", "echo", "likely"],
        ["--policies", "h2o", "--tasks=echo", "likely", "--policies", "streaming(window=9)"],
    ]
    found = []
    for i, options in enumerate(spelled):
        out = tmp_path / str(i)
        done = run(*COMMAND, *options, "--model", folder, "--out", out, "--budgets", 0.5, 0.25)
        assert done.exit_code == 0, done.output
        found.append(said(out))
        shown = done.stdout
        assert "echo, 20 tokens (letters)" in shown and "likely, 20 tokens" in shown
        assert shown.count("streaming(window=9)") == 4 and "no context" in shown
    assert found[0] == found[1] and len(found[0]) == 2 * 2 * (2 + 4)
    assert read(tmp_path / "0").run["command"]


def test_the_command_ends_with_1_where_a_cell_failed(folder, tmp_path, named, monkeypatch):
    """And says which, and why."""
    monkeypatch.setitem(fake_tasks.FAILING, "now", True)
    options = ["--policies", FAILING, "h2o", "--tasks", "echo", "--model", folder]
    done = run(*COMMAND, "--samples", 3, *options, "--out", tmp_path)
    assert done.exit_code == 1 and "a mistake" in done.stderr
    assert "h2o" in done.stdout and "(failed)" in done.stdout
    monkeypatch.setitem(fake_tasks.FAILING, "now", False)
    assert run(*COMMAND, "--samples", 3, *options, "--out", tmp_path).exit_code == 0


@pytest.mark.usefixtures("hears_ctrl_c")
def test_the_command_ends_with_130_where_it_was_stopped(folder, tmp_path, named, monkeypatch):
    """And says how to go on."""
    monkeypatch.setattr(Echo, "score", lambda *_: os.kill(os.getpid(), signal.SIGINT))
    options = ["--policies", "h2o", "--tasks", "echo", "--model", folder, "--out", tmp_path]
    done = run(*COMMAND, *options)
    assert done.exit_code == 130 and "the same command goes on" in done.stderr


def test_importing_kvprune_imports_no_comparison():
    """It stays as light as it was; `compare` is there all the same."""
    program = (
        "import sys, kvprune; names = set(sys.modules); assert 'compare' in kvprune.__all__; "
        "print([m for m in names if m.startswith(('kvprune.evaluation', 'rich', 'matplotlib', "
        "'kvprune.policies'))]); assert callable(kvprune.compare)"
    )
    root = Path(__file__).parents[2]
    done = subprocess.run([sys.executable, "-c", program], cwd=root, capture_output=True, text=True)
    assert done.returncode == 0 and done.stdout == "[]\n", done.stderr
    with pytest.raises(AttributeError, match="no attribute 'compar'"):
        kvprune.compar  # noqa: B018
