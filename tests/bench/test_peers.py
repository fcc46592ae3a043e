"""The comparison with kvpress: what is measured, resumed, merged and shown, with fake sides."""

from __future__ import annotations

import argparse
import ast
import json
import re
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch.nn import functional as F

from bench.peers import __main__ as driver
from bench.peers import environment, jobs, protocol
from bench.peers.jobs import Job
from bench.peers.merge import merged
from bench.peers.ours import Ours
from bench.peers.plan import plan, seconds_of
from bench.peers.protocol import STEPS, WARM_UP_PROMPT, WARM_UP_STEPS, Opened, Question
from bench.peers.rows import BY_NAME, DENSE, FIELD, OURS, QUALITY, SPEED, THEIRS
from bench.peers.table import document
from bench.peers.worker import work
from kvprune.errors import KVPruneError

from ..support.models import VOCAB, fresh_model

PEERS = Path(protocol.__file__).parent


class FakeSide:
    """A model that takes one second for a prompt of any length, and `steps` for single tokens."""

    def __init__(self, steps: list[float]) -> None:
        self.now, self.steps, self.log = 0.0, steps, list[str]()
        self.positions: list[list[int]] = []

    def open(self, row: str, budget: int, length: int) -> Opened:
        self.log.append(f"open {row} {budget} {length}")
        self.following = iter(self.steps)
        return Opened(self._forward, [], self._entered("reading"), self._entered("after"))

    @contextmanager
    def _entered(self, name: str) -> Iterator[None]:
        self.log.append(name)
        yield
        self.log.append(f"end of {name}")

    def _forward(self, ids: torch.Tensor, **given: Any) -> Any:
        given["past_key_values"].append(ids.shape[1])
        self.positions.append(given["position_ids"][0].tolist())
        self.now += 1.0 if ids.shape[1] > 1 else next(self.following)
        return SimpleNamespace(logits=torch.zeros(1, given["logits_to_keep"], VOCAB))

    def nbytes(self, cache: list[int]) -> int:
        return 10 * sum(cache)


