"""Trains SDTP's heads for a frozen model (paper, section 3.3).

Two phases. In the first, heads learn the saliency of the marking pass from what the dense model's
layers are handed. In the second, the model runs pruned by the heads (see `simulation`), and the
loss of the answer reaches them too. It is off by default: as it stands it made heads worse.
"""

from __future__ import annotations

import copy
import dataclasses
import hashlib
import importlib.util
import json
import math
import platform
import random
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor
from torch.nn import functional as F
from tqdm import tqdm

from kvprune.attach import attach, detach
from kvprune.errors import KVPruneError
from kvprune.families import check_family
from kvprune.files import write_text, write_whole

from .examples import Example
from .heads import SDTPHeads
from .losses import ranking_loss
from .marks import TARGETS, Mark, Marks, standardised
from .policy import SDTP
from .saliency import evaluating
from .shipped import fingerprint, weights_digest
from .simulation import PruningPass, simulated

CHECKPOINT = "checkpoint.pt"
CLIP = 1.0
WARM_UP = 20


@dataclass(frozen=True)
class Training:
    """How heads are trained; a weight of 0 switches a term off (paper, table 4).

    Args:
        marking_epochs: passes over the examples in the first phase, through the dense model.
        pruning_epochs: passes in the second, through the pruned model.
        ranking: weight of the pairwise ranking loss.
        mse: weight of the squared error against the standardised saliency.
        pruning_marks: what both of these weigh in the second phase, against 1 in the first.
        cross_entropy: weight of the completion's cross-entropy in the pruned model.
        distillation: weight of the completion's KL divergence from the dense model.
        pairs: pairs that the ranking loss draws per stage; None for all.
        target: what saliency is, "attention" or the paper's "gradient"; see `Marks`.
        signed: learn the signed saliency instead of its magnitude.
        temperature: of the Gumbel noise on the scores, and of the relaxation.
        learning_rate, pruning_learning_rate: AdamW's, at their highest, in each phase.
        weight_decay: AdamW's.
        batch: examples per step, one after the other.
        validation: the share of the examples that is held out, at least one.
        seed: of the split, the order, the initial weights and the noise.
        checkpoint_every: steps.
        mixed_precision: "no" or "bf16", through accelerate; None for what that is set up for. The
            heads are in float32 all the same. (The gradient of a gate is too large for float16.)

    Raises:
        KVPruneError: a number out of range, or nothing to learn from.
    """

    marking_epochs: int = 1
    pruning_epochs: int = 0
    ranking: float = 1.0
    mse: float = 0.3
    pruning_marks: float = 0.0
    cross_entropy: float = 1.0
    distillation: float = 1.0
    pairs: int | None = None
    target: str = "attention"
    signed: bool = False
    temperature: float = 0.5
    learning_rate: float = 1e-3
    pruning_learning_rate: float = 7e-4
    weight_decay: float = 0.01
    batch: int = 2
    validation: float = 0.05
    seed: int = 0
    checkpoint_every: int = 20
    mixed_precision: str | None = None

    def __post_init__(self) -> None:
        for name, least in _LEAST.items():
            value = getattr(self, name)
            kind = int if name in _COUNTS else int | float
            number = isinstance(value, kind) and not isinstance(value, bool)
            drawn = name == "pairs" and value is None
            if not drawn and (not number or not least <= value < math.inf):
                whole = "whole number" if name in _COUNTS else "number"
                raise KVPruneError(
                    f"Training: {name}={value!r}: expected a {whole} of at least {least}"
                )
        if self.target not in TARGETS:
            raise KVPruneError(f"Training: target={self.target!r}: expected one of {TARGETS}")
        if not any(phase.epochs for phase in _phases(self)):
            raise KVPruneError(
                "Training: nothing to learn from: expected an epoch of marking with a weight of "
                "ranking or mse, or one of pruning with a weight of anything"
            )


_LEAST = {
    "marking_epochs": 0,
    "pruning_epochs": 0,
    "ranking": 0,
    "mse": 0,
    "pruning_marks": 0,
    "cross_entropy": 0,
    "distillation": 0,
    "temperature": 0,
    "learning_rate": 0,
    "pruning_learning_rate": 0,
    "weight_decay": 0,
    "batch": 1,
    "validation": 0,
    "seed": 0,
    "checkpoint_every": 1,
    "pairs": 1,
}
_COUNTS = ("marking_epochs", "pruning_epochs", "batch", "seed", "checkpoint_every", "pairs")


