"""Trainings that cannot be, and disks that are full."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModel, AutoModelForSequenceClassification

from kvprune import KVPruneError
from kvprune.files import write_text, write_whole
from kvprune.policies import H2O, SDTP, SDTPHeads
from kvprune.policies.sdtp import Example, Training, train, untrained
from kvprune.policies.sdtp.trainer import CHECKPOINT
from kvprune.policies.sdtp.training import LOCK

from ..support.models import fresh_model, prompt
from .checks import INF, NAN

EXAMPLES = [Example(tuple(r[:20]), tuple(r[20:])) for r in prompt(5, 23, seed=8).tolist()]
BRIEF: dict[str, Any] = {
    "marking_epochs": 2,
    "pruning_epochs": 1,
    "distillation": 0.0,
    "temperature": 1.0,
    "batch": 2,
    "validation": 0.2,
    "checkpoint_every": 1,
}


@pytest.fixture(autouse=True)
def _with_gradients(_without_gradients) -> Iterator[None]:
    with torch.enable_grad():
        yield


def model_of(**more: Any) -> Any:
    """A float32 model that nobody shares."""
    return fresh_model(dtype=torch.float32, **more)


def attempt(
    out: Path,
    examples: Any = EXAMPLES,
    model: Any = None,
    policy: Any = None,
    seed_of_heads: int = 0,
    **options: Any,
) -> Any:
    """A brief training; from heads of a seed."""
    model = model or model_of()
    heads = untrained(model, seed_of_heads, first_layer=1, every=2)
    kwargs = {"keep": 0.6, "sinks": 2, "local": 2, "min_tokens": 6, **(policy or {})}
    how = Training(**{**BRIEF, **options})
    return train(model, examples, out, how, SDTP(heads, **kwargs), progress=False)


# Numbers and options.

NUMBERS = [
    "marking_epochs",
    "pruning_epochs",
    "listwise",
    "ranking",
    "mse",
    "cross_entropy",
    "distillation",
    "temperature",
    "learning_rate",
    "pruning_learning_rate",
    "weight_decay",
    "pruning_marks",
    "batch",
    "validation",
    "seed",
    "checkpoint_every",
]


@pytest.mark.parametrize("value", [-1, -0.1, NAN, INF, -INF, True, "4", None, [1]], ids=repr)
@pytest.mark.parametrize("name", NUMBERS)
def test_numbers_out_of_range(name, value):
    """The error names the argument, its value, and the least that it can be."""
    with pytest.raises(KVPruneError) as caught:
        Training(**{name: value})
    assert str(caught.value).startswith(f"Training: {name}={value!r}: expected ")
    assert "of at least" in str(caught.value)


@pytest.mark.parametrize("name", ["batch", "checkpoint_every"])
def test_counts_of_which_there_must_be_one(name):
    """0 examples in a step are no step."""
    with pytest.raises(KVPruneError, match=rf"Training: {name}=0: expected .* at least 1"):
        Training(**{name: 0})


@pytest.mark.parametrize("name", ["marking_epochs", "pruning_epochs", "batch", "checkpoint_every"])
def test_counts_are_whole(name):
    """Half an epoch is none."""
    with pytest.raises(KVPruneError, match=f"Training: {name}=1.5: expected"):
        Training(**{name: 1.5})


@pytest.mark.parametrize("value", [0, -3, 2.5, True, "many"], ids=repr)
@pytest.mark.parametrize("name", ["pairs", "evaluate_every"])
def test_counts_that_may_be_absent(name, value):
    """A positive count, or None."""
    with pytest.raises(KVPruneError, match=rf"Training: {name}=.*expected"):
        Training(**{name: value})


@pytest.mark.parametrize("target", ["gradients", "", None, 3])
def test_targets_that_are_none(target):
    """The error lists what there is."""
    with pytest.raises(KVPruneError, match=r"target=.*expected one of .*removal.*gradient"):
        Training(target=target)


@pytest.mark.parametrize("mixed", ["fp7", "bfloat16", 16])
def test_precisions_that_accelerate_does_not_know(mixed, tmp_path):
    """An expected error, not one of accelerate's own."""
    with pytest.raises(KVPruneError, match="mixed_precision"):
        attempt(tmp_path, mixed_precision=mixed)


