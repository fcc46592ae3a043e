"""Token pruning and KV-cache eviction as composable policies, inside `generate`.

```python
model = kvprune.attach(AutoModelForCausalLM.from_pretrained(name))
cache = kvprune.ComposedCache([SDTP(), H2O()])
model.generate(**inputs, cache=cache, max_new_tokens=128)
```
"""

from .attach import attach, detach
from .cache import ComposedCache
from .errors import KVPruneError
from .policy import Ranking, TokenPolicy

__all__ = ["ComposedCache", "KVPruneError", "Ranking", "TokenPolicy", "attach", "detach"]