@dataclass(frozen=True)
class _Phase:
    name: str
    epochs: int
    learning_rate: float
    through_model: bool


def _phases(options: Training) -> list[_Phase]:
    marks = options.ranking > 0 or options.mse > 0
    model = options.cross_entropy > 0 or options.distillation > 0
    model = model or (marks and options.pruning_marks > 0)
    return [
        _Phase("marking", options.marking_epochs * marks, options.learning_rate, False),
        _Phase("pruning", options.pruning_epochs * model, options.pruning_learning_rate, True),
    ]


def train(
    model: Any,
    examples: Sequence[Example],
    out: str | Path,
    options: Training | None = None,
    policy: SDTP | None = None,
    marks: str | Path | None = None,
    keep_hidden: bool = False,
    progress: bool = True,
    note: dict[str, Any] | None = None,
) -> SDTPHeads:
    """Trains heads for a model, which stays as it is, bit for bit.

    Can be killed at any moment and called again with the same arguments: it goes on from the last
    checkpoint in `out`, to the same weights.

    Args:
        model: a transformers model with a language-model head, of a family that can be pruned.
        examples: see `read_examples`.
        out: a folder for the heads (`SDTPHeads.from_pretrained(out)`), `training.json` (what was
            done and measured) and the checkpoint.
        options: how.
        policy: the schedule to train for, with the heads to begin with, which stay as they are;
            None for the paper's, with untrained heads that have a low-rank term.
        marks: a folder for marked examples that outlives this training; None for one in `out`.
        keep_hidden: keep what enters the stages' layers there as well, on which the first phase
            trains: stages times prompt tokens times C numbers per example; see `Marks`.
        progress: whether to draw a bar with the losses.
        note: what else `training.json` should say, such as where the data comes from.

    Returns:
        the trained heads, on the model's device.

    Raises:
        KVPruneError: accelerate or scipy is missing, the family is not supported, too few
            examples or ones whose prompts are too short, a checkpoint of another training, a
            loss that is not finite, or a file that cannot be written.
    """
    check_family(model)
    _require("accelerate", "scipy")
    options = options or Training()
    with _frozen(model):
        folder = Path(marks or Path(out) / "marks")
        trainer = _Trainer(
            model, examples, Path(out), options, policy, folder, keep_hidden, progress
        )
        trainer.run(note or {})
    return trainer.heads.to(model.device)


def untrained(model: Any, seed: int = 0, **options: Any) -> SDTPHeads:
    """Heads for a model with random weights; `options` as for `SDTPHeads`."""
    config = model.config.get_text_config(decoder=True)
    options.setdefault("query_heads", 4)
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        return SDTPHeads(
            config.hidden_size, config.num_hidden_layers, fingerprint=fingerprint(model), **options
        )


_Scored = tuple[int, Tensor, Tensor]
"""A stage, the columns of tokens `[n]`, and their scores."""


