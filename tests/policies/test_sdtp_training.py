"""Training: the model stays as it is, and a training that was killed goes on as if it had not."""

from __future__ import annotations

import itertools
import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from scipy.stats import spearmanr
from torch import Tensor

import kvprune
from kvprune import KVPruneError
from kvprune.policies import SDTP, SDTPHeads
from kvprune.policies.sdtp import (
    Example,
    Training,
    saliency,
    sharing,
    targets,
    train,
    trainer,
    untrained,
)
from kvprune.policies.sdtp.trainer import CHECKPOINT

from ..support.models import fresh_model, prompt

PROMPT, COMPLETION = 24, 4
EXAMPLES = [
    Example(tuple(row[:PROMPT]), tuple(row[PROMPT:]))
    for row in prompt(6, PROMPT + COMPLETION, seed=5).tolist()
]
# Four examples are trained on, two to a step: two steps an epoch, six in all.
BRIEF: dict[str, Any] = {
    "marking_epochs": 2,
    "pruning_epochs": 1,
    "ranking": 1.0,
    "mse": 0.3,
    "pruning_marks": 0.1,
    "distillation": 0.0,
    "temperature": 1.0,
    "batch": 2,
    "validation": 0.3,
    "checkpoint_every": 1,
    "pairs": 40,
}


def model_of(family: str = "llama") -> Any:
    """A float32 model that nobody shares."""
    return fresh_model(family, dtype=torch.float32)


def policy_of(model: Any, seed: int = 0, **options: Any) -> SDTP:
    """Two stages with untrained heads, before layers 1 and 3."""
    heads = untrained(model, seed, first_layer=1, every=2, query_heads=2, query_size=3)
    return SDTP(heads, 0.6, **{"sinks": 2, "local": 2, "min_tokens": 6, **options})


def trained(out: Path, model: Any = None, examples: Any = None, **options: Any) -> SDTPHeads:
    """Heads after a brief training."""
    model = model or model_of()
    how = Training(**{**BRIEF, **options})
    policy = policy_of(model, how.seed)
    return train(model, examples or EXAMPLES, out, how, policy, progress=False)


def equal(one: SDTPHeads, two: SDTPHeads) -> bool:
    """Bit for bit."""
    other = two.state_dict()
    return all(torch.equal(tensor, other[name]) for name, tensor in one.state_dict().items())


@pytest.mark.parametrize("family", ["llama", "qwen3", "mistral-window", "gpt_neox"])
def test_both_phases_change_every_head(family, tmp_path):
    """And what is written is what is returned, in eval mode."""
    model = model_of(family)
    before = policy_of(model).heads
    heads = trained(tmp_path, model, distillation=0.5)
    assert before is not None and not heads.training
    after = heads.state_dict()
    same = [n for n, t in before.state_dict().items() if torch.equal(t, after[n])]
    assert not same and all(bool(t.isfinite().all()) for t in after.values())
    assert equal(SDTPHeads.from_pretrained(tmp_path), heads)


@pytest.mark.parametrize("attached", [True, False])
@pytest.mark.parametrize("family", ["llama", "gpt_neox"])
def test_the_model_stays_as_it_is(family, attached, tmp_path):
    """Weights, flags, attention implementation, hooks; also in training mode, half frozen."""
    model = model_of(family).train()
    model.base_model.layers[2].eval()
    list(model.parameters())[3].requires_grad_(False)
    if attached:
        kvprune.attach(model)

    def state() -> list[Any]:
        return [
            [(n, p.requires_grad, p.grad, p._version) for n, p in model.named_parameters()],
            [m.training for m in model.modules()],
            [(len(m._forward_pre_hooks), len(m._forward_hooks)) for m in model.modules()],
            model.config._attn_implementation,
            sorted(model.__dict__),
            "_kvprune" in model.base_model.__dict__,
        ]

    before, weights = state(), {n: t.clone() for n, t in model.state_dict().items()}
    trained(tmp_path, model, target="gradient")
    assert state() == before
    assert all(torch.equal(t, weights[n]) for n, t in model.state_dict().items())


