"""The model `kvprune` of lm-evaluation-harness; importing this module registers it there.

lm-eval's own Hugging Face model scores a context together with its continuation, in one dense
forward without a cache: a smaller cache would not change its scores. The model `kvprune` reads the
context with the policies' cache first, and then scores the continuation on what is left.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from itertools import zip_longest
from typing import Any

import torch
from lm_eval._cli.utils import key_val_to_dict
from lm_eval.api.registry import register_model
from lm_eval.models.huggingface import HFLM
from lm_eval.utils import hash_string
from tqdm import tqdm

import kvprune

from ...errors import KVPruneError
from ...policy.base import TokenPolicy
from ...storage.quantized import Quantized
from ..ledger.results import Cost
from ..measure.flops import Flops
from ..measure.likelihood import Contexts, read
from ..measure.watch import Watch

# The log-likelihood of a continuation, and whether greedy decoding would give it.
Answer = tuple[float, bool]
# The two texts by which lm-eval caches answers (None for a window of a text), then the token ids of
# the context and of the continuation.
Request = tuple[tuple[str, str] | None, list[int], list[int]]


@dataclass(frozen=True)
class _Question:
    """A context, and all continuations that are asked for behind it.

    Attributes:
        context: the token ids of the context.
        prompt_length: the number of tokens of which a budget given as a share is a share.
        numbers: the numbers of the requests.
        continuations: the token ids of each request's continuation.
    """

    context: tuple[int, ...]
    prompt_length: int
    numbers: list[int] = field(default_factory=list)
    continuations: list[list[int]] = field(default_factory=list)


@register_model("kvprune")
class KVPruneLM(HFLM):
    """lm-eval's Hugging Face model, reading through a `ComposedCache`.

    The cost of reading each context is in the results' `config`, under "kvprune": `results_of` (see
    `results.py`) makes results of it like those of `kvprune compare`.

    Args:
        pretrained: a name, a path or a model, as for lm-eval's `hf`.
        policies: a spec as `kvprune compare` takes it, such as "sdtp+h2o" (in `--model_args` it may
            hold commas in brackets; it may name a store), or a list of policies.
        more: lm-eval's own arguments for `hf`, all of which work.

    Raises:
        KVPruneError: no such policy, a policy that cannot work on the model, or a model whose
            family is not supported.
    """

    def __init__(
        self, pretrained: Any, policies: str | Sequence[TokenPolicy] = "dense", **more: Any
    ) -> None:
        self.policies, self.store, self.spec = _parsed(policies)
        self.label = policies if isinstance(policies, str) else self.spec
        super().__init__(pretrained, **more)
        self.policies = [policy.for_tokenizer(self.tokenizer) for policy in self.policies]
        kvprune.attach(self.model)
        self._check_policies()
        self._flops = Flops.measured(self.model)
        # The key is lm-eval's hash of the context's text: lm-eval's samples hold only this hash.
        self._costs: dict[str, Cost] = {}
        self._texts: list[str] = []

    @classmethod
    def create_from_arg_string(
        cls, arg_string: str, additional_config: dict[str, Any] | None = None
    ) -> Any:
        """Works as lm-eval's method does, but commas in brackets do not end an argument."""
        return cls.create_from_arg_obj(key_val_to_dict(arg_string), additional_config)

    def _check_policies(self) -> None:
        """Tries the policies now, so that an error does not come after an hour of other tasks."""
        again = [policy for policy in self.policies if policy.reads_again]
        if again:
            raise KVPruneError(
                f"lm-eval: {again[0]!r} reads each context a second time, which this harness does "
                f"not do: expected a policy that reads once. kvprune compare does"
            )
        read(self.model, kvprune.ComposedCache(self.policies, store=self.store), [[0]])

    def _loglikelihood_tokens(
        self,
        requests: Sequence[Request],
        disable_tqdm: bool = False,
        override_bs: int | None = None,
    ) -> list[Answer]:
        """The answer to each request, in the order of the requests."""
        answers: list[Any] = [None] * len(requests)
        silent = disable_tqdm or self.rank != 0
        with tqdm(total=len(requests), disable=silent, desc="Scoring behind contexts") as bar:
            for questions in self._batches(requests, override_bs):
                texts = [requests[q.numbers[0]][0] for q in questions]
                for number, answer in self._answers(questions, [t and t[0] for t in texts]):
                    answers[number] = answer
                    pair = requests[number][0]
                    if pair is not None:
                        self.cache_hook.add_partial("loglikelihood", pair, answer)
                    bar.update()
        return answers

    def _batches(
        self, requests: Sequence[Request], override_bs: int | None
    ) -> Iterator[list[_Question]]:
        """Batches of questions: each context once, the longest first."""
        questions: dict[tuple[tuple[int, ...], int], _Question] = {}
        for number, (_, context, continuation) in enumerate(requests):
            cut = self._cut(context, continuation)
            # A context's last token is no part of its prompt (see `measure/reading.py`). A context
            # that is only a start token has no prompt: a share is then one of the token and its
            # continuation.
            length = len(cut) - 1 if len(cut) > 1 else 1 + len(continuation)
            question = questions.setdefault((cut, length), _Question(cut, length))
            question.numbers.append(number)
            question.continuations.append(continuation)
        ordered = sorted(questions.values(), key=lambda q: (-len(q.context), q.context))
        rows = self._rows(override_bs) if ordered else 1
        for start in range(0, len(ordered), rows):
            yield ordered[start : start + rows]

    def _cut(self, context: list[int], continuation: list[int]) -> tuple[int, ...]:
        """The context, cut on its left if the model could not read it all with the continuation.

        Raises:
            KVPruneError: an empty continuation, or one longer than the model can read.
        """
        # The model does not read the continuation's last token, hence one token more.
        room = self.max_length + 1 - len(continuation)
        if room < 1 or not continuation:
            raise KVPruneError(
                f"expected a continuation of 1 to {self.max_length} tokens (max_length), got one "
                f"of {len(continuation)}"
            )
        return tuple(context[-room:])

    def _rows(self, override_bs: int | None) -> int:
        """The number of contexts in a batch."""
        if self.batch_size != "auto":
            return int(self.batch_size)
        return override_bs or int(self._detect_batch_size())

    def _answers(
        self, questions: Sequence[_Question], texts: Sequence[str | None]
    ) -> Iterator[tuple[int, Answer]]:
        """The number of each request with its answer; every context is read once."""
        cache = kvprune.ComposedCache(self.policies, store=self.store)
        lengths = [q.prompt_length for q in questions]
        with self._precision():
            with Watch(self.model, cache, len(questions[0].context)) as watch:
                contexts = read(self.model, cache, [q.context for q in questions], lengths)
            self._note(texts, watch)
            yield from self._scored(contexts, questions)

    def _scored(
        self, contexts: Contexts, questions: Sequence[_Question]
    ) -> Iterator[tuple[int, Answer]]:
        """The number of each request with its answer, behind contexts that were read."""
        # All questions are scored at once, the next continuation of each. A question that has no
        # more gets an empty continuation, whose score is dropped.
        numbers = zip_longest(*(q.numbers for q in questions))
        continuations = zip_longest(*(q.continuations for q in questions), fillvalue=[])
        for row_numbers, row_texts in zip(numbers, continuations, strict=True):
            scores = contexts.score(row_texts, self._log_softmax)
            yield from (
                (n, score) for n, score in zip(row_numbers, scores, strict=True) if n is not None
            )

    def _log_softmax(self, logits: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.log_softmax(logits, dim=-1, dtype=self.softmax_dtype)

    def _precision(self) -> Any:
        """The autocast context in which lm-eval itself calls the model."""
        mixed = self.mixed_precision_dtype
        return torch.autocast(self.device.type, dtype=mixed, enabled=mixed is not None)

    def tok_batch_encode(self, strings: list[str], *args: Any, **more: Any) -> Any:
        """Encodes as lm-eval does, and notes the texts: lm-eval generates from them next."""
        self._texts = list(strings)
        return super().tok_batch_encode(strings, *args, **more)

    def _model_generate(
        self, context: torch.Tensor, max_length: int, stop: list[str], **options: Any
    ) -> Any:
        cache = kvprune.ComposedCache(self.policies, store=self.store)
        with Watch(self.model, cache, context.shape[1]) as watch:
            said = super()._model_generate(
                context, max_length, stop, past_key_values=cache, **options
            )
        self._note(self._texts, watch)
        return said

    def _note(self, texts: Sequence[str | None], watch: Watch) -> None:
        """Keeps the cost of reading each context; a window of a text (None) is no context."""
        costs = watch.costs(self._flops, len(texts))
        for text, cost in zip(texts, costs, strict=True):
            if text is not None:
                self._costs[hash_string(text)] = cost

    def get_model_info(self) -> dict[str, Any]:
        """lm-eval's information, and under "kvprune" the policies and the cost of each context."""
        costs = {text: asdict(cost) for text, cost in self._costs.items()}
        mine = {"model": self.model.name_or_path, "policy": self.spec, "label": self.label}
        return {**super().get_model_info(), "kvprune": {**mine, "costs": costs}}


def _parsed(
    policies: str | Sequence[TokenPolicy],
) -> tuple[Sequence[TokenPolicy], Quantized | None, str]:
    """The policies, a store, and a spec: canonical if one was given, else made of reprs."""
    if not isinstance(policies, str):
        return list(policies), None, " + ".join(map(repr, policies)) or "dense"
    from ..specs import cache_of, canonical

    found = cache_of(policies)
    return found.policies, found.store, canonical(found.policies, found.store)
