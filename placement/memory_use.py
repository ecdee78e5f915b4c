"""Bytes that homes take, by tier and purpose."""

from __future__ import annotations

from placement.homes import Homes
from placement.model_spec import ModelSpec
from placement.plan import RamUse, VramUse
from placement.planner import activation_nbytes, fixed_ram
from placement.workload import Workload

STAGING_SLOTS = 2
"""In VRAM, for experts that are copied, computed and forgotten: one computes while the next one comes."""

_VRAM_WORKSPACE_NBYTES = 256 << 20
"""Code, workspaces of libraries and what an allocator keeps."""


def ram_use(spec: ModelSpec, workload: Workload, homes: Homes, paged_nbytes: int | None = None) -> RamUse:
    """Host memory: as without an accelerator, less the dense weights and KV caches that live there.

    Args:
        spec: the model.
        workload: what will run.
        homes: where everything lives; with blocks no KV cache is in VRAM.
        paged_nbytes: memory of a KV cache in blocks; None for one in one piece.
    """
    fixed = fixed_ram(spec, workload, paged_nbytes)
    moved = sum(spec.layers[index].dense_nbytes for index in homes.dense_in_vram)
    if homes.head_in_vram and spec.head is not None and not spec.head_is_shared:
        moved += spec.head.nbytes
    kv = fixed.kv_nbytes - kv_moved_nbytes(spec, workload, homes)
    return RamUse(fixed.dense_nbytes - moved, kv, fixed.activation_nbytes, homes.ram_slots * spec.bundle_nbytes)


def vram_use(spec: ModelSpec, workload: Workload, homes: Homes) -> VramUse:
    """An accelerator's memory; all zero where nothing lives there."""
    if not homes.uses_vram:
        return VramUse(0, 0, 0, 0)
    dense = sum(spec.layers[index].dense_nbytes for index in homes.dense_in_vram)
    if homes.head_in_vram and spec.head is not None:
        dense += spec.head.nbytes
    return VramUse(
        dense_nbytes=dense,
        kv_nbytes=kv_moved_nbytes(spec, workload, homes),
        activation_nbytes=vram_beside_weights(spec, workload) + STAGING_SLOTS * spec.bundle_nbytes,
        slot_nbytes=homes.vram_slots * spec.bundle_nbytes,
    )


def vram_beside_weights(spec: ModelSpec, workload: Workload) -> int:
    """Bytes that an accelerator needs for the activations of the largest pass, libraries and what allocators keep."""
    tokens = min(workload.context_tokens, workload.prefill_chunk_tokens)
    return activation_nbytes(spec, workload.batch, tokens, all_logits=False, host=False) + _VRAM_WORKSPACE_NBYTES


def kv_moved_nbytes(spec: ModelSpec, workload: Workload, homes: Homes) -> int:
    """Bytes of KV cache that homes put into VRAM; what does not grow is shared out among layers that do not grow."""
    tokens = workload.context_tokens
    growing = sum(spec.layers[index].kv_nbytes_per_token for index in homes.kv_in_vram)
    still = [index for index, layer in enumerate(spec.layers) if layer.kv_nbytes_per_token == 0]
    moved = sum(spec.layers[index].kv_nbytes_per_token == 0 for index in homes.kv_in_vram)
    fixed = spec.kv_fixed_nbytes * moved // len(still) if still else 0
    return workload.batch * (tokens * growing + fixed)
