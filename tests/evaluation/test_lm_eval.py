"""lm-evaluation-harness with the model `kvprune`, on local tasks and models that are made here."""
# ruff: noqa: E402

from __future__ import annotations

import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from kvprune import ComposedCache, KVPruneError, TokenPolicy
from kvprune.policies import H2O, StreamingLLM

from ..support.models import LAYERS, fresh_model, tiny_model
from ..support.strategies import sdtp_pruner

pytestmark = pytest.mark.slow  # lm-eval is not among what `make test` installs
pytest.importorskip("lm_eval")

from lm_eval import simple_evaluate
from lm_eval.api.instance import Instance
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager

from kvprune.evaluation.harness.lm_eval import KVPruneLM
from kvprune.evaluation.harness.results import read_outputs, results_of
from kvprune.evaluation.report import write_report

ROOT = Path(__file__).parents[2]
TASKS = ROOT / "tests" / "lm_eval_tasks"
TINY = "h2o(heavy=2,recent=2)"
QUIET: dict[str, Any] = {"device": "cpu", "max_length": 256, "max_batch_size": 4}


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    """Data sets are kept in the test's folder; files are found from the repository's root."""
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "datasets"))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.chdir(ROOT)


def words() -> list[str]:
    docs = [json.loads(line) for line in (TASKS / "seen.jsonl").read_text().splitlines()]
    said = " ".join(" ".join([d["text"], *d["choices"]]) for d in docs) + " I have seen the"
    return sorted(set(said.split()))


def recalling(size: int) -> Any:
    """A model that finds likely what its cache holds: attention is even, values are the tokens."""
    model = fresh_model(dtype=torch.float32, vocab_size=size, hidden_size=128, heads=4, kv_heads=4)
    with torch.no_grad():
        for name, weights in model.named_parameters():
            if "norm" not in name:
                weights.zero_()
        model.model.embed_tokens.weight.copy_(torch.eye(size, 128))
        model.lm_head.weight.copy_(4 * torch.eye(size, 128))
        for layer in model.model.layers[:1]:
            layer.self_attn.v_proj.weight.copy_(torch.eye(128))
            layer.self_attn.o_proj.weight.copy_(torch.eye(128))
    return model


@pytest.fixture(scope="module", params=["random", "recalling"])
def folder(request, tmp_path_factory):
    return saved(request.param, tmp_path_factory)


@pytest.fixture(scope="module")
def random_folder(tmp_path_factory):
    return saved("random", tmp_path_factory)


@pytest.fixture(scope="module")
def recalling_folder(tmp_path_factory):
    return saved("recalling", tmp_path_factory)


def saved(kind: str, tmp_path_factory: Any) -> str:
    """A model with a tokenizer of the tasks' words, as `pretrained` takes it."""
    vocabulary = {w: i for i, w in enumerate(["<pad>", "<s>", "[UNK]", *words()])}
    size = len(vocabulary)
    place = str(tmp_path_factory.mktemp(kind))
    model = (
        recalling(size)
        if kind == "recalling"
        else fresh_model(dtype=torch.float32, vocab_size=size)
    )
    model.save_pretrained(place)
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, unk_token="[UNK]", pad_token="<pad>", bos_token="<s>",
        eos_token="<s>",
    ).save_pretrained(place)  # fmt: skip
    return place


def evaluated(lm: Any, *tasks: str) -> dict[str, Any]:
    manager = TaskManager(include_path=str(TASKS), include_defaults=False)
    found = simple_evaluate(
        lm, tasks=list(tasks), task_manager=manager, bootstrap_iters=0, log_samples=True
    )
    assert found is not None
    return found


def asked(kind: str, *arguments: tuple[Any, ...]) -> list[Any]:
    return [Instance(kind, {}, a, i) for i, a in enumerate(arguments)]


def pairs(count: int = 12) -> list[tuple[str, str]]:
    docs = [json.loads(line) for line in (TASKS / "seen.jsonl").read_text().splitlines()[:count]]
    return [(d["text"] + " I have seen the", " " + c) for d in docs for c in d["choices"]]


