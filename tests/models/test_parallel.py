"""Tensor parallel: two processes with half of the heads each equal one with all of them."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest
import torch
from transformers import AutoModelForCausalLM

import kvprune

from ..support.models import fresh_model
from ..support.parallel_run import PIPELINES, report


@pytest.mark.parametrize("kv_heads", [2, 4])
def test_two_processes_equal_one(tmp_path, kv_heads):
    """Tokens, and each head's kept columns; also where heads must agree."""
    path, out = tmp_path / "model", tmp_path / "found"
    fresh_model(kv_heads=kv_heads, dtype=torch.float32).save_pretrained(path)
    one = kvprune.attach(AutoModelForCausalLM.from_pretrained(path, dtype=torch.float64))
    expected = report(one)
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    run = [*launch, "-m", "tests.support.parallel_run", str(path), str(out)]
    done = subprocess.run(
        run, env={**os.environ, "OMP_NUM_THREADS": "1"}, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr
    ranks = [json.loads((tmp_path / f"found.{rank}").read_text()) for rank in range(2)]
    for name in PIPELINES:
        mine = [rank[name] for rank in ranks]
        assert [m["tokens"] for m in mine] == [expected[name]["tokens"]] * 2
        # By layer and row, the heads of the first process and then those of the second.
        layers = zip(*(m["columns"] for m in mine), strict=True)
        heads = [[a + b for a, b in zip(*rows, strict=True)] for rows in layers]
        assert heads == expected[name]["columns"]