class _Trainer:
    def __init__(
        self,
        model: Any,
        examples: Sequence[Example],
        out: Path,
        options: Training,
        policy: SDTP | None,
        marks: Path,
        keep_hidden: bool,
        progress: bool,
    ) -> None:
        self.options, self.out, self.progress = options, out, progress
        self.accelerator = _accelerator(options.mixed_precision)
        self.model = (
            model if model.device == self.accelerator.device else model.to(self.accelerator.device)
        )
        policy = policy or SDTP(untrained(model, options.seed))
        _check_examples(examples, policy)
        self.training, self.held_out = _split(examples, options)
        self.heads = self._prepared(policy)
        self.policy = dataclasses.replace(policy, heads=self.heads)
        _make(out)
        self.marks = Marks(self.model, self.heads.layers, marks, options.target, keep_hidden)
        _make(self.marks.folder)
        self.generator = torch.Generator()
        self.metrics: list[dict[str, Any]] = []

    def _prepared(self, policy: SDTP) -> SDTPHeads:
        """The policy's heads, ready to be trained for the model."""
        if policy.heads is None:
            raise KVPruneError("train: expected a policy with heads: SDTP(untrained(model))")
        heads = copy.deepcopy(policy.heads).float().to(self.accelerator.device)
        heads.requires_grad_(True)
        dataclasses.replace(policy, heads=heads).for_model(self.model)
        heads.configuration["fingerprint"] = fingerprint(self.model)
        return heads

    def run(self, note: dict[str, Any]) -> None:
        """All phases, from the checkpoint on; then writes the heads and what was done."""
        at, state = self._resumed()
        for number, phase in enumerate(_phases(self.options)):
            if number >= at and phase.epochs:
                self._run_phase(number, phase, state if number == at else {})
        self.heads.eval()
        self.heads.save_pretrained(self.out)
        write_text(self.out / "training.json", json.dumps(self._account(note), indent=2) + "\n")

    def _run_phase(self, number: int, phase: _Phase, state: dict[str, Any]) -> None:
        self.heads.train()
        optimizer = torch.optim.AdamW(
            self.heads.parameters(),
            lr=phase.learning_rate,
            weight_decay=self.options.weight_decay,
        )
        if state:
            optimizer.load_state_dict(state["optimizer"])
        per_epoch = math.ceil(len(self.training) / self.options.batch)
        steps, done = per_epoch * phase.epochs, state.get("step", 0)
        bar = tqdm(total=steps, initial=done, desc=phase.name, disable=not self.progress)
        for step in range(done, steps):
            self._set_rate(optimizer, phase.learning_rate, step, steps)
            bar.set_postfix(self._step(optimizer, number, phase, *divmod(step, per_epoch)))
            bar.update()
            if (step + 1) % per_epoch == 0:
                self.metrics.append(
                    {"phase": phase.name, "step": step + 1, **self._measured(phase)}
                )
            if (step + 1) % self.options.checkpoint_every == 0 or step + 1 == steps:
                self._checkpoint(number, step + 1, optimizer)
        bar.close()

    def _set_rate(self, optimizer: Any, highest: float, step: int, steps: int) -> None:
        """A short warm-up, then a cosine down to a fiftieth."""
        rising = min(1.0, (step + 1) / min(WARM_UP, steps))
        falling = 0.02 + 0.98 * (0.5 + 0.5 * math.cos(math.pi * step / steps))
        for group in optimizer.param_groups:
            group["lr"] = highest * rising * falling

    def _step(
        self, optimizer: Any, number: int, phase: _Phase, epoch: int, place: int
    ) -> dict[str, float]:
        order = list(self.training)
        # A function of where it stands, so that nothing of it needs to be kept to go on.
        random.Random(f"{self.options.seed} {number} {epoch}").shuffle(order)
        batch = order[place * self.options.batch :][: self.options.batch]
        said: dict[str, float] = {}
        for row, example in enumerate(batch):
            self.generator.manual_seed(
                random.Random(f"{self.options.seed} {number} {epoch} {place} {row}").getrandbits(48)
            )
            terms = self._terms(phase, example)
            loss = self._weighed(terms, phase)
            (loss / len(batch)).backward()
            for name, term in terms.items():
                said[name] = said.get(name, 0.0) + float(term.detach()) / len(batch)
        norm = torch.nn.utils.clip_grad_norm_(self.heads.parameters(), CLIP)
        said["gradient"] = float(norm)
        self._check_finite(said, phase, epoch, place)
        optimizer.step()
        optimizer.zero_grad()
        return said

    def _weighed(self, terms: dict[str, Tensor], phase: _Phase) -> Tensor:
        marks = self.options.pruning_marks if phase.through_model else 1.0
        shares = {"ranking": marks, "mse": marks}
        weights = {name: getattr(self.options, name) * shares.get(name, 1.0) for name in terms}
        return torch.stack([weights[name] * term for name, term in terms.items()]).sum()

    def _terms(self, phase: _Phase, example: Example) -> dict[str, Tensor]:
        """The losses that have a weight, by the names of those."""
        if not phase.through_model:
            mark = self._marked(example)
            return self._against_marks(self._whole(mark), mark.saliency)
        run, terms = self._through_model(example)
        marks = self.options.ranking > 0 or self.options.mse > 0
        if marks and self.options.pruning_marks > 0:
            saliency = self.marks.saliency(example)
            scored = zip(run.stages, run.columns, run.scores, strict=True)
            terms |= self._against_marks(list(scored), saliency)
        return terms

    def _marked(self, example: Example) -> Mark:
        with self.accelerator.autocast():
            return self.marks.of(example)

    def _whole(self, mark: Mark) -> list[_Scored]:
        """What the heads make of all tokens, with nothing pruned."""
        columns = torch.arange(mark.hidden.shape[1], device=mark.hidden.device)
        heads = self.heads
        return [
            (s, columns, heads(x[None], columns[None], s)[0]) for s, x in enumerate(mark.hidden)
        ]

    def _against_marks(self, scored: list[_Scored], saliency: Tensor) -> dict[str, Tensor]:
        """By how much the tokens that came to each stage are scored otherwise than marked."""
        options, sinks = self.options, self.policy.sinks
        targets = standardised(saliency, sinks, options.signed)
        pairs = [(s[c >= sinks], targets[i][c[c >= sinks] - sinks]) for i, c, s in scored]
        terms = {}
        if options.ranking > 0:
            losses = [ranking_loss(s, t, options.pairs, self.generator) for s, t in pairs]
            terms["ranking"] = torch.stack(losses).mean()
        if options.mse > 0:
            terms["mse"] = torch.stack([F.mse_loss(s, t) for s, t in pairs]).mean()
        return terms

    def _through_model(self, example: Example) -> tuple[PruningPass, dict[str, Tensor]]:
        options = self.options
        run = PruningPass(self.policy, len(example.prompt), options.temperature, self.generator)
        logits = self._logits(example, run)
        truth = torch.tensor(example.completion, device=logits.device)
        terms = {}
        if options.cross_entropy > 0:
            terms["cross_entropy"] = F.cross_entropy(logits, truth)
        if options.distillation > 0:
            with torch.no_grad():
                dense = self._logits(example)
            terms["distillation"] = F.kl_div(
                logits.log_softmax(-1),
                dense.log_softmax(-1),
                log_target=True,
                reduction="batchmean",
            )
        return run, terms

    def _logits(self, example: Example, run: PruningPass | None = None) -> Tensor:
        """Logits of the completion's tokens, `[m, V]` float32, in the dense or pruned model."""
        ids = torch.tensor([example.prompt + example.completion], device=self.model.device)
        asked = len(example.completion) + 1
        with (
            nullcontext() if run is None else simulated(self.model, run),
            self.accelerator.autocast(),
        ):
            logits = self.model(ids, use_cache=False, logits_to_keep=asked).logits
        return logits[0, :-1].float()

    @torch.no_grad()
    def _measured(self, phase: _Phase) -> dict[str, Any]:
        """On the held-out examples: how well saliency is predicted, and the pruned loss."""
        self.heads.eval()
        found: list[dict[str, list[float]]] = []
        losses: list[float] = []
        for example in self.held_out:
            mark = self._marked(example)
            found.append(self._agreement(self._whole(mark), mark))
            if phase.through_model:
                logits = self._logits(example, PruningPass(self.policy, len(example.prompt), 0.0))
                truth = torch.tensor(example.completion, device=logits.device)
                losses.append(float(F.cross_entropy(logits, truth)))
        self.heads.train()
        means = {
            name: [round(sum(s) / len(s), 4) for s in zip(*(f[name] for f in found), strict=True)]
            for name in found[0]
        }
        return {**means, **({"pruned_nll": sum(losses) / len(losses)} if losses else {})}

    def _agreement(self, scored: list[_Scored], mark: Mark) -> dict[str, list[float]]:
        """Per stage, the sinks left out: rank correlations, and the share of the top found."""
        from scipy.stats import kendalltau, spearmanr

        sinks = self.policy.sinks
        targets = standardised(mark.saliency, sinks, self.options.signed).cpu()
        said: dict[str, list[float]] = {"spearman": [], "kendall": [], "recall": []}
        for (stage, _, score), target in zip(scored, targets, strict=True):
            score = score[sinks:].float().cpu()
            count = max(round(self.policy.share ** (stage + 1) * len(score)), 1)
            top = (set(x.topk(count).indices.tolist()) for x in (score, target))
            said["spearman"].append(float(spearmanr(score, target).statistic))
            said["kendall"].append(float(kendalltau(score, target).statistic))
            said["recall"].append(len(set.intersection(*top)) / count)
        return said

    def _check_finite(self, said: dict[str, float], phase: _Phase, epoch: int, place: int) -> None:
        if not all(math.isfinite(value) for value in said.values()):
            raise KVPruneError(
                f"train: the loss is not finite in phase {phase.name}, epoch {epoch}, step "
                f"{place}: {said}. Lower the learning rate, or load the model in float32; the "
                f"checkpoint in {self.out} is from before"
            )

    # Going on after being killed.

    @cached_property
    def _identity(self) -> dict[str, Any]:
        """What must be the same for a training to go on, as JSON gives it back."""
        policy = {f.name: getattr(self.policy, f.name) for f in dataclasses.fields(self.policy)}
        del policy["heads"]
        identity = {
            "model": fingerprint(self.model),
            "weights": weights_digest(self.model),
            "dtype": str(self.model.dtype),
            "heads": self.heads.configuration,
            "policy": policy,
            "options": dataclasses.asdict(self.options),
            "examples": _digest(self.training + self.held_out),
        }
        same: dict[str, Any] = json.loads(json.dumps(identity))
        return same

    def _checkpoint(self, number: int, step: int, optimizer: Any) -> None:
        state = {
            "identity": json.dumps(self._identity),
            "phase": number,
            "step": step,
            "heads": self.heads.state_dict(),
            "optimizer": optimizer.state_dict(),
            "metrics": json.dumps(self.metrics),
        }
        write_whole(self.out / CHECKPOINT, lambda scratch: torch.save(state, scratch))

    def _resumed(self) -> tuple[int, dict[str, Any]]:
        """The phase that the checkpoint is of, and its state; at the start without one."""
        path = self.out / CHECKPOINT
        if not path.exists():
            return 0, {}
        try:
            state = torch.load(path, map_location=self.model.device, weights_only=True)
            theirs = json.loads(state["identity"])
            other = [name for name, value in self._identity.items() if value != theirs.get(name)]
        except Exception as error:
            raise KVPruneError(
                f"{path}: expected a checkpoint of a training, came something else "
                f"({type(error).__name__}); remove it, or name another folder for the output"
            ) from error
        if other:
            raise KVPruneError(
                f"{path}: expected a checkpoint of this training, came one with another "
                f"{' and '.join(other)}. Name another folder for the output, or remove the file"
            )
        self.heads.load_state_dict(state["heads"])
        self.metrics = json.loads(state["metrics"])
        return state["phase"], state

    def _account(self, note: dict[str, Any]) -> dict[str, Any]:
        versions = {"torch": torch.__version__, "transformers": transformers.__version__}
        return {
            **note,
            **self._identity,
            "split": {"training": len(self.training), "held_out": len(self.held_out)},
            "versions": {**versions, "python": platform.python_version()},
            "metrics": self.metrics,
        }


