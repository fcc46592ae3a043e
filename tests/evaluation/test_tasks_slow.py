"""The demo model can do the tasks: dense is above the floor, and above the lower line."""

from __future__ import annotations

import pytest
from transformers import AutoModelForCausalLM, AutoTokenizer

from bench.tasks import measured
from kvprune.evaluation.data.assets import demo_model
from kvprune.evaluation.tasks import TASKS, task


@pytest.mark.slow
@pytest.mark.parametrize("name", TASKS)
def test_the_demo_model_can_do_it(name):
    """On the real texts, with the real tokenizer."""
    path = demo_model()
    model, tokenizer = (
        AutoModelForCausalLM.from_pretrained(path),
        AutoTokenizer.from_pretrained(path),
    )
    row = measured(task(name), 512, 10, model, tokenizer)
    assert row["floor"] is None or row["dense"] >= row["floor"]
    assert row["dense"] > row["no context"]
