"""What `examples/tiny_recall` recalls of contexts through the runtime, by how its KV cache is kept and attended to."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch

import examples.tiny_recall
import offload
from examples.tiny_recall.recall import Recalled, recall_all
from examples.tiny_recall.task import tell_facts
from offload.runtime import Runtime

MODEL = Path(examples.tiny_recall.__file__).parent / "model"
_ROOM_TOKENS = 64


@dataclass(frozen=True)
class RecallScale:
    """How much is asked.

    Attributes:
        tokens: of a context that tells facts.
        contexts: how many.
        facts: that each tells.
    """

    tokens: int
    contexts: int
    facts: int


def recalled(work: Path, scale: RecallScale, fillers: int, **options: Any) -> tuple[Recalled, float | None]:
    """What is recalled, and the share of exact attention that a sparse method captured.

    Args:
        work: where the store goes.
        scale: how much is asked.
        fillers: kinds of filler between facts.
        options: of `offload.load`.
    """
    model = offload.load(
        MODEL, ram="2GiB", nvme=work / "recall-store", context=scale.tokens + _ROOM_TOKENS, dtype="float32",
        progress=False, **options,
    )  # fmt: skip
    generator = torch.Generator().manual_seed(1)
    told = [tell_facts(scale.tokens, scale.facts, generator, fillers) for _ in range(scale.contexts)]
    with cast("Runtime", model.offload) as runtime:
        found = recall_all(model, told)
        stats = runtime.stats().kv
    return found, None if stats is None or stats.sparsity is None else stats.sparsity.captured_mass