def test_the_model_is_as_before_after_a_failure(tmp_path, monkeypatch):
    """An error in the middle leaves no hook and no flag behind."""
    model = model_of().train()
    monkeypatch.setattr(trainer.F, "cross_entropy", _bomb(0))
    with pytest.raises(Killed):
        trained(tmp_path, model)
    assert all(m.training for m in model.modules())
    assert all(p.requires_grad for p in model.parameters())
    assert not any(m._forward_pre_hooks for m in model.modules())
    assert model.config._attn_implementation == "sdpa"


class Killed(BaseException):
    """Stands for a signal: nothing catches it."""


def _bomb(after: int, work: Callable[..., Any] = lambda *a, **k: None) -> Callable[..., Any]:
    calls = itertools.count()

    def call(*args: Any, **kwargs: Any) -> Any:
        if next(calls) >= after:
            raise Killed
        return work(*args, **kwargs)

    return call


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> SDTPHeads:
    """Heads of a training that nobody interrupted."""
    return trained(tmp_path_factory.mktemp("whole"))


@pytest.mark.parametrize(
    ("steps", "every"), [(0, 1), (1, 1), (2, 1), (3, 1), (4, 1), (5, 1), (2, 4), (5, 4)]
)
def test_killed_in_a_step_it_goes_on_to_the_same_heads(steps, every, whole, tmp_path, monkeypatch):
    """Wherever it stood, however old the checkpoint is."""
    with monkeypatch.context() as patch:
        patch.setattr(torch.optim.AdamW, "step", _bomb(steps, torch.optim.AdamW.step))
        with pytest.raises(Killed):
            trained(tmp_path, checkpoint_every=every)
    # There is one before each measurement, too: after every second step.
    assert (tmp_path / CHECKPOINT).exists() == (steps >= min(every, 2))
    assert not (tmp_path / "model.safetensors").exists()
    heads = trained(tmp_path, checkpoint_every=every)
    assert equal(heads, whole)
    phases = json.loads((tmp_path / "training.json").read_text())["metrics"]
    assert [(m["phase"], m["step"]) for m in phases] == [
        ("marking", 2),
        ("marking", 4),
        ("pruning", 2),
    ]


@pytest.mark.parametrize("place", ["trainer", "heads", "marks"])
@pytest.mark.parametrize("writes", [0, 1, 3])
def test_killed_while_writing_it_goes_on_to_the_same_heads(
    writes, place, whole, tmp_path, monkeypatch
):
    """A checkpoint, the heads, a mark: what was there before is still whole."""
    name = f"kvprune.policies.sdtp.{place}.write_whole"
    writes = 0 if place == "heads" else writes
    with monkeypatch.context() as patch:
        patch.setattr(name, _bomb(writes, kvprune.files.write_whole))
        with pytest.raises(Killed):
            trained(tmp_path)
    assert equal(trained(tmp_path), whole)