def _accelerator(mixed_precision: str | None) -> Any:
    from accelerate import Accelerator

    try:
        accelerator = Accelerator(mixed_precision=mixed_precision)
    # Not a known one; or this process has used accelerate with another.
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
    examples: Sequence[Example], options: Training
) -> tuple[tuple[Example, ...], tuple[Example, ...]]:
    """What is trained on, and what is held out."""
    shuffled = list(dict.fromkeys(examples))
    random.Random(options.seed).shuffle(shuffled)
    held_out = max(1, round(options.validation * len(shuffled)))
    if held_out >= len(shuffled):
        raise KVPruneError(
            f"train: expected at least 2 different examples and validation below 1.0, came "
            f"{len(shuffled)} and validation={options.validation}"
        )
    return tuple(shuffled[held_out:]), tuple(shuffled[:held_out])


def _check_examples(examples: Sequence[Example], policy: SDTP) -> None:
    least = max(policy.min_tokens, policy.sinks + 2)
    short = [e for e in examples if len(e.prompt) < least or not e.completion]
    if short:
        raise KVPruneError(
            f"train: expected prompts of at least {least} tokens (shorter ones are never pruned) "
            f"with a completion, came {len(short)} of {len(examples)} without, the first one of "
            f"{len(short[0].prompt)} + {len(short[0].completion)} tokens"
        )


def _digest(examples: Sequence[Example]) -> str:
    return hashlib.sha256(repr(examples).encode()).hexdigest()


def _make(folder: Path) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise KVPruneError(f"{folder}: expected a folder that can be written ({error})") from error


def _require(*packages: str) -> None:
    missing = [name for name in packages if importlib.util.find_spec(name) is None]
    if missing:
        raise KVPruneError(
            f"train: expected the packages {' and '.join(packages)}, but {' and '.join(missing)} "
            f"cannot be imported; mend it with: pip install kvprune[train]"
        )


@contextmanager
def _frozen(model: Any) -> Iterator[None]:
    """Attached, in eval mode and without gradients; afterwards as it was, and where it was."""
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
