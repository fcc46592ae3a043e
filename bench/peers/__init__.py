"""kvpress beside kvprune: the same model, prompts, budgets and lines of measuring code.

    make peers                                        # everything; says how long it will take
    python -m bench.peers speed --lengths 512 --repeats 2
    python -m bench.peers quality --questions 3

kvpress needs an older transformers, so that it gets a virtual environment of its own
(`environment.py`, `requirements.txt`). `protocol.py`, `jobs.py`, `rows.py`, `worker.py` and
`bench/resident.py` run in both environments and import neither library; `ours.py` and `theirs.py`
are the difference between the sides; the other files run in kvprune's environment.
"""
