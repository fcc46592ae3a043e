"""Cells on a Ray cluster: what workers send back, and what becomes of one that is killed."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import kvprune
from kvprune import KVPruneError
from kvprune.evaluation.compare.executors import Source, attempted
from kvprune.evaluation.compare.on_ray import run_job
from kvprune.evaluation.compare.plan import Plan
from kvprune.evaluation.compare.worker import Job, Worker
from kvprune.evaluation.data.loading import loaded

from ..support.fake_tasks import Echo, Killed, saved_model
from .test_compare import FAILING, no_report, said, small

__all__ = ["no_report"]
ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """A model and a tokenizer."""
    return saved_model(tmp_path_factory.mktemp("model"))


def test_a_worker_does_what_this_process_does(folder):
    """With a model that it loads itself, and refuses if it is another."""
    tokenizer, model = loaded(str(folder))
    here = Worker(kvprune.attach(model), tokenizer)
    source, plan = Source(str(folder), "auto", "cpu"), Plan(["h2o"], [Echo()], [20], [], 2, 0)
    drawn = plan.drawn(tokenizer)["echo", 20]
    for cell, task in plan.cells():
        job = Job(cell, task, drawn)
        there = run_job(source, here.digest, job)
        both = [[getattr(o, "answer", o) for o in found] for found in (there, attempted(job, here))]
        assert both[0] == both[1] and len(both[0]) == 2 + (cell.label == "h2o")
    with pytest.raises(KVPruneError, match="the same model on every machine"):
        run_job(source, "another", job)


def test_a_cluster_cannot_have_a_loaded_model(folder):
    """Nor be without ray."""
    with pytest.raises(KVPruneError, match="loaded model: expected its name or folder"):
        small(loaded(str(folder))[1], executor="ray")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("importlib.util.find_spec", lambda _: None)
        with pytest.raises(KVPruneError, match=r"pip install kvprune\[ray\]"):
            small(folder, executor="ray")


@pytest.fixture
def cluster() -> Iterator[Any]:
    """Two workers on this machine."""
    ray = pytest.importorskip("ray")
    paths = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
    environment = {"env_vars": {"PYTHONPATH": paths}}
    ray.init(num_cpus=2, include_dashboard=False, runtime_env=environment, log_to_driver=False)
    yield ray
    ray.shutdown()


@pytest.mark.slow
def test_cells_survive_a_killed_worker(folder, tmp_path, cluster):
    """Nothing is lost, nothing is there twice, and a cell that fails stops no other."""
    there = tmp_path / "killed"
    task = Killed(after=1, there=str(there))
    options: dict[str, Any] = {"policies": ["h2o", "streaming(window=9)", FAILING]}
    found = small(folder, **options, tasks=[task], executor="ray", out=tmp_path / "ray")
    assert there.exists()
    (failure,) = found.failures
    assert "a mistake" in failure.error
    small(folder, **options, out=tmp_path / "here")
    assert said(tmp_path / "ray") == said(tmp_path / "here")
    assert cluster.is_initialized()
