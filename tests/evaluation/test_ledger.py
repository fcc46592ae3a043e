"""A results file: what is not mixed in it, and what is taken for damaged."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest
import torch
from peft import LoraConfig
from torch import nn

from kvprune import KVPruneError
from kvprune.evaluation.compare.plan import Plan, digest_of
from kvprune.evaluation.ledger.identity import code_digest
from kvprune.evaluation.ledger.ledger import FORMAT, NAME, opened, read
from kvprune.evaluation.report.console import show
from kvprune.evaluation.report.rows import rows_of
from kvprune.evaluation.report.summary import labels, tables
from kvprune.models.fingerprint import describe, model_digest
from kvprune.policies import H2O

from ..support import fake_tasks
from ..support.fake_tasks import Echo
from ..support.models import fresh_model
from .test_compare import FAILING, folder, lines, no_report, refused, small
from .test_explain import SIZE, run
from .test_tasks_own import GOOD, written

__all__ = ["folder", "no_report"]
ROOT = Path(__file__).parents[2]


# What is not mixed.


@dataclass(frozen=True)
class Floored(Echo):
    """Asks the same, and asks more of dense."""

    floor: ClassVar[float | None] = 0.5


def test_results_scored_in_another_way_are_refused(folder, tmp_path):
    """A file of one's own that says otherwise, or a task whose floor is another."""
    path = written(tmp_path, GOOD, GOOD)
    small(folder, out=tmp_path / "own", tasks=[path], contexts=[200], samples=1)
    written(tmp_path, *[{**GOOD, "score": "likelihood"}] * 2)
    asked: dict[str, Any] = {"tasks": [path], "contexts": [200], "samples": 2}
    refused(folder, "scored as before, by recall", out=tmp_path / "own", **asked)
    small(folder, out=tmp_path / "echo")
    refused(folder, "a floor of 0.25, got .* 0.5", out=tmp_path / "echo", tasks=[Floored()])
    (sample,) = Plan([], [Echo()], [20], [], 1, 0).drawn(_Spelled())["echo", 20]
    assert digest_of(sample, "recall") != digest_of(sample, "nats a token")


class _Spelled:
    """A tokenizer: each character is a token."""

    def encode(self, text: str, add_special_tokens: bool) -> list[int]:
        """As it stands."""
        return list(map(ord, text))


BASE = "from kvprune.policies import H2O\nclass Base(H2O):\n    pass\n"
MINE = "from base_of_mine import Base\nclass Mine(Base):\n    pass\n"


@pytest.mark.parametrize("edited", ["mine_here", "base_of_mine"])
def test_results_of_code_that_was_edited_are_refused(folder, tmp_path, monkeypatch, edited):
    """Of one's own policy, and of what it inherits; the same code goes on."""
    monkeypatch.syspath_prepend(tmp_path)
    for name, text in {"base_of_mine": BASE, "mine_here": MINE}.items():
        (tmp_path / f"{name}.py").write_text(text)
        monkeypatch.delitem(sys.modules, name, raising=False)
    out, policies = tmp_path / "out", ["mine_here:Mine", "h2o"]
    small(folder, policies=policies, out=out, samples=1)
    small(folder, policies=policies, out=out, samples=2)
    with (tmp_path / f"{edited}.py").open("a") as file:
        file.write("# Another way.\n")
    refused(folder, "same code, and the file that mine_here:Mine", policies=policies, out=out)
    small(folder, policies=["h2o"], out=out)


TYPED = """
class Typed(H2O):
    most = 3

    @property
    def more(self):
        return [x in {"a", "b"} for x in range(4)]

    def rank_slots(self, slots):
        return super().rank_slots(slots)
"""


def typed(text: str) -> str:
    """The digest of a class that was typed in."""
    names: dict[str, Any] = {"H2O": H2O, "__name__": "nowhere"}
    exec(text, names)
    return code_digest([names["Typed"]()])


CHANGES = [
    ("most = 3", "most = 4"),
    ("range(4)", "range(5)"),
    ("super().rank_slots(slots)", "None"),
    ('"b"', '"c"'),
]


@pytest.mark.parametrize("change", CHANGES, ids=str)
def test_code_that_was_typed_in_has_a_digest(change):
    """As in a notebook: what it does counts, and not where it stands."""
    assert typed(TYPED) == typed("\n\n" + TYPED) != typed(TYPED.replace(*change))


