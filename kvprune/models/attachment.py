"""A model that kvprune is attached to, as its caches know it."""

from __future__ import annotations

from dataclasses import dataclass, field, fields
from typing import Any

from .structure import Local


@dataclass(frozen=True, eq=False)
class Attachment:
    """A model that kvprune is attached to, as its caches know it (by identity).

    local: by layer, what its queries can see; empty where all layers see everything.
    states: by layer, how many states it keeps instead of slots; empty where all have slots.
    cannot_prune: why its hidden states cannot be pruned; empty where they can.
    cannot_record: why drafts cannot be taken back; empty where they can.
    cannot_show_queries: why queries cannot be seen; empty where they can.
    memory: what was found out about the model, so that it is not for every cache.
    group: the processes that share its heads; see `kvprune.models.parallel`.
    """

    name: str
    num_layers: int
    num_heads: int
    local: tuple[Local | None, ...] = ()
    states: tuple[int, ...] = ()
    cannot_prune: str = ""
    cannot_record: str = ""
    cannot_show_queries: str = ""
    group: Any = None
    memory: dict[str, Any] = field(default_factory=dict)

    def says_the_same_as(self, other: Attachment) -> bool:
        """Whether two attachments describe the same model, whatever was found out about it."""
        facts = [f.name for f in fields(self) if f.name != "memory"]
        return all(getattr(self, name) == getattr(other, name) for name in facts)
