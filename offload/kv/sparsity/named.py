"""Ways of attending to a part of a table, by name."""

from __future__ import annotations

from offload.kv.sparsity.base import TableSparsity
from offload.kv.sparsity.h2o import H2o
from offload.kv.sparsity.snapkv import SnapKv
from offload.kv.sparsity.top_k import TopK
from placement.kv_sparsity import KvSparsity

_CLASSES: dict[str, type[TopK | SnapKv | H2o]] = {"top-k": TopK, "snapkv": SnapKv, "h2o": H2o}


def make_sparsity(chosen: KvSparsity) -> TableSparsity:
    """That of an empty table."""
    return _CLASSES[chosen.method](chosen.share)
