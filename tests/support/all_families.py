"""A tiny random model of every model type that transformers builds as a causal language model."""

from __future__ import annotations

import copy
import inspect
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, DynamicCache, PreTrainedModel
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

import kvprune
from kvprune.models.families import local_layers
from kvprune.models.releases import CACHE_ARGUMENTS
from kvprune.models.structure import base_of
from kvprune.policies import H2O, StreamingLLM

from .family_cells import (
    CELLS,
    Subject,
    check_against_the_oracle,
    check_roomy,
    check_row,
    stock_rows_stand_alone,
)
from .family_models import EVERY_OTHER, FAMILIES, WINDOW, StaysDouble, unfilled
from .family_oracle import Local
from .models import LAYERS, VOCAB, prompt
from .strategies import sdtp_pruner

MODEL_TYPES: list[str] = list(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)

TILED = {"jetmoe"}
"""Whose query head i reads key/value head i modulo their number."""

SINKS_APART = {"granite_swa", "granitemoe_swa"}
"""Whose eager attention returns probabilities without their sinks' share."""
TEXTBOOK = "textbook"

ROOMY, ALONE = "roomy = dense", "row alone"
COLUMNS = (ROOMY, ALONE, *CELLS)
EXACT, REFUSED, AS_STOCK, FAILS = "exact", "-", "as stock", "**fails**"

SMALL: dict[str, Any] = {
    "vocab_size": VOCAB,
    "hidden_size": 32,
    "embedding_size": 32,
    "word_embed_proj_dim": 32,
    "intermediate_size": 48,
    "ffn_dim": 48,
    "ffn_hidden_size": 48,
    "n_inner": 48,
    "intermediate_size_mlp": 48,
    "encoder_ffn_dim": 48,
    "encoder_hash_byte_group_vocab": VOCAB,
    "decoder_ffn_dim": 48,
    "num_hidden_layers": LAYERS,
    "encoder_layers": LAYERS + 2,
    "decoder_layers": LAYERS,
    "num_layers": LAYERS,
    "num_attention_heads": 4,
    "encoder_attention_heads": 2,
    "decoder_attention_heads": 4,
    "num_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "kv_channels": 8,
    "max_position_embeddings": 128,
    "initializer_range": 0.3,
    "init_std": 0.3,
    "bos_token_id": 1,
    "eos_token_id": None,
    "pad_token_id": 0,
    # Experts.
    "moe_intermediate_size": 16,
    "shared_expert_intermediate_size": 16,
    "num_experts": 4,
    "num_local_experts": 4,
    "n_routed_experts": 4,
    "moe_num_experts": 4,
    "num_experts_per_tok": 2,
    "n_group": 2,
    "topk_group": 2,
    "first_k_dense_replace": 1,
    "num_dense_layers": 1,
    # Latent attention.
    "kv_lora_rank": 8,
    "q_lora_rank": 12,
    "qk_rope_head_dim": 4,
    "qk_nope_head_dim": 6,
    "v_head_dim": 5,
    # Layers that keep a state.
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 6,
    "mamba_n_heads": 8,
    "mamba_d_head": 8,
    "mamba_d_state": 8,
    "mamba_n_groups": 1,
    "mamba_d_ssm": 64,
    "lru_width": 32,
}
"""What is set of a config that has it; also of configs inside it."""

CONV = {"layer_types": ["conv", "full_attention"] * 2}
GEMMA4: dict[str, Any] = {"hidden_size_per_layer_input": 8, "vocab_size_per_layer_input": VOCAB}
GEMMA4 |= {"layer_types": EVERY_OTHER, "head_dim": 8, "global_head_dim": 12}

QSA = {"indexer_n_heads": 2, "indexer_kv_heads": 1, "indexer_head_dim": 8}
QSA |= {"indexer_budget": 8, "indexer_compress_ratio": 4}

MORE: dict[str, dict[str, Any]] = {
    "codegen": {"rotary_dim": 4},
    "gptj": {"rotary_dim": 4},
    "cohere_compass_text": {
        "rope_parameters": {"full_attention": {"rope_type": "default", "rope_theta": 1e4}}
    },
    "dbrx": {
        "attn_config": {"kv_n_heads": 2, "rope_theta": 1e4},
        "ffn_config": {"ffn_hidden_size": 48, "moe_top_k": 2},
    },
    "dots3_note_text": {"num_key_value_heads": 4},
    "dots1": {"n_shared_experts": 1},
    "gemma3n_text": {
        "num_kv_shared_layers": 0,
        "layer_types": EVERY_OTHER,
        "hidden_size_per_layer_input": 8,
        "vocab_size_per_layer_input": VOCAB,
        "laurel_rank": 4,
        "altup_num_inputs": 2,
        "activation_sparsity_pattern": [0.0] * LAYERS,
    },
    "gemma4_text": GEMMA4,
    "gpt_neo": {"attention_types": [[["global", "local"], 2]], "window_size": WINDOW},
    "lfm2": CONV,
    "lfm2_moe": CONV,
    "mamba2": {"num_heads": 8},
    "qwen4_exp_text": QSA,
    "reformer": {"is_decoder": True, "axial_pos_embds_dim": [16, 16], "axial_pos_shape": [8, 16]},
    "xlnet": {"d_head": 8},
    "zaya": {"num_experts_per_tok": 1},
}
"""What a model type needs besides."""