def test_a_turn_times_each_row_after_its_warm_up():
    """The slow first steps do not count; the bytes are those after the prompt and at the end."""
    side = FakeSide([100.0] * WARM_UP_STEPS + [2.0, 4.0] * (STEPS // 2))
    ids = torch.zeros(1, 200 + WARM_UP_STEPS + STEPS, dtype=torch.long)
    found = protocol.turn(side, ("dense", "other"), ids, 50, lambda: side.now)
    expected = {"prefill": 1.0, "decode": 3.0, "held": 2000, "held_after": 2000 + 10 * 30}
    assert found == {"dense": expected, "other": expected}
    opened = [line for line in side.log if line.startswith("open")]
    warm_up = f"{WARM_UP_PROMPT // 2} {WARM_UP_PROMPT}"
    assert opened[:2] == [f"open dense {warm_up}", f"open other {warm_up}"]
    assert opened[2:] == ["open dense 50 200", "open other 50 200"]
    assert side.log[-4:] == ["reading", "end of reading", "after", "end of after"]
    assert side.positions[-31:] == [list(range(200)), *([i] for i in range(200, 230))]


def test_memory_reads_the_prompt_alone():
    """Whatever the system says of it."""
    side = FakeSide([1.0] * 30)
    found = protocol.memory(side, "row", torch.zeros(1, 300, dtype=torch.long), 50)
    assert side.positions[-1] == list(range(300)) and set(found) == {"peak", "beyond"}
    assert found["beyond"] is None or 0 <= found["beyond"] <= found["peak"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model of eight layers, and so of two stages."""
    place = tmp_path_factory.mktemp("tiny")
    fresh_model(dtype=torch.float32, num_hidden_layers=8).save_pretrained(place)
    return place


@pytest.fixture(scope="module")
def ours(folder: Path) -> Ours:
    return Ours(folder, random_heads=True)


def question(length: int = 100) -> Question:
    ids = [2 + (7 * i * i + i) % (VOCAB - 2) for i in range(length + 4)]
    return Question(0, ids[:length], 80, ids[length:])


@pytest.mark.parametrize("asked", ["inside", "after"])
def test_the_dense_loss_is_that_of_one_forward(ours: Ours, asked: str):
    """Read in two pieces or in one, each token at its own place."""
    given = question()
    whole = torch.tensor([given.prompt + given.answer])
    with torch.no_grad():
        logits = ours.model(whole).logits[0, len(given.prompt) - 1 : -1]
    expected = float(F.cross_entropy(logits, torch.tensor(given.answer)))
    found = protocol.answer_loss(ours, DENSE, given, asked, None)
    assert found["nll"] == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize(("asked", "read"), [("inside", 99), ("after", 80)])
def test_the_answer_is_read_on_what_is_left(ours: Ours, asked: str, read: int):
    """All of its tokens, the first too: with one, too, the loss is another than dense's."""
    given = question()
    short = Question(0, given.prompt, given.context, given.answer[:1])
    for each in (given, short):
        dense = protocol.answer_loss(ours, DENSE, each, asked, None)
        window = protocol.answer_loss(ours, "StreamingLLM", each, asked, 0.2)
        assert abs(window["nll"] - dense["nll"]) > 1e-4
        assert dense["held"] == 8 * 2 * 2 * 8 * 4 * read


@pytest.mark.parametrize("row", [*SPEED[OURS][1:], *BY_NAME])
def test_each_row_of_ours_keeps_its_budget(ours: Ours, row: str):
    """SDTP has none; PyramidKV has it in the mean."""
    opened = ours.open(row, 40, 120)
    with torch.no_grad():
        opened.read(torch.tensor([question(120).prompt]))
    kept = [opened.cache.columns(i).shape[-1] for i in range(8)]
    if row == "SDTP":
        assert kept[0] == 120 and kept[-1] == round(0.35 * 120)
    elif row == "PyramidKV":
        assert kept == sorted(kept, reverse=True) and kept[0] > kept[-1] and sum(kept) == 8 * 40
    else:
        assert max(kept) == 40
    assert ours.nbytes(opened.cache) == opened.cache.nbytes


def prompts(questions: int = 3) -> dict[str, Any]:
    each = [{**vars(question()), "number": i} for i in range(questions)]
    return {"text": question(300).prompt, "questions": each}


def asked(*words: str) -> argparse.Namespace:
    return driver.options(["--lengths", "128", "--repeats", "2", "--questions", "3", *words])


def test_the_work_of_a_job_is_found_again(ours: Ours, tmp_path: Path):
    """Under the keys that the job names; what is there of questions is not measured again."""
    few = (
        "--questions",
        "1",
        "--keep",
        "0.5",
        "--shares",
        "0.4",
        "--leave-out",
        "StreamingLLM",
        "SDTP",
        "H2O",
    )
    out = tmp_path / "results.jsonl"
    for job in plan(asked(*few)):
        if job.side == OURS and job.turn == 0:
            work(ours, job, prompts(1), out)
            found = jobs.read(out)
            assert all(jobs.name(key) in found for key in job.keys(prompts(1)))
    before = out.read_text()
    (again,) = (job for job in plan(asked(*few)) if (job.side, job.task) == (OURS, "quality"))
    work(ours, again, prompts(1), out)
    assert out.read_text() == before


def test_results_are_of_what_was_read():
    """Other tokens, another length, budget or number of threads: another result."""
    job = Job(OURS, "speed", (DENSE,), 2, length=128, budget=32)
    assert Job.of(job.text()) == job
    other_text = {**prompts(), "text": question(200).prompt[::-1]}
    other_questions = prompts()
    other_questions["questions"][0]["answer"] = [5]
    assert job.keys(prompts()) != job.keys(other_text)
    quality = Job(OURS, "quality", (DENSE, "H2O"), 2, asked="inside", shares=(0.4,), numbers=(0,))
    assert quality.keys(prompts()) != quality.keys(other_questions)
    named = [(key["row"], key["share"]) for key in quality.keys(prompts())]
    assert named == [(DENSE, None), ("H2O", 0.4)]


def test_a_line_that_was_cut_off_is_taken_away(tmp_path: Path):
    """And what was measured last counts."""
    out = tmp_path / "results.jsonl"
    jobs.append(out, [({"a": 1}, {"x": 1}), ({"a": 2}, {"x": 2})])
    jobs.append(out, [({"a": 1}, {"x": 3})])
    out.write_text(out.read_text() + '{"key": {"a"')
    assert jobs.read(out) == {'{"a": 1}': {"x": 3}, '{"a": 2}': {"x": 2}}
    jobs.append(out, [({"a": 3}, {"x": 4})])
    assert len(jobs.read(out)) == 3


def test_the_sides_take_turns_and_dense_comes_first():
    """Each has a memory job for each row; nothing is there twice."""
    todo = plan(asked("speed", "--leave-out", "Knorm"))
    turns = [(job.side, job.turn) for job in todo if job.task == "speed"]
    assert turns == [(OURS, 0), (THEIRS, 0), (OURS, 1), (THEIRS, 1)]
    assert all(job.rows[0] == DENSE and "Knorm" not in job.rows for job in todo[:4])
    peaks = [(job.side, job.rows[0]) for job in todo if job.task == "memory"]
    assert peaks == [(side, r) for side in SPEED for r in SPEED[side] if r != "Knorm"]
    keys = [jobs.name(key) for job in plan(asked()) for key in job.keys(prompts())]
    assert len(keys) == len(set(keys))
    assert all(seconds_of(job) > 0 for job in plan(asked()))


def results(todo: list[Job]) -> dict[str, dict[str, Any]]:
    """Numbers that say where they come from: a row's are its place, times those of its turn."""
    found: dict[str, dict[str, Any]] = {}
    for job in todo:
        about = {"python": "3", "torch": "2", "transformers": "5", job.side: "1", "machine": "m"}
        found[jobs.name({"side": job.side, "task": "about"})] = about
        for key in job.keys(prompts()):
            rows = {"quality": QUALITY, "field": FIELD, "speed": SPEED, "memory": SPEED}[job.task]
            place = 1 + rows[job.side].index(key["row"])
            slow = (1 + job.turn) * (10 if job.side == THEIRS else 1)
            if job.timed:
                said: dict[str, Any] = {"prefill": place * slow, "decode": 2.0 * place * slow}
                said |= {"held": 100 // place, "held_after": 200 // place}
            elif job.task == "memory":
                said = {"peak": 7_000_000 + place, "beyond": place * 1_000_000}
            else:
                said = {"nll": place + key["number"] * (key["share"] or 0), "held": 60 // place}
            found[jobs.name(key)] = said
    return found


def test_ratios_are_to_the_dense_run_of_the_same_side_and_turn():
    """A turn that is twice as slow, and a side that is ten times, change none."""
    todo = plan(asked("speed"))
    rows = merged(results(todo), todo, prompts(), "speed")["rows"]
    assert [(r["side"], r["row"]) for r in rows] == [(s, r) for s in SPEED for r in SPEED[s]]
    for row in rows:
        place = 1 + SPEED[row["side"]].index(row["row"])
        assert row["prefill_ratio"] == [place] * 3 == row["decode_ratio"]
        assert row["prefill"] == place * 1.5 * (10 if row["side"] == THEIRS else 1)
        assert row["held_share"] == (100 // place) / 100 and row["beyond"] == place * 1_000_000


def test_what_is_not_there_is_left_out():
    """A turn of one side alone, and no peaks."""
    todo = plan(asked("speed"))
    some = [job for job in todo if job.side == OURS and job.task == "speed"][:1]
    said = merged(results(some), todo, prompts(), "speed")
    assert {row["side"] for row in said["rows"]} == {OURS} and set(said["about"]) == {OURS}
    assert all(row["turns"] == 1 and row["peak"] is None for row in said["rows"])
    assert "| - |" in document({"speed": said})


def test_losses_are_paired_by_question():
    """Against the side's own dense, and against ours at the same share, whatever the side."""
    todo = plan(asked("quality"))
    rows = merged(results(todo), todo, prompts(), "quality")["rows"]
    assert len(rows) == 2 * (len(QUALITY[OURS]) + len(QUALITY[THEIRS]))
    (row,) = (r for r in rows if (r["row"], r["share"]) == ("KeyDiff", 0.4))
    place, reference = 3, 1 + QUALITY[OURS].index("SDTP + H2O")
    assert row["nll"] == pytest.approx(place + 0.4) and row["questions"] == 3
    mean, low, high = row["minus_dense"]
    assert mean == pytest.approx(place - 1 + 0.4) and place - 1 <= low < mean < high
    assert row["minus_reference"] == pytest.approx([place - reference] * 3)
    assert row["held_share"] == pytest.approx(20 / 60)


def test_the_document_has_a_line_for_each_row():
    """Of each length, share and place of the question; every line as wide as its header."""
    todo = plan(asked("--asked", "inside", "after"))
    found = results(todo)
    said = document({t: merged(found, todo, prompts(), t) for t in driver.TASKS})
    tables = re.findall(r"(?:^\|.*\|\n)+", said, re.MULTILINE)
    assert len(tables) == 1 + 1 + 2 * 2
    for text, rows in zip(tables, [SPEED, FIELD, *[QUALITY] * 4], strict=True):
        lines = [[c.strip() for c in line.strip("|").split(" | ")] for line in text.splitlines()]
        assert len({len(line) for line in lines}) == 1
        expected = [(side, row) for side in rows for row in rows[side]]
        assert sorted((line[0], line[1]) for line in lines[2:]) == sorted(expected)
    assert "differ by at most 0.0e+00 on any of the 6 questions" in said


@pytest.mark.parametrize(
    "words",
    [
        ["fast"],
        ["--lengths", "100"],
        ["--keep", "1.0"],
        ["--shares", "0"],
        ["--repeats", "0"],
        ["--leave-out", DENSE],
    ],
)
def test_what_cannot_be_measured_is_refused(words: list[str], capsys: Any):
    with pytest.raises(SystemExit):
        driver.options(words)
    assert "expected" in capsys.readouterr().err


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Any:
    """The driver with workers that write what `results` says, and no model, texts or kvpress."""
    ran: list[Job] = []
    state = SimpleNamespace(ran=ran, fails=lambda job: False)

    def run(command: list[str], **_: Any) -> Any:
        job = Job.of(command[3])
        ran.append(job)
        if state.fails(job):
            return SimpleNamespace(returncode=1, stderr=b"Traceback\nMemoryError: too much\n")
        found = results([job])
        jobs.append(Path(command[6]), [(json.loads(k), v) for k, v in found.items()])
        return SimpleNamespace(returncode=0, stderr=b"")

    monkeypatch.setattr(subprocess, "run", run)
    monkeypatch.setattr(driver, "demo_model", lambda report: tmp_path)
    monkeypatch.setattr(driver, "peers_python", lambda: Path("python"))
    monkeypatch.setattr(driver, "export", lambda *given: prompts())
    places = ["--work", tmp_path / "w", "--results", tmp_path / "r", "--table", tmp_path / "p.md"]
    words = ["peers", "--lengths", "128", "--repeats", "2", "--questions", "3", *map(str, places)]
    monkeypatch.setattr(sys, "argv", words)
    return state


def test_a_run_that_failed_goes_on_where_it_was(machine: Any, tmp_path: Path, capsys: Any):
    """One line says what failed; the rest is measured then, and nothing twice."""
    machine.fails = lambda job: job.task == "memory" and job.side == THEIRS
    assert driver.main() == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert "MemoryError: too much" in line and "kvpress memory dense" in line
    assert not (tmp_path / "p.md").exists()
    before, machine.fails = machine.ran[:-1], lambda job: False
    machine.ran.clear()
    assert driver.main() == 0
    assert "about" in capsys.readouterr().out
    assert sorted(map(str, before + machine.ran)) == sorted(map(str, plan(asked())))
    assert set(json.loads((tmp_path / "r" / "peers-speed.json").read_text())["about"]) == set(SPEED)
    assert "## Quality" in (tmp_path / "p.md").read_text()
    machine.ran.clear()
    assert driver.main() == 0 and machine.ran == []


def test_fresh_measures_anew(machine: Any, monkeypatch: pytest.MonkeyPatch):
    assert driver.main() == 0
    machine.ran.clear()
    monkeypatch.setattr(sys, "argv", [*sys.argv, "--fresh"])
    assert driver.main() == 0 and len(machine.ran) == len(plan(asked()))


def test_without_a_registry_one_line_says_so(
    machine: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: Any
):
    """pip's own last error in it; the environment is not taken for whole, and nothing ran."""
    place = tmp_path / "venv"

    def create(folder: Path, **_: Any) -> None:
        folder.mkdir(exist_ok=True)

    def pip(command: list[str], **_: Any) -> Any:
        assert command[1:4] == ["-m", "pip", "install"]
        said = "WARNING: Retrying\nERROR: Could not find it\nERROR: No matching distribution\n"
        return SimpleNamespace(returncode=pip_fails, stderr=said)

    pip_fails = 1
    monkeypatch.setattr(environment.venv, "create", create)
    monkeypatch.setattr(subprocess, "run", pip)
    monkeypatch.setattr(driver, "peers_python", lambda: environment.peers_python(place))
    assert driver.main() == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert "could not: No matching distribution. Nothing else" in line
    assert not (place / ".ready").exists() and machine.ran == []
    pip_fails = 0
    assert environment.peers_python(place) == place / "bin" / "python"
    pip_fails = 1
    assert environment.peers_python(place) == place / "bin" / "python"
    other = tmp_path / "requirements.txt"
    other.write_text("kvpress==0.5.6\n")
    with pytest.raises(KVPruneError, match=r"requirements\.txt"):
        environment.peers_python(place, other)


def test_the_shared_code_imports_neither_library():
    """It runs in both environments; what runs in kvpress's imports nothing of kvprune."""
    for name in ("__init__", "jobs", "protocol", "rows", "worker", "theirs"):
        imports = {
            module
            for node in ast.walk(ast.parse((PEERS / f"{name}.py").read_text()))
            if isinstance(node, ast.Import | ast.ImportFrom)
            for module in ([node.module] if isinstance(node, ast.ImportFrom) else [])
            + [alias.name for alias in node.names]
        }
        of_libraries = {str(m).split(".")[0] for m in imports} & {
            "kvprune", "kvpress", "transformers", "bench",
        }  # fmt: skip
        assert of_libraries == ({"kvpress", "transformers"} if name == "theirs" else set())


def test_both_environments_have_the_same_torch():
    pins = [PEERS / "requirements.txt", PEERS.parents[1] / "constraints.txt"]
    found = [re.findall(r"^torch==.*$", path.read_text(), re.MULTILINE) for path in pins]
    assert found[0] == found[1] and len(found[0]) == 1
