"""Reference of `estimate_largest_scores`: the same integers, all sums in float64."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import torch

from formats.key_sketch import SKETCH_CHANNELS, SketchLayout, sketched_keys


def largest_scores_reference(
    query: torch.Tensor, sketches: torch.Tensor, layout: SketchLayout
) -> npt.NDArray[np.float64]:
    """Arguments as of `estimate_largest_scores`; float64 [B, Hk, C]."""
    batch, heads, blocks, _ = sketches.shape
    rows = query.float().reshape(batch, heads, -1, layout.width).numpy()
    found = np.empty((batch, heads, blocks))
    for place in np.ndindex(found.shape):
        middles, deviations, factors = sketched_keys(sketches[place].numpy(), layout)
        weights = rows[place[:2]] * np.abs(deviations[0])
        padded = np.zeros((len(weights), layout.columns), np.float32)
        padded[:, : layout.width] = np.abs(weights)
        fours = padded.reshape(len(weights), -1, 4, SKETCH_CHANNELS // 4)
        largest = (((fours[:, :, 0] + fours[:, :, 1]) + fours[:, :, 2]) + fours[:, :, 3]).max((1, 2))
        limit = np.float32(min(127, 65535 // (layout.columns // 4)) - 2)
        some = largest > np.float32(1e-30)
        factor = np.where(some, limit / np.where(some, largest, np.float32(1)), np.float32(0))
        whole = np.rint(weights * factor[:, None]).astype(np.float64)
        unit = (largest / limit).astype(np.float64)
        deviation = factors * (whole @ np.sign(deviations.astype(np.float64)).T)
        found[place] = (rows[place[:2]].astype(np.float64) @ middles + unit * deviation.max(1)).max()
    return found
