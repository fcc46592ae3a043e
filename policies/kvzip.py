"""KVzip (arXiv 2505.23416): what the model needs to repeat its prompt stays, for any question.

`kvprune.read` reads a prompt, and then a second time: behind the prompt the model is handed its own
prompt once more, chunk by chunk. A slot's score is the most that it is given there; see
`SecondReading` in `kvprune.statistics`. One budget is shared out over all layers and heads: the
best-scored slots of a row stay, wherever they are, and a row's first tokens in any case.

KVzip+ (arXiv 2601.07891), `plus=True`: a probability is multiplied by the norm of what the slot
writes, |W_o v|, and divided by the norm of the query's hidden state.

Where the sources differ:

* The paper's prompts and kvpress's read "Repeat the previous context exactly."; with
  `KVzip().for_tokenizer(tokenizer)` they are the same here; without, the prompt follows at once.
* kvpress takes the norm of the hidden state behind the layer's norm, which is about the same for
  all tokens. Here it is the state that enters the layer, as the paper writes it.
* A system prompt is no case of its own here: `sinks` tokens stay.
* kvpress masks what goes, and takes one row. Here memory is freed, of each row and head.
* Layers whose queries see a window (sliding or chunked attention) keep what is in it, and have no
  part in the budget.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from kvprune.errors import KVPruneError
from kvprune.policy import OneBudget, Ranking, SlotView, best_of_layers
from kvprune.statistics import SecondReading

_FIRST = "\n\nRepeat the previous context exactly."
_LATER = "\n\nRepeat the part of the previous context exactly, starting with"


@dataclass(frozen=True, repr=False)
class KVzip(OneBudget):
    """Keeps the slots that are looked at most while the prompt is repeated.

    Its prompt is read by `kvprune.read`; what `generate` reads behind it stays.

    Args:
        budget: how many of the repeated slots a head keeps, sinks included, as a mean over all
            layers and heads; tokens (int) or a share of the prompt (float).
        plus: whether what a slot writes counts (KVzip+).
        chunk: how many tokens are repeated at a time.
        sinks: how many of a row's first tokens stay.
        first: token ids of the instruction in front of the first chunk; None for those that
            `for_tokenizer` sets, or none. So are the next two.
        later: those in front of a later chunk.
        reply: token ids between an instruction and its chunk.
        when: "prompt" (at the end of each prompt that is read twice) or "first".
        layers: the layers that the policy works on; None for all.

    Raises:
        KVPruneError: a chunk below 1, sinks below 0, sinks that fill a budget in tokens, another
            `when`.
    """

    plus: bool = False
    chunk: int = 2048
    sinks: int = 4
    first: tuple[int, ...] | None = None
    later: tuple[int, ...] | None = None
    reply: tuple[int, ...] | None = None
    when: int | str | None = field(default="prompt", kw_only=True)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.when not in ("prompt", "first"):
            raise KVPruneError(
                f"KVzip: when={self.when!r}: expected 'prompt' or 'first', as it is asked where a "
                f"prompt was read a second time"
            )
        if type(self.plus) is not bool:
            raise KVPruneError(f"KVzip: plus={self.plus!r}: expected True or False")
        (reading,) = self.statistics
        if isinstance(self.budget, int) and self.budget <= reading.sinks:
            raise KVPruneError(
                f"KVzip: budget={self.budget} with sinks={self.sinks}: expected more tokens than "
                f"sinks, which stay in any case"
            )

    def for_tokenizer(self, tokenizer: Any) -> KVzip:
        """The policy that asks for the second reading as the paper does, in a model's chat form.

        What was given of `first`, `later` and `reply` stays.

        Args:
            tokenizer: the model's, as transformers has it.

        Raises:
            KVPruneError: no tokenizer, or one whose chat template does not show what is asked.
        """
        if not callable(getattr(tokenizer, "decode", None)):
            raise KVPruneError(
                f"KVzip: for_tokenizer({tokenizer!r}): expected the model's tokenizer, as "
                f"AutoTokenizer gives it"
            )

        def ids(text: str) -> tuple[int, ...]:
            return tuple(tokenizer.encode(text, add_special_tokens=False))

        reply = "\n"
        if getattr(tokenizer, "chat_template", None) is not None:
            mark = "kvprune-content"
            asked = [{"role": "user", "content": mark}]
            form = tokenizer.apply_chat_template(asked, add_generation_prompt=True, tokenize=False)
            if mark not in form:
                raise KVPruneError(
                    f"KVzip: the chat template of {type(tokenizer).__name__} does not repeat what "
                    f"it is given: expected one that does. Give reply=, the ids that begin a reply"
                )
            reply = form.partition(mark)[2]
        texts = {"first": _FIRST, "later": _LATER, "reply": reply}
        missing: Any = {n: ids(text) for n, text in texts.items() if getattr(self, n) is None}
        return replace(self, **missing)

    @property
    def statistics(self) -> tuple[SecondReading, ...]:
        """What slots are given in the second reading."""
        told = [() if ids is None else ids for ids in (self.first, self.later, self.reply)]
        return (SecondReading(self.chunk, self.sinks, self.plus, *told),)

    def rank_layers(self, layers: Sequence[SlotView]) -> list[Ranking | None]:
        """One ranking of all slots of a row, cut where its budget ends."""
        (reading,) = self.statistics
        shared = [view for view in layers if view.window is None]
        if not shared:
            return [None] * len(layers)
        scores = [view.statistic(reading) for view in shared]
        each = [self._of_layer(*one) for one in zip(shared, scores, strict=True)]
        stays, budgets = zip(*each, strict=True)
        found = iter(best_of_layers(shared, scores, stays, budgets))
        return [next(found) if view.window is None else None for view in layers]

    def _of_layer(self, view: SlotView, score: Tensor) -> tuple[Tensor, Tensor]:
        """What stays of a layer in any case, `[B, Hkv, S]`, and its part of the budget."""
        valid = view.valid.expand_as(score)
        # What was not repeated stays, and is no part of the budget.
        beside = valid & (score == torch.inf)
        budget = view.tokens(self.budget)[:, None].minimum((valid & ~beside).sum(-1))
        return beside | view.oldest(self.sinks), budget + beside.sum(-1)
