"""`bench.speed` on tiny models: what it measures, in which parts, and how a run goes on."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from transformers import DynamicCache, LlamaConfig

import kvprune
from bench import performance, resident, speed
from bench.costs import clock, decode, models, results
from bench.costs.candidates import (
    BOTH,
    DENSE,
    HEAVY,
    NAMES,
    PRUNED,
    STREAMING,
    candidates,
    held,
    policies,
    random_sdtp,
)
from bench.costs.clock import Clock, turns
from bench.costs.count import counted
from bench.costs.models import LAYER, Models, paired
from bench.costs.plan import Sizes
from kvprune.evaluation.measure.flops import Flops
from kvprune.policies.sdtp import SDTPHeads

from ..support.models import fresh_model, prompt

SHIPPED = str(Path(kvprune.__file__).parent / "policies/sdtp/pretrained/SmolLM2-135M-Instruct")
SMALL = ["--contexts", "128", "--budgets", "16", "32", "--stream", "2048", "--new", "3"]
TINY_LAYER = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
}


@pytest.fixture(scope="module")
def pair() -> models.Pair:
    """Of eight layers, so that SDTP has the paper's stages."""
    return paired(fresh_model(dtype=torch.float32, num_hidden_layers=8))


@pytest.fixture
def asked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Arguments of a small run: a tiny model on disk, a tiny layer, few steps."""
    fresh_model(dtype=torch.float32).save_pretrained(tmp_path / "model")
    for name, number in TINY_LAYER.items():
        monkeypatch.setitem(models.SEVEN_B, name, number)
    # In a process with all that tests import, it takes longer than what is measured.
    monkeypatch.setattr("gc.collect", lambda: 0)
    for module in ("prefill", "decode", "stream", "attached"):
        monkeypatch.setattr(f"bench.costs.{module}.STEPS", 2)
    folders = ["--model", str(tmp_path / "model"), "--results", str(tmp_path / "results")]
    return [*SMALL, *folders, "--threads", "1", "--repeats", "1"]


def run(monkeypatch: pytest.MonkeyPatch, *given: str) -> int:
    """The command's exit code."""
    monkeypatch.setattr(sys, "argv", ["speed", *given])
    return speed.main()


def test_one_command_measures_all_and_a_page_is_made_of_it(asked, monkeypatch, tmp_path, capsys):
    """A file for each part, which says where it comes from; then a bar of each kind."""
    assert run(monkeypatch, *asked) == 0
    found = results.read(tmp_path / "results")
    names = {"attach-128", "prefill-128", "decode-128", "whole-128", "stream-2048"}
    others = {"bfloat16-128", "batch-128", "layer-128", "field-128", "field-step-32"}
    assert {one["part"]["name"] for one in found} == names | others
    for one in found:
        assert {"command", "torch", "transformers", "machine", "dtype"} <= set(one["about"])
    assert {one["about"]["dtype"] for one in found} == {"torch.float32", "torch.bfloat16"}
    said = capsys.readouterr().out
    assert said.startswith("10 parts, about ") and "layer-128: 100%; 0 min left in all" in said
    performance.write(found, tmp_path / "page.md")
    assert "\n## How costs grow\n" in (tmp_path / "page.md").read_text()