@pytest.mark.parametrize("batch", [1, 5])
def test_dense_gives_lm_eval_s_own_numbers(folder, batch):
    """Every kind of task: scores of choices, of texts, and what is generated."""
    tasks = ("seen", "seen_said", "seen_text")
    expected = evaluated(HFLM(folder, batch_size=batch, **QUIET), *tasks)
    got = evaluated(KVPruneLM(folder, "dense", batch_size=batch, **QUIET), *tasks)
    assert got["results"]["seen"] == expected["results"]["seen"]
    assert got["results"]["seen_said"] == expected["results"]["seen_said"]
    for task in tasks:
        for mine, theirs in zip(got["samples"][task], expected["samples"][task], strict=True):
            assert answers(mine) == pytest.approx(answers(theirs), abs=1e-4, rel=1e-5)
            assert mine["resps"] == theirs["resps"] or task != "seen_said"


def answers(sample: dict[str, Any]) -> list[float]:
    if sample["filtered_resps"] and isinstance(sample["filtered_resps"][0], tuple):
        return [r[0] for r in sample["filtered_resps"]]
    return [r for r in sample["filtered_resps"] if isinstance(r, float)]


def test_a_tiny_budget_costs_accuracy(recalling_folder):
    """What is not in the cache any more cannot be recalled; with room for all, it is dense."""
    accuracy = {
        policies: evaluated(KVPruneLM(recalling_folder, policies, batch_size=4, **QUIET), "seen")[
            "results"
        ]["seen"]["acc,none"]
        for policies in ("dense", "h2o(heavy=200,recent=200)", "streaming(sinks=1,window=5)")
    }
    assert list(accuracy.values())[:2] == [1.0, 1.0]
    assert accuracy["streaming(sinks=1,window=5)"] < 0.5


POLICIES: dict[str, list[TokenPolicy]] = {
    "h2o": [H2O(heavy=2, recent=2)],
    "share": [H2O(heavy=0.1, recent=0.1)],
    "streaming": [StreamingLLM(sinks=1, window=4)],
    "sdtp": [sdtp_pruner(0.4)],
    "sdtp+h2o": [sdtp_pruner(0.4), H2O(heavy=2, recent=2)],
}


def lm_of(folder: str, name: str, **options: Any) -> Any:
    """Of a tiny random model in float64, whose heads are the tests' own."""
    model = tiny_model(vocab_size=len(words()) + 3)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    return KVPruneLM(model, POLICIES[name], tokenizer=tokenizer, max_length=256, **options)


@pytest.mark.parametrize("name", POLICIES)
def test_scores_do_not_depend_on_the_batch(random_folder, name):
    """Nor on the order, nor on what else is asked; and they are not dense ones."""
    together = asked("loglikelihood", *pairs())
    big = lm_of(random_folder, name, batch_size=5).loglikelihood(together, disable_tqdm=True)
    alone = lm_of(random_folder, name)
    for instance, (likely, greedy) in list(zip(together, big, strict=True))[::5]:
        ((expected, same),) = alone.loglikelihood([instance], disable_tqdm=True)
        assert likely == pytest.approx(expected, rel=1e-9) and greedy == same
    dense = KVPruneLM(tiny_model(vocab_size=len(words()) + 3), tokenizer=alone.tokenizer)
    without = dense.loglikelihood(together, disable_tqdm=True)
    assert max(abs(a - b) for (a, _), (b, _) in zip(big, without, strict=True)) > 0.01


@pytest.mark.parametrize("name", ["h2o", "sdtp+h2o", "sdtp"])
@pytest.mark.parametrize("batch", [1, 4])
def test_what_is_generated_is_the_model_s_own(random_folder, name, batch):
    """`generate` with the same cache, each context alone."""
    lm = lm_of(random_folder, name, batch_size=batch)
    contexts = sorted({c for c, _ in pairs()})[:6]
    until = {"until": ["."], "max_gen_toks": 9, "do_sample": False, "eos_token_id": 1}
    got = lm.generate_until(asked("generate_until", *[(c, until) for c in contexts]), True)
    for context, text in zip(contexts, got, strict=True):
        ids = lm.tokenizer(context, return_tensors="pt").input_ids
        cache = ComposedCache(POLICIES[name])
        said = lm.model.generate(ids, cache=cache, max_new_tokens=9, eos_token_id=1)
        whole = lm.tokenizer.decode(said[0, ids.shape[1] :], skip_special_tokens=True)
        assert text == whole.split(".")[0]


