"""Work in threads of its own: the same results, and torch's own threads as they were."""

from __future__ import annotations

import threading
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

import kvprune
from kvprune.attention import blockwise as blocks
from kvprune.policies import H2O
from kvprune.statistics import Attention
from kvprune.threads import in_threads

from ..support.models import fresh_model, prompt
from ..support.opcount import OpCount


@pytest.fixture
def four_threads():
    """The tests' processes have one."""
    before = torch.get_num_threads()
    torch.set_num_threads(4)
    yield
    torch.set_num_threads(before)


def of_another_thread() -> int:
    """How many threads torch has in one that begins now."""
    found = list[int]()
    other = threading.Thread(target=lambda: found.append(torch.get_num_threads()))
    other.start()
    other.join()
    return found[0]


@pytest.mark.usefixtures("four_threads")
@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_each_worker_has_its_share_and_the_modes_of_who_asked(mode):
    def work(number: int) -> tuple[int, int, bool, bool, bool]:
        here = threading.current_thread() is threading.main_thread()
        grad, inference = torch.is_grad_enabled(), torch.is_inference_mode_enabled()
        return number, torch.get_num_threads(), here, grad, inference

    inference = mode is torch.inference_mode
    with mode():
        found = in_threads(work, 2)
    assert found == [(i, 2, False, False, inference) for i in range(2)]
    assert torch.get_num_threads() == of_another_thread() == 4


@pytest.mark.usefixtures("four_threads")
def test_an_error_arrives_and_leaves_nothing():
    def work(number: int) -> None:
        if number == 1:
            raise RuntimeError("in a worker")

    with pytest.raises(RuntimeError, match="in a worker"):
        in_threads(work, 3)
    assert torch.get_num_threads() == of_another_thread() == 4


@pytest.mark.usefixtures("four_threads")
def test_a_thread_that_cannot_begin_leaves_none_waiting(monkeypatch):
    """As where a machine allows no more; the first one begins late."""
    submit, begun = ThreadPoolExecutor.submit, list[int]()

    def refuses(pool, run, number):
        if begun:
            raise RuntimeError("can't start new thread")
        begun.append(number)
        return submit(pool, lambda: (time.sleep(0.1), run(number)))

    monkeypatch.setattr(ThreadPoolExecutor, "submit", refuses)
    with pytest.raises(RuntimeError, match="can't start"):
        in_threads(lambda number: number, 2)
    assert torch.get_num_threads() == of_another_thread() == 4


@pytest.mark.usefixtures("four_threads")
def test_who_watches_sees_everything():
    """In this thread, one after the other."""
    here = threading.current_thread()
    with OpCount() as ops:
        found = in_threads(lambda _: (torch.ones(2) + 1, threading.current_thread())[1], 4)
    assert found == [here] * 4
    assert ops.calls["add"] == 4
    with torch.autograd.profiler.profile():
        assert in_threads(lambda _: threading.current_thread(), 2) == [here] * 2
    with torch.autocast("cpu"):
        assert in_threads(lambda _: threading.current_thread(), 2) == [here] * 2


def _one_after_the_other(work, count, at_once):
    """With the share of torch's threads that each has in its own."""
    torch.set_num_threads(1)
    found = [work(number) for number in range(count)]
    torch.set_num_threads(4)
    return found


@pytest.mark.usefixtures("four_threads")
@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_a_prompt_is_read_to_the_same_bits(mode, monkeypatch):
    """By four workers at once, or by the same four one after the other."""
    model, ids, found = kvprune.attach(fresh_model()), prompt(2, 4 * blocks.BLOCK + 3), []
    for run in (in_threads, _one_after_the_other):
        monkeypatch.setattr(blocks, "in_threads", run)
        cache = kvprune.ComposedCache([H2O(20, 20)])
        with mode():
            found.append(model(ids, past_key_values=cache).logits)
            found.append(cache.layers[3].statistics[Attention()])
    assert torch.equal(found[0], found[2])
    assert torch.equal(found[1], found[3])


@pytest.mark.usefixtures("four_threads")
@pytest.mark.parametrize("count", [blocks.BLOCK + 1, 6 * blocks.BLOCK + 3])
def test_blocks_are_dealt_out_once(count):
    """Whatever the number of workers: fewer blocks than these, and more."""
    model, ids, found = kvprune.attach(fresh_model()), prompt(2, count), []
    for threads in (4, 3, 1):
        torch.set_num_threads(threads)
        cache = kvprune.ComposedCache([H2O(500, 500)])
        with torch.no_grad():
            logits = model(ids, past_key_values=cache).logits
        found.append((logits, cache.layers[3].statistics[Attention()]))
    for logits, mass in found[:2]:
        torch.testing.assert_close(logits, found[2][0], rtol=1e-9, atol=1e-12)
        torch.testing.assert_close(mass, found[2][1], rtol=1e-9, atol=1e-12)
