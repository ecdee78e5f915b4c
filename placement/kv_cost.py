"""Seconds of a KV cache in blocks: other bytes to attend to, and those that come from disk."""

from __future__ import annotations

from dataclasses import replace

from placement.hardware_profile import HardwareProfile
from placement.kv import SETTINGS, KvPlan, block_nbytes
from placement.model_spec import ModelSpec
from placement.passes import Pass, decode_pass, prefill_passes
from placement.prediction import PassPrediction, Prediction
from placement.workload import Workload

_READS_IN_FLIGHT = 4


def in_blocks(spec: ModelSpec, kv: KvPlan | None) -> ModelSpec:
    """The spec with the bytes that attention reads of a cached token in blocks of the plan's format."""
    if kv is None or len(spec.layers) != len(spec.kv_shapes):
        return spec
    layers = tuple(
        layer
        if shape is None
        else replace(layer, kv_nbytes_per_token=block_nbytes(shape, kv.format) // SETTINGS.block_tokens)
        for layer, shape in zip(spec.layers, spec.kv_shapes, strict=True)
    )
    return replace(spec, layers=layers)


def with_reads(
    prediction: Prediction, spec: ModelSpec, profile: HardwareProfile, workload: Workload, kv: KvPlan | None
) -> Prediction:
    """A prediction and the reads of blocks that are on disk, every one once a pass.

    Blocks are read while others of the same layer are attended, so that what takes longer counts.
    """
    if kv is None or kv.spills_at_tokens is None or profile.disk is None:
        return prediction
    return replace(
        prediction,
        decode=_with(prediction.decode, spec, profile, [decode_pass(workload)], kv),
        prefill=_with(prediction.prefill, spec, profile, prefill_passes(workload), kv),
    )


def cold_nbytes(kv: KvPlan, work: Pass) -> float:
    """Bytes that passes of one kind read from disk together."""
    return work.count * work.batch * kv.cold_tokens(work.cached_tokens + work.new_tokens) * kv.nbytes_per_token


def _with(
    one: PassPrediction, spec: ModelSpec, profile: HardwareProfile, works: list[Pass], kv: KvPlan
) -> PassPrediction:
    assert profile.disk is not None
    nbytes = sum(cold_nbytes(kv, work) for work in works)
    shapes = [shape for shape in spec.kv_shapes if shape is not None]
    segment = SETTINGS.segment_blocks * max(block_nbytes(shape, kv.format) for shape in shapes)
    read_s = nbytes / profile.disk.overlapped_bytes_per_s(segment, _READS_IN_FLIGHT)
    stall_s = max(0.0, read_s - one.terms.attention_s)
    scale = 1 + stall_s / one.terms.total_s
    return replace(
        one,
        terms=replace(one.terms, disk_s=one.terms.disk_s + stall_s),
        low_s=one.low_s * scale,
        high_s=one.high_s * scale,
        disk_busy_s=one.disk_busy_s + read_s,
        read_nbytes=one.read_nbytes + nbytes,
    )
