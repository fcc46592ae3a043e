"""The published comparison: what docs/comparison.md says, measured and written by one command.

    make comparison                                  # everything; goes on where it was stopped
    python -m bench.comparison measure --needle 1024
    python -m bench.comparison page

`settings.py` says what is compared; `ours.py` runs `kvprune compare`; `theirs.py` has kvpress's
presses, in the environment of `bench.peers`, answer the same questions; `collect.py` makes
bench/results/comparison.json and the report of both, and `page.py` the page of that.
"""