def test_code_that_was_typed_in_has_one_digest_in_all_processes():
    """Sets and strings have another order in each."""
    program = "from tests.evaluation.test_ledger import TYPED, typed; print(typed(TYPED))"
    for seed in ("1", "2"):
        done = subprocess.run(
            [sys.executable, "-c", program],
            env={**os.environ, "PYTHONHASHSEED": seed},
            capture_output=True,
            text=True,
            check=True,
        )
        assert done.stdout.strip() == typed(TYPED)


@pytest.mark.parametrize("what", ["a buffer", "another adapter", "no adapter"])
def test_models_that_differ_in_more_than_parameters(what):
    """Buffers that are saved, and which of PEFT's adapters are in use."""
    model: Any = fresh_model(dtype=torch.float32)
    model.model.register_buffer("bias", torch.zeros(3))
    model.model.register_buffer("seen", torch.zeros(3), persistent=False)
    if what != "a buffer":
        for name in ("one", "two"):
            try:
                model.add_adapter(LoraConfig(r=2, target_modules=["q_proj"]), adapter_name=name)
            except ValueError as error:
                # transformers 5.24 asks for PEFT 0.22 here, which its registry does not have yet.
                if "version of PEFT" not in str(error):
                    raise
                pytest.skip(str(error))
        model.set_adapter("one")
    before = model_digest(model)
    model.model.seen += 1
    assert model_digest(model) == before
    if what == "a buffer":
        model.model.bias += 1
    elif what == "another adapter":
        model.set_adapter("two")
    else:
        model.disable_adapters()
    assert model_digest(model) != before


def test_another_spelling_is_the_same_cell(folder, tmp_path):
    """In the report and its legend too, as it was first called."""
    small(folder, policies=["h2o"], out=tmp_path, samples=1)
    found = small(folder, policies=["H2O()"], out=tmp_path, samples=3)
    (table,) = tables(found.results)
    assert [(r.cell.label, r.samples) for r in table.rows if not r.is_line] == [("h2o", 3)]
    assert labels(found.results) == ["h2o"] == [r["label"] for r in found.rows[2:]]
    assert read(tmp_path) == found.results


@pytest.mark.parametrize("what", ["a weight", "the head", "eos"])
def test_results_of_another_model_are_refused(folder, tmp_path, what):
    """Whatever differs: `fingerprint.describe` looks at some weights of each parameter alone."""
    small(folder, out=tmp_path / "out")
    other = shutil.copytree(folder, tmp_path / "other")
    model: Any = fresh_model(vocab_size=SIZE, dtype=torch.float32)
    before = describe(model.model)["digest"]
    with torch.no_grad():
        if what == "a weight":
            model.model.layers[1].mlp.down_proj.weight[0, 1] += 1.0
        if what == "the head":
            model.lm_head.weight[0, 1] += 1.0
    if what == "eos":
        model.generation_config.eos_token_id = [1, 2]
    assert describe(model.model)["digest"] == before
    model.save_pretrained(other)
    refused(other, "another: digest '", out=tmp_path / "out")


class Packed(nn.Parameter):
    """What a quantised weight is: a class of its own."""


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_models_in_any_precision_have_a_digest(dtype):
    """Also with what cannot be read: a packed parameter, one that is nowhere, an empty one."""
    digests = set()
    for i in range(3):
        model: Any = fresh_model(dtype=torch.float32).to(dtype)
        layer = model.model.layers[0]
        layer.packed = Packed(torch.zeros(3)) if i else nn.Parameter(torch.zeros(0, 3))
        if i == 2:
            layer.nowhere = nn.Parameter(torch.zeros(3, device="meta"))
        digests |= {model_digest(model), model_digest(model)}
    assert len(digests) == 3


def test_failures_are_of_what_is_asked_for(folder, tmp_path, monkeypatch):
    """One of a policy that is left out is not said again, but stays in the file."""
    monkeypatch.setattr("kvprune.evaluation.tasks.task", {"echo": Echo()}.__getitem__)
    monkeypatch.setitem(fake_tasks.FAILING, "now", True)
    command = ["compare", "--tasks", "echo", "--context", 20, "--samples", 3, "--model", folder]
    done = run(*command, "--out", tmp_path, "--policies", FAILING, "h2o")
    assert done.exit_code == 1 and f"failed: echo 20: {FAILING}: RuntimeError" in done.stderr
    done = run(*command, "--out", tmp_path, "--policies", "h2o")
    assert done.exit_code == 0 and "failed:" not in done.stderr
    assert len(read(tmp_path).failures) == 1
    monkeypatch.setitem(fake_tasks.FAILING, "now", False)
    found = small(folder, out=tmp_path, tasks=[Echo()], policies=["dense"], contexts=[20])
    # The rows, and the report made of the results, go on saying it.
    assert not found.failures and len(found.results.failures) == 1
    assert [row["error"] is not None for row in found.rows].count(True) == 1


