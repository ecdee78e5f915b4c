"""Bytes of a KV cache by format, and how it is split over RAM and disk."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from formats.elements import ELEMENT_FORMATS
from formats.key_sketch import SketchLayout
from formats.kv import KvLayout
from placement.kv_settings import CHUNK_BLOCKS, KvSettings
from placement.kv_sparsity import KvSparsity

if TYPE_CHECKING:
    from placement.model_spec import ModelSpec
    from placement.workload import Workload

SETTINGS = KvSettings()

KV_CHOICES = ("auto", "bf16", "fp16", "fp32", "fp8", "int8", "int4")
"""What `kv=` may be."""

LEAST_BLOCKS = 4
"""Of the largest of a model: with room for fewer in an accelerator's memory, none lie there unasked."""

_MASK_COPIES = 3
_FP32_COPIES = 5


@dataclass(frozen=True)
class KvShape:
    """Keys and values of one token in one layer of the cache.

    Attributes:
        heads: of keys and values.
        key_width: channels of a head's key.
        value_width: channels of a head's value; 0 where it is a part of the key.
        value_from_key: channels of that part, 0 where values are their own.
    """

    heads: int
    key_width: int
    value_width: int
    value_from_key: int = 0


@dataclass(frozen=True)
class KvChoice:
    """What the user wants of the KV cache.

    Attributes:
        format: of KV_CHOICES.
        ram_nbytes: bound on its memory, None for as much as the plan can give.
        blocks: whether it lies in blocks even where it would fit without.
        sparsity: how it is attended to in part; None for all of it.
        vram_nbytes: memory of an accelerator for its newest blocks; None for as much as a plan can give, 0 for none.
    """

    format: str = "auto"
    ram_nbytes: int | None = None
    blocks: bool = False
    sparsity: KvSparsity | None = None
    vram_nbytes: int | None = 0


@dataclass(frozen=True)
class KvPlan:
    """A KV cache in blocks.

    Attributes:
        format: of blocks older than `recent_tokens`, by the name that `formats.kv` gives it.
        lossy: whether that rounds what the model computed.
        nbytes_per_token: of one sequence in that format, scales included, all paged layers.
        recent_tokens: the newest tokens of a sequence, which stay in the model's dtype; 0 where all do.
        ram_nbytes: bound on the memory of blocks, those included that are read back from disk.
        disk_nbytes: that blocks take on disk at the full context.
        spills_at_tokens: cached tokens of each sequence from which on blocks go to disk; None where all fit.
        sparsity: method and share of attention to a part of it, as "top-k:0.05", which is lossy; None for all of it.
        landmarks_nbytes: memory beside blocks in which blocks are known without being read, at the full context.
        vram_nbytes: memory of an accelerator in which the newest blocks lie.
        vram_tokens: newest tokens of each sequence that lie there, at the full context.
    """

    format: str
    lossy: bool
    nbytes_per_token: int
    recent_tokens: int
    ram_nbytes: int
    disk_nbytes: int
    spills_at_tokens: int | None
    sparsity: str | None = None
    landmarks_nbytes: int = 0
    vram_nbytes: int = 0
    vram_tokens: int = 0

    def __post_init__(self) -> None:
        if min(self.ram_nbytes, self.disk_nbytes, self.vram_nbytes, self.vram_tokens) < 0:
            raise ValueError("a KV plan with a negative size")

    def cold_tokens(self, cached_tokens: float) -> float:
        """Tokens of each sequence whose blocks are on disk when so many are cached."""
        return 0.0 if self.spills_at_tokens is None else max(0.0, cached_tokens - self.spills_at_tokens)


def layout_format(choice: str, dtype: str) -> str:
    """The format of blocks that `kv=` names, for a model that computes in `dtype`."""
    if choice == "auto":
        return dtype
    return "fp8_e4m3" if choice == "fp8" else choice


def is_packed(format: str) -> bool:
    """Whether blocks of a format are packed when they are full and old, and written in the model's dtype before."""
    return format not in ELEMENT_FORMATS


def token_nbytes(spec: ModelSpec, format: str) -> int:
    """Bytes of a token in full blocks of a format, all layers that can be paged."""
    return sum(block_nbytes(shape, format) for shape in _shapes(spec)) // SETTINGS.block_tokens


def block_nbytes(shape: KvShape, format: str) -> int:
    """Bytes of a block."""
    widths = shape.key_width, shape.value_width, SETTINGS.block_tokens, shape.value_from_key
    return KvLayout(format, shape.heads, *widths).nbytes


