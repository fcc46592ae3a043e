"""Trains SDTP's heads for a frozen model (paper, section 3.3).

There are two phases. In the first, heads learn the saliency of the marking pass from the inputs of
the dense model's layers, each on the tokens that the heads before it leave. In the second, the
model runs pruned by the heads (see `simulation`), and the loss of the completion reaches them too.
The second phase is off by default: as it stands it made heads worse.
"""

from __future__ import annotations

import copy
import dataclasses
import importlib.util
import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock, Timeout

from kvprune.errors import KVPruneError
from kvprune.files import make_folder
from kvprune.models.devices import devices_of, is_offloaded
from kvprune.models.families import check_family
from kvprune.wiring.attach import attach, detach

from .examples import Example
from .heads import SDTPHeads
from .marks import Marks
from .options import Training
from .policy import SDTP
from .saliency import evaluating
from .shipped import fingerprint
from .trainer import ACCOUNT, Trainer

LOCK = ".training.lock"


def train(
    model: Any,
    examples: Sequence[Example],
    out: str | Path,
    options: Training | None = None,
    policy: SDTP | None = None,
    *,
    held_out: Sequence[Example] | None = None,
    marks: str | Path | None = None,
    keep_hidden: bool = False,
    progress: bool = True,
    note: dict[str, Any] | None = None,
) -> SDTPHeads:
    """Trains heads for a model, which stays as it is, bit for bit.

    A training can be killed at any moment. Called again with the same arguments, it goes on from
    the last checkpoint in `out`, to the same weights; figures that are missing are measured then.

    Args:
        model: a transformers model with a language-model head, of a family that can be pruned.
        examples: the examples to train on; see `read_examples`.
        out: a folder for the heads (`SDTPHeads.from_pretrained(out)`), `training.json` (what was
            done and measured; `complete` is false in it while the last figures are missing) and
            the checkpoint. The heads are there before they are measured.
        options: the options of the training; None for the defaults.
        policy: the schedule to train for, with the heads to begin with, which are not changed;
            None for the paper's schedule, with untrained heads that have a low-rank term.
        held_out: examples to measure by; None for a share of `examples`, `options.validation`.
        marks: a folder for marked examples that outlives this training; None for one in `out`.
        keep_hidden: whether to keep the inputs of the stages' layers there as well, which the
            first phase trains on: stages times prompt tokens times C numbers per example; see
            `Marks`.
        progress: whether to draw a bar with the losses.
        note: further facts for `training.json`, such as where the data is from.

    Returns:
        the trained heads, on the model's device.

    Raises:
        KVPruneError: accelerate or scipy is missing, the family is not supported, the model is
            spread over several devices or offloaded, too few examples or examples whose prompts
            are too short, another training that works in `out`, a checkpoint of another training,
            a loss that is not finite, or a file that cannot be written.
    """
    check_family(model)
    _require("accelerate", "scipy")
    _check_model(model)
    options, note = options or Training(), _as_json(note or {})
    with torch.inference_mode(False), torch.enable_grad(), _frozen(model):
        accelerator = _accelerator(options.mixed_precision)
        home = model.device
        if home.type != accelerator.device.type:
            model.to(accelerator.device)
        policy = _prepared(policy or SDTP(untrained(model, options.seed)), model)
        size = model.get_input_embeddings().num_embeddings
        _check_examples([*examples, *(held_out or ())], policy, size)
        parts = _split(examples, held_out, options)
        folder = Path(marks or Path(out) / "marks")
        make_folder(Path(out))
        make_folder(folder)
        assert isinstance(policy.heads, SDTPHeads)
        marked = Marks(
            model,
            policy.heads.layers,
            folder,
            options.target,
            keep_hidden,
            accelerator.mixed_precision,
        )
        work = Trainer(model, policy, *parts, marked, options, Path(out), accelerator, progress)
        with _alone(Path(out)):
            work.run(note)
    return policy.heads.to(home)


def standing(out: Path) -> str:
    """A sentence that tells the user who stopped the training in a folder how far it got."""
    try:
        account = json.loads((out / ACCOUNT).read_text(encoding="utf-8"))
    # There is no account yet.
    except (OSError, ValueError):
        account = {}
    if account.get("complete") is False:
        return (
            f"the heads in {out} are trained and can be used, though not all figures are measured: "
            f"the same command measures what is missing"
        )
    return f"the same command goes on with what is in {out}"


@contextmanager
def _alone(out: Path) -> Iterator[None]:
    """Keeps other trainings out of a folder.

    Raises:
        KVPruneError: another training works there, or the folder cannot be written.
    """
    lock = FileLock(out / LOCK)
    try:
        lock.acquire(timeout=0)
    except Timeout as error:
        raise KVPruneError(
            f"{out}: another training writes there: expected one at a time. Wait for it, or name "
            f"another folder for the output"
        ) from error
    except (OSError, NotImplementedError) as error:
        raise KVPruneError(f"{out}: expected a folder that can be written ({error})") from error
    try:
        yield
    finally:
        lock.release()


def _check_model(model: Any) -> None:
    if any(p.is_inference() for p in model.parameters()):
        raise KVPruneError(
            "train: the model's weights were made in torch.inference_mode(), where nothing has a "
            "gradient: load it outside"
        )
    devices = devices_of(model)
    if len(devices) > 1 or is_offloaded(model):
        raise KVPruneError(
            f"train: expected a model with all of its weights on one device, got one on "
            f"{', '.join(sorted(map(str, devices)))}, or offloaded. Load it with "
            f"device_map={{'': 0}}"
        )
    head = model.get_output_embeddings()
    if head is None:
        raise KVPruneError(
            f"train: expected a model with a language-model head, got {type(model).__name__}: "
            f"load it with AutoModelForCausalLM"
        )


