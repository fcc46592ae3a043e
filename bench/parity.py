"""Whether policies keep what kvpress's presses keep: docs/parity.md.

    python -m bench.parity             # minutes; the first call makes kvpress's environment
    python -m bench.parity --page      # the page anew, from the results

Both sides read the same prompt of the demo model, an essay, in float32, with the options and the
budget of kvpress's press. A pair is a slot of one key/value head in one layer. Where other pairs
are kept, the score that kvpress gave the pair is compared with that of the last pair which it kept:
as the two sides multiply in another order, pairs that score alike but for rounding may change
places.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

import kvprune
from kvprune.errors import KVPruneError
from kvprune.evaluation.data.assets import demo_model, ruler_data
from kvprune.evaluation.specs import parse
from kvprune.files import write_text
from kvprune.policies import DuoAttention

from .about import write
from .command import run
from .peers.environment import ROOT, peers_python
from .peers.parity_rows import BUDGET, HEAD_SCORES, LENGTH, PRESSES, RECENT, SINKS

RESULTS = Path(__file__).parent / "results" / "parity.json"
PAGE = ROOT / "docs" / "parity.md"
TIED = 1e-5
"""How far apart scores are, relatively, that float32 cannot tell apart after such sums."""


class Row(NamedTuple):
    """One method on both sides.

    Attributes:
        here: the policy, as a spec.
        differs: why what is kept is another; empty where it has to be the same.
        made: the policy, where no spec can say it.
    """

    here: str
    differs: str = ""
    made: kvprune.TokenPolicy | None = None


SNAP = f"snapkv({BUDGET},window=64,kernel=5,pooling='average')"
STREAMING = {
    layer: [head for head, score in enumerate(row) if score < 0.5]
    for layer, row in enumerate(HEAD_SCORES)
}

ROWS: Mapping[str, Row] = {
    "StreamingLLM": Row(f"streaming(sinks={SINKS},window={BUDGET - SINKS})"),
    "SnapKV": Row(SNAP),
    "TOVA": Row(f"tova({BUDGET})"),
    "PyramidKV": Row(
        f"pyramidkv({BUDGET},window=64,kernel=5,pooling='average',beta=3.0)",
        "the budgets of layers are rounded so that their sum is exact, so that some keep one slot "
        "more or less; `beta=3` here is their 2, as theirs counts the window",
    ),
    "KeyDiff": Row(f"keydiff({BUDGET})"),
    "Knorm": Row(f"knorm({BUDGET})"),
    "ObservedAttention": Row(f"observedattention({BUDGET})"),
    "ExpectedAttention": Row(f"expectedattention({BUDGET})"),
    "CriticalKV": Row(f"criticalkv({SNAP})"),
    "ChunkKV": Row(
        # Of 52 chunks kvpress keeps 13, which are 260 slots.
        f"chunkkv({SNAP.replace('256', '260')})",
        "each head keeps its own chunks, and the window is no part of one; the press adds up heads",
    ),
    "AdaKV, no floor": Row(f"adakv({SNAP},floor=0.0)"),
    "AdaKV": Row(
        f"adakv({SNAP})",
        "a floor is shared out before the rest is (the paper's code), not forced in afterwards",
    ),
    "AdaKV(ExpectedAttention), no floor": Row(
        f"adakv(expectedattention({BUDGET},epsilon=0.01),floor=0.0)"
    ),
    "DuoAttention": Row(
        f"DuoAttention(streaming, sinks={SINKS}, recent={RECENT})",
        made=DuoAttention(STREAMING, sinks=SINKS, recent=RECENT),
    ),
    "KVzip": Row(f"kvzip({BUDGET})"),
    "KVzip+": Row(
        f"kvzip({BUDGET},plus=True)",
        "the norm is of the state that enters the layer, as in the paper, not of the normed state",
    ),
}


def policy_of(row: Row, tokenizer: Any) -> Any:
    """The policy of a row, which asks as kvpress does for the prompt to be repeated."""
    policy: Any = row.made or parse(row.here)[0]
    asks = getattr(policy, "for_tokenizer", None)
    return policy if asks is None else asks(tokenizer)


def prompt(path: Path) -> list[int]:
    """The first tokens of an essay."""
    tokenizer = AutoTokenizer.from_pretrained(path)
    text = ruler_data("PaulGrahamEssays.json")["text"][: 8 * LENGTH]
    ids: list[int] = tokenizer.encode(text, add_special_tokens=False)[:LENGTH]
    return ids


def theirs(path: Path, ids: list[int], work: Path) -> dict[str, Tensor]:
    """What kvpress keeps, and its scores; see `bench.peers.kept`.

    Raises:
        KVPruneError: its environment cannot be made, or the run failed.
    """
    work.mkdir(parents=True, exist_ok=True)
    given, out = work / "parity-ids.json", work / "parity.safetensors"
    write_text(given, json.dumps(ids))
    command = [str(peers_python()), "-m", "bench.peers.kept", str(path), str(given), str(out)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    if done.returncode:
        said = done.stderr.strip().splitlines() or ["it said nothing"]
        raise KVPruneError(f"parity: expected kvpress to run, and it ended with {said[-1]}")
    return load_file(out)


@torch.no_grad()
def ours(model: Any, ids: list[int], policy: kvprune.TokenPolicy) -> Tensor:
    """What a policy keeps of a prompt, bool `[L, Hkv, S]`."""
    cache, given = kvprune.ComposedCache([policy]), torch.tensor([ids])
    kvprune.read(model, cache, given)
    config = model.config
    found = torch.zeros(config.num_hidden_layers, config.num_key_value_heads, len(ids))
    for layer, _ in cache.slot_layers():
        columns = cache.columns(layer)[0].expand(config.num_key_value_heads, -1)
        # -1 stands in front of the columns of a head that keeps fewer than others.
        marks = torch.zeros(config.num_key_value_heads, len(ids) + 1)
        found[layer] = marks.scatter(1, columns % (len(ids) + 1), 1.0)[:, :-1]
    return found.bool()


def compared(name: str, mine: Tensor, found: Mapping[str, Tensor]) -> dict[str, Any]:
    """A row of the results.

    Args:
        name: of `ROWS`.
        mine: bool `[L, Hkv, S]`.
        found: what `theirs` returned.
    """
    other, scores = found[name], found.get(f"{name}.scores")
    differ = mine != other
    row = {"name": name, "kept": int(mine.sum()), "theirs": int(other.sum())}
    row |= {"differ": int(differ.sum())}
    if scores is None:
        return row | {"untied": None if row["differ"] else 0}
    scores = scores.expand_as(other).double()
    # By head, or over the heads of a layer that share a budget.
    over = (1, 2) if name.startswith("AdaKV") else (2,)
    last = scores.masked_fill(~other, torch.inf).amin(over, keepdim=True)
    apart = (scores - last).abs() / last.abs()
    # What cannot be compared is no tie.
    return row | {"untied": int((differ & ~(apart <= TIED)).sum())}


def page(rows: list[dict[str, Any]]) -> str:
    """The text of the page."""
    lines = ["| method | here | press | kept | kept otherwise | beyond ties |", "| --- " * 6 + "|"]
    for row in rows:
        name, untied = row["name"], row["untied"]
        said = f"| {name} | `{ROWS[name].here}` | `{PRESSES[name]}` | {row['kept']:,} |"
        lines.append(f"{said} {row['differ']:,} | {'-' if untied is None else f'{untied:,}'} |")
    why = [f"* {name}: {row.differs}." for name, row in ROWS.items() if row.differs]
    return HEAD + "\n".join(lines) + "\n\nWhere it has to be otherwise:\n\n" + "\n".join(why) + "\n"


HEAD = f"""# Parity with kvpress

