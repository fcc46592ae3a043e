"""Token pruning and KV-cache eviction as composable policies, inside `generate`.

```python
model = kvprune.attach(AutoModelForCausalLM.from_pretrained(name))
cache = kvprune.ComposedCache([SDTP(), H2O()])
model.generate(**inputs, cache=cache, max_new_tokens=128)
```
"""

import importlib
import importlib.metadata
from typing import TYPE_CHECKING, Any

from .cache.composed import ComposedCache
from .errors import KVPruneError
from .policy.around import Around
from .policy.base import TokenPolicy
from .policy.selection import Ranking
from .storage.quantized import Quantized
from .wiring.attach import attach, detach
from .wiring.read import read
from .wiring.room import share_for_bytes

if TYPE_CHECKING:
    from . import testing
    from .evaluation.compare.compare import compare

    __version__: str

__all__ = [
    "Around",
    "ComposedCache",
    "KVPruneError",
    "Quantized",
    "Ranking",
    "TokenPolicy",
    "__version__",
    "attach",
    "compare",
    "detach",
    "read",
    "share_for_bytes",
    "testing",
]


def __getattr__(name: str) -> Any:
    """`compare`, `testing` and the version, and what they need, once they are asked for."""
    if name == "__version__":
        return importlib.metadata.version(__name__)
    if name == "testing":
        return importlib.import_module(".testing", __name__)
    if name == "compare":
        from .evaluation.compare.compare import compare

        return compare
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
