"""Experts of one layer on the GPU, out of bundles wherever they lie in VRAM."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from formats.bundle import BundleLayout
from gpu_kernels.configs import ProductConfig, splits_of
from gpu_kernels.expert_mlp_kernel import gate_splits_kernel, grouped_linear_kernel
from gpu_kernels.grouping import FEW_PAIRS, PairGroups, group_pairs
from gpu_kernels.launch import DTYPE_OF_FORMAT, Threads, dot_type, launch, processors
from gpu_kernels.tiles import Kind, chosen

GATED_ACTIVATIONS = ("silu", "gelu", "gelu_tanh", "relu", "gpt_oss")
PLAIN_ACTIVATIONS = ("silu", "gelu", "gelu_tanh", "relu", "relu2")

_GATE_ROWS = 256
_LARGEST_OFFSET = 2**31 - 1


@dataclass(frozen=True)
class Cut:
    """How one product is computed.

    Attributes:
        config: tile sizes.
        splits: parts of the columns that are summed apart; for few tokens.
    """

    config: ProductConfig
    splits: int = 1


def expert_mlp(
    x: torch.Tensor,
    ids: torch.Tensor,
    table: torch.Tensor,
    layout: BundleLayout,
    activation: str,
    config: ProductConfig | None = None,
) -> torch.Tensor:
    """rows[s, t k + i] = the s-th part of down(act(gate x[t], up x[t])) of expert ids[t, i], without routing weights.

    Sums are fp32 in an order that the shapes alone decide; the activated product is rounded to x's dtype. Rows of
    pairs without an expert here are not written. `combine` sums the parts. Nothing waits for the device.

    Args:
        x: [T, H], contiguous: bf16, fp16 or fp32; of formats that are not packed, the format's own dtype.
        ids: int32 or int64 [T, k], contiguous.
        table: int64 [experts]: address of each expert's bundle (slab base + slot x slot bytes), 0 where not here.
        layout: of the bundles.
        activation: one of GATED_ACTIVATIONS, without a gate of PLAIN_ACTIVATIONS.
        config: tile sizes; None for what this kind of step takes on the device, see `tiles`.

    Returns:
        fp32 [S, T k, H].

    Raises:
        ValueError: a shape, dtype or layout that does not fit.
    """
    _check(x, ids, table, layout, layout.hidden)
    known = GATED_ACTIVATIONS if layout.has_gate else PLAIN_ACTIVATIONS
    if activation not in known:
        raise ValueError(
            f"activation {activation!r}: experts {'with' if layout.has_gate else 'without'} gate have {known}"
        )
    config = config or default_config(x, ids, layout)
    groups = group_pairs(ids, table, config.tokens)
    cut = _cut(x.device, groups, config, layout.intermediate, layout.hidden)
    if cut.splits == 1:
        h = torch.empty(groups.pairs, layout.intermediate, dtype=x.dtype, device=x.device)
        _into(x, groups, table, layout, h, activation, cut)
    else:
        width = layout.intermediate * (2 if layout.has_gate else 1)
        sums = torch.empty(cut.splits, groups.pairs, width, dtype=torch.float32, device=x.device)
        _into(x, groups, table, layout, sums, "", cut)
        h = _gate_splits(sums, x.dtype, layout, activation)
    return expert_down(h, groups, table, layout, config)


def expert_up(
    x: torch.Tensor, groups: PairGroups, table: torch.Tensor, layout: BundleLayout, config: ProductConfig
) -> torch.Tensor:
    """Gate | up of every pair, before the activation: fp32 [T k, 2 I], without a gate [T k, I].

    For gates that only the model's own module knows. Arguments as of `expert_mlp`; `groups` were made with
    `config.tokens`.
    """
    _check(x, None, table, layout, layout.hidden)
    width = layout.intermediate * (2 if layout.has_gate else 1)
    out = torch.empty(groups.pairs, width, dtype=torch.float32, device=x.device)
    _into(x, groups, table, layout, out, "", Cut(config))
    return out


def expert_down(
    h: torch.Tensor, groups: PairGroups, table: torch.Tensor, layout: BundleLayout, config: ProductConfig
) -> torch.Tensor:
    """The down projection of every pair's own row of h [T k, I]: fp32 [S, T k, H], as `expert_mlp` returns it."""
    _check(h, None, table, layout, layout.intermediate)
    cut = _cut(h.device, groups, config, layout.hidden, layout.intermediate)
    out = torch.empty(cut.splits, groups.pairs, layout.hidden, dtype=torch.float32, device=h.device)
    down = _offsets(layout, "down")
    shape = (layout.hidden, layout.intermediate)
    _product(h, groups, table, layout, out, shape, 1, (*down, *down), cut, gated=False, activation="")
    return out


