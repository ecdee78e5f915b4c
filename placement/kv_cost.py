"""Seconds of a KV cache in blocks: other bytes to attend to, only a part of them, and those that come from disk."""

from __future__ import annotations

from dataclasses import replace
from typing import NamedTuple

import numpy as np

from placement.dense_cost import attention_s
from placement.hardware_profile import HardwareProfile
from placement.kv import SETTINGS, KvPlan, block_nbytes, landmarks_nbytes
from placement.kv_settings import READ_NBYTES, READS_IN_FLIGHT
from placement.kv_sparsity import KvSparsity
from placement.model_spec import ModelSpec
from placement.passes import Pass, decode_pass, prefill_passes
from placement.prediction import PassPrediction, Prediction
from placement.workload import Workload


def in_blocks(spec: ModelSpec, kv: KvPlan | None) -> ModelSpec:
    """The spec with what attention reads of a cached token in blocks of the plan's format."""
    if kv is None or len(spec.layers) != len(spec.kv_shapes):
        return spec
    layers = tuple(
        layer
        if shape is None
        else replace(
            layer, kv_nbytes_per_token=block_nbytes(shape, kv.format) // SETTINGS.block_tokens, kv_format=kv.format
        )
        for layer, shape in zip(spec.layers, spec.kv_shapes, strict=True)
    )
    return replace(spec, layers=layers)


def with_blocks_in_vram(
    prediction: Prediction, spec: ModelSpec, profile: HardwareProfile, workload: Workload, kv: KvPlan | None
) -> Prediction:
    """A prediction whose decode attends to the newest blocks on the accelerator while the CPU attends to the others.

    Layers' dense weights are in VRAM; queries and results cross as they do without blocks there. Prompts are left as
    they are.
    """
    if kv is None or not kv.vram_tokens:
        return prediction
    seconds, one = blocks_in_vram(spec, profile, workload, kv), prediction.decode
    scale = 1 - seconds.saved / one.terms.total_s
    changed = replace(
        one,
        terms=replace(one.terms, attention_s=one.terms.attention_s - seconds.saved),
        low_s=one.low_s * scale,
        high_s=one.high_s * scale,
        cpu_busy_s=one.cpu_busy_s - seconds.cpu_relieved,
        gpu_busy_s=one.gpu_busy_s + seconds.gpu,
    )
    return replace(prediction, decode=changed)


class BlocksInVram(NamedTuple):
    """Seconds of a decode pass's attention with blocks in VRAM.

    Attributes:
        saved: beside attention by the CPU alone.
        cpu_relieved: of the CPU's that others do.
        gpu: of the accelerator.
    """

    saved: float
    cpu_relieved: float
    gpu: float


def blocks_in_vram(spec: ModelSpec, profile: HardwareProfile, workload: Workload, kv: KvPlan) -> BlocksInVram:
    """What the newest blocks in VRAM change of a decode pass; a layer is done when both devices are."""
    assert profile.gpu is not None
    work = decode_pass(workload)
    above = min(float(kv.vram_tokens), work.cached_tokens)
    saved = relieved = on_gpu = 0.0
    for layer, shape in zip(in_blocks(spec, kv).layers, spec.kv_shapes, strict=True):
        if shape is None:
            continue
        alone_s = attention_s(layer, profile.cpu, work)
        gpu_s = attention_s(layer, profile.gpu, replace(work, cached_tokens=above))
        rest = replace(work, cached_tokens=work.cached_tokens - above)
        cpu_s = attention_s(layer, profile.cpu, rest) if above < work.cached_tokens else 0.0
        saved += alone_s - max(gpu_s, cpu_s)
        relieved += alone_s - cpu_s
        on_gpu += gpu_s
    return BlocksInVram(saved, relieved, on_gpu)


def with_sparsity(prediction: Prediction, spec: ModelSpec, workload: Workload, kv: KvPlan | None) -> Prediction:
    """A prediction whose decode attends to a part of the cache; prompts attend to all of it."""
    if kv is None or kv.sparsity is None:
        return prediction
    one = prediction.decode
    saved_s = one.terms.attention_s * (1 - attended_share(spec, workload, kv))
    scale = 1 - saved_s / one.terms.total_s
    terms = replace(one.terms, attention_s=one.terms.attention_s - saved_s)
    return replace(prediction, decode=replace(one, terms=terms, low_s=one.low_s * scale, high_s=one.high_s * scale))


