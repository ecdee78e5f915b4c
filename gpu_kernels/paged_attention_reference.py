"""What `paged_attention` must give, in float64."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import torch

from formats.kv import KvLayout
from formats.kv_pack import unpack_kv_block

Bytes = npt.NDArray[np.uint8]


def paged_attention_reference(
    query: torch.Tensor,
    lists: list[list[Bytes]],
    lengths: list[int],
    first_positions: list[int],
    query_positions: torch.Tensor,
    layout: KvLayout,
    scale: float,
    *,
    window: int | None = None,
    softcap: float | None = None,
    valid: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """float64 [n, Hq, T, V] and the log-sum-exp [n, Hq, T].

    Args:
        query: as of `paged_attention`, on the CPU; so are query_positions and valid.
        lists: of each list its blocks' bytes, uint8 [layout.nbytes].
        lengths: as there.
        first_positions: as there.
        query_positions: as there.
        layout: as there.
        scale: as there.
        window: as there.
        softcap: as there.
        valid: as there.
    """
    count, heads, new, _ = query.shape
    group = heads // layout.kv_heads
    out = torch.zeros(count, heads, new, layout.output_width, dtype=torch.float64)
    lse = torch.full((count, heads, new), -torch.inf, dtype=torch.float64)
    for index, (blocks, length) in enumerate(zip(lists, lengths, strict=True)):
        if length == 0:
            continue
        sides = zip(*(unpack_kv_block(block, layout) for block in blocks), strict=True)
        found = [torch.from_numpy(np.concatenate(side, 1)[:, :length]).double() for side in sides]
        k, v = (part.repeat_interleave(group, 0) for part in found)
        scores = scale * query[index].double() @ k.mT
        if softcap is not None:
            scores = softcap * torch.tanh(scores / softcap)
        at = first_positions[index] + torch.arange(length)
        here = query_positions[index][:, None]
        seen = at[None] <= here
        if window is not None:
            seen &= at[None] > here - window
        if valid is not None:
            seen &= valid[index, at][None]
        scores = scores.masked_fill(~seen, -torch.inf)
        lse[index] = torch.logsumexp(scores, -1)
        some = seen.any(1)
        # A weight of zero hides what it is multiplied with.
        v = torch.where(seen.any(0)[None, :, None], v, 0)
        out[index][:, some] = torch.softmax(scores[:, some], -1) @ v
    return out, lse
