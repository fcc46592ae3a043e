"""Draws the pictures in docs/policies: which columns each layer keeps of a short text.

python -m bench.policy_pictures            # with the demo model
python -m bench.policy_pictures --redraw   # from pictures.json, as it is
"""

from __future__ import annotations

import argparse
import json
from html import escape
from itertools import groupby
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import kvprune
from kvprune.evaluation.data.assets import demo_model
from kvprune.files import write_text
from kvprune.policies import (
    DMS,
    H2O,
    RKV,
    SDTP,
    TOVA,
    AdaKV,
    ChunkKV,
    CriticalKV,
    DuoAttention,
    ExpectedAttention,
    FastKV,
    GlobalBudget,
    KeyDiff,
    Knorm,
    KVzip,
    ObservedAttention,
    PyramidKV,
    Random,
    Saliency,
    SnapKV,
    StreamingLLM,
)

FOLDER = Path(__file__).parent.parent / "docs" / "policies"
TEXT = (
    "The lighthouse stands on a rock two miles off the coast. It was built in 1871, after a "
    "storm in which four ships were lost in one night. The tower is 38 metres high, and its "
    "lamp can be seen from twenty miles away. The keepers used to live in it with their "
    "families, for three months at a time; in summer a boat brought bread and letters every "
    "week, in winter they lived on what they had. Since 1988 the lamp has worked by itself. "
    "Today the tower belongs to a society that repairs it, and on Sundays visitors may climb "
    "to the top.\n\nQuestion: In which year was the lighthouse built?\nAnswer:"
)
NEW_TOKENS = 16
SNAP = SnapKV(0.25, window=8)
HEADS = 3
STREAMING = {layer: [layer % HEADS] if layer % 4 else [] for layer in range(30)}
"""Made up, for the demo model: heads that keep the first and the newest tokens."""
POLICIES: dict[str, tuple[kvprune.TokenPolicy, ...]] = {
    "h2o": (H2O(heavy=0.1, recent=0.1),),
    "streaming-llm": (StreamingLLM(sinks=4, window=24),),
    "sdtp": (SDTP(),),
    "sdtp-h2o": (SDTP(), H2O(heavy=0.1, recent=0.1)),
    "union": (StreamingLLM(sinks=4, window=14) | H2O(heavy=14, recent=14),),
    "saliency": (Saliency(0.25),),
    "fastkv": (FastKV(0.25),),
    "snapkv": (SNAP,),
    "pyramidkv": (PyramidKV(0.25, window=8),),
    "tova": (TOVA(0.25),),
    "observed-attention": (ObservedAttention(0.25),),
    "expected-attention": (ExpectedAttention(0.25),),
    "keydiff": (KeyDiff(0.25),),
    "knorm": (Knorm(0.25),),
    "random": (Random(0.25),),
    "adakv": (AdaKV(SNAP),),
    "global-budget": (GlobalBudget(SNAP),),
    "criticalkv": (CriticalKV(SNAP),),
    "chunkkv": (ChunkKV(SNAP, size=10),),
    "duoattention": (DuoAttention(STREAMING, sinks=4, recent=24),),
    "kvzip": (KVzip(0.25),),
    "rkv": (RKV(36, when=4),),
    "dms": (DMS(Knorm(when=None), threshold=-11.0, window=16),),
}
READ_TWICE = ("kvzip",)
"""These do not run in a `generate` alone."""
NAMES = {"duoattention": f"DuoAttention(0 or 1 of {HEADS} heads stream, sinks=4, recent=24)"}
"""Where the policy's own name is too long."""

# For light and dark screens: `few` are columns that some heads keep, `all` that all heads keep.
STYLE = """
.word { font: 11px sans-serif; fill: #444 } .few { fill: #8fb3d9 } .all { fill: #1f5a96 }
.frame { fill: none; stroke: #999 } .end { stroke: #b3541e; stroke-dasharray: 3 3 }
@media (prefers-color-scheme: dark) {
  .word { fill: #ccc } .few { fill: #44688c } .all { fill: #9cc9f5 }
  .frame { stroke: #777 } .end { stroke: #f0a070 }
}
"""
WIDTH, HEIGHT, LEFT, TOP = 4.6, 6, 56, 24  # of a token, of a layer; margins left and above