def attended_share(spec: ModelSpec, workload: Workload, kv: KvPlan) -> float:
    """Share of the cache's bytes that a step's attention reads; top-k reads all landmarks too."""
    assert kv.sparsity is not None
    sparsity, cached = KvSparsity.parse(kv.sparsity), decode_pass(workload).cached_tokens
    landmarks = landmarks_nbytes(spec, 1, SETTINGS.block_tokens, sparsity) / 2 / SETTINGS.block_tokens
    return min(1.0, _attended_tokens(workload, sparsity) / max(1.0, cached) + landmarks / kv.nbytes_per_token)


def _attended_tokens(workload: Workload, sparsity: KvSparsity) -> float:
    """Tokens that a step attends to; where others are evicted, all that are kept."""
    cached = decode_pass(workload).cached_tokens
    if sparsity.method == "snapkv":
        later = max(0.0, cached - workload.prompt_tokens)
        return sparsity.share * (cached - later) + later
    return min(cached, sparsity.share * cached + SETTINGS.recent_tokens + SETTINGS.block_tokens)


def _cold_share(spec: ModelSpec, workload: Workload, kv: KvPlan) -> float:
    """Share of the blocks on disk that a step reads: a block is read whole, whichever of its heads is attended to."""
    if kv.sparsity is None:
        return 1.0
    sparsity = KvSparsity.parse(kv.sparsity)
    if sparsity.evicts:
        cold = kv.cold_tokens(decode_pass(workload).cached_tokens)
        return kv.cold_tokens(_attended_tokens(workload, sparsity)) / cold if cold else 1.0
    heads = max(shape.heads for shape in spec.kv_shapes if shape is not None)
    return 1 - (1 - sparsity.share) ** heads


def with_reads(
    prediction: Prediction, spec: ModelSpec, profile: HardwareProfile, workload: Workload, kv: KvPlan | None
) -> Prediction:
    """A prediction and the reads of blocks that are on disk, every one that is attended to once a pass.

    Blocks are read while others of the same layer are attended: both have the shares of their speeds that the profile
    measured, until the one that takes less is done.
    """
    if kv is None or kv.spills_at_tokens is None or profile.disk is None:
        return prediction
    return replace(
        prediction,
        decode=_with(prediction.decode, spec, profile, [decode_pass(workload)], kv, _cold_share(spec, workload, kv)),
        prefill=_with(prediction.prefill, spec, profile, prefill_passes(workload), kv, 1.0),
    )


def cold_nbytes(kv: KvPlan, work: Pass) -> float:
    """Bytes that passes of one kind read from disk together."""
    return work.count * work.batch * kv.cold_tokens(work.cached_tokens + work.new_tokens) * kv.nbytes_per_token


def _with(
    one: PassPrediction, spec: ModelSpec, profile: HardwareProfile, works: list[Pass], kv: KvPlan, share: float
) -> PassPrediction:
    assert profile.disk is not None
    nbytes = share * sum(cold_nbytes(kv, work) for work in works)
    if not nbytes:
        return one
    shapes = [shape for shape in spec.kv_shapes if shape is not None]
    segment = SETTINGS.segment_blocks * max(block_nbytes(shape, kv.format) for shape in shapes)
    speed = profile.disk.bytes_per_s(min(segment, READ_NBYTES), READS_IN_FLIGHT)
    # Each layer's reads begin anew: what is read ahead of them stands in the way of experts.
    times = len(shapes) * sum(work.count for work in works)
    reads = np.array(nbytes / segment / times)
    read_s = nbytes / speed + times * float(
        profile.disk.startup_s(segment, reads, lambda count: count * segment / speed)
    )
    attention_s = np.array(one.terms.attention_s)
    stall_s = max(0.0, float(profile.disk.few.beside(speed).seconds(attention_s, np.array(read_s)) - attention_s))
    scale = 1 + stall_s / one.terms.total_s
    return replace(
        one,
        terms=replace(one.terms, disk_s=one.terms.disk_s + stall_s),
        low_s=one.low_s * scale,
        high_s=one.high_s * scale,
        disk_busy_s=one.disk_busy_s + read_s,
        read_nbytes=one.read_nbytes + nbytes,
    )