def test_a_run_that_was_stopped_goes_on(asked, monkeypatch, tmp_path, capsys):
    """With what is missing; what is there is left alone until it is asked for anew."""
    asked += ["--parts", "attach", "decode"]
    folder = tmp_path / "results"

    def stopped(*_: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setitem(speed.MEASURES, "decode", stopped)
    assert run(monkeypatch, *asked) == 130
    assert [path.name for path in folder.iterdir()] == ["speed-attach-128.json"]
    before = (folder / "speed-attach-128.json").read_text()
    monkeypatch.setitem(speed.MEASURES, "decode", decode.measure)
    capsys.readouterr()
    assert run(monkeypatch, *asked) == 0
    assert "attach-128: is there" in capsys.readouterr().out
    assert (folder / "speed-attach-128.json").read_text() == before
    assert len(list(folder.iterdir())) == 2
    assert run(monkeypatch, *asked, "--fresh") == 0
    assert (folder / "speed-attach-128.json").read_text() != before


@pytest.mark.parametrize(
    ("given", "said"),
    [
        (["--parts", "prefil"], "expected some of attach, attach-1024"),
        (["--contexts", "100"], "at least 128"),
        (["--budgets", "9000"], "none above the longest"),
        (["--stream", "1024"], "at least 2048"),
        (["--repeats", "0"], "at least 1"),
    ],
)
def test_what_cannot_be_measured_is_refused(given, said, capsys):
    with pytest.raises(SystemExit):
        speed.options(given)
    assert said in capsys.readouterr().err


def test_a_gpu_s_results_do_not_take_the_place_of_a_cpu_s():
    assert speed.options([]).results == speed.ROOT / "bench" / "results"
    assert speed.options(["--device", "cuda"]).results == speed.ROOT / "build" / "speed-cuda"


def test_the_whole_plan_takes_less_than_an_hour():
    """Of which the layers of a 7B model take no more than seven."""
    parts = Sizes().parts()
    assert 30 * 60 < sum(part.seconds for part in parts) < 56 * 60
    assert sum(part.seconds for part in parts if part.shape == LAYER) < 7 * 60
    assert len({part.name for part in parts}) == len(parts)


def test_progress_is_guessed_from_what_a_run_took(monkeypatch, capsys):
    """A part that took twice as long as it should: so will the others."""
    times = iter([0.0, 10.0, 20.0, 200.0])
    monkeypatch.setattr(speed.time, "monotonic", lambda: next(times))
    parts = Sizes(repeats=1).parts()[:2]
    for part, seconds in zip(parts, (100.0, 300.0), strict=True):
        object.__setattr__(part, "seconds", seconds)
    progress = speed.Progress(parts)
    for share in (0.1, 0.2, 1.0):
        progress.tick(parts[0], share)
    lines = capsys.readouterr().out.splitlines()
    assert lines == [
        "attach-1024: 20%; 6 min left in all",
        "attach-1024: 100%; 10 min left in all",
    ]


# What is measured.


def test_models_of_a_pair_share_their_weights(pair):
    """One is attached, the other is not, and both say the same."""
    plain, attached = pair.plain, pair.attached
    for mine, other in zip(plain.parameters(), attached.parameters(), strict=True):
        assert mine.data_ptr() == other.data_ptr()
    assert not hasattr(plain.model, "_kvprune") and hasattr(attached.model, "_kvprune")
    with torch.no_grad():
        assert torch.equal(plain(prompt(1, 9)).logits, attached(prompt(1, 9)).logits)


def test_a_model_is_opened_once_for_parts_that_share_it(monkeypatch):
    """And again for another precision."""
    for name, number in TINY_LAYER.items():
        monkeypatch.setitem(models.SEVEN_B, name, number)
    opened = Models()
    first = opened.get(LAYER, "float32")
    assert opened.get(LAYER, "float32") is first
    second = opened.get(LAYER, "bfloat16")
    assert second is not first and second.plain.dtype == torch.bfloat16
    assert second.plain.config.num_hidden_layers == 2


@torch.no_grad()
def test_what_is_counted_is_right(pair):
    """FLOPs by both counters, and dense's bytes by hand."""
    model, ids, runs = pair.attached, prompt(2, 200), candidates(pair.attached, 24)
    flops = Flops.measured(model)
    said = {name: counted(model, ids, make, flops, Clock()) for name, make in runs.items()}
    assert list(said) == list(NAMES)
    for name in (DENSE, STREAMING, PRUNED):
        assert said[name]["flops"] == said[name]["counted_flops"], name
    assert said[HEAVY]["counted_flops"] < said[HEAVY]["flops"] == said[DENSE]["flops"]
    # Heads of the shipped shape weigh, in a model that is 32 wide.
    assert said[PRUNED]["flops"] < said[DENSE]["flops"]
    assert said[DENSE]["held"] == 2 * 200 * 8 * 2 * 2 * 8 * 4 <= said[DENSE]["live"]
    assert said[BOTH]["held"] < said[DENSE]["held"] / 4


@torch.no_grad()
def test_a_dense_step_leaves_its_context_as_it_was(pair):
    """So that all steps are at the same one; ours goes on, at a full budget."""
    ids, dense = prompt(1, 40), DynamicCache()
    ours = candidates(pair.attached, 24)[HEAVY]()
    for cache in (dense, ours):
        pair.attached(ids, past_key_values=cache)
        for _ in range(3):
            assert decode.step(pair.attached, ids, cache, Clock()) > 0
    assert dense.get_seq_length() == 40 and ours.get_seq_length() == 43
    assert ours.columns(0).shape[-1] == 24


@torch.no_grad()
def test_a_smaller_budget_is_what_the_prompt_would_have_left(pair):
    """Each prompt is read once, for the largest budget."""
    ids = prompt(1, 200)
    caches = decode._read(pair.attached, ids, (16, 48), lambda share: None)
    for budget, by_name in caches.items():
        assert list(by_name) == [DENSE, *decode.BUDGETED]
        assert by_name[DENSE].get_seq_length() == budget
        for name in decode.BUDGETED:
            read: Any = kvprune.ComposedCache(policies(pair.attached, budget)[name])
            pair.attached(ids, past_key_values=read)
            ours: Any = by_name[name]
            for cache in (read, ours, read, ours):
                pair.attached(ids[:, :1], past_key_values=cache)
            for layer in range(8):
                assert torch.equal(ours.columns(layer), read.columns(layer))
            assert held(ours) == held(read)


def test_random_heads_have_the_shape_and_schedule_of_those_that_ship():
    """So that what is measured is what users have."""
    config = LlamaConfig(hidden_size=576, num_hidden_layers=30)
    sdtp = random_sdtp(SimpleNamespace(config=config, device="cpu"))
    shipped = SDTPHeads.from_pretrained(SHIPPED)
    assert isinstance(sdtp.heads, SDTPHeads)
    assert list(sdtp.heads.layers) == list(range(4, 30, 3)) == list(shipped.layers)
    assert sdtp.share ** len(shipped.layers) == pytest.approx(0.35)
    mine, theirs = ([p.shape for p in h.parameters()] for h in (sdtp.heads, shipped))
    assert mine == theirs


def test_turns_begin_with_another_one_each_time():
    assert [turns("abc", n) for n in range(4)] == [[*"abc"], [*"bca"], [*"cab"], [*"abc"]]


def test_a_gpu_is_waited_for_before_a_clock_is_read(monkeypatch):
    """At both ends; on a CPU there is nothing to wait for."""
    calls: list[str] = []
    monkeypatch.setattr(clock.torch.cuda, "synchronize", lambda device: calls.append(device))
    monkeypatch.setattr(clock.time, "perf_counter", lambda: float(len(calls)))
    assert Clock("cuda:0").seconds(lambda: calls.append("work")) == 2.0
    assert calls == ["cuda:0", "work", "cuda:0"]
    assert Clock().seconds(lambda: calls.append("work")) == 1.0


@pytest.mark.skipif(resident.forget_peak() is None, reason="the system does not say (not Linux)")
def test_a_peak_is_what_came_and_went():
    """And not what an earlier one left."""
    ours, size = Clock(), 64 << 20
    for megabytes in (64, 8):
        before = ours.begin_peak()
        size = megabytes << 20
        torch.ones(size // 4)
        beyond = ours.peak_beyond(before)
        assert beyond is not None and 0.9 * size <= beyond <= size + (4 << 20)


def test_a_file_of_results_is_whole(tmp_path):
    """Seconds without the digits that are noise; integers as they are."""
    part = Sizes().parts()[0]
    results.write(tmp_path, part, {"torch": "2"}, {"a": [0.123456789, 5], "b": {"c": 10**15}})
    said = json.loads((tmp_path / "speed-attach-1024.json").read_text())
    assert said["found"] == {"a": [0.1234568, 5], "b": {"c": 10**15}}
    assert [one["part"]["name"] for one in results.read(tmp_path)] == ["attach-1024"]
    assert results.the_one(results.read(tmp_path), "decode") is None
