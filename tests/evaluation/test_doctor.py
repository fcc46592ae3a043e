"""`kvprune doctor` speaks of this installation, and of a model."""

from __future__ import annotations

import tomllib
from dataclasses import replace
from pathlib import Path

from transformers import BertConfig, BertModel

import kvprune
from kvprune.evaluation import doctor
from kvprune.models.releases import SEAMS, TESTED

from ..support.fake_tasks import saved_model
from ..support.family_models import family_model
from .test_explain import run


def test_the_installation_alone(monkeypatch):
    """Versions, devices, extras, and all seams of this release."""
    done = run("doctor")
    assert done.exit_code == 0
    for said in (kvprune.__version__, ", ".join(TESTED), "cpu", "[compare]", "22 of 22 found"):
        assert said in done.output
    monkeypatch.setitem(doctor.EXTRAS, "compare", ("no_such_module",))
    assert "not installed (no_such_module)" in run("doctor").output


def test_extras_are_those_of_the_package():
    """All but those that a user of the installed package has nothing from."""
    project = Path(__file__).parents[2] / "pyproject.toml"
    extras = tomllib.loads(project.read_text())["project"]["optional-dependencies"]
    assert set(doctor.EXTRAS) == set(extras) - {"dev", "docs"}


def test_a_release_that_lacks_something(monkeypatch):
    """It is named, with what it is for; the exit status is 1."""
    seams = (replace(SEAMS[0], name="NO_SUCH_NAME"), *SEAMS[1:])
    monkeypatch.setattr(doctor, "SEAMS", seams)
    done = run("doctor")
    assert done.exit_code == 1 and f"{len(SEAMS) - 1} of {len(SEAMS)} found" in done.output
    assert "NO_SUCH_NAME: kvprune needs it to run its attention function" in done.output


def test_a_model(tmp_path):
    """Each policy that needs no files is tried, and what is refused says why."""
    done = run("doctor", "--model", saved_model(tmp_path))
    assert done.exit_code == 0
    lines = {line[:20].strip(): line[21:] for line in done.output.splitlines()}
    assert lines["attach"] == lines["H2O"] == lines["AdaKV"] == lines["store plain"] == "works"
    assert lines["SDTP"].startswith("refused: SDTP(): no heads ship")
    assert lines["Saliency"].startswith("refused: Saliency")
    assert lines["heads of SDTP"] == "none ship: kvprune train-sdtp"
    assert "KVzap" not in lines


def test_a_model_that_is_refused():
    """With the reason, and an exit status of 1."""
    model = family_model("llama")
    lines = list(doctor._of_model(model))
    assert all(line.well for line in lines)
    sizes = {"hidden_size": 8, "num_hidden_layers": 1, "intermediate_size": 8}
    encoder = BertModel(BertConfig(num_attention_heads=1, **sizes))
    (_, refused) = list(doctor._of_model(encoder))
    assert not refused.well and refused.found.startswith("refused: ")


def test_no_such_model(tmp_path):
    """As in other commands."""
    assert "expected the name or the folder" in str(run("doctor", "--model", tmp_path).exception)
