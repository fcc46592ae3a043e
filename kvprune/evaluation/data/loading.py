"""A model and its tokenizer by name, with an error that says what could not be loaded."""

from __future__ import annotations

from typing import Any

from ...errors import KVPruneError, from_ctrl_c


def loaded(name: str, dtype: str = "auto", device: str = "cpu") -> tuple[Any, Any]:
    """Loads a tokenizer and a model with transformers' Auto classes.

    Args:
        name: the name or the folder of the model.
        dtype: the dtype to load the model in; "auto" for the dtype of its file.
        device: the device for the model.

    Returns:
        the tokenizer and the model.

    Raises:
        KVPruneError: there is no such model, or it does not fit on the device.
    """
    from transformers import AutoModelForCausalLM, AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(name)
        model: Any = AutoModelForCausalLM.from_pretrained(name, dtype=dtype)
        model = model.to(device)
    # The file may be broken, or the dtype unknown: each library has an error class of its own.
    except Exception as error:
        if from_ctrl_c(error):
            raise KeyboardInterrupt from error
        raise KVPruneError(
            f"--model {name}: expected the name or the folder of a transformers model: {error}"
        ) from error
    return tokenizer, model