This page compares what policies and kvpress 0.5.5 keep of one prompt: SmolLM2-135M-Instruct in
float32, the first {LENGTH:,} tokens of an essay, options and budgets as the press has them. A pair
is a slot of one key/value head in one layer. *Kept otherwise* counts the pairs that one side keeps
and the other does not; *beyond ties* those of them whose score differs from the lowest that was
kept by more than {TIED:g} of it (a dash where a press shows no scores). DuoAttention's scores of
heads are made up. This page is made by `python -m bench.parity`.

"""


def main() -> int:
    """Runs both sides, and writes the results and the page; returns the exit code."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--page", action="store_true", help="the page alone, from the results")
    parser.add_argument("--work", type=Path, default=ROOT / "build" / "peers")
    parser.add_argument("--out", type=Path, default=RESULTS)
    return run("parity", partial(_measure, parser.parse_args()))


def _measure(args: argparse.Namespace) -> None:
    if not args.page:
        path = demo_model(report=print)
        ids = prompt(path)
        found = theirs(path, ids, args.work)
        tokenizer = AutoTokenizer.from_pretrained(path)
        # As on the other side; see `kept`.
        tokenizer.chat_template = None
        model = kvprune.attach(AutoModelForCausalLM.from_pretrained(path).eval())
        rows = []
        for name, row in ROWS.items():
            rows.append(compared(name, ours(model, ids, policy_of(row, tokenizer)), found))
            print(rows[-1], flush=True)
        write(args.out, args, model, rows)
    write_text(PAGE, page(json.loads(args.out.read_text())["rows"]))


if __name__ == "__main__":
    sys.exit(main())