def kept(
    model: Any, ids: torch.Tensor, policies: tuple[kvprune.TokenPolicy, ...], twice: bool = False
) -> list[str]:
    """A digit for each column, by layer: how many key/value heads hold the column at the end.

    Args:
        model: attached.
        ids: the prompt, `[1, N]`.
        policies: the pipeline.
        twice: whether the prompt, but for its last token, is read before `generate`.
    """
    cache = kvprune.ComposedCache(policies)
    if twice:
        kvprune.read(model, cache, ids[:, :-1])
    tokens = {"max_new_tokens": NEW_TOKENS, "min_new_tokens": NEW_TOKENS, "do_sample": False}
    model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), cache=cache, **tokens)
    rows = []
    for layer in range(len(cache)):
        columns = cache.columns(layer)[0]
        # Columns that all heads share count once for each head.
        heads = model.config.num_key_value_heads // len(columns)
        held = torch.bincount(columns[columns >= 0], minlength=cache.seen) * heads
        rows.append("".join(map(str, held.tolist())))
    return rows


def named(picture: str) -> str:
    """The title of a picture: the policies as code, or what `NAMES` says."""
    return NAMES.get(picture, ", ".join(map(repr, POLICIES[picture])))


def found(model: Any, ids: torch.Tensor) -> dict[str, Any]:
    """The data of all pictures, for ids `[1, N]`."""
    return {
        "prompt": ids.shape[1],
        "heads": model.config.num_key_value_heads,
        "pictures": {
            name: {"policies": named(name), "kept": kept(model, ids, p, name in READ_TWICE)}
            for name, p in POLICIES.items()
        },
    }


def drawn(picture: dict[str, Any], prompt: int, heads: int) -> str:
    """The SVG of a picture: a row for each layer from the top, a column for each token."""
    rows, name = picture["kept"], escape(picture["policies"])
    width, height = len(rows[0]) * WIDTH, len(rows) * HEIGHT
    share = sum(map(int, "".join(rows))) / heads / len(rows) / len(rows[0])
    end = LEFT + prompt * WIDTH
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" role="img" '
        f'viewBox="0 0 {width + LEFT + 10:.0f} {height + TOP + 24}">',
        f"<title>{name}</title><style>{STYLE}</style>",
        _word(LEFT, 14, f"{name}: {share:.0%} of all slots kept"),
        _word(0, TOP + 10, "layer 0"),
        _word(0, TOP + height, f"layer {len(rows) - 1}"),
        _word(LEFT, TOP + height + 16, "first token"),
        _word(end - 4, TOP + height + 16, "end of the prompt", "end"),
        _word(end + 4, TOP + height + 16, "generated"),
        *(_cells(row, TOP + i * HEIGHT, heads) for i, row in enumerate(rows)),
        f'<rect class="frame" x="{LEFT}" y="{TOP}" width="{width:.1f}" height="{height}"/>',
        f'<path class="end" d="M{end:.1f} {TOP - 4}v{height + 12}"/>',
    ]
    return "\n".join([*parts, "</svg>"]) + "\n"


def _word(x: float, y: float, text: str, anchor: str = "start") -> str:
    return f'<text class="word" x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}">{text}</text>'


def _cells(row: str, top: float, heads: int) -> str:
    """One rectangle for each run of equal columns."""
    paths, at = {"few": "", "all": ""}, 0
    for held, run in groupby(row):
        count = len(list(run))
        if held != "0":
            name = "all" if int(held) == heads else "few"
            across = f"h{count * WIDTH:.1f}v{HEIGHT - 1}h-{count * WIDTH:.1f}z"
            paths[name] += f"M{LEFT + at * WIDTH:.1f} {top:.1f}{across}"
        at += count
    return "".join(f'<path class="{name}" d="{d}"/>' for name, d in paths.items() if d)


def draw(folder: Path) -> None:
    """Writes an SVG for each picture of the folder's pictures.json."""
    said = json.loads((folder / "pictures.json").read_text())
    for name, picture in said["pictures"].items():
        write_text(folder / f"{name}.svg", drawn(picture, said["prompt"], said["heads"]))


def demo() -> dict[str, Any]:
    """The data of all pictures for the demo model and the text, in float32 on one thread."""
    torch.set_num_threads(1)
    path = demo_model(report=print)
    ids = AutoTokenizer.from_pretrained(path)(TEXT, return_tensors="pt")["input_ids"]
    return found(kvprune.attach(AutoModelForCausalLM.from_pretrained(path, dtype="float32")), ids)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--redraw", action="store_true", help="do not run the model")
    if not parser.parse_args().redraw:
        write_text(FOLDER / "pictures.json", json.dumps(demo(), indent=1) + "\n")
    draw(FOLDER)


if __name__ == "__main__":
    main()
