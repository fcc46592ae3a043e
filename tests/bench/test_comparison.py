"""The published comparison: measured on both sides, gone on with, collected and shown."""

from __future__ import annotations

import json
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any, ClassVar

import pytest
import torch
import yaml

import kvprune
from bench.comparison import __main__ as driver
from bench.comparison import collect, ours, theirs
from bench.comparison import page as pages
from bench.comparison.settings import PRESSES, SAMPLES
from bench.peers import jobs
from bench.peers.jobs import Job
from bench.peers.ours import Ours
from bench.peers.rows import DENSE, OURS, THEIRS
from bench.peers.worker import work
from kvprune import KVPruneError
from kvprune.evaluation import tasks
from kvprune.evaluation.data.loading import loaded
from kvprune.evaluation.ledger.ledger import FORMAT
from kvprune.evaluation.tasks.base import Reader, Sample, Score
from kvprune.evaluation.tasks.scoring import likelihood
from kvprune.policies import StreamingLLM

from ..evaluation.test_compare import no_report, said
from ..support.fake_tasks import Echo, saved_model

__all__ = ["no_report"]
ROOT = Path(__file__).parents[2]


@dataclass(frozen=True)
class Asked(Echo):
    """Answers that are to be likely, as SQuAD's."""

    name: ClassVar[str] = "squad"
    unit: ClassVar[str] = "nats a token"

    def score(self, sample: Sample, reader: Reader) -> Score:
        """As SQuAD's."""
        return likelihood(sample, reader)


@dataclass(frozen=True)
class Hidden(Echo):
    """Something to be generated."""

    name: ClassVar[str] = "needle"


