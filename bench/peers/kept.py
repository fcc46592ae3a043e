"""What kvpress's presses keep of a prompt; runs in its own environment, without kvprune.

python -m bench.peers.kept MODEL IDS OUT

* MODEL: a folder with the model.
* IDS: a JSON file with the prompt's token ids.
* OUT: a safetensors file. For each row it gets `NAME`, what is kept as bool `[L, Hkv, S]`, and,
  where the press has one score for each pair, `NAME.scores`, likewise.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any
from unittest import mock

import kvpress
import numpy as np
import torch
import transformers
from safetensors.torch import save_file
from torch import Tensor
from transformers import AutoModelForCausalLM, DynamicCache

from .parity_rows import HEAD_SCORES, PRESSES, RECENT, SINKS


def made(name: str) -> Any:
    """The press of a row."""
    press = eval(PRESSES[name], vars(kvpress))
    if name == "DuoAttention":
        # Its scores of heads come from the network; see `HEAD_SCORES`.
        found = SINKS, RECENT, np.array(HEAD_SCORES)
        press.load_attention_pattern = lambda model: found
    return press


def noted(press: Any, scores: dict[int, Tensor]) -> None:
    """Has a press note its scores by layer; one of another press notes those of that."""
    inner = getattr(press, "press", press)
    if not hasattr(inner, "score"):
        return
    given = inner.score

    def score(module: Any, *args: Any, **kwargs: Any) -> Tensor:
        found: Tensor = given(module, *args, **kwargs)
        scores[module.layer_idx] = found[0].clone()
        return found

    inner.score = score


def kept(model: Any, ids: Tensor, press: Any, keys: list[Tensor]) -> Tensor:
    """What a press keeps of a prompt, bool `[L, Hkv, S]`.

    Args:
        model: the stock model.
        ids: `[1, S]`.
        press: the press.
        keys: by layer, all of the prompt's keys `[Hkv, S, D]`.
    """
    cache: Any = DynamicCache(config=model.config)
    layers = model.model.layers
    for layer in layers:
        layer.self_attn.masked_key_indices = None
    with press(model):
        model.model(input_ids=ids, past_key_values=cache)
    found = torch.zeros(len(layers), *keys[0].shape[:2], dtype=torch.bool)
    for index, (layer, whole) in enumerate(zip(layers, keys, strict=True)):
        # A pair that is kept has the very key that it was read with.
        for head, left in enumerate(cache.layers[index].keys[0]):
            places = (left[:, None] == whole[head][None]).all(-1).int().argmax(-1)
            assert torch.equal(whole[head][places], left)
            found[index, head, places] = True
        if (masked := layer.self_attn.masked_key_indices) is not None:
            found[index][masked[1], masked[2]] = False
            layer.self_attn.masked_key_indices = None
    return found


@torch.no_grad()
def main() -> None:
    """Runs each press on the prompt of the command line; see the module."""
    path, file, out = map(Path, sys.argv[1:])
    ids = torch.tensor([json.loads(file.read_text())])
    model: Any = AutoModelForCausalLM.from_pretrained(path).eval()
    whole = {}
    for name in ("sdpa", "eager"):
        model.set_attn_implementation(name)
        dense: Any = DynamicCache(config=model.config)
        model.model(input_ids=ids, past_key_values=dense)
        whole[name] = [layer.keys[0].clone() for layer in dense.layers]
    tokenizer = transformers.AutoTokenizer.from_pretrained(path)
    # KVzip's press would take the template's system prompt for a part of the text.
    tokenizer.chat_template = None
    told = mock.patch.object(transformers.AutoTokenizer, "from_pretrained", return_value=tokenizer)
    found: dict[str, Tensor] = {}
    for name in PRESSES:
        attention = "eager" if name == "ObservedAttention" else "sdpa"
        model.set_attn_implementation(attention)
        press, scores = made(name), dict[int, Tensor]()
        noted(press, scores)
        with told:
            found[name] = kept(model, ids, press, whole[attention])
        if scores:
            found[f"{name}.scores"] = torch.stack([scores[i] for i in sorted(scores)])
        print(name, float(found[name].float().mean()), flush=True)
    save_file({name: tensor.contiguous() for name, tensor in found.items()}, out)


if __name__ == "__main__":
    main()