@pytest.mark.parametrize(
    "options",
    [
        {"marking_epochs": 0, "pruning_epochs": 0},
        {"listwise": 0, "cross_entropy": 0, "distillation": 0},
        {"listwise": 0, "pruning_epochs": 0},
        {"marking_epochs": 0, "cross_entropy": 0, "distillation": 0},
    ],
    ids=str,
)
def test_nothing_to_learn_from(options):
    """No phase is left that has both an epoch and a loss."""
    with pytest.raises(KVPruneError, match="nothing to learn from: expected an epoch"):
        Training(**options)


# Examples.


@pytest.mark.parametrize("examples", [[], EXAMPLES[:1], EXAMPLES[:1] * 9])
def test_too_few_examples(examples, tmp_path):
    """One is held out, so two different ones it takes."""
    with pytest.raises(KVPruneError, match=r"at least 2 different examples .*got [01] and"):
        attempt(tmp_path, examples)


@pytest.mark.parametrize(
    ("held_out", "said"),
    [([], "5 and 0, with 0 in both"), (EXAMPLES[:1], "5 and 1, with 1 in both")],
)
def test_held_out_examples_that_measure_nothing(held_out, said, tmp_path):
    """None at all, or ones that are trained on."""
    model = model_of()
    policy = SDTP(untrained(model, first_layer=1), min_tokens=6)
    with pytest.raises(KVPruneError, match=f"others that are held out, got {said}"):
        train(model, EXAMPLES, tmp_path, None, policy, held_out=held_out, progress=False)


@pytest.mark.parametrize("validation", [1, 0.95, 5.0])
def test_a_split_that_leaves_nothing_to_train_on(validation, tmp_path):
    """The error names the share that was asked for."""
    with pytest.raises(KVPruneError, match=f"validation={validation}"):
        attempt(tmp_path, validation=validation)


@pytest.mark.parametrize(
    ("policy", "least"), [({"min_tokens": 21}, 21), ({"sinks": 19}, 21), ({"sinks": 40}, 42)]
)
def test_prompts_that_are_never_pruned(policy, least, tmp_path):
    """Shorter than `min_tokens`, or nothing but sinks."""
    match = rf"prompts of at least {least} tokens.*got 5 of 5 without, the first one of 20 \+ 3"
    with pytest.raises(KVPruneError, match=match):
        attempt(tmp_path, policy=policy)


def test_an_example_without_a_completion(tmp_path):
    """There is nothing that the loss could be over."""
    with pytest.raises(KVPruneError, match=r"got 1 of 6 without, the first one of 20 \+ 0"):
        attempt(tmp_path, [*EXAMPLES, Example(EXAMPLES[0].prompt, ())])


@pytest.mark.parametrize("token", [-1, 10**6])
def test_tokens_of_another_tokenizer(token, tmp_path):
    """Refused before the model looks them up."""
    strange = Example((*EXAMPLES[0].prompt[:-1], token), EXAMPLES[0].completion)
    with pytest.raises(KVPruneError, match=f"expected tokens of 0 to .*, got {token}"):
        attempt(tmp_path, [*EXAMPLES, strange])


@pytest.mark.parametrize("policy", [H2O(), SDTP(), "sdtp"], ids=repr)
def test_a_policy_without_heads(policy, tmp_path):
    """There is nothing to train."""
    with pytest.raises(KVPruneError, match="expected a policy with heads"):
        train(model_of(), EXAMPLES, tmp_path, policy=policy, progress=False)


def test_layers_without_a_stage(tmp_path):
    """Nothing would be pruned, and nothing learned."""
    with pytest.raises(KVPruneError, match=r"layers=\[2\]: none of these has a stage: .*\(1, 3\)"):
        attempt(tmp_path, policy={"layers": [2]})


def test_a_note_that_is_not_json(tmp_path):
    """Told before, not after all the work."""
    with pytest.raises(KVPruneError, match="note: expected what JSON can hold"):
        train(model_of(), EXAMPLES, tmp_path / "out", progress=False, note={"data": tmp_path})
    assert not (tmp_path / "out").exists()


# Models, packages, folders.


@pytest.mark.parametrize("kind", [AutoModel, AutoModelForSequenceClassification])
def test_a_model_that_says_no_words(kind, tmp_path):
    """Told before, not at the first measurement."""
    with pytest.raises(KVPruneError, match=r"a language-model head.*AutoModelForCausalLM"):
        train(kind.from_config(model_of().config), EXAMPLES, tmp_path, progress=False)


