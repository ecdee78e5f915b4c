"""What a forward pass takes of the budget, by the kind of KV cache."""

from __future__ import annotations

from offload.kv.paging import Paging
from placement import planner
from placement.kv import fixed_nbytes, landmarks_nbytes, scratch_nbytes
from placement.model_spec import ModelSpec
from placement.workload import Workload


def pass_nbytes(
    spec: ModelSpec,
    paging: Paging | None,
    batch: int,
    tokens: int,
    past_tokens: int,
    *,
    all_logits: bool,
    kv_elsewhere: bool = False,
) -> int:
    """Bytes beside dense weights and experts; blocks of KV caches, of all sequences, are bounded by themselves.

    Args:
        spec: the model.
        paging: None where the cache grows in place.
        batch: sequences.
        tokens: new ones of each.
        past_tokens: of each, cached already.
        all_logits: logits are computed for every token.
        kv_elsewhere: a cache that grows in place is on an accelerator.
    """
    if paging is None and kv_elsewhere:
        return planner.activation_nbytes(spec, batch, tokens, all_logits=all_logits)
    if paging is None:
        return planner.pass_nbytes(spec, batch, tokens, past_tokens, all_logits=all_logits)
    work = Workload(past_tokens + tokens, batch, tokens)
    beside = fixed_nbytes(spec, work) + scratch_nbytes(spec, work)
    beside += landmarks_nbytes(spec, batch, work.context_tokens, paging.sparsity)
    return paging.ram_nbytes + beside + planner.activation_nbytes(spec, batch, tokens, all_logits=all_logits)
