"""Live bytes: what came and went is not counted, what was there at once is."""

from __future__ import annotations

import torch

from bench.live import LiveBytes


def test_what_is_freed_is_not_counted():
    """Two at a time, of four that were made; a view is no new bytes."""
    with LiveBytes() as live:
        one = torch.zeros(1000)
        two = one + 1
        del one
        three = two + 1
        view = three[:500]
        del two, three
    assert live.peak == 2 * 4000 and live.now == 4000
    assert view.shape == (500,)
    del view
    assert live.now == 0


def test_writing_in_place_makes_nothing():
    """Nor does what was there before."""
    before = torch.zeros(1000)
    with LiveBytes() as live:
        before.add_(1)
        before.view(10, 100).mul_(2)
    assert live.peak == 0