class StandIn(Ours):
    """Has kvpress's rows, which all keep the newest."""

    def __init__(self, path: Path) -> None:
        self.model = kvprune.attach(loaded(str(path))[1])

    def policies(self, row: str, budget: int) -> list[kvprune.TokenPolicy]:
        """See `Ours`."""
        return [StreamingLLM(sinks=1, window=budget - 1)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """A model and a tokenizer."""
    return saved_model(tmp_path_factory.mktemp("model"))


@pytest.fixture
def machine(monkeypatch, tmp_path, folder, no_report) -> Iterator[Any]:
    """The driver with tiny tasks and a stand-in for kvpress; it fails where it is told to."""
    state = SimpleNamespace(fails=lambda job: False)

    def run(command: list[str], **_: Any) -> Any:
        job, (model, prompts, out) = Job.of(command[3]), map(Path, command[4:])
        if state.fails(job):
            return SimpleNamespace(returncode=1, stderr=b"MemoryError: too much\n")
        about = {"kvpress": "0", "torch": "1", "transformers": "2", "machine": "here"}
        jobs.append(out, [({"side": THEIRS, "task": "about"}, about)])
        work(StandIn(model), job, json.loads(prompts.read_text()), out)
        return SimpleNamespace(returncode=0, stderr=b"")

    monkeypatch.setattr(subprocess, "run", run)
    monkeypatch.setattr(tasks, "task", {"squad": Asked(), "needle": Hidden()}.__getitem__)
    monkeypatch.setattr(ours, "POLICIES", ("h2o", "h2o|streaming"))
    monkeypatch.setattr(driver, "peers_python", lambda: Path("python"))
    sizes = ["--samples", 3, "--context", 20, 30, "--needle", 20, "--peers", 20, "--threads", 1]
    places = ["--work", tmp_path / "w", "--results", tmp_path / "r", "--docs", tmp_path / "d"]
    words = ["comparison", *sizes, "--model", folder, *places]
    monkeypatch.setattr(sys, "argv", list(map(str, words)))
    threads = torch.get_num_threads()
    yield state
    torch.set_num_threads(threads)


@pytest.mark.slow
def test_a_run_that_was_stopped_or_failed_goes_on(machine, tmp_path, capsys, monkeypatch):
    """On either side; nothing is measured twice, and the page comes last."""
    given, count, score = list(sys.argv), [0], Asked.score

    def stops(self: Asked, *asked: Any) -> Score:
        count[0] += 1
        if count[0] == 10:
            raise KeyboardInterrupt
        return score(self, *asked)

    with monkeypatch.context() as patch:
        patch.setattr(Asked, "score", stops)
        assert driver.main() == 130
    assert "the same command goes on" in capsys.readouterr().err
    assert sum(said(tmp_path / "w").values()) == 9
    machine.fails = lambda job: "ObservedAttention" in job.rows
    sys.argv = list(given)
    assert driver.main() == 1
    assert "MemoryError: too much" in capsys.readouterr().err
    assert not (tmp_path / "d").exists()
    machine.fails = lambda job: False
    sys.argv = list(given)
    assert driver.main() == 0
    assert set(said(tmp_path / "w").values()) == {1}
    # Two lines, and two policies at three budgets.
    assert sum(said(tmp_path / "w").values()) == 3 * 3 * (2 + 2 * 3)
    lines = [json.loads(x)["key"] for x in theirs.results(tmp_path / "w").read_text().splitlines()]
    measured = Counter(jobs.name(key) for key in lines if key["task"] == "quality")
    assert set(measured.values()) == {1} and len(measured) == 3 * (1 + 5 * 3)
    check_written(tmp_path)


def check_written(place: Path) -> None:
    """The JSON has both sides on the same samples, and the page is made of it."""
    found = json.loads((place / "r" / "comparison.json").read_text())
    assert found == collect.collected(place / "w")
    page = (place / "d" / "comparison.md").read_text()
    assert page == pages.page(found) and pages.FINDINGS.read_text().strip() in page
    dense = [r for r in found["rows"] if r["label"] == DENSE and (r["task"], r["context"]) == ASKED]
    assert [r["side"] for r in dense] == [OURS, THEIRS]
    assert dense[0]["score"] == pytest.approx(dense[1]["score"], abs=1e-5)
    names = [f"{OURS} squad 20 h2o 0.25", f"{THEIRS} squad 20 SnapKV 0.25"]
    assert [len(found["scores"][name]) for name in names] == [3, 3]
    figures = {p.name for p in (place / "d" / "comparison").iterdir()}
    assert figures == {"report.html", "squad-20.svg", "squad-30.svg", "needle-20.svg"}
    for name in figures - {"report.html"}:
        assert f"](comparison/{name})" in page
        drawn = (place / "d" / "comparison" / name).read_text()
        assert (">kvpress SnapKV</text>" in drawn) == (name == "squad-20.svg")
    report = (place / "d" / "comparison" / "report.html").read_text()
    assert "<code>plots/</code>" not in report and "h2o|<wbr>streaming" in report


ASKED = ("squad", 20)


@pytest.mark.slow
def test_presses_alone_are_joined_to_what_is_there(machine, tmp_path):
    """In the place of the same cells; the other rows and our side's report stay."""
    given = list(sys.argv)
    assert driver.main() == 0
    place = tmp_path / "r" / pages.NAME
    whole, report = json.loads(place.read_text()), (tmp_path / "d").joinpath("comparison")
    stale = json.loads(place.read_text())
    (snap, *more) = [row for row in stale["rows"] if row["label"] == "SnapKV"]
    snap["score"] = 99.0
    stale["rows"] = [row for row in stale["rows"] if row not in more]
    place.write_text(json.dumps(stale))
    before = {path.name: path.read_bytes() for path in report.glob("*.html")}
    sys.argv = [*given, "presses", "--presses", "SnapKV", "--work", str(tmp_path / "w2")]
    assert driver.main() == 0
    joined = json.loads(place.read_text())
    assert joined["scores"] == whole["scores"] and joined["about"] == whole["about"]
    assert sorted(map(str, joined["rows"])) == sorted(map(str, whole["rows"]))
    assert {path.name: path.read_bytes() for path in report.glob("*.html")} == before


def test_a_press_is_compared_question_by_question(tmp_path):
    """With its side's dense run, on what both have; what was asked otherwise does not count."""
    prompts = {"questions": [{"number": i, "prompt": [i], "answer": [1]} for i in range(3)]}
    (tmp_path / "prompts-20.json").write_text(json.dumps(prompts))
    (tmp_path / "results.jsonl").write_text(json.dumps(RUN) + "\n")
    nll = {DENSE: [1.0, 2.0, 3.0], "SnapKV": [2.0, 4.0]}
    for row, values in nll.items():
        for number, value in enumerate(values):
            digest = jobs.digest(prompts["questions"][number])
            key = {"task": "quality", "row": row, "share": None if row == DENSE else 0.5}
            key |= {"number": number, "digest": digest}
            found = {"nll": value, "held": 100 if row == DENSE else 40}
            other = {**key, "digest": "of another question"}
            jobs.append(theirs.results(tmp_path), [(key, found), (other, {"nll": 9.0, "held": 1})])
    dense, snap = collect.collected(tmp_path)["rows"]
    assert dense["score"] == -2.0 and dense["difference"] is None and dense["samples"] == 3
    assert snap["score"] == -3.0 and snap["difference"] == -1.5 and snap["samples"] == 2
    assert (snap["difference_low"], snap["difference_high"]) == (-2.0, -1.0)
    assert snap["held_share"] == 0.4 and snap["budget"] == 0.5 and snap["side"] == THEIRS


RUN = {"kind": "run", "format": FORMAT, "command": "kvprune compare", "model": "tiny"}


def test_the_questions_are_those_of_the_task(folder, monkeypatch):
    """The very tokens that `compare` reads and scores."""
    monkeypatch.setattr(tasks, "task", {"squad": Asked()}.__getitem__)
    tokenizer, _ = loaded(str(folder))
    found = theirs.questions(folder, 20, 3)
    for question, sample in zip(found, Asked().samples(tokenizer, 20, 3, 0), strict=True):
        assert tuple(question.prompt) == sample.prompt
        assert tokenizer.decode(question.answer) == f" {sample.answers[0]}"


def test_what_kvpress_runs():
    """Each press at its shares on every question once, dense once."""
    asked = {"questions": [{"number": i} for i in range(SAMPLES)]}
    keys = [key for job in theirs.plan(SAMPLES, 2, list(PRESSES)) for key in job.keys(asked)]
    counted = Counter((key["row"], key["share"]) for key in keys)
    expected = {(press, share) for press, given in PRESSES.items() for share in given}
    assert counted == dict.fromkeys(expected | {(DENSE, None)}, SAMPLES)
    assert all(key["asked"] == "inside" for key in keys)


def test_what_cannot_be_had_is_one_line(machine, tmp_path, capsys, monkeypatch):
    """Nothing measured yet, and a cell that fails."""
    monkeypatch.setattr(sys, "argv", ["comparison", "page", *sys.argv[1:]])
    assert driver.main() == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert "found no results.jsonl" in line
    monkeypatch.setattr(Asked, "score", lambda *_: 1 / 0)
    asked = driver.options(sys.argv[1:])
    with pytest.raises(KVPruneError, match="cells of squad failed"):
        ours.measure(asked, "squad", 20, tmp_path / "w")


def made_up(side: str, label: str, budget: float | None, score: float, **more: Any) -> Any:
    """A row."""
    spans = {"score": score, "score_low": score - 0.1, "score_high": score + 0.1}
    apart = {"difference": score, "difference_low": score - 0.2, "difference_high": score + 0.2}
    where = {"task": "squad", "context": 1024, "samples": 50, "held_share": budget or 1.0}
    return {"side": side, "label": label, "budget": budget, **spans, **apart, **where, **more}


def test_the_page_s_tables():
    """Lines first, then budget by budget, the best first; both libraries in one table."""
    nothing = dict.fromkeys(("difference", "difference_low", "difference_high"))
    rows = [
        made_up(OURS, "h2o|streaming", 0.25, -2.0, prefill_seconds=1.25, prefill_flops=2.4e11),
        made_up(THEIRS, "SnapKV", 0.25, -1.5),
        made_up(OURS, "h2o", 0.5, -1.75, decode_tokens_per_second=20.4),
        made_up(OURS, "no context", None, -3.0),
        made_up(OURS, DENSE, None, -1.0, **nothing),
    ]
    run = {"versions": {"kvprune": "1"}, "machine": "here", "date": "today"}
    found = {"about": {OURS: run}, "rows": rows, "units": {"squad": "nats a token"}}
    page = pages.page(found, "Nothing at all.")
    table = [line.strip("| ") for line in page.splitlines() if line.startswith("| kv")]
    assert table == [
        "kvprune | dense |  | 1.00 | -1.00 (-1.10 to -0.90)",
        "kvprune | no context |  | 1.00 | -3.00 (-3.10 to -2.90) | -3.00 (-3.20 to -2.80)",
        "kvprune | h2o | 0.5 | 0.50 | -1.75 (-1.85 to -1.65) | -1.75 (-1.95 to -1.55) |  |  | 20",
        "kvpress | SnapKV | 0.25 | 0.25 | -1.50 (-1.60 to -1.40) | -1.50 (-1.70 to -1.30)",
        r"kvprune | h2o\|streaming | 0.25 | 0.25 | -2.00 (-2.10 to -1.90) | "
        "-2.00 (-2.20 to -1.80) | 1.2 | 240",
    ]
    heads = [line for line in page.splitlines() if line.startswith("| library")]
    assert heads[0].endswith("| prefill s | GFLOP | tokens/s |")
    assert "of SQuAD at 1,024\ntokens" in page and "(and needle, which was not run here)" in page
    for row in rows:
        row.pop("decode_tokens_per_second", None)
    assert "tokens/s" not in pages.page({**found, "rows": rows[:1]}, "")
    assert "kvpress" not in pages.page({**found, "rows": rows[:1]}, "").split("##")[0]
    assert "0.5 and 0.25 of the" in page and "50 samples a cell" in page
    assert "## What it says\n\nNothing at all.\n" in page
    (svg,) = pages.drawn(found).values()
    assert "kvprune h2o|streaming" in svg and "prefers-color-scheme: dark" in svg


@pytest.mark.skipif(not pages.RESULTS.exists(), reason="the comparison was not measured yet")
def test_the_committed_page_is_made_of_the_committed_results():
    """Also after results were measured anew; its report is there, and small enough."""
    found = pages.read()
    assert pages.PAGE.read_text() == pages.page(found), "run python -m bench.comparison page"
    place = ROOT / "docs" / pages.FIGURES
    assert {p.name for p in place.iterdir()} == {*pages.drawn(found), "report.html"}
    for name, svg in pages.drawn(found).items():
        assert (place / name).read_text() == svg
    assert (place / "report.html").stat().st_size < 1_000_000
    assert "comparison.md" in str(yaml.safe_load((ROOT / "mkdocs.yml").read_text())["nav"])
    assert all(row["samples"] >= SAMPLES for row in found["rows"])
