"""The loop that trains SDTP's heads, and that goes on after it was killed; see `training`."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
import platform
import random
import sys
from collections.abc import Sequence
from contextlib import nullcontext
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor
from torch.nn import functional as F
from tqdm import tqdm

from kvprune.cache.composed import ComposedCache
from kvprune.errors import KVPruneError
from kvprune.files import write_text, write_whole
from kvprune.models.structure import decoder_layers

from .examples import Example
from .heads import SDTPHeads
from .losses import listwise_loss, ranking_loss
from .marks import Mark, Marks, standardised
from .options import Phase, Training, phases
from .policy import SDTP
from .shipped import fingerprint, weights_digest
from .simulation import PruningPass, simulated

CHECKPOINT = "checkpoint.pt"
ACCOUNT = "training.json"
CLIP = 1.0
WARM_UP = 20

_Scored = tuple[int, Tensor, Tensor]
"""A stage, the columns `[n]` of its tokens, and their scores."""


class Trainer:
    """One training.

    Args:
        model: the model, attached and frozen.
        policy: the policy with the heads that are trained.
        training: the examples to train on.
        held_out: the examples to measure by.
        marks: the marks of all these examples.
        options: the options of the training.
        out: the folder for heads, account and checkpoint.
        accelerator: accelerate's accelerator.
        progress: whether to draw bars.
    """

    def __init__(
        self,
        model: Any,
        policy: SDTP,
        training: Sequence[Example],
        held_out: Sequence[Example],
        marks: Marks,
        options: Training,
        out: Path,
        accelerator: Any,
        progress: bool,
    ) -> None:
        assert isinstance(policy.heads, SDTPHeads)
        self.model, self.policy, self.heads = model, policy, policy.heads
        self.training, self.held_out, self.marks = tuple(training), tuple(held_out), marks
        self.options, self.out, self.accelerator = options, out, accelerator
        self.progress = progress
        self.generator = torch.Generator()
        self.began = weights_digest(self.heads)
        self.metrics: list[dict[str, Any]] = []

    def run(self, note: dict[str, Any]) -> None:
        """Runs all phases, from the checkpoint on.

        The heads are written when the last step is done. Measuring them may take minutes, and
        a user who stops the training then has heads all the same.
        """
        at, state = self._resumed()
        if self.marks.keep_hidden and not state:
            self._mark_all()
        todo = [(n, phase) for n, phase in enumerate(phases(self.options)) if phase.epochs]
        for number, phase in todo:
            if number < at:
                continue
            optimizer = self._run_phase(number, phase, state if number == at else {})
            if (number, phase) == todo[-1]:
                self._write_heads(note, self._is_measured(phase, self._steps(phase)))
            self._measure(number, phase, self._steps(phase), optimizer)
        self.heads.eval()
        self._write_account(note, complete=True)

    def _write_heads(self, note: dict[str, Any], measured: bool) -> None:
        """Writes the trained heads; if they are still to be measured, the account says so."""
        self.heads.eval()
        self.heads.save_pretrained(self.out)
        self._write_account(note, complete=measured)
        if self.progress and not measured:
            tqdm.write(f"{self.out}: the heads are written; measuring them", file=sys.stderr)

    def _write_account(self, note: dict[str, Any], complete: bool) -> None:
        said = {**self._account(note), "complete": complete}
        write_text(self.out / ACCOUNT, json.dumps(said, indent=2) + "\n")

    def _mark_all(self) -> None:
        """Marks all examples before training, those that share a beginning one after another."""
        examples = sorted(self.training + self.held_out, key=lambda e: e.prompt[: e.shared])
        for example in tqdm(examples, desc="marks", disable=not self.progress):
            with self.accelerator.autocast():
                self.marks.ensure(example)

    def _steps(self, phase: Phase) -> int:
        return self._per_epoch * phase.epochs

    @property
    def _per_epoch(self) -> int:
        return math.ceil(len(self.training) / self.options.batch)

    def _run_phase(self, number: int, phase: Phase, state: dict[str, Any]) -> Any:
        """Runs the steps of a phase that are left, and measures along the way but not at the end.

        Returns:
            the optimizer, as the last step left it.
        """
        self.heads.train()
        optimizer = torch.optim.AdamW(
            self.heads.parameters(),
            lr=phase.learning_rate,
            weight_decay=self.options.weight_decay,
        )
        if state:
            optimizer.load_state_dict(state["optimizer"])
        steps, done = self._steps(phase), state.get("step", 0)
        bar = tqdm(total=steps, initial=done, desc=phase.name, disable=not self.progress)
        with bar:
            for step in range(done, steps):
                # Also right after a checkpoint: the training may have been stopped while measuring.
                if self._is_due(step, steps):
                    self._measure(number, phase, step, optimizer)
                self._set_rate(optimizer, phase.learning_rate, step, steps)
                place = divmod(step, self._per_epoch)
                bar.set_postfix(self._step(optimizer, number, phase, *place))
                bar.update()
                so_far = step + 1
                # The checkpoint comes before the measurement, so that no step has to be run again.
                if so_far % self.options.checkpoint_every == 0 or self._is_due(so_far, steps):
                    self._checkpoint(number, so_far, optimizer)
        return optimizer

    def _is_due(self, step: int, steps: int) -> bool:
        """Whether heads are measured after the first `step` of a phase's `steps` steps."""
        every = self.options.evaluate_every or steps
        return step > 0 and (step % self._per_epoch == 0 or step % every == 0)

    def _measure(self, number: int, phase: Phase, step: int, optimizer: Any) -> None:
        """Measures the heads after so many of a phase's steps, unless the figures are known."""
        if not self._is_measured(phase, step):
            self.metrics.append({"phase": phase.name, "step": step, **self._measured()})
            self._checkpoint(number, step, optimizer)

    def _is_measured(self, phase: Phase, step: int) -> bool:
        return any((m["phase"], m["step"]) == (phase.name, step) for m in self.metrics)

    def _set_rate(self, optimizer: Any, highest: float, step: int, steps: int) -> None:
        """Sets the learning rate: a short warm-up, then a cosine down to a fiftieth."""
        rising = min(1.0, (step + 1) / min(WARM_UP, steps))
        falling = 0.02 + 0.98 * (0.5 + 0.5 * math.cos(math.pi * step / steps))
        for group in optimizer.param_groups:
            group["lr"] = highest * rising * falling

    def _step(
        self, optimizer: Any, number: int, phase: Phase, epoch: int, place: int
    ) -> dict[str, float]:
        order = list(self.training)
        # The order follows from seed, phase and epoch, so that no checkpoint needs to hold it.
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

    def _weighed(self, terms: dict[str, Tensor], phase: Phase) -> Tensor:
        marks = self.options.pruning_marks if phase.through_model else 1.0
        shares = dict.fromkeys(("listwise", "ranking", "mse"), marks)
        weights = {name: getattr(self.options, name) * shares.get(name, 1.0) for name in terms}
        return torch.stack([weights[name] * term for name, term in terms.items()]).sum()

    def _terms(self, phase: Phase, example: Example) -> dict[str, Tensor]:
        """The losses that have a weight, each by the name of its weight."""
        if not phase.through_model:
            mark = self._marked(example)
            return self._against_marks(self._coming(mark), mark.saliency)
        run, terms = self._through_model(example)
        options = self.options
        marks = max(options.listwise, options.ranking, options.mse) > 0
        if marks and options.pruning_marks > 0:
            with self.accelerator.autocast():
                saliency = self.marks.saliency(example)
            terms |= self._against_marks(run, saliency)
        return terms

    def _marked(self, example: Example) -> Mark:
        with self.accelerator.autocast():
            return self.marks.of(example)

    def _coming(self, mark: Mark) -> PruningPass:
        """The tokens that come to each stage, as the dense model computes them, and their scores.

        The stages before decide which tokens come: a head is to tell apart the tokens that those
        leave.
        """
        run = PruningPass(self.policy, mark.hidden.shape[1], temperature=0.0)
        count = len(decoder_layers(self.model.base_model))
        for layer, hidden in zip(self.heads.layers, mark.hidden, strict=True):
            run.enter(layer, count, hidden[None])
        return run

    def _against_marks(self, run: PruningPass, saliency: Tensor) -> dict[str, Tensor]:
        """The losses of the scores of the tokens that came to each stage against their marks.

        A protected token stays whatever its score, so nothing is learned of it.
        """
        options, sinks = self.options, self.policy.sinks
        targets = standardised(saliency, sinks, options.signed)
        scored = [
            (score[free], saliency[s][columns[free]].abs(), targets[s][columns[free] - sinks])
            for (s, columns, score), free in zip(_scored(run), run.free, strict=True)
            if int(free.sum()) > 1
        ]
        losses: dict[str, list[Tensor]] = {
            "listwise": [listwise_loss(s, t) for s, t, _ in scored if options.listwise],
            "ranking": [
                ranking_loss(s, t, options.pairs, self.generator)
                for s, _, t in scored
                if options.ranking
            ],
            "mse": [F.mse_loss(s, t) for s, _, t in scored if options.mse],
        }
        # A zero that has a graph, for examples whose stages have nothing to order.
        nothing = torch.stack([score.sum() for score in run.scores]).sum() * 0.0
        return {
            name: torch.stack(each).mean() if each else nothing
            for name, each in losses.items()
            if getattr(options, name)
        }

    def _through_model(self, example: Example) -> tuple[PruningPass, dict[str, Tensor]]:
        """The example's way through the pruned model, and the losses of its completion."""
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
        """Logits of the completion, `[m, V]` float32, of the dense model or as `run` prunes it."""
        ids = torch.tensor([example.prompt + example.completion], device=self.model.device)
        asked = len(example.completion) + 1
        with (
            nullcontext() if run is None else simulated(self.model, run),
            self.accelerator.autocast(),
        ):
            logits = self.model(ids, use_cache=False, logits_to_keep=asked).logits
        return logits[0, :-1].float()

    @torch.no_grad()
    def _measured(self) -> dict[str, Any]:
        """Figures of the held-out examples: how well saliency is predicted, and the pruned loss."""
        self.heads.eval()
        found, losses = list[dict[str, list[float]]](), list[float]()
        for example in tqdm(
            self.held_out, desc="measuring", disable=not self.progress, leave=False
        ):
            found.append(self._agreement(self._marked(example)))
            losses.append(self._pruned_nll(example))
        self.heads.train()
        means = {
            name: [round(sum(s) / len(s), 4) for s in zip(*(f[name] for f in found), strict=True)]
            for name in found[0]
        }
        return {**means, "pruned_nll": round(sum(losses) / len(losses), 4)}

    def _pruned_nll(self, example: Example) -> float:
        """The mean loss of the completion's tokens, in the model as the policy prunes it."""
        cache = ComposedCache([self.policy])
        ids = torch.tensor([example.prompt + example.completion[:-1]], device=self.model.device)
        size, count = len(example.prompt), len(example.completion)
        logits = [self.model(ids[:, :size], past_key_values=cache, logits_to_keep=1).logits]
        if count > 1:
            rest: Any = {"past_key_values": cache, "logits_to_keep": count - 1}
            logits.append(self.model(ids[:, size:], **rest).logits)
        truth = torch.tensor(example.completion, device=self.model.device)
        return float(F.cross_entropy(torch.cat(logits, 1)[0].float(), truth))

    def _agreement(self, mark: Mark) -> dict[str, list[float]]:
        """The agreement of scores with saliency, by stage, with the sinks left out.

        "spearman" and "kendall" are rank correlations among the tokens that come to the stage.
        "recall" takes the most salient of all tokens, as many as the stage keeps, or as there are
        of any saliency: the share of them that the stage does keep.
        """
        from scipy.stats import kendalltau, spearmanr

        sinks, run = self.policy.sinks, self._coming(mark)
        targets = standardised(mark.saliency, sinks, self.options.signed).cpu()
        said: dict[str, list[float]] = {"spearman": [], "kendall": [], "recall": []}
        for (stage, columns, score), kept in zip(_scored(run), run.kept, strict=True):
            target = targets[stage]
            known = columns >= sinks
            score, there = score[known].float().cpu(), columns[known].cpu() - sinks
            kept = there[kept[known].cpu()]
            salient = int(mark.saliency[stage, sinks:].count_nonzero())
            top = target.topk(min(len(kept), salient)).indices
            for name, correlation in (("spearman", spearmanr), ("kendall", kendalltau)):
                value = float(correlation(score, target[there]).statistic)
                # NaN: too few tokens to have an order.
                said[name].append(0.0 if math.isnan(value) else value)
            said["recall"].append(float(torch.isin(top, kept).float().mean()))
        return said

    def _check_finite(self, said: dict[str, float], phase: Phase, epoch: int, place: int) -> None:
        if not all(math.isfinite(value) for value in said.values()):
            raise KVPruneError(
                f"train: the loss is not finite in phase {phase.name}, epoch {epoch}, step "
                f"{place}: {said}. Lower the learning rate, or load the model in float32; the "
                f"checkpoint in {self.out} is from before"
            )

    # Going on after the training was killed.

    @cached_property
    def _identity(self) -> dict[str, Any]:
        """The facts that must be the same for a training to go on, as JSON gives them back."""
        policy = {f.name: getattr(self.policy, f.name) for f in dataclasses.fields(self.policy)}
        del policy["heads"]
        policy["layers"] = None if self.policy.layers is None else sorted(self.policy.layers)
        identity = {
            "model": fingerprint(self.model),
            "weights": weights_digest(self.model),
            "dtype": str(self.model.dtype),
            "heads": self.heads.configuration,
            "initial_heads": self.began,
            "policy": policy,
            "options": dataclasses.asdict(self.options),
            "precision": self.accelerator.mixed_precision,
            "examples": _digest((self.training, self.held_out)),
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
        """The phase and the state of the checkpoint; phase 0 and nothing without a checkpoint."""
        path = self.out / CHECKPOINT
        if not path.exists():
            return 0, {}
        try:
            state = torch.load(path, map_location=self.model.device, weights_only=True)
            theirs = json.loads(state["identity"])
            other = [name for name, value in self._identity.items() if value != theirs.get(name)]
        except Exception as error:
            raise KVPruneError(
                f"{path}: expected a checkpoint of a training, got something else "
                f"({type(error).__name__}); remove it, or name another folder for the output"
            ) from error
        if other:
            raise KVPruneError(
                f"{path}: expected a checkpoint of this training, got one with another "
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


def _scored(run: PruningPass) -> list[_Scored]:
    return list(zip(run.stages, run.columns, run.scores, strict=True))


def _digest(examples: tuple[Sequence[Example], Sequence[Example]]) -> str:
    return hashlib.sha256(repr(examples).encode()).hexdigest()