def test_a_model_that_is_not_supported(tmp_path):
    """Refused before anything is written."""
    with pytest.raises(KVPruneError, match="PreTrainedModel"):
        train(torch.nn.Linear(2, 2), EXAMPLES, tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("missing", [["accelerate"], ["scipy"], ["accelerate", "scipy"]])
def test_packages_that_are_missing(missing, tmp_path, monkeypatch):
    """The error says how to get them."""
    find = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda n, *a: None if n in missing else find(n, *a)
    )
    match = rf"but {' and '.join(missing)} cannot be imported.*pip install kvprune\[train\]"
    with pytest.raises(KVPruneError, match=match):
        attempt(tmp_path)


def test_folders_that_cannot_be_made(tmp_path):
    """A file is in the way, of the heads or of the marks."""
    (tmp_path / "file").write_text("x")
    for out in (tmp_path / "file", tmp_path / "file" / "out"):
        with pytest.raises(KVPruneError, match=f"{out}: expected a folder that can be written"):
            attempt(out)
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "marks").write_text("x")
    with pytest.raises(KVPruneError, match="marks: expected a folder that can be written"):
        attempt(tmp_path / "out")


# Going on.


def test_a_loss_that_is_not_finite_leaves_the_last_checkpoint(tmp_path):
    """The model got a NaN between two steps, where its fingerprint does not look."""
    model, calls = model_of(), []
    weight = model.model.layers[0].mlp.up_proj.weight
    step = torch.optim.AdamW.step

    def spoil(self: Any, *args: Any) -> Any:
        calls.append(1)
        if len(calls) == 3:
            weight.data[0, 0] = NAN
        return step(self, *args)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.optim.AdamW, "step", spoil)
        with pytest.raises(KVPruneError, match=r"not finite in phase marking.*checkpoint in "):
            attempt(tmp_path, model=model, checkpoint_every=2)
    state = torch.load(tmp_path / CHECKPOINT, weights_only=True)
    assert state["step"] == 2 and len(calls) == 3
    assert all(bool(t.isfinite().all()) for t in state["heads"].values())
    assert not (tmp_path / "model.safetensors").exists()
    attempt(tmp_path, model=model_of(), checkpoint_every=2)


@pytest.mark.parametrize("phase", ["marking", "pruning"])
def test_a_model_of_nan(phase, tmp_path):
    """From the first step on: no checkpoint, no heads."""
    model = model_of()
    model.model.layers[0].mlp.up_proj.weight.data[0, 0] = NAN
    only = {"marking_epochs": 0} if phase == "pruning" else {"pruning_epochs": 0}
    with pytest.raises(KVPruneError, match=r"NaN|nan|not finite"):
        attempt(tmp_path, model=model, **only)
    assert {p.name for p in tmp_path.iterdir()} <= {"marks", LOCK}


def test_marks_of_nan_are_not_kept(tmp_path):
    """The fingerprint may not see the NaN; the model as it should be is marked anew then."""
    model = model_of()
    model.model.layers[0].mlp.up_proj.weight.data[0, 0] = NAN
    with pytest.raises(KVPruneError):
        attempt(tmp_path, model=model, pruning_epochs=0)
    attempt(tmp_path, model=model_of(), pruning_epochs=0)


@pytest.mark.parametrize(
    ("other", "name"),
    [
        ({"model": {"hidden_size": 64}}, "model and weights"),
        ({"model": {"initializer_range": 0.1}}, "model and weights"),
        ({"mse": 0.7}, "options"),
        ({"seed": 1}, "options"),
        ({"seed_of_heads": 1}, "initial_heads"),
        ({"policy": {"keep": 0.5}}, "policy"),
        ({"examples": EXAMPLES[1:]}, "examples"),
        ({"validation": 0.5}, "options and examples"),
    ],
    ids=str,
)
def test_a_checkpoint_of_another_training(other, name, tmp_path):
    """The error says in what it differs; the checkpoint stays as it is."""
    attempt(tmp_path, marking_epochs=1, pruning_epochs=0)
    before = (tmp_path / CHECKPOINT).read_bytes()
    if "model" in other:
        other = {"model": model_of(**other["model"])}
    with pytest.raises(KVPruneError, match=rf"{CHECKPOINT}: .*another {name}.*remove the file"):
        attempt(tmp_path, **{"marking_epochs": 1, "pruning_epochs": 0, **other})
    assert (tmp_path / CHECKPOINT).read_bytes() == before


def _cut(path: Path) -> None:
    attempt(path.parent, marking_epochs=1, pruning_epochs=0)
    path.write_bytes(path.read_bytes()[:-100])


