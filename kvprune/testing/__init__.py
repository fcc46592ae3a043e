"""The invariants of kvprune for policies of your own, wherever they live.

```python
from kvprune.testing import check

def test_my_policy():
    check(MyPolicy(budget=8), roomy=MyPolicy(budget=1000))
```

Needs nothing but kvprune itself. `Driver`, `Oracles` and `check_each_step` compare a policy with an
oracle of yours, step by step.
"""

from .checking import check
from .driver import Driver, Oracles, Tokens, check_each_step
from .runs import Case, Run, feed

__all__ = ["Case", "Driver", "Oracles", "Run", "Tokens", "check", "check_each_step", "feed"]