def test_texts_are_scored_on_what_is_kept(random_folder):
    """Token by token with a share of the window; a roomy budget gives lm-eval's numbers."""
    texts = asked("loglikelihood_rolling", *[(c,) for c, _ in pairs()[::8]])
    tiny = lm_of(random_folder, "share", batch_size=3).loglikelihood_rolling(texts, True)
    for text, likely in list(zip(texts, tiny, strict=True))[:2]:
        lm = lm_of(random_folder, "share")
        (alone,) = lm.loglikelihood_rolling([text], True)
        assert likely == pytest.approx(alone, rel=1e-9)
        tenth = (1 + len(lm.tokenizer.encode(text.args[0])) + 5) // 10
        lm.policies = [H2O(tenth, tenth)]
        assert lm.loglikelihood_rolling([text], True) == pytest.approx([alone], rel=1e-9)
    model = tiny_model(vocab_size=len(words()) + 3)
    tokenizer = AutoTokenizer.from_pretrained(random_folder)
    expected = HFLM(model, tokenizer=tokenizer).loglikelihood_rolling(texts, True)
    roomy = KVPruneLM(model, [H2O(500, 500)], tokenizer=tokenizer)
    assert roomy.loglikelihood_rolling(texts, True) == pytest.approx(expected, rel=1e-6)
    assert all(abs(a - b) > 0.01 for a, b in zip(tiny, expected, strict=True))


def test_what_is_too_long_is_cut_on_its_left(random_folder):
    """As lm-eval cuts: dense numbers are its own at a small max_length, empty contexts too."""
    requests = asked("loglikelihood", *pairs(3), ("", " lamp"), ("", " old lamp ."))
    for length in (4, 11):
        options = {"device": "cpu", "max_length": length, "batch_size": 4}
        expected = HFLM(random_folder, **options).loglikelihood(requests, True)
        got = KVPruneLM(random_folder, **options).loglikelihood(requests, True)
        for (a, same), (b, greedy) in zip(got, expected, strict=True):
            assert a == pytest.approx(b, abs=1e-5, rel=1e-5) and same == greedy
    short = KVPruneLM(random_folder, device="cpu", max_length=2)
    with pytest.raises(KVPruneError, match="continuation of 1 to 2 tokens"):
        short.loglikelihood(asked("loglikelihood", ("It is", " dark in the")), True)


def test_argument_strings_keep_their_brackets(random_folder):
    text = f"pretrained={random_folder},policies=h2o(heavy=0.1,recent=3)+{TINY},max_length=256"
    lm = KVPruneLM.create_from_arg_string(text, {"device": "cpu", "batch_size": 2})
    assert list(map(repr, lm.policies)) == list(map(repr, [H2O(0.1, 3), H2O(2, 2)]))
    assert lm.batch_size == 2 and lm.max_length == 256


@pytest.mark.parametrize("spec", ["h2p", "sdtp"])
def test_policies_that_cannot_work_are_refused_before_any_task(random_folder, spec):
    """Unknown, or without heads for this model."""
    with pytest.raises(KVPruneError):
        KVPruneLM(random_folder, spec, **QUIET)


def command_of_the_docs(**replaced: str) -> list[str]:
    """The example of docs/lm-eval.md that needs no network, with other values in their places."""
    text = (ROOT / "docs" / "lm-eval.md").read_text()
    (block,) = (b for b in re.findall(r"```bash\n(.*?)```", text, re.S) if "include_path" in b)
    for value, other in replaced.items():
        assert value in block
        block = block.replace(value, other)
    python, *arguments = shlex.split(block.replace("\\\n", " "))
    assert python == "python"
    return [sys.executable, *arguments]


