"""A cache and its model: whether the policies work on it, and the layers that the cache gets."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from ..errors import KVPruneError
from ..models.attachment import Attachment
from ..models.families import hands_on_what_is_stored, head_sizes
from ..models.fingerprint import described
from ..models.releases import LinearAttentionLayer
from ..models.structure import base_of, unwrapped
from ..policy.base import TokenPolicy
from ..policy.checks import checked
from ..policy.composition import judges_apart, leaves, wanted_at
from ..positions.inside import positions_for
from ..positions.rotary import Rotation, limit_of, query_rotations
from ..statistics import Statistic, parts_of
from ..storage.layer import SlotLayer
from ..storage.plain import Plain
from ..storage.quantized import Quantized
from .state import CacheState


@dataclass(frozen=True)
class Binding:
    """The model that a cache is tied to.

    attachment: the model, as caches know it.
    policies: what the cache's policies are on the model; see `TokenPolicy.for_model`.
    reads: what the statistics of any layer read; see `Statistic`.
    rotations: of queries, by layer; empty where nobody reads them before rotation.
    limit: the position from which on the model turns queries by other frequencies; None if never.
    model: what the model was when the cache was tied to it, for files; see
        `models.fingerprint.described`.
    """

    attachment: Attachment
    policies: tuple[TokenPolicy, ...]
    model: dict[str, str]
    reads: frozenset[str] = frozenset()
    rotations: tuple[Rotation, ...] = ()
    limit: int | None = None


def bind(
    policies: Sequence[TokenPolicy],
    observe: tuple[Statistic, ...],
    store: Quantized | None,
    attachment: Attachment,
    base: torch.nn.Module,
) -> tuple[Binding, CacheState]:
    """Ties a cache to a model, and makes its empty layers.

    Args:
        policies: of the cache.
        observe: statistics that are wanted beside those of the policies.
        store: how keys and values are held; None for as the model made them.
        attachment: the model's.
        base: the model that has the decoder layers.

    Raises:
        KVPruneError: a policy, or the store, cannot work on the model.
    """
    if store is not None:
        store.check_sizes(head_sizes(base))
    for policy in leaves(policies):
        _check_layers(policy, attachment)
        _check_prunes(policy, attachment)
        _check_across(policy, attachment)
        _check_reads_again(policy, attachment)
    _check_queries(observe, "observe", attachment)
    working = checked([policy.for_model(base) for policy in policies])
    # What some policies observe depends on what they found for the model.
    for policy in leaves(working):
        _check_queries(policy.statistics, repr(policy), attachment)
    _check_survival(working, observe)
    _check_judged(working)
    positions = positions_for(working, base, attachment.memory, rewritable=store is None)
    direct = hands_on_what_is_stored(base)
    layers: list[SlotLayer | LinearAttentionLayer] = []
    for index in range(attachment.num_layers):
        if attachment.states and attachment.states[index]:
            layers.append(LinearAttentionLayer(number_of_states=attachment.states[index]))
            continue
        local = attachment.local[index] if attachment.local else None
        statistics = tuple(dict.fromkeys(wanted_at(working, index) + parts_of(observe)))
        arrivals = positions is not None and positions.keeps_arrivals(index)
        divides = any(policy.evicts and policy.applies(index) for policy in working)
        layers.append(SlotLayer(statistics, local, arrivals, store or Plain, direct, divides))
    model = described(base, attachment.memory)
    slot_layers = [layer for layer in layers if isinstance(layer, SlotLayer)]
    parts = (part for layer in slot_layers for part in (*layer.parts, *layer.layer_parts))
    binding = Binding(attachment, working, model, frozenset(part.reads for part in parts))
    if binding.reads & {"unrotated", "rotations"}:
        if "query rotations" not in attachment.memory:
            attachment.memory["query rotations"] = tuple(query_rotations(base))
        rotations = attachment.memory["query rotations"]
        binding = replace(binding, rotations=rotations, limit=limit_of(base))
    return binding, CacheState(layers, positions)


def attached(model: torch.nn.Module, what: str) -> tuple[Attachment, Any]:
    """The attachment of a model, and its base model.

    Args:
        model: any model.
        what: who asks, for the error.

    Raises:
        KVPruneError: kvprune is not attached to it.
    """
    inner = unwrapped(model)
    base: Any = base_of(inner) if hasattr(inner, "base_model") else inner
    attachment = getattr(base, "__dict__", {}).get("_kvprune")
    if attachment is None:
        raise KVPruneError(
            f"{what}: expected a model that kvprune is attached to, got "
            f"{type(model).__name__}: call kvprune.attach(model) first"
        )
    return attachment, base


def _check_prunes(policy: TokenPolicy, attachment: Attachment) -> None:
    if attachment.cannot_prune and "rank_hidden" in policy.hooks:
        raise KVPruneError(
            f"{policy!r} prunes hidden states, which {attachment.name} does not support: "
            f"{attachment.cannot_prune}. Use policies that evict slots"
        )


def _check_queries(wanted: Iterable[Statistic], who: str, attachment: Attachment) -> None:
    asked = [part for part in parts_of(wanted) if part.per == "layer"]
    if asked and attachment.cannot_show_queries:
        raise KVPruneError(
            f"{who}: {asked[0]!r} cannot be observed on {attachment.name}: "
            f"{attachment.cannot_show_queries}. Use policies that read no queries, as H2O"
        )


def _check_survival(policies: Sequence[TokenPolicy], observe: Iterable[Statistic]) -> None:
    asked = [s for policy in policies for s in policy.statistics] + list(observe)
    reads = [part for part in parts_of(asked) if part.reads == "survival"]
    unions = [p for p in policies if "rank_hidden" in p.hooks and judges_apart(p)]
    if reads and unions:
        raise KVPruneError(
            f"{reads[0]!r} beside {unions[0]!r}: the parts of a union judge hidden states apart, "
            f"so that nobody knows how far a token came. Expected policies that prune one after "
            f"the other: ComposedCache([a, b])"
        )


def _check_judged(policies: Sequence[TokenPolicy]) -> None:
    judges = any("rank_hidden" in policy.hooks for policy in policies)
    for policy in policies:
        if not judges and any(p.reads == "survival" for p in parts_of(policy.statistics)):
            raise KVPruneError(
                f"{policy!r} goes by how far tokens came through the pruning of hidden states, and "
                f"nothing in the pipeline prunes them: expected such a policy in front, as "
                f"ComposedCache([SDTP(), {policy!r}]); SDTP(keep=1.0) only judges. Saliency needs "
                f"none with heads of its own: no such ship for this model, or they were not asked "
                f"for; kvprune train-saliency makes them"
            )


def _check_across(policy: TokenPolicy, attachment: Attachment) -> None:
    if attachment.group is not None and "rank_layers" in policy.hooks:
        raise KVPruneError(
            f"{policy!r} ranks the slots of all layers at once, of which each process of a tensor "
            f"parallel model has only some heads: expected a policy with rank_slots, or a model in "
            f"one process"
        )


def _check_reads_again(policy: TokenPolicy, attachment: Attachment) -> None:
    if policy.reads_again and attachment.states and any(attachment.states):
        raise KVPruneError(
            f"{policy!r} reads the prompt a second time and takes that back, which the states of "
            f"{attachment.name}'s linear-attention layers cannot follow: expected a model with "
            f"attention in every layer, or a policy that reads once, as SnapKV"
        )


def _check_layers(policy: TokenPolicy, attachment: Attachment) -> None:
    wanted = policy.layers
    if wanted is None:
        return
    known, several = range(attachment.num_layers), isinstance(wanted, Collection)
    if not several or not all(type(i) is int and i in known for i in wanted):
        raise KVPruneError(
            f"{policy!r}: layers={wanted!r}: expected layers of 0 to {len(known) - 1} of "
            f"{attachment.name}, as a list: [0]"
        )