@pytest.mark.parametrize(
    "write",
    [
        lambda path: path.write_bytes(b""),
        lambda path: path.write_text("not a checkpoint\n" * 99),
        lambda path: path.mkdir(),
        lambda path: torch.save([1, 2], path),
        lambda path: torch.save({"heads": {}}, path),
        lambda path: torch.save({"identity": "not JSON"}, path),
        lambda path: torch.save({"identity": "[]"}, path),
        lambda path: torch.save({"identity": Path("/")}, path),
        _cut,
    ],
)
def test_a_checkpoint_that_is_none(write, tmp_path):
    """The error names the file, and what to do."""
    write(tmp_path / CHECKPOINT)
    expected = rf"(?s){CHECKPOINT}: expected a checkpoint.*remove it, or"
    with pytest.raises(KVPruneError, match=expected):
        attempt(tmp_path, marking_epochs=1, pruning_epochs=0)


# Files that are whole or not there.


def names(folder: Path) -> set[str]:
    """What lies in a folder, hidden files too."""
    return {p.name for p in folder.iterdir()}


@pytest.mark.parametrize("error", [OSError("full"), RuntimeError("odd"), KeyboardInterrupt()])
def test_a_write_that_fails_leaves_the_old_file(error, tmp_path):
    """Nothing else is left behind; a signal stays a signal."""

    def fail(scratch: Path) -> None:
        scratch.write_text("half of it")
        raise error

    path = tmp_path / "file"
    write_text(path, "old")
    expected = KVPruneError if isinstance(error, Exception) else KeyboardInterrupt
    with pytest.raises(expected):
        write_whole(path, fail)
    assert path.read_text() == "old" and names(tmp_path) == {"file"}


def test_places_that_cannot_be_written(tmp_path):
    """No such folder, a file for a folder, a folder for a file."""
    (tmp_path / "file").write_text("old")
    (tmp_path / "folder").mkdir()
    for path in ("nowhere/file", "file/file", "folder"):
        with pytest.raises(KVPruneError, match=rf"{path}: expected to write this file, and could"):
            write_text(tmp_path / path, "new")
    assert names(tmp_path) == {"file", "folder"} and (tmp_path / "file").read_text() == "old"


FULL = """
import resource, signal, sys
from pathlib import Path
from kvprune import KVPruneError
from kvprune.files import write_text
from kvprune.policies import SDTPHeads

signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
folder, fresh = Path(sys.argv[1]), Path(sys.argv[2])
heads = SDTPHeads(64, 9)
SDTPHeads(64, 9, keep=0.5).save_pretrained(folder)
write_text(folder / "text", "old")
resource.setrlimit(resource.RLIMIT_FSIZE, (2000, 2000))
for write in (
    lambda: heads.save_pretrained(folder),
    lambda: heads.save_pretrained(fresh),
    lambda: write_text(folder / "text", "new" * 1000),
):
    try:
        write()
    except KVPruneError as error:
        print(error)
"""


@pytest.fixture(scope="module")
def full_disk(tmp_path_factory) -> tuple[Path, Path, list[str]]:
    """A folder with heads, an empty one, and what was said of writing to both in vain.

    A limit on the size of files stands for the disk.
    """
    folders = [tmp_path_factory.mktemp(name) for name in ("old", "fresh")]
    command = [sys.executable, "-B", "-c", FULL, *map(str, folders)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return folders[0], folders[1], done.stdout.strip().splitlines()


def test_a_full_disk_leaves_heads_and_texts_as_they_were(full_disk):
    """An expected error each time; no scratch file is left."""
    old, fresh, said = full_disk
    assert len(said) == 3 and all("Make room on the disk" in line for line in said)
    assert {"model.safetensors", "text"} <= names(old)
    assert names(old) <= {"model.safetensors", "config.json", "README.md", "text"}
    assert names(fresh) <= {"config.json", "README.md"}
    assert (old / "text").read_text() == "old"
    assert SDTPHeads.from_pretrained(old).keep == 0.5


def test_a_full_disk_leaves_the_configuration_of_heads(full_disk):
    """As the error says: what was there before is unchanged."""
    old, _, _ = full_disk
    assert "config.json" in names(old)


def test_files_have_the_permissions_that_other_files_have(tmp_path):
    """Whoever may read what one writes by hand may read heads, too."""
    (tmp_path / "by hand").write_text("x")
    write_text(tmp_path / "ours", "x")
    assert (tmp_path / "ours").stat().st_mode == (tmp_path / "by hand").stat().st_mode