def largest_block_nbytes(spec: ModelSpec, format: str) -> int:
    """Bytes of the largest block of any layer, packed or written to."""
    formats = format, _written(spec, format)
    return max(block_nbytes(shape, one) for shape in _shapes(spec) for one in formats)


def minimum_nbytes(spec: ModelSpec, batch: int, format: str, *, above: bool = False) -> int:
    """The least host memory in which a paged cache works: blocks that are written to, and two segments to read into.

    With blocks `above` one segment more, into which they are brought down.
    """
    recent = SETTINGS.recent_tokens // SETTINGS.block_tokens if is_packed(format) else 0
    plain = [block_nbytes(shape, _written(spec, format)) for shape in _shapes(spec)]
    packed = [block_nbytes(shape, format) for shape in _shapes(spec)]
    open_nbytes = batch * (recent + 2) * sum(plain)
    growing = batch * SETTINGS.piece_blocks * (max(plain) + max(packed))
    return open_nbytes + growing + (3 if above else 2) * _segment_nbytes(spec, format)


def plan_kv(spec: ModelSpec, workload: Workload, choice: KvChoice, room_nbytes: int) -> KvPlan:
    """A cache in blocks.

    Args:
        spec: with shapes of layers that can be paged.
        workload: what will run.
        choice: what the user wants.
        room_nbytes: memory that there is for it.
    """
    format = layout_format(choice.format, spec.dtype)
    above = choice.vram_nbytes != 0
    whole = _whole_nbytes(spec, workload.batch, workload.context_tokens, format, above=above)
    ram = min(whole, room_nbytes if choice.ram_nbytes is None else min(choice.ram_nbytes, room_nbytes))
    each = token_nbytes(spec, format)
    spills: int | None = None
    disk = 0
    if ram < whole:
        kept = ram - _staging_nbytes(spec, format, ram) - _open_nbytes(spec, workload.batch, format)
        kept -= _segment_nbytes(spec, format) if above else 0
        spills = _recent_tokens(format) + _tokens_in(kept, each * workload.batch)
        disk = each * workload.batch * max(0, workload.context_tokens - spills)
    return KvPlan(
        format=format,
        lossy=format not in (spec.dtype, "fp32"),
        nbytes_per_token=each,
        recent_tokens=_recent_tokens(format),
        ram_nbytes=ram,
        disk_nbytes=disk,
        spills_at_tokens=spills,
        sparsity=None if choice.sparsity is None else str(choice.sparsity),
        landmarks_nbytes=landmarks_nbytes(spec, workload.batch, workload.context_tokens, choice.sparsity),
    )


def with_blocks_above(spec: ModelSpec, workload: Workload, plan: KvPlan, vram_nbytes: int) -> KvPlan:
    """The plan with the newest blocks in an accelerator's memory, and no more host memory than the others take.

    Args:
        spec: with shapes of layers that can be paged.
        workload: what will run.
        plan: for host memory alone; holds at least `minimum_nbytes(..., above=True)`.
        vram_nbytes: of the accelerator, for blocks.
    """
    batch, format, context = workload.batch, plan.format, workload.context_tokens
    step = plan.nbytes_per_token * batch
    here = _recent_tokens(format) + _tokens_in(vram_nbytes - _open_nbytes(spec, batch, format), step)
    above = min(context, here if vram_nbytes >= _open_nbytes(spec, batch, format) else 0)
    least = minimum_nbytes(spec, batch, format, above=True)
    rest = _whole_nbytes(spec, batch, context - above, format, above=True)
    ram = min(plan.ram_nbytes, max(least, rest))
    spills: int | None = None
    if above < context and ram < rest:
        kept = ram - _staging_nbytes(spec, format, ram) - _segment_nbytes(spec, format)
        spills = above + _tokens_in(kept, step)
    return replace(
        plan,
        ram_nbytes=ram,
        disk_nbytes=0 if spills is None else step * max(0, context - spills),
        spills_at_tokens=spills,
        vram_nbytes=vram_nbytes,
        vram_tokens=above,
    )


def whole_above_nbytes(spec: ModelSpec, workload: Workload, format: str) -> int:
    """Memory of an accelerator in which a cache of the full context lies whole, with what chunks of it leave free."""
    staging = SETTINGS.staging_segments * _segment_nbytes(spec, format)
    chunks = 3 * CHUNK_BLOCKS * largest_block_nbytes(spec, format)
    return _whole_nbytes(spec, workload.batch, workload.context_tokens, format) - staging + chunks


