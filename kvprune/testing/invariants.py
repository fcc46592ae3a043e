"""The invariants: functions that raise AssertionError where a policy does not have a property.

All functions take a pipeline of policies, and a `Case` to read. The repository's property tests
draw the cases with Hypothesis, `kvprune.testing.check` draws them from a seed.
"""

from __future__ import annotations

import copy
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..cache.composed import ComposedCache
from ..errors import KVPruneError
from ..policy.around import Around
from ..policy.base import TokenPolicy
from ..policy.composition import leaves
from ..policy.views import SlotView
from ..statistics import parts_of
from ..storage.buffers import SLACK, spare
from ..storage.layout import allowed
from ..storage.rectangle import Rectangle
from ..wiring.read import read
from .models import LAYERS, left_padded, prompt
from .runs import Case, Run, feed
from .stand_ins import ByHand, Fails, ReadBack, Watched

Policies = Sequence[TokenPolicy]


def expect(holds: bool, what: str, expected: object, got: object) -> None:
    """Raises AssertionError where `holds` is false, with the values expected and got."""
    if not holds:
        raise AssertionError(f"{what}: expected {expected}, got {got}")


def expect_close(what: str, got: Tensor, expected: Tensor, rtol: float = 1e-9) -> None:
    """Expects the same numbers, up to float64 rounding."""
    same = got.shape == expected.shape
    same = same and torch.allclose(got, expected, rtol=rtol, atol=rtol / 10)
    expect(same, what, expected, got)


def expect_same(what: str, got: Run, expected: Run) -> None:
    """Expects that both caches hold the same columns, in every row and head."""
    for layer, (mine, other) in enumerate(zip(got.kept(), expected.kept(), strict=True)):
        expect(mine == other, f"{what}: columns of layer {layer}", other, mine)


# 1. A budget that is never reached changes nothing.


def equals_dense(policies: Policies, case: Case, new: int = 8) -> None:
    """Roomy policies generate the same tokens as DynamicCache, with the same logits.

    With a store, as a cache without policies that holds plainly what the store reads back.
    """
    case = _with_a_reference(policies, case)
    inputs: Any = {"input_ids": case.ids * case.mask, "attention_mask": case.mask}
    options: Any = {"max_new_tokens": new, "do_sample": False, "output_logits": True}
    options["return_dict_in_generate"] = True
    if case.store is None:
        expected = case.dense.generate(**inputs, **options)
    else:
        reference = ComposedCache(store=ReadBack.like(case.store))
        expected = case.model.generate(**inputs, cache=reference, **options)
    cache = ComposedCache(policies, store=case.store)
    first = []
    if any(policy.reads_again for policy in policies):
        first = [read(case.model, cache, **inputs)]
        ids, ones = first[0].argmax(-1, keepdim=True), torch.ones_like(case.mask[:, :1])
        inputs = {
            "input_ids": torch.cat([inputs["input_ids"], ids], 1),
            "attention_mask": torch.cat([case.mask, ones], 1),
        }
        options["max_new_tokens"] = new - 1
    got = case.model.generate(**inputs, cache=cache, **options)
    same = torch.equal(got.sequences, expected.sequences)
    expect(same, "generated tokens", expected.sequences, got.sequences)
    both = zip([*first, *got.logits], expected.logits, strict=True)
    for step, (mine, other) in enumerate(both):
        # `generate` gives them in float32.
        expect_close(f"logits of step {step}", mine.to(other.dtype), other, rtol=1e-10)


def equals_dense_until_something_goes(policies: Policies, case: Case) -> None:
    """The logits are those without policies, as long as every answer had room for everything."""
    case = _with_a_reference(policies, case)
    watched = [Watched(policy) for policy in policies]
    run, dense = case.run(watched), case.run([])
    start = 0
    for count in case.steps:
        new = slice(start, start + count)
        start += count
        mine, other = (each(case.ids[:, new], case.mask[:, new]) for each in (run, dense))
        # Pruned tokens are missing in this forward, evicted slots only from the next forward on.
        pruned = any(n.hook == "rank_hidden" and _drops(n) for w in watched for n in w.notes)
        if pruned:
            return
        expect_close(f"logits at column {start}, with nothing dropped so far", mine, other)
        if any(_drops(note) for w in watched for note in w.notes):
            return


