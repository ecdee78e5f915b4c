"""What captured steps did, in figures."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass
class GraphFigures:
    """Counted since the model was loaded.

    Attributes:
        captured: graphs that were captured and proven.
        replayed: decode steps that were replayed.
        layer_by_layer: decode steps that were not, those by which graphs were proven included.
        reason: why no step is replayed any more; empty while some may be.
        declined: why the last cache whose steps are not replayed was declined; empty where none was.
    """

    captured: int = 0
    replayed: int = 0
    layer_by_layer: int = 0
    reason: str = ""
    declined: str = ""
