"""Results for reports, made of lm-eval's output of runs with the model `kvprune`."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from numbers import Real
from pathlib import Path
from statistics import mean
from typing import Any

from ...errors import KVPruneError
from ..ledger.results import Cell, Cost, Results, SampleResult


def results_of(outputs: Iterable[Mapping[str, Any]]) -> Results:
    """The results of several runs of lm-eval, such as one run for each policy.

    A task has the name that lm-eval gives it, with its filter if it has one. Its unit is its first
    metric that is a number, and its context is the mean length of its contexts, in tokens. Tasks
    that score whole texts (`loglikelihood_rolling`) are left out: they have no context to read.

    Args:
        outputs: return values of `lm_eval.simple_evaluate` with samples, or of `read_outputs`.

    Raises:
        KVPruneError: an output of a model that is not `kvprune`, without samples, or with a sample
            whose context was not read in that run; or runs of several models.
    """
    outputs = list(outputs)
    samples = [s for output in outputs for s in _samples(output)]
    units = {s.cell.task: next(iter(s.parts)) for s in samples}
    return Results(_run(outputs), units, tuple(samples))


def _run(outputs: Sequence[Mapping[str, Any]]) -> dict[str, object]:
    """The settings of all runs together, taken from the first one; all must have the same model."""
    models = sorted({output["config"]["kvprune"]["model"] for output in outputs})
    if len(models) > 1:
        raise KVPruneError(f"expected runs of one model, got runs of {', '.join(models)}")
    config = outputs[0]["config"] if outputs else {}
    versions = {n: outputs[0].get(f"{n}_version") for n in ("lm_eval", "transformers") if outputs}
    named = ("batch_size", "device", "limit", "model_dtype", "fewshot_seed")
    settings = {name: str(config[name]) for name in named if name in config}
    return {"model": "".join(models), **settings, "versions": versions}


def read_outputs(folder: Path) -> list[dict[str, Any]]:
    """All runs below a folder that lm-eval wrote with `--output_path` and `--log_samples`.

    Raises:
        KVPruneError: there is no run, a run has no samples, or a file is not JSON.
    """
    files = sorted(folder.rglob("results_*.json"))
    if not files:
        raise KVPruneError(
            f"{folder}: expected lm-eval's results_*.json in it, got a folder without: name what "
            f"was --output_path"
        )
    return [_with_samples(file) for file in files]


def _with_samples(file: Path) -> dict[str, Any]:
    (output,) = _lines(file, whole=True)
    date = file.stem.removeprefix("results_")
    files = {task: file.with_name(f"samples_{task}_{date}.jsonl") for task in output["configs"]}
    output["samples"] = {task: _lines(path) for task, path in files.items()}
    return output


def _lines(path: Path, whole: bool = False) -> list[dict[str, Any]]:
    """The JSON values of a file, one a line.

    Args:
        path: the file.
        whole: whether the whole file is one value instead.
    """
    try:
        text = path.read_text(encoding="utf-8")
        return [json.loads(part) for part in ([text] if whole else text.split("\n")) if part]
    except OSError as error:
        raise KVPruneError(
            f"{path}: expected a file of lm-eval's: {error}. Run it with --log_samples"
        ) from error
    except ValueError as error:
        raise KVPruneError(
            f"{path}: expected JSON as lm-eval writes it, got {error}: run it again"
        ) from error


def _samples(output: Mapping[str, Any]) -> Iterator[SampleResult]:
    """The results of the samples of one run."""
    mine = output["config"].get("kvprune")
    if mine is None or "samples" not in output:
        raise KVPruneError(
            f"expected the output of lm-eval's model kvprune, with samples, got one of "
            f"{output['config'].get('model')!r}: run it with --model kvprune --log_samples"
        )
    for task, samples in output["samples"].items():
        kind = output["configs"][task]["output_type"]
        # These tasks score whole texts: there is no context that a cache reads first.
        if kind == "loglikelihood_rolling":
            continue
        costs = [_cost(task, sample, mine["costs"]) for sample in samples]
        context = round(mean(c.prompt_tokens for c in costs))
        for sample, cost in zip(samples, costs, strict=True):
            named = task if sample["filter"] == "none" else f"{task} ({sample['filter']})"
            cell = Cell(mine["policy"], mine["label"], None, named, context)
            answer = str(sample["filtered_resps"][0]) if kind == "generate_until" else ""
            parts = _scores(task, sample)
            score = next(iter(parts.values()))
            yield SampleResult(cell, sample["doc_id"], score, parts, answer, cost)


def _cost(task: str, sample: Mapping[str, Any], costs: Mapping[str, Any]) -> Cost:
    found = costs.get(sample["prompt_hash"])
    if found is None:
        raise KVPruneError(
            f"{task}, document {sample['doc_id']}: expected what reading its context cost, and it "
            f"was not read in this run: leave out --use_cache, and use one process"
        )
    return Cost(
        **found | {name: tuple(found.get(name, ())) for name in ("entered", "kept", "held")}
    )


def _scores(task: str, sample: Mapping[str, Any]) -> dict[str, float]:
    """The metrics of a sample that are numbers, by name."""
    metrics: Sequence[str] = sample["metrics"]
    found = {m: float(sample[m]) for m in metrics if isinstance(sample[m], Real)}
    if not found:
        raise KVPruneError(
            f"{task}: expected a metric that is a number for each document, got "
            f"{', '.join(metrics)}"
        )
    return found