def _recent_tokens(format: str) -> int:
    return SETTINGS.recent_tokens if is_packed(format) else 0


def _tokens_in(nbytes: int, step_nbytes: int) -> int:
    """Tokens of each sequence whose blocks fit, of `step_nbytes` a token of all."""
    return max(0, nbytes) // step_nbytes // SETTINGS.block_tokens * SETTINGS.block_tokens


def landmarks_nbytes(spec: ModelSpec, batch: int, tokens: int, sparsity: KvSparsity | None) -> int:
    """Bytes of what is known of blocks without reading them, a sketch of each; as much again is room to grow."""
    if sparsity is None or sparsity.evicts:
        return 0
    blocks = -(-tokens // SETTINGS.block_tokens)
    sketches = (shape.heads * SketchLayout(shape.key_width, SETTINGS.block_tokens).nbytes for shape in _shapes(spec))
    return 2 * batch * blocks * sum(sketches)


def fixed_nbytes(spec: ModelSpec, workload: Workload) -> int:
    """Bytes of layers that are not paged, beside blocks: windows as if they grew, and states."""
    growing = spec.kv_nbytes_per_token - sum(_token_nbytes_as_is(spec, shape) for shape in _shapes(spec))
    return workload.batch * (workload.context_tokens * max(0, growing) + spec.kv_fixed_nbytes)


def scratch_nbytes(spec: ModelSpec, workload: Workload) -> int:
    """Bytes of a pass over a paged cache, beside activations: masks, and a segment with queries and sums in fp32."""
    tokens = min(workload.context_tokens, workload.prefill_chunk_tokens)
    mask = workload.batch * tokens * workload.context_tokens * _MASK_COPIES
    widest = max(shape.heads * (shape.key_width + shape.value_width) for shape in _shapes(spec))
    segment = SETTINGS.segment_blocks * SETTINGS.block_tokens * widest * 4 * 2
    sums = workload.batch * tokens * spec.attention_nbytes_per_token * _FP32_COPIES
    return mask + segment + sums


def _shapes(spec: ModelSpec) -> list[KvShape]:
    return [shape for shape in spec.kv_shapes if shape is not None]


def _written(spec: ModelSpec, format: str) -> str:
    """The format of blocks that tokens are written to."""
    return spec.dtype if is_packed(format) else format


def _token_nbytes_as_is(spec: ModelSpec, shape: KvShape) -> int:
    size = 4 if spec.dtype == "fp32" else 2
    return shape.heads * (shape.key_width + shape.value_width) * size


def _segment_nbytes(spec: ModelSpec, format: str) -> int:
    written = _written(spec, format)
    largest = max(max(block_nbytes(shape, format), block_nbytes(shape, written)) for shape in _shapes(spec))
    return SETTINGS.segment_blocks * largest


def _staging_nbytes(spec: ModelSpec, format: str, ram_nbytes: int) -> int:
    segment = _segment_nbytes(spec, format)
    return max(2 * segment, min(SETTINGS.staging_segments * segment, ram_nbytes // 4))


def _open_nbytes(spec: ModelSpec, batch: int, format: str) -> int:
    recent = SETTINGS.recent_tokens // SETTINGS.block_tokens if is_packed(format) else 0
    return batch * (recent + 1) * sum(block_nbytes(shape, _written(spec, format)) for shape in _shapes(spec))


def _whole_nbytes(spec: ModelSpec, batch: int, tokens: int, format: str, *, above: bool = False) -> int:
    """Host memory in which a cache of so many tokens never spills; above: newer ones are in an accelerator's."""
    blocks = -(-tokens // SETTINGS.block_tokens) + 1
    own = batch * blocks * SETTINGS.block_tokens * token_nbytes(spec, format)
    beside = _open_nbytes(spec, batch, format) + batch * SETTINGS.piece_blocks * max(
        block_nbytes(shape, _written(spec, format)) for shape in _shapes(spec)
    )
    # A quarter of the memory is set apart for reading, at most.
    needed = own + beside
    segments = SETTINGS.staging_segments * _segment_nbytes(spec, format)
    landing = _segment_nbytes(spec, format) if above else 0
    return max(needed + segments + landing, minimum_nbytes(spec, batch, format, above=above))