def run_command(command: list[str], place: Path) -> str:
    """From the repository's root, without a network."""
    env = {**os.environ, "HF_HOME": str(place / "hf"), "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_the_command_and_its_results(recalling_folder, tmp_path):
    """lm-eval's own command line; what it wrote becomes results with costs, dense beside others."""
    given = "streaming(sinks=1,window=5)"
    specs = {"dense": 1.0, given: 0.5}
    for spec in specs:
        out = str(tmp_path / "out")
        replaced = {"NAME": recalling_folder, given: spec, "lm-eval-out": out}
        printed = run_command([*command_of_the_docs(**replaced), "--limit", "12"], tmp_path)
        assert "|seen " in printed and spec in printed
    results = results_of(read_outputs(tmp_path / "out"))
    assert results.units == {"seen": "acc", "seen_said": "exact_match"}
    assert {(s.cell.label, s.cell.task) for s in results.samples} == {
        (spec, task) for spec in specs for task in ("seen", "seen_said")
    }
    for spec, most in specs.items():
        scores = [s.score for s in results.samples if (s.cell.label, s.cell.task) == (spec, "seen")]
        assert len(scores) == 12 and sum(scores) / 12 <= most
    assert results.run["model"] == recalling_folder
    page = write_report(results, tmp_path / "report")[0].read_text()
    assert "streaming(sinks=1" in page and "seen_said" in page


def test_the_command_refuses_in_one_line(random_folder):
    """A policy that is none; lm-eval's own errors are lm-eval's."""
    command = [sys.executable, "-m", "kvprune.evaluation.harness", "--model", "kvprune"]
    command += ["--model_args", f"pretrained={random_folder},policies=h2p", "--device", "cpu"]
    command += ["--tasks", "tests/support/lm_eval_tasks/seen.yaml"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 2
    assert "kvprune: policy 'h2p'" in done.stderr and "did you mean 'h2o'" in done.stderr
    assert "Traceback" not in done.stderr


def test_results_say_what_reading_cost(recalling_folder):
    """From Python, as from the command's files; each sample with its own prompt's cost."""
    lm = KVPruneLM(recalling_folder, TINY, batch_size=3, **QUIET)
    output = evaluated(lm, "seen", "seen_said", "seen_text")
    results = results_of([output])
    assert results.units == {"seen": "acc", "seen_said": "exact_match"}
    assert len(results.samples) == 80 and not results.failures
    for sample in results.samples:
        assert (
            sample.cell.policy == "H2O(heavy=2, recent=2, positions='original')"
            and sample.cell.label == TINY
        )
        text = output["samples"]["seen"][sample.sample]["arguments"][0][0]
        count = len(lm.tokenizer.encode(text))
        assert sample.cost.prompt_tokens == count
        assert sample.cost.entered == (count,) * LAYERS
        assert sample.cost.kept == (4.0,) * LAYERS
        assert sample.score == sample.parts[results.units[sample.cell.task]]
    lengths = [s.cost.prompt_tokens for s in results.samples[:40]]
    assert {s.cell.context for s in results.samples} == {round(sum(lengths) / 40)}
    assert results.samples[40].answer == output["samples"]["seen_said"][0]["filtered_resps"][0]
    assert output["results"]["seen"]["acc,none"] == sum(s.score for s in results.samples[:40]) / 40


def test_outputs_that_are_no_use_are_refused(random_folder, tmp_path):
    with pytest.raises(KVPruneError, match=r"expected lm-eval's results_\*.json"):
        read_outputs(tmp_path)
    output = evaluated(HFLM(random_folder, **QUIET), "seen_said")
    with pytest.raises(KVPruneError, match="--model kvprune"):
        results_of([output])
    output = evaluated(KVPruneLM(random_folder, **QUIET), "seen_said")
    other = {**output, "config": {**output["config"]}}
    other["config"]["kvprune"] = {**output["config"]["kvprune"], "model": "another"}
    with pytest.raises(KVPruneError, match="expected runs of one model"):
        results_of([output, other])
    output["config"]["kvprune"]["costs"].popitem()
    with pytest.raises(KVPruneError, match="was not read in this run"):
        results_of([output])
    (tmp_path / "results_1.json").write_text("{")
    with pytest.raises(KVPruneError, match=r"results_1.json: expected JSON"):
        read_outputs(tmp_path)