def config_of(model_type: str) -> Any:
    """A config of 4 layers, hidden size 32; local layers see `WINDOW` columns."""
    options = _small(CONFIG_MAPPING[model_type]())
    options |= FAMILIES.get(model_type, {})
    return AutoConfig.for_model(model_type, **options)


def _small(config: Any) -> dict[str, Any]:
    options = {name: value for name, value in SMALL.items() if _takes(config, name, value)}
    if _read(config, "sliding_window"):
        options["sliding_window"] = WINDOW
    if "kv_lora_rank" in options:
        # With latent attention every query head has its own keys, and only a part of each turns.
        options["num_key_value_heads"] = options["num_attention_heads"]
        options["head_dim"] = options["qk_rope_head_dim"]
    kinds = _read(config, "layer_types")
    if kinds and _takes(config, "layer_types", kinds):
        options["layer_types"] = (list(dict.fromkeys(kinds)) * LAYERS)[:LAYERS]
    for name in config.sub_configs or {}:
        if _read(config, name) is not None:
            options[name] = _small(_read(config, name))
    return options | MORE.get(config.model_type, {})


def _read(config: Any, name: str) -> Any:
    try:
        return getattr(config, name, None)
    # Some say of a number that every layer has its own.
    except Exception:
        return None


def _takes(config: Any, name: str, value: Any) -> bool:
    """Whether a config has an option, and one that can be set."""
    own = config.attribute_map.get(name, name)
    if own != name and own.startswith("encoder"):
        # The decoder of such a model has names of its own.
        return False
    known = hasattr(type(config), own)
    if not known and _read(config, name) is None:
        return False
    try:
        setattr(copy.copy(config), name, value)
    except Exception:
        return False
    return True


def model_of(model_type: str, backend: str | None = None) -> PreTrainedModel:
    """A float64 model of its own, in eval mode, not attached; always the same weights."""
    options: dict[str, Any] = {"experts_implementation": "eager"}
    if backend is not None:
        options["attn_implementation"] = backend
    with torch.random.fork_rng(), StaysDouble():
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(config_of(model_type), **options)
        model = model.eval().double()
        for parameter in model.parameters():
            _fill(parameter)
    return model


def _fill(parameter: torch.nn.Parameter) -> None:
    """Gives a weight what every family's weights have in common: they are random numbers."""
    shape = parameter.shape
    if parameter.dim() == 1:
        # Attention sinks, biases and router corrections begin at a constant.
        parameter.data += 0.1 * torch.randn(shape)
    elif unfilled(parameter):
        parameter.data = 0.3 * torch.randn(shape, dtype=parameter.dtype)


@dataclass
class Outcome:
    """What came of a model type.

    name: of the model's class. built: whether transformers builds a tiny one. accepted: whether
    `attach` took it. reason: why it was not built or accepted. cells: by column of `COLUMNS`.
    note: why it is refused with a policy. wrong: by column, what is wrong.
    """

    name: str = ""
    built: bool = False
    accepted: bool = False
    reason: str = ""
    cells: dict[str, str] = field(default_factory=dict)
    note: str = ""
    wrong: dict[str, str] = field(default_factory=dict)


def outcome_of(model_type: str, seconds: int = 120) -> Outcome:
    """Tries a model type, for at most so long; must run in the main thread."""
    outcome = Outcome()
    try:
        with _at_most(seconds), torch.no_grad(), StaysDouble():
            _try(model_type, outcome)
    except _Slow:
        outcome.wrong["time"] = f"takes more than {seconds} s"
    return outcome


