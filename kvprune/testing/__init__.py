"""The invariants of kvprune, to test policies of your own in any package.

```python
from kvprune.testing import check

def test_my_policy():
    check(MyPolicy(budget=8), roomy=MyPolicy(budget=1000))
```

The module needs nothing but kvprune itself. `Driver`, `Oracles` and `check_each_step` compare a
policy with an oracle of your own, step by step; `DenseOracle` is what such an oracle derives from.
"""

from .checking import check
from .driver import Driver, Oracles, Tokens, check_each_step
from .oracle import DenseOracle, Oracle
from .runs import Case, Run, feed

__all__ = [
    "Case",
    "DenseOracle",
    "Driver",
    "Oracle",
    "Oracles",
    "Run",
    "Tokens",
    "check",
    "check_each_step",
    "feed",
]
