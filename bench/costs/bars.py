"""The bars that speed and memory have to reach, and whether the results reach them."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from .attached import WITH, WITHOUT
from .candidates import BOTH, DENSE, FASTKV, FIELD, HEAVY, PRUNED, SELDOM, STREAMING
from .decode import BUDGETED
from .numbers import Slope, Spread, exponent, growth, ratios
from .results import Found, groups, the_one
from .stream import READ

MB = 1e6


@dataclass(frozen=True)
class Bar:
    """One bar.

    Attributes:
        what: what the bar is about.
        wanted: the figure that is wanted, as text.
        measured: the figure that was found, as text.
        met: whether that is enough.
    """

    what: str
    wanted: str
    measured: str
    met: bool

    @classmethod
    def at_most(cls, what: str, most: float, found: Spread, goal: float | None = None) -> Bar:
        """A bar on a ratio to dense, which is met if the median is at most `most`."""
        wanted = f"at most {most:.2f}" + (f" (goal {goal:.2f})" if goal else "")
        return cls(what, wanted, f"{found:.3f}", found.median <= most)

    @property
    def cells(self) -> tuple[str, str, str, str]:
        """The cells of the bar's line in a table."""
        return self.what, self.wanted, self.measured, "met" if self.met else "**not met**"


def bars(found: list[Found]) -> list[Bar]:
    """All bars that can be told from these results."""
    return [
        bar
        for each in (_prefill, _field, _decode, _field_step, _whole, _stream, _attach)
        for bar in each(found)
    ]


def of_limit(rows: dict[str, Any], name: str) -> Spread:
    """A candidate's share of dense's time over its share of dense's FLOPs."""
    flops = rows[name]["flops"] / rows[DENSE]["flops"]
    return ratios([t / flops for t in rows[name]["prefill"]], rows[DENSE]["prefill"])


def chunked(one: Found, name: str) -> Slope:
    """The exponent by which the seconds to read a stream grow with the stream's length."""
    lengths, chunks = one["found"]["lengths"], one["found"]["rows"][name]["chunk"]
    tokens = lengths[-1] // len(chunks)
    return exponent(lengths, [sum(chunks[: n // tokens]) for n in lengths])


def flat(one: Found, name: str) -> Slope:
    """The share by which a step's seconds change per 1,000 tokens that were read before."""
    return growth(one["found"]["lengths"], one["found"]["rows"][name]["step"])


def _prefill(found: list[Found]) -> Iterator[Bar]:
    for one in groups(found, "prefill"):
        rows, tokens = one["found"], one["part"]["context"]
        if tokens >= 4096:
            what = f"SDTP, prefill of {tokens:,}: time to dense over FLOPs to dense"
            yield Bar.at_most(what, 1.05, of_limit(rows, PRUNED))
        if tokens == 4096:
            yield Bar.at_most("H2O, prefill of 4,096", 1.10, _to_dense(rows, HEAVY), 1.05)
        beyond = (rows[HEAVY]["live"] - rows[DENSE]["live"]) / MB
        what = f"H2O, prefill of {tokens:,}: live MB beyond dense's"
        yield Bar(what, "at most 64", f"{beyond:.1f}", beyond <= 64)
        what = f"StreamingLLM, prefill of {tokens:,}"
        yield Bar.at_most(what, 1.02, _to_dense(rows, STREAMING))


def _field(found: list[Found]) -> Iterator[Bar]:
    most = {"ExpectedAttention": 1.06, "ObservedAttention": 1.08}
    for one in groups(found, "field"):
        rows, tokens = one["found"], one["part"]["context"]
        for name in (kind.__name__ for kind in FIELD):
            what = f"{name}, prefill of {tokens:,}"
            yield Bar.at_most(what, most.get(name, 1.03), _to_dense(rows, name))
        what = f"{FASTKV}, prefill of {tokens:,}: time to dense over FLOPs to dense"
        yield Bar.at_most(what, 1.05, of_limit(rows, FASTKV))


def _to_dense(rows: dict[str, Any], name: str) -> Spread:
    return ratios(rows[name]["prefill"], rows[DENSE]["prefill"])


def _decode(found: list[Found]) -> Iterator[Bar]:
    one = the_one(found, "decode")
    for budget, rows in one["found"].items() if one else ():
        for name in BUDGETED:
            what = f"{name}, a step at {int(budget):,} slots, to dense at as many tokens"
            yield Bar.at_most(what, 1.05, ratios(rows[name]["step"], rows[DENSE]["step"]))


def _field_step(found: list[Found]) -> Iterator[Bar]:
    for one in groups(found, "field-step"):
        tokens = one["part"]["context"]
        for budget, rows in one["found"].items():
            # The others run in decoding if they are asked to, and are asked to once in a while.
            for name in (n for n in rows if n in (HEAVY, "TOVA") or n.endswith(SELDOM)):
                what = f"{name}, after {tokens:,} tokens, a step at {int(budget):,} slots, to dense"
                each = step_of(name)
                yield Bar.at_most(what, 1.06, ratios(rows[name][each], rows[DENSE][each]))


def step_of(name: str) -> str:
    """What counts as a step of a candidate: of what evicts seldom, the mean of a round."""
    return "round" if name.endswith(SELDOM) else "step"


def _whole(found: list[Found]) -> Iterator[Bar]:
    if one := the_one(found, "whole"):
        rows, part = one["found"], one["part"]
        faster = ratios(rows[DENSE]["whole"], rows[BOTH]["whole"])
        what = f"SDTP + H2O, {part['context']:,} tokens and {part['new']} new: times faster"
        yield Bar(what, "at least 1.60 (goal 1.75)", f"{faster:.2f}", faster.median >= 1.6)
        share = rows[BOTH]["held"] / rows[DENSE]["held"]
        yield Bar("the same: bytes held at the end", "at most 15 %", f"{share:.1%}", share <= 0.15)
    if one := the_one(found, "prefill"):
        rows, tokens = one["found"], one["part"]["context"]
        live = rows[BOTH]["live"] / rows[DENSE]["live"]
        what = f"SDTP + H2O, prefill of {tokens:,}: live bytes"
        yield Bar(what, "below dense's", f"{live:.1%}", live < 1)


def _stream(found: list[Found]) -> Iterator[Bar]:
    one = the_one(found, "stream")
    for name in READ if one else ():
        assert one is not None
        span = f"{one['found']['lengths'][0]:,} to {one['found']['lengths'][-1]:,} tokens"
        p = chunked(one, name)
        what = f"{name}, prefill in chunks, {span}: exponent"
        yield Bar(what, "at most 1.05", f"{p.value:.3f} ± {p.error:.3f}", p.value <= 1.05)
        step, what = flat(one, name), f"{name}, a step after {span}: change per 1,000"
        most = abs(step.value) + 2 * step.error
        shown = f"{step.value:+.3%} ± {step.error:.3%}"
        yield Bar(what, "within 0.2 % with two standard errors", shown, most <= 0.002)
        held = one["found"]["rows"][name]["held"]
        shown = f"{min(held) / MB:.1f} to {max(held) / MB:.1f} MB"
        what = f"{name}, bytes held after {span}"
        yield Bar(what, "the same", shown, min(held) == max(held))


def _attach(found: list[Found]) -> Iterator[Bar]:
    if one := the_one(found, "attach"):
        rows, tokens = one["found"], one["part"]["context"]
        for what, name in ((f"prefill of {tokens:,}", "prefill"), ("a step after it", "step")):
            spread = ratios(rows[WITH][name], rows[WITHOUT][name])
            yield Bar.at_most(f"`attach`, dense cache: {what}", 1.01, spread)