def default_config(x: torch.Tensor, ids: torch.Tensor, layout: BundleLayout) -> ProductConfig:
    """What a step of these shapes takes on x's device."""
    return chosen(x.device, Kind(layout, x.element_size(), few=ids.numel() <= FEW_PAIRS))


def _into(
    x: torch.Tensor,
    groups: PairGroups,
    table: torch.Tensor,
    layout: BundleLayout,
    out: torch.Tensor,
    activation: str,
    cut: Cut,
) -> None:
    up = _offsets(layout, "up")
    gate = _offsets(layout, "gate") if layout.has_gate else up
    shape = (layout.intermediate, layout.hidden)
    _product(
        x, groups, table, layout, out, shape, groups.top_k, (*gate, *up), cut, gated=layout.has_gate,
        activation=activation,
    )  # fmt: skip


def _product(
    x: torch.Tensor,
    groups: PairGroups,
    table: torch.Tensor,
    layout: BundleLayout,
    out: torch.Tensor,
    shape: tuple[int, int],
    pairs_of_row: int,
    offsets: tuple[int, ...],
    cut: Cut,
    *,
    gated: bool,
    activation: str,
) -> None:
    config = cut.config
    rows, columns = shape
    sizes = (groups.tile_count, groups.pairs, rows, columns, pairs_of_row)
    launch(
        grouped_linear_kernel,
        (groups.tile_count, -(-rows // config.rows), cut.splits),
        (x, table, groups.order, groups.tiles, out, *sizes, *offsets),
        config.threads,
        x.device,
        FORMAT=layout.format,
        DOT=dot_type(x.dtype),
        GATED=gated,
        BIAS=layout.has_bias,
        ACTIVATION=activation,
        SPLITS=cut.splits,
        SCALE_WEIGHTS=config.scale_weights,
        TOKENS=config.tokens,
        ROWS=config.rows,
        COLUMNS=config.columns,
    )


def _gate_splits(sums: torch.Tensor, dtype: torch.dtype, layout: BundleLayout, activation: str) -> torch.Tensor:
    splits, pairs, _ = sums.shape
    h = torch.empty(pairs, layout.intermediate, dtype=dtype, device=sums.device)
    launch(
        gate_splits_kernel,
        (pairs, -(-layout.intermediate // _GATE_ROWS)),
        (sums, h, pairs, layout.intermediate),
        Threads(warps=2),
        sums.device,
        GATED=layout.has_gate,
        ACTIVATION=activation,
        SPLITS=splits,
        ROWS=_GATE_ROWS,
    )
    return h


def _offsets(layout: BundleLayout, matrix: str) -> tuple[int, int, int]:
    """Byte offsets of a matrix's weights, scales and bias; 0 for what it has not."""
    parts = layout.components
    return tuple(parts[name].offset if name in parts else 0 for name in (matrix, f"{matrix}_scale", f"{matrix}_bias"))  # type: ignore[return-value]


def _cut(device: torch.device, groups: PairGroups, config: ProductConfig, rows: int, columns: int) -> Cut:
    if config.tokens > 16:
        return Cut(config)
    programs = groups.tile_count * -(-rows // config.rows)
    steps = -(-columns // config.columns)
    return Cut(config, splits_of(programs, config.threads.warps, steps, processors(device)))


def _check(x: torch.Tensor, ids: torch.Tensor | None, table: torch.Tensor, layout: BundleLayout, columns: int) -> None:
    expected = DTYPE_OF_FORMAT.get(layout.format, x.dtype)
    if x.dim() != 2 or x.shape[1] != columns or x.dtype != expected or not x.is_contiguous():
        raise ValueError(
            f"experts of {layout.format} take contiguous {expected} [rows, {columns}], found {x.dtype} {tuple(x.shape)}"
        )
    if ids is not None and len(ids) != len(x):
        raise ValueError(f"ids: expected {len(x)} rows, one for each of x, found {len(ids)}")
    if any(tensor is not None and tensor.device != x.device for tensor in (ids, table)):
        raise ValueError(f"ids and table must be on {x.device}, where x is")
    if layout.nbytes > _LARGEST_OFFSET:
        raise ValueError(f"an expert of {layout.nbytes:,} bytes: kernels address at most {_LARGEST_OFFSET:,}")
