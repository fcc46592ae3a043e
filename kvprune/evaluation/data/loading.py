"""A model and its tokenizer by name, with an error that says what could not be had."""

from __future__ import annotations

from typing import Any

from ...errors import KVPruneError


def loaded(name: str, dtype: str = "auto", device: str = "cpu") -> tuple[Any, Any]:
    """Tokenizer and model, as transformers' Auto classes load them.

    Args:
        name: of a model, or a folder.
        dtype: "auto" for that of the file.
        device: where to put the model.

    Raises:
        KVPruneError: there is no such model, or it does not fit there.
    """
    from transformers import AutoModelForCausalLM, AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(name)
        model: Any = AutoModelForCausalLM.from_pretrained(name, dtype=dtype)
        model = model.to(device)
    # A broken file, a dtype that is none: each library has an error class of its own.
    except Exception as error:
        raise KVPruneError(
            f"--model {name}: expected the name or the folder of a transformers model: {error}"
        ) from error
    return tokenizer, model
