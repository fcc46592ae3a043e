"""The published comparison: docs/comparison.md, measured and written by one command.

    make comparison                                  # everything; goes on where it was stopped
    python -m bench.comparison measure --needle 1024
    python -m bench.comparison page

`settings.py` says what is compared; `ours.py` runs `kvprune compare`; `theirs.py` has kvpress's
presses, in the environment of `bench.peers`, answer the same questions; `collect.py` makes
bench/results/comparison.json of both sides and the report of kvprune's side, and `page.py` makes
the page.
"""