def _as_json(note: dict[str, Any]) -> dict[str, Any]:
    try:
        same: dict[str, Any] = json.loads(json.dumps(note))
    except (TypeError, ValueError) as error:
        raise KVPruneError(f"train: note: expected what JSON can hold, got {note!r}") from error
    return same


def _prepared(policy: SDTP, model: Any) -> SDTP:
    """The policy with a copy of its heads, ready to be trained for the model."""
    if not isinstance(policy, SDTP) or not isinstance(policy.heads, SDTPHeads):
        raise KVPruneError(
            f"train: expected a policy with heads: SDTP(untrained(model)), got {policy!r}"
        )
    if not any(policy.applies(layer) for layer in policy.heads.layers[: policy.stages]):
        raise KVPruneError(
            f"train: layers={policy.layers!r}: none of these has a stage: expected some of "
            f"{policy.heads.layers}, or None"
        )
    heads = copy.deepcopy(policy.heads).float().to(model.device).requires_grad_(True)
    policy = dataclasses.replace(policy, heads=heads).for_model(model)
    heads.configuration["fingerprint"] = fingerprint(model)
    return policy


def untrained(model: Any, seed: int = 0, **options: Any) -> SDTPHeads:
    """Heads with random weights for a model.

    Args:
        model: the model.
        seed: the seed of the weights.
        options: as for `SDTPHeads`; `query_heads` is 4 by default.
    """
    config = model.config.get_text_config(decoder=True)
    options.setdefault("query_heads", 4)
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        layers = getattr(config, "decoder_layers", config.num_hidden_layers)
        return SDTPHeads(config.hidden_size, layers, fingerprint=fingerprint(model), **options)


def _accelerator(mixed_precision: str | None) -> Any:
    from accelerate import Accelerator

    try:
        accelerator = Accelerator(mixed_precision=mixed_precision)
    # An unknown precision; or this process has used accelerate with another one.
    except ValueError as error:
        raise KVPruneError(f"train: mixed_precision={mixed_precision!r}: {error}") from error
    if accelerator.mixed_precision not in ("no", "bf16"):
        raise KVPruneError(
            f"train: mixed_precision={accelerator.mixed_precision!r}: expected 'no' or 'bf16'"
        )
    if accelerator.num_processes > 1:
        raise KVPruneError("train: expected one process; run it without `accelerate launch`")
    return accelerator


def _split(
    examples: Sequence[Example], apart: Sequence[Example] | None, options: Training
) -> tuple[Sequence[Example], Sequence[Example]]:
    """The examples to train on, and the examples to hold out."""
    different = list(dict.fromkeys(examples))
    if apart is not None:
        return _apart(different, list(dict.fromkeys(apart)))
    # The last examples, and not any: neighbours are of one text.
    held_out = different[-max(1, round(options.validation * len(different))) :]
    # All examples about a text that is held out are held out with it.
    texts = {_text(e) for e in held_out}
    parts = [[e for e in different if (_text(e) in texts) is there] for there in (False, True)]
    if not all(parts):
        raise KVPruneError(
            f"train: expected at least 2 different examples and validation below 1.0, got "
            f"{len(different)} and validation={options.validation}"
        )
    return parts[0], parts[1]


def _text(example: Example) -> tuple[int, ...]:
    """The text that an example is about: the tokens that it shares, or else its prompt."""
    return example.prompt[: example.shared or None]


def _apart(
    examples: Sequence[Example], held_out: Sequence[Example]
) -> tuple[Sequence[Example], Sequence[Example]]:
    both = set(examples) & set(held_out)
    if not examples or not held_out or both:
        raise KVPruneError(
            f"train: expected examples and others that are held out, got {len(examples)} and "
            f"{len(held_out)}, with {len(both)} in both"
        )
    return examples, held_out


def _check_examples(examples: Sequence[Example], policy: SDTP, vocabulary: int) -> None:
    least = max(policy.min_tokens, policy.sinks + 2)
    short = [e for e in examples if len(e.prompt) < least or not e.completion]
    if short:
        raise KVPruneError(
            f"train: expected prompts of at least {least} tokens (shorter ones are never pruned) "
            f"with a completion, got {len(short)} of {len(examples)} without, the first one of "
            f"{len(short[0].prompt)} + {len(short[0].completion)} tokens"
        )

    strange = [t for e in examples for t in (*e.prompt, *e.completion) if not 0 <= t < vocabulary]
    if strange:
        raise KVPruneError(
            f"train: expected tokens of 0 to {vocabulary - 1}, got {strange[0]}: the examples "
            f"were made with the tokenizer of another model"
        )


def _require(*packages: str) -> None:
    missing = [name for name in packages if importlib.util.find_spec(name) is None]
    if missing:
        raise KVPruneError(
            f"train: expected the packages {' and '.join(packages)}, but {' and '.join(missing)} "
            f"cannot be imported; mend it with: pip install kvprune[train]"
        )


@contextmanager
def _frozen(model: Any) -> Iterator[None]:
    """Attaches the model and freezes it, in eval mode; afterwards undoes this and moves it back."""
    attached = "_kvprune" in model.base_model.__dict__
    device = model.device
    wanted = [p for p in model.parameters() if p.requires_grad]
    attach(model).requires_grad_(False)
    try:
        with evaluating(model):
            yield
    finally:
        if not attached:
            detach(model)
        if model.device != device:
            model.to(device)
        for parameter in wanted:
            parameter.requires_grad_(True)