@pytest.mark.parametrize("measured", range(6))
def test_killed_while_measuring_it_measures_what_is_missing(measured, whole, tmp_path, monkeypatch):
    """Two examples are held out: three times they are measured, the last time with heads there."""
    trained(tmp_path / "whole")
    expected = json.loads((tmp_path / "whole" / "training.json").read_text())
    agreement = trainer.Trainer._agreement
    with monkeypatch.context() as patch:
        patch.setattr(trainer.Trainer, "_agreement", _bomb(measured, agreement))
        with pytest.raises(Killed):
            trained(tmp_path)
    written = (tmp_path / "model.safetensors").exists()
    assert written == (measured >= 4)
    if written:
        assert equal(SDTPHeads.from_pretrained(tmp_path), whole)
        account = json.loads((tmp_path / "training.json").read_text())
        assert account == {**expected, "complete": False, "metrics": expected["metrics"][:2]}
    steps, step = list[int](), torch.optim.AdamW.step
    with monkeypatch.context() as patch:
        patch.setattr(torch.optim.AdamW, "step", lambda *a: (steps.append(1), step(*a))[1])
        heads = trained(tmp_path)
    # No step is trained again, though checkpoints are rare.
    assert len(steps) == {0: 4, 1: 2, 2: 0}[measured // 2]
    assert equal(heads, whole) and equal(SDTPHeads.from_pretrained(tmp_path), whole)
    assert json.loads((tmp_path / "training.json").read_text()) == expected
    assert expected["complete"] is True


def test_a_bar_is_there_to_the_very_end(tmp_path, capsys, monkeypatch):
    """Also while the last figures are measured, with what is already written."""
    shown = list[str]()
    agreement = trainer.Trainer._agreement

    def slow(self: Any, mark: Any) -> Any:
        shown.append(capsys.readouterr().err)
        return agreement(self, mark)

    class Eager(trainer.tqdm):
        """Draws every step, however soon it comes."""

        def __init__(self, *given: Any, **more: Any) -> None:
            super().__init__(*given, mininterval=0, miniters=1, **more)

    monkeypatch.setattr(trainer.Trainer, "_agreement", slow)
    monkeypatch.setattr(trainer, "tqdm", Eager)
    model = model_of()
    train(model, EXAMPLES, tmp_path, Training(**BRIEF), policy_of(model))
    assert len(shown) == 6 and all("measuring" in text for text in shown)
    assert "50%" in shown[-1] and "1/2" in shown[-1]
    assert f"{tmp_path}: the heads are written; measuring them" in shown[4]
    assert not any("the heads are written" in text for text in shown[:4])


def test_killed_again_and_again(whole, tmp_path, monkeypatch):
    """One step at a time."""
    for _ in range(5):
        with monkeypatch.context() as patch:
            patch.setattr(torch.optim.AdamW, "step", _bomb(1, torch.optim.AdamW.step))
            with pytest.raises(Killed):
                trained(tmp_path)
    assert equal(trained(tmp_path), whole)


def test_a_training_that_is_done_is_not_done_again(whole, tmp_path, monkeypatch):
    """The heads come from the checkpoint."""
    trained(tmp_path)
    monkeypatch.setattr(torch.optim.AdamW, "step", _bomb(0))
    assert equal(trained(tmp_path), whole)


def test_a_training_that_is_done_marks_nothing(tmp_path):
    """Even if the marks are gone: a big folder may be removed."""
    model, how, more = model_of(), Training(**BRIEF), {"keep_hidden": True, "progress": False}
    first = train(model, EXAMPLES, tmp_path, how, policy_of(model), **more)
    shutil.rmtree(tmp_path / "marks")
    assert equal(train(model, EXAMPLES, tmp_path, how, policy_of(model), **more), first)
    assert not list((tmp_path / "marks").iterdir())


@pytest.mark.parametrize("layers", [{1}, range(2), [3]])
def test_only_the_stages_of_the_policy_s_layers_are_trained(layers, tmp_path):
    """Whatever collection names them."""
    model = model_of()
    policy = policy_of(model, layers=layers)
    assert policy.heads is not None
    heads = train(model, EXAMPLES, tmp_path, Training(**BRIEF), policy, progress=False)
    same = [
        torch.equal(one.down.weight, two.down.weight)
        for one, two in zip(heads.stages, policy.heads.stages, strict=True)
    ]
    assert same == [1 not in layers, 3 not in layers]


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_the_callers_mode_has_no_say(mode, whole, tmp_path):
    """Gradients are on inside."""
    model = model_of()
    with mode():
        heads = train(
            model, EXAMPLES, tmp_path, Training(**BRIEF), policy_of(model), progress=False
        )
    assert equal(heads, whole)


def test_torch_s_own_generator_has_no_say(whole, tmp_path):
    """Nor is it moved."""
    torch.manual_seed(123)
    state = torch.get_rng_state()
    assert equal(trained(tmp_path), whole)
    assert torch.equal(torch.get_rng_state(), state)


def test_another_seed_is_another_training(whole, tmp_path):
    """Of the order and the noise, too: the initial weights are the same here."""
    model = model_of()
    how = Training(**BRIEF, seed=1)
    heads = train(model, EXAMPLES, tmp_path, how, policy_of(model, seed=0), progress=False)
    assert not equal(heads, whole)


def terms_of(monkeypatch: pytest.MonkeyPatch) -> dict[str, set[str]]:
    """The losses of each phase, filled while heads are trained."""
    found: dict[str, set[str]] = {}
    check = trainer.Trainer._check_finite

    def note(self: Any, said: dict[str, float], phase: Any, *place: int) -> None:
        found.setdefault(phase.name, set()).update(set(said) - {"gradient"})
        check(self, said, phase, *place)

    monkeypatch.setattr(trainer.Trainer, "_check_finite", note)
    return found


WEIGHTS = {"listwise": 0.5, "ranking": 1.0, "mse": 0.3, "cross_entropy": 1.0, "distillation": 0.5}


@pytest.mark.parametrize(
    "off", [*WEIGHTS, None, "listwise ranking mse", "cross_entropy distillation"]
)
def test_each_term_can_be_switched_off(off, tmp_path, monkeypatch):
    """It is not computed then; a phase with nothing to learn from is left out."""
    found = terms_of(monkeypatch)
    left = {n: w for n, w in WEIGHTS.items() if n not in (off or "").split()}
    trained(tmp_path, **dict.fromkeys(WEIGHTS, 0.0) | left)
    marking = {"listwise", "ranking", "mse"} & set(left)
    expected = {"marking": marking, "pruning": set(left)}
    assert found == {phase: terms for phase, terms in expected.items() if terms}


@pytest.mark.parametrize("off", WEIGHTS)
def test_each_term_has_a_say_in_the_heads(off, tmp_path):
    """Without it they differ; in what only one phase has, all else being equal."""
    both = [trained(tmp_path / str(w), **WEIGHTS | {off: w}) for w in (0.0, WEIGHTS[off])]
    assert not equal(*both)


@pytest.mark.parametrize(
    "other",
    [
        {"target": "gradient"},
        {"temperature": 0.0},
        {"pairs": None},
        {"pruning_marks": 0.9},
    ],
    ids=str,
)
def test_each_option_has_a_say_in_the_heads(other, whole, tmp_path):
    """What is learned, and how."""
    assert not equal(trained(tmp_path, **other), whole)


def test_the_sign_of_a_gradient_has_a_say_in_the_heads(tmp_path):
    """All else being equal."""
    how = {"target": "gradient", "listwise": 0.0}
    both = [trained(tmp_path / str(signed), signed=signed, **how) for signed in (False, True)]
    assert not equal(*both)


@pytest.mark.parametrize("other", [{"listwise": 0.0}, {"target": "gradient"}], ids=str)
def test_what_has_no_sign_is_not_signed(other):
    """Removal is of no sign, and the listwise loss takes none."""
    with pytest.raises(KVPruneError, match=r"signed=True .* expected target='gradient' and list"):
        Training(**{**BRIEF, **other, "signed": True})


def test_weights_that_have_no_gradient(tmp_path):
    """Those that were made in inference mode."""
    policy = policy_of(model_of())
    with torch.inference_mode():
        model = model_of()
    with pytest.raises(KVPruneError, match=r"made in torch.inference_mode\(\).*: load it outside"):
        train(model, EXAMPLES, tmp_path, Training(**BRIEF), policy, progress=False)
    assert not list(tmp_path.iterdir())


def test_recall_is_of_what_is_salient(tmp_path, monkeypatch):
    """Where less is than a stage keeps, and all of that is protected, nothing can be missed."""

    def one_token(model: Any, layers: Any, ids: Tensor, size: int, cache: Any) -> Any:
        saliency = torch.zeros(len(layers), size)
        saliency[:, -1] = 1.0
        return targets.hidden_states(model, layers, ids), saliency

    monkeypatch.setitem(targets.TARGETS, "removal", one_token)
    trained(tmp_path, pruning_epochs=0)
    metrics = json.loads((tmp_path / "training.json").read_text())["metrics"]
    assert all(m["recall"] == [1.0, 1.0] for m in metrics)


def test_a_process_has_one_precision(tmp_path):
    """It is accelerate's, and global: another one is refused, the same one and none are fine."""
    for name, mixed in (("first", None), ("second", "no"), ("third", None)):
        heads = trained(tmp_path / name, mixed_precision=mixed)
        assert all(bool(p.isfinite().all()) for p in heads.parameters())
    with pytest.raises(KVPruneError, match="mixed_precision='bf16'"):
        trained(tmp_path / "fourth", mixed_precision="bf16")


def test_held_out_examples_are_never_trained_on(tmp_path, monkeypatch):
    """Each other one is, once an epoch; duplicates count as one example."""
    seen: list[Example] = []
    terms = trainer.Trainer._terms

    def note(self: Any, phase: Any, example: Example) -> dict[str, Tensor]:
        seen.append(example)
        return terms(self, phase, example)

    monkeypatch.setattr(trainer.Trainer, "_terms", note)
    trained(tmp_path, examples=EXAMPLES + EXAMPLES[:3])
    assert len(seen) == 3 * 4
    for epoch in (seen[:4], seen[4:8], seen[8:]):
        assert len(set(epoch)) == 4 and set(epoch) == set(seen)
    account = json.loads((tmp_path / "training.json").read_text())
    assert account["split"] == {"training": 4, "held_out": 2}


def test_the_account_says_what_was_done(tmp_path):
    """Enough to do it again: options, schedule, model, examples, versions; and what came of it."""
    model = model_of()
    how, note = Training(**{**BRIEF, "distillation": 0.5}), {"data": "made up"}
    heads = train(model, EXAMPLES, tmp_path, how, policy_of(model), progress=False, note=note)
    account = json.loads((tmp_path / "training.json").read_text())
    assert account["data"] == "made up"
    assert account["options"]["distillation"] == 0.5 and account["options"]["pairs"] == 40
    assert account["policy"]["sinks"] == 2 and account["policy"]["keep"] == 0.6
    assert account["heads"] == json.loads(json.dumps(heads.configuration))
    assert account["model"] == account["heads"]["fingerprint"]
    assert account["versions"]["torch"] == torch.__version__
    for metric in account["metrics"]:
        for name, low in (("spearman", -1), ("kendall", -1), ("recall", 0)):
            assert len(metric[name]) == 2 and all(low <= v <= 1 for v in metric[name])
        assert metric["pruned_nll"] > 0


def test_marks_are_shared_between_trainings(tmp_path, monkeypatch):
    """One folder for all: the second marks nothing."""
    model, how = model_of(), Training(**BRIEF)
    more: dict[str, Any] = {"marks": tmp_path / "m", "progress": False}
    train(model, EXAMPLES, tmp_path / "a", how, policy_of(model), **more)
    assert len(list((tmp_path / "m").iterdir())) == 6 and not (tmp_path / "a" / "marks").exists()
    monkeypatch.setattr("kvprune.policies.sdtp.targets.biased", _bomb(0))
    train(model, EXAMPLES, tmp_path / "b", how, policy_of(model), **more)


def test_kept_hidden_states_change_nothing(whole, tmp_path):
    """But what is on disk."""
    model = model_of()
    for place in ("a", "b"):
        heads = train(
            model,
            EXAMPLES,
            tmp_path / place,
            Training(**BRIEF),
            policy_of(model),
            marks=tmp_path / "m",
            keep_hidden=True,
            progress=False,
        )
        assert equal(heads, whole)


def test_what_is_held_out_shares_no_text_with_what_is_trained_on(tmp_path):
    """The last ones are, with all that begin as they do, wherever those stand."""
    ends = [tuple(row) for row in prompt(4, COMPLETION, seed=9).tolist()]
    first, *rest = sharing([Example(EXAMPLES[0].prompt + end, end) for end in ends])
    trained(tmp_path, examples=[first, *EXAMPLES[1:4], *rest], validation=0.1)
    account = json.loads((tmp_path / "training.json").read_text())
    assert account["split"] == {"training": 3, "held_out": 4}


def test_it_measures_by_examples_that_are_given(tmp_path, monkeypatch):
    """And as often as it is asked to, besides each epoch's end."""
    model, measured = model_of(), list[Example]()
    marked = trainer.Trainer._agreement

    def note(self: Any, mark: Any) -> Any:
        measured.append(mark)
        return marked(self, mark)

    monkeypatch.setattr(trainer.Trainer, "_agreement", note)
    how = Training(**{**BRIEF, "batch": 1, "pruning_epochs": 0, "evaluate_every": 3})
    more: dict[str, Any] = {"held_out": EXAMPLES[4:], "progress": False}
    train(model, EXAMPLES[:4], tmp_path, how, policy_of(model), **more)
    account = json.loads((tmp_path / "training.json").read_text())
    assert account["split"] == {"training": 4, "held_out": 2}
    assert [m["step"] for m in account["metrics"]] == [3, 4, 6, 8] and len(measured) == 8


def test_heads_can_learn_one_example_by_heart(tmp_path):
    """Both stages then order its tokens as its gradient times input does."""
    model, sinks = model_of(), 2
    how = Training(
        marking_epochs=150,
        pruning_epochs=0,
        target="gradient",
        listwise=0.0,
        ranking=1.0,
        mse=0.3,
        learning_rate=1e-2,
        checkpoint_every=1000,
        validation=0.5,
    )
    # Nothing is pruned, so all tokens come to all heads.
    policy = replace(policy_of(model), keep=1.0)
    heads = train(model, EXAMPLES[:2], tmp_path, how, policy, progress=False)
    best = []
    for example in EXAMPLES[:2]:
        ids = torch.tensor([example.prompt + example.completion])
        truth = saliency(model, ids, heads.layers)[0, :, sinks:PROMPT]
        states = model(ids, output_hidden_states=True).hidden_states
        columns = torch.arange(PROMPT)[None]
        scores = [heads(states[i][:, :PROMPT], columns, s) for s, i in enumerate(heads.layers)]
        pairs = zip(scores, truth, strict=True)
        best.append([spearmanr(s[0, sinks:].detach(), t).statistic for s, t in pairs])
    # One of the two is held out.
    assert max(min(stages) for stages in best) > 0.8 > min(min(stages) for stages in best)


def test_what_is_always_kept_teaches_nothing(tmp_path):
    """Not even a gradient: heads stay as they are, up to the decay of their weights."""
    model = model_of()
    policy = policy_of(model, local=1.0)
    how = Training(**{**BRIEF, "pruning_epochs": 0}, weight_decay=0.0)
    heads = train(model, EXAMPLES, tmp_path, how, policy, progress=False)
    assert policy.heads is not None and equal(heads, policy.heads)


def test_pruning_alone_lowers_the_loss_of_the_pruned_model(tmp_path):
    """Of what it is trained on: the second phase sends a gradient that helps."""
    model = model_of()
    said: list[float] = []
    how = Training(
        marking_epochs=0,
        pruning_epochs=60,
        listwise=0.0,
        ranking=0.0,
        mse=0.0,
        distillation=0.0,
        temperature=0.5,
        pruning_learning_rate=1e-2,
        checkpoint_every=1000,
        validation=0.5,
    )
    check = trainer.Trainer._check_finite
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            trainer.Trainer,
            "_check_finite",
            lambda self, terms, *a: said.append(terms["cross_entropy"]) or check(self, terms, *a),
        )
        train(model, EXAMPLES[:2], tmp_path, how, policy_of(model), progress=False)
    assert len(said) == 60 and sum(said[-15:]) < sum(said[:15])
