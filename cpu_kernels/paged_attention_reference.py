"""What `paged_attention` and its helpers must compute, in float64 and numpy; the signatures are theirs."""

from __future__ import annotations

import ctypes

import numpy as np
import numpy.typing as npt
import torch

from cpu_kernels.threads import Pool
from formats.kv import KvLayout
from formats.kv_pack import pack_kv_block, unpack_kv_block

Int64 = npt.NDArray[np.int64]
Bool = npt.NDArray[np.bool_]


def block_bytes(address: int, layout: KvLayout) -> npt.NDArray[np.uint8]:
    """The block at an address, not copied."""
    return np.ctypeslib.as_array((ctypes.c_uint8 * layout.nbytes).from_address(address))


def paged_attention_reference(
    query: torch.Tensor,
    offsets: Int64,
    addresses: Int64,
    lengths: Int64,
    first_positions: Int64,
    query_positions: Int64,
    layout: KvLayout,
    scale: float,
    *,
    window: int | None = None,
    softcap: float | None = None,
    valid: Bool | None = None,
    pool: Pool | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """As `paged_attention`, in float64: out [B, Hq, T, V], lse [B, Hq, T]."""
    batch, heads, positions, _ = query.shape
    group = heads // layout.kv_heads
    out = torch.zeros(batch, heads, positions, layout.output_width, dtype=torch.float64)
    lse = torch.full((batch, heads, positions), -torch.inf, dtype=torch.float64)
    for sequence in range(batch):
        tokens = int(lengths[sequence])
        if tokens == 0:
            continue
        found = addresses[offsets[sequence] : offsets[sequence + 1]]
        keys, values = read_tokens_reference(found, 0, tokens, layout)
        k, v = (part.double().repeat_interleave(group, 0) for part in (keys, values))
        scores = scale * query[sequence].double() @ k.mT
        if softcap is not None:
            scores = softcap * torch.tanh(scores / softcap)
        at = first_positions[sequence] + np.arange(tokens)
        here = query_positions[sequence][:, None]
        seen = at[None] <= here
        if window is not None:
            seen &= at[None] > here - window
        if valid is not None:
            seen &= valid[sequence, at][None]
        scores = scores.masked_fill(~torch.from_numpy(seen), -torch.inf)
        lse[sequence] = torch.logsumexp(scores, -1)
        some = torch.from_numpy(seen.any(1))
        weights = torch.softmax(scores[:, some], -1)
        # A weight of zero hides what it is multiplied with.
        v = torch.where(torch.from_numpy(seen.any(0))[None, :, None], v, 0)
        out[sequence][:, some] = weights @ v
    return out, lse


def merge_lse_reference(
    parts: list[tuple[torch.Tensor, torch.Tensor]], sinks: torch.Tensor | None = None
) -> torch.Tensor:
    """Attention over the tokens of all parts; sinks [Hq]: a score of each head that has no value."""
    lse = torch.stack([part.double() for _, part in parts])
    if sinks is not None:
        lse = torch.cat([lse, sinks.double()[None, None, :, None].expand(1, *lse.shape[1:])])
    largest = lse.amax(0)
    shares = torch.exp(lse - torch.where(largest.isinf(), 0, largest))
    shares = shares / shares.sum(0).clamp_min(torch.finfo(torch.float64).tiny)
    total = torch.zeros_like(parts[0][0], dtype=torch.float64)
    for (out, _), share in zip(parts, shares, strict=False):
        total += torch.where(share[..., None] > 0, out.double() * share[..., None], 0)
    return total


def write_tokens_reference(
    keys: torch.Tensor,
    values: torch.Tensor | None,
    offsets: Int64,
    addresses: Int64,
    first_tokens: Int64,
    layout: KvLayout,
    pool: Pool | None = None,
) -> None:
    """As `write_tokens`."""
    for sequence in range(len(keys)):
        found = addresses[offsets[sequence] : offsets[sequence + 1]]
        for token in range(keys.shape[2]):
            at = int(first_tokens[sequence]) + token
            block = block_bytes(int(found[at // layout.block_tokens]), layout)
            old_keys, old_values = unpack_kv_block(block.copy(), layout)
            place = at % layout.block_tokens
            old_keys[:, place] = keys[sequence, :, token].float().numpy()
            if values is not None:
                old_values[:, place] = values[sequence, :, token].float().numpy()
            block[:] = pack_kv_block(old_keys, None if layout.value_from_key else old_values, layout)


def read_tokens_reference(
    addresses: Int64, first_token: int, tokens: int, layout: KvLayout
) -> tuple[torch.Tensor, torch.Tensor]:
    """Keys [Hk, tokens, key_width] and values [Hk, tokens, output_width] of a list of blocks, as fp32."""
    parts = [unpack_kv_block(block_bytes(int(address), layout).copy(), layout) for address in addresses]
    span = slice(first_token, first_token + tokens)
    keys, values = (np.concatenate([part[side] for part in parts], 1)[:, span] for side in (0, 1))
    return torch.from_numpy(keys.copy()), torch.from_numpy(values.copy())


def pack_block_reference(source: int, source_layout: KvLayout, target: int, layout: KvLayout) -> None:
    """As `pack_block`: the full plain block at `source` packed to `target`."""
    keys, values = unpack_kv_block(block_bytes(source, source_layout).copy(), source_layout)
    block_bytes(target, layout)[:] = pack_kv_block(keys, None if layout.value_from_key else values, layout)
