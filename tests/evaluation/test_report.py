"""The report of a comparison: what it says, and that it says nothing else."""

from __future__ import annotations

import json
import math
import re
import xml.etree.ElementTree as ElementTree
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvprune import KVPruneError
from kvprune.evaluation.ledger.results import Cell, Failure, Results, SampleResult
from kvprune.evaluation.measure.traces import levels
from kvprune.evaluation.report import figures, kept_text, numbers, write_report
from kvprune.evaluation.report.palette import GROUND, SERIES, dark_rules, styles
from kvprune.evaluation.report.pareto import front
from kvprune.evaluation.report.plots import BINS, binned
from kvprune.evaluation.report.rows import rows_of
from kvprune.evaluation.report.summary import tables

from ..support.made_up_results import BUDGETS, POLICIES, RUN, TASKS, made_up

NASTY = "<script>alert('x')</script>&\"$\\frac{$"


class Page(HTMLParser):
    """A page as a browser reads it: its tags, what they refer to, and the text between them."""

    VOID = frozenset(("meta", "br", "wbr", "path", "rect", "use", "image"))

    def __init__(self, page: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.words: list[str] = []
        self.open: list[str] = []
        self.feed(page)
        self.close()

    def handle_starttag(self, tag: str, attrs: Any) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: Any) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        if tag not in self.VOID:
            assert self.open.pop() == tag, f"</{tag}> closes something else"

    def handle_data(self, data: str) -> None:
        if "style" not in self.open:
            self.words.append(data)

    def count(self, tag: str, **attributes: str) -> int:
        """How many such tags."""
        wanted = {name.rstrip("_"): value for name, value in attributes.items()}
        return sum(t == tag and all(a.get(n) == v for n, v in wanted.items()) for t, a in self.tags)

    @property
    def text(self) -> str:
        """All words, with single spaces."""
        return " ".join("".join(self.words).split())

    def references(self) -> list[str]:
        """Where attributes lead."""
        names = ("src", "href", "xlink:href", "srcset", "action", "data", "poster")
        return [str(a[n]) for _, a in self.tags for n in names if n in a]


def written(results: Results, folder: Path) -> tuple[str, Page, list[Path]]:
    """The page as text and as it is read, and all files."""
    paths = write_report(results, folder)
    source = paths[0].read_text(encoding="utf-8")
    page = Page(source)
    assert page.open == []
    return source, page, paths


@pytest.fixture(scope="module")
def whole() -> Results:
    """Six policies, three budgets, two contexts, three tasks, 50 samples."""
    return made_up()