def _try(model_type: str, outcome: Outcome) -> None:
    try:
        outcome.name = type(model_of(model_type)).__name__
    except Exception as error:
        outcome.reason = _line(error)
        return
    outcome.built = True
    try:
        subject = subject_of(model_type)
    except kvprune.KVPruneError as error:
        outcome.reason = _reason(error)
        return
    except Exception as error:
        # The model itself fails, before kvprune has a part in it.
        outcome.built, outcome.reason = False, _line(error)
        return
    outcome.accepted = True
    outcome.note = base_of(subject.attached).__dict__["_kvprune"].cannot_prune
    for column, check in _checks(subject, prunes=not outcome.note).items():
        try:
            outcome.cells[column] = check()
        except Exception as error:
            outcome.cells[column] = FAILS
            outcome.wrong[column] = f"{type(error).__name__}: {_line(error)}"


def _checks(subject: Subject, prunes: bool) -> dict[str, Callable[[], str]]:
    """What is tried of a family that is accepted, by column."""
    checks: dict[str, Callable[[], str]] = {}
    checks |= {ROOMY: partial(_roomy, subject, prunes), ALONE: partial(_alone, subject, prunes)}
    return checks | {cell: partial(_cell, subject, cell, prunes) for cell in CELLS}


def _roomy(subject: Subject, prunes: bool) -> str:
    check_roomy(subject, [])
    pruners = [sdtp_pruner(1.0)] if prunes else []
    check_roomy(subject, [*pruners, H2O(500, 500), StreamingLLM(4, 1000)])
    return EXACT


def _alone(subject: Subject, prunes: bool) -> str:
    if not stock_rows_stand_alone(subject):
        return AS_STOCK
    check_row(subject, CELLS["SDTP + H2O" if prunes else "H2O"][0]())
    return EXACT


def _cell(subject: Subject, cell: str, prunes: bool) -> str:
    if prunes or "SDTP" not in cell:
        check_against_the_oracle(subject, cell)
        return EXACT
    try:
        check_against_the_oracle(subject, cell)
    except kvprune.KVPruneError as error:
        if "prunes hidden states, which" in str(error):
            return REFUSED
        raise
    raise AssertionError("is said not to be pruned, and was")


def _reason(error: Exception) -> str:
    """The words of a refusal by `attach`."""
    return str(error).partition("is not supported: ")[2].partition(". Expected")[0] or _line(error)


def _line(error: Exception) -> str:
    return " ".join(str(error).split())[:160]


class _Slow(BaseException):
    """Not an Exception, which code in between might take for its own."""


@contextmanager
def _at_most(seconds: int) -> Iterator[None]:
    def stop(*_: Any) -> None:
        raise _Slow

    before = signal.signal(signal.SIGALRM, stop)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


def subject_of(model_type: str) -> Subject:
    """What is tried of a model type; its caches' heads as those of a stock cache.

    Raises:
        KVPruneError: kvprune does not accept it.
    """
    attached = kvprune.attach(model_of(model_type))
    plain: Any = model_of(model_type)
    stock: Any = DynamicCache(config=plain.config.get_text_config(decoder=True))
    with torch.no_grad(), StaysDouble():
        plain(prompt(1, 3), **{cache_argument(plain): stock})
    # By the encoder's layers, where there was one.
    layers = stock.layers[:LAYERS]
    linear = [i for i, layer in enumerate(layers) if not hasattr(layer, "keys")]
    slots = [0 if i in linear else layer.keys.shape[1] for i, layer in enumerate(layers)]
    local = [
        None if each is None else Local(each.size, each.chunked) for each in local_layers(plain)
    ]
    eager = model_of(model_type, TEXTBOOK if model_type in SINKS_APART else "eager")
    return Subject(plain, attached, eager, slots, local, linear, model_type in TILED)


def _textbook_attention(
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor,
    scaling: float,
    s_aux: Tensor | None = None,
    **_: Any,
) -> tuple[Tensor, Tensor]:
    """Attention as in the books: a sink is one more score, which takes its share."""
    groups = query.shape[1] // key.shape[1]
    key, value = key.repeat_interleave(groups, 1), value.repeat_interleave(groups, 1)
    scores = query @ key.transpose(-1, -2) * scaling + attention_mask
    assert s_aux is not None
    sinks = s_aux.view(1, -1, 1, 1).expand(*scores.shape[:-1], 1)
    shares = torch.cat([scores, sinks], -1).softmax(-1)[..., :-1]
    return (shares @ value).transpose(1, 2), shares


ALL_ATTENTION_FUNCTIONS.register(TEXTBOOK, _textbook_attention)
ALL_MASK_ATTENTION_FUNCTIONS.register(TEXTBOOK, ALL_MASK_ATTENTION_FUNCTIONS["eager"])


def cache_argument(model: PreTrainedModel) -> str:
    """What the model's forward calls its cache in this transformers release."""
    known = inspect.signature(model.forward).parameters
    return next(name for name in CACHE_ARGUMENTS if name in known)