def _with_a_reference(policies: Policies, case: Case) -> Case:
    """The case, without a store where no cache without policies rounds the same.

    With positions inside the cache a store rounds keys before they are turned.
    """
    inside = any(policy.positions_in_cache for policy in leaves(policies))
    return replace(case, store=None) if inside else case


def _drops(note: Any) -> bool:
    """Whether a policy's answer allows fewer entries than there are, in some row and head."""
    valid = note.view.valid if note.view.valid.dim() == 3 else note.view.valid[:, None]
    return note.answer is not None and bool((note.allowed < valid.sum(-1)).any())


# 2. and 3. What is kept, and how many.


def keeps_what_it_saw(policies: Policies, case: Case) -> None:
    """Kept columns are unique, sorted, seen and no padding; a dropped column never returns."""
    run, start = case.run(policies), 0
    gone: dict[tuple[int, int, int], set[int]] = {}
    for count in case.steps:
        run(case.ids[:, start : start + count], case.mask[:, start : start + count])
        start += count
        for layer, slots in run.cache.slot_layers():
            columns = run.cache.columns(layer)
            expect(columns.dtype == torch.int64, "dtype of columns", torch.int64, columns.dtype)
            heads = (1, slots.heads)
            shape = tuple(columns.shape[:2])
            expect(shape in [(2, h) for h in heads], "rows and heads", f"2 and {heads}", shape)
            for row in range(2):
                for head in range(columns.shape[1]):
                    shown = [int(c) for c in columns[row, head]]
                    where = f"layer {layer}, row {row}, head {head}"
                    expect(shown == sorted(shown), where, "sorted columns", shown)
                    kept = [c for c in shown if c >= 0]
                    expect(len(set(kept)) == len(kept), where, "each column once", kept)
                    seen = set(range(case.padding[row], start))
                    expect(set(kept) <= seen, where, f"columns out of {seen}", kept)
                    lost = gone.setdefault((layer, row, head), set())
                    expect(not lost & set(kept), where, f"none of {lost} to return", kept)
                    lost |= set(range(start)) - set(kept)


def holds_no_more_than_its_budget(policies: Policies, case: Case, bound: int | None = None) -> None:
    """After a forward no layer holds more than each policy allowed there, nor than `bound`."""
    watched, start = [Watched(policy) for policy in policies], 0
    run = case.run(watched)
    for count in case.steps:
        for each in watched:
            each.notes.clear()
        run(case.ids[:, start : start + count], case.mask[:, start : start + count])
        start += count
        for each in watched:
            for note in each.notes:
                if note.hook != "rank_hidden" and note.allowed is not None:
                    _expect_no_more(run, note, each.base)
        for layer, _ in run.cache.slot_layers():
            most = run.cache.columns(layer).shape[-1]
            expect(most >= 1, f"slots of layer {layer} at column {start}", "at least 1", most)
            # A policy that was not asked lets its layers grow.
            if bound is not None and all(_was_asked(each, layer) for each in watched):
                expect(most <= bound, f"slots of layer {layer} at column {start}", bound, most)


def _was_asked(watched: Watched, layer: int) -> bool:
    """Whether a policy answered about a layer's slots in this forward, or never does."""
    if not watched.evicts or not watched.applies(layer):
        return True
    return any(n.hook != "rank_hidden" and n.view.layer == layer for n in watched.notes)