# What is taken for damaged.


@pytest.fixture(scope="module")
def whole(folder, tmp_path_factory) -> Path:
    """A results file of one policy."""
    out = tmp_path_factory.mktemp("whole")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("kvprune.evaluation.report.write_report", lambda results, folder: [])
        small(folder, out=out, policies=["h2o"])
    return out


DAMAGED: list[tuple[str, dict[str, Any], str]] = [
    ("", {"score": "abc"}, "'score' is 'abc'"),
    ("", {"score": None}, "'score' is None"),
    ("", {"sample": "0"}, "'sample' is '0'"),
    ("", {"item": None}, "'item' is None"),
    ("", {"parts": None}, "'parts' is None"),
    ("", {"parts": {"length": "3"}}, "'parts' is .*'3'"),
    ("", {"cost": None}, "NoneType"),
    ("cost", {"entered": [20]}, "'entered' has 1 layers"),
    ("cost", {"kept": []}, "'kept' has 0 layers"),
    ("cost", {"entered": "1234"}, "'entered' is '1234'"),
    ("cost", {"bytes_held": "9"}, "'bytes_held' is '9'"),
    ("cost", {"prompt_tokens": 0}, "'prompt_tokens' is 0"),
    ("cell", {"context": "20"}, "'context' is '20'"),
    ("cell", {"budget": []}, r"'budget' is \[\]"),
]


@pytest.mark.parametrize(("part", "given", "said"), DAMAGED, ids=[d[2] for d in DAMAGED])
def test_a_line_that_cannot_be_is_refused_with_its_number(
    folder, whole, tmp_path, part, given, said
):
    """Before any work, though it is JSON."""
    found = lines(whole)
    at = [i for i, line in enumerate(found) if line["kind"] == "sample"][1]
    (found[at][part] if part else found[at]).update(given)
    (tmp_path / NAME).write_text("".join(json.dumps(line) + "\n" for line in found))
    refused(folder, f"line {at + 1}: expected what .*{said}", out=tmp_path, policies=["h2o"])


def test_a_line_as_deep_as_a_well_is_refused(folder, whole, tmp_path):
    """Rather than followed to its end."""
    (tmp_path / NAME).write_text((whole / NAME).read_text() + "[" * 100_000 + "\n")
    refused(folder, "line \\d+: expected what `kvprune compare` writes", out=tmp_path)


@dataclass(frozen=True)
class Deletes(Echo):
    """Deletes the results file, while it is being written."""

    path: str = ""

    def score(self, sample: Any, reader: Any) -> Any:
        """In the second sample."""
        if sample.number == 1:
            Path(self.path).unlink(missing_ok=True)
        return super().score(sample, reader)


def test_a_file_that_was_deleted_meanwhile(folder, tmp_path):
    """Nothing is written in its place, and the same command starts anew."""
    tasks = [Deletes("", str(tmp_path / NAME))]
    with pytest.raises(KVPruneError, match="deleted or cut meanwhile"):
        small(folder, out=tmp_path, tasks=tasks)
    assert not (tmp_path / NAME).exists()
    small(folder, out=tmp_path)


def test_what_is_no_file_is_not_read(tmp_path):
    """A folder has no lines, and a device has no end."""
    (tmp_path / "folder" / NAME).mkdir(parents=True)
    (tmp_path / "device").mkdir()
    (tmp_path / "device" / NAME).symlink_to("/dev/null")
    for name in ("folder", "device"):
        with (
            pytest.raises(KVPruneError, match="expected a file, got a folder or a device"),
            opened(tmp_path / name),
        ):
            pass


def test_files_of_another_format_are_refused(whole, tmp_path):
    """What they say means something else."""
    found = lines(whole)
    found[0]["format"] = FORMAT - 1
    (tmp_path / NAME).write_text("".join(json.dumps(line) + "\n" for line in found))
    with pytest.raises(KVPruneError, match=r"jsonl: expected results of format 3, got 2"):
        read(tmp_path)


# The command.


