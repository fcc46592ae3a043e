"""Results as `bench.speed` writes them, with numbers that anybody can check by hand."""

from __future__ import annotations

from typing import Any

from bench.costs.attached import WITH, WITHOUT
from bench.costs.candidates import BOTH, DENSE, NAMES, SELDOM
from bench.costs.decode import BUDGETED
from bench.costs.models import LAYER, REAL
from bench.costs.stream import READ

ABOUT = {
    "machine": "x86_64, 2 threads",
    "processor": "Some CPU",
    "torch": "2.13.0",
    "transformers": "5.23.0",
}


def part(name: str, kind: str, context: int, **more: Any) -> dict[str, Any]:
    """The fields of a `Part`."""
    shared = {"repeats": 3, "seconds": 1.0, "shape": REAL, "dtype": "float32", "rows": 1, "new": 0}
    return {"name": name, "kind": kind, "context": context, "budgets": [64], **shared, **more}


def prefill(name: str, context: int, **more: Any) -> dict[str, Any]:
    """Dense takes 2 s in each turn; SDTP has half of its FLOPs, and takes half of it."""
    shares = dict(zip(NAMES, (1.0, 1.01, 1.08, 0.5, 0.6), strict=True))
    rows = {
        label: {
            "prefill": [2 * share, 2 * share, 4 * share if label == DENSE else 3.9 * share],
            "step": [0.1] * 3,
            "live": int(share * 100e6),
            "held": 10_000_000,
            "peak": None,
            "flops": 1e12 * (0.5 if share < 1 else 1.0),
            "counted_flops": 1e12,
        }
        for label, share in shares.items()
    }
    return {"about": ABOUT, "part": part(name, "prefill", context, **more), "found": rows}


def results() -> list[dict[str, Any]]:
    """One of everything; all bars are met."""
    decode = {
        "64": {DENSE: {"step": [0.1] * 12, "held": 5_000_000}}
        | {name: {"step": [0.104] * 12, "held": 5_000_000} for name in BUDGETED}
    }
    rows = decode["64"]
    dense = {**rows[DENSE], "round": [0.1] * 3}
    # A step in which nothing goes is as quick as dense.
    seldom = {"step": [0.1] * 12, "round": [0.105] * 3, "held": 5_000_000}
    field = {
        "64": {
            DENSE: dense,
            "TOVA": {"step": [0.105] * 12, "held": 5_000_000},
            "Knorm": {"step": [0.12] * 12, "held": 5_000_000},
            "Knorm" + SELDOM: seldom,
        }
    }
    whole = {
        DENSE: {"whole": [16.0, 18.0, 20.0], "held": 100_000_000},
        BOTH: {"whole": [10.0, 10.0, 10.0], "held": 15_000_000},
    }
    stream = {
        "lengths": [1024, 2048, 4096],
        "rows": {
            name: {"chunk": [0.5] * 8, "step": [[0.1] * 3] * 4, "held": [7_000_000] * 3}
            for name in READ
        },
    }
    attach = {name: {"prefill": [1.0] * 3, "step": [0.1] * 30} for name in (WITHOUT, WITH)}
    others = [
        (part("decode-8192", "decode", 8192), decode),
        (part("field-step-2048", "field-step", 2048), field),
        (part("whole-8192", "whole", 8192, new=128), whole),
        (part("stream-4096", "stream", 4096), stream),
        (part("attach-1024", "attach", 1024), attach),
    ]
    return [
        prefill("prefill-4096", 4096),
        prefill("prefill-8192", 8192),
        prefill("layer-2048", 2048, shape=LAYER),
        *({"about": ABOUT, "part": of, "found": found} for of, found in others),
    ]