def _expect_no_more(run: Run, note: Any, policy: TokenPolicy) -> None:
    layer = note.view.layer
    held = (run.cache.columns(layer) >= 0).sum(-1)
    held, allowed = torch.broadcast_tensors(held, note.allowed)
    what = f"slots by row and head of layer {layer} after {policy!r} answered"
    expect(bool((held <= allowed).all()), what, f"at most {allowed.tolist()}", held.tolist())


# 4. Rows do not depend on each other, nor on left padding.


def rows_are_independent(policies: Policies, case: Case) -> None:
    """A row alone and the same row padded in a batch: the kept tokens and outputs are the same.

    The other row of the batch is longer in a first batch; in a second one it is shorter, by the
    case's first padding.
    """
    pad, ids, steps = case.padding[1], case.ids[:1], case.steps
    alone = case.run(policies)
    expected = feed(alone, ids, torch.ones_like(ids), steps)
    other = prompt(1, pad + sum(steps), case.seed + 1)
    batch = torch.cat([torch.nn.functional.pad(ids, (pad, 0)), other])
    for others_padding in (0, pad + case.padding[0]):
        mask = left_padded(batch, [pad, others_padding])["attention_mask"]
        together = case.run(policies)
        got = feed(together, batch * mask, mask, [steps[0] + pad, *steps[1:]])
        where = f"with padding {pad} beside a row with {others_padding}"
        for step, (mine, single) in enumerate(zip(got, expected, strict=True)):
            expect_close(f"logits of a row {where}, step {step}", mine[:1], single)
        for layer, (rows, row) in enumerate(zip(together.kept(), alone.kept(), strict=True)):
            own = [[column - pad for column in head] for head in rows[: len(rows) // 2]]
            expect(own == row, f"columns of layer {layer} {where}", row, own)


# 5. Everything that belongs to a slot stays with it.


def moved_rows_go_on(policies: Policies, case: Case, order: Sequence[int] = (1, 0)) -> None:
    """Rows that were reordered, repeated or selected go on as the rows that they were."""
    rows = torch.tensor(order)
    moves: dict[str, tuple[Any, Tensor]] = {
        f"reorder_cache({list(order)})": (lambda c: c.reorder_cache(rows), rows),
        "batch_repeat_interleave(2)": (
            lambda c: c.batch_repeat_interleave(2),
            torch.tensor([0, 0, 1, 1]),
        ),
        "batch_select_indices([1])": (
            lambda c: c.batch_select_indices(torch.tensor([1])),
            torch.tensor([1]),
        ),
    }
    start, new = case.fed(policies), prompt(2, 5, case.seed + 1)
    stay = _copied(start)
    expected = feed(stay, new, torch.ones_like(new), [1] * 5)
    for name, (move, index) in moves.items():
        run = _copied(start)
        move(run.cache)
        assert run.mask is not None
        run.mask = run.mask[index]
        got = feed(run, new[index], torch.ones_like(new)[index], [1] * 5)
        for step, (mine, other) in enumerate(zip(got, expected, strict=True)):
            expect_close(f"logits after {name}, step {step}", mine, other[index], rtol=1e-10)


def _copied(run: Run) -> Run:
    twin = copy.copy(run)
    twin.cache = copy.deepcopy(run.cache)
    return twin


def copies_and_files_go_on(policies: Policies, case: Case) -> None:
    """A deep copy, and a cache that was saved and loaded, go on as the first, bit for bit.

    The first cache is not changed by this.
    """
    run, new = case.fed(policies), prompt(2, 5, case.seed + 1)
    before, steps = run.kept(), [1, 1, 2, 1]
    copied, loaded = _copied(run), copy.copy(run)
    with tempfile.TemporaryDirectory() as folder:
        run.cache.save(Path(folder) / "cache")
        loaded.cache = ComposedCache.load(Path(folder) / "cache", policies, case.model, case.store)
    got = [feed(each, new, torch.ones_like(new), steps) for each in (copied, loaded)]
    expect(run.kept() == before, "columns of a cache whose copy went on", before, run.kept())
    expected = feed(run, new, torch.ones_like(new), steps)
    for name, logits in zip(("a copy", "a loaded cache"), got, strict=True):
        for step, (mine, other) in enumerate(zip(logits, expected, strict=True)):
            expect(torch.equal(mine, other), f"logits of {name}, step {step}", other, mine)
    expect_same("a copy", copied, run)
    expect_same("a loaded cache", loaded, run)


def values_belong_to_their_columns(policies: Policies, case: Case) -> None:
    """Layer 0 holds at a column the values and keys that it computed there, untouched since."""
    run, dense = case.fed(policies), case.fed([])
    slots, whole = run.cache.layers[0], dense.cache.layers[0]
    # Positions inside the cache rotate keys anew.
    for name in ("values",) if run.cache.state.positions is not None else ("values", "keys"):
        for row in range(2):
            for head in range(slots.heads):
                columns = slots.columns[row, min(head, slots.columns.shape[1] - 1)]
                there = columns >= 0
                mine = getattr(slots, name)[row, head][there]
                # The slots of the cache without policies, which hold padding too.
                place = whole.columns[row, 0].argsort()[columns[there]]
                what = f"{name} of layer 0, row {row}, head {head}"
                expect_close(what, mine, getattr(whole, name)[row, head][place])


def crop_takes_back_or_refuses(policies: Policies, case: Case) -> None:
    """After `crop` tokens are as if never shown; where a policy evicts, `crop` is refused.

    A refused `crop` changes nothing.
    """
    run, new = case.fed(policies), prompt(2, 4, case.seed + 1)
    seen, before = run.cache.seen, run.kept()
    if any(policy.evicts for policy in policies):
        try:
            run.cache.crop(-1)
        except KVPruneError:
            expect(run.kept() == before and run.cache.seen == seen, "crop", before, run.kept())
            return
        raise AssertionError("crop(-1) of a cache that evicts: expected KVPruneError, got nothing")
    twin = _copied(run)
    feed(run, new, torch.ones_like(new), [1] * 4)
    run.cache.crop(-4)
    assert run.mask is not None
    run.mask = run.mask[:, :-4]
    expect_same("after crop(-4)", run, twin)
    one, two = (feed(each, new, torch.ones_like(new), [1, 1]) for each in (run, twin))
    for mine, other in zip(one, two, strict=True):
        expect_close("logits after crop(-4)", mine, other)


def drafts_leave_no_trace(policies: Policies, case: Case) -> None:
    """Drafts that are taken back leave no trace; the others are as if read one by one."""
    run = case.fed(policies)
    twin, new = _copied(run), prompt(2, 4, case.seed + 1)
    run.cache.activate_past_recording()
    run(new)
    run.cache.crop(-2)
    assert run.mask is not None
    run.mask = run.mask[:, :-2]
    # Neither single tokens behind the prompt nor drafts count as prompt.
    feed(twin, new[:, :2], torch.ones_like(new), [1, 1])
    expect_same("after two of four drafts were taken back", run, twin)
    one, two = run(new[:, 2:3]), twin(new[:, 2:3])
    expect_close("logits after two of four drafts were taken back", one, two)


def reset_is_as_new(policies: Policies, case: Case) -> None:
    """After `reset()` the same tokens give the same logits, and the same columns are kept."""
    run = case.run(policies)
    first = feed(run, case.ids, case.mask, case.steps)
    kept, run.mask = run.kept(), None
    run.cache.reset()
    again = feed(run, case.ids, case.mask, case.steps)
    expect(run.kept() == kept, "columns after reset()", kept, run.kept())
    for mine, other in zip(again, first, strict=True):
        expect(torch.equal(mine, other), "logits after reset()", other, mine)


# 6. Composition.


def pipeline_is_by_hand(policies: Policies, case: Case) -> None:
    """A pipeline equals its policies' hooks called in turn, each on what the one before left."""
    expected, got = case.run([ByHand(policies)]), case.run(policies)
    logits = [feed(run, case.ids, case.mask, case.steps) for run in (got, expected)]
    expect_same("the policies by hand", got, expected)
    for step, (mine, other) in enumerate(zip(*logits, strict=True)):
        expect_close(f"logits of the policies by hand, step {step}", mine, other)


def united_with_itself(policies: Policies, case: Case) -> None:
    """`a | a` equals `a`, for each policy."""
    for policy, before in _by_themselves(policies):
        one, two = case.run([*before, policy]), case.run([*before, policy | policy])
        logits = [feed(run, case.ids, case.mask, case.steps) for run in (one, two)]
        expect_same("a | a beside a", two, one)
        for step, (mine, other) in enumerate(zip(*logits, strict=True)):
            expect_close(f"logits of a | a beside a, step {step}", other, mine)


def _by_themselves(policies: Policies) -> Iterator[tuple[TokenPolicy, Policies]]:
    """Each policy, with those in front of it where it goes by their judgement, else with none."""
    for place, policy in enumerate(policies):
        judged = any(part.reads == "survival" for part in parts_of(policy.statistics))
        yield policy, policies[:place] if judged else ()


def caches_share_a_policy(policies: Policies, case: Case) -> None:
    """A policy holds no state: a cache that takes turns with another does the same as alone."""
    lone = case.fed(policies)
    runs, start = [case.run(policies) for _ in range(2)], 0
    other = prompt(2, sum(case.steps), case.seed + 7)
    for count in case.steps:
        new = slice(start, start + count)
        start += count
        for run, ids in zip(runs, (case.ids, other), strict=True):
            run(ids[:, new], case.mask[:, new])
    expect_same("a cache in turns with another one, whose policies it shares", runs[0], lone)


# 7. Lengths.


def lengths_are_logical(policies: Policies, case: Case) -> None:
    """`seen` counts columns, padding included; a layer has few slots beyond its `columns`."""
    run, total = case.fed(policies), sum(case.steps)
    for name, got in (("seen", run.cache.seen), ("get_seq_length()", run.cache.get_seq_length())):
        expect(got == total, name, total, got)
    expect(len(run.cache) == LAYERS, "len(cache)", LAYERS, len(run.cache))
    for layer, slots in run.cache.slot_layers():
        over = slots.keys.shape[2] - run.cache.columns(layer).shape[-1]
        # Columns that are padding in both rows have slots too, as long as nothing was evicted.
        most = SLACK + min(case.padding)
        expect(0 <= over <= most, f"empty slots of layer {layer}", f"0 to {most}", over)


# 8. Memory.


def bytes_are_of_kept_slots(policies: Policies, case: Case) -> None:
    """A cache's bytes are those of the slots that it holds, with a slack of a few slots."""
    run = case.fed(policies)
    least = most = 0
    for layer, slots in run.cache.slot_layers():
        evicts = any(p.evicts and p.applies(layer) for p in policies)
        for rectangle in slots.rectangles:
            counts = (rectangle.columns >= 0).sum(-1).double()
            # Until something goes, padding has slots too.
            full = evicts and bool((counts < sum(case.steps) - max(case.padding)).any())
            kept = float(counts.mean()) if full else int(counts.amax())
            slack = spare(int(counts.amax())) + (
                allowed(int(counts.amax())) if full else min(case.padding)
            )
            least += int(kept * _bytes_of_keys_and_values(rectangle))
            most += int((kept + slack) * _bytes_of_a_slot(rectangle)) + 1
            slot = rectangle.turnover.slot
            most += 0 if slot is None else slot.nbytes
        most += 0 if slots.lanes is None else sum(t.nbytes for t in slots.lanes.tensors())
    others = [
        t
        for part in (run.cache.state.rows, run.cache.state.positions)
        if part
        for t in part.tensors()
    ]
    if run.cache.state.padding is not None:
        others.append(run.cache.state.padding)
    for _, slots in run.cache.slot_layers():
        others += [tensor for record in slots.records.values() for tensor in record]
    most += sum(t.nbytes for t in others)
    got = run.cache.nbytes
    expect(least < got <= most, "bytes held", f"more than {least}, at most {most}", got)


def _bytes_of_a_slot(slots: Rectangle) -> int:
    """The bytes of one slot in every row and head: key, value, column, statistics and arrival."""
    parts = [slots.columns, *slots.held_numbers.values()]
    numbers = sum(part[:, :, 0].numel() * part.element_size() for part in parts)
    return numbers + _bytes_of_keys_and_values(slots)


def _bytes_of_keys_and_values(slots: Rectangle) -> int:
    """The bytes of one slot's key and value in every row and head, as they are held."""
    assert slots.held is not None
    return sum(part[:, :, 0].numel() * part.element_size() for part in slots.held.tensors())


# 11. Errors inside a forward.


def error_needs_a_reset(
    policies: Policies, case: Case, layer: int = 1, hook: str = "rank_slots", column: int = 0
) -> None:
    """After an error in a forward a cache refuses all use; after `reset()` it is as good as new."""
    run = case.run([Fails(layer, column, hook, policies), *policies])
    try:
        feed(run, case.ids, case.mask, case.steps)
    except RuntimeError as error:
        expect("as planned" in str(error), "the error of a policy", "as planned", error)
    else:
        raise AssertionError("a policy raised in a forward: expected its error, got none")
    uses = {
        "a forward": lambda: run(case.ids[:, :1]),
        "reorder_cache": lambda: run.cache.reorder_cache(torch.tensor([1, 0])),
    }
    for name, use in uses.items():
        try:
            use()
        except KVPruneError as error:
            expect("reset" in str(error), f"the refusal of {name}", "a word of reset()", error)
        else:
            raise AssertionError(f"{name} after an error: expected KVPruneError, got none")
    run.cache.reset()
    run.cache.policies, run.mask = tuple(policies), None
    again = feed(run, case.ids, case.mask, case.steps)
    fresh = case.run(policies)
    for mine, other in zip(again, feed(fresh, case.ids, case.mask, case.steps), strict=True):
        expect_close("logits after an error and reset()", mine, other)


# 12. The promises of policies, and the contract that holds for each without a promise.


def promises_are_kept(policies: Policies, case: Case) -> None:
    """Each policy, by itself, keeps the same without its promises, and its promises are true."""
    for policy, before in _by_themselves(policies):
        watched = Watched(policy)
        run, plain, start = case.run([*before, policy]), case.run([*before, watched]), 0
        for count in case.steps:
            new = slice(start, start + count)
            start += count
            for each in (run, plain):
                each(case.ids[:, new], case.mask[:, new])
            promised = [n for n in ("constant_budget", "layers_alike") if getattr(policy, n)]
            what = f"{policy!r}: at column {start}, with the promises {promised} and without"
            expect_same(what, run, plain)
            _expect_sinks_and_window(policy, run, case, start)
        # Layers with a sliding window are left out: a policy does not see all slots there.
        everything = {i for i, slots in plain.cache.slot_layers() if slots.local is None}
        _expect_as_promised(policy, watched, everything)


def _expect_as_promised(policy: TokenPolicy, watched: Watched, everything: set[int]) -> None:
    """Expects answers as promised, whether or not a broken promise changed the kept set.

    Args:
        policy: the policy.
        watched: the same policy with notes.
        everything: the layers whose queries see everything.
    """
    # For each layer that was full: its budget, and the number of columns seen then.
    full: dict[int, tuple[Tensor, int]] = {}
    for note in watched.notes:
        if not isinstance(note.view, SlotView) or note.answer is None:
            continue
        layer, answer = note.view.layer, note.answer
        expect(note.alike, f"{policy!r} promises layers_alike", "the same of every layer", layer)
        if policy.shares_heads:
            heads = {answer.score.shape[1], answer.protected.shape[1], answer.budget.dim()}
            expect(heads == {1}, f"{policy!r} promises shares_heads", "one answer for all", heads)
        before, seen = full.pop(layer, (answer.budget, -1))
        constant = policy.constant_budget and layer in everything
        # The promise counts from a full layer to the next single token.
        if constant and note.view.seen == seen + 1:
            _expect_constant(policy, note, before)
        if constant and _is_full(note):
            full[layer] = (answer.budget.reshape(answer.budget.shape[0], -1), note.view.seen)


def _is_full(note: Any) -> bool:
    valid = note.view.valid.sum(-1)
    return bool((valid >= note.answer.budget.reshape(valid.shape[0], -1)).all())


def _expect_constant(policy: TokenPolicy, note: Any, before: Tensor) -> None:
    budget = note.answer.budget.reshape(before.shape[0], -1)
    what = f"{policy!r} promises constant_budget: budget at column {note.view.seen}"
    expect(torch.equal(budget, before), what, before.tolist(), budget.tolist())
    protected = (note.view.valid & note.answer.protected).sum(-1)
    what = f"{policy!r} promises constant_budget: protected at column {note.view.seen}"
    most = bool((protected <= budget).all())
    expect(most, what, f"at most {budget.tolist()}", protected.tolist())


def _expect_sinks_and_window(policy: TokenPolicy, run: Run, case: Case, seen: int) -> None:
    """The slots that the policy leaves have one gap, behind a row's first `sinks` tokens."""
    sinks = policy.sinks_before_window
    if sinks is None or not policy.evicts:
        return
    for layer, rows in enumerate(run.kept()):
        heads = len(rows) // 2
        for place, kept in enumerate(rows):
            first = case.padding[place // heads]
            window = [c for c in kept if c >= first + sinks]
            expected = list(range(window[0], seen)) if window else []
            what = f"{policy!r} promises {sinks} sinks before a window: layer {layer} at {seen}"
            expect(window == expected, what, expected, window)


def views_are_only_read(policies: Policies, case: Case) -> None:
    """No policy writes into the views that it is shown, in any way."""
    watched = [Watched(policy) for policy in policies]
    case.fed(watched)
    for each in watched:
        for note in each.notes:
            what = f"{each.base!r} writes into its view at layer {note.view.layer}"
            expect(not note.written, what, "nothing", list(note.written))


def slots_have_no_order(policies: Policies, case: Case) -> None:
    """Each policy keeps the same columns in whatever order the slots are shown."""
    watched = [Watched(policy) for policy in policies]
    case.fed(watched)
    for each in watched:
        for note in each.notes:
            what = f"{each.base!r}, shown slots of layer {note.view.layer} in another order"
            expect(note.unordered, what, "the same columns to stay", "others")


def layers_restrict(policies: Policies, case: Case) -> None:
    """Layers that `layers` leaves out keep everything, for copies with `layers=[1]`."""
    for policy, before in _by_themselves(policies):
        run, dense = case.fed([*before, _restricted(policy, [1])]), case.fed(before)
        prunes = "rank_hidden" in policy.hooks
        # Tokens that are pruned before layer 1 never enter the layers behind it.
        for layer in [0] if prunes else [0, 2, 3]:
            mine, other = (each.kept()[layer] for each in (run, dense))
            expect(mine == other, f"columns of layer {layer} with layers=[1]", other, mine)


def _restricted(policy: TokenPolicy, layers: Sequence[int]) -> TokenPolicy:
    """A copy that works on these layers alone; of a policy around another, both do."""
    twin = copy.copy(policy)
    if isinstance(policy, Around):
        object.__setattr__(twin, "base", _restricted(policy.base, layers))
    object.__setattr__(twin, "layers", layers)
    return twin