def test_a_policy_in_the_current_folder_is_found(tmp_path):
    """By the command, which Python does not have look there."""
    (tmp_path / "mine_here.py").write_text(MINE)
    (tmp_path / "base_of_mine.py").write_text(BASE)
    program = "from kvprune.cli import main; main()"
    command = ["compare", "--policies", "mine_here:Mine(colour=1)", "--out", "out"]
    done = subprocess.run(
        # -P: as for an installed command, the current folder is not looked in.
        [sys.executable, "-P", "-c", program, *command],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 2 and "Mine has no argument 'colour'" in done.stderr, done.stderr


@pytest.mark.parametrize("name", ["d[/b].jsonl", "data[bold].jsonl"])
def test_a_path_is_no_markup(folder, tmp_path, monkeypatch, name):
    """In the bar and in the table."""
    monkeypatch.chdir(tmp_path)
    os.makedirs(Path(name).parent, exist_ok=True)
    Path(name).write_text(json.dumps(GOOD))
    command = ["compare", "--context", 200, "--samples", 1, "--model", folder, "--out", "out"]
    done = run(*command, "--tasks", name, "--policies", "h2o")
    assert done.exit_code == 0, done.exception
    assert f"{name}, 200 tokens" in done.stdout and name in done.stderr


def test_the_model_is_named_by_its_folder(folder, tmp_path, monkeypatch):
    """Also where that is the current one; an empty name is none."""
    monkeypatch.chdir(folder)
    monkeypatch.setattr("kvprune.evaluation.data.assets.demo_model", lambda **_: folder)
    found = small(".", samples=1)
    assert found.results.run["model"] == folder.name
    done = run("compare", "--model", "", "--policies", "h2o", "--out", tmp_path)
    assert isinstance(done.exception, KVPruneError) and "--model : " in str(done.exception)


@pytest.mark.parametrize("name", ["plots", "report.html"])
def test_where_no_report_can_be_written_nothing_is_run(folder, tmp_path, name):
    """A file has the name of the folder of figures, or a folder that of the page."""
    (tmp_path / name).mkdir() if name == "report.html" else (tmp_path / name).touch()
    refused(folder, f"{name}: expected no f", out=tmp_path)


def test_the_table_is_there_though_the_report_is_not(folder, tmp_path, monkeypatch):
    """It comes first."""
    monkeypatch.setattr("kvprune.evaluation.tasks.task", {"echo": Echo()}.__getitem__)
    monkeypatch.setattr("kvprune.evaluation.report.write_report", lambda *_: 1 / 0)
    command = ["compare", "--tasks", "echo", "--context", 20, "--samples", 1, "--model", folder]
    done = run(*command, "--out", tmp_path, "--policies", "h2o")
    assert isinstance(done.exception, ZeroDivisionError) and "echo, 20 tokens" in done.stdout


def test_a_score_that_is_no_number_spoils_no_other(folder, monkeypatch, capsys):
    """Its own row says so; also where there is one sample, or an infinity of each sign."""
    found = small(folder, policies=["h2o"]).results
    h2o = [s for s in found.samples if s.cell.label == "h2o"]
    for bad in ([np.nan], [np.inf, -np.inf], [1.0, np.nan]):
        for sample, score in zip(h2o, bad, strict=False):
            object.__setattr__(sample, "score", float(score))
        rows = {row["label"]: row for row in rows_of(found)}
        assert np.isnan(rows["h2o"]["score"]) and np.isnan(rows["h2o"]["difference"])
        assert rows["h2o"]["score_low"] is None and rows["dense"]["score_low"] is not None
        show(list(rows.values()))
        assert "nan" in capsys.readouterr().out


# What the Python interface takes, beside what it refuses (see test_compare).


def test_paths_arrays_and_what_comes_twice(folder, tmp_path):
    """A path object, an array of budgets, and a context that is named twice."""
    path = Path(written(tmp_path, GOOD))
    given: dict[str, Any] = {"budgets": np.array([0.5]), "contexts": (200, 200)}
    found = small(folder, tasks=[path], policies=["h2o"], samples=1, **given)
    assert [row["task"] for row in found.rows] == [str(path)] * 3
    cells = list(Plan(["h2o"], [Echo()], [20, 30, 20], [], 1, 0).cells())
    assert len(cells) == 6


def test_a_loaded_model_without_a_name_needs_its_tokenizer():
    """What would mend it is said."""
    model = fresh_model(vocab_size=SIZE, dtype=torch.float32)
    refused(model, "name_or_path, which is ''.*give tokenizer= as well")
    refused(model, "tokenizer: expected that of the model, loaded, got 'm'", tokenizer="m")
