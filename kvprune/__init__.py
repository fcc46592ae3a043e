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

if TYPE_CHECKING:
    from . import testing
    from .cache.composed import ComposedCache
    from .errors import KVPruneError
    from .evaluation.compare.compare import compare
    from .policy.around import Around
    from .policy.base import TokenPolicy
    from .policy.selection import Ranking
    from .storage.quantized import Quantized
    from .wiring.attach import attach, detach
    from .wiring.read import read
    from .wiring.room import share_for_bytes

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

_HOMES = {
    "Around": ".policy.around",
    "ComposedCache": ".cache.composed",
    "KVPruneError": ".errors",
    "Quantized": ".storage.quantized",
    "Ranking": ".policy.selection",
    "TokenPolicy": ".policy.base",
    "attach": ".wiring.attach",
    "compare": ".evaluation.compare.compare",
    "detach": ".wiring.attach",
    "read": ".wiring.read",
    "share_for_bytes": ".wiring.room",
}
"""Where each name is. None is imported before it is asked for: torch and transformers take seconds,
which nobody should wait for `kvprune --help`."""

_MODULES = ("cache", "errors", "policies", "policy", "statistics", "storage", "testing")
"""What may be written as `kvprune.policy.select` without an import of its own."""


def __getattr__(name: str) -> Any:
    """A public name, and what it needs, once it is asked for."""
    if name == "__version__":
        found: Any = importlib.metadata.version(__name__)
    elif name in _HOMES:
        found = getattr(importlib.import_module(_HOMES[name], __name__), name)
    elif name in _MODULES:
        return importlib.import_module(f".{name}", __name__)
    else:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    globals()[name] = found
    return found


def __dir__() -> list[str]:
    """The public names, asked for or not."""
    return sorted({*__all__, "policies", "policy", "statistics"})
