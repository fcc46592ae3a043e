"""The commands in the hands of somebody who makes mistakes, is in a hurry, or stops them."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import typer
from filelock import FileLock
from rich.console import Console
from typer.testing import CliRunner

from kvprune import KVPruneError
from kvprune.cli import app, main
from kvprune.evaluation.compare import executors, progress
from kvprune.evaluation.compare.worker import Job
from kvprune.evaluation.data.loading import loaded
from kvprune.evaluation.ledger.results import Cell, Cost, SampleResult
from kvprune.evaluation.tasks.articles import Squad
from kvprune.evaluation.tasks.base import Sample
from kvprune.files import check_file, check_folder
from kvprune.policies import SDTPHeads
from kvprune.policies.sdtp import trainer, training

from .evaluation.test_compare import hears_ctrl_c
from .evaluation.test_explain import TRAIN, folder, run
from .policies.test_sdtp_training import _bomb, trained

__all__ = ["folder", "hears_ctrl_c"]


def refused(monkeypatch: pytest.MonkeyPatch, capsys: Any, *given: object) -> str:
    """What a command that cannot be run says: one line, and an exit status of 2."""
    monkeypatch.setattr("sys.argv", ["kvprune", *map(str, given)])
    with pytest.raises(SystemExit) as caught:
        main()
    said = capsys.readouterr()
    assert caught.value.code == 2 and "Traceback" not in said.err and not said.out
    return str(said.err.splitlines()[-1])


@pytest.fixture
def no_loading(monkeypatch):
    """Loading a model takes minutes: what can be refused is refused before."""
    monkeypatch.setattr("kvprune.evaluation.data.loading.loaded", _bomb(0))


@pytest.mark.usefixtures("no_loading")
@pytest.mark.parametrize("out", ["a file", "a file/below", "x" * 300])
def test_heads_that_could_not_be_written_are_not_trained(
    out, folder, tmp_path, monkeypatch, capsys
):
    """And nothing is made."""
    (tmp_path / "a file").touch()
    given = ["--model", folder / "model", "--data", folder / "texts.jsonl"]
    said = refused(monkeypatch, capsys, *TRAIN, *given, "--out", tmp_path / out)
    assert "expected a folder that can be written" in said
    assert [path.name for path in tmp_path.iterdir()] == ["a file"]


@pytest.mark.usefixtures("no_loading")
@pytest.mark.parametrize("page", ["missing/page.html", "."])
def test_a_page_that_could_not_be_written_is_not_made(page, tmp_path, monkeypatch, capsys):
    """Not after all has been read, and shown."""
    monkeypatch.chdir(tmp_path)
    said = refused(monkeypatch, capsys, "explain", "text", "--model", "m", "--html", page)
    assert "expected a file in a folder that is there" in said


@pytest.mark.usefixtures("no_loading")
@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("", "at least one token, got an empty one"),
        ("none.txt", "there is no such file"),
        ("latin", "a text in UTF-8, got"),
        ("a\udcff", "a text in UTF-8, got"),
    ],
)
def test_what_is_no_text_is_not_explained(text, why, tmp_path, monkeypatch, capsys):
    """Before the model is loaded."""
    monkeypatch.chdir(tmp_path)
    Path("latin").write_bytes(b"caf\xe9")
    assert why in refused(monkeypatch, capsys, "explain", text, "--model", "m")


def test_a_text_beyond_what_the_model_was_made_for(folder, tmp_path, monkeypatch, capsys):
    """As `compare` refuses it; a text of just as many tokens is fine."""
    heads = tmp_path / "heads"
    SDTPHeads(32, 6).save_pretrained(heads)
    options = ["--model", folder / "model", "--policies", f"sdtp(heads={str(heads)!r})"]
    assert run("explain", "x" * 512, *options).exception is None
    said = refused(monkeypatch, capsys, "explain", "x" * 513, *options)
    assert "at most the 512 tokens that the model was made for, got 513" in said


def test_a_place_that_cannot_be_written(tmp_path, monkeypatch):
    """The root of the tests may write everywhere: the system says so all the same."""
    monkeypatch.setattr(os, "access", lambda path, mode: False)
    with pytest.raises(KVPruneError, match="cannot be written"):
        check_folder(tmp_path / "a" / "b")
    with pytest.raises(KVPruneError, match="cannot be written"):
        check_file(tmp_path / "a")


def test_a_place_that_can_be_written(tmp_path, monkeypatch):
    """Nothing is made of it."""
    monkeypatch.chdir(tmp_path)
    for path in (Path(), Path("a"), tmp_path / "a" / "b"):
        check_folder(path)
    for path in (Path("a"), tmp_path / "a"):
        check_file(path)
    assert not [*tmp_path.iterdir()]


@pytest.mark.parametrize("last", [["--out", "x"], ["--tasks", "needle"]])
def test_an_option_without_its_value(last, monkeypatch, capsys):
    """The next option is not taken for it."""
    said = refused(monkeypatch, capsys, "compare", "--policies", *last)
    assert said == (
        f"kvprune: --policies: expected at least one value, got {last[0]} right behind it"
    )


def test_two_trainings_in_one_folder(tmp_path):
    """The second is refused, and the first goes on undisturbed."""
    with (
        FileLock(tmp_path / training.LOCK),
        pytest.raises(KVPruneError, match="another training writes there"),
    ):
        # A lock is of a thread.
        trained(tmp_path)
    assert not (tmp_path / trainer.CHECKPOINT).exists()
    trained(tmp_path)


# Stopped.

STOP = [*TRAIN, "--marking-epochs", 1]


def interrupt(*_: Any, **__: Any) -> None:
    """As Ctrl-C does."""
    signal.raise_signal(signal.SIGINT)


@pytest.mark.usefixtures("hears_ctrl_c")
@pytest.mark.parametrize(
    ("where", "heads"),
    [
        ("kvprune.evaluation.data.loading.loaded", False),
        ("kvprune.policies.sdtp.trainer.Trainer._step", False),
        ("kvprune.policies.sdtp.trainer.Trainer._agreement", True),
    ],
)
def test_a_training_that_is_stopped_says_how_to_go_on(where, heads, folder, tmp_path, monkeypatch):
    """And whether there are heads already; the same command then goes on to the end."""
    command = [*STOP, "--model", folder / "model", "--data", folder / "texts.jsonl"]
    command += ["--out", tmp_path]
    with monkeypatch.context() as patch:
        patch.setattr(where, interrupt)
        done = run(*command)
    assert done.exit_code == 130
    can = f"stopped; the heads in {tmp_path} are trained and can be used, though not all figures"
    goes_on = f"stopped; the same command goes on with what is in {tmp_path}"
    assert (can if heads else goes_on) in done.stderr
    assert (tmp_path / "model.safetensors").exists() == heads
    done = run(*command)
    assert done.exception is None
    account = json.loads((tmp_path / "training.json").read_text())
    assert account["complete"] is True and len(account["metrics"]) == 1


def test_reading_says_how_far_it_is(folder, tmp_path):
    """Data may be many files."""
    command = [*STOP, "--model", folder / "model", "--data", folder / "texts.jsonl"]
    done = run(*command, "--out", tmp_path)
    assert "reading: 9 records" in done.stderr.replace("\r", "\n")


def test_each_part_of_a_comparison_is_said(folder, tmp_path, monkeypatch):
    """Some take as long as the cells, and come before the bar, or after it."""
    lines = [{"context": "a " * 20, "question": "b", "answer": "a"}] * 2
    (tmp_path / "own.jsonl").write_text("\n".join(map(json.dumps, lines)))
    options = ["--policies", "h2o", "--budgets", 0.5, "--context", 200, "--samples", 2]
    options += ["--tasks", tmp_path / "own.jsonl", "--model", folder / "model"]
    done = run("compare", *options, "--out", tmp_path / "out")
    assert done.exit_code == 0
    said = done.stderr.splitlines()
    parts = ["reading the model's weights", "drawing the samples", "6/6", "writing the report"]
    found = [[line for line in said if part in line] for part in parts]
    assert all(found) and [said.index(one[0]) for one in found] == sorted(
        said.index(one[0]) for one in found
    )


def test_a_stage_is_shown_as_it_is_spelled(monkeypatch, capsys):
    """It turns while it lasts; a bracket in it is no markup."""
    monkeypatch.setattr(
        progress, "_stderr", lambda: Console(stderr=True, force_terminal=True, width=80)
    )
    with progress.stage("a [b] c"):
        pass
    assert "a [b] c" in capsys.readouterr().err
    with progress.stage("silent", wanted=False):
        pass
    assert capsys.readouterr() == ("", "")


def test_without_a_terminal_a_tenth_of_the_samples_is_a_line(monkeypatch, capsys):
    """In a file a bar would show nothing before its end."""
    monkeypatch.setattr(progress, "_stderr", lambda: Console(stderr=True, width=80))
    cell, cost = Cell("h2o", "h2o", 0.5, "squad", 100), Cost(1.0, 1.0, None, 1, 1, 1, (), ())
    samples = tuple(Sample(n, (1,), (1,), ("a",)) for n in range(25))
    with progress.Watch.shown([Job(cell, Squad(), samples)], wanted=True) as watch:
        for sample in samples:
            watch.came(SampleResult(cell, sample.number, 0.0, {}, "", cost))
    lines = [line for line in capsys.readouterr().err.split("\n") if " of 25 samples: " in line]
    assert len(lines) == 10
    assert lines[0] == "3 of 25 samples: squad 100: h2o at 0.5" and lines[-1].startswith("25 of")


SCREEN = 50
"""The lines of a screen, of 80 columns."""


@pytest.mark.parametrize("command", [None, *(c.name for c in app.registered_commands)])
def test_help_fits_a_screen(command):
    """Of all commands, and of each."""
    arguments = ["--help"] if command is None else [command, "--help"]
    said = CliRunner().invoke(app, arguments, env={"COLUMNS": "80", "TERMINAL_WIDTH": "80"})
    assert said.exit_code == 0 and len(said.output.splitlines()) <= SCREEN
    assert max(map(len, said.output.splitlines())) <= 80


def test_a_command_needs_nothing_to_say_its_options():
    """Neither torch nor transformers, which take seconds."""
    program = "import kvprune.cli, sys; print({'torch', 'transformers'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.stdout == "set()\n", done.stderr


def test_what_is_public_is_there_once_it_is_asked_for():
    """Names and folders, without an import of their own; nothing else is listed."""
    program = (
        "import kvprune; assert set(dir(kvprune)) > set(kvprune.__all__); "
        "kvprune.policy.select, kvprune.policies.H2O, kvprune.statistics.Attention; "
        "print(all(getattr(kvprune, name) for name in dir(kvprune)), hasattr(kvprune, 'nothing'))"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.stdout == "True False\n", done.stderr


@pytest.fixture
def a_command(monkeypatch):
    """Runs a function as a command."""

    def run_it(function: Any) -> int:
        app = typer.Typer(add_completion=False)
        app.command()(function)
        monkeypatch.setattr("kvprune.cli.app", app)
        monkeypatch.setattr("sys.argv", ["kvprune"])
        with pytest.raises(SystemExit) as caught:
            main()
        return int(caught.value.code or 0)

    return run_it


@pytest.mark.parametrize("kind", [ModuleNotFoundError, KVPruneError])
@pytest.mark.parametrize("cause", [True, False])
@pytest.mark.usefixtures("hears_ctrl_c")
def test_ctrl_c_ends_a_command_where_it_became_another_error(kind, cause, a_command, capsys):
    """Of a library, or of ours."""

    def stopped() -> None:
        try:
            raise KeyboardInterrupt
        except KeyboardInterrupt as error:
            other = ValueError("of another kind")
            raise kind("some module") from (error if cause else other)

    before = signal.getsignal(signal.SIGINT)
    assert a_command(stopped) == 130
    assert capsys.readouterr().err == "kvprune: stopped\n"
    assert signal.getsignal(signal.SIGINT) is before


@pytest.mark.usefixtures("hears_ctrl_c")
def test_ctrl_c_ends_a_command_without_a_traceback(a_command, capsys):
    """Typer says nothing more of it."""
    assert a_command(lambda: signal.raise_signal(signal.SIGINT)) == 130
    assert "Traceback" not in capsys.readouterr().err


def test_ctrl_c_in_a_cell_is_no_failed_cell():
    """Though a library has made another error of it."""

    class Worker:
        @staticmethod
        def run(job: Any) -> Any:
            try:
                raise KeyboardInterrupt
            except KeyboardInterrupt as error:
                raise RuntimeError("of a library") from error

    job: Any = None
    worker: Any = Worker()
    with pytest.raises(KeyboardInterrupt):
        list(executors.attempted(job, worker))


def test_ctrl_c_while_a_model_is_loaded(monkeypatch):
    """It is not said that there is no such model."""

    def stopped(name: str) -> None:
        try:
            raise KeyboardInterrupt
        except KeyboardInterrupt as error:
            raise ModuleNotFoundError("an import was stopped") from error

    monkeypatch.setattr("transformers.AutoTokenizer.from_pretrained", stopped)
    with pytest.raises(KeyboardInterrupt):
        loaded("some model")


def test_a_process_that_has_to_ignore_ctrl_c_does(monkeypatch):
    """A script that starts a command in the background tells it so."""
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        monkeypatch.setattr("kvprune.cli.app", lambda: signal.raise_signal(signal.SIGINT))
        main()
        assert signal.getsignal(signal.SIGINT) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGINT, before)


def test_another_error_is_no_ctrl_c(monkeypatch):
    """It comes out as it is."""
    monkeypatch.setattr("kvprune.cli.app", lambda: dict[str, int]()["missing"])
    with pytest.raises(KeyError):
        main()


@pytest.mark.usefixtures("hears_ctrl_c")
def test_ctrl_c_in_a_destructor_is_not_lost(a_command):
    """Python lets no error out of one: it comes a moment later, whatever the program waits for."""

    def called() -> None:
        signal.raise_signal(signal.SIGINT)

    class Object:
        def __del__(self) -> None:
            called()

    def app() -> None:
        it = Object()
        del it
        time.sleep(5)
        raise AssertionError("it was lost")

    start = time.monotonic()
    assert a_command(app) == 130
    assert time.monotonic() - start < 4