@pytest.fixture(scope="module")
def report(whole: Results, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """The report of all that."""
    return written(whole, tmp_path_factory.mktemp("whole") / "new" / "folder")


def cell(**changes: Any) -> Cell:
    return replace(Cell("h2o@0.5", "h2o", 0.5, "needle", 1024), **changes)


def one(results: Results) -> SampleResult:
    return next(s for s in results.samples if s.cell.budget is not None)


def test_a_whole_comparison_is_one_small_page(report):
    """A part for each task and context, a row for each cell, under a megabyte."""
    source, page, _ = report
    assert len(source.encode()) < 1e6
    assert page.count("section") == 1 + 6 + 2
    rows = 2 + 5 * len(BUDGETS) + 1
    # The tables of samples, those by layer, and the parts of one task's scores; then the overview.
    assert page.count("th", scope="row") == rows * (6 + 6 + 2) + rows - 2
    assert page.count("p", class_="warning") == 2
    assert "Dense scores 0.21" in page.text and "below the 0.3" in page.text
    for value in ("2026-11-25 10:59", "torch 2.13.0", RUN["command"], RUN["machine"]):
        assert str(value) in page.text
    assert all(unit in page.text for unit, *_ in TASKS.values())


def test_every_figure_is_in_the_page_and_in_two_files(report):
    """Quality by two costs, memory and time by budget, a heat map for each policy."""
    source, page, paths = report
    count = 6 * 2 + 2 * len(BUDGETS) + len(POLICIES)
    assert page.count("figure", role="img") == count
    assert paths[0].name == "report.html"
    assert len(paths) == len(set(paths)) == 1 + 2 * count and all(p.is_file() for p in paths)
    assert {p.parent for p in paths[1:]} == {paths[0].parent / "plots"}
    for path in paths[1:]:
        if path.suffix == ".svg":
            ElementTree.parse(path)
            assert dark_rules() in path.read_text()
        else:
            assert path.read_bytes().startswith(b"\x89PNG")
    ids = re.findall(r'\sid="([^"]*)"', source)
    assert len(ids) == len(set(ids))
    assert set(re.findall(r"url\(#([^)]*)\)", source)) <= set(ids)


def test_nothing_is_fetched(report):
    """No address but inside the page itself; no script."""
    source, page, _ = report
    assert page.references()
    assert all(re.match(r"#|data:image/png;base64,", to) for to in page.references())
    style = re.search(r"<style>(.*?)</style>", source, re.S)
    assert style is not None and not re.search(r"@import|url\(|https?:", style[1])
    assert page.count("script") == page.count("link") == page.count("iframe") == 0
    assert not re.search(r"https?:", source)


def test_every_colour_of_a_figure_has_one_for_the_dark(report):
    """What is drawn is of the palette, so that the dark rules find it."""
    source, *_ = report
    drawn = "".join(re.findall(r"<figure.*?</figure>", source, re.S))
    used = set(re.findall(r"(?:fill|stroke): (#[0-9a-f]{6})", drawn))
    assert used and used <= {*SERIES, *GROUND}
    assert not re.search(r"(?:fill|stroke): (?!#|none)\w", drawn)


def test_all_that_comes_from_outside_is_escaped(whole, tmp_path):
    """Specs, tasks, units, errors, tokens, settings; as words they are still there."""
    nasty = cell(policy=NASTY, label=NASTY, task=f"../{NASTY}")
    sample = replace(one(whole), cell=nasty, parts={NASTY: 1.0}, answer=NASTY)
    trace = replace(whole.traces[0], cell=nasty, tokens=(NASTY,), kept=())
    results = Results(
        {"model": NASTY, NASTY: [NASTY], "command": NASTY},
        {nasty.task: NASTY},
        (sample,),
        (Failure(nasty, f"{NASTY}\n\udcff second line"),),
        (trace,),
    )
    source, page, paths = written(results, tmp_path / "out")
    assert page.count("script") == 0 and "<script" not in source
    assert (page.count("title"), page.count("h2"), page.count("pre")) == (1, 4, 1)
    assert page.text.count(NASTY) >= 12
    assert all(path.parent.parent == tmp_path / "out" for path in paths[1:])
    assert [p.name for p in tmp_path.iterdir()] == ["out"]
    for path in paths[1::2]:
        ElementTree.parse(path)


def test_figures_say_specs_as_they_are(whole, tmp_path):
    """The SVG is made shorter, but not its words."""
    spec = "h2o(heavy=0.123456,  recent=0.1)"
    sample = replace(one(whole), cell=cell(label=spec))
    _, page, paths = written(Results({}, {}, (sample,)), tmp_path)
    drawn = next(path for path in paths if path.suffix == ".svg")
    texts = ["".join(t.itertext()) for t in ElementTree.parse(drawn).iter() if "text" in t.tag]
    assert spec in texts and spec in "".join(page.words)


def test_an_empty_comparison(tmp_path):
    """A page that says so, and no figure."""
    _, page, paths = written(Results({}, {}), tmp_path)
    assert "There are no results yet" in page.text
    assert len(paths) == 1 and page.count("figure") == page.count("table") == 0


def test_a_single_sample(whole, tmp_path):
    """No interval, nothing to compare with, and both said."""
    sample = replace(one(whole), score=0.25, cell=cell())
    _, page, paths = written(Results({}, {}, (sample,)), tmp_path)
    assert "0.250one sample" in page.text and "compared 1 sample " in page.text
    assert "Dense was not run here" in page.text
    assert len(paths) == 1 + 2 * 2


def test_only_a_failed_cell(tmp_path):
    """It is listed with its whole error, and with its first line where its row would be."""
    failure = Failure(cell(), "no room\nfor two lines")
    _, page, paths = written(Results({}, {}, (), (failure,)), tmp_path)
    assert page.text.count("failed: no room") == 1 and "no room for two lines" in page.text
    assert page.count("section", id="failures") == 1 and len(paths) == 1


@pytest.mark.parametrize("bad", [[float("nan")], [float("inf"), 1.0, -float("inf")]])
def test_a_score_that_is_no_number(whole, tmp_path, bad):
    """It is a dash, on no front, and draws nothing; the lines may be none either."""
    cells = [cell(), cell(policy="dense", label="dense", budget=None)]
    good = [replace(one(whole), sample=i, score=0.5, cell=cell(budget=0.25)) for i in range(3)]
    none = [
        replace(one(whole), sample=i, score=s, cell=c, parts={"part": s})
        for c in cells
        for i, s in enumerate(bad)
    ]
    results = Results({}, {}, (*none, *good))
    (table,) = tables(results)
    assert [row.best for row in table.rows] == [False, False, True]
    _, page, _ = written(results, tmp_path)
    assert not re.search(r"\b(nan|inf)\b", page.text) and "0.500" in page.text
    assert "one sample" not in page.text


def test_rows_compare_the_samples_that_both_have(whole):
    """Differences, shares and warnings by hand, on numbers that can be checked in the head."""
    base = one(whole)

    def scored(policy: str, scores: dict[int, float]) -> list[SampleResult]:
        line = policy in ("dense", "no context")
        place = cell(policy=policy, label=policy, budget=None if line else 0.5)
        return [replace(base, cell=place, sample=i, score=s) for i, s in scores.items()]

    samples = [
        *scored("no context", {0: 0.0, 1: 0.2, 2: 0.1}),
        *scored("a", {3: 9.0, 1: 0.6, 0: 0.5, 4: 1.0}),
        *scored("dense", {0: 1.0, 1: 0.8, 2: 0.9, 4: 1.0}),
    ]
    (table,) = tables(Results({}, {}, tuple(samples)))
    assert [row.cell.policy for row in table.rows] == ["dense", "a", "no context"]
    dense, mine, lower = table.rows
    assert mine.score.mean == pytest.approx(11.1 / 4)
    assert mine.difference is not None and lower.difference is not None
    assert mine.difference.mean == pytest.approx(-0.7 / 3)
    assert mine.difference.low == pytest.approx(-0.5)
    assert mine.recovered == pytest.approx((0.55 - 0.1) / 0.8)
    assert dense.difference is None and lower.difference.mean == pytest.approx(-0.8)
    assert table.warnings == ()


@pytest.mark.parametrize(
    ("dense", "floor", "match"),
    [
        ([0.1, 0.2], None, "no better than without"),
        ([0.9, 0.0], None, "not surely better"),
        ([0.9, 0.8], 0.9, "below the 0.9"),
        ([0.9, 0.8], 0.8, None),
    ],
)
def test_where_dense_fails_is_said(whole, dense, floor, match):
    """Against the task's floor and against no context."""
    cells = [cell(policy=p, label=p, budget=None) for p in ("dense", "no context")]
    samples = tuple(
        replace(one(whole), cell=c, sample=i, score=s)
        for c, scores in zip(cells, (dense, [0.3, 0.3]), strict=True)
        for i, s in enumerate(scores)
    )
    floors = {} if floor is None else {"needle": floor}
    (table,) = tables(Results({}, {}, samples, floors=floors))
    assert len(table.warnings) == (match is not None)
    assert match is None or match in table.warnings[0]


def test_times_are_medians_and_layers_are_told_apart(whole):
    """Pruned is what never entered, evicted what entered and left."""
    cost = replace(one(whole).cost, prompt_tokens=10, entered=(10, 6), kept=(4.0, 3.0))
    runs = [replace(cost, prefill_seconds=s, bytes_held=b) for s, b in ((1, 1), (2, 2), (30, 6))]
    samples = tuple(replace(one(whole), sample=i, cost=c) for i, c in enumerate(runs))
    (table,) = tables(Results({}, {}, samples))
    found = table.rows[0].cost
    assert (found.seconds, found.held) == (2, 3)
    assert (found.pruned, found.evicted) == ((0, 4), (6, 3))


def test_a_layer_with_a_state_is_left_out_of_what_is_kept(whole, tmp_path):
    """It holds no slots, whatever becomes of them; dense keeps all that there are."""
    cost = replace(one(whole).cost, prompt_tokens=10, entered=(10, 10, 8), kept=(None, 10.0, 8.0))
    results = Results({}, {}, (replace(one(whole), cost=cost),))
    (table,) = tables(results)
    assert table.rows[0].cost.evicted == (None, 0, 0)
    assert rows_of(results)[0]["share_kept"] == 0.9
    _, page, _ = written(results, tmp_path)
    assert "0: –, 1–2: 0" in json.dumps(page.tags, ensure_ascii=False) + page.text


def test_what_no_sample_was_timed_for_has_no_time(whole, tmp_path):
    """Where prompts were read for several cells; those that were timed count alone."""
    cost = one(whole).cost
    untimed = replace(cost, prefill_seconds=None)
    samples = [replace(one(whole), sample=i, cost=c) for i, c in enumerate((cost, untimed))]
    results = [Results({}, {}, tuple(found)) for found in (samples, samples[1:])]
    rows = [tables(each)[0].rows[0] for each in results]
    assert rows[0].cost.seconds == cost.prefill_seconds and math.isnan(rows[1].cost.seconds)
    times = [rows_of(each)[0]["prefill_seconds"] for each in results]
    assert times == [cost.prefill_seconds, None]
    assert (
        numbers.ratio(rows[1].cost.seconds, 2.0)
        == "\u2013"
        == numbers.number(rows[1].cost.seconds, 2)
    )
    assert write_report(results[1], tmp_path, figures=False) == [tmp_path / "report.html"]
    assert [p.name for p in tmp_path.iterdir()] == ["report.html"]


def test_contexts_are_compared_only_where_there_are_several(tmp_path):
    """With one there is no such figure."""
    _, page, paths = written(made_up(("words",), (512,), (0.5,), samples=2), tmp_path)
    assert page.count("section", id="context") == 0
    assert not [p for p in paths if p.name.startswith("context")]


_COORDINATES = st.one_of(st.integers(0, 4), st.sampled_from([float("nan"), float("inf"), -0.5]))


@given(st.lists(st.tuples(_COORDINATES, _COORDINATES), max_size=12))
def test_the_front_is_what_nothing_beats(points):
    """Against every other point, one by one."""
    finite = [abs(c) < 10 and abs(q) < 10 for c, q in points]

    def beaten(i: int) -> bool:
        return any(
            real and points[j] != points[i] and points[j][0] <= points[i][0]
            and points[j][1] >= points[i][1]
            for j, real in enumerate(finite)
        )  # fmt: skip

    assert front(points) == [real and not beaten(i) for i, real in enumerate(finite)]


def test_heat_maps_are_means_of_neighbours():
    """All columns count once, also in the last and shorter bin."""
    import numpy as np

    values = np.random.default_rng(0).random((3, 2 * BINS + 6))
    found = binned(values)
    assert found.shape == (3, 344) and values.shape[1] % 3
    assert found[:, 0] == pytest.approx(values[:, :3].mean(1))
    assert found[:, -1] == pytest.approx(values[:, 343 * 3 :].mean(1))
    assert binned(values[:, :7]) == pytest.approx(values[:, :7])


def test_the_kept_text_is_the_prompt(whole, report):
    """Stretch by stretch, in the shade of what holds it; the page shows it as it was."""
    trace = next(kept_text.shown(whole.traces, list(POLICIES)))
    (runs,) = kept_text.text_runs(trace)
    text = "".join(trace.tokens)
    assert "".join(t for _, t in runs) == text
    by_token = [shade for shade, t in runs for _ in re.findall(r" ?\S+", t)]
    share = levels(trace).mean(0) / 3
    assert by_token == [4 if s == 1 else int(4 * s) for s in share]
    assert " ".join(text.split()) in report[1].text


def test_of_a_long_prompt_both_ends_are_shown(whole, tmp_path, monkeypatch):
    """With how much is missing between them."""
    monkeypatch.setattr(kept_text, "MOST_TOKENS", 100)
    trace = whole.traces[0]
    first, last = kept_text.text_runs(trace)
    assert "".join(t for _, t in first) == "".join(trace.tokens[:50])
    assert "".join(t for _, t in last) == "".join(trace.tokens[-50:])
    by_token = [shade for shade, t in last for _ in re.findall(r" ?\S+", t)]
    assert by_token == list(map(kept_text.shade, (levels(trace).mean(0) / 3)[-50:]))
    results = Results({}, {}, (replace(one(whole), cell=trace.cell),), traces=(trace,))
    _, page, _ = written(results, tmp_path)
    assert f"{len(trace.tokens) - 100:,} tokens are not shown" in page.text


def test_traces_are_shown_of_one_prompt_and_a_middle_budget(whole):
    """One for each policy, whatever else was traced."""
    other = replace(whole.traces[3], cell=replace(whole.traces[3].cell, task="squad"))
    found = list(kept_text.shown((*whole.traces, other), list(POLICIES)))
    assert [t.cell.label for t in found] == list(POLICIES)
    assert {t.cell.budget for t in found} == {0.25, None}
    assert {t.cell.task for t in found} == {"needle"}


def test_policies_look_different():
    """Colour and marker together, for more policies than anybody compares."""
    labels = [str(i) for i in range(72)]
    assert len(set(styles(labels).values())) == 72


@pytest.mark.parametrize(
    ("found", "expected"),
    [
        (numbers.number(-1234.56, 1), "−1,234.6"),
        (numbers.number(-0.001, 2, sign=True), "0.00"),
        (numbers.number(0.25, 2, sign=True), "+0.25"),
        (numbers.number(float("inf"), 2), "–"),
        (numbers.share(0.125), "12.5 %"),
        (numbers.percent(-0.126), "−13 %"),
        (numbers.percent(None), "–"),
        (numbers.ratio(1, 4), "0.25×"),
        (numbers.ratio(1, 0), "–"),
        (numbers.flops_scale([3e9, 2e12]).unit, "TFLOP"),
        (numbers.runs([0, 0, 5, 0]), "0–1: 0, 2: 5, 3: 0"),
        (figures.shortened("a\x00" + "b" * 99, 11), "a bb … bbbb"),
    ],
)
def test_numbers_are_written_for_reading(found, expected):
    """Real minus signs, no negative zero, dashes for what is none."""
    assert found == expected


def test_a_folder_that_cannot_be_made(tmp_path, whole):
    """An error that names it."""
    (tmp_path / "file").write_text("")
    with pytest.raises(KVPruneError, match=r"file.*expected a folder for the report"):
        write_report(Results({}, {}), tmp_path / "file")


def test_without_matplotlib(tmp_path, monkeypatch):
    """It is asked for by the extra that brings it, and nothing is written."""
    import sys

    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(KVPruneError, match=r"pip install kvprune\[compare\]"):
        write_report(Results({}, {}), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_drawing_leaves_no_trace(whole, tmp_path):
    """matplotlib's settings are the reader's own; nothing is left open."""
    import matplotlib
    from matplotlib import _pylab_helpers

    before = dict(matplotlib.rcParams)
    write_report(Results({}, {}, (one(whole),)), tmp_path)
    assert dict(matplotlib.rcParams) == before
    assert not _pylab_helpers.Gcf.figs
