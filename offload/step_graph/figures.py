"""What captured steps did, in figures."""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass
class GraphFigures:
    """Counted since the model was loaded.

    Attributes:
        captured: graphs that were captured and proven.
        replayed: decode steps that were replayed.
        layer_by_layer: decode steps that were not, those by which graphs were proven included.
        by_reason: those, by why.
        reason: why no step is replayed any more; empty while some may be.
    """

    captured: int = 0
    replayed: int = 0
    layer_by_layer: int = 0
    by_reason: dict[str, int] = field(default_factory=dict)
    reason: str = ""

    def note_layer_by_layer(self, reason: str) -> None:
        """A step was not replayed."""
        self.layer_by_layer += 1
        self.by_reason[reason] = self.by_reason.get(reason, 0) + 1
