"""The options of a training of SDTP's heads, and the two phases that follow from them."""

from __future__ import annotations

import math
from dataclasses import dataclass

from kvprune.errors import KVPruneError

from .targets import TARGETS


@dataclass(frozen=True)
class Training:
    """Options of a training; a weight of 0 switches a term off (paper, table 4).

    Args:
        marking_epochs: passes over the examples in the first phase, through the dense model.
        pruning_epochs: passes in the second phase, through the pruned model.
        listwise: the weight of the listwise loss, see `losses`; the paper has no such loss.
        ranking: the weight of the pairwise ranking loss (paper: 1).
        mse: the weight of the squared error against the standardised saliency (paper: 1).
        pruning_marks: the factor on these three weights in the second phase; 1 in the first.
        cross_entropy: the weight of the completion's cross-entropy in the pruned model.
        distillation: the weight of the completion's KL divergence from the dense model.
        pairs: how many pairs the ranking loss draws per stage; None for all.
        target: the kind of saliency, "removal" or the paper's "gradient"; see `targets`.
        signed: whether ranking loss and squared error are against the signed gradient instead of
            its magnitude. Needs `target="gradient"` and `listwise=0`, since the listwise loss
            takes no negative numbers.
        temperature: the temperature of the Gumbel noise on the scores, and of the relaxation.
        learning_rate: the highest learning rate of AdamW in the first phase.
        pruning_learning_rate: the highest learning rate in the second phase.
        weight_decay: the weight decay of AdamW.
        batch: examples per step, computed one after the other.
        validation: the share of the examples that is held out, the last ones, at least one.
        seed: the seed of the order, the initial weights and the noise.
        evaluate_every: steps from one measurement on held-out examples to the next, besides
            those at the end of each epoch; None for no others.
        checkpoint_every: steps from one checkpoint to the next.
        mixed_precision: "no" or "bf16", through accelerate; None for what accelerate is set up
            for. The heads are in float32 all the same. (The gradient of a gate is too large for
            float16.)

    Raises:
        KVPruneError: a number out of range, options that exclude each other, or nothing to learn
            from.
    """

    marking_epochs: int = 3
    pruning_epochs: int = 0
    listwise: float = 1.0
    ranking: float = 0.0
    mse: float = 0.0
    pruning_marks: float = 0.0
    cross_entropy: float = 1.0
    distillation: float = 1.0
    pairs: int | None = None
    target: str = "removal"
    signed: bool = False
    temperature: float = 0.5
    learning_rate: float = 1e-3
    pruning_learning_rate: float = 7e-4
    weight_decay: float = 0.01
    batch: int = 2
    validation: float = 0.05
    seed: int = 0
    evaluate_every: int | None = None
    checkpoint_every: int = 20
    mixed_precision: str | None = None

    def __post_init__(self) -> None:
        for name, least in _LEAST.items():
            value = getattr(self, name)
            kind = int if name in _COUNTS else int | float
            number = isinstance(value, kind) and not isinstance(value, bool)
            absent = name in ("pairs", "evaluate_every") and value is None
            if not absent and (not number or not least <= value < math.inf):
                whole = "whole number" if name in _COUNTS else "number"
                raise KVPruneError(
                    f"Training: {name}={value!r}: expected a {whole} of at least {least}"
                )
        if self.target not in TARGETS:
            raise KVPruneError(
                f"Training: target={self.target!r}: expected one of {tuple(TARGETS)}"
            )
        if self.signed and (self.target != "gradient" or self.listwise):
            raise KVPruneError(
                f"Training: signed=True with target={self.target!r} and listwise={self.listwise!r}:"
                f" expected target='gradient' and listwise=0, since nothing else has a sign"
            )
        if not any(phase.epochs for phase in phases(self)):
            raise KVPruneError(
                "Training: nothing to learn from: expected an epoch of marking with a weight of "
                "listwise, ranking or mse, or one of pruning with a weight of anything"
            )


_LEAST = {
    "marking_epochs": 0,
    "pruning_epochs": 0,
    "listwise": 0,
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
    "evaluate_every": 1,
    "pairs": 1,
}
_COUNTS = (
    "marking_epochs",
    "pruning_epochs",
    "batch",
    "seed",
    "checkpoint_every",
    "evaluate_every",
    "pairs",
)


@dataclass(frozen=True)
class Phase:
    """One phase of a training; `through_model` says whether it runs the pruned model."""

    name: str
    epochs: int
    learning_rate: float
    through_model: bool


def phases(options: Training) -> list[Phase]:
    """The two phases; a phase in which nothing has a weight has 0 epochs."""
    marks = max(options.listwise, options.ranking, options.mse) > 0
    model = options.cross_entropy > 0 or options.distillation > 0
    model = model or (marks and options.pruning_marks > 0)
    return [
        Phase("marking", options.marking_epochs * marks, options.learning_rate, False),
        Phase("pruning", options.pruning_epochs * model, options.pruning_learning_rate, True),
    ]
